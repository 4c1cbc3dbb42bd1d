"""The refinements that a study compares, by name.

There are converged physics, constant numbers of iterations, and each registered rule
(:mod:`prdp_fem.refinement.registry`). What tables and figures make of a schedule is asked of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpi4py import MPI

from prdp_fem.arguments import count, instance, shown
from prdp_fem.refinement import RULES, FixedRefinement, Iterations, Refinement, Setting

__all__ = ["CONVERGED", "PRDP", "Schedule", "forms"]

# In these the colour-blind tell schedules apart, too (Okabe and Ito, 2008): converged physics, and
# rules in the order in which they are registered.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
_GREY = "0.6"


def _kinds() -> list[str]:
    """In the order of tables."""
    return ["converged", *RULES, "constant"]


def forms() -> list[str]:
    """The names that :meth:`Schedule.from_text` reads, beside numbers of iterations."""
    names = ["converged"]
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
        ``"converged"``, ``"constant"``, or the name of a rule, such as ``"prdp"``.
    iterations : int or None
        Of a constant schedule.
    **numbers : float
        Of a rule, by name, where they are not its defaults: all of those that it is registered with
        as varied, such as ``tau_step`` and ``tau_stop``.

    Attributes
    ----------
    kind : str
    iterations : int or None
    numbers : tuple of float
        Those of the rule, in the order in which it names them; empty for its defaults.
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
        if given and given.keys() != set(varied):
            both = "both " if len(varied) > 1 else ""
            expected = f"{both}{' and '.join(varied)} or none" if varied else "no numbers"
            raise ValueError(f"a {kind} schedule has {expected}, found {given}")
        # as those of a frozen dataclass are set
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "iterations", iterations)
        object.__setattr__(self, "numbers", tuple(given[name] for name in varied if given))
        if given:
            self._make([Iterations(1)], None)  # refuses numbers that cannot be meant

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """The schedule that a name means.

        Parameters
        ----------
        text : str
            ``converged``; a number K, for K iterations throughout; the name of a rule, alone or
            with its numbers, as in ``prdp`` or ``prdp:TAU_STEP:TAU_STOP``.

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
        kind, *numbers = text.split(":")
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
        return bool(self.numbers)

    @property
    def name(self) -> str:
        """What ``from_text`` reads."""
        if self.is_constant:
            return str(self.iterations)
        return ":".join([self.kind, *map(repr, self.numbers)])

    @property
    def title(self) -> str:
        """What tables and figures say."""
        if self.is_constant:
            return f"K = {self.iterations}"
        if self == CONVERGED:
            return "converged"
        title = RULES[self.kind].title
        return f"{title} {', '.join(f'{number:g}' for number in self.numbers)}".rstrip()

    @property
    def colour(self) -> str:
        """What figures draw it in."""
        if self.is_constant:
            return _GREY
        return _COLOURS[_kinds().index(self.kind) % len(_COLOURS)]

    @property
    def place(self) -> tuple:
        """What tables are sorted by: converged physics, rules, constants; then varied rules."""
        return self.is_varied, _kinds().index(self.kind), self.iterations or 0, self.numbers

    def refinement(
        self,
        *,
        ladder: Sequence[Setting],
        converged: Setting,
        constant: Callable[[int], Setting] = Iterations,
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
        comm : mpi4py.MPI.Comm or None
            See :class:`~prdp_fem.refinement.rules.Refinement`.
        """
        if self.iterations is not None:
            return FixedRefinement(constant(self.iterations), comm=comm)
        if self == CONVERGED:
            return FixedRefinement(converged, comm=comm)
        return self._make(ladder, comm)

    def _make(self, ladder: Sequence[Setting], comm: MPI.Comm | None) -> Refinement:
        entry = RULES[self.kind]
        return entry.make(ladder, comm=comm, **dict(zip(entry.varied, self.numbers)))


# What is compared, where nothing else is said.
CONVERGED = Schedule("converged")
PRDP = Schedule("prdp")
