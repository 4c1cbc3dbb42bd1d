"""What a trace is made of: vectors and numbers with their cotangents."""

from __future__ import annotations

from functools import partial
from typing import Any

from prdp_fem.unrolled.values import Vector, VectorPool, add_to

__all__ = ["Cotangent", "TracedScalar", "TracedVector", "read"]

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


def read(x: TracedVector) -> Vector:
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
