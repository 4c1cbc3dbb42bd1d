"""Vectors that go back to where they came from, and the plain arithmetic of methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.unrolled.least_squares import Column, hessenberg, least_squares
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem

__all__ = ["Values", "Vector", "VectorPool", "add_to"]

# Up to so many, sums one after the other are no slower than all in one pass over memory.
_FEW = 2


class Vector:
    """A PETSc vector that is free for another use as soon as nobody holds it.

    Parameters
    ----------
    vec : PETSc.Vec
    free : list or None
        Where ``vec`` is put in the end.
    """

    __slots__ = ("_free", "vec")

    def __init__(self, vec: PETSc.Vec, free: list[PETSc.Vec] | None = None):
        self.vec, self._free = vec, free

    def __del__(self):
        if self._free is not None:
            self._free.append(self.vec)


class VectorPool:
    """Vectors of one layout, made when there is none that is free.

    Parameters
    ----------
    like : callable
        Makes one.
    """

    def __init__(self, like):
        self._make = like
        self._free: list[PETSc.Vec] = []

    def take(self) -> Vector:
        """One whose values are anything."""
        free = self._free
        return Vector(free.pop() if free else self._make(), free)


class Values:
    """The arithmetic of methods on vectors and scalars as they are.

    A method asks an arithmetic for all it does, so that the same lines give values, tangents
    (:class:`~prdp_fem.unrolled.tangents.Tangents`) and a trace that is played backwards
    (:class:`~prdp_fem.unrolled.trace.Trace`). A vector of None is zero. Scalars may be arrays of
    them.

    Parameters
    ----------
    system : PreconditionedSystem
    pool : VectorPool
    """

    def __init__(self, system: PreconditionedSystem, pool: VectorPool):
        self.system, self.pool = system, pool

    def operator(self, x: Vector) -> Vector:
        """A x."""
        y = self.pool.take()
        self.system.multiply(x.vec, y.vec)
        return y

    def precondition(self, r: Vector) -> Vector:
        """B r."""
        if self.system.is_unpreconditioned:
            return r
        z = self.pool.take()
        self.system.precondition(r.vec, z.vec)
        return z

    def with_null_space(self, r: Vector, z: Vector) -> Vector:
        """B r before the null space of A is taken out of it, where z is what is left."""
        if not self.system.has_null_space:
            return z
        whole = self.pool.take()
        self.system.preconditioner.apply(r.vec, whole.vec)
        return whole

    def dot(self, x: Vector, y: Vector) -> float:
        """(x, y)."""
        return x.vec.dot(y.vec)

    def add(self, x: Vector | None, a: float, y: Vector, *more) -> Vector:
        """x + a y + b z + …, for scalars and vectors in turns."""
        if x is None or more:
            return self.combine(x, (a, *more[::2]), y, *more[1::2])
        total = self.pool.take()
        total.vec.waxpy(a, y.vec, x.vec)
        return total

    def combine(
        self, x: Vector | None, coefficients: Sequence[float] | np.ndarray, *basis: Vector
    ) -> Vector:
        """x + V c, for the vectors in V, of which there is one or more."""
        total = self.pool.take()
        # Not a copy and then a sum: that would be another pass over memory.
        if x is None:
            basis[0].vec.copy(total.vec)
            total.vec.scale(coefficients[0])
        else:
            total.vec.waxpy(coefficients[0], basis[0].vec, x.vec)
        add_to(total.vec, coefficients[1:], basis[1:])
        return total

    def orthonormalised(self, x: Vector, basis: list[Vector]) -> tuple[Vector, Column]:
        """The part of x that is orthogonal to a basis, and what x is in the basis with that part.

        It is scaled to length 1, unless it is zero.

        The numbers of the latter are plain ones in any arithmetic, which does not differentiate
        them: they may be used for no more than the space that such vectors span. Nor does what a
        tangent has in that space matter; it is left out, as it would grow from vector to vector,
        and rounding errors with it.
        """
        # Classical Gram-Schmidt orthogonalisation.
        products = self.dots(basis, x)
        if basis:
            part = self.combine(x, -products, *basis)
        else:
            part = self.pool.take()
            x.vec.copy(part.vec)
        norm = part.vec.norm()
        if norm >= sys.float_info.min:
            part.vec.scale(1 / norm)
        return part, Column(products, norm)

    def without(self, x: Vector, basis: list[Vector]) -> Vector:
        """x less what it has in the space of an orthonormal basis."""
        return self.combine(x, -self.dots(basis, x), *basis)

    def minimiser(self, r: Column, columns: list[Column], basis: list[Vector]) -> np.ndarray:
        """y that makes ‖r - W y‖ least.

        Each of the vectors in W gave the basis a vector, as r gave it the first.
        """
        return least_squares(r.norm, hessenberg(columns))[0]

    def dots(self, basis: Sequence[Vector], x: Vector) -> np.ndarray:
        """Vᵀ x, for the vectors in V."""
        # One message for all of them, as in mDot, whose products are the slower ones where the
        # vectors are apart in memory.
        for v in basis:
            x.vec.dotBegin(v.vec)
        return np.array([x.vec.dotEnd(v.vec) for v in basis])


def add_to(
    total: PETSc.Vec, coefficients: Sequence[float] | np.ndarray, vectors: Sequence[Vector]
) -> None:
    """Add a linear combination to a vector."""
    if len(vectors) > _FEW:
        total.maxpy(coefficients, [v.vec for v in vectors])
    else:
        for c, v in zip(coefficients, vectors):
            total.axpy(c, v.vec)
