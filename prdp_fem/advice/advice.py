"""What is advised, as an object and as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prdp_fem.advice.measurement import Measurement
from prdp_fem.advice.rule import DIGITS, LEAST, MOST, Choice

__all__ = ["Advice"]


@dataclass(frozen=True)
class Advice:
    """What to use for a problem, and what was measured for that.

    Attributes
    ----------
    solver_parameters : dict of str
        For a solver of the problem.
    ladder : Sequence of Setting or None
        For its refinement; None for a direct solver, which has nothing to refine.
    table : list of Measurement
    choice : Choice or None
        Why; None where nothing gave a digit, and the user's own method is all that there is.
    problem : str
        What it is about, in a line.
    is_sure : bool
        Whether it is the same advice whether a training needs one digit or three.
    """

    solver_parameters: dict[str, Any]
    ladder: Sequence | None
    table: list[Measurement]
    choice: Choice | None
    problem: str

    @property
    def is_sure(self) -> bool:
        return self.choice is not None and self.choice.is_sure

    def __str__(self) -> str:
        return "\n".join([self.problem, "", *_rows(self.table), "", *self._words()])

    def _words(self) -> list[str]:
        if self.choice is None:
            return [
                "No method came near a solution: look at the problem (null spaces, boundary"
                " conditions, coefficients) first."
            ]
        chosen = self.choice.chosen
        verdict = (
            f"{chosen.method}, and no refinement: there is nothing to refine"
            if self.ladder is None
            else f"{chosen.method}, refined by {self.ladder!r}"
        )
        lines = [
            f"Use {verdict}.",
            f"    solver_parameters = {self.solver_parameters!r}",
        ]
        if self.choice.ratios:
            spent = ", ".join(
                f"{_ratio(ratio)} for {digits} digit{'s' if digits > 1 else ''}"
                for digits, ratio in self.choice.ratios.items()
            )
            lines.append(f"    The best iterations cost, of the best factorisation: {spent}.")
        needs = f"whether a training needs {LEAST} digit or {MOST}"
        lines.append(
            f"    The same holds {needs}."
            if self.is_sure
            else f"    It is close, or depends on {needs}; {DIGITS} are planned for."
        )
        return lines


def _ratio(ratio: float) -> str:
    return "more than was tried" if math.isinf(ratio) else f"{ratio:.2g} times"


_HEAD = ("method", "asked", "iterations", "forward", "backward", "set-up", "error", "gradient")


def _rows(table: Sequence[Measurement]) -> list[str]:
    """The table as lines of text; times in milliseconds for a sample."""
    cells = [_HEAD, *(_cells(row) for row in table if not row.failure)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    left = 2  # columns of words

    def line(row: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()

    said = [f"{row.method}: {row.failure}" for row in table if row.failure]
    return [*map(line, cells), *said]


def _cells(row: Measurement) -> tuple[str, ...]:
    forward, backward = row.seconds
    steps = f" ({row.newton_steps} steps)" if row.newton_steps else ""
    return (
        row.method,
        row.asked,
        f"{row.iterations[0]} + {row.iterations[1]}{steps}",
        f"{1e3 * forward:.3f} ms",
        f"{1e3 * backward:.3f} ms",
        f"{1e3 * row.set_up:.1f} ms" if row.set_up else "-",
        f"{row.error:.0e}",
        f"{row.gradient_error:.0e}",
    )
