"""Derivatives of an assembled operator by what its form depends on.

A cotangent Ā of an operator A gives Σ Āᵢⱼ ∂Aᵢⱼ/∂m. Columns of one colour have no row in common: for
each colour, with r the sum of its basis functions and lᵢ = Āᵢⱼ at its only column j in row i, the
form a(r, l; m) is the sum of Āᵢⱼ Aᵢⱼ, and is differentiated by m. So one linear form is assembled
as often as there are colours, however many iterations have contributed to Ā.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from functools import cached_property

import numpy as np
import ufl
from firedrake import (
    Cofunction,
    Function,
    SpatialCoordinate,
    TestFunction,
    action,
    assemble,
    derivative,
)
from firedrake.petsc import PETSc
from mpi4py import MPI
from ufl.algorithms import expand_derivatives

from prdp_fem.problem.firedrake_internals import MatrixAssembler
from prdp_fem.problem.forms import Forms, assembled_values, derivative_of
from prdp_fem.problem.inputs import coefficients_of, set_local_values
from prdp_fem.problem.point import Direction
from prdp_fem.unrolled import OperatorCotangent, colour_columns

__all__ = ["SOLUTION", "OperatorDerivative"]

# Stands for the solution, where inputs are named by their places.
SOLUTION = "solution"


class OperatorDerivative:
    """The derivative of the matrix of a bilinear form; rows and columns at boundary dofs, which are
    constant, are left out.

    It is taken where the inputs' copies and the forms' solution are.

    Parameters
    ----------
    forms : Forms
    form : ufl.Form
        Bilinear, over the forms' copies.
    matrix : PETSc.Mat
        What it is assembled into.

    Attributes
    ----------
    inputs : set of int
        The inputs that it depends on.
    """

    def __init__(self, forms: Forms, form: ufl.Form, matrix: PETSc.Mat):
        self._forms = forms
        self._form = form
        self._matrix = matrix
        space = forms.solution.function_space()
        self._left, self._right = Function(space), Function(space)
        self._tangent = Function(space)
        self.inputs = forms.indices(coefficients_of(form))
        self._assemblers: dict[Hashable, list[tuple]] = {}
        self._matrix_assemblers: dict[Hashable, MatrixAssembler] = {}

    def check_type(self) -> None:
        """Raise a ValueError where the matrix has no entries to differentiate."""
        kind = self._matrix.getType()
        if kind not in ("seqaij", "mpiaij"):
            raise ValueError(
                "unrolled iterations are differentiated by the operator's entries, and a matrix of"
                f" type {kind} has none at hand: assemble it with mat_type aij, or use implicit"
                " differentiation"
            )

    @cached_property
    def cotangent(self) -> OperatorCotangent:
        """Ā; whoever adds to it calls ``zero`` first."""
        return OperatorCotangent(self._matrix)

    @cached_property
    def _colours(self) -> np.ndarray:
        """The colour of each column that this rank owns; negative for those at boundary dofs."""
        wanted = np.ones(self._matrix.getLocalSize()[1], dtype=bool)
        wanted[self._forms.boundary_dofs] = False
        return colour_columns(self._matrix, wanted)

    @cached_property
    def _entries(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each colour the entries in its columns, and their rows; those in rows at boundary
        dofs left out.
        """
        pattern, colours = self.cotangent.pattern, self._matrix.createVecRight()
        colours.setArray(self._colours.astype(float))
        of_entries = pattern.at_columns(colours, np.empty(len(pattern.columns))).astype(int)
        of_entries[np.isin(pattern.rows, self._forms.boundary_dofs)] = -1
        count = self._matrix.comm.tompi4py().allreduce(
            int(self._colours.max(initial=-1)) + 1, MPI.MAX
        )
        order = np.argsort(of_entries, kind="stable")
        bounds = np.searchsorted(of_entries[order], np.arange(count + 1))
        return [
            (entries := order[start:stop], pattern.rows[entries])
            for start, stop in zip(bounds, bounds[1:])
        ]

    @cached_property
    def _contraction(self) -> ufl.Form:
        """a(r, l), a number, with components of Constants as variables."""
        form = action(action(self._form, self._right), self._left)
        for entry in self._forms.inputs:
            form = entry.in_variables(form)
        return form

    # Reverse

    def gradients(self, what: Iterable, meshes: Iterable = ()) -> tuple[dict, dict]:
        """Σ Āᵢⱼ ∂Aᵢⱼ/∂m.

        Parameters
        ----------
        what : iterable of int or SOLUTION
            Places of inputs, and the solution.
        meshes : iterable of MeshGeometry
            Whose coordinates to differentiate by, too.

        Returns
        -------
        dict of int or SOLUTION to numpy.ndarray
            Rank-local; for a Constant or a Real space the sum over all ranks.
        dict of MeshGeometry to Cofunction
        """
        assemblers = {m: self._assemblers_by(m) for m in what}
        by_mesh = {
            mesh: expand_derivatives(
                derivative(
                    self._contraction,
                    SpatialCoordinate(mesh),
                    TestFunction(mesh.coordinates.function_space()),
                )
            )
            for mesh in meshes
        }
        values: dict = {m: 0.0 for m in assemblers}
        cofunctions = {
            mesh: Cofunction(mesh.coordinates.function_space().dual()) for mesh in by_mesh
        }
        left = np.empty(self._matrix.getLocalSize()[0])
        for colour, (entries, rows) in enumerate(self._entries):
            left[:] = 0.0
            left[rows] = self.cotangent.values[entries]
            set_local_values(self._left, left)
            set_local_values(self._right, (self._colours == colour).astype(float))
            for m, pairs in assemblers.items():
                part = assembled_values(pairs)
                values[m] = values[m] + (
                    part if m == SOLUTION else self._forms.inputs[m].summed(part)
                )
            for mesh, form in by_mesh.items():
                if not form.empty():
                    cofunctions[mesh] += assemble(form)
        return values, cofunctions

    def _assemblers_by(self, m) -> list[tuple]:
        if m not in self._assemblers:
            variables = [self._forms.solution] if m == SOLUTION else self._forms.inputs[m].variables
            self._assemblers[m] = [
                self._forms.dual_assembler(derivative_of(self._contraction, variable), variable)
                for variable in variables
            ]
        return self._assemblers[m]

    # Forward

    def tangent(self, direction: Direction, solution: np.ndarray | None = None) -> PETSc.Mat | None:
        """The derivative of the matrix in a direction, with its pattern, until the next call; None
        where it is zero.

        Parameters
        ----------
        direction : Direction
            Of inputs and meshes.
        solution : numpy.ndarray or None
            The direction of the solution, rank-local.
        """
        indices = sorted(direction.inputs.keys() & self.inputs)
        for index in indices:
            self._forms.inputs[index].set_direction(direction.inputs[index])
        if solution is not None:
            set_local_values(self._tangent, solution)
        key = (*indices, solution is None)
        if direction.meshes or key not in self._matrix_assemblers:
            form = self._form_in(indices, direction, solution is not None)
            if form is None:
                return None
            assembler = MatrixAssembler(
                form,
                self._forms.homogeneous_conditions(),
                self._forms.problem.form_compiler_parameters,
            )
            if direction.meshes:
                # directions of meshes come as Functions that differ from call to call: nothing is
                # kept
                return self._with_pattern(assembler())
            self._matrix_assemblers[key] = assembler
        return self._with_pattern(self._matrix_assemblers[key]())

    def _form_in(
        self, indices: list[int], direction: Direction, has_solution: bool
    ) -> ufl.Form | None:
        form = self._form
        for entry in self._forms.inputs:
            form = entry.in_variables(form)
        pairs = [(self._forms.solution, self._tangent)] if has_solution else []
        for index in indices:
            entry = self._forms.inputs[index]
            pairs += zip(entry.variables, entry.directions)
        pairs += [(SpatialCoordinate(mesh), tangent) for mesh, tangent in direction.meshes.items()]
        parts = [expand_derivatives(derivative(form, *pair)) for pair in pairs]
        parts = [part for part in parts if not part.empty()]
        return sum(parts[1:], parts[0]) if parts else None

    def _with_pattern(self, matrix: PETSc.Mat) -> PETSc.Mat:
        """A matrix with more entries, zero ones; until the next call."""
        self._whole.zeroEntries()
        self._whole.axpy(1.0, matrix, structure=PETSc.Mat.Structure.SUBSET_NONZERO_PATTERN)
        return self._whole

    @cached_property
    def _whole(self) -> PETSc.Mat:
        return self._matrix.duplicate(copy=False)
