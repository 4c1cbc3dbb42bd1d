"""What stands for the controls of a solver, and which outputs are asked of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import ufl
from firedrake import Cofunction, Constant, Function

from prdp_fem.bridge.samples import Samples
from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.firedrake_internals import boundary_expression
from prdp_fem.problem.inputs import coefficients_of, local_values, set_local_values
from prdp_fem.ranks.agreement import agree
from prdp_fem.solvers import RefinedSolver

__all__ = ["Controls", "dofs_of_component"]


class Controls:
    """Controls of a solver: inputs of its problem, what its boundary values are made of, its guess.

    Parameters
    ----------
    solver : RefinedSolver
    controls : sequence of Function, Constant or Cofunction
    outputs : sequence
        What is to be made of solutions: None or the solution itself, a component of it, or a form.

    Attributes
    ----------
    coefficients : list of Function, Constant or Cofunction
        The controls.
    sizes : list of int
        The rank-local number of values of each.
    boundary : BoundaryData
        Those that boundary values depend on.
    guess : int or None
        The place of the guess among the controls; None where it is none of them.
    places : list of int
        The places of those that are inputs.
    samples : Samples
        Solves by these inputs.

    Raises
    ------
    TypeError, ValueError
        For controls and outputs that make no sense; on all ranks, where they make none on one, or
        are others there.
    """

    def __init__(self, solver: RefinedSolver, controls: Sequence, outputs: Sequence):
        system, solution = solver.system, solver.problem.u

        def look() -> list[str]:
            """What ranks must have alike, where it makes sense on this one."""
            self.coefficients = _checked(controls)
            if not outputs:
                raise ValueError("output must name at least one thing to return, found none")
            return [
                *(_place_in_words(solver, control) for control in self.coefficients),
                *(_output_in_words(part, solution) for part in outputs),
            ]

        agree(system.comm, look, "controls and outputs of a layer")
        self.sizes = [local_values(control).size for control in self.coefficients]
        self.boundary = BoundaryData(system.forms, self.coefficients)
        self.guess = None
        if solver.warm_start:
            self.guess = self.find(solution)
        self.places: list[int] = []
        indices: list[int] = []
        for place, control in enumerate(self.coefficients):
            is_other = place == self.guess or place in self.boundary.inputs
            if is_other and not system.forms.depends_on(control):
                continue
            index = system.forms.find(control)
            system.derivative.check(index)
            self.places.append(place)
            indices.append(index)
        self.samples = Samples(solver, indices, gives_boundary=bool(self.boundary.inputs))

    def find(self, coefficient) -> int | None:
        """The place of a coefficient among the controls; None where it is none."""
        return next(
            (place for place, one in enumerate(self.coefficients) if one is coefficient), None
        )


def _checked(controls) -> list:
    if isinstance(controls, (Function, Constant, Cofunction)):
        raise TypeError("controls must be a sequence, found a single one: write controls=[…]")
    if not isinstance(controls, Iterable) or isinstance(controls, (str, Mapping)):
        raise TypeError(
            "controls must be a sequence of Functions, Constants and Cofunctions, "
            f"found {controls!r}"
        )
    controls = list(controls)
    if not controls:
        raise ValueError("controls must name at least one coefficient of the problem, found none")
    for control in controls:
        if not isinstance(control, (Function, Constant, Cofunction)):
            raise TypeError(
                "a control must be a Function, Constant or Cofunction, found a "
                f"{type(control).__name__}"
            )
    if len({id(control) for control in controls}) < len(controls):
        raise ValueError("controls must be named once each")
    return controls


def _place_in_words(solver: RefinedSolver, control) -> str:
    """Which of what a solve depends on a control is; names may differ between ranks."""
    forms = solver.system.forms
    if not forms.depends_on(control):
        if solver.warm_start and control is solver.problem.u:
            return "the guess"
        in_boundary = coefficients_of(*map(boundary_expression, forms.problem_conditions))
        for place, coefficient in enumerate(in_boundary):
            if coefficient is control:
                return f"coefficient {place} of the boundary values"
    return f"coefficient {forms.find(control)}"


def _output_in_words(output, solution: Function) -> str:
    """Which output is to be returned, without the names that Firedrake has chosen."""
    if output is None or output is solution:
        return "the solution"
    if isinstance(output, ufl.Form):
        return "a functional"
    if isinstance(output, Function):
        path = _path_to(solution, output)
        if path is None:
            raise ValueError(
                f"Function '{output.name()}' is no component of the solution "
                f"'{solution.name()}': name one as u.sub(1), or put what else you want "
                "into a functional"
            )
        return f"component {path}"
    raise TypeError(
        "an output must be the solution, a component of it as u.sub(1), or a form "
        f"without arguments, found a {type(output).__name__}"
    )


def dofs_of_component(solution: Function, component: Function) -> np.ndarray:
    """The rank-local dofs of the solution that are those of a component of it."""
    numbered = Function(solution.function_space())
    set_local_values(numbered, np.arange(local_values(numbered).size, dtype=float))
    for index in _path_to(solution, component) or ():
        numbered = numbered.sub(index)
    return local_values(numbered).astype(np.int64)


def _path_to(function: Function, component: Function) -> list[int] | None:
    if function is component:
        return []
    space = function.function_space()
    parts = len(space) if len(space) > 1 else space.block_size
    for index in range(parts if parts > 1 else 0):
        path = _path_to(function.sub(index), component)
        if path is not None:
            return [index, *path]
    return None
