"""Batches of samples solved, and differentiated: rows in, solutions out; cotangents in, gradients
out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from firedrake.exceptions import ConvergenceError

from prdp_fem.memory.memory import Memory
from prdp_fem.problem.point import NO_VALUES, Point
from prdp_fem.problem.wanted import Wanted
from prdp_fem.ranks.finite import LARGEST, name_sample
from prdp_fem.refinement.settings import Setting
from prdp_fem.solvers import RefinedSolver

__all__ = ["Given", "Samples", "Saved", "Solved"]

# Where, in what is given, the guess is.
_GUESS = 1


@dataclass
class Given:
    """What samples are given by.

    Attributes
    ----------
    batch : sequence of int
        The batch axes, of which a sample is one index; none for a single sample.
    values : sequence of numpy.ndarray or None
        The boundary values, the guess, and then the inputs: shape (size,) where all samples have
        the same, or (rows, size) with the samples in order. None for boundary values and a guess
        that are the problem's. Inputs of :attr:`Needs.device_inputs` may be tensors on the device
        of the solver.
    largest : float
        The largest number of the types that the caller converts to.
    empty : callable
        Of a shape: makes room where the caller has what may be on the device of the solver.
    """

    batch: Sequence[int]
    values: Sequence
    largest: float = LARGEST
    empty: Callable[[tuple], Any] = np.empty


class Saved(NamedTuple):
    """What a derivative looks at, of what the caller has not given: to be saved as it likes.

    Attributes
    ----------
    coefficients : list of numpy.ndarray
        What was not given, as it was; not to be written to. Calls share those that are equal.
    solutions : numpy.ndarray or None
        Rows, or a tensor on the device of the solver; None where :attr:`Needs.solutions` says so.
    fields : list of numpy.ndarray
        Of the iterations of solves.
    """

    coefficients: list[np.ndarray]
    solutions: Any
    fields: list[np.ndarray]


@dataclass
class Solved:
    """A solve of samples, but for what is of the size of a field.

    Attributes
    ----------
    setting : Setting or None
    memory : Memory
        Where it was made.
    mesh_stamp : int
        Of the meshes as they were.
    has_boundary, has_guess : bool
        Whether boundary values and the guess of the problem are among the coefficients.
    records : list
        Those of the rows, without fields.
    field_counts : list of int or None
        How many of the fields belong to each; None for none.
    """

    setting: Setting | None
    memory: Memory
    mesh_stamp: int
    has_boundary: bool
    has_guess: bool
    records: list
    field_counts: list[int] | None


class Samples:
    """Solves of samples of some inputs of a solver, and of its boundary values and guess.

    Parameters
    ----------
    solver : RefinedSolver
    indices : sequence of int
        The inputs that samples are given by, and differentiated by.
    gives_boundary : bool
        Whether boundary values are given, too, as rows.

    Attributes
    ----------
    solver, indices
        As given.
    statistics : Statistics
        Of the solver.
    needs : Needs
        What derivatives look at.
    """

    def __init__(self, solver: RefinedSolver, indices: Sequence[int], *, gives_boundary: bool):
        self.solver, self.indices = solver, indices
        self._system, self._copies = solver.system, solver.system.linearisation.copies
        self.statistics = self._system.statistics
        self._reads_boundary = not gives_boundary
        self._sizes = [entry.size for entry in self._system.inputs]
        self.needs = self._system.derivative.needs(indices, by_forms=gives_boundary)
        # The inputs that are not given, and that derivatives look at.
        self._others = [
            index
            for index in range(len(self._sizes))
            if index not in indices and index not in self.needs.unread
        ]

    def solve(self, given: Given, setting: Setting | None) -> tuple[Any, Solved, Saved]:
        """Solve for each sample, the same bits for each, whatever stands beside it.

        Parameters
        ----------
        given : Given
        setting : Setting or None
            How far the KSP goes; None for what its options say.

        Returns
        -------
        solutions : numpy.ndarray
            Rank-local dofs, shape (rows, n); what :attr:`Given.empty` has made where
            :attr:`Needs.device_rows`.
        solved : Solved
        saved : Saved
            With the solutions, which the caller may have to copy.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where a solve fails; with the index of the sample.
        """
        system, needs = self._system, self.needs
        point = self.solver.point(self.indices, has_boundary=self._reads_boundary)
        coefficients = [point.values[index] for index in self._others]
        boundary, guess = point.boundary, None
        if boundary is not None:
            coefficients.append(boundary)
        if needs.guess and given.values[_GUESS] is None and point.guess is not None:
            guess = point.guess
            coefficients.append(guess)
        varying = self._put(point, given)
        room = given.empty if needs.device_rows else np.empty
        solutions = room((math.prod(given.batch), system.size))
        try:
            records = system.solve(point, setting, solutions, varying, largest=given.largest)
        except ConvergenceError as error:
            name_sample(error, given.batch)
            raise
        fields: list[np.ndarray] = []
        counts = None
        if needs.fields:
            counts = [len(record.fields) for record in records]
            fields = [field for record in records for field in record.fields]
            records = [record.with_fields([]) for record in records]
        solved = Solved(
            setting,
            system.place.memory,
            self._copies.mesh_stamp,
            boundary is not None,
            guess is not None,
            records,
            counts,
        )
        return solutions, solved, Saved(coefficients, solutions, fields)

    def pull_back(
        self,
        solved: Solved,
        given: Given,
        saved: Saved,
        cotangents,
        wanted: Sequence[bool],
    ) -> list:
        """Turn the cotangents of solutions into gradients, sample by sample.

        Parameters
        ----------
        solved, given, saved
            As of :meth:`solve`; where :attr:`Needs.unread` has some, no values are looked at.
        cotangents : numpy.ndarray
            Shape (rows, n): rank-local derivatives by the solutions; a tensor where
            :attr:`Needs.device_rows`.
        wanted : sequence of bool
            Whether there is to be a gradient by boundary values, the guess, and each of the inputs.

        Returns
        -------
        list
            The gradients that are wanted, shape (rows, size), and None for the others. What
            :attr:`Given.empty` has made for inputs of :attr:`Needs.device_inputs`.

        Raises
        ------
        RuntimeError
            Where solver or mesh have moved since.
        firedrake.exceptions.ConvergenceError
            Where a solve fails, or gives what is not finite; with the index of the sample.
        """
        self._require_same_place(solved)
        point = self._as_it_was(solved, saved)
        varying = {} if self.needs.unread else self._put(point, given)
        asked, gradients = self._room(given, len(cotangents), wanted)
        try:
            self._system.solve_adjoint(
                point,
                solved.setting,
                cotangents,
                saved.solutions,
                _records(solved, saved.fields),
                asked,
                varying=varying,
            )
        except ConvergenceError as error:
            name_sample(error, given.batch)
            raise
        return gradients

    def _room(self, given: Given, rows: int, wanted: Sequence[bool]) -> tuple[Wanted, list]:
        """Room for the gradients that are wanted, for the solver and for the caller."""
        by_boundary, by_guess, *by_inputs = wanted
        shape = rows, self._system.size
        written: dict[int, Any] = {}
        asked = Wanted(
            written,
            np.empty(shape) if by_boundary else None,
            np.empty(shape) if by_guess else None,
            largest=given.largest,
        )
        gradients = [asked.boundary, asked.guess]
        for index, is_wanted in zip(self.indices, by_inputs):
            gradient = None
            if is_wanted:
                room = given.empty if index in self.needs.device_inputs else np.empty
                gradient = written[index] = room((rows, self._sizes[index]))
            gradients.append(gradient)
        return asked, gradients

    def _as_it_was(self, solved: Solved, saved: Saved) -> Point:
        """The point of a solve, without what was given."""
        point = Point([NO_VALUES] * len(self._sizes))
        rest = iter(saved.coefficients)
        for index in self._others:
            point.values[index] = next(rest)
        if solved.has_boundary:
            point.boundary = next(rest)
        if solved.has_guess:
            point.guess = next(rest)
        return point

    def _put(self, point: Point, given: Given) -> dict:
        """Put what is given into a point, but for inputs that vary, which are returned."""
        boundary, guess, *inputs = given.values
        if boundary is not None:
            point.boundary = boundary
        if guess is not None:
            point.guess = guess
        varying = {}
        for index, values in zip(self.indices, inputs):
            if values.ndim > 1:
                varying[index] = values
            else:
                point.values[index] = values
        return varying

    def _require_same_place(self, solved: Solved) -> None:
        """Raise where operators of the solve would be others now. Collective."""
        if solved.memory is not self._system.place.memory:
            raise RuntimeError(
                "the solver has moved to another device between the forward and the backward pass:"
                " call backward before moving it"
            )
        if solved.mesh_stamp != self._copies.look_at_meshes():
            raise RuntimeError(
                "a mesh of the problem has moved between the forward and the backward pass: call"
                " backward before moving it"
            )


def _records(solved: Solved, fields: Sequence[np.ndarray]) -> list:
    """The records of rows, with their fields."""
    if solved.field_counts is None:
        return solved.records
    rest = iter(fields)
    return [
        record.with_fields([next(rest) for _ in range(count)])
        for record, count in zip(solved.records, solved.field_counts)
    ]
