"""What an argument must be, and the sentence that says so where it is something else.

Each function returns the value as the package uses it, or raises. This module is pure Python.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, TypeGuard

__all__ = [
    "COUNT",
    "count",
    "flag",
    "fraction",
    "instance",
    "is_integer",
    "is_real",
    "shown",
    "whole_number",
]

# The largest number of iterations or steps: PETSc counts them in 32 bits, unless it was configured
# otherwise.
COUNT = 2**31 - 1
# Characters of a value that an error shows.
_SHOWN = 120


def shown(value: Any) -> str:
    """A value as an error shows it: on one line, and not all of it where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a repr that fails must not hide what is wrong with the value
        return f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer of Python's or NumPy's; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: Any) -> TypeGuard[float]:
    """Whether it is a real number of Python's or NumPy's; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """An integer of Python's or NumPy's, of at least and at most so much.

    Raises
    ------
    ValueError
        For another number, and for anything else.
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, found {shown(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be an integer of at most {most}, found {shown(value)}")
    return int(value)


def count(name: str, value: Any) -> int:
    """A number of iterations, steps or metrics, of at least 1."""
    return whole_number(name, value, 1, COUNT)


def fraction(name: str, value: Any, *, allow_zero: bool = False) -> float:
    """A number between 0 and 1, without the ends unless zero is allowed.

    Raises
    ------
    ValueError
        For another number, and for anything else.
    """
    if not is_real(value):
        raise ValueError(f"{name} must be a number, found {shown(value)}")
    if not (0 < value < 1 or (allow_zero and value == 0)):
        raise ValueError(
            f"{name} must lie in {'[0' if allow_zero else '(0'}, 1), found {shown(value)}"
        )
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False, Python's or NumPy's.

    Raises
    ------
    TypeError
        For anything else: every string but the empty one would count as True.
    """
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be True or False, found {shown(value)}")
    return bool(value)


def instance(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    """An object of a class, or of one of several.

    Raises
    ------
    TypeError
        For another one; ``expected`` says what it must be.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {expected}, found {shown(value)}")
    return value
