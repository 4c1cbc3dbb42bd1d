"""Boundary values and functionals of batches of samples, and their gradients, row by row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from mpi4py import MPI

from prdp_fem.bridge.samples import Given
from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.functional import Functional
from prdp_fem.ranks.finite import require_finite

__all__ = [
    "boundary_gradients",
    "boundary_values",
    "functional_gradients",
    "functional_values",
]


def boundary_values(data: BoundaryData, given: Given, others: Sequence[np.ndarray]) -> np.ndarray:
    """Boundary values, shape (rows, n), rank-local and zero elsewhere.

    Parameters
    ----------
    data : BoundaryData
    given : Given
        Its inputs, in their order, with a row for each sample.
    others : sequence of numpy.ndarray
        What else values are made of, see :meth:`BoundaryData.others`.
    """
    return np.array([data.values(row, others) for row in _each_row(data.inputs, given)])


def boundary_gradients(
    data: BoundaryData,
    given: Given,
    others: Sequence[np.ndarray],
    cotangents: np.ndarray,
    wanted: Sequence[bool],
) -> list[np.ndarray | None]:
    """From the derivatives by boundary values, shape (rows, n), those by inputs that are wanted.

    Raises
    ------
    firedrake.exceptions.ConvergenceError
        On all ranks, where one is not finite, or larger than the largest number; with the index of
        the sample.
    """
    samples = list(_each_row(data.inputs, given))
    gradients: list[np.ndarray | None] = []
    for place, is_wanted, rows in zip(data.inputs, wanted, given.values):
        gradient = None
        if is_wanted:
            by_rows = [
                data.gradient(place, values, others, cotangents[row])
                for row, values in enumerate(samples)
            ]
            gradient = np.array(by_rows).reshape(-1, rows.shape[-1])
        gradients.append(gradient)
    _require_finite_gradients(data.comm, gradients, "the boundary values", given)
    return gradients


def functional_values(
    functional: Functional,
    places: Sequence[int],
    given: Given,
    others: Mapping[int, np.ndarray],
) -> np.ndarray:
    """The numbers that a functional gives, one a row.

    Parameters
    ----------
    functional : Functional
    places : sequence of int
        Those of the inputs that are given.
    given : Given
        The solution, and then these inputs, with a row for each sample.
    others : Mapping of int to numpy.ndarray
        The inputs that all samples have alike, by their places.

    Raises
    ------
    firedrake.exceptions.ConvergenceError
        Where one is not finite, or larger than the largest number; with the index of the sample.
    """
    solutions = given.values[0]
    samples = zip(solutions, _each_row(places, given, first=1))
    values = [functional.value(solution, {**others, **row}) for solution, row in samples]
    numbers = np.array(values, dtype=float)
    # They are the same on all ranks.
    require_finite(
        MPI.COMM_SELF,
        [numbers[:, None]],
        lambda _: (
            f"{functional.name} gave NaN or infinity: look for what has no finite value there, "
            "such as the logarithm of a negative number or 0/0"
        ),
        largest=given.largest,
        batch=given.batch,
    )
    return numbers


def functional_gradients(
    functional: Functional,
    places: Sequence[int],
    given: Given,
    others: Mapping[int, np.ndarray],
    weights: np.ndarray,
    wanted: Sequence[bool],
) -> list[np.ndarray | None]:
    """From the derivatives by a functional, shape (rows, 1), those by what is given and wanted.

    Raises
    ------
    firedrake.exceptions.ConvergenceError
        On all ranks, as :func:`boundary_gradients`; for derivatives by the functional, too.
    """
    require_finite(
        functional.comm,
        [weights],
        lambda _: (
            f"the cotangent of {functional.name} is NaN or infinite: look, in what is computed"
            " of it, for an operation whose derivative is not finite"
        ),
        batch=given.batch,
    )
    gradients = [
        np.empty((len(weights), rows.shape[-1])) if is_wanted else None
        for rows, is_wanted in zip(given.values, wanted)
    ]
    by = [place for place, is_wanted in zip([None, *places], wanted) if is_wanted]
    written = [gradient for gradient in gradients if gradient is not None]
    solutions = given.values[0]
    for row, values in enumerate(_each_row(places, given, first=1)):
        found = functional.gradients(solutions[row], {**others, **values}, by)
        for gradient, one in zip(written, found):
            gradient[row] = weights[row] * one
    _require_finite_gradients(functional.comm, gradients, functional.name, given)
    return gradients


def _each_row(places: Iterable[int], given: Given, first: int = 0) -> Iterator[dict]:
    """What is given from a place on, row by row, by other places."""
    for row in range(len(given.values[0])):
        yield {place: rows[row] for place, rows in zip(places, given.values[first:])}


def _require_finite_gradients(
    comm: MPI.Comm, gradients: Iterable[np.ndarray | None], what: str, given: Given
) -> None:
    require_finite(
        comm,
        [gradient for gradient in gradients if gradient is not None],
        lambda _: (
            f"the derivative of {what} holds NaN or infinity: look for one that does not exist "
            "there, such as that of a square root at zero, or for numbers that are too large"
        ),
        largest=given.largest,
        batch=given.batch,
    )
