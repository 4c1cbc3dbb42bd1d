"""Derivatives of the residual by what it depends on, weighted by a multiplier or in a direction; assembled as forms.

Assemblers are built at their first use, and kept.
"""
from __future__ import annotations

from functools import cached_property

import numpy as np
import ufl
from firedrake import Cofunction, Function, SpatialCoordinate, TestFunction, action, assemble, derivative
from ufl.algorithms import expand_derivatives

from prdp_fem.forms import LinearForms
from prdp_fem.inputs import coefficients_of, local_values, set_local_values
from prdp_fem.point import Point

__all__ = ["ResidualDerivatives"]


class ResidualDerivatives:
    """The derivatives of F(u, m; v) = a(u, v) - L(v), Cofunctions in the right-hand side left out.

    All methods ask for :meth:`at` first.

    Parameters
    ----------
    forms : LinearForms
    """

    def __init__(self, forms: LinearForms):
        self._forms = forms
        space = forms.solution.function_space()
        self._multiplier = Function(space)
        self._assembled = Cofunction(space.dual())
        self._by_input: dict[int, list[tuple]] = {}
        self._in_direction: dict[int, tuple] = {}

    @cached_property
    def _residual(self) -> ufl.Form:
        F = action(self._forms.a, self._forms.solution)
        return F if self._forms.L is None else F - self._forms.L

    @cached_property
    def _weighted(self) -> ufl.Form:
        """-F(λ), a number."""
        return -1*action(self._residual, self._multiplier)

    @cached_property
    def inputs(self) -> set[int]:
        """The inputs that the forms depend on."""
        return self._forms.indices(coefficients_of(self._residual))

    def at(self, point: Point, solution: np.ndarray, multiplier: np.ndarray | None = None) -> None:
        """Set where derivatives are taken, and for :meth:`by_input`, :meth:`by_boundary` and :meth:`by_mesh` the weight λ."""
        for index in self.inputs:
            self._forms.inputs[index].write(point.values[index])
        set_local_values(self._forms.solution, solution)
        if multiplier is not None:
            set_local_values(self._multiplier, multiplier)

    def by_input(self, index: int) -> np.ndarray:
        """-(∂F/∂m)ᵀ λ, rank-local; for a Constant or a Real space the sum over all ranks."""
        if index not in self._by_input:
            entry = self._forms.inputs[index]
            form = entry.in_variables(self._weighted)
            self._by_input[index] = [self._derivative_assembler(form, variable) for variable in entry.variables]
        return np.concatenate([_assembled_values(*pair) for pair in self._by_input[index]])

    def by_boundary(self) -> np.ndarray:
        """-(∂F/∂u)ᵀ λ, rank-local, entries at boundary dofs included."""
        return _assembled_values(*self._by_solution)

    @cached_property
    def _by_solution(self) -> tuple:
        return self._derivative_assembler(self._weighted, self._forms.solution)

    def by_mesh(self, mesh) -> Cofunction:
        """The derivative of -F(λ) by the coordinates of a mesh."""
        return assemble(derivative(self._weighted, SpatialCoordinate(mesh), TestFunction(mesh.coordinates.function_space())))

    def in_direction(self, index: int, tangent: np.ndarray) -> np.ndarray:
        """-(∂F/∂m) ṁ, rank-local; entries at boundary dofs are zero."""
        entry = self._forms.inputs[index]
        if index not in self._in_direction:
            directions = [Function(variable.function_space()) for variable in entry.variables]
            form = entry.in_variables(-1*self._residual)
            parts = [derivative(form, *pair) for pair in zip(entry.variables, directions)]
            self._in_direction[index] = self._forms.assembler(expand_derivatives(sum(parts[1:], parts[0]))), directions
        assembler, directions = self._in_direction[index]
        for direction, values in zip(directions, np.split(tangent, len(directions))):
            set_local_values(direction, values)
        return _assembled_values(assembler, self._assembled)

    def in_mesh_direction(self, mesh, tangent: Function) -> np.ndarray:
        """-(∂F/∂X) Ẋ, rank-local, for a direction Ẋ of the coordinates of a mesh."""
        return local_values(assemble(derivative(-1*self._residual, SpatialCoordinate(mesh), tangent)))

    def _derivative_assembler(self, form: ufl.Form, variable: Function) -> tuple:
        form = expand_derivatives(derivative(form, variable))
        tensor = Cofunction(variable.function_space().dual())
        return (None if form.empty() else self._forms.assembler(form, tested_by_solution_space=False)), tensor


def _assembled_values(assembler, tensor: Cofunction) -> np.ndarray:
    if assembler is not None:
        assembler.assemble(tensor=tensor)
    return local_values(tensor)
