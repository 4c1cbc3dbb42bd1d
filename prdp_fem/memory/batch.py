"""The vectors of a batch in one piece of memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from firedrake.petsc import PETSc

__all__ = ["Batch", "Batches", "Entries"]

# Batches that are kept: training, validation and the last, smaller batch of each come in turns.
_KEPT = 6
# Bytes that rows start at multiples of. BLAS kernels differ in what they load at once, and some add
# up in another order where an array starts at other than such a multiple: a row's results would
# depend on its place in the batch.
_ALIGNMENT = 64


def _aligned(rows: int, size: int) -> np.ndarray:
    """Zeros of shape (rows, size) whose rows start at multiples of :data:`_ALIGNMENT` bytes."""
    itemsize = np.dtype(PETSc.ScalarType).itemsize
    line = _ALIGNMENT // itemsize
    stride = -(-size // line) * line
    room = np.zeros(rows * stride + line)
    start = -room.ctypes.data % _ALIGNMENT // itemsize
    return room[start : start + rows * stride].reshape(rows, stride)[:, :size]


@dataclass(frozen=True)
class Entries:
    """Some entries of vectors of a layout.

    Attributes
    ----------
    dofs : numpy.ndarray
        Their rank-local indices.
    others : numpy.ndarray or PETSc.Vec
        Zero there, and one elsewhere; a vector on a device, an array on the host.
    """

    dofs: np.ndarray
    others: np.ndarray | PETSc.Vec


class Batch:
    """A batch of vectors: rows of an array, to PETSc vectors, and columns of a dense matrix.

    Parameters
    ----------
    rows : int
    like : PETSc.Vec
        Of the layout of each.

    Attributes
    ----------
    array : numpy.ndarray
        Shape (rows, n), rank-local; each row is aligned as a vector of PETSc's own is.
    vectors : list of PETSc.Vec
        On the memory of its rows.
    """

    def __init__(self, rows: int, like: PETSc.Vec):
        self.array = _aligned(rows, like.getLocalSize())
        self.vectors = [
            PETSc.Vec().createWithArray(row, size=like.getSizes(), comm=like.comm)
            for row in self.array
        ]

    @cached_property
    def matrix(self) -> PETSc.Mat:
        """The rows as columns; on one rank only."""
        rows, size = self.array.shape
        stride = self.array.strides[0] // self.array.itemsize
        whole = np.lib.stride_tricks.as_strided(self.array, (rows, stride))
        matrix = PETSc.Mat().createDense(
            (size, rows), array=whole.reshape(-1)[: size * rows], comm=self.vectors[0].comm
        )
        matrix.setDenseLDA(stride)
        matrix.assemble()
        return matrix

    def fill(self, values: np.ndarray) -> None:
        """Copy values in, of shape (n,) for all rows or (rows, n)."""
        self.array[...] = values
        self.changed()

    def fill_inside(self, values: np.ndarray, entries: Entries) -> None:
        """Copy values in, and zero, whatever the values there are, for some entries of each row."""
        self.array[...] = values
        self.array[:, entries.dofs] = 0.0
        self.changed()

    def fill_times_zero(self, values: np.ndarray, entries: Entries) -> None:
        """Copy values in, times zero for some entries: what is not finite there is NaN then."""
        np.multiply(values, entries.others, out=self.array)
        self.changed()

    def read(self, out: np.ndarray) -> None:
        """Copy the values to rows, of shape (rows, n)."""
        out[...] = self.array

    def values(self, row: int) -> np.ndarray:
        """The rank-local values of a row, not to be written to."""
        return self.array[row]

    def changed(self) -> None:
        """To be called where the array was written to, and not through its vectors: they keep norms
        of their values.

        The methods that do arithmetic leave this to their caller.
        """
        for vector in self.vectors:
            vector.stateIncrease()

    def set_to_zero(self) -> None:
        """Set all rows to zero."""
        self.array[...] = 0.0

    def assign(self, other: Batch) -> None:
        """Copy the rows of a batch, or the only one of it to each."""
        self.array[...] = other.array

    def add(self, other: Batch) -> None:
        """Add the rows of a batch, or the only one of it to each."""
        self.array += other.array

    def scale(self, factor: float) -> None:
        """Multiply all rows by a number."""
        self.array *= factor

    def zero(self, entries: Entries) -> None:
        """Set some entries of each row to zero. Values are finite."""
        self.array[:, entries.dofs] = 0.0

    def multiply(self, matrix: PETSc.Mat, out: Batch) -> None:
        """Set the rows of another batch to the products of a matrix with these."""
        if len(self.vectors) > 1 and matrix.comm.size == 1:
            matrix.matMult(self.matrix, out.matrix)
        else:
            for one, product in zip(self.vectors, out.vectors):
                matrix.mult(one, product)


class Batches(dict[int, Any]):
    """Batches of one layout by their number of rows, with the values of their last use.

    One that is not there is made.

    Parameters
    ----------
    make : callable
        Of a number of rows, which makes a batch.
    """

    def __init__(self, make: Callable[[int], Any]):
        super().__init__()
        self._make = make

    def __missing__(self, rows: int):
        if len(self) >= _KEPT:
            del self[next(iter(self))]
        batch = self[rows] = self._make(rows)
        return batch
