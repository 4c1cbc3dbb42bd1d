"""The derivative of the K-th iterate of a KSP."""
from __future__ import annotations

import math
import re
from collections.abc import Mapping

from firedrake.petsc import PETSc

from prdp_fem.krylov.nested import krylov_method_inside
from prdp_fem.krylov.view import described, setting, settings
from prdp_fem.ranks.finite import require_finite
from prdp_fem.unrolled import methods
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem
from prdp_fem.unrolled.steepest_descent import SteepestDescent
from prdp_fem.unrolled.tangents import Tangents
from prdp_fem.unrolled.trace import Trace, TracedScalar, TracedVector
from prdp_fem.unrolled.values import Values, Vector, VectorPool

__all__ = ["UnrolledKSP"]

_METHODS = ("bcgs", "cg", "chebyshev", "fgmres", "gmres", "richardson", "python with prdp_fem.unrolled.SteepestDescent")
# Preconditioners that do Richardson's iterations with a scale of 1 themselves, by sweeps and cycles that start from the iterate.
_OWN_RICHARDSON = frozenset({"sor", "mg", "gamg", "hmg", "hypre", "telescope", "shell"})


class UnrolledKSP:
    """The map from an operator, a right-hand side and a guess to the K-th iterate of a KSP, and its derivatives.

    The KSP's own solve stays what it is. Its iteration is stated again here (:mod:`prdp_fem.unrolled.methods`), to rounding, and that is
    differentiated, as is the dependence of the preconditioners jacobi, pbjacobi and sor on the operator; any other counts as constant, of
    which a warning tells. So do the bounds of Chebyshev's iteration and all that options set.

    The null spaces that the operator has attached are treated as PETSc treats them. What options set is read at the first use, when the
    KSP is set up if it is not. All methods are collective; equal arguments give equal bits.

    Derivatives with respect to the operator are those of the formulas that PETSc evaluates, with each entry on its own. Other formulas for
    the same method may have others where a change of the operator is not symmetric, for methods that ask for a symmetric one.

    Parameters
    ----------
    ksp : PETSc.KSP
        With its operators by the first use. Only its type is looked at before.
    checkpoints : int or None
        How many states of the iteration are kept for :meth:`adjoint`, beside one stretch between two of them that is worked out again; for
        GMRES a stretch is of whole cycles between restarts. None keeps all.
    options : mapping or None
        Options of the KSP without prefix, where PETSc's own may have lost them by the first use, such as ``solver_parameters``. They matter
        where PETSc does not tell a number to its last digit: the scale of Richardson, the bounds of Chebyshev, and ω of SOR.

    name : str or None
        Of what is solved for, for messages.

    Raises
    ------
    ValueError
        For a method that cannot be unrolled.

    Notes
    -----
    What is not finite, or breaks down, is a :class:`firedrake.exceptions.ConvergenceError`.
    """

    def __init__(self, ksp: PETSc.KSP, *, checkpoints: int | None = None,
                 options: Mapping | None = None, name: str | None = None):
        kind = ksp.getType()
        if kind == "python":
            python_type = ksp.getPythonType() or PETSc.Options(ksp.getOptionsPrefix()).getString("ksp_python_type", "")
            known = isinstance(ksp.getPythonContext(), SteepestDescent) or python_type.endswith("SteepestDescent")
        else:
            known = kind in _METHODS
        if not known:
            raise ValueError(f"ksp_type {kind} has no unrolled derivative: use one of {', '.join(_METHODS)}, or implicit differentiation")
        if checkpoints is not None and checkpoints < 1:
            raise ValueError(f"checkpoints={checkpoints}: expected None or at least 1")
        self.ksp, self.checkpoints = ksp, checkpoints
        self._options, self._name = options, name
        self._method = None

    def forget_operators(self) -> None:
        """Look again at how the KSP is set, at the next use, since its operators are of another type now."""
        self._method = None

    @property
    def is_linear(self) -> bool:
        """Whether the iterate is an affine function of right-hand side and guess; once the KSP is set up."""
        self.prepare()
        return self._method.is_linear

    def prepare(self, symmetric: bool | None = None) -> None:
        """Look at how the KSP is set, which is set up if it is not; the methods below do so by themselves.

        Parameters
        ----------
        symmetric : bool or None
            As in :meth:`adjoint`; None where no transpose is asked for.

        Raises
        ------
        ValueError
            For what cannot be unrolled; where ``symmetric`` is False, also for a preconditioner without a transpose.
        """
        if self._method is None:
            self.ksp.setUp()
            self._method = _method_of(self.ksp, self._options)
            A, _ = self.ksp.getOperators()
            self._pool = VectorPool(A.createVecRight)
            self._system = PreconditionedSystem(self.ksp, self._options)
        self._system.refresh(bool(symmetric))
        if symmetric is False:
            self._system.preconditioner.require_transpose()

    def _right_hand_side(self, b: PETSc.Vec) -> Vector:
        if not self._system.has_left_null_space:
            return Vector(b)
        projected = self._pool.take()
        b.copy(projected.vec)
        self._system.project_right_hand_side(projected.vec)
        return projected

    def _zero(self) -> Vector:
        zero = self._pool.take()
        zero.vec.zeroEntries()
        return zero

    def completed_iterations(self) -> int:
        """The iterations that the last solve's result is the outcome of, which for Chebyshev's may be one less than PETSc counts."""
        iterations = self.ksp.getIterationNumber()
        if self.ksp.getType() == PETSc.KSP.Type.CHEBYSHEV and 0 < iterations < self.ksp.getTolerances()[3]:
            return iterations - 1  # the one that it had begun when it found itself done
        return iterations

    def iterate(self, b: PETSc.Vec, guess: PETSc.Vec | None, iterations: int, out: PETSc.Vec) -> None:
        """The K-th iterate.

        Parameters
        ----------
        b : PETSc.Vec
        guess : PETSc.Vec or None
            None for zero.
        iterations : int
            K.
        out : PETSc.Vec
            Written to; not one of the others.
        """
        self.prepare()
        on, method = Values(self._system, self._pool), self._method
        state = method.initial(on, self._right_hand_side(b), None if guess is None else Vector(guess))
        state = _advance(on, method, state, method.steps(iterations))
        solution = method.solution(on, state)
        if solution is None:
            out.zeroEntries()
        else:
            solution.vec.copy(out)
        self._require_finite(iterations, "iterate", out)

    def tangent(self, b: PETSc.Vec, guess: PETSc.Vec | None, iterations: int, out: PETSc.Vec, *, b_tangent: PETSc.Vec | None = None,
                guess_tangent: PETSc.Vec | None = None, operator_tangent: PETSc.Mat | None = None,
                preconditioner_tangent: PETSc.Mat | None = None) -> None:
        """How the K-th iterate changes with its inputs: the derivative in a direction.

        Parameters
        ----------
        b, guess, iterations
            As in :meth:`iterate`.
        out : PETSc.Vec
            Written to; not one of the others.
        b_tangent, guess_tangent : PETSc.Vec or None
        operator_tangent : PETSc.Mat or None
            Of any type.
        preconditioner_tangent : PETSc.Mat or None
            Of the matrix that the preconditioner is made from, with the pattern of that. Where this is the operator itself, the tangent of
            the operator is taken unless another is given here.
        """
        self.prepare()
        system, method = self._system, self._method
        if preconditioner_tangent is None and system.P.handle == system.A.handle:
            preconditioner_tangent = operator_tangent
        on = Tangents(system, self._pool, operator_tangent, preconditioner_tangent)
        start = None
        if guess is not None or guess_tangent is not None:
            start = on.lifted(self._zero() if guess is None else Vector(guess), None if guess_tangent is None else Vector(guess_tangent))
        right = on.lifted(self._right_hand_side(b), None if b_tangent is None else self._right_hand_side(b_tangent))
        state = _advance(on, method, method.initial(on, right, start), method.steps(iterations))
        solution = method.solution(on, state)
        if solution is None or solution.tangent is None:
            out.zeroEntries()
        else:
            solution.tangent.vec.copy(out)
        self._require_finite(iterations, "tangent", out)

    def adjoint(self, b: PETSc.Vec, guess: PETSc.Vec | None, iterations: int, cotangent: PETSc.Vec, *, b_cotangent: PETSc.Vec,
                guess_cotangent: PETSc.Vec | None = None, operator_cotangent: OperatorCotangent | None = None,
                preconditioner_cotangent: OperatorCotangent | None = None, symmetric: bool = False) -> None:
        """From the derivative of a number with respect to the K-th iterate, those with respect to its inputs.

        Parameters
        ----------
        b, guess, iterations
            As in :meth:`iterate`.
        cotangent : PETSc.Vec
            The derivative with respect to the iterate.
        b_cotangent, guess_cotangent : PETSc.Vec
            Written to; not one of the others.
        operator_cotangent : OperatorCotangent or None
            Added to.
        preconditioner_cotangent : OperatorCotangent or None
            For the matrix that the preconditioner is made from; added to. Where this is the operator itself, its derivative goes to that of
            the operator unless another is given here.
        symmetric : bool
            Whether A and the preconditioner are known to be symmetric, so that a product with A does for one with Aᵀ, which is slower.
        """
        self.prepare(symmetric)
        system, pool, method = self._system, self._pool, self._method
        if preconditioner_cotangent is None and system.P.handle == system.A.handle:
            preconditioner_cotangent = operator_cotangent
        right, start = self._right_hand_side(b), None if guess is None else Vector(guess)
        if start is None and guess_cotangent is not None:
            start = self._zero()
        # What is linear in b and the guess keeps no vectors for their cotangents, so that checkpoints would spare none.
        is_linear = method.is_linear and operator_cotangent is None and preconditioner_cotangent is None
        stretches, states = self._stretches(right, start, iterations, None if is_linear else self.checkpoints)
        # The cotangents of the state at the end of a stretch, from the stretch that follows it.
        bars: list = []
        for number in reversed(range(len(stretches))):
            on = Trace(system, pool, operator_cotangent, preconditioner_cotangent, is_linear)
            if number == 0:
                lifted = [on.lifted(right), None if start is None else on.lifted(start)]
                state = method.initial(on, *lifted)
            else:
                lifted = state = tuple(None if part is None else on.lifted(part) for part in states.pop())
            state = _advance(on, method, state, stretches[number])
            if number == len(stretches) - 1:
                solution = method.solution(on, state)
                if solution is not None:
                    solution.cotangent.add(1.0, Vector(cotangent), pool)
            for part, bar in zip(state, bars):
                if isinstance(part, TracedVector):
                    if bar[1] is not None:
                        part.cotangent.add(*bar, pool)
                elif isinstance(part, TracedScalar):
                    part.cotangent = part.cotangent + bar
            del state
            solution = part = None
            on.play_backwards()
            bars = [_cotangent(part, pool) for part in lifted]
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
            comm, rows = self.ksp.comm.tompi4py(), [vector.array_r[None] for vector in suspicious]
            require_finite(comm, rows, lambda _: (
                f"the {what} of {iterations} iterations of ksp_type {self.ksp.getType()}{whose} "
                "holds NaN or infinity: look for them in what it is made of, or for an iteration "
                "that diverges"))

    def _stretches(self, b: Vector, guess: Vector | None, iterations: int,
                   checkpoints: int | None) -> tuple[list[list[int]], list[tuple]]:
        """The steps between checkpoints, and the states at the checkpoints: at the beginning of each stretch but the first."""
        method = self._method
        steps = method.steps(iterations)
        if checkpoints is None or len(steps) <= 1:
            return [steps], []
        length = math.ceil(len(steps)/(checkpoints + 1))
        stretches = [steps[i:i + length] for i in range(0, len(steps), length)]
        on = Values(self._system, self._pool)
        state, states = method.initial(on, b, guess), []
        for stretch in stretches[:-1]:
            state = _advance(on, method, state, stretch)
            states.append(state)
        return stretches, states


