"""Which ladders and rules there are, by the names that options and studies call them.

A ladder, or a rule, is registered by a decorator where it is written. PETSc's options, their names
and documentation, the schedules of studies and what tables and figures call them are all read from
here. This module is pure Python.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

__all__ = [
    "LADDERS",
    "RULES",
    "LadderEntry",
    "Number",
    "RuleEntry",
    "is_registered",
    "ladder",
    "rule",
]

_Class = TypeVar("_Class", bound=type)


@dataclass(frozen=True)
class Number:
    """A number that an option gives.

    Attributes
    ----------
    argument : str
        Of the class that it is handed to.
    is_real : bool
        Whether it may have a fraction.
    """

    argument: str
    is_real: bool


@dataclass(frozen=True)
class LadderEntry:
    """A ladder that ``-prdp_ladder`` can name.

    Attributes
    ----------
    make : type
        Of the ladder.
    numbers : mapping of str to Number
        What options give it, by the names behind ``prdp_``.
    """

    make: type
    numbers: Mapping[str, Number]


@dataclass(frozen=True)
class RuleEntry:
    """A rule that a study's ``--schedules`` can name.

    Attributes
    ----------
    make : callable
        From a ladder, ``comm`` and numbers to the refinement.
    title : str
        What tables and figures call it.
    options : mapping of str to Number
        Numbers that it takes beside its ladder, by the names behind ``prdp_``.
    varied : tuple of str
        Those of them that a schedule's name may end with, as in ``prdp:TAU_STEP:TAU_STOP``.
    """

    make: Callable
    title: str
    options: Mapping[str, Number]
    varied: tuple[str, ...]


LADDERS: dict[str, LadderEntry] = {}
RULES: dict[str, RuleEntry] = {}


def ladder(
    name: str,
    *,
    start: type = int,
    step: tuple[str, type] | None = ("step", int),
    ratio: tuple[str, type] | None = None,
    stop: type = int,
) -> Callable[[_Class], _Class]:
    """Register a class of ladders, as a decorator.

    Its entries must be settings, from coarse to fine, by construction: nobody looks at them again.

    Parameters
    ----------
    name : str
        Of the ladder in ``-prdp_ladder``.
    start, stop : type
        Of the arguments of these names: int or float.
    step, ratio : tuple of str and type, or None
        The argument that ``-prdp_step``, or ``-prdp_ratio``, gives, and its type; None where it is
        no option of the ladder.

    Examples
    --------
    >>> @ladder("tolerances", start=float, step=("factor", float), stop=float)  # doctest: +SKIP
    ... class ToleranceLadder(Sequence):
    ...     def __init__(self, start=1e-1, factor=0.1, stop=1e-10): ...
    """
    arguments = {"start": ("start", start), "step": step, "ratio": ratio, "stop": ("stop", stop)}
    numbers = {
        option: Number(given[0], given[1] is float)
        for option, given in arguments.items()
        if given is not None
    }

    def register(make: _Class) -> _Class:
        LADDERS[name] = LadderEntry(make, numbers)
        return make

    return register


def rule(
    name: str,
    *,
    title: str,
    options: Mapping[str, type] | None = None,
    varied: tuple[str, ...] = (),
) -> Callable[[_Class], _Class]:
    """Register a rule, as a decorator of a subclass of :class:`~prdp_fem.refinement.Refinement`.

    Its constructor takes a ladder, ``comm``, and numbers by their names.

    Parameters
    ----------
    name : str
        Of the rule among the schedules of a study.
    title : str
        What tables and figures call it.
    options : mapping of str to type
        The numbers that it takes, int or float, by name.
    varied : tuple of str
        Those of them that a schedule's name may end with, behind colons.
    """
    numbers = {option: Number(option, kind is float) for option, kind in (options or {}).items()}

    def register(make: _Class) -> _Class:
        RULES[name] = RuleEntry(make, title, numbers, varied)
        return make

    return register


def is_registered(candidate: object) -> bool:
    """Whether an object is a registered ladder, and none of a class derived from one."""
    return any(type(candidate) is entry.make for entry in LADDERS.values())
