"""Numbers that are not finite: found at little cost, and told with the sample that has them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
from firedrake.exceptions import ConvergenceError
from mpi4py import MPI

__all__ = ["LARGEST", "is_finite", "name_sample", "require_finite"]

# The largest number that PETSc has.
LARGEST = sys.float_info.max
# What ranks reduce: the place of an array, and a row of it, in one number; the least is the first.
_ROWS = 2**40
_NONE = 2**62


def is_finite(values, largest: float = LARGEST) -> bool:
    """Whether all numbers of an array, or of a tensor on a device, are finite.

    Parameters
    ----------
    values : numpy.ndarray or tensor
    largest : float
        The largest number of the type that they will be converted to.
    """
    if not isinstance(values, np.ndarray):
        return bool((values.abs() <= largest).all())
    # One pass, and no array of truths: the sum of squares is NaN or infinite where a number is. It
    # may be so, or be too large, where none is: only then one has to look closer. (Other products
    # of NumPy's warn of that.)
    return bool(np.vdot(values, values) <= largest or (np.abs(values) <= largest).all())


def require_finite(
    comm: MPI.Comm,
    arrays: Sequence,
    describe: Callable[[int], str],
    *,
    largest: float = LARGEST,
    batch: Sequence[int] | None = None,
) -> None:
    """Raise, on all ranks, where a number is not finite on one.

    Collective; one small reduction.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    arrays : sequence of numpy.ndarray, or of tensors on a device
        Rank-local, each of shape (rows, n), with one row a sample.
    describe : callable
        Of the place of an array: what is wrong with that, for the message.
    largest : float
        As in :func:`is_finite`.
    batch : sequence of int or None
        The batch axes. Without them the error has the row as its attribute ``row``, for
        :func:`name_sample`.

    Raises
    ------
    firedrake.exceptions.ConvergenceError
    """
    found = _NONE
    for place, rows in enumerate(arrays):
        if not is_finite(rows, largest):
            found = place * _ROWS + _first_row(rows, largest)
            break
    if comm.size > 1:
        least = np.array([found])
        comm.Allreduce(MPI.IN_PLACE, least, MPI.MIN)
        found = int(least[0])
    if found != _NONE:
        place, row = divmod(found, _ROWS)
        reminder = "" if largest == LARGEST else f" (of numbers above {largest:.1e}, too)"
        error = ConvergenceError(describe(place) + reminder)
        error.row = row
        if batch is not None:
            name_sample(error, batch)
        try:
            raise error
        finally:
            # Its traceback would hold this frame, in which it is, until Python looks for cycles,
            # and so all that callers have.
            del error


def _first_row(rows, largest: float) -> int:
    if not isinstance(rows, np.ndarray):
        rows = rows.cpu().numpy()
    return int(np.argmin((np.abs(rows) <= largest).all(axis=-1)))


def name_sample(error: ConvergenceError, batch: Sequence[int]) -> None:
    """Have an error that knows the row of a batch it is about say which sample that is.

    Parameters
    ----------
    error : firedrake.exceptions.ConvergenceError
        With the row as its attribute ``row``; without one it stays as it is.
    batch : sequence of int
        The batch axes; none for a single sample, which needs no name.
    """
    row = vars(error).pop("row", None)
    if row is not None and len(batch):
        index = tuple(map(int, np.unravel_index(row, batch)))
        error.args = (f"sample {index if len(index) > 1 else index[0]}: {error}",)
