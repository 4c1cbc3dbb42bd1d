"""The derivative of the K-th iterate of a KSP."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from firedrake.petsc import PETSc

from prdp_fem.ranks.finite import require_finite
from prdp_fem.unrolled.backwards import Backwards, advance
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.restated_ksp import RestatedKSP, entry_of
from prdp_fem.unrolled.tangents import Tangents
from prdp_fem.unrolled.values import Values, Vector

__all__ = ["UnrolledKSP"]


class UnrolledKSP:
    """The map from operator, right-hand side and guess to a KSP's K-th iterate, differentiated.

    The KSP's own solve stays what it is. Its iteration is stated again here, to rounding, and that
    is differentiated, as is the dependence on the operator of preconditioners that are stated
    again; any other counts as constant, of which a warning tells. So do the bounds of Chebyshev's
    iteration and all that options set. Which methods and preconditioners there are,
    :mod:`prdp_fem.unrolled.registry` says.

    The null spaces that the operator has attached are treated as PETSc treats them. What options
    set is read at the first use, when the KSP is set up if it is not. All methods are collective;
    equal arguments give equal bits.

    Derivatives with respect to the operator are those of the formulas that PETSc evaluates, with
    each entry on its own. Other formulas for the same method may have others where a change of the
    operator is not symmetric, for methods that ask for a symmetric one.

    Parameters
    ----------
    ksp : PETSc.KSP
        It has its operators by the first use. Only its type is looked at before.
    checkpoints : int or None
        How many states of the iteration are kept for :meth:`adjoint`, beside one stretch between
        two of them that is worked out again; for GMRES a stretch is of whole cycles between
        restarts. None keeps all.
    options : mapping or None
        Options of the KSP without prefix, where PETSc's own may have lost them by the first use,
        such as ``solver_parameters``. They matter where PETSc does not tell a number to its last
        digit: the scale of Richardson, the bounds of Chebyshev, and ω of SOR.
    name : str or None
        The name of what is solved for, for messages.

    Raises
    ------
    ValueError
        For a method that cannot be unrolled.

    Notes
    -----
    What is not finite, or breaks down, is a :class:`firedrake.exceptions.ConvergenceError`.
    """

    def __init__(
        self,
        ksp: PETSc.KSP,
        *,
        checkpoints: int | None = None,
        options: Mapping | None = None,
        name: str | None = None,
    ):
        if checkpoints is not None and checkpoints < 1:
            raise ValueError(f"checkpoints={checkpoints}: expected None or at least 1")
        self.ksp = ksp
        self.checkpoints = checkpoints
        self._options = options
        self._name = name
        self._entry = entry_of(ksp)
        # It is made at the first use, when the KSP is set up.
        self._restated: RestatedKSP | None = None

    @property
    def is_linear(self) -> bool:
        """Whether the iterate is affine in right-hand side and guess; once the KSP is set up."""
        return self._prepared().method.is_linear

    def prepare(self, symmetric: bool | None = None) -> None:
        """Look at how the KSP is set, which is set up if it is not.

        The methods below do so by themselves.

        Parameters
        ----------
        symmetric : bool or None
            As in :meth:`adjoint`; None where no transpose is asked for.

        Raises
        ------
        ValueError
            For what cannot be unrolled; where ``symmetric`` is False, also for a preconditioner
            without a transpose.
        """
        self._prepared(symmetric)

    def _prepared(self, symmetric: bool | None = None) -> RestatedKSP:
        """What states the KSP again, for its present operators; see :meth:`prepare`."""
        if self._restated is None:
            self._restated = RestatedKSP(self.ksp, self._options)
            self._entry = self._restated.entry
        self._restated.refresh(symmetric)
        return self._restated

    def completed_iterations(self) -> int:
        """The iterations that the last solve's result is the outcome of.

        They may be one less than PETSc counts, where it counts the one that it had begun when it
        found itself done.
        """
        iterations = self.ksp.getIterationNumber()
        if self._entry.restated.counts_unfinished and 0 < iterations < self.ksp.getTolerances()[3]:
            return iterations - 1
        return iterations

    def iterate(
        self, b: PETSc.Vec, guess: PETSc.Vec | None, iterations: int, out: PETSc.Vec
    ) -> None:
        """The K-th iterate.

        Parameters
        ----------
        b : PETSc.Vec
        guess : PETSc.Vec or None
            None for zero.
        iterations : int
            K.
        out : PETSc.Vec
            What is written to; not one of the others.
        """
        restated = self._prepared()
        on = Values(restated.system, restated.pool)
        method = restated.method
        start = None if guess is None else Vector(guess)
        state = method.initial(on, restated.right_hand_side(b), start)
        state = advance(on, method, state, method.steps(iterations))
        _write((1.0, method.solution(on, state)), out)
        self._require_finite(iterations, "iterate", out)

    def tangent(
        self,
        b: PETSc.Vec,
        guess: PETSc.Vec | None,
        iterations: int,
        out: PETSc.Vec,
        *,
        b_tangent: PETSc.Vec | None = None,
        guess_tangent: PETSc.Vec | None = None,
        operator_tangent: PETSc.Mat | None = None,
        preconditioner_tangent: PETSc.Mat | None = None,
    ) -> None:
        """How the K-th iterate changes with its inputs: the derivative in a direction.

        Parameters
        ----------
        b, guess, iterations
            As in :meth:`iterate`.
        out : PETSc.Vec
            What is written to; not one of the others.
        b_tangent, guess_tangent : PETSc.Vec or None
        operator_tangent : PETSc.Mat or None
            It may be of any type.
        preconditioner_tangent : PETSc.Mat or None
            That of the matrix that the preconditioner is made from, with the pattern of that. Where
            this is the operator itself, the tangent of the operator is taken unless another is
            given here.
        """
        restated = self._prepared()
        system = restated.system
        method = restated.method
        if preconditioner_tangent is None and system.P.handle == system.A.handle:
            preconditioner_tangent = operator_tangent
        on = Tangents(system, restated.pool, operator_tangent, preconditioner_tangent)
        start = None
        if guess is not None or guess_tangent is not None:
            start = on.lifted(
                restated.zero() if guess is None else Vector(guess),
                None if guess_tangent is None else Vector(guess_tangent),
            )
        right = on.lifted(
            restated.right_hand_side(b),
            None if b_tangent is None else restated.right_hand_side(b_tangent),
        )
        state = advance(on, method, method.initial(on, right, start), method.steps(iterations))
        solution = method.solution(on, state)
        _write((1.0, None if solution is None else solution.tangent), out)
        self._require_finite(iterations, "tangent", out)

    def adjoint(
        self,
        b: PETSc.Vec,
        guess: PETSc.Vec | None,
        iterations: int,
        cotangent: PETSc.Vec,
        *,
        b_cotangent: PETSc.Vec,
        guess_cotangent: PETSc.Vec | None = None,
        operator_cotangent: OperatorCotangent | None = None,
        preconditioner_cotangent: OperatorCotangent | None = None,
        symmetric: bool = False,
    ) -> None:
        """From the derivative of a number by the K-th iterate, those by the inputs of that.

        Parameters
        ----------
        b, guess, iterations
            As in :meth:`iterate`.
        cotangent : PETSc.Vec
            The derivative with respect to the iterate.
        b_cotangent, guess_cotangent : PETSc.Vec
            What is written to; not one of the others.
        operator_cotangent : OperatorCotangent or None
            What the derivative with respect to the operator is added to.
        preconditioner_cotangent : OperatorCotangent or None
            What that with respect to the matrix is added to that the preconditioner is made from.
            Where this is the operator itself, the derivative goes to that of the operator unless
            another is given here.
        symmetric : bool
            Whether A and the preconditioner are known to be symmetric, so that a product with A
            does for one with Aᵀ, which is slower.
        """
        restated = self._prepared(symmetric)
        system = restated.system
        if preconditioner_cotangent is None and system.P.handle == system.A.handle:
            preconditioner_cotangent = operator_cotangent
        right = restated.right_hand_side(b)
        start = None if guess is None else Vector(guess)
        if start is None and guess_cotangent is not None:
            start = restated.zero()
        backwards = Backwards(restated.method, system, restated.pool, self.checkpoints)
        bars = backwards.cotangents(
            right,
            start,
            iterations,
            Vector(cotangent),
            operator_cotangent,
            preconditioner_cotangent,
        )
        _write(bars[0], b_cotangent)
        system.project_right_hand_side(b_cotangent)
        results = [b_cotangent]
        if guess_cotangent is not None:
            _write(bars[1], guess_cotangent)
            results.append(guess_cotangent)
        self._require_finite(iterations, "derivative", *results)

    def _require_finite(self, iterations: int, what: str, *results: PETSc.Vec) -> None:
        suspicious = [vector for vector in results if not math.isfinite(vector.norm())]
        if suspicious:  # on all ranks; but numbers may only be too large to be squared
            whose = "" if self._name is None else f" for '{self._name}'"
            _look(self.ksp, suspicious, f"the {what} of {iterations} iterations", whose)


def _look(ksp: PETSc.KSP, vectors: Sequence[PETSc.Vec], what: str, whose: str) -> None:
    """Raise where vectors hold numbers that are not finite."""
    require_finite(
        ksp.comm.tompi4py(),
        [vector.array_r[None] for vector in vectors],
        lambda _: (
            f"{what} of ksp_type {ksp.getType()}{whose} holds NaN or infinity: look for them in"
            " what it is made of, or for an iteration that diverges"
        ),
    )


def _write(bar: tuple[float, Vector | None], out: PETSc.Vec) -> None:
    factor, vector = bar
    if vector is None:
        out.zeroEntries()
    else:
        vector.vec.copy(out)
        if factor != 1:
            out.scale(factor)
