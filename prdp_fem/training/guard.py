"""The guard of a training: what its metric is worth, found now and then with converged physics."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from firedrake.exceptions import ConvergenceError

from prdp_fem.arguments import shown
from prdp_fem.history import Account, History
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.refinement.assessment import (
    ALLOWED_GAP,
    CONVERGED,
    CoarsePhysicsWarning,
    relative_gap,
)
from prdp_fem.refinement.rules import Refinement, checked_metric
from prdp_fem.refinement.settings import (
    Iterations,
    NewtonSteps,
    Setting,
    newton_steps,
    setting_of,
)

__all__ = ["Guard", "checked_mode"]

# The most that assessments may cost, in percent of the iterations of the run.
_PERCENT = 3
# How many times as far as at the level solves go at least, for an assessment to tell anything; and
# at the first one that is made along the way.
_LEAST = 2
_FIRST = 4
# How often it looks along the way, at most.
_TIMES = 20
# Newton steps that are far enough, unless a level makes half as many itself.
_STEPS = 10
# Of the most iterations that solves were given, how many they have spent where they have converged.
_WITHIN = 0.95
# A relative residual that is large.
_LARGE_RESIDUAL = 0.1
# The part of its first value below which a learning rate has fallen.
_FALLEN = 0.1
_DIGITS = -math.log10(CONVERGED.rtol)


def checked_mode(mode: Any) -> str | None:
    """What becomes of what a guard finds: ``"warn"``, ``"error"``, or None for no guard."""
    if mode not in ("warn", "error", None) or isinstance(mode, bool):
        raise ValueError(f'guard must be "warn", "error" or None, found {shown(mode)}')
    return mode


@dataclass(frozen=True)
class _Counted:
    """What a validation, and all before it, have taken, of all members together.

    Attributes
    ----------
    solves, newton_steps, iterations : int
        Of the last validation.
    total : int
        Iterations of the run so far.
    """

    solves: int
    newton_steps: int
    iterations: int
    total: int

    @property
    def steps(self) -> int:
        """Linear solves that are allowed for each solve."""
        if not self.newton_steps:
            return 1
        return max(_STEPS, 2 * -(-self.newton_steps // self.solves))

    @property
    def iterations_of_each(self) -> float:
        """Iterations of a linear solve in the last validation."""
        return self.iterations / max(self.solves, self.newton_steps, 1)


class _Rates:
    """The learning rates of an optimiser, beside those of the start."""

    def __init__(self, optimiser: torch.optim.Optimizer):
        self._optimiser = optimiser
        self._highest = self._now()

    def _now(self) -> list[float]:
        return [float(group.get("lr", 1)) for group in self._optimiser.param_groups]

    def note(self) -> None:
        """Look at them: where a schedule begins low, the highest count as those of the start."""
        self._highest = list(map(max, self._highest, self._now()))

    def have_fallen(self) -> bool:
        """Whether all are far below those of the start."""
        return all(now < _FALLEN * start for now, start in zip(self._now(), self._highest))

    def __str__(self) -> str:
        return ", ".join(f"{rate:.3g}" for rate in self._now())


class Guard:
    """Assesses the metric of a training with converged physics, and says where it is another one.

    It costs at most 3 % of the run's iterations. They are counted, so that it looks at the same
    epochs whenever the same is trained. Solves go to a relative residual of 1e-8, or as far as the
    3 % allow. Along the way half of what they allow is kept for the end, where it looks in any
    case, and twice as far as the level at least: that is more than 3 % of a run of few epochs.

    Parameters
    ----------
    mode : str or None
        ``"warn"``, ``"error"`` or None, which looks at nothing.
    validate : callable
    refinement : Refinement
    solvers : list of RefinedSolver
        Those that ``validate`` calls; their work is the run's.
    optimiser : torch.optim.Optimizer
    history : History
        Where what is found is kept.
    account : Account
        That of the run, whose clock stands still while the guard looks.

    Attributes
    ----------
    keeps_metrics : bool
        Whether the history is to have metrics with converged physics; not where errors with them
        are assessed.
    """

    def __init__(
        self,
        mode: str | None,
        validate: Callable[[], Any],
        refinement: Refinement,
        solvers: list,
        optimiser: torch.optim.Optimizer,
        history: History,
        account: Account,
    ):
        self._mode = mode
        self._validate = validate
        self._refinement = refinement
        self._solvers = solvers
        self._history = history
        self._account = account
        # Whether the history is to have metrics with converged physics, or has errors already.
        self.keeps_metrics = True
        self._rates = _Rates(optimiser)
        self._opening = self._sums()
        self._validation = np.zeros_like(self._opening)
        self._random = torch.get_rng_state()
        self._spent = 0
        # What the next assessment along the way is to give each linear solve.
        self._wanted = 0.0
        # Iterations of a linear solve to a residual of 1e-8, or that were not enough for it.
        self._needed: float | None = None
        self._gap = 0.0
        self._said = 0
        # The epoch of the last assessment.
        self._looked_at = 0
        self._has_warned = False
        self._has_warned_of_rates = False
        self._has_looked_at_rates = False

    def _sums(self) -> np.ndarray:
        done = [solver.statistics for solver in self._solvers]
        counts = [(one.solves, one.newton_steps, one.iterations) for one in done]
        return np.array(counts, dtype=np.int64).reshape(-1, 3).sum(axis=0)

    def validate(self) -> Any:
        """The validation of an epoch, which is counted."""
        self._rates.note()
        self._random = torch.get_rng_state()
        before = self._sums()
        found = self._validate()
        self._validation = self._sums() - before
        return found

    def look(self, metric: float, epochs: int) -> None:
        """Assess the metric of an epoch, where it is time to, and say what is wrong with it.

        Collective; after :meth:`History.record`, and before the refinement is stepped.

        Raises
        ------
        CoarsePhysicsWarning
            Where the guard is to make it an error.
        """
        if self._mode is None:
            return
        with self._account.paused():
            self._look(metric, epochs)
        if self._account.comm.rank == 0:
            for text in self._history.warnings[self._said :]:
                warnings.warn(text, CoarsePhysicsWarning, stacklevel=3)
        self._said = len(self._history.warnings)

    def _look(self, metric: float, epochs: int) -> None:
        is_last = len(self._history) == epochs
        total = (self._sums() - self._opening)[-1]
        counted = _Counted(*self._account.summed([*self._validation, total]))
        if counted.solves and _is_coarse(self._refinement.setting):
            is_early = len(self._history) < self._looked_at + epochs / _TIMES
            if most := self._affordable(counted, is_last, is_early):
                self._looked_at = len(self._history)
                self._assess(metric, counted, most, is_last)
        elif is_last and counted.solves:
            _keep(self, metric, self._history)
        if is_last:
            self._close(counted)

    def _affordable(self, counted: _Counted, is_last: bool, is_early: bool) -> int:
        """Iterations that each linear solve is given now; 0 for no assessment.

        Parameters
        ----------
        counted : _Counted
        is_last : bool
        is_early : bool
            Whether the last assessment was few epochs ago.
        """
        least = max(math.ceil(_LEAST * counted.iterations_of_each), 1)
        allowed = _PERCENT * counted.total // 100 - self._spent
        each = counted.solves * counted.steps
        if is_last:
            return min(max(allowed // each, least), CONVERGED.max_it)
        if self._rates.have_fallen() and not self._has_looked_at_rates:
            most, wanted = allowed // each, float(least)
        elif is_early:
            return 0
        else:
            most = allowed // 2 // each
            wanted = max(self._wanted, _FIRST * counted.iterations_of_each)
        return min(most, CONVERGED.max_it) if most >= wanted else 0

    def _assess(self, metric: float, counted: _Counted, most: int, is_last: bool) -> None:
        def validate() -> float:
            found = self._validate()
            try:
                return from_first_rank(self._account.comm, partial(checked_metric, found))
            except ValueError as error:
                raise ConvergenceError(str(error)) from None

        self._has_looked_at_rates |= self._rates.have_fallen()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._random)
                true, work = self._refinement.metric_apart(
                    validate, self._solvers, lambda now: _further(now, most, counted)
                )
        except ConvergenceError as error:
            if self._account.members.size > 1:
                raise  # the other members know nothing of it
            self._count(most * counted.solves * counted.steps)
            self._wanted = 2.0 * most
            self._say(
                f"{self._when()} the metric could not be assessed with converged physics: {error}"
            )
            return
        spent = [work.solves, work.newton_steps, work.iterations]
        solves, steps, iterations = self._account.summed(spent)
        self._count(iterations)
        self._needed = iterations / max(solves, steps, 1)
        is_converged = self._needed <= _WITHIN * most
        self._wanted = self._needed / _WITHIN if is_converged else 2.0 * most
        self._gap = relative_gap(metric, true)
        if is_converged:
            _keep(self, true, self._history)
        self._refinement.heed(self._gap)
        if self._gap > ALLOWED_GAP:
            physics = "converged ones"
            if not is_converged:
                physics = f"{most} iterations a solve, which are not converged yet"
            self._warn_of_gap(metric, true, physics, is_last)
        elif is_last and not is_converged:
            self._say(
                f"{self._when()} the metric is {self._gap:.1%} off that with {most} iterations a "
                f"solve, as far as {_PERCENT}% of the run's iterations go, and these are not "
                "converged: refinement.assess(validate, solvers) finds what it is worth"
            )

    def _count(self, iterations: int) -> None:
        self._spent += iterations
        self._history.guard_iterations = self._spent

    def _warn_of_gap(self, metric: float, true: float, physics: str, is_last: bool) -> None:
        why, remedy = self._refinement.stopped, self._refinement.remedy
        if why:
            remedy = f"the refinement has stopped there ({why}): {remedy}"
        elif not is_last:
            remedy = "judge by the latter as long as the refinement goes up"
        text = (
            f"{self._when()} the metric is {metric:.3g} with the physics of the moment "
            f"({self._refinement.setting}), and {true:.3g} with {physics} ({self._gap:.1%} apart, "
            f"where {ALLOWED_GAP:.0%} are allowed): {remedy}"
        )
        if self._mode == "error" and (is_last or why):
            self._say(text)
            error = CoarsePhysicsWarning(text)
            error.history = self._history
            raise error
        if is_last or not self._has_warned:
            self._has_warned = True
            self._say(text)
        if self._rates.have_fallen() and not self._has_warned_of_rates:
            self._has_warned_of_rates = True
            self._say(
                f"{self._when()} learning rates have fallen below a tenth of the start (to "
                f"{self._rates})"
                f" while physics are too coarse (by {self._gap:.1%} of the metric), so that what is"
                " left to learn with finer ones is learnt slowly: have rates fall after the "
                "refinement has stopped, or refine by what finer physics say, as "
                "DiscrepancyRefinement does"
            )

    def _close(self, counted: _Counted) -> None:
        """Say at the end what is wrong with the refinement."""
        refinement, setting = self._refinement, self._refinement.setting
        is_linear_budget = setting.budget and not counted.newton_steps
        if not is_linear_budget or not counted.solves or len(refinement.ladder) == 1:
            return
        each = counted.iterations_of_each
        if self._needed and (why := refinement.stopped):
            residual = 10 ** (-_DIGITS * each / max(self._needed, each))
            if residual > _LARGE_RESIDUAL:
                self._say(
                    f"{self._when()} the refinement has stopped at {setting} ({why}), where "
                    f"residuals are still about {residual:.1g} of the right-hand side: have it "
                    "climb in larger steps, as those of a GeometricLadder, give it a tau_stop "
                    "nearer to 1, or use DiscrepancyRefinement"
                )
        below = refinement.level and setting_of(refinement.ladder[refinement.level - 1]).max_it
        if below and (found := self._history.iterations_per_solve[-1]) < below:
            self._say(
                f"{self._when()} solves end after {found:.3g} iterations, at the floor of their own"
                f" rounding, and the refinement has climbed to {setting}, which changes nothing: "
                "end its ladder by stop=, or use DiscrepancyRefinement, which does not climb there"
            )

    def _when(self) -> str:
        return f"after epoch {len(self._history)}"

    def _say(self, text: str) -> None:
        self._history.warnings.append(text)


def _keep(guard: Guard, metric: float, history: History) -> None:
    """Note a metric with converged physics."""
    if guard.keeps_metrics:
        history.converged.append([len(history), metric])


def _is_coarse(setting: Setting) -> bool:
    """Whether a setting may stop earlier than converged physics do."""
    if setting.rtol is None:
        return newton_steps(setting) is not None
    return bool(setting.budget) or setting.rtol > CONVERGED.rtol


def _further(now: Setting, most: int, counted: _Counted) -> Setting:
    """What is assessed with in place of a setting: converged, or so many iterations a solve."""
    if now.max_it is None:
        return NewtonSteps(max(counted.steps, 2 * (newton_steps(now) or 0), 1))
    if not _is_coarse(now):
        return now
    linear = Iterations(most, CONVERGED.rtol)
    return NewtonSteps(counted.steps, linear) if counted.newton_steps else linear
