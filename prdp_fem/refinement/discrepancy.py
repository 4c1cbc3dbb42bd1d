"""Refine while a finer setting would tell another metric."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prdp_fem.arguments import is_real, shown
from prdp_fem.refinement.assessment import relative_gap
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.registry import rule
from prdp_fem.refinement.rules import Refinement
from prdp_fem.refinement.settings import Setting, newton_steps, setting_of

__all__ = ["Comparison", "DiscrepancyRefinement"]

# Where none is given; it cannot be changed, and so is one for all.
_LADDER = GeometricLadder()
# The finer setting has at most so many times the work of the level's.
_MOST_WORK = 2


@dataclass(frozen=True)
class Comparison:
    """A metric at a level, and at a finer setting.

    Attributes
    ----------
    reported : float
    finer : float
        The same as ``reported`` at the last level, which has nothing finer.
    """

    reported: float
    finer: float

    @property
    def gap(self) -> float:
        """The difference of the two, relative to the finer one."""
        return relative_gap(self.reported, self.finer)


@rule("discrepancy", title="discrepancy", options={"gap": float}, varied=("gap",))
class DiscrepancyRefinement(Refinement):
    """Refine while the metric at the level differs from that at a finer setting.

    Whether physics are too coarse is asked of the physics, and not of the course of the training:
    a plateau of another cause, such as a learning rate that falls, makes no difference, and where
    solves end at the floor of their own rounding, finer ones are the same, and nothing is refined.

    The finer setting is that of the highest level whose solves have at most twice the work of the
    level's, and of the next one at least; work is a budget of iterations (times Newton steps), and
    of a tolerance it is not known. So a comparison costs no more than two validations.

    Where solves converge slowly, even a setting of twice the work may tell nearly the same wrong
    metric. In :func:`prdp_fem.torch.train` the guard finds that out with converged physics, and the
    level then goes up to the finer one at once.

    Parameters
    ----------
    ladder : Sequence of Setting or int
    gap : float
        The relative difference above which the level goes up, by one. It is positive.
    comm : mpi4py.MPI.Comm or None
        See :class:`Refinement`.

    Examples
    --------
    >>> refinement = DiscrepancyRefinement(gap=0.1)
    >>> refinement.step(lambda: 1 + 1 / refinement.setting.iterations)
    True
    """

    parameters = ("ema_window", "gap")
    remedy = "judge by the latter, and refine further, by a smaller gap"

    def __init__(
        self, ladder: Sequence[Setting | int] = _LADDER, *, gap: float = 0.1, comm: Any = None
    ):
        super().__init__(ladder, comm=comm)
        if not is_real(gap) or not 0 < gap < math.inf:
            raise ValueError(f"gap must be a positive number, found {shown(gap)}")
        self.gap = float(gap)
        self._is_too_coarse = False
        # Whether it was found to be by converged physics.
        self._is_far_too_coarse = False

    def step(  # type: ignore[override]  # a rule may be told something else than a metric
        self, validate: Callable[[], float] | Comparison
    ) -> bool:
        """Compare, record the metric of the level, and refine where the two differ.

        Parameters
        ----------
        validate : callable or Comparison
            It returns the metric at the physics of the moment, and is called at the level and at
            the finer setting; or what :meth:`compare` has found.

        Returns
        -------
        bool
            Whether the level went up.

        Raises
        ------
        TypeError
            For a metric instead of what finds one.
        ValueError
            For a metric that is not a number, or is NaN, infinite or negative. What ``validate``
            raises is raised, too. Nothing is changed then.
        """
        comparison = validate if isinstance(validate, Comparison) else self.compare(validate)
        self._is_too_coarse = comparison.gap > self.gap
        return super().step(comparison.reported)

    def compare(self, validate: Callable[[], float], reported: float | None = None) -> Comparison:
        """The metric at the level and at the finer setting; level and history stay as they are.

        Parameters
        ----------
        validate : callable
            As in :meth:`step`.
        reported : float or None
            The metric at the level, where that is known; else it is found first.
        """
        if not callable(validate):
            raise TypeError(
                "a DiscrepancyRefinement finds metrics by itself: give step() the function that "
                f"validates, as train() does, found {shown(validate)}"
            )
        reported = self.agreed_metric(validate() if reported is None else reported)
        finer = self.finer_level
        if finer == self.level:
            return Comparison(reported, reported)
        with self.at(setting_of(self.ladder[finer])):
            return Comparison(reported, self.agreed_metric(validate()))

    @property
    def finer_level(self) -> int:
        """The level that the present one is compared with; itself, where it is the last one."""
        first, end = self.level + 1, len(self.ladder)
        most = _MOST_WORK * self._work(self.level)
        if first == end or most == math.inf:
            return min(first, end - 1)
        # A ladder without an end cannot be looked through.
        last = first + 1
        while last < end and self._work(last) <= most:
            last = min(2 * last, end)
        fitting = bisect_right(range(first, last), most, key=self._work)
        return first + max(fitting, 1) - 1

    def _work(self, level: int) -> float:
        """How many iterations a solve makes at a level; infinity where that is not known."""
        setting = setting_of(self.ladder[level])
        steps = newton_steps(setting)
        if setting.max_it is None and steps is not None:
            return steps
        if not setting.budget or setting.max_it is None:
            return math.inf
        return setting.max_it * (1 if steps is None else steps)

    def told(self, metric: float, validate: Callable[[], float]) -> Comparison:
        return self.compare(validate, metric)

    def heed(self, gap: float) -> None:
        self._is_far_too_coarse = gap > self.gap

    def next_level(self, smoothed: float) -> int:
        if self._is_far_too_coarse:
            self._is_far_too_coarse = False
            return self.finer_level
        is_last = self.level + 1 == len(self.ladder)
        return self.level + (self._is_too_coarse and not is_last)

    def __repr__(self) -> str:
        return f"DiscrepancyRefinement({self.ladder!r}, gap={self.gap:g})"
