"""The arithmetic of methods that is recorded, to be played backwards."""

from __future__ import annotations

from functools import partial

import numpy as np

from prdp_fem.unrolled.least_squares import (
    Column,
    hessenberg,
    least_squares,
    solve_normal_equations,
)
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem
from prdp_fem.unrolled.traced import Cotangent, TracedScalar, TracedVector, read
from prdp_fem.unrolled.values import Values, Vector, VectorPool

__all__ = ["Trace"]


class _Products:
    """How products with A and B are played backwards.

    Parameters
    ----------
    system, pool, operator_cotangent, preconditioner_cotangent
        As of a trace.
    """

    def __init__(
        self,
        system: PreconditionedSystem,
        pool: VectorPool,
        operator_cotangent: OperatorCotangent | None,
        preconditioner_cotangent: OperatorCotangent | None,
    ):
        self._system = system
        self._pool = pool
        self._operator_cotangent = operator_cotangent
        self._preconditioner_cotangent = preconditioner_cotangent

    def pull_operator(self, of_y: Cotangent, of_x: Cotangent, x: Vector | None) -> None:
        """Of y = A x; x is needed where A has a cotangent."""
        factor, bar = of_y.total(self._pool)
        if bar is None:
            return
        product = self._pool.take()
        self._system.multiply_transposed(bar.vec, product.vec)
        of_x.add_owned(factor, product, self._pool)
        if self._operator_cotangent is not None and x is not None:
            self._operator_cotangent.add_product(bar.vec, x.vec, factor)

    def pull_precondition(
        self, of_z: Cotangent, of_r: Cotangent, r: Vector | None, z: Vector | None
    ) -> None:
        """Of z = B r, before a null space is taken out; both are needed where B has a cotangent."""
        factor, bar = of_z.total(self._pool)
        if bar is None:
            return
        if self._system.has_null_space:
            projected = self._pool.take()
            bar.vec.copy(projected.vec)
            self._system.project(projected.vec)
            bar = projected
        product = self._pool.take()
        self._system.preconditioner.apply_transposed(bar.vec, product.vec)
        if self._preconditioner_cotangent is not None and r is not None and z is not None:
            self._system.preconditioner.add_cotangent(
                self._preconditioner_cotangent, factor, bar.vec, product.vec, r.vec, z.vec
            )
        of_r.add_owned(factor, product, self._pool)


