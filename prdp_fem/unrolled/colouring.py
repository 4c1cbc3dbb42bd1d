"""Colours for the columns of a sparse matrix: those of one colour have no row in common.

It is the idea of Curtis, Powell and Reid (1974).
"""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.unrolled.operator_cotangent import SparsityPattern

__all__ = ["colour_columns"]

_UNCOLOURED = -1
# Weights are a scrambled number above the column's own, both of so many bits that the whole is
# exact in float64.
_BITS = 26
_SCRAMBLE = 2654435761  # Knuth's multiplier


def colour_columns(matrix: PETSc.Mat, wanted: np.ndarray) -> np.ndarray:
    """Colour columns by Jones and Plassmann's method (1993).

    Whoever outweighs all neighbours takes the first colour that they leave.

    Parameters
    ----------
    matrix : PETSc.Mat
        Of type seqaij or mpiaij.
    wanted : numpy.ndarray
        Shape (columns of this rank,), bool: those that are coloured.

    Returns
    -------
    numpy.ndarray
        Shape (columns of this rank,): colours from 0 on, and -1 for columns that are not wanted.
    """
    pattern = SparsityPattern(_neighbours(matrix))
    first, last = pattern.first_column, pattern.last_column
    own = np.arange(first, last)
    rows = pattern.rows
    others = pattern.columns != own[rows]
    vector = matrix.createVecRight()
    at_columns = np.empty(len(rows))

    def of_neighbours(values: np.ndarray) -> np.ndarray:
        vector.setArray(values)
        return pattern.at_columns(vector, at_columns)

    weights = (own * _SCRAMBLE % 2**_BITS) * 2.0**_BITS + own % 2**_BITS + 1
    weights[~wanted] = 0.0
    colours = np.full(last - first, _UNCOLOURED)
    comm = matrix.comm.tompi4py()
    while comm.allreduce(bool((weights > 0).any()), MPI.LOR):
        heaviest = np.zeros(last - first)
        np.maximum.at(heaviest, rows[others], of_neighbours(weights)[others])
        winners = np.flatnonzero(weights > heaviest)
        place = np.full(last - first, -1)
        place[winners] = np.arange(len(winners))
        taken_colours = of_neighbours(colours.astype(float)).astype(int)
        relevant = (place[rows] >= 0) & (taken_colours >= 0)
        taken = np.zeros((len(winners), taken_colours.max(initial=0) + 2), dtype=bool)
        taken[place[rows[relevant]], taken_colours[relevant]] = True
        colours[winners] = np.argmin(taken, axis=1)
        weights[winners] = 0.0
    return colours


def _neighbours(matrix: PETSc.Mat) -> PETSc.Mat:
    """A matrix with an entry for each pair of columns that have a row in common."""
    ones = matrix.duplicate(copy=True)
    indptr, columns, values = ones.getValuesCSR()
    ones.setValuesCSR(indptr, columns, np.ones_like(values))
    ones.assemble()
    return ones.transposeMatMult(ones)
