"""What a solve does to others' objects on pyadjoint's tape, in step with other ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from prdp_fem.problem.firedrake_internals import has_block_variable
from prdp_fem.problem.inputs import same_bits
from prdp_fem.ranks.flags import on_any_rank, which_on_any_rank

__all__ = ["TapedMeshes", "forget_tapes_of_before"]


def forget_tapes_of_before(comm: MPI.Comm, originals: Sequence) -> None:
    """Have all ranks put the present values of something on a tape, where any would. Collective.

    Python finds a tape in a reference cycle to be garbage at another time on each rank. Where it
    has not yet, pyadjoint would take what that tape has saved for what there is now; and where it
    has, it would make a copy, which is collective.
    """
    if comm.size == 1:
        return
    are_new = which_on_any_rank(comm, [not has_block_variable(original) for original in originals])
    for original, is_new in zip(originals, are_new):
        if is_new:
            original.clear_block_variable()


class TapedMeshes:
    """Moves meshes to where they were when a solve was put on the tape.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    """

    def __init__(self, comm: MPI.Comm):
        self._comm = comm
        # By identity: to hash a mesh takes UFL longer than all the rest.
        self._restored: dict[int, tuple] = {}

    def restore(self, variable, others: np.ndarray | None) -> None:
        """Move a mesh to where a block that depends on it was solved. Collective.

        That is where the block variable has it, but where others are told: rank-local values of the
        coordinates.
        """
        mesh, checkpoint = variable.output, variable.checkpoint
        if checkpoint is None:
            return
        coordinates = mesh.coordinates.dat
        if others is None:
            places = checkpoint.dat.data_ro
        else:
            checkpoint, places = others, others.reshape(coordinates.data_ro.shape)
        # Restoring costs more than a small solve, and hardly ever changes anything.
        last, version = self._restored.get(id(mesh), (None, None))
        # By ranks together: on some a tape of before may still have the checkpoint, as Python looks
        # for garbage at its own time on each.
        if on_any_rank(self._comm, last is not checkpoint or version != coordinates.dat_version):
            if on_any_rank(self._comm, not same_bits(places, coordinates.data_ro)):
                coordinates.data_wo[...] = places
            self._restored[id(mesh)] = checkpoint, coordinates.dat_version
