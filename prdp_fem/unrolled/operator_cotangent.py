"""The cotangent of a sparse matrix, on the matrix's own nonzero pattern."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc

__all__ = ["OperatorCotangent", "SparsityPattern", "is_assembled", "local_values"]


def is_assembled(matrix: PETSc.Mat) -> bool:
    """Whether the host has the entries of a matrix row by row, as for a device matrix."""
    return matrix.getType().startswith(("seqaij", "mpiaij"))


def local_values(matrix: PETSc.Mat) -> np.ndarray:
    """The entries of this rank's rows, shape (entries,): row by row, in a row by global column."""
    return matrix.getValuesCSR()[2]


class SparsityPattern:
    """Where the entries of the rows of this rank are.

    Parameters
    ----------
    matrix : PETSc.Mat
        Of type seqaij or mpiaij; its pattern does not change.

    Attributes
    ----------
    indptr : numpy.ndarray
        Shape (rows + 1,).
    rows : numpy.ndarray
        Shape (entries,), counted from the first row of this rank.
    columns : numpy.ndarray
        Shape (entries,), global.

    Raises
    ------
    ValueError
        For a matrix of another type.
    """

    def __init__(self, matrix: PETSc.Mat):
        if not is_assembled(matrix):
            raise ValueError(
                f"the derivative with respect to an operator of type {matrix.getType()} has no "
                "nonzero pattern to be kept on: assemble it as aij (mat_type)"
            )
        self.indptr, columns, _ = matrix.getValuesCSR()
        self.columns = columns.astype(np.intp)
        self.rows = np.repeat(np.arange(len(self.indptr) - 1), np.diff(self.indptr))
        self._matrix = matrix
        self.first_column, self.last_column = matrix.getOwnershipRangeColumn()

    @cached_property
    def owned_columns(self) -> np.ndarray:
        """Which entries are in columns of this rank, shape (entries,), bool."""
        return (self.columns >= self.first_column) & (self.columns < self.last_column)

    @cached_property
    def _ghosts(self) -> tuple[PETSc.Scatter, PETSc.Vec, np.ndarray, np.ndarray]:
        """The scatter to the columns of other ranks, and what it takes.

        That is what it fills, where the columns are in owned and ghost values, and these.
        """
        ghosts = np.unique(self.columns[~self.owned_columns])
        size = self.last_column - self.first_column
        positions = np.where(
            self.owned_columns,
            self.columns - self.first_column,
            size + np.searchsorted(ghosts, self.columns),
        )
        values = PETSc.Vec().createSeq(len(ghosts), comm=PETSc.COMM_SELF)
        of_columns = self._matrix.createVecRight()
        source = PETSc.IS().createGeneral(ghosts.astype(PETSc.IntType), comm=PETSc.COMM_SELF)
        scatter = PETSc.Scatter().create(of_columns, source, values, None)
        return scatter, values, positions, np.empty(size + len(ghosts))

    def at_columns(self, vector: PETSc.Vec, out: np.ndarray) -> np.ndarray:
        """The values of a vector at the column of each entry; collective."""
        if vector.comm.size == 1:
            return np.take(vector.array_r, self.columns, out=out, mode="clip")
        scatter, ghosts, positions, values = self._ghosts
        scatter.scatter(
            vector, ghosts, addv=PETSc.InsertMode.INSERT_VALUES, mode=PETSc.ScatterMode.FORWARD
        )
        size = vector.getLocalSize()
        values[:size] = vector.array_r
        values[size:] = ghosts.array_r
        return np.take(values, positions, out=out, mode="clip")

    def at_rows(self, values: np.ndarray, out: np.ndarray) -> np.ndarray:
        """Values for the rows of this rank, shape (rows,), at the row of each entry."""
        return np.take(values, self.rows, out=out, mode="clip")


class OperatorCotangent:
    """The derivative of a number with respect to each entry of a sparse matrix.

    Contributions are added to it, so that one may collect those of several solves; :meth:`zero`
    starts again.

    Parameters
    ----------
    matrix : PETSc.Mat
        Of type seqaij or mpiaij; only its pattern is used.

    Attributes
    ----------
    values : numpy.ndarray
        Shape (entries of the rows of this rank,), in the order of ``matrix.getValuesCSR()``.
    pattern : SparsityPattern
    """

    def __init__(self, matrix: PETSc.Mat):
        self.pattern = SparsityPattern(matrix)
        self.values = np.zeros(len(self.pattern.columns))
        self._left, self._right = np.empty_like(self.values), np.empty_like(self.values)

    def zero(self) -> None:
        """Forget all contributions."""
        self.values[:] = 0

    def add_product(self, left: PETSc.Vec, right: PETSc.Vec, weight: float = 1.0) -> None:
        """Add weight · left rightᵀ, where the pattern has entries; collective."""
        products = self.pattern.at_rows(weight * left.array_r, self._left)
        products *= self.pattern.at_columns(right, self._right)
        self.values += products

    def add_to_entries(self, entries: np.ndarray, values: np.ndarray) -> None:
        """Add to some of the entries.

        Parameters
        ----------
        entries : numpy.ndarray
            Shape (m,): which, counted as ``values`` is, each once.
        values : numpy.ndarray
            Shape (m,).
        """
        self.values[entries] += values
