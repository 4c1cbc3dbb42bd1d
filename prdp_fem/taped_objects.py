"""What a solve does to others' objects on pyadjoint's tape, in step with other ranks, and what it
finds of them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Number

import numpy as np
from firedrake import Function
from mpi4py import MPI

from prdp_fem.problem.firedrake_internals import assigned_from, has_block_variable
from prdp_fem.problem.inputs import is_real, local_values, same_bits
from prdp_fem.ranks.flags import on_any_rank, which_on_any_rank

__all__ = ["SolvedWith", "TapedMeshes", "copied_from", "forget_tapes_of_before", "values_in"]


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


def copied_from(variable):
    """The block variable that one is a mere copy of; None where it is none, or where the other is
    of another space.
    """
    source = assigned_from(variable)
    # A Function of a Real space can be assigned to any other. (In place of an assembled Cofunction
    # there may be a checkpoint.)
    is_broadcast = (
        source is not None
        and isinstance(source.output, Function)
        and is_real(source.output)
        and not is_real(variable.output)
    )
    return None if is_broadcast else source


def values_in(original, value) -> np.ndarray:
    """Rank-local values of what pyadjoint has for an original: where not of its space, a number or
    a Function of a Real space.
    """
    if isinstance(value, Number) or (is_real(value) and not is_real(original)):
        value = Function(original.function_space()).assign(value, annotate=False)
    return local_values(value)


def _origin(variable):
    """What a variable is a copy of, rather than of another copy made for the purpose; or itself."""
    while (source := copied_from(variable)) is not None:
        variable = source
    return variable


class SolvedWith:
    """The values that a block on the tape was solved with.

    They are those that the tape has saved, but where something was written to an object afterwards
    and nothing was annotated, or where another tape has saved it before. Those count as long as the
    tape is not evaluated at others.
    """

    def __init__(self):
        # By the identity of block variables: what was saved then, and the values.
        self._others: dict[int, tuple] = {}

    def note(self, variable, present: np.ndarray) -> None:
        """Look whether the tape has other values than the present ones, of a variable that was
        saved before.
        """
        if _is_mesh(variable):
            saved = local_values(variable.checkpoint)
        else:
            saved = self.values(variable)
        if not same_bits(saved, present):
            self._others[id(variable)] = _origin(variable).checkpoint, present

    def others(self, variable) -> np.ndarray | None:
        """Rank-local values that are not those which the tape has, or None."""
        if id(variable) not in self._others:
            return None
        checkpoint, values = self._others[id(variable)]
        return values if _origin(variable).checkpoint is checkpoint else None

    def values(self, variable) -> np.ndarray:
        """Rank-local values of a variable that is no mesh."""
        others = self.others(variable)
        if others is not None:
            return others
        return values_in(variable.output, _origin(variable).saved_output)


def _is_mesh(variable) -> bool:
    return hasattr(variable.output, "coordinates")


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

    def restore(self, variable, solved_with: SolvedWith) -> None:
        """Move a mesh to where a block that depends on it was solved. Collective."""
        mesh, checkpoint = variable.output, variable.checkpoint
        if checkpoint is None:
            return
        coordinates = mesh.coordinates.dat
        others = solved_with.others(variable)
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
