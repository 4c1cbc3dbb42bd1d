"""Warnings that are given once, by one rank."""

from __future__ import annotations

import warnings

from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["OneWarning"]


class OneWarning:
    """A warning that is given once, however often there is a reason for it.

    Those that have the same to say may share one.
    """

    def __init__(self):
        self._is_given = False

    def give(self, message: str, comm: MPI.Comm | PETSc.Comm) -> None:
        """Warn on rank 0, where nobody has done so yet; all ranks of the communicator call this."""
        if self._is_given:
            return
        self._is_given = True
        if comm.rank == 0:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
