"""Solves that count their iterations, and raise where they failed; row by row.

Those of derivatives have right-hand sides without a size to be expected. Norms and products hold
squares, and those of very small or very large numbers lose bits, or all of them. A linear solve may
be scaled by a power of two, which changes no bit of other numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.null_spaces import null_space_left_by
from prdp_fem.statistics import Statistics

__all__ = ["CountedSolve", "Rows", "adjoint_rows", "checked", "forward_rows", "scaled"]

# It takes a right-hand side and what it writes the solution to, and gives the iterations spent.
CountedSolve = Callable[[PETSc.Vec, PETSc.Vec], int]
# Right-hand sides, each with what its solution is written to.
Rows = Iterable[tuple[PETSc.Vec, PETSc.Vec]]

# Right-hand sides that have all bits of all numbers on the way, and the largest power of two by
# which others are scaled.
_SMALL = 1e-20
_LARGE = 1e20
_MOST = 1000
# A residual norm whose square, and those of its larger parts, have all bits.
_FAINT = 1e-100
_INFINITY = PETSc.NormType.NORM_INFINITY
_BY_SIZE = PETSc.KSP.ConvergedReason.CONVERGED_ATOL


def forward_rows(
    solve: CountedSolve,
    rows: Rows,
    statistics: Statistics,
    record: Callable[[], Any] | None = None,
) -> list:
    """Solve one row after the other, count each that is done, and give what is recorded of it."""
    records = []
    for b, x in rows:
        statistics.forward_iterations += solve(b, x)
        records.append(None if record is None else record())
        statistics.solves += 1
    return records


def adjoint_rows(solve: CountedSolve, rows: Rows, statistics: Statistics) -> None:
    """Solve one row after the other, and count each that is done."""
    for b, x in rows:
        statistics.adjoint_iterations += solve(b, x)
        statistics.adjoint_solves += 1


def checked(
    refined: RefinedKSP,
    solve: Callable,
    kind: str,
    *,
    is_relative: bool = False,
    keeps_iterates: bool = False,
    look: Callable[[PETSc.Vec, PETSc.Vec], None] | None = None,
) -> CountedSolve:
    """A solve that raises where it failed, and returns its iterations.

    Parameters
    ----------
    refined : RefinedKSP
    solve : callable
        ``solve``, or ``solveTranspose``, of its KSP.
    kind : str
        What messages call it.
    is_relative : bool
        Whether nothing absolute stops it: not PETSc's own tolerance either, which residuals of a
        large operator are below.
    keeps_iterates : bool
        Whether it gives PETSc's iterates with what these have of a null space.
    look : callable or None
        Looks at each right-hand side with its solution.
    """
    ksp, is_nested = refined.ksp, refined.is_nested
    good = refined.good_reasons
    left = None
    if not keeps_iterates:
        left = null_space_left_by(ksp, transposed=solve == ksp.solveTranspose)

    def solve_and_check(b: PETSc.Vec, x: PETSc.Vec) -> int:
        solve(b, x)
        reason = ksp.getConvergedReason()
        if reason == _BY_SIZE and is_relative:
            reason = _solve_without_atol(ksp, solve, b, x)
        if is_nested or reason not in good:
            iterations = refined.checked_iterations(kind)
        else:
            iterations = ksp.getIterationNumber()
        if left is not None:
            left.remove(x)
        if look is not None:
            look(b, x)
        return iterations

    return solve_and_check


def _solve_without_atol(ksp: PETSc.KSP, solve: Callable, b: PETSc.Vec, x: PETSc.Vec) -> int:
    """Solve until something relative stops it, and return the reason."""
    atol = ksp.getTolerances()[1]
    ksp.setTolerances(atol=0.0)
    try:
        solve(b, x)
    finally:
        ksp.setTolerances(atol=atol)
    return ksp.getConvergedReason()


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
