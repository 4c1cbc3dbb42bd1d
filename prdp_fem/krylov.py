"""A setting put on a PETSc KSP, its solves, and the account of what they cost."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem import nested
from prdp_fem.ladders import Setting

__all__ = ["Krylov", "RefinedKSP", "Statistics"]

# Methods defined for symmetric operators and preconditioners only: for them a transposed solve is a solve.
_SYMMETRIC_METHODS = frozenset({"cg", "groppcg", "pipecg", "pipecgrr", "pipeprcg", "pipecg2", "pipelcg", "fcg", "pipefcg",
                                "nash", "stcg", "gltr", "qcg", "minres", "symmlq", "cr", "pipecr"})
_NEVER = 1e300
_REASONS = {value: name for name, value in vars(PETSc.KSP.ConvergedReason).items()
            if not name.startswith("_") and isinstance(value, int)}
_REMEDIES = {
    "DIVERGED_MAX_IT": "allow more iterations (ksp_max_it, or max_it of a tolerance ladder), a looser tolerance or a stronger pc_type",
    "DIVERGED_DTOL": "the iteration does not converge for this operator: try another ksp_type or pc_type, or damp it "
                     "(ksp_richardson_scale)",
    "DIVERGED_NANORINF": "look for NaN or infinity in the controls and coefficients, or for an operator that is singular",
    "DIVERGED_INDEFINITE_MAT": "the operator is not positive definite: use ksp_type minres or gmres",
    "DIVERGED_INDEFINITE_PC": "the preconditioner is not positive definite: use another pc_type, or ksp_type gmres",
    "DIVERGED_PCSETUP_FAILED": "the preconditioner could not be set up: the operator may be singular, or need another pc_type",
}


@dataclass
class Statistics:
    """What a solver has done since it was made, or since ``reset``.

    Attributes
    ----------
    solves, adjoint_solves, tangent_solves : int
        Problems solved, and linear systems for their derivatives.
    forward_iterations, adjoint_iterations, tangent_iterations : int
        KSP iterations spent in them.
    newton_steps : int
        Steps of nonlinear solves.
    assemblies : int
        How often the operator was assembled, and its preconditioner set up; outside nonlinear solves.
    forward_seconds, adjoint_seconds, tangent_seconds : float
        Wall-clock time of whole solves on this rank: right-hand sides, assembly and KSP.
    """

    solves: int = 0
    adjoint_solves: int = 0
    tangent_solves: int = 0
    forward_iterations: int = 0
    adjoint_iterations: int = 0
    tangent_iterations: int = 0
    newton_steps: int = 0
    assemblies: int = 0
    forward_seconds: float = 0.0
    adjoint_seconds: float = 0.0
    tangent_seconds: float = 0.0

    @property
    def iterations(self) -> int:
        """KSP iterations of all kinds."""
        return self.forward_iterations + self.adjoint_iterations + self.tangent_iterations

    @property
    def seconds(self) -> float:
        """Wall-clock time of all kinds."""
        return self.forward_seconds + self.adjoint_seconds + self.tangent_seconds

    def reset(self) -> None:
        """Start counting from zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)

    def add_seconds(self, kind: str, seconds: float) -> None:
        """Add to ``forward_seconds``, ``adjoint_seconds`` or ``tangent_seconds``."""
        name = f"{kind}_seconds"
        setattr(self, name, getattr(self, name) + seconds)