class Trace:
    """The arithmetic of methods on vectors and scalars, recorded.

    Parameters
    ----------
    system : PreconditionedSystem
    pool : VectorPool
    operator_cotangent, preconditioner_cotangent : OperatorCotangent or None
        What the derivatives with respect to A, and to the matrix that the preconditioner is made
        from, are added to.
    puts_off : bool
        Whether products with A and B are worked out when they are first read, as sums always are.
        It is for methods that never read them, without cotangents of the matrices.
    """

    def __init__(
        self,
        system: PreconditionedSystem,
        pool: VectorPool,
        operator_cotangent: OperatorCotangent | None,
        preconditioner_cotangent: OperatorCotangent | None,
        puts_off: bool = False,
    ):
        self._on = Values(system, pool)
        self._puts_off = puts_off
        self.system = system
        self.pool = pool
        self._products = _Products(system, pool, operator_cotangent, preconditioner_cotangent)
        self._is_operator_constant = operator_cotangent is None
        self._is_preconditioner_constant = preconditioner_cotangent is None
        # For each operation, what is to be called to play that backwards.
        self._nodes: list[partial] = []

    def lifted(self, value):
        """A vector or a number that is given."""
        if isinstance(value, Vector):
            return TracedVector(value)
        return TracedScalar(value, self._nodes)

    def play_backwards(self) -> None:
        """Work cotangents out, from those of the results to those of what was lifted.

        What was recorded is dropped on the way.
        """
        nodes = self._nodes
        while nodes:
            nodes.pop()()

    def operator(self, x: TracedVector) -> TracedVector:
        """A x."""
        is_constant = self._is_operator_constant
        y = self._applied(self._on.operator, x, self.system.symmetric and is_constant)
        kept = None if is_constant else x.value
        self._nodes.append(partial(self._products.pull_operator, y.cotangent, x.cotangent, kept))
        return y

    def _applied(self, function, x: TracedVector, is_symmetric: bool) -> TracedVector:
        if self._puts_off:
            return TracedVector(None, (function, (x,)))
        return TracedVector(function(read(x)), (), x if is_symmetric else None)

    def precondition(self, r: TracedVector) -> TracedVector:
        """B r."""
        if self.system.is_unpreconditioned:
            return r
        is_constant = self._is_preconditioner_constant
        is_symmetric = self.system.symmetric and is_constant and not self.system.has_null_space
        z = self._applied(self._on.precondition, r, is_symmetric)
        kept: tuple[Vector | None, Vector | None] = (None, None)
        if not is_constant:
            kept = read(r), self._on.with_null_space(read(r), read(z))
        self._nodes.append(
            partial(self._products.pull_precondition, z.cotangent, r.cotangent, *kept)
        )
        return z

    def dot(self, x: TracedVector, y: TracedVector) -> TracedScalar:
        """(x, y)."""
        of_x = read(x)
        of_y = read(y)
        s = TracedScalar(of_x.vec.dot(of_y.vec), self._nodes)
        if x is y or y.source is x or x.source is y:
            # With y = A x for a symmetric A: the cotangent of x is 2 A x, and no product takes
            # part. With x = B y for a symmetric B: to that of x, which B is yet to be applied to, 2
            # y is added, so that x need not be kept.
            self._nodes.append(partial(self._pull_square, s, x.cotangent, of_y))
        else:
            self._nodes.append(partial(self._pull_dot, s, x.cotangent, y.cotangent, of_x, of_y))
        return s

    def _pull_square(self, s: TracedScalar, of_x: Cotangent, y: Vector) -> None:
        of_x.add(2 * s.cotangent, y, self.pool)

    def _pull_dot(
        self, s: TracedScalar, of_x: Cotangent, of_y: Cotangent, x: Vector, y: Vector
    ) -> None:
        of_x.add(s.cotangent, y, self.pool)
        of_y.add(s.cotangent, x, self.pool)

    def add(self, x: TracedVector | None, *terms) -> TracedVector:
        """x + a y + b z + …, for scalars and vectors in turns."""
        arguments: list = [x]
        of_terms: list[tuple] = []
        for a, y in zip(terms[::2], terms[1::2]):
            if isinstance(a, TracedScalar):
                value = read(y)
                of_terms.append((a, value, y.cotangent))
                arguments += (a.value, value)
            else:
                of_terms.append((a, None, y.cotangent))
                arguments += (a, y)
        total = TracedVector(None, (self._on.add, arguments))
        of_x = None if x is None else x.cotangent
        self._nodes.append(partial(self._pull_add, total.cotangent, of_x, of_terms))
        return total

    def _pull_add(self, of_total: Cotangent, of_x: Cotangent | None, of_terms: list[tuple]) -> None:
        factor, bar = of_total.total(self.pool)
        if bar is None:
            return
        for a, y, of_y in of_terms:
            if y is not None:
                a.cotangent = a.cotangent + factor * bar.vec.dot(y.vec)
                a = a.value
            of_y.add(factor * a, bar, self.pool)
        if of_x is not None:
            of_x.add(factor, bar, self.pool)

    def combine(
        self, x: TracedVector | None, coefficients: TracedScalar, *basis: TracedVector
    ) -> TracedVector:
        """x + V c, for the vectors in V."""
        total = TracedVector(None, (self._on.combine, (x, coefficients.value, *basis)))
        of_x = None if x is None else x.cotangent
        of_basis = [v.cotangent for v in basis]
        values = [read(v) for v in basis]
        self._nodes.append(
            partial(self._pull_combine, total.cotangent, of_x, coefficients, of_basis, values)
        )
        return total

    def _pull_combine(
        self,
        of_total: Cotangent,
        of_x: Cotangent | None,
        coefficients: TracedScalar,
        of_basis: list[Cotangent],
        basis: list[Vector],
    ) -> None:
        factor, bar = of_total.total(self.pool)
        if bar is None:
            return
        coefficients.cotangent = coefficients.cotangent + factor * self._on.dots(basis, bar)
        for c, of_v in zip(coefficients.value.tolist(), of_basis):
            of_v.add(factor * c, bar, self.pool)
        if of_x is not None:
            of_x.add(factor, bar, self.pool)

    def orthonormalised(
        self, x: TracedVector, basis: list[TracedVector]
    ) -> tuple[TracedVector, Column]:
        """The next vector of a basis; see :meth:`Values.orthonormalised`."""
        vectors = [read(u) for u in basis]
        value, (products, norm, _) = self._on.orthonormalised(read(x), vectors)
        v = TracedVector(value)
        of_basis = [u.cotangent for u in basis]
        self._nodes.append(
            partial(
                self._pull_orthonormalised,
                v.cotangent,
                x.cotangent,
                of_basis,
                products,
                norm,
                [*vectors, value],
            )
        )
        return v, Column(products, norm, x.cotangent)

    def _pull_orthonormalised(
        self,
        of_v: Cotangent,
        of_x: Cotangent,
        of_basis: list[Cotangent],
        products: np.ndarray,
        norm: float,
        basis: list[Vector],
    ) -> None:
        factor, bar = of_v.total(self.pool)
        if bar is None:
            return
        bar = self._on.without(bar, basis)
        for h, of_u in zip(products.tolist(), of_basis):
            of_u.add(-factor * h / norm, bar, self.pool)
        of_x.add(factor / norm, bar, self.pool)

    def minimiser(
        self, r: Column, columns: list[Column], basis: list[TracedVector]
    ) -> TracedScalar:
        """The solution of the least-squares problem of GMRES; see :meth:`Values.minimiser`."""
        H = hessenberg(columns)
        y, residual = least_squares(r.norm, H)
        traced = TracedScalar(y, self._nodes)
        of_products = [column.derivative for column in columns]
        values = [read(v) for v in basis]
        self._nodes.append(
            partial(self._pull_minimiser, traced, r.derivative, of_products, H, residual, values)
        )
        return traced

    def _pull_minimiser(
        self,
        y: TracedScalar,
        of_r: Cotangent,
        of_products: list[Cotangent],
        H: np.ndarray,
        residual: np.ndarray,
        basis: list[Vector],
    ) -> None:
        # With W = V H and ȳ given, s = (WᵀW)⁻¹ȳ: to the cotangent of r is added W s, and to that of
        # W (r - W y) sᵀ - W s yᵀ.
        s = solve_normal_equations(H, np.broadcast_to(y.cotangent, y.value.shape))
        rest = self._on.combine(None, residual, *basis)
        image = self._on.combine(None, H @ s, *basis)
        of_r.add(1.0, image, self.pool)
        for of_w, a, b in zip(of_products, s.tolist(), y.value.tolist()):
            of_w.add(a, rest, self.pool)
            of_w.add(-b, image, self.pool)
