"""A ladder whose steps grow with it, so that it suits methods that take few iterations and many."""

from __future__ import annotations

import math

from prdp_fem.arguments import COUNT, count, fraction, is_real, shown
from prdp_fem.refinement.counts import CountLadder
from prdp_fem.refinement.registry import ladder
from prdp_fem.refinement.settings import Iterations

__all__ = ["GeometricLadder"]

# With a ratio nearer to 1 a ladder is one of equal steps, and has more levels than can be meant.
_LEAST_RATIO = 1.01


@ladder("geometric", step=None, ratio=("ratio", float))
class GeometricLadder(CountLadder):
    """Iteration counts from ``start``, each ``ratio`` times the last, and at least one more.

    Where a ladder of equal steps suits one solver, this one suits any: few levels lead to a hundred
    iterations as to ten. With the ratio √2 the work doubles every other level.

    Parameters
    ----------
    start : int
        Iterations at level 0, at least 1.
    ratio : float
        What each level multiplies the iterations by, at least 1.01.
    stop : int or None
        No level has more iterations than this; None for as many as PETSc can count.
    rtol_floor : float
        See :class:`~prdp_fem.refinement.settings.Iterations`.

    Examples
    --------
    >>> [setting.iterations for setting in GeometricLadder(stop=20)]
    [1, 2, 3, 4, 6, 8, 11, 16]
    """

    def __init__(
        self,
        start: int = 1,
        ratio: float = 2**0.5,
        stop: int | None = None,
        *,
        rtol_floor: float = 1e-12,
    ):
        self.start = count("start", start)
        self.ratio = _checked_ratio(ratio)
        self.stop = None if stop is None else count("stop", stop)
        self.rtol_floor = fraction("rtol_floor", rtol_floor, allow_zero=True)
        most = COUNT if self.stop is None else self.stop
        if self.start > most:
            raise ValueError(
                f"start must not exceed stop, found start={start} and stop={stop}: the "
                "ladder would be empty"
            )
        counts = [self.start]
        while (more := max(counts[-1] + 1, round(min(counts[-1] * self.ratio, 2 * most)))) <= most:
            counts.append(more)
        self._counts = tuple(counts)

    def __getitem__(self, level):
        counts = self._counts[level]
        if isinstance(counts, tuple):
            return [Iterations(iterations, self.rtol_floor) for iterations in counts]
        return Iterations(counts, self.rtol_floor)

    def __repr__(self) -> str:
        floor = "" if self.rtol_floor == 1e-12 else f", rtol_floor={self.rtol_floor!r}"
        ratio = "2**0.5" if self.ratio == 2**0.5 else repr(self.ratio)
        return f"GeometricLadder(start={self.start}, ratio={ratio}, stop={self.stop}{floor})"


def _checked_ratio(ratio) -> float:
    if not is_real(ratio) or not _LEAST_RATIO <= ratio < math.inf:
        raise ValueError(
            f"ratio must be a number of at least {_LEAST_RATIO} (an IterationLadder has equal "
            f"steps), found {shown(ratio)}"
        )
    return float(ratio)
