"""Tables of studies, for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from prdp_fem.studies.runs import Runs
from prdp_fem.studies.savings import best_constant, savings
from prdp_fem.studies.schedules import CONVERGED, PRDP, Schedule

__all__ = ["markdown_table", "plain_table"]

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


def _rows(runs: Runs) -> dict[Schedule, tuple[str, ...]]:
    """The cells of each schedule's row.

    They are medians over the seeds; of the error the mean, and its spread.
    """
    converged = runs.get(CONVERGED, {})
    best = best_constant(runs) if converged else None
    rows: dict[Schedule, tuple[str, ...]] = {}
    for schedule, by_seed in runs.items():
        if not by_seed:
            continue
        errors = [run.error for run in by_seed.values()]
        saved = [
            savings(run, converged[seed])
            for seed, run in by_seed.items()
            if seed in converged and schedule != CONVERGED
        ]
        spread = f" ± {np.std(errors, ddof=1):.3%}" if len(errors) > 1 else ""
        rows[schedule] = (
            schedule.title + (", the best in hindsight" if schedule == best else ""),
            f"{np.mean(errors):.3%}{spread}",
            _median(saved, "excess", "+.1%"),
            _median(by_seed.values(), "iterations", ",.0f"),
            _median(saved, "iterations", ".1%"),
            _median(by_seed.values(), "solver_seconds", ".1f"),
            _median(saved, "solver_seconds", ".1%"),
            _median(by_seed.values(), "seconds", ".1f"),
            _median(saved, "seconds", ".1%"),
        )
    return rows


def _median(items: Iterable, quantity: str, form: str) -> str:
    """The median of an attribute as text, empty where there are no items or one is not known."""
    values = [getattr(item, quantity) for item in items]
    return format(np.median(values), form) if values and np.isfinite(values).all() else ""


def plain_table(runs: Runs) -> str:
    """A table for a terminal: one row a schedule."""
    lines = [_HEADER, *_rows(runs).values()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    padded = []
    for title, *cells in lines:
        numbers = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:])]
        padded.append("  ".join([f"{title:{widths[0]}}", *numbers]))
    return "\n".join(padded)


def markdown_table(runs: Runs) -> str:
    """The same in Markdown, progressive refinement in bold."""
    lines = ["| " + " | ".join(_HEADER) + " |", "| --- |" + " ---: |" * (len(_HEADER) - 1)]
    for schedule, row in _rows(runs).items():
        cells = [f"**{cell}**" if cell else "" for cell in row] if schedule == PRDP else row
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
