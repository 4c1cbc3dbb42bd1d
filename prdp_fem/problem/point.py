"""Where a solve is made and linearised, and in which direction it is differentiated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["NO_VALUES", "Direction", "Point"]

# In place of values that nobody will read.
NO_VALUES = np.empty(0)


@dataclass
class Point:
    """The values of all that a solution depends on.

    Attributes
    ----------
    values : list of numpy.ndarray
        Rank-local values of the inputs, in their order.
    boundary : numpy.ndarray or None
        Rank-local boundary values, zero elsewhere, shape (n,) or, where they differ from row to row
        of a batch, (batch, n); None where all are zero on all ranks.
    guess : numpy.ndarray or None
        Where to start from, of such a shape; None for zero.
    """

    values: list[np.ndarray]
    boundary: np.ndarray | None = None
    guess: np.ndarray | None = None

    def at(self, varying: Mapping[int, np.ndarray], row: int) -> Point:
        """This point with one row of all that varies put in."""
        values = self.values
        if varying:
            values = [
                varying[index][row] if index in varying else same
                for index, same in enumerate(values)
            ]
        return Point(values, _row(self.boundary, row), _row(self.guess, row))

    def on(self, memory) -> Point:
        """This point with all values on the host, of those that may be in a memory."""
        return Point([memory.on_host(values) for values in self.values], self.boundary, self.guess)


def _row(values: np.ndarray | None, row: int) -> np.ndarray | None:
    return values[row] if values is not None and values.ndim == 2 else values


@dataclass
class Direction:
    """A direction of the values of all that a solution depends on.

    Attributes
    ----------
    inputs : Mapping of int to numpy.ndarray
        Rank-local directions of inputs; others stay as they are.
    meshes : Mapping of MeshGeometry to Function
        Directions of mesh coordinates.
    boundary : numpy.ndarray or None
        Rank-local direction of the boundary values, zero elsewhere.
    guess : numpy.ndarray or None
        Rank-local direction of the guess.
    """

    inputs: Mapping[int, np.ndarray]
    meshes: Mapping = field(default_factory=dict)
    boundary: np.ndarray | None = None
    guess: np.ndarray | None = None
