"""A setting put on a PETSc KSP, its solves, and the account of what they cost."""
from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.ladders import Setting

__all__ = ["Krylov", "Statistics"]

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
        Linear systems solved.
    forward_iterations, adjoint_iterations, tangent_iterations : int
        KSP iterations spent in them.
    assemblies : int
        How often the operator was assembled, and its preconditioner set up.
    forward_seconds, adjoint_seconds, tangent_seconds : float
        Wall-clock time of whole solves on this rank: right-hand sides, assembly and KSP.
    """

    solves: int = 0
    adjoint_solves: int = 0
    tangent_solves: int = 0
    forward_iterations: int = 0
    adjoint_iterations: int = 0
    tangent_iterations: int = 0
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

    @contextmanager
    def timed(self, kind: str):
        """Add the time inside to ``forward_seconds``, ``adjoint_seconds`` or ``tangent_seconds``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"{kind}_seconds"
            setattr(self, name, getattr(self, name) + time.perf_counter() - start)


class Krylov:
    """A KSP that is told at each solve how far to go.

    Solves depend on nothing but their arguments: each starts from zero, or from the guess that it is given.

    Parameters
    ----------
    ksp : PETSc.KSP
        With its operators and options.
    transposed : callable
        A context manager with a KSP for the transposed operator, set up for its present values; used only where the
        preconditioner cannot be transposed.
    """

    def __init__(self, ksp: PETSc.KSP, transposed: Callable[[], AbstractContextManager[PETSc.KSP]]):
        self.ksp = ksp
        self._transposed = transposed
        self._transposable: bool | None = None
        self._symmetric: bool | None = None
        # Where a setting is put on a KSP, what its options had said is kept, by the KSP's handle.
        self._options: dict[int, tuple] = {}

    def operator_changed(self) -> None:
        """Forget what was known of the operator's values."""
        self._symmetric = None

    def solve(self, b: PETSc.Vec, x: PETSc.Vec, setting: Setting | None, *, guess: bool = False) -> int:
        """Solve A x = b.

        Parameters
        ----------
        b : PETSc.Vec
        x : PETSc.Vec
            The solution; with ``guess``, also where to start from.
        setting : Setting or None
            How far to go; None for what the KSP's options say.
        guess : bool
            Start from ``x`` instead of zero.

        Returns
        -------
        int
            The iterations spent.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            On NaN, breakdown or divergence, and where a tolerance is not reached; not for a used-up budget.
        """
        self._apply(self.ksp, setting, guess)
        self.ksp.setInitialGuessNonzero(guess)
        self.ksp.solve(b, x)
        return self._checked(self.ksp, setting, "forward")

    def solve_transposed(self, b: PETSc.Vec, x: PETSc.Vec, setting: Setting | None) -> int:
        """Solve Aᵀ x = b from zero; see :meth:`solve`."""
        if self._is_symmetric():
            return self._solve_from_zero(self.ksp, self.ksp.solve, b, x, setting)
        if self._is_transposable():
            return self._solve_from_zero(self.ksp, self.ksp.solveTranspose, b, x, setting)
        with self._transposed() as ksp:
            return self._solve_from_zero(ksp, ksp.solve, b, x, setting)

    def _solve_from_zero(self, ksp: PETSc.KSP, solve: Callable, b: PETSc.Vec, x: PETSc.Vec, setting: Setting | None) -> int:
        self._apply(ksp, setting, False)
        ksp.setInitialGuessNonzero(False)
        solve(b, x)
        return self._checked(ksp, setting, "adjoint")

    def _apply(self, ksp: PETSc.KSP, setting: Setting | None, guess: bool) -> None:
        if setting is None and not guess:
            if ksp.handle in self._options:
                (rtol, atol, divtol, max_it), error_if_not_converged = self._options.pop(ksp.handle)
                ksp.setTolerances(rtol=rtol, atol=atol, divtol=divtol, max_it=max_it)
                ksp.setErrorIfNotConverged(error_if_not_converged)
            return
        if ksp.handle not in self._options:
            self._options[ksp.handle] = ksp.getTolerances(), ksp.getErrorIfNotConverged()
        (rtol, atol, divtol, max_it), error_if_not_converged = self._options[ksp.handle]
        if setting is not None:
            rtol, max_it = setting.rtol, setting.max_it
            # PETSc would take a used-up budget for an error; what is one is decided in _checked.
            error_if_not_converged = False
        if guess:
            divtol = _NEVER  # it is relative to the right-hand side, of which a guess may be any multiple away
        ksp.setTolerances(rtol=rtol, atol=atol, divtol=divtol, max_it=max_it)
        ksp.setErrorIfNotConverged(error_if_not_converged)

    def _checked(self, ksp: PETSc.KSP, setting: Setting | None, kind: str) -> int:
        reason, iterations = ksp.getConvergedReason(), ksp.getIterationNumber()
        if reason < 0 and not (setting is not None and setting.budget and reason == PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT):
            name = _REASONS.get(reason, str(reason))
            remedy = _REMEDIES.get(name)
            raise ConvergenceError(
                f"the {kind} solve with ksp_type {ksp.getType()} and pc_type {ksp.getPC().getType()} failed: {name} after "
                f"{iterations} iterations, residual norm {ksp.getResidualNorm():.3e}" + (f"; {remedy}" if remedy else ""))
        return iterations

    def _is_symmetric(self) -> bool:
        if self._symmetric is None:
            self._symmetric = self.ksp.getType() in _SYMMETRIC_METHODS and _looks_symmetric(self.ksp.getOperators()[0])
        return self._symmetric

    def _is_transposable(self) -> bool:
        """Whether the preconditioner has a transpose, which PETSc tells only by trying."""
        if self._transposable is None:
            A, P = self.ksp.getOperators()
            pc = self.ksp.getPC()
            x, y = _two_vectors(A)
            z = x.duplicate()
            try:
                pc.apply(x, z)
                forward = z.dot(y)
                pc.applyTranspose(y, z)
                self._transposable = bool(abs(forward - z.dot(x)) <= 1e-6*abs(forward)) and pc.getFailedReason() == 0
            except (PETSc.Error, AttributeError, NotImplementedError):
                self._transposable = False
            if not self._transposable:
                # A failed try leaves its mark on the preconditioners inside.
                pc.reset()
                self.ksp.setOperators(A, P)
                self.ksp.setUp()
        return self._transposable


def _two_vectors(A: PETSc.Mat) -> tuple[PETSc.Vec, PETSc.Vec]:
    """Two vectors without a pattern, the same at every call."""
    x, y = A.createVecs()
    index = np.arange(*x.getOwnershipRange())
    x.setArray(np.sin(1 + 1.3*index))
    y.setArray(np.cos(2 + 0.7*index))
    return x, y


def _looks_symmetric(A: PETSc.Mat) -> bool:
    """Compare (A x, y) with (x, A y) for two vectors: two products, where PETSc's own test compares matrices."""
    x, y = _two_vectors(A)
    Ax, Ay = x.duplicate(), x.duplicate()
    A.mult(x, Ax)
    A.mult(y, Ay)
    return abs(Ax.dot(y) - x.dot(Ay)) <= 1e-12*(Ax.norm()*y.norm() + x.norm()*Ay.norm())
