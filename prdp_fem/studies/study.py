"""A study: one training, run under several refinements and seeds, each kept in a file."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.history import History
from prdp_fem.ladders import Iterations, Setting, Tolerance
from prdp_fem.refinement import Refinement
from prdp_fem.studies.runs import Run, machine
from prdp_fem.studies.schedules import Schedule
from prdp_fem.studies.tables import plain_table

__all__ = ["Study"]

Runs = dict[Schedule, dict[int, Run]]

# What "converged" means where a study says nothing else; laid down beforehand, for forward and adjoint solves.
CONVERGED = Tolerance(1e-10)


class Study:
    """The same training under several schedules and seeds.

    Parameters
    ----------
    name : str
        Of the study, as its files are called.
    arguments : argparse.Namespace
        From :func:`~prdp_fem.studies.command_line.command_line`.
    ladder : Sequence of Setting
        What progressive refinement goes up.
    converged : Setting
        What "converged" means, for all schedules the same and laid down beforehand.
    constant : callable
        From a number of iterations to a setting, for constant schedules.
    setup : dict
        What is trained, and how: sizes, epochs, solver. It is kept with each run, and runs under another one are not mixed in.
    comm : mpi4py.MPI.Comm
    """

    def __init__(self, name: str, arguments: argparse.Namespace, *, ladder: Sequence[Setting], converged: Setting = CONVERGED,
                 constant: Callable[[int], Setting] = Iterations, setup: dict[str, Any], comm: MPI.Comm = MPI.COMM_WORLD):
        self.name = name
        self.schedules, self.seeds = list(dict.fromkeys(arguments.schedules)), list(dict.fromkeys(arguments.seeds))
        self.output, self.resume = arguments.output, arguments.resume
        self.ladder, self.converged, self.constant = ladder, converged, constant
        self.setup = {**setup, "size": arguments.size, "converged": str(converged), "ladder": repr(ladder)}
        self.comm = comm

    def run(self, train: Callable[[int, Refinement, str], History | tuple[History, dict[str, Any]]]) -> Runs:
        """Train under each schedule with each seed.

        Parameters
        ----------
        train : callable
            From a seed, a refinement and a label for progress bars to a History, alone or with what else is to be kept as plain
            numbers and lists. Called only for runs that are not taken from files.

        Returns
        -------
        dict of Schedule to dict of int to Run
            By schedule and seed.

        Raises
        ------
        ValueError
            Where a run that is to be resumed was made with another set-up.
        """
        paths = {(schedule, seed): self.output/Run.file_name(self.name, schedule, seed)
                 for schedule in self.schedules for seed in self.seeds}
        kept = {}
        if self.resume:
            kept = {key: Run.read(path) for key, path in paths.items() if path.is_file()}
            for key, run in kept.items():
                self._check_setup(run, paths[key])
        runs: Runs = {schedule: {} for schedule in self.schedules}
        for seed in self.seeds:
            for schedule in self.schedules:
                run = kept.get((schedule, seed))
                if run is None:
                    refinement = schedule.refinement(ladder=self.ladder, converged=self.converged, constant=self.constant, comm=self.comm)
                    result = train(seed, refinement, f"seed {seed}, {schedule.title}" if len(self.seeds) > 1 else schedule.title)
                    history, extras = result if isinstance(result, tuple) else (result, {})
                    run = Run(self.name, schedule.name, seed, history, self.setup, extras, machine(self.comm.size))
                    if self.comm.rank == 0:
                        run.write(paths[schedule, seed])
                runs[schedule][seed] = run
        return runs

    def _check_setup(self, run: Run, path) -> None:
        differing = [f"{key}: {run.setup.get(key)} there, {self.setup.get(key)} here"
                     for key in sorted(run.setup.keys() | self.setup.keys()) if run.setup.get(key) != self.setup.get(key)]
        if differing:
            raise ValueError(f"{path} was made with another set-up ({'; '.join(differing)}): choose another --output, or leave --resume "
                             "away to run again")

    def print_table(self, runs: Runs) -> None:
        """What the runs have reached and what they cost, as text on rank 0."""
        PETSc.Sys.Print("\n" + plain_table(runs), comm=self.comm)
