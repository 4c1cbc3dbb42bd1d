"""The rows of a batch, cut into stretches that are worked through together."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from prdp_fem.problem.point import Point

__all__ = ["stretches"]

# Rows are worked through in stretches that fit into a processor's cache, so that they stay small
# whatever the batch.
_SIZE = 2**18


def stretches(
    point: Point,
    varying: Mapping[int, np.ndarray],
    count: int,
    size: int,
    still: Set[int] | None,
) -> list[tuple[slice, Point | None]]:
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
    still : Set of int or None
        The inputs that may differ while all that is assembled stays as it is; None where something
        is assembled for each row, whatever differs.

    Returns
    -------
    list of tuple
        Of each stretch a slice of its rows, and the point where they are; None for where the
        stretch before was.
    """
    if still is None or not varying.keys() <= still:
        return [(slice(row, row + 1), point.at(varying, row)) for row in range(count)]
    if 0 < count * size <= _SIZE:
        return [(slice(0, count), point)]
    step = max(1, _SIZE // max(size, 1))
    return [
        (slice(start, min(start + step, count)), None if start else point)
        for start in range(0, count, step)
    ]
