"""How boundary values depend on meshes: by where their points are, or by more than that."""

from __future__ import annotations

from firedrake import Function
from ufl import classes
from ufl.algorithms import expand_derivatives
from ufl.corealg.traversal import unique_pre_traversal
from ufl.domain import extract_domains

from prdp_fem.problem.inputs import is_real, name_of

__all__ = ["bound_to_mesh", "meshes_of_values"]


def bound_to_mesh(condition, expression) -> dict:
    """The meshes that values depend on by more than where their points are, each with what by.

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


def meshes_of_values(condition, expression) -> list:
    """The meshes on whose coordinates the values of a condition depend."""
    expression = expand_derivatives(expression)
    own = [
        mesh
        for node in unique_pre_traversal(expression)
        if isinstance(node, classes.SpatialCoordinate)
        for mesh in extract_domains(node)
    ]
    return list(dict.fromkeys([*own, *bound_to_mesh(condition, expression)]))
