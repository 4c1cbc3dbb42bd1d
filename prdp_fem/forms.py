"""A linear variational problem taken apart: its two sides, what they depend on, and where boundary values are prescribed."""
from __future__ import annotations

from functools import cached_property
from numbers import Real

import numpy as np
import ufl
from firedrake import Cofunction, DirichletBC, Function, LinearVariationalProblem, action, adjoint
from firedrake.assemble import get_assembler
from firedrake.matrix import MatrixBase
from firedrake.slate.slate import TensorBase
from firedrake.ufl_expr import extract_domains
from pyadjoint.tape import stop_annotating

from prdp_fem.firedrake_internals import boundary_expression, pin_quadrature
from prdp_fem.inputs import Input, coefficients_of, local_values, name_of

__all__ = ["LinearForms"]


class LinearForms:
    """The forms of a linear problem taken apart, over copies of its coefficients.

    Parameters
    ----------
    problem : LinearVariationalProblem
        The user's.

    Attributes
    ----------
    inputs : list of Input
        All that the solution depends on, boundary values and the mesh apart.
    problem : NonlinearVariationalProblem
        The same problem over the copies, for Firedrake's solver.
    a, L : ufl.Form
        The two sides over the copies; ``L`` is None where it is empty. Neither contains the solution.
    cofunctions : dict of Input to float
        The Cofunctions in the right-hand side, with their weights.
    """

    def __init__(self, problem: LinearVariationalProblem):
        if not problem.is_linear:
            raise TypeError("LinearVariationalSolver solves a LinearVariationalProblem (a == L), found a nonlinear one (F == 0): "
                            "state it as LinearVariationalProblem(a, L, u, bcs)")
        if isinstance(problem.J, (TensorBase, MatrixBase)) or not isinstance(problem.J, ufl.Form):
            raise TypeError(f"the bilinear form must be a UFL form, found a {type(problem.J).__name__}: prdp_fem differentiates "
                            "forms, and cannot look into assembled matrices or Slate tensors")
        if problem.restrict:
            raise ValueError("restrict=True is not needed here, and not supported: boundary rows are folded out of the system "
                             "already; leave it away")
        for condition in problem.bcs:
            if not isinstance(condition, DirichletBC):
                raise TypeError(f"boundary conditions must be DirichletBCs, found a {type(condition).__name__}: "
                                "put other conditions into the forms")
        self.problem_conditions = list(problem.bcs)
        form, cofunctions = _split_residual(problem.F)
        right = _right_hand_side(form, problem)
        mesh = problem.u.function_space().mesh().unique()
        operator = coefficients_of(problem.J, problem.Jp)
        if problem.u in operator:
            raise TypeError(f"the bilinear form depends on the solution '{problem.u.name()}', so the problem is not linear: keep a lagged "
                            "value in a Function of its own, or state a NonlinearVariationalProblem")
        originals = coefficients_of(right, problem.J, problem.Jp)
        originals += [cofunction for cofunction, _ in cofunctions if cofunction not in originals]
        self.inputs = [Input(original, mesh) for original in originals]
        mapping = {entry.original: entry.copy for entry in self.inputs}
        for entry in self.inputs:
            entry.in_operator = entry.original in operator
        with stop_annotating():
            self.solution = Function(problem.u.function_space(), name=problem.u.name())
            self.problem = problem.rediscretise(u=self.solution, coefficient_mapping=mapping)
            parameters = problem.form_compiler_parameters
            self.a = pin_quadrature(self.problem.J, parameters)
            self.L = None if right is None else pin_quadrature(ufl.replace(right, mapping), parameters)
        self.cofunctions = {self.inputs[originals.index(cofunction)]: sum(weight for other, weight in cofunctions if other is cofunction)
                            for cofunction, _ in cofunctions}

    def find(self, original) -> int:
        """The place of a user's coefficient among the inputs.

        Raises
        ------
        ValueError
            Where the problem does not depend on it, or depends on it by boundary values.
        """
        name = name_of(original)
        if any(original in coefficients_of(boundary_expression(condition)) for condition in self.problem_conditions):
            raise ValueError(f"{type(original).__name__} '{name}' gives boundary values, which cannot be controls of a layer: "
                             "differentiate by them on pyadjoint's tape")
        for index, entry in enumerate(self.inputs):
            if entry.original is original:
                return index
        known = ", ".join(f"{type(entry.original).__name__} '{entry.name}'" for entry in self.inputs) or "no coefficient at all"
        raise ValueError(f"the problem does not depend on {type(original).__name__} '{name}'; it depends on {known}")

    @cached_property
    def meshes(self) -> list:
        """The meshes that are integrated over."""
        return list(dict.fromkeys(mesh for form in (self.a, self.L) if form is not None for mesh in extract_domains(form)))

    @cached_property
    def boundary_dofs(self) -> np.ndarray:
        """Rank-local indices, among the dofs this rank owns, of those with Dirichlet values."""
        with stop_annotating():
            mask = Function(self.solution.function_space())
            for part in mask.dat:
                part.data_wo[...] = 1.0
            for condition in self.problem.bcs:
                condition.zero(mask)
        return np.flatnonzero(local_values(mask) == 0.0)

    def indices(self, copies) -> set[int]:
        """The places of copies among the inputs."""
        return {index for index, entry in enumerate(self.inputs) if any(entry.copy is copy for copy in copies)}

    def assembler(self, form: ufl.Form, *, tested_by_solution_space: bool = True):
        """An assembler that is to be kept; entries at boundary dofs are zero where the form's test space is the solution's."""
        if not tested_by_solution_space:
            return get_assembler(form, form_compiler_parameters=self.problem.form_compiler_parameters)
        return get_assembler(form, bcs=self._homogeneous_conditions(), zero_bc_nodes=True,
                             form_compiler_parameters=self.problem.form_compiler_parameters)

    def adjoint_problem(self) -> LinearVariationalProblem:
        """The problem of the adjoint operator, over the same copies."""
        space = self.solution.function_space()
        return LinearVariationalProblem(adjoint(self.problem.J), Cofunction(space.dual()), Function(space),
                                        bcs=self._homogeneous_conditions(),
                                        aP=None if self.problem.Jp is None else adjoint(self.problem.Jp),
                                        form_compiler_parameters=self.problem.form_compiler_parameters)

    def _homogeneous_conditions(self) -> list[DirichletBC]:
        return [condition.reconstruct(g=0) for condition in self.problem.bcs]

    def copy_of(self, value):
        """The copy that stands for a user's coefficient; any other object is its own."""
        for entry in self.inputs:
            if entry.original is value:
                return entry.copy
        return value


