"""Boundary values as a function of the coefficients that they are made from."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property

import numpy as np
import ufl
from firedrake import (
    Cofunction,
    DirichletBC,
    Function,
    SpatialCoordinate,
    TestFunction,
    derivative,
    get_interpolator,
    interpolate,
)
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl import classes
from ufl.algorithms import expand_derivatives
from ufl.corealg.traversal import unique_pre_traversal
from ufl.domain import extract_domains

from prdp_fem.problem.firedrake_internals import (
    boundary_expression,
    extract_subfunction,
    has_taped_number,
)
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import (
    Input,
    coefficients_of,
    is_real,
    local_values,
    name_of,
    set_local_values,
)

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
            controlled = {entry.original for entry in self.inputs.values()}
            self._depends = [
                bool(controlled & set(coefficients_of(expression)))
                for expression in self._expressions
            ]
            depending = [
                expression
                for expression, depends in zip(self._expressions, self._depends)
                if depends
            ]
            # What else is in the same expressions has the values of the forward pass in the
            # backward pass, too.
            self._others = [
                self._input(coefficient)
                for coefficient in coefficients_of(*depending)
                if coefficient not in controlled
            ]
            copies = {
                entry.original: entry.copy for entry in [*self.inputs.values(), *self._others]
            }
            self._over_copies = [
                ufl.replace(expression, copies) for expression in self._expressions
            ]
            self.conditions = []
            for condition, expression, depends in zip(
                self._given, self._over_copies, self._depends
            ):
                if depends:
                    condition = condition.reconstruct(g=expression)
                elif controls is None:
                    # One that the user gives another value to is another one.
                    condition = copy.copy(condition)
                # Others keep the user's values, whatever these are when they are asked for.
                self.conditions.append(condition)
        self.meshes = list(
            dict.fromkeys(
                mesh
                for condition, expression in zip(self._given, self._expressions)
                for mesh in _meshes_of_values(condition, expression)
            )
        )
        self._coordinates = {mesh: _Coordinates(mesh) for mesh in self.meshes}
        # The inputs, by their places, and the meshes that there is a direction of.
        self._direction: tuple = ()
        self._kept: dict[Hashable, list] = {}
        if controls is not None:
            for place in self.inputs:
                self._first(place)

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
        """Rank-local boundary values, zero elsewhere, shape (n,), where :meth:`write` puts the
        inputs.
        """
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
        return self._total(self.inputs[place], self._first(place), cotangent)

    def by_mesh(self, mesh, cotangent: np.ndarray) -> Cofunction:
        """The derivative by the coordinates of a mesh, where the inputs have been written."""
        return self._by_mesh(mesh, self._first(mesh), cotangent)

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
        self._set_direction(directions, meshes)
        if not self._direction:
            return None
        key = "tangent", *self._direction
        with stop_annotating():
            if key not in self._kept:
                self._kept[key] = [
                    _Tangent(*part, expression)
                    for part, expression in zip(self._parts, self._in_direction())
                ]
            out = np.zeros(self.size)
            for part in self._kept[key]:
                part.put(self._values, out)
        return out

    # Second derivatives: the first ones in a direction

    def second_by_input(self, place: int, cotangent: np.ndarray) -> np.ndarray:
        """The derivative of :meth:`by_input` in the direction of the last tangent, the cotangent
        fixed.
        """
        return self._total(self.inputs[place], self._second(place), cotangent)

    def second_by_mesh(self, mesh, cotangent: np.ndarray) -> Cofunction:
        """The derivative of :meth:`by_mesh` in the direction of the last tangent, the cotangent
        fixed.
        """
        return self._by_mesh(mesh, self._second(mesh), cotangent)

    def needs_value(self, place: int) -> bool:
        """Whether derivatives depend on the value of an input."""
        return place in self._bent

    @cached_property
    def _bent(self) -> set[int]:
        """The inputs that values are not affine in, or affine in with a factor that is another
        input.
        """
        derivatives = [
            _derivative(expression, variable, TestFunction(variable.function_space()))
            for expression in self._in_variables
            for group in map(self._group, [*self.inputs, *self._coordinates])
            for variable in group.variables
        ]
        found = coefficients_of(*derivatives)
        return {
            place
            for place, entry in self.inputs.items()
            if any(variable is other for variable in entry.variables for other in found)
        }

    # What they are made of

    def _group(self, what) -> Input | _Coordinates:
        """What a place, or a mesh, stands for."""
        return self.inputs[what] if isinstance(what, int) else self._coordinates[what]

    @cached_property
    def _parts(self) -> list[tuple[DirichletBC, np.ndarray]]:
        """Of each condition itself and the rank-local dofs that it gives the values of."""
        parts: list[tuple[DirichletBC, np.ndarray]] = []
        later = np.empty(0, dtype=int)
        with stop_annotating():
            for condition in reversed(self.conditions):
                for part in self._values.dat:
                    part.data_wo[...] = 1.0
                condition.zero(self._values)
                # Where conditions overlap, the last one gives the value.
                own = np.setdiff1d(np.flatnonzero(local_values(self._values) == 0.0), later)
                parts.insert(0, (condition, own))
                later = np.union1d(later, own)
        return parts

    @cached_property
    def _in_variables(self) -> list:
        """The expressions over all that they can be differentiated by."""
        coordinates = {
            SpatialCoordinate(mesh): group.variables[0] for mesh, group in self._coordinates.items()
        }
        expressions = []
        for condition, expression in zip(self._given, self._over_copies):
            mesh = condition.function_space().mesh().unique()
            expression = expand_derivatives(expression)
            for entry in self.inputs.values():
                expression = entry.in_variables(expression, mesh)
            expressions.append(ufl.replace(expression, coordinates))
        return expressions

    def _set_direction(self, directions: Mapping[int, np.ndarray], meshes: Mapping) -> None:
        for place, values in directions.items():
            self.inputs[place].set_direction(values)
        meshes = {mesh: tangent for mesh, tangent in meshes.items() if mesh in self._coordinates}
        for mesh, tangent in meshes.items():
            self._check_mesh(mesh)
            self._coordinates[mesh].directions[0].assign(tangent, annotate=False)
        self._direction = *sorted(directions), *meshes

    def _in_direction(self) -> list:
        """The derivatives of the expressions in the direction that was set."""
        pairs = [
            pair
            for group in map(self._group, self._direction)
            for pair in zip(group.variables, group.directions)
        ]
        return [
            sum((_derivative(expression, *pair) for pair in pairs), ufl.zero(expression.ufl_shape))
            for expression in self._in_variables
        ]

    def _first(self, what) -> list[_Gradient]:
        if what not in self._kept:
            self._kept[what] = self._gradients(what, self._in_variables)
        return self._kept[what]

    def _second(self, what) -> list[_Gradient]:
        key = what, *self._direction
        if key not in self._kept:
            self._kept[key] = self._gradients(what, self._in_direction())
        return self._kept[key]

    def _gradients(self, what, expressions: list) -> list[_Gradient]:
        if not isinstance(what, int):
            self._check_mesh(what)
        group = self._group(what)
        with stop_annotating():
            return [
                _Gradient(*part, expression, group)
                for part, expression in zip(self._parts, expressions)
                if any(variable in coefficients_of(expression) for variable in group.variables)
            ]

    def _total(self, entry: Input, gradients: list[_Gradient], cotangent: np.ndarray) -> np.ndarray:
        with stop_annotating():
            total = sum(
                (gradient.weighted(self._values, cotangent) for gradient in gradients),
                np.zeros(entry.size * len(entry.meshes)),
            )
        return self.comm.allreduce(entry.summed(total), MPI.SUM) if entry.is_real else total

    def _by_mesh(self, mesh, gradients: list[_Gradient], cotangent: np.ndarray) -> Cofunction:
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

    def _check_mesh(self, mesh) -> None:
        """Refuse to differentiate by a mesh that values depend on by more than where its points
        are.
        """
        for condition, expression in zip(self._given, self._expressions):
            bound = _bound_to_mesh(condition, expand_derivatives(expression))
            if mesh in bound:
                raise ValueError(
                    f"the boundary values of {condition.function_space().ufl_element()} cannot be"
                    " differentiated by the coordinates of the mesh, since they depend on"
                    f" {bound[mesh]}: interpolate them into a Function of that space first"
                )


class _Coordinates:
    """The coordinates of a mesh as something that boundary values depend on, as on an
    :class:`Input`.

    Parameters
    ----------
    mesh : MeshGeometry
    """

    is_real = False
    name = "the coordinates of the mesh"

    def __init__(self, mesh):
        space = mesh.coordinates.function_space()
        with stop_annotating():
            # To UFL the mesh's own Function is the position in space, of which all else is one,
            # too.
            self.variables = [Function(space, val=mesh.coordinates.dat)]
            self.directions = [Function(space)]


class _Part:
    """The values, or a derivative of them, that one condition gives.

    Parameters
    ----------
    condition : DirichletBC
    dofs : numpy.ndarray
        Rank-local dofs of the whole space that this condition gives the values of.
    expression : ufl.core.expr.Expr
        What is interpolated.
    """

    def __init__(self, condition, dofs: np.ndarray, expression):
        space = condition.function_space()
        self._space = space
        self._dofs = dofs
        self._expression = expression
        self._own_space = space if space.parent is None else space.collapse()

    def _interpolator(self, expression, target):
        """What interpolates an expression; None where that is zero."""
        return (
            None
            if isinstance(expression, classes.Zero)
            else get_interpolator(interpolate(expression, target))
        )


class _Tangent(_Part):
    """The derivative of the values of one condition in a direction, which is in the expression."""

    def __init__(self, condition, dofs: np.ndarray, expression):
        super().__init__(condition, dofs, expression)
        self._interpolated = self._interpolator(expression, self._own_space)

    def put(self, whole: Function, out: np.ndarray) -> None:
        """Write it to rank-local values."""
        if self._interpolated is not None:
            whole.dat.zero()
            set_local_values(
                extract_subfunction(whole, self._space), local_values(self._interpolated.assemble())
            )
            out[self._dofs] = local_values(whole)[self._dofs]


class _Gradient(_Part):
    """The derivative of the values of one condition by one input, or by coordinates.

    Parameters
    ----------
    condition, dofs, expression
        As of each part; the expression is over variables.
    group : Input or _Coordinates
        With the variables.
    """

    def __init__(self, condition, dofs: np.ndarray, expression, group):
        super().__init__(condition, dofs, expression)
        self._is_real, self._name = group.is_real, group.name
        self._probe: Function | None = None
        self._is_identity = not group.is_real and expression is group.variables[0]
        if self._is_identity:
            return
        self._cotangent = Cofunction(self._own_space.dual())
        try:
            if group.is_real:
                # One interpolation in the direction of each component.
                ones = [Function(variable.function_space()) for variable in group.variables]
                for one in ones:
                    one.dat.data_wo[...] = 1.0
                self._tangents = [
                    self._interpolator(_derivative(expression, *pair), self._own_space)
                    for pair in zip(group.variables, ones)
                ]
                for tangent in filter(None, self._tangents):
                    tangent.assemble()
            else:
                (variable,) = group.variables
                test = TestFunction(variable.function_space())
                self._adjoint = self._interpolator(
                    _derivative(expression, variable, test), self._cotangent
                )
                self._zero = np.zeros(local_values(variable).size)
                if self._adjoint is not None:
                    self._adjoint.assemble()
                    if _may_jump(self._own_space, expression):
                        self._make_probe(expression, variable)
        except Exception as error:  # whatever UFL, TSFC or the element raise
            raise ValueError(
                f"the boundary values made from '{group.name}' cannot be differentiated by it, so"
                f" it cannot be a control: {error}"
            ) from error

    def weighted(self, whole: Function, cotangent: np.ndarray) -> np.ndarray:
        """The derivative weighted by a cotangent of the boundary values; rank-local sums where the
        input is Real.
        """
        own = np.zeros_like(cotangent)
        own[self._dofs] = cotangent[self._dofs]
        set_local_values(whole, own)
        own = local_values(extract_subfunction(whole, self._space))
        if self._is_identity:
            return own
        if self._is_real:
            return np.array(
                [
                    0.0 if tangent is None else own @ local_values(tangent.assemble())
                    for tangent in self._tangents
                ]
            )
        if self._adjoint is None:
            return self._zero
        set_local_values(self._cotangent, own)
        gradient = local_values(self._adjoint.assemble())
        if self._probe is not None:
            self._check_transpose(own, gradient)
        return gradient

    def _make_probe(self, expression, variable: Function) -> None:
        self._probe = Function(variable.function_space())
        size = local_values(self._probe).size
        set_local_values(self._probe, np.random.default_rng(1).standard_normal(size))
        along = _derivative(expression, variable, self._probe)
        self._along_probe = get_interpolator(interpolate(along, self._own_space))

    def _check_transpose(self, cotangent: np.ndarray, gradient: np.ndarray) -> None:
        """Refuse a gradient that is not one of the values. Collective.

        At a node these are of one of its cells, and the gradient is of all.
        """
        along = cotangent * local_values(self._along_probe.assemble())
        sums = np.array([along.sum() - gradient @ local_values(self._probe), np.abs(along).sum()])
        difference, size = self._space.mesh().comm.allreduce(sums, MPI.SUM)
        if abs(difference) > 1e-8 * size:
            raise ValueError(
                f"the boundary values made from '{self._name}' jump where cells meet, and a "
                "DirichletBC takes those of one of the cells, which Firedrake's interpolation does "
                "not differentiate: project them into a Function of the condition's space first"
            )


def _may_jump(space, expression) -> bool:
    """Whether an expression may have several values at a node of a space that cells share."""
    element = space.ufl_element()
    if element not in ufl.HDiv and element not in ufl.HCurl:  # as those of H1 are
        return False

    def may(node) -> bool:
        if isinstance(node, Function):
            return node.function_space().ufl_element() not in ufl.H1
        is_geometric = isinstance(node, classes.GeometricQuantity)
        return isinstance(node, classes.Derivative) or (
            is_geometric and not isinstance(node, classes.SpatialCoordinate)
        )

    return any(map(may, unique_pre_traversal(expression)))


def _derivative(expression, variable: Function, direction):
    return expand_derivatives(derivative(expression, variable, direction))


def _bound_to_mesh(condition, expression) -> dict:
    """The meshes that values depend on by more than where the points of the mesh are, each with
    what by.

    Parameters
    ----------
    condition : DirichletBC
    expression : ufl.core.expr.Expr
        Its values, with derivatives expanded.
    """
    space = condition.function_space()
    own = space.mesh().unique()
    bound: dict = {}
    if isinstance(expression, classes.Zero) or _holds_dofs(condition, expression):
        return bound
    if not space.ufl_element().pullback.is_identity:
        bound[own] = "the map from the reference cell"
    for node in unique_pre_traversal(expression):
        if isinstance(node, (classes.GeometricQuantity, classes.Derivative)):
            if not isinstance(node, classes.SpatialCoordinate) or extract_domains(node) != (own,):
                bound |= dict.fromkeys(extract_domains(node), f"its {type(node).__name__}")
        elif isinstance(node, Function) and not is_real(node):
            mesh = node.function_space().mesh()
            if mesh.unique() is not own or not node.ufl_element().pullback.is_identity:
                bound |= dict.fromkeys([own, *mesh], f"how '{name_of(node)}' is evaluated")
    return bound


def _holds_dofs(condition, expression) -> bool:
    """Whether values are those of a Function as they are, wherever the mesh is."""
    return (
        isinstance(expression, Function)
        and not is_real(expression)
        and expression.function_space() == condition.function_space()
    )


def _meshes_of_values(condition, expression) -> list:
    """The meshes on whose coordinates the values of a condition depend."""
    expression = expand_derivatives(expression)
    own = [
        mesh
        for node in unique_pre_traversal(expression)
        if isinstance(node, classes.SpatialCoordinate)
        for mesh in extract_domains(node)
    ]
    return list(dict.fromkeys([*own, *_bound_to_mesh(condition, expression)]))
