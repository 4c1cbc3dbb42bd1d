"""Solves whose right-hand side has no size to be expected, as those of derivatives.

Norms and products hold squares, and those of very small or very large numbers lose bits, or all of
them. A linear solve may be scaled by a power of two, which changes no bit of other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

__all__ = ["CountedSolve", "scaled"]

# It takes a right-hand side and what it writes the solution to, and gives the iterations spent.
CountedSolve = Callable[[PETSc.Vec, PETSc.Vec], int]

# Right-hand sides that have all bits of all numbers on the way, and the largest power of two by
# which others are scaled.
_SMALL = 1e-20
_LARGE = 1e20
_MOST = 1000
# A residual norm whose square, and those of its larger parts, have all bits.
_FAINT = 1e-100
_INFINITY = PETSc.NormType.NORM_INFINITY


def scaled(ksp: PETSc.KSP, solve: CountedSolve, has_thresholds: bool) -> CountedSolve:
    """A solve whose right-hand side is scaled where numbers on the way would not have all bits.

    Parameters
    ----------
    ksp : PETSc.KSP
    solve : callable
        Solves with it from zero, and raises a ConvergenceError where that fails.
    has_thresholds : bool
        Whether something in the KSP may be compared with absolute numbers: then right-hand sides
        are always scaled.

    Returns
    -------
    callable
        It may write to the right-hand side.
    """
    smallest = math.inf if has_thresholds else _SMALL

    def is_sized(b: PETSc.Vec) -> bool:
        size = b.norm(_INFINITY)
        return smallest < size < _LARGE or not 0 < size < math.inf

    def solve_scaled(b: PETSc.Vec, x: PETSc.Vec) -> int:
        if not has_thresholds:
            # Most often the residual is known afterwards, and tells at no cost that numbers of the
            # solve had all their bits. Some methods leave that of an earlier solve there.
            ksp.setResidualNorm(0.0)
            try:
                iterations = solve(b, x)
            except ConvergenceError:
                if is_sized(b):
                    raise
            else:
                if _FAINT < ksp.getResidualNorm() < 1 / _FAINT or is_sized(b):
                    return iterations
        elif is_sized(b):
            return solve(b, x)
        # By a power of two, that changes no bit but where numbers of the solve had been too small
        # or too large to have all.
        exponent = min(max(math.frexp(b.norm(_INFINITY))[1], -_MOST), _MOST)
        b.scale(math.ldexp(1.0, -exponent))
        iterations = solve(b, x)
        x.scale(math.ldexp(1.0, exponent))
        return iterations

    return solve_scaled