def _split_residual(F) -> tuple[ufl.Form | None, list[tuple[Cofunction, float]]]:
    """A residual as one form and the Cofunctions, with weights, that were subtracted from it."""
    if isinstance(F, ufl.Form):
        return F, []
    form, cofunctions = None, []
    components = zip(F.components(), F.weights()) if isinstance(F, ufl.FormSum) else [(F, 1)]
    for component, weight in components:
        if isinstance(component, ufl.Form):
            component = component if weight == 1 else weight*component
            form = component if form is None else form + component
        elif isinstance(component, Cofunction):
            if not isinstance(weight, Real):
                raise TypeError(f"the weight of Cofunction '{component.name()}' in the right-hand side must be a number, found {weight!r}: "
                                "put it into the form that the Cofunction is assembled from")
            cofunctions.append((component, -float(weight)))
        else:
            raise TypeError(f"the right-hand side must be made of UFL forms and Cofunctions, found a {type(component).__name__}: "
                            "assemble it into a Cofunction first")
    return form, cofunctions


def _right_hand_side(residual: ufl.Form | None, problem) -> ufl.Form | None:
    """L of the residual a(u, ·) - L: what is left when the integrals of the action of a are taken away."""
    remaining = [] if residual is None else list(residual.integrals())
    identities = [_identity(integral) for integral in remaining]
    for integral in action(problem.J, problem.u).integrals():
        try:
            place = identities.index(_identity(integral))
        except ValueError:
            raise TypeError("the residual of the problem is not a(u, v) - L(v) with its bilinear form a: state the problem as "
                            "LinearVariationalProblem(a, L, u, bcs)") from None
        del identities[place], remaining[place]
    return -1*ufl.Form(remaining) if remaining else None


def _identity(integral) -> tuple:
    """Equal for integrals that are equal up to the names of their summation indices."""
    form = ufl.Form([integral])
    return form.signature(), form.coefficients(), tuple(coefficients_of(form))
