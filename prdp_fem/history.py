"""The record of a training run: what outer iterations achieved, and what all have cost so far."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from mpi4py import MPI

from prdp_fem.arguments import instance, shown
from prdp_fem.refinement.rules import Refinement, checked_metric
from prdp_fem.statistics import Statistics

__all__ = ["Account", "History"]

_COUNTS = ("solves", "adjoint_solves", "forward_iterations", "adjoint_iterations")


# What a guard has found; histories of earlier versions have none.
_OF_GUARD = {"converged", "warnings", "guard_iterations"}


def _is_epoch_with_metric(pair: Any) -> bool:
    if type(pair) is not list or len(pair) != 2:
        return False
    return _is_amount(pair[0], (int,)) and _is_amount(pair[1], (int, float))


def _check_guard(entries: dict[str, Any]) -> None:
    """Raise where what a guard has found is nothing of the kind."""
    found = entries.get("converged", [])
    if type(found) is not list or not all(map(_is_epoch_with_metric, found)):
        raise ValueError("converged must be a list of pairs, each of an epoch and a metric")
    texts = entries.get("warnings", [])
    if type(texts) is not list or not all(type(text) is str for text in texts):
        raise ValueError("warnings must be a list of texts")
    if not _is_amount(entries.get("guard_iterations", 0), (int,)):
        raise ValueError("guard_iterations must be a whole number of at least 0")


def _is_amount(value, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and 0 <= value < 2**63


@dataclass
class History:
    """Outer iterations of a training run, oldest first: lists of equal length, made of plain
    numbers so that JSON takes them.

    Attributes
    ----------
    metric : list of float
        What the refinement was told after each outer iteration, such as a validation error.
    level : list of int
        The level during the outer iteration, that is, before the refinement was told.
    settings : dict of int to str
        What the levels that were seen meant.
    solves, adjoint_solves, forward_iterations, adjoint_iterations : list of int
        What the solvers have done since the start, training and validation together.
    solver_seconds, seconds : list of float
        Wall-clock time since the start, in the solvers and in all; of the slowest rank.
    converged : list of list
        Pairs of an epoch, counted from 1, and the metric with converged physics after it, as the
        guard of a training has found them. Neither the counts nor the seconds above have it.
    warnings : list of str
        What the guard has said.
    guard_iterations : int
        KSP iterations that the guard has spent.
    """

    metric: list[float] = field(default_factory=list)
    level: list[int] = field(default_factory=list)
    settings: dict[int, str] = field(default_factory=dict)
    solves: list[int] = field(default_factory=list)
    adjoint_solves: list[int] = field(default_factory=list)
    forward_iterations: list[int] = field(default_factory=list)
    adjoint_iterations: list[int] = field(default_factory=list)
    solver_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    converged: list[list] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    guard_iterations: int = 0

    @classmethod
    def from_plain(cls, entries: dict[str, Any]) -> History:
        """The history of which ``dataclasses.asdict`` has made entries, as JSON gives them back.

        Raises
        ------
        ValueError
            Where they are others, or not those of a training run.
        """
        lists = sorted({field.name for field in fields(cls)} - {"settings", *_OF_GUARD})
        if not isinstance(entries, dict) or sorted(entries.keys() - _OF_GUARD) != sorted(
            [*lists, "settings"]
        ):
            raise ValueError(f"a history has {', '.join(lists)} and settings")
        _check_guard(entries)
        for name in lists:
            is_real = name in ("metric", "seconds", "solver_seconds")
            kinds = (int, float) if is_real else (int,)
            values = entries[name]
            if type(values) is not list or not all(_is_amount(value, kinds) for value in values):
                raise ValueError(
                    f"{name} must be a list of {'' if is_real else 'whole '}numbers of at least 0"
                )
        if len({len(entries[name]) for name in lists}) > 1 or not entries["metric"]:
            raise ValueError(f"{', '.join(lists)} must have one number for each outer iteration")
        for name in lists:
            if name not in ("metric", "level") and entries[name] != sorted(entries[name]):
                raise ValueError(f"{name} must not fall, as it is counted from the start")
        settings = entries["settings"]
        if type(settings) is not dict or not all(
            level.isdecimal() and type(setting) is str for level, setting in settings.items()
        ):
            raise ValueError("settings must be texts by level")
        # JSON's keys are texts
        settings = {int(level): setting for level, setting in settings.items()}
        return cls(**{**entries, "settings": settings})

    def __len__(self) -> int:
        return len(self.metric)

    @property
    def iterations(self) -> list[int]:
        """KSP iterations since the start, forward and adjoint."""
        return [
            forward + adjoint
            for forward, adjoint in zip(self.forward_iterations, self.adjoint_iterations)
        ]

    @property
    def iterations_per_solve(self) -> np.ndarray:
        """KSP iterations per solve, linear or not, in each outer iteration, forward and adjoint.

        Where an outer iteration has made no solves, since an optimiser has converged, that of the
        one before.
        """
        solves = np.diff(np.add(self.solves, self.adjoint_solves), prepend=0)
        per_solve = np.diff(self.iterations, prepend=0) / np.maximum(solves, 1)
        return per_solve[np.maximum.accumulate(np.where(solves > 0, np.arange(len(solves)), 0))]

    def record(self, metric: float, refinement: Refinement, account: Account) -> None:
        """Note an outer iteration, on all ranks and before ``refinement.step(metric)``."""
        instance("refinement", refinement, Refinement, "a Refinement")
        instance("account", account, Account, "an Account")
        metric = checked_metric(metric)
        self.settings[int(refinement.level)] = str(refinement.setting)
        for name, value in {
            "metric": metric,
            "level": int(refinement.level),
            **account.spent(),
        }.items():
            getattr(self, name).append(value)


class Account:
    """What solvers do and what it costs, from the moment when the account is opened.

    Parameters
    ----------
    solvers : iterable of LinearVariationalSolver or NonlinearVariationalSolver
        Those whose work is counted.
    comm : mpi4py.MPI.Comm
        All ranks, over which times are compared; ``spent`` is collective on it.
    members : mpi4py.MPI.Comm
        One rank of each member of an ensemble, whose counts are added up.
    """

    def __init__(
        self, solvers: Iterable, comm: MPI.Comm = MPI.COMM_SELF, members: MPI.Comm = MPI.COMM_SELF
    ):
        for name, one in (("comm", comm), ("members", members)):
            instance(name, one, MPI.Comm, "a communicator of mpi4py's, such as mesh.comm")
        instance("solvers", solvers, Iterable, "a list of solvers of prdp_fem's")
        self._statistics = [_statistics_of(solver) for solver in solvers]
        self.comm, self.members = comm, members
        self._opening = self._sums()
        self._start = time.perf_counter()

    def summed(self, counts: Sequence[int]) -> list[int]:
        """The sums of some counts over the members, as rank 0 has them. Collective."""
        sums = np.array(counts, dtype=np.int64)
        self.members.Allreduce(MPI.IN_PLACE, sums)
        self.comm.Bcast(sums)
        return sums.tolist()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Within, no wall-clock time is counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def _sums(self) -> dict[str, float]:
        return {
            name: sum(getattr(statistics, name) for statistics in self._statistics)
            for name in (*_COUNTS, "seconds")
        }

    def spent(self) -> dict[str, float]:
        """Counts, ``solver_seconds`` and ``seconds`` so far."""
        seconds = time.perf_counter() - self._start
        sums = self._sums()
        counts = np.array([int(sums[name] - self._opening[name]) for name in _COUNTS])
        self.members.Allreduce(MPI.IN_PLACE, counts)
        spent = dict(zip(_COUNTS, counts.tolist()))
        slowest = np.array([sums["seconds"] - self._opening["seconds"], seconds])
        self.comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
        spent["solver_seconds"], spent["seconds"] = slowest.round(4).tolist()
        return spent


def _statistics_of(solver) -> Statistics:
    statistics = getattr(solver, "statistics", None)
    if not isinstance(statistics, Statistics):
        raise TypeError(
            f"solvers must be those of prdp_fem, which count what they do, found {shown(solver)}"
        )
    return statistics
