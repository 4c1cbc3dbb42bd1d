"""Tables of studies, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from prdp_fem.studies.runs import Run, Runs, Spent
from prdp_fem.studies.savings import best_constant, savings, spent_until_accurate
from prdp_fem.studies.schedules import CONVERGED, PRDP

__all__ = ["in_markdown", "markdown_table", "plain_table", "reached", "rows_of"]

_HEADER = (
    "schedule",
    "error",
    "against converged",
    "inner iterations",
    "saved",
    "seconds in solver",
    "saved",
    "seconds in all",
    "saved",
)
# What there is beside where errors were assessed: behind the error, and at the end.
_ERRORS = ("with converged physics", "in use")
_TO_ACCURACY = ("iterations to accuracy", "seconds to accuracy")


def _rows(runs: Runs) -> list[tuple[str, ...]]:
    """The header, and the cells of each schedule's row.

    They are medians over the seeds; of the errors the means, and of the first their spread.
    """
    converged = runs.get(CONVERGED, {})
    best = best_constant(runs) if converged else None
    named = {
        schedule.title + (", the best in hindsight" if schedule == best else ""): by_seed
        for schedule, by_seed in runs.items()
        if by_seed
    }
    return rows_of(named, converged)


def rows_of(
    named: Mapping[str, Mapping[int, Run]], converged: Mapping[int, Run]
) -> list[tuple[str, ...]]:
    """A header, and a row for each name and its runs by seed, against converged ones by seed."""
    runs = [run for by_seed in named.values() for run in by_seed.values()]
    is_assessed = any(run.history.in_use for run in runs)
    header: tuple[str, ...] = _HEADER
    if is_assessed:
        header = (*_HEADER[:2], *_ERRORS, *_HEADER[2:], *_TO_ACCURACY)
    return [header, *(_row(name, named[name], converged, is_assessed) for name in named)]


def _row(
    name: str, by_seed: Mapping[int, Run], converged: Mapping[int, Run], is_assessed: bool
) -> tuple[str, ...]:
    errors = [run.error for run in by_seed.values()]
    pairs = [(run, converged[seed]) for seed, run in by_seed.items() if seed in converged]
    saved = [savings(run, other) for run, other in pairs if run is not other]
    spread = f" ± {np.std(errors, ddof=1):.3%}" if len(errors) > 1 else ""
    cells = [
        name,
        f"{np.mean(errors):.3%}{spread}",
        _median(saved, "excess", "+.1%"),
        _median(by_seed.values(), "iterations", ",.0f"),
        _median(saved, "iterations", ".1%"),
        _median(by_seed.values(), "solver_seconds", ".1f"),
        _median(saved, "solver_seconds", ".1%"),
        _median(by_seed.values(), "seconds", ".1f"),
        _median(saved, "seconds", ".1%"),
    ]
    if is_assessed:
        assessed = [
            _mean([getattr(run, error) for run in by_seed.values()])
            for error in ("error_converged", "error_in_use")
        ]
        spent = [spent_until_accurate(run, other) for run, other in pairs]
        to_accuracy = [reached(spent, "iterations", ",.0f"), reached(spent, "seconds", ".1f")]
        cells = [*cells[:2], *assessed, *cells[2:], *to_accuracy]
    return tuple(cells)


def _mean(errors: list[float | None]) -> str:
    known = [error for error in errors if error is not None]
    return f"{np.mean(known):.3%}" if known else ""


def reached(spent: list[Spent | None], quantity: str, form: str) -> str:
    """The median over those that became accurate; it says how many, where others did not."""
    known = [one for one in spent if one is not None]
    if not known:
        return "never" if spent else ""
    others = f" ({len(known)} of {len(spent)})" if len(known) < len(spent) else ""
    return _median(known, quantity, form) + others


def _median(items: Iterable, quantity: str, form: str) -> str:
    """The median of an attribute as text, empty where there are no items or one is not known."""
    values = [getattr(item, quantity) for item in items]
    return format(np.median(values), form) if values and np.isfinite(values).all() else ""


def plain_table(runs: Runs) -> str:
    """A table for a terminal: one row a schedule."""
    lines = _rows(runs)
    widths = [max(map(len, column)) for column in zip(*lines)]
    padded = (
        [
            f"{line[0]:{widths[0]}}",
            *(f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:])),
        ]
        for line in lines
    )
    return "\n".join(map("  ".join, padded))


def markdown_table(runs: Runs) -> str:
    """The same in Markdown, progressive refinement in bold."""
    return in_markdown(_rows(runs), bold=PRDP.title)


def in_markdown(rows: list[tuple[str, ...]], *, bold: str | None = None) -> str:
    """A header and rows in Markdown, one of them in bold."""
    header, *others = rows
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    for row in others:
        cells = [f"**{cell}**" if cell else "" for cell in row] if row[0] == bold else row
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
