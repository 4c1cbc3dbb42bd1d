"""When to go up a level: progressive refinement (PRDP), and the schedules it is compared with.

A refinement reads like a scheduler of ``torch.optim.lr_scheduler``: once an outer iteration (an
epoch, or an optimiser step) call ``step(metric)``. Solvers ask it for its ``setting`` at every
solve, so going up a level costs no more than an attribute: nothing is compiled, assembled or set up
again. This module is pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from prdp_fem.arguments import count, shown
from prdp_fem.refinement.assessment import Assessable
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.ladders import checked_ladder
from prdp_fem.refinement.registry import is_registered, rule
from prdp_fem.refinement.settings import Setting, checked_setting, is_frozen, setting_of
from prdp_fem.refinement.states import (
    check_entries,
    check_levels,
    check_records,
    checked_metric,
    is_equal,
    is_level,
    is_natural,
    is_number,
    levels_in_numbers,
)

__all__ = [
    "Record",
    "Refinement",
    "ProgressiveRefinement",
    "FixedRefinement",
    "ScheduledRefinement",
    "checked_metric",
]

_Value = TypeVar("_Value")
# Where none is given; it cannot be changed, and so is one for all.
_LADDER = GeometricLadder()


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


class _Checked(Generic[_Value]):
    """An attribute whose values are checked whenever it is set; the object counts its changes.

    Parameters
    ----------
    check : callable
        From the object and a value to what is kept; raises for a value that cannot be meant.
    """

    def __init__(self, check: Callable[[Any, Any], _Value]):
        self._check = check

    if TYPE_CHECKING:
        # Python finds what is kept by itself, in less time.
        def __get__(self, instance: Any, owner: type) -> _Value: ...

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __set__(self, instance: Any, value: Any) -> None:
        attributes = vars(instance)
        attributes[self._name] = self._check(instance, value)
        attributes["changes"] = attributes.get("changes", 0) + 1


class _Meanings:
    """What levels mean, found out once where it cannot change.

    On a ladder of a user's own class, and with settings that are not frozen, a level may mean
    something else later.

    Parameters
    ----------
    ladder : Sequence
        That was checked.
    """

    def __init__(self, ladder: Sequence):
        self._ladder = ladder
        self._settings: dict[int, Setting] = {}
        self._is_fixed = isinstance(ladder, tuple) or is_registered(ladder)

    def knows(self, level: int) -> bool:
        """Whether a level was found to mean something, and does for ever."""
        return level in self._settings

    def of(self, level: int) -> Setting:
        """What a level means."""
        setting = self._settings.get(level)
        if setting is None:
            setting = setting_of(self._ladder[level])
            if self._is_fixed and is_frozen(setting):
                self._settings[level] = setting
        return setting


class Refinement(Assessable):
    """What all refinements share: a ladder, a level, and the record of the outer iterations.

    A rule of one's own is a subclass with one method, :meth:`next_level`. Where it has numbers of
    its own, it names them in ``parameters``; where it remembers more than levels and metrics, it
    adds that to :meth:`state_dict` and to :meth:`checked_state`. Where ``step`` is to be told
    something else than a metric, it makes a metric of that and hands it to ``super().step``.

    Parameters
    ----------
    ladder : Sequence of Setting or int
        The settings, coarsest first; an integer means so many iterations.
    ema_window : int
        Window of the exponential moving average of the metrics.
    level : int
        The first level.
    comm : mpi4py.MPI.Comm or None
        Where given, every rank takes the metric of rank 0, so that metrics that differ by rounding
        never let ranks decide differently. ``step`` is then collective.

    Attributes
    ----------
    ladder : Sequence of Setting
    level : int
        Where the refinement stands now. It can be set, to a level that is on the ladder.
    history : list of Record
    monitors : list of callable
        Called with each new record.
    changes : int
        How often it was stepped, loaded or set, whether it means something else since then or
        not: by it ranks know together that settings are to be compared.
    parameters : tuple of str
        Of a class: the attributes that a refinement must have alike to continue from the state of
        another one. They are numbers, or dictionaries of numbers.

    Notes
    -----
    On several ranks all make the same calls, and all come to the same level: solves compare their
    settings, and raise where ranks have others. (A call that one rank makes alone is noticed where
    a solve has something else to reduce before it iterates, as one with a field in the operator
    has; elsewhere the others wait for ever, since solves reduce nothing for this.)

    Examples
    --------
    A rule that goes up whenever the metric has not halved:

    >>> class Halving(Refinement):
    ...     def next_level(self, smoothed):
    ...         is_last = self.level + 1 == len(self.ladder)
    ...         if is_last or not self.history or smoothed <= self.history[-1].smoothed/2:
    ...             return self.level
    ...         return self.level + 1
    >>> refinement = Halving([5, 10, 20], ema_window=1)
    >>> [refinement.step(metric) for metric in (8.0, 4.0, 3.0)]
    [False, False, True]
    """

    parameters: ClassVar[tuple[str, ...]] = ("ema_window",)
    changes: int

    ladder = _Checked[Sequence](lambda refinement, ladder: refinement._checked_ladder(ladder))
    level = _Checked[int](lambda refinement, level: refinement._checked_level(level))
    ema_window = _Checked[int](lambda refinement, window: count("ema_window", window))
    comm = _Checked[Any](lambda refinement, comm: _checked_communicator(comm))

    def __init__(
        self, ladder: Sequence[Setting | int], *, ema_window: int = 6, level: int = 0, comm=None
    ):
        self.ladder = ladder
        self.comm = comm
        self.level = level
        self.ema_window = ema_window
        self.history: list[Record] = []
        self.monitors: list[Callable[[Record], None]] = []

    @property
    def setting(self) -> Setting:
        """What the current level means: ``ladder[level]``; or what was put in its place."""
        if self._instead is not None:
            return self._instead
        return self._meanings.of(self.level)

    def _checked_ladder(self, ladder) -> Sequence[Setting]:
        ladder = checked_ladder(ladder)
        if vars(self).get("level", 0) >= len(ladder):
            raise ValueError(
                f"level {self.level} is not on the ladder {shown(ladder)}, which has levels 0 to "
                f"{len(ladder) - 1}: set the level first"
            )
        self._meanings = _Meanings(ladder)
        return ladder

    def _checked_level(self, level) -> int:
        if type(level) is int and self._meanings.knows(level):
            return level
        ladder = self.ladder
        if not is_level(level, ladder):
            raise ValueError(
                f"level must be one of 0 to {len(ladder) - 1}, which are on the "
                f"ladder {shown(ladder)}, found {shown(level)}"
            )
        # of a ladder of a user's own class perhaps the first time that it is looked at
        self._meanings.of(int(level))
        return int(level)

    def step(self, metric: float) -> bool:
        """Record one outer iteration, and refine where the rule says so.

        Parameters
        ----------
        metric : float
            What the outer iteration achieved, such as a validation error: lower is better, finite,
            not negative.

        Returns
        -------
        bool
            Whether the level went up.

        Raises
        ------
        ValueError
            For a metric that is not a number, or is NaN, infinite or negative. Nothing is recorded
            then.
        """
        metric = self.agreed_metric(metric)
        smoothed = metric
        if self.history:
            smoothed = _averaged(self.history[-1].smoothed, metric, self.ema_window)
        level, setting = self.level, self.setting
        self.level = self.next_level(smoothed)
        refined = self.level > level
        self.history.append(Record(metric, smoothed, level, setting, refined))
        for monitor in self.monitors:
            monitor(self.history[-1])
        return refined

    def agreed_metric(self, metric) -> float:
        """The metric that all ranks take, which is that of rank 0; collective where there is a
        communicator.

        Raises
        ------
        ValueError
            As :meth:`step`, on all ranks.
        """
        return checked_metric(metric) if self.comm is None else _of_first_rank(self.comm, metric)

    def next_level(self, smoothed: float) -> int:
        """The level after an outer iteration: what a rule is.

        It is asked once an outer iteration, on all ranks alike, before the iteration is in the
        history; ``level`` is still that of the iteration.

        Parameters
        ----------
        smoothed : float
            The moving average of the metrics, the newest included.

        Returns
        -------
        int
            A level on the ladder.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no rule: write its method "
            "next_level(smoothed), which returns the next level"
        )

    def _rule(self) -> dict[str, Any]:
        """What an equal refinement has alike, beside its ladder, as plain numbers and lists."""
        values = {name: getattr(self, name) for name in self.parameters}
        return {
            "refinement": type(self).__name__,
            **{
                name: (
                    [list(pair) for pair in value.items()] if isinstance(value, Mapping) else value
                )
                for name, value in values.items()
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """All that changes, and what it holds for, as plain numbers and lists.

        ``torch.save``, pickle and strict JSON take it.
        """
        reached = {self.level, *(record.level for record in self.history)}
        return {
            **self._rule(),
            "ladder": levels_in_numbers(self.ladder, reached),
            "levels": len(self.ladder),
            "level": self.level,
            "history": [
                [record.metric, record.smoothed, record.level, record.refined]
                for record in self.history
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a ``state_dict`` of a refinement with the same ladder and rule.

        Raises
        ------
        TypeError, ValueError
            Where it is of another refinement, or was damaged: entries are missing, unknown or of
            another kind, or levels are not on this ladder. Nothing is changed then.
        """
        check_entries(state, self.state_dict().keys(), type(self).__name__)
        for name, value in self.checked_state(state).items():
            setattr(self, name, value)

    def checked_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes that a state with all its entries means, by name.

        Raises
        ------
        ValueError
            For a state of another refinement, or a damaged one.
        """
        for name, value in self._rule().items():
            if not is_equal(state[name], value):
                raise ValueError(
                    f"the state was saved with {name} {shown(state[name])}, and this refinement "
                    f"has {shown(value)}: load it into one that was made as that which it was "
                    "saved from"
                )
        check_records(state["history"])
        check_levels(state, self.ladder)
        history = [_record(self.ladder, *entries) for entries in state["history"]]
        return {"level": int(state["level"]), "history": history}


@rule(
    "prdp",
    title="PRDP",
    options={"tau_step": float, "tau_stop": float, "ema_window": int, "error_window": int},
    varied=("tau_step", "tau_stop"),
)
class ProgressiveRefinement(Refinement):
    r"""Refine when the metric stops improving; stop refining when refining no longer helps (PRDP).

    With :math:`e` the exponential moving average of all metrics (weight :math:`2/(w+1)` for the
    newest, started at the first metric), a step does nothing while no more than ``error_window``
    metrics are recorded. Then, where ``e[-1]/e[-error_window] <= tau_step``, training still
    improves and the level stays. Otherwise it has plateaued: with ``r = e[-1]/checkpoint``, if
    ``r < tau_stop or r > 1`` then the checkpoint becomes ``e[-1]`` and the level goes up; else the
    last refinement did not help, and the level stays. At the last level of the ladder nothing
    happens.

    Parameters
    ----------
    ladder : Sequence of Setting or int
        :class:`~prdp_fem.refinement.geometric.GeometricLadder` suits any solver; another one is
        :class:`~prdp_fem.refinement.ladders.IterationLadder`, or ``[5, 10, 20]`` for so many
        iterations.
    tau_step : float
        In (0, 1]: the ratio of moving averages above which training counts as plateaued. Higher
        waits longer.
    tau_stop : float
        In (0, 1]: the least improvement, as a ratio of plateaus, that makes another refinement
        worth while.
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
    TypeError
        For what is no ladder.
    ValueError
        For a ladder that is empty or does not go from coarse to fine, thresholds outside (0, 1],
        windows below 1 or a checkpoint that is not positive.

    References
    ----------
    K. Bhatia, F. Koehler, N. Thuerey, *PRDP: Progressively Refined Differentiable Physics*, ICLR
    2025, arXiv:2502.19611, section 3.
    """

    parameters = ("ema_window", "tau_step", "tau_stop", "error_window")
    remedy = (
        "judge by the latter, and refine further, as with a GeometricLadder, a tau_stop nearer to "
        "1, or DiscrepancyRefinement"
    )

    tau_step = _Checked[float](lambda refinement, ratio: _checked_threshold("tau_step", ratio))
    tau_stop = _Checked[float](lambda refinement, ratio: _checked_threshold("tau_stop", ratio))
    error_window = _Checked[int](lambda refinement, window: count("error_window", window))

    def __init__(
        self,
        ladder: Sequence[Setting | int] = _LADDER,
        *,
        tau_step: float = 0.98,
        tau_stop: float = 0.9,
        ema_window: int = 6,
        error_window: int = 3,
        checkpoint: float = math.inf,
        comm=None,
    ):
        super().__init__(ladder, ema_window=ema_window, comm=comm)
        self.tau_step = tau_step
        self.tau_stop = tau_stop
        self.error_window = error_window
        if not is_number(checkpoint) or not checkpoint > 0:
            raise ValueError(
                f"checkpoint must be a positive number or inf, found {shown(checkpoint)}"
            )
        self.checkpoint = float(checkpoint)

    @property
    def stopped(self) -> str:
        for place in range(len(self.history) - 1, self.error_window - 1, -1):
            record, earlier = self.history[place], self.history[place + 1 - self.error_window]
            if record.refined:
                break
            if _ratio(record.smoothed, earlier.smoothed) > self.tau_step:
                return super().stopped or "this level gains less than tau_stop asks"
        return super().stopped

    def next_level(self, smoothed: float) -> int:
        if len(self.history) + 1 <= self.error_window or self.level + 1 >= len(self.ladder):
            return self.level
        # e[-error_window]; the newest average is not in the history yet
        earlier = smoothed
        if self.error_window > 1:
            earlier = self.history[1 - self.error_window].smoothed
        if _ratio(smoothed, earlier) <= self.tau_step:
            return self.level
        gain = _ratio(smoothed, self.checkpoint)
        if gain < self.tau_stop or gain > 1:
            level = self._checked_level(self.level + 1)  # before anything has changed
            self.checkpoint = smoothed
            return level
        return self.level

    def state_dict(self) -> dict[str, Any]:
        # JSON has no infinity.
        return {
            **super().state_dict(),
            "checkpoint": None if math.isinf(self.checkpoint) else self.checkpoint,
        }

    def checked_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        checkpoint = math.inf if state["checkpoint"] is None else state["checkpoint"]
        if not is_number(checkpoint) or not checkpoint >= 0:
            raise ValueError(
                "checkpoint must be a number of at least 0 in a state, or None before the first "
                f"plateau, found {shown(checkpoint)}"
            )
        return {**super().checked_state(state), "checkpoint": float(checkpoint)}

    def __repr__(self) -> str:
        return (
            f"ProgressiveRefinement({self.ladder!r}, tau_step={self.tau_step:g}, "
            f"tau_stop={self.tau_stop:g}, ema_window={self.ema_window}, "
            f"error_window={self.error_window})"
        )


class FixedRefinement(Refinement):
    """One setting throughout, with the record of a refinement.

    It is what progressive refinement is compared with.

    Parameters
    ----------
    setting : Setting
        For example ``Iterations(20)`` or ``Tolerance(1e-10)``.
    comm : mpi4py.MPI.Comm or None
        See :class:`Refinement`.
    """

    def __init__(self, setting: Setting, *, comm=None):
        super().__init__((checked_setting(setting),), comm=comm)

    def next_level(self, smoothed: float) -> int:
        return self.level

    def __repr__(self) -> str:
        return f"FixedRefinement({self.ladder[0]!r})"


class ScheduledRefinement(Refinement):
    """Levels laid down beforehand.

    Parameters
    ----------
    ladder : Sequence of Setting
    schedule : Mapping of int to int
        From which outer iteration on (counted from 0) which level holds, e.g.
        ``{0: 0, 20: 3, 50: 7}``. Before the first entry the level is 0. Levels must not decrease.
    comm : mpi4py.MPI.Comm or None
        See :class:`Refinement`.
    """

    parameters = ("ema_window", "schedule")

    def __init__(self, ladder: Sequence[Setting], schedule: Mapping[int, int], *, comm=None):
        ladder = checked_ladder(ladder)
        if not isinstance(schedule, Mapping):
            raise TypeError(
                "a schedule must be a dictionary from outer iterations to levels, such as "
                f"{{0: 0, 20: 3}}, found {shown(schedule)}"
            )
        for iteration, level in schedule.items():
            if not (is_natural(iteration) and is_natural(level)):
                raise ValueError(
                    "a schedule maps outer iterations to levels, both integers from "
                    f"0, found {shown(iteration)}: {shown(level)}"
                )
        schedule = {int(iteration): int(schedule[iteration]) for iteration in sorted(schedule)}
        previous = 0
        for iteration, level in schedule.items():
            if level >= len(ladder):
                raise ValueError(
                    f"level {level} at outer iteration {iteration} is not on the ladder "
                    f"{shown(ladder)}, which has levels 0 to {len(ladder) - 1}"
                )
            if level < previous:
                raise ValueError(
                    f"levels must not decrease, found {level} after {previous} at "
                    f"outer iteration {iteration}"
                )
            previous = level
        super().__init__(ladder, level=schedule.get(0, 0), comm=comm)
        self.schedule = schedule

    def next_level(self, smoothed: float) -> int:
        return self.schedule.get(len(self.history) + 1, self.level)

    def __repr__(self) -> str:
        return f"ScheduledRefinement({self.ladder!r}, {self.schedule!r})"


def _of_first_rank(comm, metric) -> float:
    """The metric of rank 0, checked; what is wrong with it is raised on all ranks."""
    value = refusal = None
    if comm.rank == 0:
        try:
            value = checked_metric(metric)
        except ValueError as error:
            refusal = str(error)
    value, refusal = comm.bcast((value, refusal), root=0)
    if refusal is not None:
        raise ValueError(refusal)
    return value


def _record(ladder: Sequence, metric, smoothed, level, refined) -> Record:
    """A record from the numbers of a state, which were checked."""
    setting = setting_of(ladder[level])
    return Record(float(metric), float(smoothed), int(level), setting, bool(refined))


def _averaged(average: float, metric: float, window: int) -> float:
    """An exponential moving average, with the newest metric in it."""
    # Written so that the average of a constant is that constant, and that of a window of 1 is the
    # metric, in every bit.
    weight = 2 / (window + 1)
    return metric + (1 - weight) * (average - metric)


def _ratio(value: float, reference: float) -> float:
    """``value/reference`` for non-negative numbers; zero that stays zero counts as unchanged."""
    if reference == 0:
        return 1.0 if value == 0 else math.inf
    return value / reference


def _checked_threshold(name: str, value) -> float:
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], found {shown(value)}")
    return float(value)


def _checked_communicator(comm):
    """None, or what metrics can be sent by."""
    if comm is not None and not (callable(getattr(comm, "bcast", None)) and hasattr(comm, "rank")):
        raise TypeError(
            "comm must be a communicator of mpi4py's, such as mesh.comm, or None, "
            f"found {shown(comm)}"
        )
    return comm
