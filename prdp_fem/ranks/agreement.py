"""What ranks agree on before they go on together.

A collective call waits for all ranks. Where one of them has left, or has other sizes in mind, it
waits for ever, or mixes numbers up. So what every rank must have alike is compared first, and what
is wrong on one rank is raised on all.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import numpy as np
from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["agree", "from_first_rank"]

_EVENT = PETSc.Log.Event("PRDPAgree")

T = TypeVar("T")


def agree(comm: MPI.Comm, find: Callable[[], T], what: str, remedy: str = "") -> T:
    """Find something on each rank, and make sure that it is the same on all.

    One small reduction where it is.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        On which this is collective.
    find : callable
        Without arguments, and without communication. What it returns is compared by its ``repr``.
    what : str
        What it is called, in the plural.
    remedy : str
        What to do where ranks differ.

    Returns
    -------
    object
        What ``find`` has returned.

    Raises
    ------
    Exception
        What ``find`` has raised on this rank.
    ValueError
        Where it has raised on other ranks only, or where ranks have found different things.
    """
    if comm.size == 1:
        return find()
    found: Any = None
    error = None
    try:
        found = find()
        mine = repr(found)
    except Exception as raised:
        error, mine = raised, f"{type(raised).__name__}: {raised}"
    checksum = zlib.crc32(mine.encode())
    largest = np.array([checksum, -checksum, error is not None])
    with _EVENT:
        comm.Allreduce(MPI.IN_PLACE, largest, MPI.MAX)
    if error is not None:
        # Others need to know what; where all have raised, nobody asks.
        comm.allgather((mine, True))
        try:
            raise error
        finally:
            # Its traceback would hold this frame, in which it is, and all that callers have, until
            # Python looks for cycles.
            del error
    if largest[0] == -largest[1] and not largest[2]:
        return found
    _refuse(comm, mine, what, remedy)


def _refuse(comm: MPI.Comm, mine: str, what: str, remedy: str) -> NoReturn:
    """Raise for what was found, or raised, on other ranks than this one; see :func:`agree`."""
    everywhere = comm.allgather((mine, False))
    for rank, (message, is_error) in enumerate(everywhere):
        if is_error:
            raise ValueError(f"rank {rank} of {comm.size} has raised {message}")
    first, _ = everywhere[0]
    other = next(rank for rank, (message, _) in enumerate(everywhere) if message != first)
    raise ValueError(
        f"{what} must be the same on all ranks, found {first} on rank 0 and"
        f" {everywhere[other][0]} on rank {other}" + (f": {remedy}" if remedy else "")
    )


def from_first_rank(comm: MPI.Comm, find: Callable[[], T]) -> T:
    """Find something on rank 0 only, such as what is in a file, and have it on all.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        On which this is collective.
    find : callable
        Without arguments, and without communication. What it returns, or raises, can be pickled.

    Returns
    -------
    object
        What it has returned on rank 0.

    Raises
    ------
    Exception
        What it has raised on rank 0, on all ranks.
    """
    found = error = None
    if comm.rank == 0:
        try:
            found = find()
        except Exception as raised:
            error = raised
    found, error = comm.bcast((found, error))
    if error is None:
        return found
    try:
        raise error
    finally:
        del error  # as above
