"""Figures of studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from prdp_fem.studies.files import save_figure
from prdp_fem.studies.runs import Run, Runs
from prdp_fem.studies.savings import ACCURATE, TOLERATED, savings
from prdp_fem.studies.schedules import CONVERGED, PRDP, Schedule

__all__ = ["draw_study", "draw_training"]

BLUE, RED = PRDP.colour, CONVERGED.colour


def draw_training(runs: Runs, path: Path) -> None:
    """Errors and iterations per solve against the epoch, after Figure 2 of the PRDP paper, and
    errors against the seconds, for the first seed.

    Errors are those in use where they were assessed, and those through the physics of the moment
    are thin lines then.

    Parameters
    ----------
    runs : mapping of Schedule to mapping of int to Run
        By schedule and seed.
    path : Path
        Of the PNG file.
    """
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_errors(left, runs)
    _plot_errors_in_time(middle, runs)
    _plot_iterations(right, runs)
    middle.sharey(left)
    save_figure(figure, path)


def draw_study(runs: Runs, path: Path) -> None:
    """The same, and what each schedule reaches against what it takes: medians over the seeds.

    Parameters
    ----------
    runs, path
        See :func:`draw_training`.
    """
    figure = Figure(figsize=(20, 4.2), layout="constrained")
    first, second, third, last = figure.subplots(1, 4)
    _plot_errors(first, runs)
    _plot_errors_in_time(second, runs)
    _plot_iterations(third, runs)
    _plot_costs(last, runs)
    second.sharey(first)
    save_figure(figure, path, dpi=100)


def _first_seed(runs: Runs) -> dict[Schedule, Run]:
    """The runs to be drawn as curves: constants first, so that the others lie on top.

    Those of rules with numbers of their own are not among them.
    """
    chosen = [schedule for schedule, by_seed in runs.items() if by_seed and not schedule.is_varied]
    chosen.sort(key=lambda schedule: (not schedule.is_constant, schedule.place))
    return {schedule: next(iter(runs[schedule].values())) for schedule in chosen}


def _label(chosen: Mapping[Schedule, Run], name: str, default: str) -> str:
    """What the study calls something."""
    if not chosen:
        return default
    first = next(iter(chosen.values()))
    return first.extras.get("labels", {}).get(name, default)


def _styles(schedules: Iterable[Schedule]) -> dict[Schedule, dict]:
    constants = [schedule for schedule in schedules if schedule.is_constant]
    greys = matplotlib.colormaps["Greys"](np.linspace(0.35, 0.8, max(len(constants), 1)))
    styles = {
        schedule: {"color": grey, "linewidth": 1.0} for schedule, grey in zip(constants, greys)
    }
    others = (schedule for schedule in schedules if not schedule.is_constant)
    return styles | {schedule: {"color": schedule.colour, "linewidth": 1.6} for schedule in others}


def _plot_errors(axes: Axes, runs: Runs) -> None:
    chosen = _first_seed(runs)
    outer = _label(chosen, "outer", "epoch")
    styles = _styles(chosen)
    for schedule, run in chosen.items():
        epochs, errors = _judged(run)
        axes.semilogy(epochs, errors, label=schedule.title, **styles[schedule])
        if run.history.in_use:
            moment = np.arange(1, len(run.history) + 1)
            axes.semilogy(moment, run.errors, **{**styles[schedule], "linewidth": 0.5}, alpha=0.6)
    _mark_refinements(axes, chosen, f"refined after this {outer}", lambda run, epochs: epochs)
    _scale_errors(axes)
    title = _label(chosen, "errors", "Validation error")
    if any(run.history.in_use for run in chosen.values()):
        title = _label(chosen, "in use", "Error in use")
    axes.set(xlabel=outer, ylabel="relative error", title=title)
    if chosen:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.25)


def _plot_errors_in_time(axes: Axes, runs: Runs) -> None:
    """Of runs on the machine that the first of them was on: seconds of others say nothing."""
    chosen = _first_seed(runs)
    where = [_place(run) for run in chosen.values()]
    styles = _styles(chosen)
    for schedule, run in chosen.items():
        if _place(run) == where[0]:
            epochs, errors = _judged(run)
            axes.semilogy(_seconds_at(run, epochs), errors, **styles[schedule])
    _mark_refinements(axes, chosen, None, _seconds_at)
    converged = chosen.get(CONVERGED)
    if converged is not None and converged.error_in_use is not None:
        reached = (1 + ACCURATE) * converged.error_in_use
        label = f"within {ACCURATE:.0%} of converged physics"
        axes.axhline(reached, color=RED, linestyle="--", linewidth=0.8, label=label)
        axes.legend(fontsize="small")
    _scale_errors(axes)
    axes.set(xlabel="seconds in all", title="The same, against time")
    axes.grid(alpha=0.25)


def _judged(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Epochs, and the errors after them that the run is judged by."""
    if run.history.in_use:
        epochs, errors = zip(*run.history.in_use)
        return np.array(epochs), np.array(errors)
    return np.arange(1, len(run.history) + 1), run.errors


def _seconds_at(run: Run, epochs: np.ndarray) -> np.ndarray:
    return np.array(run.history.seconds)[epochs - 1]


def _place(run: Run) -> tuple:
    return tuple(run.machine.get(key, 1) for key in ("processor", "ranks", "members"))


