"""What is put on solvers at a level: settings.

A setting is anything with the three attributes of :class:`Setting`, and those of
:class:`NewtonSetting` where it says something of a nonlinear solver, too. What a solver is told is
read from these attributes alone, so a setting of one's own is a class that has them. This module is
pure Python.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

from prdp_fem.arguments import count, flag, fraction, is_integer, shown

__all__ = [
    "Iterations",
    "NewtonSetting",
    "NewtonSteps",
    "Setting",
    "Tolerance",
    "checked_setting",
    "frozen",
    "in_numbers",
    "in_words",
    "is_frozen",
    "newton_steps",
    "setting_of",
]


@runtime_checkable
class Setting(Protocol):
    """What is put on a Krylov solver. Where all three are None, its own options stand.

    A setting of one's own is best a frozen dataclass, with a ``__str__`` for monitors and tables.
    Solvers check its numbers before each solve, unless its class is :func:`frozen`.

    Attributes
    ----------
    rtol : float or None
        Stop when the residual norm is below ``rtol`` times the norm of the right-hand side.
    max_it : int or None
        Stop after so many iterations.
    budget : bool or None
        Whether using up ``max_it`` iterations is success (a budget of iterations) or failure (a cap
        on the way to a tolerance).

    Examples
    --------
    >>> @dataclass(frozen=True)
    ... class Digits:
    ...     digits: int
    ...     max_it: int = 500
    ...     budget: bool = False
    ...
    ...     @property
    ...     def rtol(self) -> float:
    ...         return 10.0**-self.digits
    >>> isinstance(Digits(3), Setting)
    True
    """

    @property
    def rtol(self) -> float | None: ...

    @property
    def max_it(self) -> int | None: ...

    @property
    def budget(self) -> bool | None: ...


@runtime_checkable
class NewtonSetting(Setting, Protocol):
    """What is put on a nonlinear solver, and by the attributes of :class:`Setting` on its KSP.

    Attributes
    ----------
    steps : int
        At most so many Newton (or Picard) steps; using them up is success.
    """

    @property
    def steps(self) -> int: ...


_Class = TypeVar("_Class", bound=type)
# Classes of settings whose numbers are right once and for all.
_FROZEN: set[type] = set()


def frozen(setting: _Class) -> _Class:
    """Declare, as a decorator, that a class of settings checks its numbers when an object is made.

    They cannot change later, and so solvers do not check them at each solve.
    """
    _FROZEN.add(setting)
    return setting


def is_frozen(setting: Any) -> bool:
    """Whether a setting is the same for ever, as those of the package are, but for Newton's."""
    return type(setting) in _FROZEN


