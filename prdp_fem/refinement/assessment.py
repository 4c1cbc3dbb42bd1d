"""What a metric is worth: the same one with converged physics, beside that of the moment.

A network that is trained and judged through coarse physics learns to make up for their errors, and
its metric says nothing of that. This module is pure Python.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from prdp_fem.arguments import shown
from prdp_fem.refinement.settings import (
    NewtonSteps,
    Setting,
    Tolerance,
    checked_setting,
    newton_steps,
)

__all__ = [
    "ALLOWED_GAP",
    "CONVERGED",
    "Assessable",
    "Assessment",
    "CoarsePhysicsWarning",
    "Work",
    "checked_solvers",
    "relative_gap",
]

# What converged physics are, where nothing else is said.
CONVERGED = Tolerance(1e-8)
# The relative difference of metrics above which physics are too coarse to judge by.
ALLOWED_GAP = 0.05
# Newton steps that are converged where a setting leaves their linear solves to the options.
_MANY_STEPS = 50


class CoarsePhysicsWarning(UserWarning):
    """A metric that was found with coarse physics is another one with converged physics.

    Attributes
    ----------
    history : prdp_fem.history.History or None
        That of the training which has raised it as an error.
    """

    history: Any = None


def relative_gap(found: float, true: float) -> float:
    """The difference of two metrics, relative to the one that is true."""
    if found == true:
        return 0.0
    return abs(found - true) / true if true > 0 else math.inf


@dataclass(frozen=True)
class Work:
    """What solvers have done for something that their statistics do not count.

    Attributes
    ----------
    solves, newton_steps, iterations : int
        Problems solved, steps of nonlinear ones, and KSP iterations of all kinds.
    seconds : float
        Wall-clock time in the solvers, of this rank.
    """

    solves: int = 0
    newton_steps: int = 0
    iterations: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Assessment:
    """A metric with the physics of the moment, and with converged ones.

    Attributes
    ----------
    reported : float
        The metric with the settings of the moment.
    converged : float
        The metric with converged physics: what is true.
    iterations : int
        KSP iterations that finding both has taken; the solvers' own statistics do not count them.
    seconds : float
        Wall-clock time in the solvers of this rank, likewise.
    """

    reported: float
    converged: float
    iterations: int = 0
    seconds: float = 0.0

    @property
    def gap(self) -> float:
        """The difference of the two, relative to the converged one."""
        return relative_gap(self.reported, self.converged)

    def __str__(self) -> str:
        return (
            f"the metric is {self.reported:.3g} with the physics of the moment, and "
            f"{self.converged:.3g} with converged ones ({self.gap:.1%} apart)"
        )


class Assessable:
    """What can be assessed: the part of a refinement that a loop, and its guard, ask and tell."""

    # What to do where physics are too coarse to judge by.
    remedy: ClassVar[str] = "judge by the latter, and refine further"
    # What solvers are told instead of the level's setting.
    _instead: Setting | None = None

    if TYPE_CHECKING:
        changes: int
        level: int
        ladder: Sequence[Setting]

        @property
        def setting(self) -> Setting: ...

        def agreed_metric(self, metric: Any) -> float: ...

    @contextmanager
    def at(self, setting: Setting) -> Iterator[None]:
        """Within, solvers are told another setting; level and history stay as they are.

        On several ranks all enter and leave it together.

        Parameters
        ----------
        setting : Setting

        Examples
        --------
        >>> with refinement.at(Tolerance(1e-8)):  # doctest: +SKIP
        ...     solver.solve()
        """
        setting, before = checked_setting(setting), self._instead
        self._instead = setting
        self.changes += 1
        try:
            yield
        finally:
            self._instead = before
            self.changes += 1

    def assess(
        self,
        validate: Callable[[], Any],
        solvers: Iterable,
        *,
        converged: Setting = CONVERGED,
    ) -> Assessment:
        """Find a metric with the physics of the moment, and with converged ones.

        Nothing that follows is another one for it: level, history, what the solvers have counted
        and their solution Functions are as before, also after an error. It is collective where
        ``validate`` is, and takes the metrics of rank 0 where the refinement has a communicator.

        Parameters
        ----------
        validate : callable
            It returns the metric at the physics of the moment, finite and not negative. It is
            called twice, and has to find the same again: random numbers that it draws, and states
            that it changes beside those of solvers, are not put back.
        solvers : iterable
            The solvers of prdp_fem's that ``validate`` calls, or layers around them. Those that
            follow another refinement are converged, too; one that follows none solves as far as
            its options say.
        converged : Setting
            What converged physics are. Newton's method is converged as the options of its solver
            say, with this for its linear solves.

        Returns
        -------
        Assessment

        Raises
        ------
        TypeError
            For what is no solver, no setting, or a ``validate`` that cannot be called.
        ValueError
            For a metric that is no number, not finite or negative.

        Warns
        -----
        CoarsePhysicsWarning
            Where the two differ by more than 5 % of the converged one.
        """
        checked_setting(converged)
        solvers = checked_solvers(solvers)
        reported, work = self.metric_apart(validate, solvers)
        true, more = self.metric_apart(validate, solvers, lambda now: _converged(now, converged))
        assessment = Assessment(
            reported, true, work.iterations + more.iterations, work.seconds + more.seconds
        )
        if assessment.gap > ALLOWED_GAP:
            warnings.warn(f"{assessment}: {self.remedy}", CoarsePhysicsWarning, stacklevel=2)
        return assessment

    def metric_apart(
        self,
        validate: Callable[[], Any],
        solvers: Iterable,
        finer: Callable[[Setting], Setting] | None = None,
    ) -> tuple[float, Work]:
        """A metric, which leaves no trace, and what it has taken; see :meth:`assess`.

        Parameters
        ----------
        validate : callable
        solvers : iterable
        finer : callable or None
            From the setting of a refinement to what is in its place; None for the settings of the
            moment.
        """
        if not callable(validate):
            raise TypeError(
                f"validate must be a function that returns a metric, found {shown(validate)}"
            )
        solvers = checked_solvers(solvers)
        followed = {
            id(one): one
            for one in (self, *(solver.refinement for solver in solvers))
            if one is not None
        }
        with ExitStack() as stack:
            done = [stack.enter_context(solver.apart()) for solver in solvers]
            if finer is not None:
                for one in followed.values():
                    stack.enter_context(one.at(finer(one.setting)))
            metric = self.agreed_metric(validate())
        return metric, Work(
            sum(one.solves for one in done),
            sum(one.newton_steps for one in done),
            sum(one.iterations for one in done),
            sum(one.seconds for one in done),
        )

    @property
    def stopped(self) -> str:
        """Why the level is not about to go up any more; empty where it may."""
        if len(self.ladder) == 1:
            return "it has no other level"
        return "that is the last level" if self.level + 1 == len(self.ladder) else ""

    def told(self, metric: float, validate: Callable[[], Any]) -> Any:
        """What :meth:`step` is to be told after an outer iteration, by a loop such as ``train``.

        Parameters
        ----------
        metric : float
            Of the outer iteration, at the level.
        validate : callable
            It returns the metric at the physics of the moment.
        """
        return metric

    def heed(self, gap: float) -> None:
        """Be told, before a step, how far a metric at the level is off that of converged physics.

        A rule need not heed it, and PRDP, as it was published, does not.

        Parameters
        ----------
        gap : float
            Relative to the metric with converged physics.
        """


def checked_solvers(solvers: Any) -> list:
    """The solvers in a list of solvers, or of layers around them, each once."""
    if not isinstance(solvers, Iterable):
        raise TypeError(f"solvers must be a list of solvers, found {shown(solvers)}: write […]")
    found = {}
    for one in solvers:
        solver = one if hasattr(one, "apart") else getattr(one, "solver", one)
        if not callable(getattr(solver, "apart", None)):
            raise TypeError(
                f"solvers must be those of prdp_fem, or layers around them, found {shown(one)}"
            )
        found[id(solver)] = solver
    return list(found.values())


def _converged(setting: Setting, converged: Setting) -> Setting:
    """Converged physics in the place of a setting."""
    is_left_to_options = setting.max_it is None and newton_steps(setting) is not None
    return NewtonSteps(_MANY_STEPS) if is_left_to_options else converged
