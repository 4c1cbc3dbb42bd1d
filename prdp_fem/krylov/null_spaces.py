"""Null spaces that operators are given: which there are, and whether they are ones.

PETSc takes what is in them out of right-hand sides and solutions, whatever it is. Of a space that
is no null space it takes out what the operator determines, too, and says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.krylov.probe import Probe, has_python_blocks
from prdp_fem.ranks.warning import OneWarning

__all__ = ["NullSpaceCheck", "null_space", "null_space_left_by", "one_sided_null_space"]

# How long the product with a vector may be, relative to that with one as large, and in the same
# places, without a pattern. Rounding errors leave 1e-13 and less; inexact quadrature, and modes
# that a space can only interpolate, something in between; vectors that are in no null space, the
# most.
_INEXACT, _WRONG = 1e-10, 1e-3
# What rounding errors leave of a product, relative to one with a vector in all places.
_ROUNDING = 1e-14


def null_space(A: PETSc.Mat, *, transposed: bool = False) -> PETSc.NullSpace | None:
    """The null space that an operator was given, or that of its transpose; None for none."""
    space = A.getTransposeNullSpace() if transposed else A.getNullSpace()
    return space if space is not None and space.handle else None


def one_sided_null_space(A: PETSc.Mat) -> PETSc.NullSpace | None:
    """The null space of an operator, where none of its transpose is known."""
    return null_space(A) if null_space(A, transposed=True) is None else None


def null_space_left_by(ksp: PETSc.KSP, *, transposed: bool = False) -> PETSc.NullSpace | None:
    """The null space that solves leave something of in what they give; None for none.

    Preconditioned from the left, PETSc takes it out of each vector. From the right it takes it out
    before the preconditioner, which may bring it back. An implicit derivative is that of a solution
    without it.
    """
    if ksp.getPCSide() == PETSc.PC.Side.LEFT:
        return None
    return null_space(ksp.getOperators()[0], transposed=transposed)


class NullSpaceCheck:
    """Looks at the null spaces of the first operator that has values.

    That costs two products a vector, once. What is looked at is the operator: a matrix that it is
    preconditioned by may be another one.

    Parameters
    ----------
    name : str
        Of what is solved for, for messages.
    warning : OneWarning
        What gives a warning.
    """

    def __init__(self, name: str, warning: OneWarning):
        self._name = name
        self._warning = warning
        self._is_done = False

    def look(self, A: PETSc.Mat) -> None:
        """Look at what an operator makes of the vectors in its null spaces; collective.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where they are in none; where they are not quite, a RuntimeWarning says so, once.
        """
        if self._is_done:
            return
        right, left = null_space(A), null_space(A, transposed=True)
        are_seen = True
        if right is not None or left is not None:
            probe = Probe(A)
            if right is not None:
                are_seen = self._look_at(right, "nullspace", "A v = 0", A.mult, probe)
            if left is not None and (multiply := _transposed_product(A, probe)) is not None:
                are_seen &= self._look_at(left, "transpose_nullspace", "Aᵀ v = 0", multiply, probe)
        self._is_done = are_seen

    def _look_at(
        self,
        space: PETSc.NullSpace,
        argument: str,
        condition: str,
        multiply: Callable,
        probe: Probe,
    ) -> bool:
        """Whether there was something to be seen: an operator may have no values as yet."""
        multiply(probe.y, probe.Ay)
        rounding = _ROUNDING * probe.Ay.norm() / probe.y.norm()
        scrambled = probe.Ax
        product = probe.Ay
        are_seen = True
        for vector in _vectors(space, probe.x):
            scrambled.pointwiseMult(vector, probe.x)
            size = scrambled.norm()
            multiply(scrambled, product)
            expected = product.norm() / size if size > 0 else 0.0
            multiply(vector, product)
            found = product.norm()
            if not math.isfinite(found) or max(found, expected) == 0:
                are_seen = False
            elif found > _WRONG * expected + rounding:
                raise ConvergenceError(
                    self._message(
                        argument, condition, "does not hold a null space", found, expected
                    )
                )
            elif found > _INEXACT * expected + rounding:
                self._warning.give(
                    self._message(
                        argument, condition, "does not quite hold a null space", found, expected
                    ),
                    product.comm,
                )
        return are_seen

    def _message(
        self, argument: str, condition: str, finding: str, found: float, expected: float
    ) -> str:
        return (
            f"the {argument}= of the solver for '{self._name}' {finding}: the operator makes "
            f"of a vector in it one of length {found:.1e}, and of one as large without a pattern "
            f"{expected:.1e}, so that what it determines is taken out of solutions: give the "
            f"vectors v with {condition}, or leave {argument}= away"
        )


def _vectors(space: PETSc.NullSpace, like: PETSc.Vec) -> Iterator[PETSc.Vec]:
    """The vectors of a basis, which are of length one."""
    if space.hasConstant():
        constant = like.duplicate()
        constant.set(1 / math.sqrt(like.getSize()))
        yield constant
    yield from space.getVecs()


def _transposed_product(A: PETSc.Mat, probe: Probe) -> Callable | None:
    """How to multiply by the transpose of an operator; None where it has no product that is one."""
    if probe.finds_symmetric(A.mult):
        return A.mult
    if has_python_blocks(A):
        return None
    try:
        return A.multTranspose if probe.finds_transposed_operator(A) else None
    except (PETSc.Error, AttributeError, NotImplementedError):
        return None