@frozen
@dataclass(frozen=True)
class Iterations:
    """Exactly so many iterations, unless the residual falls below a floor earlier.

    Parameters
    ----------
    iterations : int
        The number of Krylov iterations, at least 1.
    rtol_floor : float
        Relative residual below which further iterations would only stir rounding errors.
    """

    iterations: int
    rtol_floor: float = 1e-12

    def __post_init__(self):
        count("iterations", self.iterations)
        fraction("rtol_floor", self.rtol_floor, allow_zero=True)

    @property
    def rtol(self) -> float:
        return self.rtol_floor

    @property
    def max_it(self) -> int:
        return self.iterations

    @property
    def budget(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"{self.iterations} iteration{'s' if self.iterations > 1 else ''}"


@frozen
@dataclass(frozen=True)
class Tolerance:
    """As many iterations as a relative residual needs.

    It is an error when ``max_it`` of them do not reach it.

    Parameters
    ----------
    rtol : float
        Residual norm relative to the norm of the right-hand side, in (0, 1).
    max_it : int
        The most iterations that may be spent.
    """

    rtol: float
    max_it: int = 10_000

    def __post_init__(self):
        fraction("rtol", self.rtol)
        count("max_it", self.max_it)

    @property
    def budget(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"relative tolerance {self.rtol:g}"


@dataclass(frozen=True)
class NewtonSteps:
    """At most so many Newton (or Picard) steps, each with a linear solve of its own setting.

    A step that the nonlinear solver's own tolerances (``snes_rtol`` and so on) make needless is not
    made. Solvers of linear problems take the setting of the linear solves.

    Parameters
    ----------
    steps : int
        The number of steps, at least 1.
    linear : Setting or None
        What is put on the KSP of each step, and on the adjoint's; None for what its options say.
    """

    steps: int
    linear: Setting | None = None

    def __post_init__(self):
        count("steps", self.steps)
        if self.linear is None:
            return
        is_linear = isinstance(self.linear, Setting) and newton_steps(self.linear) is None
        if isinstance(self.linear, type) or not is_linear:
            raise TypeError(
                "linear must be the setting of a linear solve, such as "
                f"Iterations(20), or None, found {shown(self.linear)}"
            )
        checked_setting(self.linear)

    @property
    def rtol(self) -> float | None:
        return None if self.linear is None else self.linear.rtol

    @property
    def max_it(self) -> int | None:
        return None if self.linear is None else self.linear.max_it

    @property
    def budget(self) -> bool | None:
        return None if self.linear is None else self.linear.budget

    def __str__(self) -> str:
        text = f"{self.steps} Newton step{'s' if self.steps > 1 else ''}"
        return text if self.linear is None else f"{text} of {self.linear}"


_SETTING = (
    "a setting must have the attributes rtol, max_it and budget, as Iterations(20) and "
    "Tolerance(1e-6) have"
)


def checked_setting(setting: Any) -> Setting:
    """A setting, whose numbers are such that a solver can be told them.

    This costs next to nothing for settings that are :func:`frozen`, as the package's own are.

    Raises
    ------
    TypeError
        For what is no setting.
    ValueError
        For numbers that the package's own settings would refuse, too.
    """
    kind = type(setting)
    if kind in _FROZEN:
        return setting
    if kind is NewtonSteps:
        if setting.linear is not None:
            checked_setting(setting.linear)
        return setting
    try:
        rtol = setting.rtol
        max_it = setting.max_it
        budget = setting.budget
    except AttributeError:
        raise TypeError(f"{_SETTING}, found {shown(setting)}") from None
    if isinstance(setting, type):
        raise TypeError(f"{_SETTING}, found {shown(setting)}, a class: make an object of it")
    if any(number is not None for number in (rtol, max_it, budget)):
        try:
            is_budget = flag("budget", budget)
            fraction("rtol", rtol, allow_zero=is_budget)
            count("max_it", max_it)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error}, in the setting {shown(setting)}") from None
    if (steps := newton_steps(setting)) is not None:
        try:
            count("steps", steps)
        except ValueError as error:
            raise ValueError(f"{error}, in the setting {shown(setting)}") from None
    return setting


def newton_steps(setting: Any) -> int | None:
    """How many Newton steps a setting allows; None where it leaves that to the solver's options."""
    return getattr(setting, "steps", None)


def setting_of(entry: Any) -> Setting:
    """What an entry of a ladder means: itself, or as many iterations as an integer says.

    Raises
    ------
    TypeError, ValueError
        As :func:`checked_setting`, and for an integer below 1.
    """
    if type(entry) in _FROZEN:
        return entry
    if is_integer(entry):
        return Iterations(int(entry))
    return checked_setting(entry)


def in_numbers(setting: Setting) -> list:
    """What a setting puts on solvers, in numbers that JSON takes.

    They are rtol, max_it and budget, and Newton steps where it has them.
    """
    rtol = setting.rtol
    max_it = setting.max_it
    budget = setting.budget
    numbers: list = [None, None, None]
    if rtol is not None and max_it is not None:
        numbers = [float(rtol), int(max_it), bool(budget)]
    steps = newton_steps(setting)
    return numbers if steps is None else [*numbers, int(steps)]


def in_words(setting: Setting | None) -> str:
    """What a setting, which may be of a user's class, puts on solvers, on one line."""
    if setting is None:
        return "no setting"
    steps = newton_steps(setting)
    limit = "" if steps is None else f"steps {steps}, "
    return f"{limit}rtol {setting.rtol}, max_it {setting.max_it}, budget {setting.budget}"
