"""A study: one training, run under several refinements and seeds, each kept in a file."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.arguments import instance, shown
from prdp_fem.history import History
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.ranks.job import Refused
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.ladders import (
    Iterations,
    Setting,
    Tolerance,
    checked_ladder,
    checked_setting,
)
from prdp_fem.refinement.rules import Refinement
from prdp_fem.studies.command_line import SOLVER_PREFIX
from prdp_fem.studies.files import alone, say
from prdp_fem.studies.run_files import RunFiles
from prdp_fem.studies.runs import LAST_EPOCHS, Run, Runs, machine
from prdp_fem.studies.schedules import DIRECT, PRDP, Schedule
from prdp_fem.studies.tables import plain_table

__all__ = ["Study"]

# What "converged" means where a study says nothing else; laid down beforehand, for forward and
# adjoint solves.
RESIDUAL = Tolerance(1e-10)
# Options that are meant for a study's solver, and for this package.
_OWN = (SOLVER_PREFIX, "prdp_")
COMM = MPI.COMM_WORLD  # a study is all that a job does


class Study:
    """The same training under several schedules and seeds.

    Parameters
    ----------
    name : str
        Of the study, as its files are called.
    arguments : argparse.Namespace
        From :func:`~prdp_fem.studies.command_line.command_line`.
    ladder : Sequence of Setting, or None
        What rules go up; None for the package's default.
    converged : Setting
        What "converged" means, for all schedules the same and laid down beforehand.
    constant : callable
        From a number of iterations to a setting, for constant schedules.
    tolerance : callable
        From a relative tolerance to a setting, for schedules of a constant one.
    setup : dict
        What is trained, and how: sizes, epochs, solver. It is kept with each run, with the options
        of the command line that change the solver, and runs under another one are not mixed in.

    Examples
    --------
    In a script, ``train_one`` being a function that trains under a refinement::

        arguments = command_line(__file__, __doc__)
        ladder = IterationLadder(start=1, step=1)
        study = Study("bridge", arguments, ladder=ladder, setup={"nodes": 512})
        runs = study.run(train_one)
        study.print_table(runs)
        study.draw(lambda: draw_training(runs, study.path("training")))
    """

    def __init__(
        self,
        name: str,
        arguments: argparse.Namespace,
        *,
        ladder: Sequence[Setting] | None = None,
        converged: Setting = RESIDUAL,
        constant: Callable[[int], Setting] = Iterations,
        tolerance: Callable[[float], Setting] = Tolerance,
        setup: dict[str, Any],
    ):
        instance("name", name, str, "a string, since files are called by it")
        if not name or "/" in name or "\0" in name:
            raise ValueError(f"name must be one that files can have, found {shown(name)}")
        checked_setting(converged)
        instance("setup", setup, Mapping, "a dictionary")
        for role, function in (("constant", constant), ("tolerance", tolerance)):
            if not callable(function):
                raise TypeError(
                    f"{role} must be a function from a number to a setting, found {shown(function)}"
                )
        self.name = name
        self.schedules = list(dict.fromkeys(arguments.schedules))
        self.seeds = list(dict.fromkeys(arguments.seeds))
        # Scripts may change their folder meanwhile.
        self.output = arguments.output.absolute()
        self.resume = arguments.resume
        self.ensemble = arguments.ensemble
        ladder = GeometricLadder() if ladder is None else ladder
        self.ladder = checked_ladder(ladder)
        self.converged = converged
        self.constant = constant
        self.tolerance = tolerance
        self._has_said_unread = False
        setup = {
            **setup,
            "size": arguments.size,
            "converged": str(converged),
            "ladder": repr(ladder),
        }
        if arguments.solver_options:
            setup["options"] = arguments.solver_options
        try:
            self.setup = json.loads(json.dumps(setup, allow_nan=False))  # as it is read again
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"setup must be of plain numbers, strings and lists, which JSON takes: {error}"
            ) from None

    def run(
        self,
        train: Callable[[int, Refinement, str], tuple[History, dict[str, Any]]],
        *,
        trial: Callable[[Refinement], object] | None = None,
    ) -> dict[Schedule, dict[int, Run]]:
        """Train under each schedule with each seed.

        Parameters
        ----------
        train : callable
            From a seed, a refinement and a label for progress bars to a History, and what else is
            to be kept, as plain numbers and lists by their names. Called only for runs that are not
            taken from files.
        trial : callable or None
            From a refinement: makes the solver, and solves once. It is called before any training,
            so that options that nobody has read are told then, and not after the first run.

        Returns
        -------
        dict of Schedule to dict of int to Run
            By schedule and seed.

        Raises
        ------
        TypeError
            Where ``train`` returns something else.
        Refused
            Where a run that is to be resumed was made with another set-up, or is none, where
            another process runs the same study into that folder, and where a run cannot be written.
        """
        runs: dict[Schedule, dict[int, Run]] = {schedule: {} for schedule in self.schedules}
        trained: dict[tuple[Schedule, int], Run] = {}
        files = RunFiles(self.output, self.name, self.setup)
        # Files are read and written by one rank: others may have other file systems.
        with contextlib.ExitStack() as held:
            lock = alone(self.output / f".{self.name}.lock")
            from_first_rank(COMM, lambda: held.enter_context(lock))
            wanted = list(itertools.product(self.schedules, self.seeds))
            kept = from_first_rank(COMM, lambda: files.taken(wanted, resume=self.resume))
            try:
                if trial is not None and len(kept) < len(wanted):
                    self._try(trial)
                for seed, schedule in itertools.product(self.seeds, self.schedules):
                    if (run := kept.get((schedule, seed))) is None:
                        run = self._trained(train, schedule, seed)
                        trained[schedule, seed] = run
                        self._keep(files, trained)
                    runs[schedule][seed] = run
            except BaseException:
                # What was put off; without the other ranks, which may be elsewhere.
                if COMM.rank == 0 and (problem := files.write(trained)):
                    say(f"{problem}: what was to be in it is lost")
                raise
            # Again, for the folder may have gone since.
            problem = from_first_rank(COMM, lambda: files.write(trained))
        if problem:
            self.print_table(runs)
            raise Refused(f"{problem}: what is left of it is the table above")
        return runs

    def _trained(self, train: Callable, schedule: Schedule, seed: int) -> Run:
        """The run that a training gives."""
        history, extras = _checked(
            train(seed, self._refinement(schedule), self.label(schedule, seed))
        )
        where = machine(self.ensemble)
        return Run(self.name, schedule.name, seed, history, self.setup, extras, where)

    def _keep(self, files: RunFiles, trained: Mapping[tuple[Schedule, int], Run]) -> None:
        """Have runs in their files, as far as that can be done now."""
        if problem := from_first_rank(COMM, lambda: files.write(trained)):
            PETSc.Sys.Print(f"{problem}: it will be tried again")
        self._say_unread_options()

    def draw(self, draw: Callable[[], None]) -> None:
        """Have the first rank draw figures, by a function that does not communicate.

        Raises
        ------
        Refused
            Where they cannot be put into their files, on all ranks.
        """
        try:
            from_first_rank(COMM, draw)
        except Refused as error:
            raise Refused(
                f"{error}: with --resume, runs are taken from their files, and figures are "
                "drawn again"
            ) from None

    def label(self, schedule: Schedule, seed: int) -> str:
        """What progress bars call a run."""
        return f"seed {seed}, {schedule.title}" if len(self.seeds) > 1 else schedule.title

    def path(self, what: str) -> Path:
        """Of a figure of this study."""
        return self.output / f"{self.name}-{what}.png"

    def representative(self, runs: Runs) -> tuple[Schedule, Run]:
        """The run that pictures show: with the first seed, of PRDP where there is one."""
        schedule = PRDP if PRDP in runs else next(iter(runs))
        return schedule, next(iter(runs[schedule].values()))

    def _refinement(self, schedule: Schedule) -> Refinement:
        return schedule.refinement(
            ladder=self.ladder,
            converged=self.converged,
            constant=self.constant,
            tolerance=self.tolerance,
            comm=COMM,
        )

    def _try(self, trial: Callable[[Refinement], object]) -> None:
        """Have the solver made, one that iterates where there is one, and ask its options."""
        by_iterations = [schedule for schedule in self.schedules if schedule != DIRECT]
        trial(self._refinement((by_iterations or self.schedules)[0]))
        self._say_unread_options()

    def _say_unread_options(self) -> None:
        """A solver has been made by now: an option that nobody has asked for is a mistake."""
        if self._has_said_unread:
            return
        self._has_said_unread = True
        given = [f"-{name}" for name in PETSc.Options().getAll() if name.startswith(_OWN)]
        given += self.setup.get("options", "").split()
        options = [option for option in dict.fromkeys(given) if option[1:].startswith(_OWN)]
        if unused := [option for option in options if not PETSc.Options().used(option[1:])]:
            PETSc.Sys.Print(f"the solver did not look at {', '.join(unused)}: is it spelt right?")

    def print_table(self, runs: Runs) -> None:
        """What the runs have reached and what they cost, as text on rank 0."""
        PETSc.Sys.Print("\n" + plain_table(runs))
        lengths = [len(run.history) for by_seed in runs.values() for run in by_seed.values()]
        shortest = min(lengths)
        if shortest < LAST_EPOCHS:
            PETSc.Sys.Print(
                f"(errors are means over all of {shortest}, where longer runs have those of the"
                f" last {LAST_EPOCHS})"
            )

    def print_extras(self, runs: Runs, *names: str) -> None:
        """Numbers that were kept beside, as percentages, and means over the seeds."""
        for name in names:
            means = []
            for schedule, by_seed in runs.items():
                mean = np.mean([run.extras[name] for run in by_seed.values()])
                means.append(f"{schedule.title} {mean:.2%}")
            PETSc.Sys.Print(f"\n{name}: {', '.join(means)}")


def _checked(found) -> tuple[History, dict[str, Any]]:
    """What a training has returned."""
    if not (
        isinstance(found, tuple)
        and len(found) == 2
        and isinstance(found[0], History)
        and isinstance(found[1], dict)
    ):
        raise TypeError(
            "a training must return its History and a dictionary of what else is to be "
            f"kept, found {shown(found)}"
        )
    return found
