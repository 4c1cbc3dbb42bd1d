"""Boundary values as a function of the coefficients that they are made from."""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import ufl
from firedrake import Cofunction, Function, TestFunction, derivative, get_interpolator, interpolate
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from prdp_fem.firedrake_internals import boundary_expression, extract_subfunction
from prdp_fem.forms import Forms
from prdp_fem.inputs import Input, coefficients_of, local_values, set_local_values

__all__ = ["BoundaryData"]


class BoundaryData:
    """The values that the Dirichlet conditions of a problem give, and their derivatives, by some of the coefficients in them.

    Parameters
    ----------
    forms : Forms
        Of the problem.
    controls : sequence of Function or Constant
        The user's coefficients; those that give no boundary values are left out.

    Attributes
    ----------
    inputs : dict of int to Input
        The controls that boundary values depend on, by their places.
    size : int
        Rank-local dofs of the solution.
    """

    def __init__(self, forms: Forms, controls: Sequence):
        conditions = forms.problem_conditions
        space = forms.solution.function_space()
        mesh = space.mesh()
        self._comm = space.mesh().comm
        with stop_annotating():
            self._values = Function(space)
            self.size = local_values(self._values).size
            in_conditions = coefficients_of(*map(boundary_expression, conditions))
            self.inputs = {place: Input(control, mesh) for place, control in enumerate(controls)
                           if any(control is coefficient for coefficient in in_conditions)}
            controlled = {entry.original for entry in self.inputs.values()}
            depending = [condition for condition in conditions if controlled & set(coefficients_of(boundary_expression(condition)))]
            # What else is in the same expressions has the values of the forward pass in the backward pass, too.
            self._others = [Input(coefficient, mesh) for coefficient in coefficients_of(*map(boundary_expression, depending))
                            if coefficient not in controlled]
            copies = {entry.original: entry.copy for entry in [*self.inputs.values(), *self._others]}
            # Conditions that do not depend on a control keep the user's values, whatever these are when they are asked for.
            self._conditions = [condition.reconstruct(g=ufl.replace(boundary_expression(condition), copies))
                                if condition in depending else condition for condition in conditions]
            dofs, later = [], np.empty(0, dtype=int)
            for condition in reversed(self._conditions):
                # Where conditions overlap, the last one gives the value.
                dofs.insert(0, np.setdiff1d(self._dofs(condition), later))
                later = np.union1d(later, dofs[0])
            self._derivatives = {place: [_ConditionDerivative(condition, entry, own)
                                         for condition, own in zip(self._conditions, dofs)
                                         if entry.copy in coefficients_of(boundary_expression(condition))]
                                 for place, entry in self.inputs.items()}

    def _dofs(self, condition) -> np.ndarray:
        for part in self._values.dat:
            part.data_wo[...] = 1.0
        condition.zero(self._values)
        return np.flatnonzero(local_values(self._values) == 0.0)

    def others(self) -> list[np.ndarray]:
        """The present values of the coefficients that are no controls, in expressions that have controls, too."""
        return [local_values(entry.original) for entry in self._others]

    def _write(self, values: Mapping[int, np.ndarray], others: Sequence[np.ndarray]) -> None:
        for place, entry in self.inputs.items():
            entry.write(values[place])
        for entry, other in zip(self._others, others):
            entry.write(other)

    def values(self, values: Mapping[int, np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
        """Rank-local boundary values, zero elsewhere, shape (n,).

        Parameters
        ----------
        values : Mapping of int to numpy.ndarray
            Rank-local values of the inputs.
        others : sequence of numpy.ndarray
            What :meth:`others` gave.
        """
        with stop_annotating():
            self._write(values, others)
            self._values.dat.zero()
            for condition in self._conditions:
                condition.apply(self._values)
        return local_values(self._values)

    def gradient(self, place: int, values: Mapping[int, np.ndarray], others: Sequence[np.ndarray], cotangent: np.ndarray) -> np.ndarray:
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
        entry = self.inputs[place]
        with stop_annotating():
            self._write(values, others)
            total = sum(derivative.weighted(self._values, cotangent) for derivative in self._derivatives[place])
        return self._comm.allreduce(total, MPI.SUM) if entry.is_real else total


class _ConditionDerivative:
    """The derivative of the values of one condition by one input.

    Parameters
    ----------
    condition : DirichletBC
        Over the copy of the input.
    entry : Input
    dofs : numpy.ndarray
        Rank-local dofs of the whole space that this condition gives the values of.
    """

    def __init__(self, condition, entry: Input, dofs: np.ndarray):
        self._space, self._entry, self._dofs = condition.function_space(), entry, dofs
        expression = boundary_expression(condition)
        own_space = self._space if self._space.parent is None else self._space.collapse()
        self._is_identity = expression is entry.copy and not entry.is_real
        self._cotangent = Cofunction(own_space.dual())
        if self._is_identity:
            return
        try:
            if entry.is_real:
                # One interpolation in the direction of each component.
                expression = entry.in_variables(expression)
                self._tangents = []
                for variable in entry.variables:
                    direction = Function(variable.function_space())
                    direction.dat.data_wo[...] = 1.0
                    tangent = interpolate(derivative(expression, variable, direction), own_space)
                    self._tangents.append(get_interpolator(tangent))
                self._tangents[0].assemble()
            else:
                test = TestFunction(entry.copy.function_space())
                self._adjoint = get_interpolator(interpolate(derivative(expression, entry.copy, test), self._cotangent))
                self._adjoint.assemble()
        except Exception as error:  # whatever UFL, TSFC or the element raise
            raise ValueError(f"the boundary values made from '{entry.name}' cannot be differentiated by it, so it cannot be a control: "
                             f"{error}") from error

    def weighted(self, whole: Function, cotangent: np.ndarray) -> np.ndarray:
        """The derivative weighted by a cotangent of the boundary values; rank-local sums where the input is Real."""
        own = np.zeros_like(cotangent)
        own[self._dofs] = cotangent[self._dofs]
        set_local_values(whole, own)
        own = local_values(extract_subfunction(whole, self._space))
        if self._is_identity:
            return own
        if self._entry.is_real:
            return np.array([own @ local_values(tangent.assemble()) for tangent in self._tangents])
        set_local_values(self._cotangent, own)
        return local_values(self._adjoint.assemble())
