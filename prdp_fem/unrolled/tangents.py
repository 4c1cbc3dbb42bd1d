"""The tangent-linear arithmetic of methods."""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.unrolled.least_squares import (
    Column,
    hessenberg,
    least_squares,
    solve_normal_equations,
)
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem
from prdp_fem.unrolled.values import Values, Vector, VectorPool

__all__ = ["Tangents"]


class _TangentVector:
    """A vector and its tangent, None where that is zero."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Vector, tangent: Vector | None):
        self.value, self.tangent = value, tangent


class _TangentScalar:
    """A number, or an array of numbers, and its tangent."""

    __slots__ = ("tangent", "value")

    def __init__(self, value, tangent):
        self.value, self.tangent = value, tangent

    def __float__(self) -> float:
        return float(self.value)

    def __neg__(self):
        return _TangentScalar(-self.value, -self.tangent)

    def __add__(self, other):
        other = _lifted(other)
        return _TangentScalar(self.value + other.value, self.tangent + other.tangent)

    def __sub__(self, other):
        other = _lifted(other)
        return _TangentScalar(self.value - other.value, self.tangent - other.tangent)

    def __mul__(self, other):
        other = _lifted(other)
        return _TangentScalar(
            self.value * other.value, self.tangent * other.value + self.value * other.tangent
        )

    def __truediv__(self, other):
        other = _lifted(other)
        quotient = self.value / other.value
        return _TangentScalar(quotient, (self.tangent - quotient * other.tangent) / other.value)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return _lifted(other) - self

    def __rtruediv__(self, other):
        return _lifted(other) / self


def _lifted(number) -> _TangentScalar:
    return number if isinstance(number, _TangentScalar) else _TangentScalar(number, 0.0)


class Tangents:
    """The arithmetic of methods on vectors and scalars with their tangents.

    Parameters
    ----------
    system : PreconditionedSystem
    pool : VectorPool
    operator_tangent, preconditioner_tangent : PETSc.Mat or None
        Of A, and of the matrix that the preconditioner is made from.
    """

    def __init__(
        self,
        system: PreconditionedSystem,
        pool: VectorPool,
        operator_tangent: PETSc.Mat | None,
        preconditioner_tangent: PETSc.Mat | None,
    ):
        self._on = Values(system, pool)
        self.system = system
        self.pool = pool
        self._operator_tangent = operator_tangent
        self._preconditioner_tangent = None
        if preconditioner_tangent is not None:
            self._preconditioner_tangent = system.preconditioner.derivative(preconditioner_tangent)

    def lifted(self, value: Vector, tangent: Vector | None) -> _TangentVector:
        """A vector that is given."""
        return _TangentVector(value, tangent)

    def operator(self, x):
        tangent = None if x.tangent is None else self._on.operator(x.tangent)
        if self._operator_tangent is not None:
            if tangent is None:
                tangent = self.pool.take()
                self._operator_tangent.mult(x.value.vec, tangent.vec)
            else:
                self._operator_tangent.multAdd(x.value.vec, tangent.vec, tangent.vec)
        return _TangentVector(self._on.operator(x.value), tangent)

    def precondition(self, r):
        if self.system.is_unpreconditioned:
            return r
        z = self._on.precondition(r.value)
        tangent = None if r.tangent is None else self._on.precondition(r.tangent)
        if self._preconditioner_tangent is not None:
            if tangent is None:
                tangent = self.pool.take()
                tangent.vec.zeroEntries()
            change = self.pool.take()
            whole = self._on.with_null_space(r.value, z)
            self._preconditioner_tangent(r.value.vec, whole.vec, change.vec)
            self.system.project(change.vec)
            tangent.vec.axpy(1.0, change.vec)
        return _TangentVector(z, tangent)

    def dot(self, x, y):
        tangent = 0.0
        if y.tangent is not None:
            tangent += self._on.dot(x.value, y.tangent)
        if x.tangent is not None:
            tangent += self._on.dot(x.tangent, y.value)
        return _TangentScalar(self._on.dot(x.value, y.value), tangent)

    def add(self, x, *terms):
        scalars, vectors = [_lifted(a) for a in terms[::2]], terms[1::2]
        values = [y.value for y in vectors]
        value = self._on.add(
            None if x is None else x.value, *_alternate([a.value for a in scalars], values)
        )
        moving = [(a.value, y.tangent) for a, y in zip(scalars, vectors) if y.tangent is not None]
        coefficients = [a.tangent for a in scalars] + [a for a, _ in moving]
        parts = values + [tangent for _, tangent in moving]
        start = None if x is None else x.tangent
        return _TangentVector(value, self._on.combine(start, coefficients, *parts))

    def combine(self, x, coefficients, *basis):
        values = [v.value for v in basis]
        parts = [(c, v.tangent) for c, v in zip(coefficients.value, basis) if v.tangent is not None]
        value = self._on.combine(None if x is None else x.value, coefficients.value, *values)
        weights = np.concatenate([coefficients.tangent, [c for c, _ in parts]])
        start = None if x is None else x.tangent
        return _TangentVector(
            value, self._on.combine(start, weights, *values, *[v for _, v in parts])
        )

    def orthonormalised(self, x, basis):
        value, (products, norm, _) = self._on.orthonormalised(x.value, [v.value for v in basis])
        tangent = None
        if norm != 0:
            parts = [
                (c / norm, v.tangent)
                for c, v in zip([1.0, *-products], [x, *basis])
                if v.tangent is not None
            ]
            if parts:
                tangent = self._on.combine(None, [c for c, _ in parts], *[v for _, v in parts])
                tangent = self._on.without(tangent, [*(v.value for v in basis), value])
        return _TangentVector(value, tangent), Column(products, norm, x.tangent)

    def minimiser(self, r, columns, basis):
        H, values = hessenberg(columns), [v.value for v in basis]
        y, residual = least_squares(r.norm, H)
        changes = [column.derivative for column in columns]
        if changes[0] is None:
            return _TangentScalar(y, np.zeros(len(y)))  # nothing has a tangent
        # From differentiating Wᵀ(r - W y) = 0, where W = V H.
        change = self._on.combine(r.derivative, -y, *changes)
        right = self._on.dots(
            changes, self._on.combine(None, residual, *values)
        ) + H.T @ self._on.dots(values, change)
        return _TangentScalar(y, solve_normal_equations(H, right))


def _alternate(scalars: list, vectors: list) -> list:
    return [part for pair in zip(scalars, vectors) for part in pair]
