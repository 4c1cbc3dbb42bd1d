"""The refinements that a study compares, by name.

There are converged physics, a direct solver, constant tolerances and numbers of iterations, and
each registered rule (:mod:`prdp_fem.refinement.registry`). What tables and figures make of a
schedule is asked of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from mpi4py import MPI

from prdp_fem.arguments import count, fraction, instance, shown
from prdp_fem.refinement import RULES, FixedRefinement, Iterations, Refinement, Setting, Tolerance
from prdp_fem.refinement.settings import frozen

__all__ = ["CONVERGED", "DIRECT", "PRDP", "Factorised", "Schedule", "forms"]

# In these the colour-blind tell schedules apart, too (Okabe and Ito, 2008): converged physics, and
# rules in the order in which they are registered.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_GREY = "0.6"
_BLACK = "#000000"
# Of constant tolerances, from coarse to fine.
_PURPLES = ("#C2A5CF", "#9970AB", "#762A83", "#40004B")


@frozen
@dataclass(frozen=True)
class Factorised:
    """The setting of a direct solver: what its options say, that is, as far as it can."""

    rtol: None = None
    max_it: None = None
    budget: None = None

    def __str__(self) -> str:
        return "factorised"


def _kinds() -> list[str]:
    """In the order of tables."""
    return ["converged", "direct", "rtol", *RULES, "constant"]


def forms() -> list[str]:
    """The names that :meth:`Schedule.from_text` reads, beside numbers of iterations."""
    names = ["converged", "direct", "rtol:TOLERANCE"]
    for name, entry in RULES.items():
        names.append(name)
        if entry.varied:
            names.append(":".join([name, *map(str.upper, entry.varied)]))
    return names


@dataclass(frozen=True, init=False)
class Schedule:
    """A refinement to be made anew for each run.

    Parameters
    ----------
    kind : str
        ``"converged"``, ``"direct"``, ``"rtol"``, ``"constant"``, or the name of a rule, such as
        ``"prdp"``.
    iterations : int or None
        Of a constant schedule.
    **numbers : float
        Of a rule, by name, where they are not its defaults: all of those that it is registered with
        as varied, such as ``tau_step`` and ``tau_stop``. ``rtol`` of a constant tolerance, relative
        to the right-hand side.

    Attributes
    ----------
    kind : str
    iterations : int or None
    numbers : tuple of float
        Those of the rule, in the order in which it names them; empty for its defaults. Of a
        constant tolerance that.
    """

    kind: str
    iterations: int | None
    numbers: tuple[float, ...]

    def __init__(self, kind: str, iterations: int | None = None, **numbers: float | None):
        kinds = _kinds()
        if kind not in kinds:
            raise ValueError(
                f"kind must be one of {', '.join(map(repr, kinds))}, found {shown(kind)}"
            )
        if kind == "constant":
            count("iterations", iterations)
        elif iterations is not None:
            raise ValueError(
                "iterations are those of a constant schedule, found "
                f"{shown(iterations)} for a {kind} one"
            )
        given = {name: number for name, number in numbers.items() if number is not None}
        varied = RULES[kind].varied if kind in RULES else ()
        if kind == "rtol":
            varied = ("rtol",)
            fraction("rtol", given.get("rtol"))
        if given and given.keys() != set(varied):
            both = "both " if len(varied) > 1 else ""
            expected = f"{both}{' and '.join(varied)} or none" if varied else "no numbers"
            raise ValueError(f"a {kind} schedule has {expected}, found {given}")
        # as those of a frozen dataclass are set
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "iterations", iterations)
        object.__setattr__(self, "numbers", tuple(given[name] for name in varied if given))
        if given and kind in RULES:
            self._make([Iterations(1)], None)  # refuses numbers that cannot be meant

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """The schedule that a name means.

        Parameters
        ----------
        text : str
            ``converged``; ``direct``, for a direct solver; ``rtol:TOLERANCE``, for a constant
            relative tolerance; a number K, for K iterations throughout; the name of a rule, alone
            or with its numbers, as in ``prdp`` or ``prdp:TAU_STEP:TAU_STOP``.

        Raises
        ------
        ValueError
            For anything else.
        """
        instance("text", text, str, "a string, such as 'prdp'")
        if text == "converged":
            return CONVERGED
        if re.fullmatch("[1-9][0-9]{0,8}", text):
            return cls("constant", iterations=int(text))
        if text == "direct":
            return DIRECT
        kind, *numbers = text.split(":")
        if kind == "rtol" and len(numbers) == 1:
            try:
                return cls(kind, rtol=float(numbers[0]))
            except ValueError as error:
                raise ValueError(f"{text!r}: {error}") from None
        if kind in RULES and len(numbers) in (0, len(RULES[kind].varied)):
            try:
                return cls(kind, None, **dict(zip(RULES[kind].varied, map(float, numbers))))
            except ValueError as error:
                raise ValueError(f"{text!r}: {error}") from None
        raise ValueError(
            f"a schedule is {', '.join(forms())} or a number of iterations, found {text!r}"
        )

    @property
    def is_constant(self) -> bool:
        """Whether it is a number of iterations throughout."""
        return self.kind == "constant"

    @property
    def is_varied(self) -> bool:
        """Whether it is a rule with numbers that are not its defaults."""
        return self.kind in RULES and bool(self.numbers)

    @property
    def is_converged(self) -> bool:
        """Whether it solves as far as a user who refines nothing would: to some tolerance, the same
        throughout, or directly.
        """
        return self.kind in ("converged", "direct", "rtol")

    @property
    def name(self) -> str:
        """What ``from_text`` reads."""
        if self.is_constant:
            return str(self.iterations)
        if self.kind == "rtol":
            return f"rtol:{_power(self.numbers[0])}"
        return ":".join([self.kind, *map(repr, self.numbers)])

    @property
    def title(self) -> str:
        """What tables and figures say."""
        if self.is_constant:
            return f"K = {self.iterations}"
        if self.kind == "rtol":
            return f"to {_power(self.numbers[0])}"
        if self.kind not in RULES:
            return self.kind
        title = RULES[self.kind].title
        return f"{title} {', '.join(f'{number:g}' for number in self.numbers)}".rstrip()

    @property
    def colour(self) -> str:
        """What figures draw it in."""
        if self.is_constant:
            return _GREY
        if self == DIRECT:
            return _BLACK
        if self.kind == "rtol":
            digits = -math.log10(self.numbers[0])
            return _PURPLES[min(int(digits / 2), len(_PURPLES) - 1)]
        return _COLOURS[["converged", *RULES].index(self.kind) % len(_COLOURS)]

    @property
    def place(self) -> tuple:
        """What tables are sorted by: converged physics in its kinds, rules, constants; then varied
        rules. Tolerances are sorted from fine to coarse.
        """
        return self.is_varied, _kinds().index(self.kind), self.iterations or 0, self.numbers

    def refinement(
        self,
        *,
        ladder: Sequence[Setting],
        converged: Setting,
        constant: Callable[[int], Setting] = Iterations,
        tolerance: Callable[[float], Setting] = Tolerance,
        comm: MPI.Comm | None = None,
    ) -> Refinement:
        """The refinement, at its start.

        Parameters
        ----------
        ladder : Sequence of Setting
            What rules go up.
        converged : Setting
            What "converged" means.
        constant : callable
            From a number of iterations to a setting.
        tolerance : callable
            From a relative tolerance to a setting.
        comm : mpi4py.MPI.Comm or None
            See :class:`~prdp_fem.refinement.rules.Refinement`.
        """
        if self.iterations is not None:
            return FixedRefinement(constant(self.iterations), comm=comm)
        if self == CONVERGED:
            return FixedRefinement(converged, comm=comm)
        if self == DIRECT:
            return FixedRefinement(Factorised(), comm=comm)
        if self.kind == "rtol":
            return FixedRefinement(tolerance(self.numbers[0]), comm=comm)
        return self._make(ladder, comm)

    def _make(self, ladder: Sequence[Setting], comm: MPI.Comm | None) -> Refinement:
        entry = RULES[self.kind]
        return entry.make(ladder, comm=comm, **dict(zip(entry.varied, self.numbers)))


def _power(number: float) -> str:
    """A tolerance as people write it, and as it is read again: 1e-2, 2.5e-3."""
    decimal = Decimal(repr(number)).normalize()
    first, *others = map(str, decimal.as_tuple().digits)
    mantissa = f"{first}.{''.join(others)}" if others else first
    return f"{mantissa}e{decimal.adjusted()}"


# What is compared, where nothing else is said.
CONVERGED = Schedule("converged")
PRDP = Schedule("prdp")
DIRECT = Schedule("direct")
