"""The solves of a linear system and its transpose."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem import nested
from prdp_fem.ladders import Setting
from prdp_fem.refined_ksp import RefinedKSP

__all__ = ["Krylov"]

# Methods defined for symmetric operators and preconditioners only: for them a transposed solve is a solve.
_SYMMETRIC_METHODS = frozenset({"cg", "groppcg", "pipecg", "pipecgrr", "pipeprcg", "pipecg2", "pipelcg", "fcg", "pipefcg",
                                "nash", "stcg", "gltr", "qcg", "minres", "symmlq", "cr", "pipecr"})
# PETSc's transposed solve by these is not one: it multiplies by the operator where it should by its transpose.
_NOT_TRANSPOSABLE_METHODS = frozenset({"cgls"})


class Krylov:
    """The solves of a linear system and its transpose, each told how far to go.

    They depend on nothing but their arguments: each starts from zero, or from the guess that it is given.

    Parameters
    ----------
    ksp : PETSc.KSP
        With its operators and options.
    transposed : callable
        A context manager with a KSP for the transposed operator, set up for its present values; used only where method or
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
        self._symmetric_after: set[frozenset] = set()
        self.forget_operators()

    def forget_operators(self) -> None:
        """Forget what was known of the operators, which are other matrices from now on."""
        vars(self).pop("_probe", None)
        self._refined_transposed: RefinedKSP | None = None
        self._transposable: bool | None = None
        self._symmetric: bool | None = None
        self._has_symmetric_parts: bool | None = None
        self._changed: frozenset = frozenset()

    def operator_changed(self, inputs: frozenset) -> None:
        """Forget what was known of the operator's values.

        Parameters
        ----------
        inputs : frozenset
            What it depends on that has changed. Where it was symmetric after a change of the same, it is taken for symmetric again.
        """
        if not (self._symmetric and inputs in self._symmetric_after):
            self._changed = inputs if self._symmetric is not None else self._changed | inputs
            self._symmetric = None
        self._has_symmetric_parts = None
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
        if self.is_symmetric():
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
        checked_iterations = refined.checked_iterations

        def solve_and_check(b: PETSc.Vec, x: PETSc.Vec) -> int:
            solve(b, x)
            return checked_iterations(kind)

        def solve_directly(b: PETSc.Vec, x: PETSc.Vec) -> int:
            iterations = solve_and_check(b, x)
            if not np.isfinite(x.norm()):  # which nobody has looked at
                raise ConvergenceError(f"the {kind} solve for '{refined.name}' gave NaN or infinity: look for them in the controls and "
                                       "coefficients, or for an operator that is singular")
            return iterations
        return solve_directly if refined.ksp.getType() == PETSc.KSP.Type.PREONLY else solve_and_check

    @cached_property
    def _probe(self) -> _Probe:
        return _Probe(self.ksp.getOperators()[0])

    def is_symmetric(self) -> bool:
        """Whether the method asks for a symmetric operator and preconditioner, and the operator is symmetric."""
        if self._symmetric is None:
            self._symmetric = self.ksp.getType() in _SYMMETRIC_METHODS and self._probe.finds_symmetric(self.ksp.getOperators()[0].mult)
            if self._symmetric:
                self._symmetric_after.add(self._changed)
        return self._symmetric

    def has_symmetric_parts(self) -> bool:
        """Whether operator and preconditioner are symmetric, both as they are now, and whatever the method asks for."""
        if self._has_symmetric_parts is None:
            products = self.ksp.getOperators()[0].mult, self.ksp.getPC().apply
            self._has_symmetric_parts = all(map(self._probe.finds_symmetric, products))
        return self._has_symmetric_parts

    def _is_transposable(self) -> bool:
        """Whether method and preconditioner have a transpose; of the latter PETSc tells only by trying."""
        if self._transposable is None:
            A, P = self.ksp.getOperators()
            pc = self.ksp.getPC()
            if self.ksp.getType() in _NOT_TRANSPOSABLE_METHODS or nested.has_truncated_inside(self.ksp):
                # With a coarse setting the transpose of what is inside may be none, whatever it is with the setting of the moment.
                self._transposable = False
                return False
            try:
                A.multTranspose(self._probe.x, self._probe.Ax)  # a Python matrix, such as that of a Real space, may have none
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

    def finds_symmetric(self, multiply: Callable[[PETSc.Vec, PETSc.Vec], None]) -> bool:
        """Compare (A x, y) with (x, A y): two products, where PETSc's own test compares matrices."""
        multiply(self.x, self.Ax)
        multiply(self.y, self.Ay)
        size = self.Ax.norm()*self.y.norm() + self.x.norm()*self.Ay.norm()
        return abs(self.Ax.dot(self.y) - self.x.dot(self.Ay)) <= 1e-12*size

    def finds_transposed(self, pc: PETSc.PC) -> bool:
        """Compare (P x, y) with (x, Pᵀ y)."""
        pc.apply(self.x, self.Ax)
        forward = self.Ax.dot(self.y)
        pc.applyTranspose(self.y, self.Ay)
        return bool(abs(forward - self.Ay.dot(self.x)) <= 1e-6*abs(forward)) and pc.getFailedReason() == 0
