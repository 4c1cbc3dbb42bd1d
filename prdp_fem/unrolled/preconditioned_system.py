"""The operator and the preconditioner of a KSP, with their transposes."""

from __future__ import annotations

from collections.abc import Mapping

from firedrake.petsc import PETSc

from prdp_fem.unrolled.preconditioners import Preconditioner, preconditioner_of

__all__ = ["PreconditionedSystem"]


class PreconditionedSystem:
    """What a method does with an operator A and a preconditioner B.

    Parameters
    ----------
    ksp : PETSc.KSP
        Set up.
    options : mapping or None
        Options of the KSP, without prefix, that PETSc's own may have lost.

    Attributes
    ----------
    A, P : PETSc.Mat
    preconditioner : Preconditioner
    symmetric : bool
        Whether A and B are known to be.
    multiply, multiply_transposed : callable
        Of x and y: y = A x, and y = Aᵀ x.
    """

    def __init__(self, ksp: PETSc.KSP, options: Mapping | None = None):
        self._ksp, self._options = ksp, options
        self._preconditioner: Preconditioner | None = None
        self.symmetric = False

    def refresh(self, symmetric: bool) -> None:
        """To be called before each use: look for what has changed since the last."""
        self.A, self.P = self._ksp.getOperators()
        self.symmetric = symmetric
        self.multiply = self.A.mult
        self.multiply_transposed = self.A.mult if symmetric else self.A.multTranspose
        pc = self._ksp.getPC()
        known = self._preconditioner
        present = pc.handle, pc.getType(), self.P.handle
        if known is None or (known.pc.handle, known.kind, known.matrix.handle) != present:
            known = preconditioner_of(pc, self.P, self._options)
            self._preconditioner = known
        self.preconditioner = known
        self.preconditioner.refresh(symmetric)
        # PETSc keeps the null space out of the iterates, where it preconditions from the left.
        space = self.A.getNullSpace() if self._ksp.getPCSide() == PETSc.PC.Side.LEFT else None
        self._null_space = space if space is not None and space.handle else None
        self.has_null_space = self._null_space is not None
        self.is_unpreconditioned = self.preconditioner.is_identity and not self.has_null_space
        space = self.A.getTransposeNullSpace()
        self._left_null_space = space if space is not None and space.handle else None
        self.has_left_null_space = self._left_null_space is not None

    def precondition(self, r: PETSc.Vec, z: PETSc.Vec) -> None:
        """z = B r."""
        self.preconditioner.apply(r, z)
        if self._null_space is not None:
            self._null_space.remove(z)

    def project(self, x: PETSc.Vec) -> None:
        """Remove what is in the null space of A, in place.

        It is an orthogonal projection, which is its own transpose.
        """
        if self._null_space is not None:
            self._null_space.remove(x)

    def project_right_hand_side(self, b: PETSc.Vec) -> None:
        """Remove what is in the null space of Aᵀ, in place."""
        if self._left_null_space is not None:
            self._left_null_space.remove(b)
