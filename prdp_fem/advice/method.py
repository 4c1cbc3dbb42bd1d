"""A method while it is measured: at several settings, each several times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.advice.candidates import Candidate
from prdp_fem.advice.measurement import Measurement, relative_error
from prdp_fem.advice.trips import Trip, Trips
from prdp_fem.krylov.petsc_errors import what_went_wrong

__all__ = ["FAILURES", "Method", "Reference", "Row"]

# What a candidate may fail with.
FAILURES = (ConvergenceError, PETSc.Error, ValueError, TypeError, NotImplementedError)
# The share of what is random in cotangents: as in a training, they are not the solution itself,
# which may be one of few eigenvectors.
_ROUGHNESS = 0.1
# Trips that take no longer are made twice, for one to be without a disturbance.
_SHORT = 0.05


@dataclass
class Row:
    """A setting of a method.

    Attributes
    ----------
    asked : str
        See :class:`Measurement`.
    setting : Setting or None
    trip : Trip
    error, gradient_error : float
    seconds : list of tuple of float
        Of each trip, forward and backward.
    """

    asked: str
    setting: Any
    trip: Trip
    error: float
    gradient_error: float
    seconds: list[tuple[float, float]] = field(default_factory=list)

    def least(self) -> float:
        """Seconds of forward and backward, the least that was seen.

        Nothing is given up for a disturbance.
        """
        return min(map(sum, self.seconds))

    def digits(self) -> float:
        """The right digits of solution and derivative, of the worse of the two."""
        return -math.log10(max(self.error, self.gradient_error, np.finfo(float).tiny))


@dataclass
class Method:
    """A candidate with what is known of it; a context manager that keeps what goes wrong.

    Attributes
    ----------
    candidate : Candidate
    trips : Trips or None
        None before there are some, and once it has failed.
    rows : list of Row
    curve : list of tuple
        Settings of a ladder, from coarse to fine, each with the digits that it gives.
    failure : str
        What is wrong with it, or why it was stopped.
    set_up : float
        Seconds.
    """

    candidate: Candidate
    trips: Trips | None = None
    rows: list[Row] = field(default_factory=list)
    curve: list[tuple[Any, float]] = field(default_factory=list)
    failure: str = ""
    set_up: float = 0.0

    def __enter__(self) -> Method:
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if not isinstance(error, FAILURES):
            return False
        self.fail(error)
        return True

    def fail(self, error: Exception) -> None:
        """Keep what has gone wrong, and go no further."""
        said = what_went_wrong(error) if isinstance(error, PETSc.Error) else str(error)
        self.failure = " ".join(said.split())
        self.trips = None

    def measurements(self) -> Iterator[Measurement]:
        """The rows of the table."""
        candidate = self.candidate
        empty = Measurement(
            candidate.name,
            dict(candidate.parameters),
            factorises=candidate.factorises,
            is_at_hand=candidate.is_at_hand,
        )
        for row in self.rows:
            totals = [*map(sum, row.seconds)]
            middle = median(totals)
            forward, backward = (median(times) for times in zip(*row.seconds))
            yield replace(
                empty,
                asked=row.asked,
                setting=row.setting,
                iterations=row.trip.iterations,
                newton_steps=row.trip.newton_steps,
                seconds=(forward, backward),
                set_up=self.set_up,
                error=row.error,
                gradient_error=row.gradient_error,
                repetitions=len(totals),
                spread=(max(totals) - min(totals)) / middle if middle else 0.0,
            )
        if self.failure:
            yield replace(empty, failure=self.failure)


class Reference:
    """The solutions and derivatives that others are compared with. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    trips : Trips
        Of a method that solves to the end.
    setting : Setting or None

    Attributes
    ----------
    cotangents : numpy.ndarray
        What all trips go backward with.
    trip : Trip

    Raises
    ------
    ZeroDivisionError
        Where the solution is zero, so that nothing is relative to it.
    """

    def __init__(self, comm: MPI.Comm, trips: Trips, setting: Any):
        self._comm = comm
        solutions = trips.go(setting, None).solutions
        size = comm.allreduce(float(np.sum(solutions**2)))
        if not size > 0:
            raise ZeroDivisionError("the solution is zero")
        random = np.random.default_rng(comm.rank).standard_normal(solutions.shape)
        scale = math.sqrt(size / comm.allreduce(random.size))
        self.cotangents = solutions + _ROUGHNESS * scale * random
        self.trip = trips.go(setting, self.cotangents)

    def compare(self, trips: Trips, asked: str, setting: Any) -> Row:
        """Go on a trip, or on two where it is a short one, and compare what it gave."""
        trip = trips.go(setting, self.cotangents)
        seconds = [trip.seconds]
        if sum(trip.seconds) < _SHORT:
            seconds.append(trips.go(setting, self.cotangents).seconds)
        return Row(
            asked,
            setting,
            trip,
            self._error([trip.solutions], [self.trip.solutions]),
            self._error(trip.gradients, self.trip.gradients),
            seconds,
        )

    def _error(self, found: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
        return relative_error(self._comm, found, exact)
