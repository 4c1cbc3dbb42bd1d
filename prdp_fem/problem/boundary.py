"""Boundary values as a function of the coefficients that they are made from."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import ufl
from firedrake import Cofunction, DirichletBC, Function
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from prdp_fem.problem.boundary_derivatives import BoundaryDerivatives, BoundaryGradient
from prdp_fem.problem.boundary_meshes import meshes_of_values
from prdp_fem.problem.firedrake_internals import boundary_expression, has_taped_number
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import Input, coefficients_of, local_values, set_local_values

__all__ = ["BoundaryData"]


class BoundaryData:
    """The values that the Dirichlet conditions of a problem give, and their derivatives, by some of
    the coefficients in them.

    Parameters
    ----------
    forms : Forms
        Of the problem.
    controls : sequence of Function or Constant, or None
        The user's coefficients; those that give no boundary values are left out. None takes all
        that do: then the values are a function of these and of the meshes alone, whatever becomes
        of the user's conditions.

    Attributes
    ----------
    inputs : dict of int to Input
        The controls that boundary values depend on, by their places.
    conditions : list of DirichletBC
        The problem's, with copies of the controls in their values.
    meshes : list of MeshGeometry
        Those on whose coordinates values depend.
    size : int
        Rank-local dofs of the solution.
    comm : mpi4py.MPI.Comm
    """

    def __init__(self, forms: Forms, controls: Sequence | None = None):
        self._given = forms.problem_conditions
        space = forms.solution.function_space()
        self.comm = space.mesh().comm
        self._expressions = [boundary_expression(condition) for condition in self._given]
        if controls is None and any(map(has_taped_number, self._given)):
            raise ValueError(
                f"a DirichletBC for '{forms.solution.name()}' was given a number that was computed"
                " on the tape, of which a condition keeps the value only: assign it to a Constant,"
                " and make the condition from that"
            )
        in_conditions = coefficients_of(*self._expressions)
        wanted = in_conditions if controls is None else controls
        with stop_annotating():
            self._values = Function(space)
            self.size = local_values(self._values).size
            self.inputs = {
                place: self._input(control)
                for place, control in enumerate(wanted)
                if any(control is coefficient for coefficient in in_conditions)
            }
            self._controlled = {entry.original for entry in self.inputs.values()}
            # What else is in the same expressions has the values of the forward pass in the
            # backward pass, too.
            self._others = [
                self._input(coefficient)
                for coefficient in coefficients_of(*filter(self._depends, self._expressions))
                if coefficient not in self._controlled
            ]
            entries = [*self.inputs.values(), *self._others]
            copies = {entry.original: entry.copy for entry in entries}
            over_copies = [ufl.replace(expression, copies) for expression in self._expressions]
            self.conditions = self._over(over_copies, keeps_users=controls is not None)
        meshes = map(meshes_of_values, self._given, self._expressions)
        self.meshes = list(dict.fromkeys(itertools.chain.from_iterable(meshes)))
        self._derivatives = BoundaryDerivatives(
            self.conditions, self._expressions, over_copies, self.inputs, self.meshes, self._values
        )
        if controls is not None:
            for place in self.inputs:
                self._derivatives.first(place)

    def _depends(self, expression) -> bool:
        """Whether an expression has an input in it."""
        return bool(self._controlled & set(coefficients_of(expression)))

    def _over(self, over_copies: Sequence, *, keeps_users: bool) -> list[DirichletBC]:
        """The conditions, with expressions over copies where these depend on an input."""
        conditions = []
        for condition, expression, copied in zip(self._given, self._expressions, over_copies):
            if self._depends(expression):
                condition = condition.reconstruct(g=copied)
            elif not keeps_users:
                # One that the user gives another value to is another one.
                condition = copy.copy(condition)
            # Others keep the user's values, whatever these are when they are asked for.
            conditions.append(condition)
        return conditions

    def _input(self, coefficient) -> Input:
        """What stands for a coefficient, with variables on each mesh that it gives values on."""
        meshes = [
            condition.function_space().mesh().unique()
            for condition, expression in zip(self._given, self._expressions)
            if any(coefficient is other for other in coefficients_of(expression))
        ]
        return Input(coefficient, list(dict.fromkeys(meshes)))

    @property
    def is_current(self) -> bool:
        """Whether the problem's conditions still have the expressions that they had."""
        return all(
            boundary_expression(condition) is expression
            for condition, expression in zip(self._given, self._expressions)
        )

    def others(self) -> list[np.ndarray]:
        """The present values of the coefficients that are no controls, in expressions that have
        controls, too; not to be written to.
        """
        return [entry.present_values() for entry in self._others]

    def write(self, values: Mapping[int, np.ndarray], others: Sequence[np.ndarray] = ()) -> None:
        """Have the values of the inputs in the conditions.

        Parameters
        ----------
        values : Mapping of int to numpy.ndarray
            Rank-local values of the inputs.
        others : sequence of numpy.ndarray
            What :meth:`others` gave.
        """
        for place, entry in self.inputs.items():
            entry.write(values[place])
        for entry, other in zip(self._others, others):
            entry.write(other)

    def values(self, values: Mapping[int, np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
        """Rank-local boundary values, zero elsewhere, shape (n,); arguments as of :meth:`write`."""
        with stop_annotating():
            self.write(values, others)
            self._values.dat.zero()
            for condition in self.conditions:
                condition.apply(self._values)
        return local_values(self._values)

    # First derivatives

    def gradient(
        self,
        place: int,
        values: Mapping[int, np.ndarray],
        others: Sequence[np.ndarray],
        cotangent: np.ndarray,
    ) -> np.ndarray:
        """The derivative by an input of a functional of the boundary values.

        Parameters
        ----------
        place : int
            Of the input.
        values : Mapping of int to numpy.ndarray
        others : sequence of numpy.ndarray
            Where the derivative is taken.
        cotangent : numpy.ndarray
            Rank-local derivative of the functional by the boundary values, shape (n,).

        Returns
        -------
        numpy.ndarray
            Rank-local; for a Constant or a Real space the sum over all ranks.
        """
        with stop_annotating():
            self.write(values, others)
        return self.by_input(place, cotangent)

    def by_input(self, place: int, cotangent: np.ndarray) -> np.ndarray:
        """What :meth:`gradient` gives, where the inputs have been written."""
        return self._total(self.inputs[place], self._derivatives.first(place), cotangent)

    def by_mesh(self, mesh, cotangent: np.ndarray) -> Cofunction:
        """The derivative by the coordinates of a mesh, where the inputs have been written."""
        return self._by_mesh(mesh, self._derivatives.first(mesh), cotangent)

    def tangent(self, directions: Mapping[int, np.ndarray], meshes: Mapping) -> np.ndarray | None:
        """The derivative of the boundary values in a direction, where the inputs have been written.

        Parameters
        ----------
        directions : Mapping of int to numpy.ndarray
            Rank-local directions of inputs.
        meshes : Mapping of MeshGeometry to Function
            Directions of mesh coordinates.

        Returns
        -------
        numpy.ndarray or None
            Rank-local, zero at other dofs; None for zero.
        """
        self._derivatives.set_direction(directions, meshes)
        with stop_annotating():
            tangents = self._derivatives.tangents()
            if not tangents:
                return None
            out = np.zeros(self.size)
            for tangent in tangents:
                tangent.put(self._values, out)
        return out

    # Second derivatives: the first ones in a direction

    def second_by_input(self, place: int, cotangent: np.ndarray) -> np.ndarray:
        """The derivative of :meth:`by_input` in the last tangent's direction, cotangent fixed."""
        return self._total(self.inputs[place], self._derivatives.second(place), cotangent)

    def second_by_mesh(self, mesh, cotangent: np.ndarray) -> Cofunction:
        """The derivative of :meth:`by_mesh` in the last tangent's direction, cotangent fixed."""
        return self._by_mesh(mesh, self._derivatives.second(mesh), cotangent)

    def needs_value(self, place: int) -> bool:
        """Whether derivatives depend on the value of an input."""
        return place in self._derivatives.bent

    def _total(
        self, entry: Input, gradients: list[BoundaryGradient], cotangent: np.ndarray
    ) -> np.ndarray:
        with stop_annotating():
            total = sum(
                (gradient.weighted(self._values, cotangent) for gradient in gradients),
                np.zeros(entry.size * len(entry.meshes)),
            )
        return self.comm.allreduce(entry.summed(total), MPI.SUM) if entry.is_real else total

    def _by_mesh(
        self, mesh, gradients: list[BoundaryGradient], cotangent: np.ndarray
    ) -> Cofunction:
        with stop_annotating():
            total = Cofunction(mesh.coordinates.function_space().dual())
            set_local_values(
                total,
                sum(
                    (gradient.weighted(self._values, cotangent) for gradient in gradients),
                    np.zeros(local_values(total).size),
                ),
            )
        return total
