"""When to go up a level: progressive refinement (PRDP), and the schedules it is compared with.

A refinement reads like a scheduler of ``torch.optim.lr_scheduler``: once an outer iteration (an epoch, or an optimiser
step) call ``step(metric)``. Solvers ask it for its ``setting`` at every solve, so going up a level costs no more than an
attribute: nothing is compiled, assembled or set up again. This module is pure Python.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from prdp_fem.ladders import Setting

__all__ = ["Record", "Refinement", "ProgressiveRefinement", "FixedRefinement", "ScheduledRefinement"]


@dataclass(frozen=True)
class Record:
    """One outer iteration.

    Attributes
    ----------
    metric : float
        What ``step`` was given.
    smoothed : float
        The exponential moving average of all metrics up to this one.
    level : int
        The level during the outer iteration, that is, before this step.
    setting : Setting
        What ``level`` meant.
    refined : bool
        Whether the level went up after it.
    """

    metric: float
    smoothed: float
    level: int
    setting: Setting
    refined: bool


class Refinement:
    """What all refinements share: a ladder, a level, and the record of the outer iterations.

    Parameters
    ----------
    ladder : Sequence of Setting
        The settings, coarsest first.
    ema_window : int
        Window of the exponential moving average of the metrics.
    level : int
        The first level.
    comm : mpi4py.MPI.Comm or None
        Where given, every rank takes the metric of rank 0, so that metrics that differ by rounding never let ranks
        decide differently. ``step`` is then collective.

    Attributes
    ----------
    ladder : Sequence of Setting
    level : int
        Where the refinement stands now.
    history : list of Record
    monitors : list of callable
        Called with each new record.
    """

    def __init__(self, ladder: Sequence[Setting], *, ema_window: int = 6, level: int = 0, comm=None):
        self.ladder = _checked_ladder(ladder)
        self.comm = comm
        self.level = level
        self.history: list[Record] = []
        self.monitors: list[Callable[[Record], None]] = []
        self._weight = 2/(_checked_window("ema_window", ema_window) + 1)

    @property
    def setting(self) -> Setting:
        """What the current level means: ``ladder[level]``."""
        return self.ladder[self.level]

    def step(self, metric: float) -> bool:
        """Record one outer iteration, and refine where the rule says so.

        Parameters
        ----------
        metric : float
            What the outer iteration achieved, such as a validation error: lower is better, finite, not negative.

        Returns
        -------
        bool
            Whether the level went up.

        Raises
        ------
        ValueError
            For a metric that is not a number, or is NaN, infinite or negative. Nothing is recorded then.
        """
        metric = self._agreed_metric(metric)
        if self.history:
            # Written so that the average of a constant is that constant, and that of a window of 1 is the metric, in every bit.
            smoothed = metric + (1 - self._weight)*(self.history[-1].smoothed - metric)
        else:
            smoothed = metric
        level, setting = self.level, self.setting
        self.level = self._next_level(smoothed)
        refined = self.level > level
        self.history.append(Record(metric, smoothed, level, setting, refined))
        for monitor in self.monitors:
            monitor(self.history[-1])
        return refined

    def _agreed_metric(self, metric) -> float:
        if self.comm is None:
            return checked_metric(metric)
        value = refusal = None
        if self.comm.rank == 0:
            try:
                value = checked_metric(metric)
            except ValueError as error:
                refusal = str(error)
        value, refusal = self.comm.bcast((value, refusal), root=0)
        if refusal is not None:
            raise ValueError(refusal)
        return value

    def _next_level(self, smoothed: float) -> int:
        """The level after an outer iteration with this moving average, which is not in the history yet."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as plain numbers and lists, so that ``torch.save``, JSON and pickle take it."""
        return {
            "level": self.level,
            "history": [[record.metric, record.smoothed, record.level, record.refined] for record in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of a refinement with the same ladder.

        Raises
        ------
        ValueError
            Where entries are missing, or levels are not on this ladder. Nothing is changed then.
        """
        missing = self.state_dict().keys() - state.keys()
        if missing:
            raise ValueError(f"the state of a {type(self).__name__} lacks {sorted(missing)}; found {sorted(state)}")
        for record in state["history"]:
            if len(record) != 4:
                raise ValueError(f"a record in the history of the state must have metric, smoothed, level and refined, found {record!r}")
            for value in record[:2]:
                checked_metric(value)
        levels = [state["level"], *(level for _, _, level, _ in state["history"])]
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, Integral) or not 0 <= level < len(self.ladder):
                raise ValueError(f"level {level!r} of the state is not on the ladder {self.ladder!r}, which has levels "
                                 f"0 to {len(self.ladder) - 1}: load it into a refinement with the ladder it was saved with")
        self.history = [Record(float(metric), float(smoothed), int(level), self.ladder[level], bool(refined))
                        for metric, smoothed, level, refined in state["history"]]
        self.level = int(state["level"])


class ProgressiveRefinement(Refinement):
    r"""Refine when the metric stops improving; stop refining when refining no longer helps (PRDP).

    With :math:`e` the exponential moving average of all metrics (weight :math:`2/(w+1)` for the newest, started at the
    first metric), a step does nothing while no more than ``error_window`` metrics are recorded. Then, where
    ``e[-1]/e[-error_window] <= tau_step``, training still improves and the level stays. Otherwise it has plateaued: with
    ``r = e[-1]/checkpoint``, if ``r < tau_stop or r > 1`` then the checkpoint becomes ``e[-1]`` and the level goes up;
    else the last refinement did not help, and the level stays. At the last level of the ladder nothing happens.

    Parameters
    ----------
    ladder : Sequence of Setting
        For example :class:`~prdp_fem.ladders.IterationLadder`.
    tau_step : float
        In (0, 1]: the ratio of moving averages above which training counts as plateaued. Higher waits longer.
    tau_stop : float
        In (0, 1]: the least improvement, as a ratio of plateaus, that makes another refinement worth while.
    ema_window : int
        Window of the moving average, at least 1 (1: no smoothing).
    error_window : int
        How many moving averages are looked back over, at least 1.
    checkpoint : float
        The moving average at the last refinement; the default makes the first plateau refine.
    comm : mpi4py.MPI.Comm or None
        See :class:`Refinement`.

    Raises
    ------
    ValueError
        For an empty ladder, thresholds outside (0, 1], windows below 1 or a checkpoint that is not positive.

    References
    ----------
    K. Bhatia, F. Koehler, N. Thuerey, *PRDP: Progressively Refined Differentiable Physics*, ICLR 2025, arXiv:2502.19611,
    section 3.
    """

    def __init__(self, ladder: Sequence[Setting], *, tau_step: float = 0.98, tau_stop: float = 0.9, ema_window: int = 6,
                 error_window: int = 3, checkpoint: float = math.inf, comm=None):
        super().__init__(ladder, ema_window=ema_window, comm=comm)
        self.tau_step = _checked_threshold("tau_step", tau_step)
        self.tau_stop = _checked_threshold("tau_stop", tau_stop)
        self.ema_window = int(ema_window)
        self.error_window = _checked_window("error_window", error_window)
        if isinstance(checkpoint, bool) or not isinstance(checkpoint, Real) or not checkpoint > 0:
            raise ValueError(f"checkpoint must be a positive number or inf, found {checkpoint!r}")
        self.checkpoint = float(checkpoint)

    def _next_level(self, smoothed: float) -> int:
        if len(self.history) + 1 <= self.error_window or self.level + 1 >= len(self.ladder):
            return self.level
        # e[-error_window]; the newest average is not in the history yet
        earlier = smoothed if self.error_window == 1 else self.history[1 - self.error_window].smoothed
        if _ratio(smoothed, earlier) <= self.tau_step:
            return self.level
        gain = _ratio(smoothed, self.checkpoint)
        if gain < self.tau_stop or gain > 1:
            self.checkpoint = smoothed
            return self.level + 1
        return self.level

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "checkpoint": self.checkpoint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        checkpoint = state.get("checkpoint", math.inf)
        if isinstance(checkpoint, bool) or not isinstance(checkpoint, Real) or not checkpoint >= 0:
            raise ValueError(f"checkpoint must be a number of at least 0 or inf, found {checkpoint!r}")
        super().load_state_dict(state)
        self.checkpoint = float(checkpoint)

    def __repr__(self) -> str:
        return (f"ProgressiveRefinement({self.ladder!r}, tau_step={self.tau_step:g}, tau_stop={self.tau_stop:g}, "
                f"ema_window={self.ema_window}, error_window={self.error_window})")


class FixedRefinement(Refinement):
    """One setting throughout, with the record of a refinement: what progressive refinement is compared with.

    Parameters
    ----------
    setting : Setting
        For example ``Iterations(20)`` or ``Tolerance(1e-10)``.
    comm : mpi4py.MPI.Comm or None
        See :class:`Refinement`.
    """

    def __init__(self, setting: Setting, *, comm=None):
        super().__init__((setting,), comm=comm)

    def _next_level(self, smoothed: float) -> int:
        return self.level

    def __repr__(self) -> str:
        return f"FixedRefinement({self.setting!r})"


class ScheduledRefinement(Refinement):
    """Levels laid down beforehand.

    Parameters
    ----------
    ladder : Sequence of Setting
    schedule : Mapping of int to int
        From which outer iteration on (counted from 0) which level holds, e.g. ``{0: 0, 20: 3, 50: 7}``. Before the first
        entry the level is 0. Levels must not decrease.
    comm : mpi4py.MPI.Comm or None
        See :class:`Refinement`.
    """

    def __init__(self, ladder: Sequence[Setting], schedule: Mapping[int, int], *, comm=None):
        ladder = _checked_ladder(ladder)
        for iteration, level in schedule.items():
            if any(isinstance(value, bool) or not isinstance(value, Integral) or value < 0 for value in (iteration, level)):
                raise ValueError(f"a schedule maps outer iterations to levels, both integers from 0, found {iteration!r}: {level!r}")
        schedule = {int(iteration): int(schedule[iteration]) for iteration in sorted(schedule)}
        previous = 0
        for iteration, level in schedule.items():
            if level >= len(ladder):
                raise ValueError(f"level {level} at outer iteration {iteration} is not on the ladder {ladder!r}, "
                                 f"which has levels 0 to {len(ladder) - 1}")
            if level < previous:
                raise ValueError(f"levels must not decrease, found {level} after {previous} at outer iteration {iteration}")
            previous = level
        super().__init__(ladder, level=schedule.get(0, 0), comm=comm)
        self.schedule = schedule

    def _next_level(self, smoothed: float) -> int:
        return self.schedule.get(len(self.history) + 1, self.level)

    def __repr__(self) -> str:
        return f"ScheduledRefinement({self.ladder!r}, {self.schedule!r})"


def _ratio(value: float, reference: float) -> float:
    """``value/reference`` for non-negative numbers; an error of zero that stays zero counts as unchanged."""
    if reference == 0:
        return 1.0 if value == 0 else math.inf
    return value/reference


def checked_metric(metric) -> float:
    try:
        if isinstance(metric, (str, bytes)):
            raise TypeError
        value = float(metric)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"a metric must be a number, found {metric!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"a metric must be finite, found {value}: training has diverged, or the metric divides by zero")
    if value < 0:
        raise ValueError(f"a metric must not be negative (lower is better, zero is perfect), found {value}")
    return value


def _checked_threshold(name: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], found {value!r}")
    return float(value)


def _checked_window(name: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, found {value!r}")
    return int(value)


def _checked_ladder(ladder) -> Sequence[Setting]:
    if not isinstance(ladder, Sequence) or isinstance(ladder, str):
        raise TypeError(f"a ladder must be a sequence of settings, such as IterationLadder(start=1, step=1), found {ladder!r}")
    if len(ladder) == 0:
        raise ValueError("a ladder must have at least one level, found an empty one")
    # A ladder without an end cannot be read through: its first setting stands for all where the ladder makes them itself.
    for setting in ladder if isinstance(ladder, (list, tuple)) else (ladder[0],):
        if not isinstance(setting, Setting) or isinstance(setting, type):
            raise TypeError("a setting must have the attributes rtol, max_it and budget, as Iterations(20) and Tolerance(1e-6) "
                            f"have, found {setting!r}")
    return ladder
