"""Where a solve is made, and where it is linearised."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Point"]


@dataclass
class Point:
    """The values of all that a solution depends on.

    Attributes
    ----------
    values : sequence of numpy.ndarray
        Rank-local values of the inputs, in their order.
    boundary : numpy.ndarray or None
        Rank-local boundary values, zero elsewhere; None where all are zero on all ranks.
    guess : numpy.ndarray or None
        Where to start from; None for zero.
    """

    values: Sequence[np.ndarray]
    boundary: np.ndarray | None = None
    guess: np.ndarray | None = None

    def at(self, varying: Mapping[int, np.ndarray], row: int) -> Point:
        """This point with one row of the varying inputs put in."""
        if not varying:
            return self
        return Point([varying[index][row] if index in varying else values for index, values in enumerate(self.values)],
                     self.boundary, self.guess)
