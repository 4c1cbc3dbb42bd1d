"""What any rank has found, told to all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

__all__ = ["on_any_rank", "which_on_any_rank"]


def which_on_any_rank(comm: MPI.Comm, flags: Sequence[bool]) -> list[bool]:
    """Which of some flags are true on any rank. Collective: one small reduction, or none."""
    if comm.size == 1:
        return list(flags)
    everywhere = np.array(flags, dtype=np.intc)
    comm.Allreduce(MPI.IN_PLACE, everywhere, MPI.MAX)
    return [bool(flag) for flag in everywhere]


def on_any_rank(comm: MPI.Comm, flag: bool) -> bool:
    """Whether a flag is true on any rank. Collective; see :func:`which_on_any_rank`."""
    return flag if comm.size == 1 else comm.allreduce(flag, MPI.LOR)
