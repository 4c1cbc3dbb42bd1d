"""What progressive refinement saves, and why."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prdp_fem.studies.runs import Run, Runs
from prdp_fem.studies.schedules import CONVERGED, Schedule

__all__ = ["Savings", "best_constant", "savings"]

# A schedule is as good as converged physics where its error exceeds theirs by no more than this, in
# the median over the seeds.
TOLERATED = 0.02


@dataclass(frozen=True)
class Savings:
    """One run against the converged run of the same seed, as fractions of what that one took.

    Attributes
    ----------
    excess : float
        How much larger the error is: 0.02 for 2 %.
    iterations : float
        Saved inner iterations.
    progressive, incomplete : float
        Their parts, as in the PRDP paper: what coarser levels early in training save against the
        last level throughout, and what the last level throughout saves against converged physics.
    solver_seconds, seconds : float
        Saved wall-clock time, in the solvers and in all; NaN where the two ran on different
        processors or numbers of ranks.
    """

    excess: float
    iterations: float
    progressive: float
    incomplete: float
    solver_seconds: float
    seconds: float


def savings(run: Run, converged: Run) -> Savings:
    """What a run saves against the converged one."""
    solves = run.history.solves[-1] + run.history.adjoint_solves[-1]
    at_last_level = run.history.iterations_per_solve[-1] * solves
    same = all(
        run.machine.get(key, 1) == converged.machine.get(key, 1)
        for key in ("processor", "ranks", "members")
    )
    return Savings(
        excess=_ratio(run.error, converged.error) - 1,
        iterations=1 - _ratio(run.iterations, converged.iterations),
        progressive=_ratio(at_last_level - run.iterations, converged.iterations),
        incomplete=1 - _ratio(at_last_level, converged.iterations),
        solver_seconds=1 - _ratio(run.solver_seconds, converged.solver_seconds) if same else np.nan,
        seconds=1 - _ratio(run.seconds, converged.seconds) if same else np.nan,
    )


def _ratio(part: float, whole: float) -> float:
    """NaN where the whole is nothing, such as seconds that were too few to be noted."""
    return part / whole if whole else np.nan


def best_constant(runs: Runs) -> Schedule | None:
    """The smallest constant number of iterations whose error is that of converged physics.

    It is one of those tried, and nobody knows it before training.

    Parameters
    ----------
    runs : mapping of Schedule to mapping of int to Run
        By schedule and seed, with those of ``converged`` among them.

    Returns
    -------
    Schedule or None
        None where none of the constants is good enough.
    """
    converged = runs[CONVERGED]
    constants = (schedule for schedule in runs if schedule.is_constant)
    for schedule in sorted(constants, key=lambda schedule: schedule.place):
        seeds = runs[schedule].keys() & converged.keys()
        excesses = [savings(runs[schedule][seed], converged[seed]).excess for seed in seeds]
        if excesses and np.median(excesses) <= TOLERATED:
            return schedule
    return None
