"""The derivatives of boundary values, each of them an interpolation that is made once."""

from __future__ import annotations

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

from prdp_fem.problem.boundary_meshes import bound_to_mesh
from prdp_fem.problem.firedrake_internals import extract_subfunction
from prdp_fem.problem.inputs import Input, coefficients_of, local_values, set_local_values

__all__ = ["BoundaryDerivatives", "BoundaryGradient", "BoundaryTangent"]


class BoundaryDerivatives:
    """What differentiates the values that conditions give, condition by condition.

    Parameters
    ----------
    conditions : sequence of DirichletBC
    expressions : sequence of ufl.core.expr.Expr
        Their values, as the user has them.
    over_copies : sequence of ufl.core.expr.Expr
        The same over copies of the inputs.
    inputs : Mapping of int to Input
        By their places.
    meshes : sequence of MeshGeometry
        Those on whose coordinates values depend.
    whole : Function
        Of the space of the problem, to be written to.

    Attributes
    ----------
    bent : set of int
        The inputs that values are not affine in, or affine in with a factor that is another input.
    """

    def __init__(
        self,
        conditions: Sequence[DirichletBC],
        expressions: Sequence,
        over_copies: Sequence,
        inputs: Mapping[int, Input],
        meshes: Sequence,
        whole: Function,
    ):
        self._conditions = conditions
        self._expressions = expressions
        self._over_copies = over_copies
        self._inputs = inputs
        self._coordinates = {mesh: _Coordinates(mesh) for mesh in meshes}
        self._whole = whole
        # The inputs, by their places, and the meshes that there is a direction of.
        self._direction: tuple = ()
        self._kept: dict[Hashable, list] = {}

    @cached_property
    def bent(self) -> set[int]:
        """The inputs that values are not affine in, or only with a factor that is another input."""
        derivatives = [
            _derivative(expression, variable, TestFunction(variable.function_space()))
            for expression in self._in_variables
            for group in map(self._group, [*self._inputs, *self._coordinates])
            for variable in group.variables
        ]
        found = coefficients_of(*derivatives)
        return {
            place
            for place, entry in self._inputs.items()
            if any(variable is other for variable in entry.variables for other in found)
        }

    def first(self, what) -> list[BoundaryGradient]:
        """The derivatives by an input, which is given by its place, or by a mesh."""
        if what not in self._kept:
            self._kept[what] = self._gradients(what, self._in_variables)
        return self._kept[what]

    def second(self, what) -> list[BoundaryGradient]:
        """Those of :meth:`first` in the direction that was set."""
        key = what, *self._direction
        if key not in self._kept:
            self._kept[key] = self._gradients(what, self._in_direction())
        return self._kept[key]

    def set_direction(self, directions: Mapping[int, np.ndarray], meshes: Mapping) -> None:
        """Have a direction: of inputs, by their places, and of meshes; others do not count."""
        for place, values in directions.items():
            self._inputs[place].set_direction(values)
        meshes = {mesh: tangent for mesh, tangent in meshes.items() if mesh in self._coordinates}
        for mesh, tangent in meshes.items():
            self._check_mesh(mesh)
            self._coordinates[mesh].directions[0].assign(tangent, annotate=False)
        self._direction = *sorted(directions), *meshes

    def tangents(self) -> list[BoundaryTangent]:
        """The derivatives in the direction that was set; none where there is no direction."""
        if not self._direction:
            return []
        key = "tangent", *self._direction
        if key not in self._kept:
            self._kept[key] = [
                BoundaryTangent(*part, expression)
                for part, expression in zip(self._parts, self._in_direction())
            ]
        return self._kept[key]

    # What they are made of

    def _group(self, what) -> Input | _Coordinates:
        """What a place, or a mesh, stands for."""
        return self._inputs[what] if isinstance(what, int) else self._coordinates[what]

    @cached_property
    def _parts(self) -> list[tuple[DirichletBC, np.ndarray]]:
        """Of each condition itself and the rank-local dofs that it gives the values of."""
        parts: list[tuple[DirichletBC, np.ndarray]] = []
        later = np.empty(0, dtype=int)
        with stop_annotating():
            for condition in reversed(self._conditions):
                for part in self._whole.dat:
                    part.data_wo[...] = 1.0
                condition.zero(self._whole)
                # Where conditions overlap, the last one gives the value.
                own = np.setdiff1d(np.flatnonzero(local_values(self._whole) == 0.0), later)
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
        for condition, expression in zip(self._conditions, self._over_copies):
            mesh = condition.function_space().mesh().unique()
            expression = expand_derivatives(expression)
            for entry in self._inputs.values():
                expression = entry.in_variables(expression, mesh)
            expressions.append(ufl.replace(expression, coordinates))
        return expressions

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

    def _gradients(self, what, expressions: list) -> list[BoundaryGradient]:
        if not isinstance(what, int):
            self._check_mesh(what)
        group = self._group(what)
        with stop_annotating():
            return [
                BoundaryGradient(*part, expression, group)
                for part, expression in zip(self._parts, expressions)
                if any(variable in coefficients_of(expression) for variable in group.variables)
            ]

    def _check_mesh(self, mesh) -> None:
        """Raise where values depend on a mesh by more than where its points are."""
        for condition, expression in zip(self._conditions, self._expressions):
            bound = bound_to_mesh(condition, expand_derivatives(expression))
            if mesh in bound:
                raise ValueError(
                    f"the boundary values of {condition.function_space().ufl_element()} cannot be"
                    " differentiated by the coordinates of the mesh, since they depend on"
                    f" {bound[mesh]}: interpolate them into a Function of that space first"
                )


class _Coordinates:
    """The coordinates of a mesh, which boundary values depend on as on an :class:`Input`.

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
        if isinstance(expression, classes.Zero):
            return None
        return get_interpolator(interpolate(expression, target))


class BoundaryTangent(_Part):
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


class BoundaryGradient(_Part):
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
