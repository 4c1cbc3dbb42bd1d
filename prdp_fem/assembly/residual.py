"""Derivatives of the residual by what it depends on, weighted by a multiplier or in a direction;
assembled as forms.

Assemblers are built at their first use, and kept.
"""

from __future__ import annotations

from collections.abc import Hashable
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
from ufl.algorithms import expand_derivatives

from prdp_fem.problem.forms import Forms, assembled_values, derivative_of
from prdp_fem.problem.inputs import coefficients_of, local_values, set_local_values
from prdp_fem.problem.point import Direction, Point

__all__ = ["ResidualDerivatives"]


class ResidualDerivatives:
    """The derivatives of F(u, m; v), Cofunctions in the right-hand side left out.

    All methods ask for :meth:`at` first, and those of second derivatives for :meth:`toward`.

    Parameters
    ----------
    forms : Forms
    """

    def __init__(self, forms: Forms):
        self._forms = forms
        space = forms.solution.function_space()
        self._multiplier, self._tangent = Function(space), Function(space)
        self._assembled = Cofunction(space.dual())
        self._assemblers: dict[Hashable, list[tuple]] = {}
        self._direction = Direction({})

    @cached_property
    def _weighted(self) -> ufl.Form:
        """-F(λ), a number, with components of Constants as variables."""
        form = -1 * action(self._forms.residual, self._multiplier)
        for entry in self._forms.inputs:
            form = entry.in_variables(form)
        return form

    @cached_property
    def inputs(self) -> set[int]:
        """The inputs that the forms depend on."""
        return self._forms.indices(coefficients_of(self._forms.residual))

    def values_read(self, index: int) -> set[int]:
        """The inputs whose values first derivatives by an input, or in its direction, depend on."""
        found = coefficients_of(*map(self._by_variable, self._forms.inputs[index].variables))
        return {
            other
            for other, entry in enumerate(self._forms.inputs)
            if any(variable is coefficient for variable in entry.variables for coefficient in found)
        }

    def at(self, point: Point, solution: np.ndarray, multiplier: np.ndarray | None = None) -> None:
        """Set where derivatives are taken, and for all but those in a direction the weight λ."""
        for index in self.inputs:
            self._forms.inputs[index].write_where_needed(point.values[index])
        set_local_values(self._forms.solution, solution)
        if multiplier is not None:
            set_local_values(self._multiplier, multiplier)

    # First derivatives, weighted

    def by_input(self, index: int) -> np.ndarray:
        """-(∂F/∂m)ᵀ λ, rank-local; for a Constant or a Real space the sum over all ranks."""
        if index not in self._assemblers:
            self._assemblers[index] = [
                self._forms.dual_assembler(self._by_variable(variable), variable)
                for variable in self._forms.inputs[index].variables
            ]
        return self._forms.inputs[index].summed(assembled_values(self._assemblers[index]))

    def by_solution(self) -> np.ndarray:
        """-(∂F/∂u)ᵀ λ, rank-local, entries at boundary dofs included."""
        solution = self._forms.solution
        if "solution" not in self._assemblers:
            self._assemblers["solution"] = [
                self._forms.dual_assembler(self._by_variable(solution), solution)
            ]
        return assembled_values(self._assemblers["solution"])

    def by_mesh(self, mesh) -> Cofunction:
        """The derivative of -F(λ) by the coordinates of a mesh."""
        return _assembled_cofunction(self._by_coordinates(mesh), mesh)

    def check(self, index: int) -> None:
        """Raise a TypeError where UFL cannot differentiate by an input."""
        for variable in self._forms.inputs[index].variables:
            self._by_variable(variable)

    def _by_variable(self, variable: Function) -> ufl.Form:
        try:
            return derivative_of(self._weighted, variable)
        except TypeError as error:
            raise TypeError(
                str(error).replace(f"'{variable.name()}'", f"'{self._name(variable)}'")
            ) from error

    def _name(self, variable: Function) -> str:
        return next(
            (
                entry.name
                for entry in self._forms.inputs
                if any(variable is other for other in entry.variables)
            ),
            variable.name(),
        )

    def _by_coordinates(self, mesh) -> ufl.Form:
        return derivative(
            self._weighted, SpatialCoordinate(mesh), TestFunction(mesh.coordinates.function_space())
        )

    # First derivatives in a direction

    def in_direction(self, index: int, tangent: np.ndarray) -> np.ndarray:
        """-(∂F/∂m) ṁ, rank-local; entries at boundary dofs are zero."""
        key = "direction", index
        if key not in self._assemblers:
            entry = self._forms.inputs[index]
            form = entry.in_variables(-1 * self._forms.residual)
            parts = [derivative(form, *pair) for pair in zip(entry.variables, entry.directions)]
            form = expand_derivatives(sum(parts[1:], parts[0]))
            self._assemblers[key] = [
                (None if form.empty() else self._forms.assembler(form), self._assembled)
            ]
        self._forms.inputs[index].set_direction(tangent)
        return assembled_values(self._assemblers[key])

    def in_mesh_direction(self, mesh, tangent: Function) -> np.ndarray:
        """-(∂F/∂X) Ẋ, rank-local, for a direction Ẋ of the coordinates of a mesh."""
        return local_values(
            assemble(derivative(-1 * self._forms.residual, SpatialCoordinate(mesh), tangent))
        )

    # Second derivatives: the first ones, weighted, differentiated in a direction

    def toward(self, direction: Direction, tangent: np.ndarray) -> None:
        """Set the direction of second derivatives.

        Parameters
        ----------
        direction : Direction
            Of inputs and meshes.
        tangent : numpy.ndarray
            Of the solution.
        """
        self._direction = direction
        set_local_values(self._tangent, tangent)
        for index in direction.inputs.keys() & self.inputs:
            self._forms.inputs[index].set_direction(direction.inputs[index])

    def second_by_input(self, index: int) -> np.ndarray:
        """The derivative of :meth:`by_input` in the direction, λ fixed."""
        if index not in self.inputs:
            # a Cofunction: the residual is linear in it
            return np.zeros(self._forms.inputs[index].size)
        entry = self._forms.inputs[index]
        return entry.summed(self._second(index, entry.variables))

    def second_by_solution(self) -> np.ndarray:
        """The derivative of :meth:`by_solution` in the direction, λ fixed."""
        return self._second("solution", [self._forms.solution])

    def second_by_mesh(self, mesh) -> Cofunction:
        """The derivative of :meth:`by_mesh` in the direction, λ fixed."""
        return _assembled_cofunction(self._toward(self._by_coordinates(mesh)), mesh)

    def _second(self, what: Hashable, variables: list[Function]) -> np.ndarray:
        key = "second", what, frozenset(self._direction.inputs)
        if self._direction.meshes:
            # Directions of meshes come as Functions that differ from call to call: nothing is kept.
            return assembled_values(self._assemblers_toward(variables))
        if key not in self._assemblers:
            self._assemblers[key] = self._assemblers_toward(variables)
        return assembled_values(self._assemblers[key])

    def _assemblers_toward(self, variables: list[Function]) -> list[tuple]:
        return [
            self._forms.dual_assembler(self._toward(self._by_variable(variable)), variable)
            for variable in variables
        ]

    def _toward(self, form: ufl.Form) -> ufl.Form:
        if form.empty():
            return form
        pairs = [(self._forms.solution, self._tangent)]
        for index in sorted(self._direction.inputs.keys() & self.inputs):
            pairs += zip(self._forms.inputs[index].variables, self._forms.inputs[index].directions)
        pairs += [
            (SpatialCoordinate(mesh), tangent) for mesh, tangent in self._direction.meshes.items()
        ]
        try:
            parts = [derivative(form, *pair) for pair in pairs]
            return expand_derivatives(sum(parts[1:], parts[0]))
        except Exception as error:  # UFL raises what it likes
            raise TypeError(
                f"UFL cannot differentiate the problem for '{self._forms.solution.name()}' twice:"
                f" {error}"
            ) from error


def _assembled_cofunction(form: ufl.Form, mesh) -> Cofunction:
    form = expand_derivatives(form)
    return Cofunction(mesh.coordinates.function_space().dual()) if form.empty() else assemble(form)
