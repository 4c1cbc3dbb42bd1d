"""The arithmetic of methods that is recorded, to be played backwards."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from prdp_fem.unrolled.least_squares import (
    Column,
    hessenberg,
    least_squares,
    solve_normal_equations,
)
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem
from prdp_fem.unrolled.values import Values, Vector, VectorPool, add_to

__all__ = ["Trace", "TracedScalar", "TracedVector"]

# So many contributions to a cotangent wait to be added in one pass over memory.
_WAITING = 8
# A factor that is kept beside a vector stays within these bounds, so that products of them over
# many iterations do not overflow.
_SMALL, _LARGE = 1e-60, 1e60


class Cotangent:
    """The cotangent of a vector: a list of terms, which are summed when it is first needed.

    A vector that only passes through is not copied.
    """

    __slots__ = ("_factor", "_sum", "_terms")

    def __init__(self):
        self._factor, self._sum = 1.0, None
        self._terms: list = []  # factors and vectors in turns

    def add(self, factor: float, vector: Vector, pool: VectorPool) -> None:
        """Add factor · vector."""
        if factor != 0:
            terms = self._terms
            terms += (factor, vector)
            if len(terms) >= 2 * _WAITING:
                self._add_up(pool)

    def add_owned(self, factor: float, vector: Vector, pool: VectorPool) -> None:
        """Add factor · vector, which nobody else will read: its memory may be the sum's."""
        if self._sum is None and factor != 0:
            self._factor, self._sum = factor, vector
        else:
            self.add(factor, vector, pool)

    def total(self, pool: VectorPool) -> tuple[float, Vector | None]:
        """It as a factor and a vector, not to be written to; None for zero."""
        terms = self._terms
        if terms:
            if self._sum is None and len(terms) == 2:
                return terms[0], terms[1]
            self._add_up(pool)
        return self._factor, self._sum

    def _add_up(self, pool: VectorPool) -> None:
        coefficients, vectors = self._terms[::2], self._terms[1::2]
        self._terms = []
        if self._sum is None:
            self._sum = pool.take()
            if len(vectors) == 1:
                vectors[0].vec.copy(self._sum.vec)
                self._factor = coefficients[0]
                return
            if abs(coefficients[0]) < abs(coefficients[1]):
                coefficients[:2], vectors[:2] = coefficients[1::-1], vectors[1::-1]
            self._factor = coefficients[0]
            self._sum.vec.waxpy(coefficients[1] / self._factor, vectors[1].vec, vectors[0].vec)
            coefficients, vectors = coefficients[2:], vectors[2:]
        if not _SMALL < abs(self._factor) < _LARGE:
            self._sum.vec.scale(self._factor)
            self._factor = 1.0
        if vectors:
            factor = self._factor
            add_to(self._sum.vec, [c / factor for c in coefficients], vectors)


class TracedVector:
    """A vector with its cotangent.

    Its value is worked out when it is first read, from a function and its arguments. Some never
    are: a solution that grows by a term in each iteration, or all that is linear in what is
    differentiated. What is recorded keeps the values that it will read, and no others.

    Parameters
    ----------
    value : Vector or None
    recipe : tuple
        The function, and a sequence of its arguments, some of them traced vectors; empty once the
        value is there.
    source : TracedVector or None
        What a symmetric operator or preconditioner was applied to.
    """

    __slots__ = ("cotangent", "recipe", "source", "value")

    def __init__(
        self, value: Vector | None, recipe: tuple = (), source: TracedVector | None = None
    ):
        self.value = value
        self.recipe = recipe
        self.source = source
        self.cotangent = Cotangent()


class TracedScalar:
    """A number, or an array of numbers, and its cotangent.

    Parameters
    ----------
    value : float or numpy.ndarray
    nodes : list
        Those of the trace.
    """

    __slots__ = ("_nodes", "cotangent", "value")

    def __init__(self, value, nodes: list):
        self.value = value
        self._nodes = nodes
        self.cotangent: Any = 0.0  # a number, or an array of them, as the value is

    def __float__(self) -> float:
        return float(self.value)

    def __neg__(self):
        return self._record(-self.value, ((self, -1.0),))

    def __add__(self, other):
        if isinstance(other, TracedScalar):
            return self._record(self.value + other.value, ((self, 1.0), (other, 1.0)))
        return self._record(self.value + other, ((self, 1.0),))

    def __sub__(self, other):
        if isinstance(other, TracedScalar):
            return self._record(self.value - other.value, ((self, 1.0), (other, -1.0)))
        return self._record(self.value - other, ((self, 1.0),))

    def __mul__(self, other):
        if isinstance(other, TracedScalar):
            return self._record(
                self.value * other.value, ((self, other.value), (other, self.value))
            )
        return self._record(self.value * other, ((self, other),))

    def __truediv__(self, other):
        if isinstance(other, TracedScalar):
            quotient = self.value / other.value
            return self._record(
                quotient, ((self, 1 / other.value), (other, -quotient / other.value))
            )
        return self._record(self.value / other, ((self, 1 / other),))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return self._record(other - self.value, ((self, -1.0),))

    def __rtruediv__(self, other):
        quotient = other / self.value
        return self._record(quotient, ((self, -quotient / self.value),))

    def _record(self, value, partials: tuple) -> TracedScalar:
        result = TracedScalar(value, self._nodes)
        self._nodes.append(partial(_pull_scalar, result, partials))
        return result


def _pull_scalar(result: TracedScalar, partials: tuple) -> None:
    for argument, derivative in partials:
        argument.cotangent = argument.cotangent + result.cotangent * derivative


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
        return TracedVector(function(_read(x)), (), x if is_symmetric else None)

    def precondition(self, r: TracedVector) -> TracedVector:
        """B r."""
        if self.system.is_unpreconditioned:
            return r
        is_constant = self._is_preconditioner_constant
        is_symmetric = self.system.symmetric and is_constant and not self.system.has_null_space
        z = self._applied(self._on.precondition, r, is_symmetric)
        kept: tuple[Vector | None, Vector | None] = (None, None)
        if not is_constant:
            kept = _read(r), self._on.with_null_space(_read(r), _read(z))
        self._nodes.append(
            partial(self._products.pull_precondition, z.cotangent, r.cotangent, *kept)
        )
        return z

    def dot(self, x: TracedVector, y: TracedVector) -> TracedScalar:
        """(x, y)."""
        of_x = _read(x)
        of_y = _read(y)
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
                value = _read(y)
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
        values = [_read(v) for v in basis]
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
        vectors = [_read(u) for u in basis]
        value, (products, norm, _) = self._on.orthonormalised(_read(x), vectors)
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
        values = [_read(v) for v in basis]
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


def _read(x: TracedVector) -> Vector:
    """The value of a vector."""
    value = x.value
    return _worked_out(x) if value is None else value


def _worked_out(x: TracedVector) -> Vector:
    # One after the other, and not by recursion: what has not been worked out may go back over all
    # iterations.
    waiting = [x]
    while waiting:
        y = waiting[-1]
        if y.value is None:
            function, arguments = y.recipe
            values = []
            for part in arguments:
                if type(part) is TracedVector:
                    if part.value is None:
                        waiting.append(part)
                    part = part.value
                values.append(part)
            if waiting[-1] is not y:
                continue
            y.value, y.recipe = function(*values), ()
        waiting.pop()
    assert x.value is not None  # x was the first to wait
    return x.value
