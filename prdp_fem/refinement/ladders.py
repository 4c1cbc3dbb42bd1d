"""What the levels of a refinement mean: ladders of solver settings, from coarse to fine.

A *ladder* is any sequence of settings (:mod:`prdp_fem.refinement.settings`), or of integers, which
mean so many iterations. Level 0 is the coarsest. This module is pure Python: it knows neither PETSc
nor Firedrake.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from prdp_fem.arguments import count, fraction, shown
from prdp_fem.refinement.counts import CountLadder
from prdp_fem.refinement.registry import is_registered, ladder
from prdp_fem.refinement.settings import (
    Iterations,
    NewtonSteps,
    Setting,
    Tolerance,
    checked_setting,
    in_numbers,
    in_words,
    is_frozen,
    setting_of,
)

__all__ = [
    "IterationLadder",
    "Iterations",
    "NewtonLadder",
    "NewtonSteps",
    "Setting",
    "Tolerance",
    "ToleranceLadder",
    "checked_ladder",
    "checked_setting",
    "in_numbers",
    "in_words",
    "is_frozen",
    "setting_of",
]


# Ladders with more levels than this are those without an end.
_ENDLESS = 10**9
# How many entries of a ladder of a user's own class are looked at before it is used.
_LOOKED_AT = 1000


def _counts(start: int, step: int, stop: int | None) -> range:
    """The counts of a ladder; without an end where ``stop`` is None."""
    end = sys.maxsize if stop is None else count("stop", stop) + 1
    counts = range(count("start", start), end, count("step", step))
    if not counts:
        raise ValueError(
            f"start must not exceed stop, found start={start} and stop={stop}: the "
            "ladder would be empty"
        )
    return counts


def checked_ladder(ladder: Any, of: str = "a ladder") -> Sequence:
    """A ladder, of which as many entries were looked at as can be.

    Lists, tuples and ranges are copied, with :func:`setting_of` for each entry. A sequence of
    another class stays the object that it is; its first thousand entries are looked at, since one
    without an end cannot be read through.

    Parameters
    ----------
    ladder : Sequence of Setting or int
    of : str
        What messages call it.

    Raises
    ------
    TypeError
        For what is no sequence, and for an entry that is no setting.
    ValueError
        For an empty ladder, for an entry whose numbers cannot be meant, and for one that is coarser
        than the one before.
    """
    if is_registered(ladder):
        return ladder
    if not isinstance(ladder, Sequence) or isinstance(ladder, (str, bytes, bytearray, memoryview)):
        raise TypeError(
            f"{of} must be a sequence of settings, such as IterationLadder(start=1, "
            f"step=1), found {shown(ladder)}"
        )
    if len(ladder) == 0:
        raise ValueError(f"{of} must have at least one level, found an empty one")
    settings = tuple(_entry(ladder, level, of) for level in range(min(len(ladder), _LOOKED_AT)))
    for level, (coarser, finer) in enumerate(zip(settings, settings[1:]), start=1):
        if _is_coarser(finer, coarser):
            raise ValueError(
                f"{of} goes from coarse to fine, found {shown(finer)} at level "
                f"{level} after {shown(coarser)}: turn the order round"
            )
    is_whole = len(settings) == len(ladder)
    return settings if is_whole and isinstance(ladder, (list, tuple, range)) else ladder


def _entry(ladder: Sequence, level: int, of: str) -> Setting:
    try:
        return setting_of(ladder[level])
    except LookupError:
        raise ValueError(
            f"level {level} of {of} is not there, though its length is {len(ladder)}"
        ) from None
    except (TypeError, ValueError) as error:
        raise type(error)(f"level {level} of {of}: {error}") from None


def _is_coarser(setting: Setting, other: Setting) -> bool:
    """Whether one setting stops earlier than another, and in no respect later."""
    rtol, max_it, budget, *steps = in_numbers(setting)
    other_rtol, other_max_it, other_budget, *other_steps = in_numbers(other)
    if budget is not other_budget or len(steps) != len(other_steps) or steps > other_steps:
        return False
    if (rtol, max_it) == (other_rtol, other_max_it):
        return steps < other_steps
    if budget is None:
        return False
    return max_it < other_max_it and rtol >= other_rtol if budget else rtol > other_rtol


@ladder("iterations")
class IterationLadder(CountLadder):
    """Iteration counts ``start, start + step, …`` up to and including ``stop``.

    Parameters
    ----------
    start : int
        Iterations at level 0, at least 1.
    step : int
        Iterations that each level adds, at least 1.
    stop : int or None
        No level has more iterations than this; None for a ladder without an end (its ``len`` is
        then as large as Python can express).
    rtol_floor : float
        See :class:`Iterations`.

    Examples
    --------
    >>> ladder = IterationLadder(start=1, step=2, stop=8)
    >>> [setting.iterations for setting in ladder]
    [1, 3, 5, 7]
    """

    def __init__(
        self, start: int = 1, step: int = 1, stop: int | None = None, *, rtol_floor: float = 1e-12
    ):
        self._counts = _counts(start, step, stop)
        self.start = self._counts.start
        self.step = self._counts.step
        self.stop = None if stop is None else int(stop)
        self.rtol_floor = fraction("rtol_floor", rtol_floor, allow_zero=True)

    def __getitem__(self, level):
        counts = self._counts[level]
        if isinstance(counts, range):
            if self.stop is None and isinstance(level, slice) and level.stop is None:
                raise ValueError(f"{self!r} has no end: give the slice one, as in ladder[:10]")
            return [Iterations(iterations, self.rtol_floor) for iterations in counts]
        return Iterations(counts, self.rtol_floor)

    def __repr__(self) -> str:
        floor = "" if self.rtol_floor == 1e-12 else f", rtol_floor={self.rtol_floor!r}"
        return f"IterationLadder(start={self.start}, step={self.step}, stop={self.stop}{floor})"


@ladder("tolerances", start=float, step=("factor", float), stop=float)
class ToleranceLadder(Sequence):
    """Relative tolerances ``start, start·factor, …`` down to and including ``stop``.

    Parameters
    ----------
    start : float
        Tolerance at level 0, in (0, 1). It is relative to the norm of the right-hand side, also
        where a solve starts from a good guess.
    factor : float
        What each level multiplies the tolerance by, in (0, 1).
    stop : float
        No level has a tolerance below this.
    max_it : int
        The most iterations that any level may spend; needing more is an error.
    """

    def __init__(
        self, start: float = 1e-1, factor: float = 0.1, stop: float = 1e-10, max_it: int = 10_000
    ):
        self.start = fraction("start", start)
        self.factor = fraction("factor", factor)
        self.stop = fraction("stop", stop)
        self.max_it = count("max_it", max_it)
        if self.start < self.stop:
            raise ValueError(
                f"start must not be below stop, found start={start} and stop={stop}: "
                "the ladder would be empty"
            )
        # Powers of the factor reach `stop` up to rounding: count them on a logarithmic scale, with
        # room for it.
        finer = math.log(self.stop / self.start) / math.log(self.factor)
        self._levels = range(1 + math.floor(finer + 1e-9))

    def __len__(self) -> int:
        return len(self._levels)

    def __getitem__(self, level):
        levels = self._levels[level]
        if isinstance(levels, range):
            return [self[index] for index in levels]
        return Tolerance(max(self.start * self.factor**levels, self.stop), self.max_it)

    def __repr__(self) -> str:
        return (
            f"ToleranceLadder(start={self.start}, factor={self.factor}, stop={self.stop}, "
            f"max_it={self.max_it})"
        )

    def __eq__(self, other) -> bool:
        if not isinstance(other, ToleranceLadder):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash(self._values())

    def _values(self) -> tuple[float, float, float, int]:
        return self.start, self.factor, self.stop, self.max_it


@ladder("newton")
class NewtonLadder(Sequence):
    """Newton (or Picard) steps ``start, start + step, …`` up to and including ``stop``.

    Their linear solves may be refined with them.

    Parameters
    ----------
    start : int
        Steps at level 0, at least 1.
    step : int
        Steps that each level adds, at least 1.
    stop : int or None
        No level has more steps than this; None for a ladder without an end.
    linear : Setting, Sequence of Setting or None
        What is put on the KSP of each step: one setting for all levels, a ladder that is gone up in
        step with this one, or None for what the KSP's options say. Where one of the two ladders
        ends first, it stays at its last level.

    Examples
    --------
    >>> linear = IterationLadder(start=2, step=2, stop=6)
    >>> for setting in NewtonLadder(start=1, step=1, stop=2, linear=linear):
    ...     print(setting)
    1 Newton step of 2 iterations
    2 Newton steps of 4 iterations
    2 Newton steps of 6 iterations
    """

    def __init__(
        self,
        start: int = 1,
        step: int = 1,
        stop: int | None = None,
        *,
        linear: Setting | Sequence[Setting | int] | None = None,
    ):
        self._counts = _counts(start, step, stop)
        self.start = self._counts.start
        self.step = self._counts.step
        self.stop = None if stop is None else int(stop)
        if isinstance(linear, Sequence) and not isinstance(linear, (str, bytes)):
            if len(linear) == 0:
                raise ValueError("the ladder of the linear solves is empty")
            linear = checked_ladder(linear, "the ladder of the linear solves")
            self._linear: Sequence = linear
        else:
            self._linear = (linear,)
        self.linear = linear
        looked_at = 1 if is_registered(linear) else min(len(self._linear), _LOOKED_AT)
        for level in range(looked_at):
            self._steps(self.start, level)  # refuses what is no setting of a linear solve

    def __len__(self) -> int:
        return max(len(self._counts), len(self._linear))

    def __getitem__(self, level):
        levels = range(len(self))[level]
        if isinstance(levels, range):
            if level.stop is None and len(levels) > _ENDLESS:
                raise ValueError(f"{self!r} has no end: give the slice one, as in ladder[:10]")
            return [self[index] for index in levels]
        return self._steps(
            self._counts[min(levels, len(self._counts) - 1)], min(levels, len(self._linear) - 1)
        )

    def _steps(self, steps: int, level: int) -> NewtonSteps:
        linear = self._linear[level]
        return NewtonSteps(steps, linear if self._linear is not self.linear else setting_of(linear))

    def __repr__(self) -> str:
        linear = "" if self.linear is None else f", linear={self.linear!r}"
        return f"NewtonLadder(start={self.start}, step={self.step}, stop={self.stop}{linear})"

    def __eq__(self, other) -> bool:
        if not isinstance(other, NewtonLadder):
            return NotImplemented
        return (self._counts, self.linear) == (other._counts, other.linear)

    def __hash__(self) -> int:
        return hash(self._counts)
