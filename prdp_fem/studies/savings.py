"""What progressive refinement saves, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from prdp_fem.studies.runs import Run, Runs, Spent
from prdp_fem.studies.schedules import CONVERGED, Schedule

__all__ = ["Savings", "best_constant", "best_converged", "savings", "spent_until_accurate"]

# A schedule is as good as converged physics where its error exceeds theirs by no more than this, in
# the median over the seeds.
TOLERATED = 0.02
# A run is accurate as soon as its error in use exceeds their final one by no more than this.
ACCURATE = 0.05


@dataclass(frozen=True)
class Savings:
    """One run against the converged run of the same seed, as fractions of what that one took.

    Attributes
    ----------
    excess : float
        How much larger the error is, that in use where both runs have one: 0.02 for 2 %.
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
    same = _are_comparable(run, converged)
    return Savings(
        excess=_excess(run, converged),
        iterations=1 - _ratio(run.iterations, converged.iterations),
        progressive=_ratio(at_last_level - run.iterations, converged.iterations),
        incomplete=1 - _ratio(at_last_level, converged.iterations),
        solver_seconds=1 - _ratio(run.solver_seconds, converged.solver_seconds) if same else np.nan,
        seconds=1 - _ratio(run.seconds, converged.seconds) if same else np.nan,
    )


def spent_until_accurate(run: Run, converged: Run) -> Spent | None:
    """What a run takes until its error in use first is within 5 % of what converged physics reach.

    None where it never is, and where one of them was not assessed.
    """
    reached = converged.error_in_use
    return None if reached is None else run.until_accurate((1 + ACCURATE) * reached)


def _excess(run: Run, converged: Run) -> float:
    in_use, reached = run.error_in_use, converged.error_in_use
    if in_use is None or reached is None:
        in_use, reached = run.error, converged.error
    return _ratio(in_use, reached) - 1


def _are_comparable(run: Run, converged: Run) -> bool:
    """Whether two ran on the same kind of machine, so that seconds can be compared."""
    return all(
        run.machine.get(key, 1) == converged.machine.get(key, 1)
        for key in ("processor", "ranks", "members")
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
        if _is_as_good(runs[schedule], converged):
            return schedule
    return None


def best_converged(
    solvers: Mapping[str, Runs], converged: Mapping[int, Run]
) -> tuple[str, Schedule] | None:
    """The fastest way to solve to the end that is as good as converged physics.

    Parameters
    ----------
    solvers : mapping of str to mapping of Schedule to mapping of int to Run
        Runs of the same training with other solvers, by the names of their studies.
    converged : mapping of int to Run
        Converged physics, by seed, with the solver that is refined; they are to be among those.

    Returns
    -------
    tuple of str and Schedule, or None
        Of the least time in all, in the median over the seeds. None where times of none can be
        compared.
    """
    found = []
    for name, runs in solvers.items():
        for schedule, by_seed in runs.items():
            if not schedule.is_converged or not _is_as_good(by_seed, converged):
                continue
            ratios = [
                savings(run, converged[seed]).seconds for seed, run in _common(by_seed, converged)
            ]
            if np.isfinite(ratios).all():
                found.append((1 - np.median(ratios), name, schedule))
    if not found:
        return None
    _, name, schedule = min(found, key=lambda one: one[0])
    return name, schedule


def _is_as_good(by_seed: Mapping[int, Run], converged: Mapping[int, Run]) -> bool:
    excesses = [_excess(run, converged[seed]) for seed, run in _common(by_seed, converged)]
    return bool(excesses) and float(np.median(excesses)) <= TOLERATED


def _common(by_seed: Mapping[int, Run], converged: Mapping[int, Run]) -> list[tuple[int, Run]]:
    return [(seed, run) for seed, run in by_seed.items() if seed in converged]