def _mark_refinements(
    axes: Axes,
    chosen: Mapping[Schedule, Run],
    label: str | None,
    places: Callable[[Run, np.ndarray], np.ndarray],
) -> None:
    """Where progressive refinement went up, on its curve."""
    if (prdp := chosen.get(PRDP)) is None:
        return
    refined = np.flatnonzero(np.diff(prdp.history.level)) + 1
    errors = np.exp(np.interp(refined, _judged(prdp)[0], np.log(_judged(prdp)[1])))
    axes.plot(places(prdp, refined), errors, "^", color=BLUE, markersize=5, label=label)


def _scale_errors(axes: Axes) -> None:
    low, high = axes.get_ylim()
    if high / low < 100:
        is_narrow, subs = high / low < 3, (1, 1.5, 2, 3, 5) if high / low < 30 else (1, 2, 5)
        locator = MaxNLocator(6) if is_narrow else LogLocator(subs=subs)
        axes.yaxis.set_major_locator(locator)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 * error:.3g} %"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _plot_iterations(axes: Axes, runs: Runs) -> None:
    chosen = _first_seed(runs)
    styles = _styles(chosen)
    for schedule, run in chosen.items():
        axes.plot(
            np.arange(1, len(run.history) + 1),
            run.history.iterations_per_solve,
            drawstyle="steps-mid",
            **styles[schedule],
        )
    prdp, converged = chosen.get(PRDP), chosen.get(CONVERGED)
    if prdp is not None and converged is not None:
        epochs = np.arange(1, min(len(prdp.history), len(converged.history)) + 1)
        low, high = (run.history.iterations_per_solve[: len(epochs)] for run in (prdp, converged))
        axes.fill_between(epochs, low, high, step="mid", color=BLUE, alpha=0.15, linewidth=0)
        axes.text(
            0.5,
            0.55,
            f"{savings(prdp, converged).iterations:.0%} of iterations saved",
            transform=axes.transAxes,
            ha="center",
            fontsize=13,
        )
        axes.annotate(
            "converged",
            (epochs[-1], high[-1]),
            (0, -4),
            textcoords="offset points",
            color=RED,
            ha="right",
            va="top",
        )
        axes.annotate(
            "PRDP",
            (epochs[-1], low[-1]),
            (0, 4),
            textcoords="offset points",
            color=BLUE,
            ha="right",
            va="bottom",
        )
    axes.set(
        xlabel=_label(chosen, "outer", "epoch"),
        ylabel="iterations per solve",
        title="Forward and adjoint solves",
        ylim=(0, None),
    )
    axes.grid(alpha=0.25)


# What a schedule takes, as a share of what converged physics does, and what it misses of that.
_Points = dict[Schedule, tuple[float, float]]


def _plot_costs(axes: Axes, runs: Runs) -> None:
    points = _costs(runs)
    _plot_constants(axes, points)
    _plot_rules(axes, points)
    axes.axhspan(
        -TOLERATED,
        TOLERATED,
        color=RED,
        alpha=0.12,
        linewidth=0,
        label=f"converged ± {TOLERATED:.0%}",
    )
    axes.set_xscale("log")
    if max((abs(excess) for _, excess in points.values()), default=0) > 0.15:
        axes.set_yscale("symlog", linthresh=0.1)
    axes.margins(x=0.12, y=0.12)  # for the labels
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda fraction, _: f"{100 * fraction:.3g} %"))
        axis.set_minor_formatter(NullFormatter())
    axes.set(
        xlabel="inner iterations, of those of converged physics",
        ylabel="error above converged physics",
        title="What it reaches, what it takes",
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.25)


def _costs(runs: Runs) -> _Points:
    """Medians over the seeds that converged physics was run with, too."""
    converged = runs.get(CONVERGED, {})
    points = {}
    for schedule, by_seed in runs.items():
        saved = [
            savings(run, converged[seed]) for seed, run in by_seed.items() if seed in converged
        ]
        if saved:
            points[schedule] = (
                1 - np.median([saving.iterations for saving in saved]),
                np.median([saving.excess for saving in saved]),
            )
    return points


def _plot_constants(axes: Axes, points: _Points) -> None:
    """A curve of the constant schedules, each with its number of iterations."""
    constants = [schedule for schedule in points if schedule.is_constant]
    constants.sort(key=lambda schedule: schedule.place)
    if constants:
        axes.plot(
            *np.transpose([points[schedule] for schedule in constants]),
            "o-",
            color="0.5",
            markersize=4,
            label="constant K",
        )
    for schedule in constants:
        axes.annotate(
            str(schedule.iterations),
            points[schedule],
            (4, 4),
            textcoords="offset points",
            fontsize="small",
            color="0.4",
        )


def _plot_rules(axes: Axes, points: _Points) -> None:
    """A mark for each rule: squares with numbers of their own, stars with the usual ones."""
    labelled = set()
    varied = [schedule for schedule in points if schedule.is_varied]
    for schedule in varied:
        label = None
        if schedule.kind not in labelled:
            labelled.add(schedule.kind)
            label = f"{Schedule(schedule.kind).title}, other thresholds"
        axes.plot(
            *points[schedule], "s", color=schedule.colour, alpha=0.5, markersize=4, label=label
        )
    for schedule in points:
        if not (schedule.is_constant or schedule.is_varied or schedule == CONVERGED):
            axes.plot(
                *points[schedule], "*", color=schedule.colour, markersize=13, label=schedule.title
            )
