"""The states of refinements: what is in them, and whether it is what a refinement saves.

A state is made of plain numbers and lists, so that ``torch.save``, pickle and strict JSON take it.
This module is pure Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from numbers import Real
from typing import Any

from prdp_fem.arguments import flag, is_integer, is_real, shown
from prdp_fem.refinement.settings import in_numbers, setting_of

__all__ = [
    "check_entries",
    "check_levels",
    "check_records",
    "checked_metric",
    "is_equal",
    "is_level",
    "is_natural",
    "is_number",
    "levels_in_numbers",
]


def levels_in_numbers(ladder: Sequence, reached: set[int]) -> list[list]:
    """Levels in numbers, each behind its own.

    They are the first hundred, and those that were reached.
    """
    first = range(min(len(ladder), 100))
    return [
        [level, *in_numbers(setting_of(ladder[level]))] for level in sorted(reached.union(first))
    ]


def check_entries(state: Any, expected: Set[str], kind: str) -> None:
    """Make sure that a state is a dictionary with the entries that a refinement saves.

    Parameters
    ----------
    state : object
    expected : set of str
        The names of the entries.
    kind : str
        The name of the refinement's class, for messages.
    """
    if not isinstance(state, Mapping):
        raise TypeError(
            f"a state must be a dictionary, as state_dict() gives one, found {shown(state)}"
        )
    if missing := expected - state.keys():
        if {"level", "history"} <= state.keys() <= {"level", "history", "checkpoint"}:
            raise ValueError(
                "the state was saved by an earlier version of prdp_fem, which did not note the "
                "ladder and the rule that it holds for: where they are those of this refinement, "
                "load {**refinement.state_dict(), **state}"
            )
        raise ValueError(
            f"the state of a {kind} lacks {sorted(missing)}; found {sorted(map(str, state))}"
        )
    if unknown := state.keys() - expected:
        raise ValueError(
            f"the state of a {kind} has no {sorted(map(str, unknown))}; it has {sorted(expected)}"
        )


def check_records(history: Any) -> None:
    """Make sure that a history in a state is a list of records."""
    if not isinstance(history, (list, tuple)):
        raise ValueError(
            f"the history of the state must be a list of records, found {shown(history)}"
        )
    for record in history:
        if not isinstance(record, (list, tuple)) or len(record) != 4:
            raise ValueError(
                "a record in the history of the state must have metric, smoothed, level and "
                f"refined, found {shown(record)}"
            )
        for value in record[:2]:
            checked_metric(value)
        try:
            flag("refined", record[3])
        except TypeError as error:
            raise ValueError(f"{error}, in a record in the history of the state") from None


def check_levels(state: Mapping[str, Any], ladder: Sequence) -> None:
    """Make sure that a state was saved with the ladder of a refinement."""
    remedy = "load it into a refinement with the ladder it was saved with"
    levels = [state["level"], *(level for _, _, level, _ in state["history"])]
    for level in levels:
        if not is_level(level, ladder):
            raise ValueError(
                f"level {shown(level)} of the state is not on the ladder {shown(ladder)}, which "
                f"has levels 0 to {len(ladder) - 1}: {remedy}"
            )
    mine, theirs = levels_in_numbers(ladder, set(map(int, levels))), state["ladder"]
    if not is_equal(theirs, mine):
        if isinstance(theirs, (list, tuple)):
            # The first that differs, since there may be a hundred.
            different = [pair for pair in zip(theirs, mine) if not is_equal(*pair)]
            theirs, mine = different[0] if different else (theirs, mine)
        raise ValueError(
            "the state was saved with another ladder: of level, rtol, max_it, budget and Newton "
            f"steps it has {shown(theirs)}, and this one {shown(mine)}: {remedy}"
        )
    if not is_equal(state["levels"], len(ladder)):
        raise ValueError(
            f"the state was saved with a ladder of {shown(state['levels'])} levels, and this one, "
            f"{shown(ladder)}, has {len(ladder)}: {remedy}"
        )


def checked_metric(metric) -> float:
    """A metric as a float.

    Raises
    ------
    ValueError
        Where it is no number, NaN, infinite or negative.
    """
    try:
        # of an array or a tensor of one number, or of NumPy's numbers
        kind = getattr(metric, "dtype", "float")
        is_real = any(name in str(kind) for name in ("float", "int"))
        if not is_real or isinstance(metric, (bool, str, bytes, bytearray)):
            raise TypeError
        value = float(metric)
    except Exception:  # of whatever class, since the number is looked for in an object of any
        raise ValueError(f"a metric must be a number, found {shown(metric)}") from None
    if not math.isfinite(value):
        raise ValueError(
            f"a metric must be finite, found {value}: training has diverged, or the "
            "metric divides by zero"
        )
    if value < 0:
        raise ValueError(
            f"a metric must not be negative (lower is better, zero is perfect), found {value}"
        )
    return value


def is_level(level, ladder: Sequence) -> bool:
    """Whether it is a level on a ladder."""
    return is_natural(level) and level < len(ladder)


def is_natural(value) -> bool:
    """Whether it is an integer of at least 0."""
    return is_integer(value) and value >= 0


def is_number(value) -> bool:
    """Whether it is a real number that a float can hold, or infinity or NaN."""
    if not is_real(value):
        return False
    try:
        float(value)
    except OverflowError:
        return False
    return True


def is_equal(one, other) -> bool:
    """Whether two things of plain numbers, strings and lists are equal; tuples are lists."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_equal, one, other))
    plain = (Real, str, type(None))
    return isinstance(one, plain) and isinstance(other, plain) and bool(one == other)
