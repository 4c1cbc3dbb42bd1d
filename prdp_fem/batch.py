"""The vectors of a batch in one piece of memory."""
from __future__ import annotations

from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc

__all__ = ["Batch", "BatchStore", "chunks"]

# Rows are worked through in chunks that fit into a processor's cache, so that they stay small whatever the batch.
_CHUNK_SIZE = 2**18
# Batches that are kept: training, validation and the last, smaller batch of each come in turns.
_KEPT = 6


def chunks(rows: int, size: int) -> list[slice]:
    """A batch of rows cut into parts."""
    if 0 < rows*size <= _CHUNK_SIZE:
        return [slice(0, rows)]
    step = max(1, _CHUNK_SIZE//max(size, 1))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class Batch:
    """A batch of vectors: the rows of an array, which PETSc sees as vectors and as the columns of a dense matrix.

    Parameters
    ----------
    rows : int
    like : PETSc.Vec
        Of the layout of each.

    Attributes
    ----------
    array : numpy.ndarray
        Shape (rows, n), rank-local.
    vectors : list of PETSc.Vec
        On the memory of its rows.
    """

    def __init__(self, rows: int, like: PETSc.Vec):
        self.array = np.zeros((rows, like.getLocalSize()))
        self.vectors = [PETSc.Vec().createWithArray(row, size=like.getSizes(), comm=like.comm) for row in self.array]

    @cached_property
    def matrix(self) -> PETSc.Mat:
        """The rows as columns; on one rank only."""
        rows, size = self.array.shape
        matrix = PETSc.Mat().createDense((size, rows), array=self.array.reshape(-1), comm=self.vectors[0].comm)
        matrix.assemble()
        return matrix

    def fill(self, values: np.ndarray) -> None:
        """Copy values into the array."""
        self.array[...] = values
        self.changed()

    def changed(self) -> None:
        """To be called where the array was written to, and not through its vectors: they keep norms of their values."""
        for vector in self.vectors:
            vector.stateIncrease()


class BatchStore:
    """Batches of one layout, kept by their number of rows.

    Parameters
    ----------
    like : PETSc.Vec
    """

    def __init__(self, like: PETSc.Vec):
        self._like = like
        self._batches: dict[int, Batch] = {}

    def __call__(self, rows: int) -> Batch:
        """The batch of so many rows; its values are those of its last use."""
        batch = self._batches.get(rows)
        if batch is None:
            if len(self._batches) >= _KEPT:
                del self._batches[next(iter(self._batches))]
            batch = self._batches[rows] = Batch(rows, self._like)
        return batch
