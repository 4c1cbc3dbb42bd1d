"""Derivatives of the residual by what solutions depend on: by a matrix, or else by forms."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from functools import cached_property

import numpy as np
from firedrake.petsc import PETSc
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from prdp_fem.assembly.lifting import Lifting
from prdp_fem.assembly.residual import ResidualDerivatives
from prdp_fem.memory.batch import Batch
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.place import Place
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import coefficients_of, vector_like
from prdp_fem.problem.point import Direction, Point
from prdp_fem.problem.wanted import Wanted

__all__ = ["InputDerivatives"]


class InputDerivatives:
    """Derivatives of F(u, m; v), weighted by multipliers λ, or in a direction.

    Parameters
    ----------
    forms : Forms
    terms : Mapping of int to AffineTerm or CofunctionTerm
        The inputs that enter the residual by a matrix: nothing is assembled for them.
    place : Place
        Where multipliers are.

    Attributes
    ----------
    by_forms : ResidualDerivatives
    """

    def __init__(self, forms: Forms, terms: Mapping, place: Place):
        self._forms = forms
        self._terms = terms
        self._place = place
        with stop_annotating():
            self.by_forms = ResidualDerivatives(forms)
            self._lifting = Lifting(forms, place)
        layout = vector_like(forms.solution)
        self._size = layout.getLocalSize()
        self._right_hand_side, self._product = place.row(layout), place.row(layout)

    def check(self, index: int) -> None:
        """Raise a TypeError where UFL cannot differentiate the problem by an input."""
        if index not in self._terms and index in self.by_forms.inputs:
            self.by_forms.check(index)

    def values_read(self, indices: Iterable[int], by_all: bool) -> Set[int]:
        """The inputs whose values derivatives depend on: by some inputs, or by all."""
        read = set(self._read_by_operator)
        if by_all:
            return read | self.by_forms.inputs
        for index in indices:
            read |= (
                self._terms[index].parameters
                if index in self._terms
                else self.by_forms.values_read(index)
            )
        return read

    @cached_property
    def _read_by_operator(self) -> set[int]:
        """The inputs whose values the operators of derivatives depend on."""
        # Not by in_operator: a Jacobian that UFL has not expanded yet names all of the residual.
        jacobian = expand_derivatives(self._forms.jacobian)
        found = self._forms.indices(coefficients_of(jacobian, self._forms.problem.Jp))
        return found | self._forms.others

    def needs_forms(self, wanted: Wanted) -> bool:
        """Whether something that is wanted is assembled for each row, after :meth:`at`."""
        return (
            wanted.boundary is not None
            or bool(wanted.meshes)
            or not wanted.gradients.keys() <= self._terms.keys()
        )

    def at(self, point: Point, solution, multipliers: Batch | DeviceBatch) -> None:
        """Set where derivatives that are assembled are taken, for the only row of a batch."""
        memory = self._place.memory
        self.by_forms.at(point.on(memory), memory.on_host(solution), multipliers.values(0))

    def write(
        self, wanted: Wanted, rows: slice, multipliers: Batch | DeviceBatch, cotangents
    ) -> None:
        """Write -(∂F/∂m)ᵀ λ for some rows.

        Parameters
        ----------
        wanted : Wanted
        rows : slice
            Of one row where something is assembled.
        multipliers : Batch or DeviceBatch
            λ of these rows.
        cotangents : numpy.ndarray
            Of all rows, with their entries at boundary dofs.
        """
        for index, gradient in wanted.gradients.items():
            self.gradient(index, multipliers, gradient[rows])
        if wanted.boundary is not None:
            cotangent = self._place.memory.on_host(cotangents[rows.start])
            self.write_boundary(cotangent, wanted.boundary[rows.start])
        for mesh in wanted.meshes:
            wanted.by_mesh[mesh] = self.by_forms.by_mesh(mesh)

    def gradient(self, index: int, multipliers: Batch | DeviceBatch, out) -> None:
        """-(∂F/∂m)ᵀ λ by one input."""
        if index in self._terms:
            self._terms[index].transposed_products(multipliers, out)
        else:
            out[0] = self.by_forms.by_input(index)

    def write_boundary(self, cotangent: np.ndarray, out: np.ndarray) -> None:
        """Write the derivative by the boundary values: rank-local, zero at other dofs."""
        dofs = self._forms.boundary_dofs
        out[:] = 0.0
        out[dofs] = cotangent[dofs] + self.by_forms.by_solution()[dofs]

    def in_direction(self, point: Point, state: np.ndarray, direction: Direction) -> PETSc.Vec:
        """-(∂F/∂m) ṁ - J ġ at a state, zero at boundary dofs; until the next call."""
        self.by_forms.at(point, state)
        total = np.zeros(self._size)
        for index, values in direction.inputs.items():
            if index in self._terms:
                total += self._terms[index].products(values[None], self._product.value).values(0)
            else:
                total += self.by_forms.in_direction(index, values)
        for mesh, values in direction.meshes.items():
            total += self.by_forms.in_mesh_direction(mesh, values)
        total[self._forms.boundary_dofs] = 0.0
        row = self._right_hand_side.value
        row.fill(total)
        if direction.boundary is not None:
            self._lifting.subtract(direction.boundary, row.vectors[0])
        return row.vectors[0]
