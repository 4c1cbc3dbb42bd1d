"""What products tell of an operator that is known by nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from firedrake.petsc import PETSc

__all__ = ["Probe", "has_python_blocks"]


def has_python_blocks(A: PETSc.Mat) -> bool:
    """Whether a matrix is one of blocks, of which some are Python's, as those of a Real space are.

    PyOP2 adds the transposed products of these up wrongly, by whatever their entries are to others.
    """
    if A.getType() != PETSc.Mat.Type.NEST:
        return False
    rows, columns = A.getNestSize()
    blocks = (A.getNestSubMatrix(row, column) for row in range(rows) for column in range(columns))
    return any(block.handle and block.getType() == PETSc.Mat.Type.PYTHON for block in blocks)


class Probe:
    """Two vectors without a pattern, the same at every call, and room for their products.

    Parameters
    ----------
    A : PETSc.Mat
    """

    def __init__(self, A: PETSc.Mat):
        self.x, self.y = A.createVecs()
        index = np.arange(*self.x.getOwnershipRange())
        self.x.setArray(np.sin(1 + 1.3 * index))
        self.y.setArray(np.cos(2 + 0.7 * index))
        self.Ax, self.Ay = self.x.duplicate(), self.x.duplicate()

    def keep_for_ever(self) -> None:
        """Never destroy the vectors.

        A preconditioner that was left by an error may have some of them, and destroy them.
        """
        for vector in (self.x, self.y, self.Ax, self.Ay):
            vector.incRef()

    def finds_symmetric(self, multiply: Callable[[PETSc.Vec, PETSc.Vec], None]) -> bool:
        """Compare (A x, y) with (x, A y): two products, where PETSc's own test takes matrices."""
        multiply(self.x, self.Ax)
        multiply(self.y, self.Ay)
        size = self.Ax.norm() * self.y.norm() + self.x.norm() * self.Ay.norm()
        return abs(self.Ax.dot(self.y) - self.x.dot(self.Ay)) <= 1e-12 * size

    def finds_transposed_operator(self, A: PETSc.Mat) -> bool:
        """Compare (A x, y) with (x, Aᵀ y)."""
        A.mult(self.x, self.Ax)
        A.multTranspose(self.y, self.Ay)
        size = self.Ax.norm() * self.y.norm() + self.x.norm() * self.Ay.norm()
        return abs(self.Ax.dot(self.y) - self.x.dot(self.Ay)) <= 1e-10 * size

    def finds_transposed(self, pc: PETSc.PC) -> bool:
        """Compare (P x, y) with (x, Pᵀ y)."""
        pc.apply(self.x, self.Ax)
        forward = self.Ax.dot(self.y)
        pc.applyTranspose(self.y, self.Ay)
        agrees = bool(abs(forward - self.Ay.dot(self.x)) <= 1e-6 * abs(forward))
        return agrees and pc.getFailedReason() == 0