class RefinedKSP:
    """A KSP with the one that settings are put on: itself, or one inside its preconditioner.

    Parameters
    ----------
    ksp : PETSc.KSP
        With its operators and options.
    name : str
        Of what is solved for, for messages.
    prefix : str or None
        Options prefix of the KSP that settings are put on; None for the only iterative one.
    in_snes : bool
        Whether a SNES calls its solves.
    """

    def __init__(self, ksp: PETSc.KSP, name: str, prefix: str | None, *, in_snes: bool = False):
        self.ksp = ksp
        self._name, self._prefix, self._in_snes = name, prefix, in_snes
        self._refined: PETSc.KSP | None = None
        # What options had said, before a setting was put on it, of the KSP that one is on.
        self._options: dict[int, tuple] = {}
        self._is_budget = False
        self._hidden_iterations = 0
        self._hidden_failure: str | None = None

    @property
    def is_found(self) -> bool:
        """Whether it is known which KSP settings are put on, without anything set up."""
        return self._refined is not None

    def find(self) -> None:
        """Find the KSP that settings are put on; once the preconditioner is set up where that may have one inside."""
        refined = nested.find_iterative(self.ksp, self._prefix)
        if refined.handle == self.ksp.handle:
            refined = self.ksp
        if refined is not self.ksp or self._in_snes:
            refined.setPostSolve(self._after_hidden_solve)
        self._refined = refined

    def find_without_setup(self) -> None:
        """Find it where that takes no preconditioner that is set up."""
        if not nested.needs_set_up(self.ksp, self._prefix):
            self.find()

    def set_up(self) -> None:
        """To be called where the preconditioner was set up anew: KSPs inside may be others now."""
        if self._refined is not None and self._refined is not self.ksp:
            self.find()

    def _after_hidden_solve(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        self._hidden_iterations += ksp.getIterationNumber()
        reason = ksp.getConvergedReason()
        if reason < 0 and not (self._is_budget and reason == PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT):
            self._hidden_failure = _failure(ksp)

    def apply(self, setting: Setting | None, guess: bool) -> None:
        """Put a setting on the KSP; None, or a setting of None, for what its options say.

        Parameters
        ----------
        setting : Setting or None
        guess : bool
            Whether solves start from what is in the solution vector.
        """
        if setting is not None and setting.max_it is None:
            setting = None
        if setting is not None and self._refined is None:
            self.find()
        self._is_budget = setting is not None and setting.budget
        self._hidden_iterations, self._hidden_failure = 0, None
        refined = self.ksp if self._refined is None else self._refined
        if guess and refined is not self.ksp:
            self._put(self.ksp, None, True)
        self._put(refined, setting, guess and refined is self.ksp)
        self.ksp.setInitialGuessNonzero(guess)

    def _put(self, ksp: PETSc.KSP, setting: Setting | None, guess: bool) -> None:
        if setting is None and not guess:
            if ksp.handle in self._options:
                _, (rtol, atol, divtol, max_it), error_if_not_converged, norm = self._options.pop(ksp.handle)
                ksp.setTolerances(rtol=rtol, atol=atol, divtol=divtol, max_it=max_it)
                ksp.setErrorIfNotConverged(error_if_not_converged)
                ksp.setNormType(norm)
            return
        if ksp.handle not in self._options:
            self._options[ksp.handle] = ksp, ksp.getTolerances(), ksp.getErrorIfNotConverged(), ksp.getNormType()
        _, (rtol, atol, divtol, max_it), error_if_not_converged, norm = self._options[ksp.handle]
        if setting is not None:
            rtol, max_it = setting.rtol, setting.max_it
            # PETSc would take a used-up budget for an error; what is one is decided in checked_iterations.
            error_if_not_converged = False
            if setting.budget and norm == PETSc.KSP.NormType.PRECONDITIONED and ksp.getType() == PETSc.KSP.Type.CG:
                # For a budget any norm will do to see the floor and NaN by, and the natural one costs CG nothing.
                norm = PETSc.KSP.NormType.NATURAL
        if ksp.getNormType() != norm:
            ksp.setNormType(norm)
        if guess:
            divtol = _NEVER  # it is relative to the right-hand side, of which a guess may be any multiple away
        ksp.setTolerances(rtol=rtol, atol=atol, divtol=divtol, max_it=max_it)
        ksp.setErrorIfNotConverged(error_if_not_converged)

    def checked_iterations(self, kind: str) -> int:
        """The iterations that the last solve has spent, on the KSP that settings are put on.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where it failed.
        """
        ksp = self.ksp
        reason = ksp.getConvergedReason()
        is_nested = self._refined is not None and self._refined is not ksp
        if reason < 0 and not (reason == PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT and self._is_budget and not is_nested):
            raise ConvergenceError(f"the {kind} solve for '{self._name}' {self.failure()}")
        return self._account() if is_nested else ksp.getIterationNumber()

    def checked_newton_iterations(self, iterations: int) -> int:
        """The iterations that the steps of a SNES have spent, where they were those of ``ksp``: see :meth:`checked_iterations`."""
        return iterations if self._refined is None else self._account()

    def _account(self) -> int:
        if self._hidden_failure is not None:
            raise ConvergenceError(f"a linear solve inside that for '{self._name}' {self._hidden_failure}")
        iterations, self._hidden_iterations = self._hidden_iterations, 0
        return iterations

    def failure(self) -> str:
        """What went wrong in the last solve."""
        return self._hidden_failure or _failure(self.ksp)


def _failure(ksp: PETSc.KSP) -> str:
    reason = ksp.getConvergedReason()
    name = _REASONS.get(reason, str(reason))
    remedy = _REMEDIES.get(name)
    return (f"with ksp_type {ksp.getType()} and pc_type {ksp.getPC().getType()} failed: {name} after {ksp.getIterationNumber()} "
            f"iterations, residual norm {ksp.getResidualNorm():.3e}" + (f"; {remedy}" if remedy else ""))


class Krylov:
    """The solves of a linear system and its transpose, each told how far to go.

    They depend on nothing but their arguments: each starts from zero, or from the guess that it is given.

    Parameters
    ----------
    ksp : PETSc.KSP
        With its operators and options.
    transposed : callable
        A context manager with a KSP for the transposed operator, set up for its present values; used only where the
        preconditioner cannot be transposed.
    name : str
        Of what is solved for, for messages.
    prefix : str or None
        Options prefix of the KSP that settings are put on; None for the only iterative one.
    """

    def __init__(self, ksp: PETSc.KSP, transposed: Callable[[], AbstractContextManager[PETSc.KSP]], name: str, prefix: str | None):
        self.refined = RefinedKSP(ksp, name, prefix)
        self.ksp = ksp
        self._transposed = transposed
        self._name, self._prefix = name, prefix
        self._refined_transposed: RefinedKSP | None = None
        self._transposable: bool | None = None
        self._symmetric: bool | None = None

    def operator_changed(self) -> None:
        """Forget what was known of the operator's values."""
        self._symmetric = None
        self.refined.set_up()

    def solver(self, setting: Setting | None, *, guess: bool = False, kind: str = "forward") -> Callable[[PETSc.Vec, PETSc.Vec], int]:
        """A function that solves A x = b for b and x, and returns the iterations spent.

        It holds until another is asked for.

        Parameters
        ----------
        setting : Setting or None
            How far to go; None for what the KSP's options say.
        guess : bool
            Start from ``x`` instead of zero.
        kind : str
            What messages call the solve.

        Notes
        -----
        The function raises :class:`firedrake.exceptions.ConvergenceError` on NaN, breakdown or divergence, and where a tolerance
        is not reached; not for a used-up budget.
        """
        return self._solver(self.refined, self.ksp.solve, setting, guess, kind)

    def transposed_solver(self, setting: Setting | None) -> Callable[[PETSc.Vec, PETSc.Vec], int]:
        """A function that solves Aᵀ x = b from zero; see :meth:`solver`."""
        if self._is_symmetric():
            return self._solver(self.refined, self.ksp.solve, setting, False, "adjoint")
        if self._is_transposable():
            return self._solver(self.refined, self.ksp.solveTranspose, setting, False, "adjoint")

        def solve(b: PETSc.Vec, x: PETSc.Vec) -> int:
            with self._transposed() as ksp:
                if self._refined_transposed is None:
                    self._refined_transposed = RefinedKSP(ksp, self._name, self._prefix)
                self._refined_transposed.set_up()
                return self._solver(self._refined_transposed, ksp.solve, setting, False, "adjoint")(b, x)
        return solve

    @staticmethod
    def _solver(refined: RefinedKSP, solve: Callable, setting: Setting | None, guess: bool, kind: str) -> Callable:
        refined.apply(setting, guess)

        def solve_and_check(b: PETSc.Vec, x: PETSc.Vec) -> int:
            solve(b, x)
            return refined.checked_iterations(kind)
        return solve_and_check

    @cached_property
    def _probe(self) -> _Probe:
        return _Probe(self.ksp.getOperators()[0])

    def _is_symmetric(self) -> bool:
        if self._symmetric is None:
            self._symmetric = self.ksp.getType() in _SYMMETRIC_METHODS and self._probe.finds_symmetric(self.ksp.getOperators()[0])
        return self._symmetric

    def _is_transposable(self) -> bool:
        """Whether the preconditioner has a transpose, which PETSc tells only by trying."""
        if self._transposable is None:
            A, P = self.ksp.getOperators()
            pc = self.ksp.getPC()
            try:
                self._transposable = self._probe.finds_transposed(pc)
            except (PETSc.Error, AttributeError, NotImplementedError):
                self._transposable = False
            if not self._transposable:
                # A failed try leaves its mark on the preconditioners inside.
                pc.reset()
                self.ksp.setOperators(A, P)
                self.ksp.setUp()
                self.refined.set_up()
        return self._transposable


class _Probe:
    """Two vectors without a pattern, the same at every call, and room for their products.

    Parameters
    ----------
    A : PETSc.Mat
    """

    def __init__(self, A: PETSc.Mat):
        self.x, self.y = A.createVecs()
        index = np.arange(*self.x.getOwnershipRange())
        self.x.setArray(np.sin(1 + 1.3*index))
        self.y.setArray(np.cos(2 + 0.7*index))
        self.Ax, self.Ay = self.x.duplicate(), self.x.duplicate()

    def finds_symmetric(self, A: PETSc.Mat) -> bool:
        """Compare (A x, y) with (x, A y): two products, where PETSc's own test compares matrices."""
        A.mult(self.x, self.Ax)
        A.mult(self.y, self.Ay)
        size = self.Ax.norm()*self.y.norm() + self.x.norm()*self.Ay.norm()
        return abs(self.Ax.dot(self.y) - self.x.dot(self.Ay)) <= 1e-12*size

    def finds_transposed(self, pc: PETSc.PC) -> bool:
        """Compare (P x, y) with (x, Pᵀ y)."""
        pc.apply(self.x, self.Ax)
        forward = self.Ax.dot(self.y)
        pc.applyTranspose(self.y, self.Ay)
        return bool(abs(forward - self.Ay.dot(self.x)) <= 1e-6*abs(forward)) and pc.getFailedReason() == 0
