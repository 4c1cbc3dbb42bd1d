"""The rows of a batch, cut into stretches that are worked through together."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping

import numpy as np

from prdp_fem.memory.batch import chunks
from prdp_fem.problem.point import Point

__all__ = ["stretches"]


def stretches(
    point: Point, varying: Mapping[int, np.ndarray], count: int, size: int, moves: bool
) -> Iterator[tuple[slice, Point | None]]:
    """The stretches of a batch, the same on all ranks; one row each where something moves.

    Parameters
    ----------
    point : Point
    varying : Mapping of int to numpy.ndarray
        The inputs that differ from row to row.
    count : int
        The number of rows.
    size : int
        That of a row, the same on all ranks.
    moves : bool
        Whether anything that is assembled is another one for each row.

    Yields
    ------
    rows : slice
    at : Point or None
        Where they are; None for where the stretch before was.
    """
    at: Point | None = point
    for rows in chunks(count, sys.maxsize if moves else size):
        yield rows, point.at(varying, rows.start) if moves else at
        at = None