def _advance(on, method, state: tuple, steps: list[int]) -> tuple:
    for iterations in steps:
        following = method.advance(on, state, iterations)
        if following is state:
            break
        state = following
    return state


def _cotangent(part: TracedVector | TracedScalar | None, pool: VectorPool):
    """Of a part of a state: a factor and a vector, or a number."""
    if part is None:
        return None
    return part.cotangent.total(pool) if isinstance(part, TracedVector) else part.cotangent


def _write(bar: tuple[float, Vector | None], out: PETSc.Vec) -> None:
    factor, vector = bar
    if vector is None:
        out.zeroEntries()
    else:
        vector.vec.copy(out)
        if factor != 1:
            out.scale(factor)


def _method_of(ksp: PETSc.KSP, options: Mapping | None):
    """The method of a KSP that is set up, as it is set."""
    text = described(ksp).split("PC Object")[0]
    if ksp.getInitialGuessKnoll():
        raise ValueError("ksp_knoll makes a guess of the right-hand side: unrolled differentiation needs to be given the guess")
    if "diagonally scaled" in text:
        raise ValueError("ksp_diagonal_scale changes the operator for the time of a solve, which is not unrolled: use pc_type jacobi")
    if ksp.getPC().getType() == "eisenstat":
        raise ValueError("pc_type eisenstat changes the operator for the time of a solve, which is not unrolled: use pc_type sor")
    inner = krylov_method_inside(ksp)
    if inner is not None:
        raise ValueError(f"there is a {inner} inside the preconditioner, which is not linear then, and cannot be unrolled: use "
                         "implicit differentiation, or preonly, richardson or chebyshev there")
    side = ksp.getPCSide()
    match ksp.getType():
        case "richardson":
            return _richardson(ksp, text, options)
        case "chebyshev":
            kind = re.search(r"polynomial of (.*) kind", text)[1]
            if kind != "first":
                raise ValueError(f"Chebyshev polynomials of the {kind} kind have no unrolled derivative: use ksp_chebyshev_kind first")
            if "estimated" in text:
                raise ValueError("unrolled differentiation must know the bounds of the eigenvalues that Chebyshev's iteration uses, and "
                                 "PETSc does not tell what it has estimated: set ksp_chebyshev_eigenvalues smallest,largest")
            return methods.Chebyshev(*settings(ksp, text, r"targets used: min (\S+), max (\S+)", "ksp_chebyshev_eigenvalues", options))
        case "cg":
            return methods.ConjugateGradients()
        case "bcgs":
            if side != PETSc.PC.Side.LEFT:
                raise ValueError("bcgs with ksp_pc_side right may add the guess of an earlier solve: use ksp_pc_side left, or gmres")
            return methods.BiCGStab()
        case "gmres" | "fgmres" as kind:
            if "classical" not in text or "no iterative refinement" not in text:
                raise ValueError(f"{kind} is unrolled with PETSc's default orthogonalisation only: set ksp_orthogonalization cgs, without "
                                 "refinement")
            restart = int(re.search(r"restart=(\d+)", text)[1])
            return methods.FGMRES(restart) if kind == "fgmres" else methods.GMRES(restart, side == PETSc.PC.Side.RIGHT)
    return methods.SteepestDescentIteration()


def _richardson(ksp: PETSc.KSP, text: str, options: Mapping | None):
    kind = ksp.getPC().getType()
    if "self-scale" in text:
        if kind in _OWN_RICHARDSON:
            raise ValueError(f"with pc_type {kind} PETSc does not heed ksp_richardson_self_scale unless there is a monitor: self-scaled "
                             "Richardson iterations are unrolled for other preconditioners only")
        return methods.SelfScaledRichardson()
    scale = setting(ksp, text, r"damping factor=(\S+)", "ksp_richardson_scale", options)
    A, P = ksp.getOperators()
    if scale == 1 and kind in _OWN_RICHARDSON and A.handle != P.handle:
        raise ValueError(f"with pc_type {kind} and a ksp_richardson_scale of 1 PETSc iterates with the matrix that the preconditioner is "
                         "made from, instead of the operator: this is unrolled only where they are the same")
    return methods.Richardson(scale)
