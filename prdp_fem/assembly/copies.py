"""The copies that forms read, brought to where something is assembled."""

from __future__ import annotations

from collections.abc import Container

import numpy as np
from firedrake import Constant

from prdp_fem.assembly.agreement import Agreement
from prdp_fem.freshness import MESH, STATE, Clock
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import local_values, same_bits
from prdp_fem.problem.point import Point
from prdp_fem.ranks.flags import on_any_rank

__all__ = ["Copies"]


class Copies:
    """Writes inputs and the state where they have changed on any rank, and tells the clock.

    Parameters
    ----------
    forms : Forms
    clock : Clock
    unwritten : Container of int
        Inputs whose copies are not read, since they enter by a matrix.

    Attributes
    ----------
    state : numpy.ndarray or None
        Where the operator is assembled; None where it does not depend on the solution.
    agreement : Agreement
        What ranks agree on before a solve.
    mesh_stamp : int
        A number that is another one once a mesh has moved; as :meth:`look_at_meshes` has seen it
        last.
    """

    def __init__(self, forms: Forms, clock: Clock, unwritten: Container[int] = ()):
        self._clock, self._comm = clock, forms.solution.function_space().mesh().comm
        self._written = [
            (index, entry) for index, entry in enumerate(forms.inputs) if index not in unwritten
        ]
        depends = forms.operator_depends_on_solution
        self.state = local_values(forms.solution) if depends else None
        written = [index for index, _ in self._written]
        self.agreement = Agreement(forms, written, reduces=depends or bool(written))
        coordinates = [mesh.coordinates.dat for mesh in forms.meshes]
        self._coordinates = [(dat, np.array(dat.data_ro)) for dat in coordinates]
        self._mesh_versions: list = [None] * len(coordinates)
        fields = [entry.copy for entry in forms.inputs if not isinstance(entry.copy, Constant)]
        self._fields = [field.dat for field in (*fields, forms.solution, forms.boundary)]
        self.mesh_stamp = 0

    def look_at_meshes(self) -> int:
        """Look whether a mesh has moved, and return the :attr:`mesh_stamp`. Collective."""
        versions = [coordinates.dat_version for coordinates, _ in self._coordinates]
        if versions != self._mesh_versions:
            # pyadjoint writes the same coordinates again at each replay: only other values count.
            moved = [
                not same_bits(coordinates.data_ro, before)
                for coordinates, before in self._coordinates
            ]
            if on_any_rank(self._comm, any(moved)):
                for coordinates, before in self._coordinates:
                    before[...] = coordinates.data_ro
                # Firedrake transfers a field to a coarser mesh again where its values have changed,
                # and not where their places have.
                for field in self._fields:
                    field.increment_dat_version()
                self._clock.changed(MESH)
                self.mesh_stamp = self._clock.now
            self._mesh_versions = versions
        return self.mesh_stamp

    def write(self, point: Point, solution: np.ndarray | None = None) -> None:
        """Have a point in the copies, and a solution, if any, as the state. Collective."""
        self.look_at_meshes()
        if not self._written and self.state is None:
            return
        changed = [entry.differs(point.values[index]) for index, entry in self._written]
        is_another_state = (
            solution is not None and self.state is not None and not same_bits(solution, self.state)
        )
        changed.append(is_another_state)
        if self.agreement.reduces:
            changed = self.agreement.on_changes(changed, point)
        if not any(changed):
            return
        sources: list = []
        for (index, entry), is_changed in zip(self._written, changed):
            if is_changed:
                entry.write(point.values[index])
                sources.append(index)
        if self.state is not None and changed[-1]:
            self.state[:] = solution
            sources.append(STATE)
        self._clock.changed(*sources)
