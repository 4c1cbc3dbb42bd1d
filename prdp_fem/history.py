"""The record of a training run: what outer iterations achieved, and what all have cost so far."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from mpi4py import MPI

from prdp_fem.arguments import instance, shown
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.refinement.rules import Refinement, checked_metric
from prdp_fem.statistics import Statistics

__all__ = ["ASSESSED", "Account", "History", "assessed_at"]

# What is assessed at checkpoints, beside what the refinement is told.
ASSESSED = ("in_use", "converged")
_CHECKPOINTS = 30  # at most; there are more than half as many, where there are so many epochs
_COUNTS = ("solves", "adjoint_solves", "forward_iterations", "adjoint_iterations")


def _is_amount(value, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and 0 <= value < 2**63


def assessed_at(epoch: int, epochs: int, every: int | None = None) -> bool:
    """Whether errors are assessed after an epoch: after every so many, and after the last.

    Parameters
    ----------
    epoch : int
        Counted from 1.
    epochs : int
        How many there are.
    every : int or None
        None for 15 to 30 times in all, where there are so many epochs.
    """
    every = every or -(-epochs // _CHECKPOINTS)
    return epoch % every == 0 or epoch == epochs


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
    in_use, converged : list of [int, float]
        Pairs of an epoch, counted from 1, and an error that was assessed after it: of what is used
        in the end, and with converged physics. Where nobody has assessed the latter, these are
        metrics that the guard of a training has found with converged physics. Neither the counts
        nor the seconds above have what it takes.
    warnings : list of str
        What was said of the run, as by the guard.
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
    in_use: list[list] = field(default_factory=list)
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
        entries = _with_later(entries)
        lists = sorted({field.name for field in fields(cls)} - {"settings", *_LATER})
        if not isinstance(entries, dict) or sorted(entries) != sorted(
            [*lists, "settings", *_LATER]
        ):
            raise ValueError(f"a history has {', '.join(lists)} and settings")
        _check_lists(entries, lists)
        for name in ASSESSED:
            if not _are_assessed(entries[name], len(entries["metric"])):
                raise ValueError(f"{name} must be pairs of an epoch, which rises, and an error")
        if not _are_texts(entries["warnings"]):
            raise ValueError("warnings must be a list of texts")
        if not _is_amount(entries["guard_iterations"], (int,)):
            raise ValueError("guard_iterations must be a whole number of at least 0")
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

    def assess(self, assess: Mapping[str, Callable[[], float]], account: Account) -> None:
        """Note errors after the last outer iteration that was recorded; on all ranks.

        Parameters
        ----------
        assess : mapping of str to callable
            Of ``"in_use"`` and ``"converged"``, or one of them, to what returns the error; that of
            rank 0 counts.
        account : Account
            Which leaves aside what this takes.
        """
        with account.paused():
            for name, error in assess.items():
                found = account.agreed(error())
                getattr(self, name).append([len(self), found])


# What histories have had since files were first written.
_LATER = (*ASSESSED, "warnings", "guard_iterations")


def _with_later(entries):
    if not isinstance(entries, dict):
        return entries
    later: dict[str, Any] = {name: 0 if name == "guard_iterations" else [] for name in _LATER}
    return {**later, **entries}


def _check_lists(entries: dict[str, Any], lists: list[str]) -> None:
    """Raise where what there is of each outer iteration is not so many numbers of their kinds."""
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


def _are_assessed(pairs, epochs: int) -> bool:
    """Whether these are pairs of an epoch, of so many, and an error."""
    if type(pairs) is not list or not all(type(pair) is list and len(pair) == 2 for pair in pairs):
        return False
    last = 0
    for epoch, error in pairs:
        if not (_is_amount(epoch, (int,)) and last < epoch <= epochs):
            return False
        if not _is_amount(error, (int, float)):
            return False
        last = epoch
    return True


def _are_texts(texts) -> bool:
    return type(texts) is list and all(type(text) is str for text in texts)


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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave aside what is done meanwhile, and the time that it takes."""
        before, start = self._sums(), time.perf_counter()
        try:
            yield
        finally:
            for name, amount in self._sums().items():
                self._opening[name] += amount - before[name]
            self._start += time.perf_counter() - start

    def agreed(self, error: float) -> float:
        """An error as rank 0 has found it, a finite number of at least 0; collective."""
        return from_first_rank(self.comm, lambda: checked_metric(error))

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
