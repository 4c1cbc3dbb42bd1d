"""A variational problem taken apart: its forms, their inputs, and where boundary values are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from numbers import Real

import numpy as np
import ufl
from firedrake import (
    Cofunction,
    Constant,
    DirichletBC,
    Function,
    LinearVariationalProblem,
    action,
    adjoint,
    derivative,
)
from firedrake.assemble import get_assembler
from firedrake.matrix import MatrixBase
from firedrake.slate.slate import TensorBase
from firedrake.ufl_expr import extract_domains
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from prdp_fem.problem.firedrake_internals import (
    assemble_into,
    boundary_expression,
    extract_subfunction,
    pin_quadrature,
)
from prdp_fem.problem.inputs import Input, coefficients_of, local_values, name_of

__all__ = [
    "Forms",
    "LinearForms",
    "NonlinearForms",
    "assembled_values",
    "derivative_of",
    "integration_meshes",
]


class Forms:
    """The forms of a problem taken apart, over copies of its coefficients.

    Parameters
    ----------
    problem : NonlinearVariationalProblem
        The user's.
    right : ufl.Form or None
        What of the residual depends on coefficients.
    cofunctions : list of (Cofunction, float)
        What else was subtracted from it, with weights.
    operators : sequence of ufl.Form
        The operator of linear solves, and what it is preconditioned by.
    unknown : Function or None
        What the forms are solved for, where they depend on it.
    others : sequence of Function or Constant
        What else the preconditioner depends on.

    Attributes
    ----------
    inputs : list of Input
        All that the solution depends on, boundary values, the guess and the mesh apart.
    problem : NonlinearVariationalProblem
        The same problem over the copies, for Firedrake's solver.
    solution : Function
        The state, in forms that depend on it.
    boundary : Function
        Where the Dirichlet conditions of ``problem`` have their values from.
    residual : ufl.Form or None
        F(u; v) over the copies and ``solution``, Cofunctions left out.
    jacobian : ufl.Form
        Its derivative by the solution.
    operator_depends_on_solution : bool
    cofunctions : dict of Input to float
        The Cofunctions in the right-hand side, with their weights.
    others : set of int
        The inputs that the preconditioner depends on beside its form.
    """

    residual: ufl.Form
    jacobian: ufl.Form
    operator_depends_on_solution: bool

    def __init__(
        self,
        problem,
        form: ufl.Form | None,
        cofunctions: list,
        operators: list,
        *,
        unknown: Function | None = None,
        others: Sequence = (),
    ):
        self.problem_conditions = list(problem.bcs)
        self._unknown = problem.u
        in_operator = [*coefficients_of(*operators), *others]
        originals = [
            original for original in coefficients_of(form, *operators) if original is not unknown
        ]
        originals += [cofunction for cofunction, _ in cofunctions if cofunction not in originals]
        originals += [other for other in others if other is not unknown and other not in originals]
        meshes = integration_meshes(form, *operators)
        self.inputs = [Input(original, meshes) for original in originals]
        self._copies = {entry.original: entry.copy for entry in self.inputs}
        for entry in self.inputs:
            entry.in_operator = entry.original in in_operator
        self.others = {
            index
            for index, entry in enumerate(self.inputs)
            if any(entry.original is other for other in others)
        }
        self.cofunctions = {}
        for cofunction, _ in cofunctions:
            weights = [weight for other, weight in cofunctions if other is cofunction]
            self.cofunctions[self.inputs[originals.index(cofunction)]] = sum(weights)
        with stop_annotating():
            space = problem.u.function_space()
            self.solution = Function(space, name=problem.u.name())
            self.boundary = Function(space)
            conditions = []
            for condition in problem.bcs:
                values = extract_subfunction(self.boundary, condition.function_space())
                conditions.append(condition.reconstruct(g=values))
            self.problem = problem.rediscretise(
                u=self.solution, bcs=conditions, coefficient_mapping=self._copies
            )

    def depends_on(self, original) -> bool:
        """Whether a user's coefficient is among the inputs."""
        return any(entry.original is original for entry in self.inputs)

    def find(self, original) -> int:
        """The place of a user's coefficient among the inputs.

        Raises
        ------
        ValueError
            Where the problem does not depend on it, or depends on it by the mesh.
        """
        name = f"{type(original).__name__} '{name_of(original)}'"
        for index, entry in enumerate(self.inputs):
            if entry.original is original:
                return index
        for mesh in {
            *self.meshes,
            *(mesh for entry in self.inputs for mesh in meshes_of(entry.original)),
        }:
            if (
                original is mesh.coordinates
                or getattr(original, "dat", None) is mesh.coordinates.dat
            ):
                raise ValueError(
                    f"{name} holds the coordinates of a mesh of the problem, which cannot be"
                    " controls of a layer: differentiate by them on pyadjoint's tape"
                )
        in_boundary = [
            coefficient
            for coefficient in coefficients_of(*map(boundary_expression, self.problem_conditions))
            if not self.depends_on(coefficient)
        ]
        known = (
            ", ".join(
                f"{type(coefficient).__name__} '{name_of(coefficient)}'"
                for coefficient in [*(entry.original for entry in self.inputs), *in_boundary]
            )
            or "no coefficient at all"
        )
        raise ValueError(f"the problem does not depend on {name}; it depends on {known}")

    @cached_property
    def meshes(self) -> list:
        """The meshes that are integrated over."""
        found: dict = {}
        for form in (self.jacobian, self.residual):
            if form is not None:
                found |= dict.fromkeys(extract_domains(form))
        return list(found)

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

    def put_boundary(self, values: np.ndarray, boundary: np.ndarray | None) -> None:
        """Write boundary values, None for zero, to the boundary dofs of rank-local values."""
        values[self.boundary_dofs] = 0.0
        if boundary is not None:
            values += boundary

    def indices(self, copies) -> set[int]:
        """The places of copies among the inputs."""
        return {
            index
            for index, entry in enumerate(self.inputs)
            if any(entry.copy is copy for copy in copies)
        }

    def assembler(self, form: ufl.Form, *, tested_by_solution_space: bool = True):
        """An assembler that is to be kept; entries at boundary dofs are zero where the form's test
        space is the solution's.
        """
        if not tested_by_solution_space:
            return get_assembler(
                form, form_compiler_parameters=self.problem.form_compiler_parameters
            )
        return get_assembler(
            form,
            bcs=self.homogeneous_conditions(),
            zero_bc_nodes=True,
            form_compiler_parameters=self.problem.form_compiler_parameters,
        )

    def dual_assembler(self, form: ufl.Form, variable: Function) -> tuple:
        """What :func:`assembled_values` takes for a linear form tested by a variable's space."""
        tensor = Cofunction(variable.function_space().dual())
        return (
            None if form.empty() else self.assembler(form, tested_by_solution_space=False)
        ), tensor

    def linearised_problem(self) -> LinearVariationalProblem:
        """The problem of a step from the state, over the same copies."""
        return self._linear_problem(self.jacobian, self.problem.Jp)

    def adjoint_problem(self) -> LinearVariationalProblem:
        """The problem of the adjoint operator, over the same copies."""
        return self._linear_problem(
            adjoint(self.jacobian), None if self.problem.Jp is None else adjoint(self.problem.Jp)
        )

    def _linear_problem(self, a, aP) -> LinearVariationalProblem:
        space = self.solution.function_space()
        return LinearVariationalProblem(
            a,
            Cofunction(space.dual()),
            Function(space),
            bcs=self.homogeneous_conditions(),
            aP=aP,
            form_compiler_parameters=self.problem.form_compiler_parameters,
        )

    def homogeneous_conditions(self) -> list[DirichletBC]:
        """The problem's conditions with values of zero."""
        return [condition.reconstruct(g=0) for condition in self.problem.bcs]

    def over_copies(self, form: ufl.Form) -> ufl.Form:
        """A form over the user's coefficients, with the quadrature that assembling it would choose,
        over the copies.
        """
        return pin_quadrature(
            ufl.replace(form, self._copies), self.problem.form_compiler_parameters
        )

    def copy_of(self, value):
        """What stands for a user's coefficient, or for an expression of some."""
        return ufl.replace(value, self._standing)

    @cached_property
    def _standing(self) -> dict:
        """The copies, and the state, by the user's coefficients that they stand for."""
        return {self._unknown: self.solution, **self._copies}


class LinearForms(Forms):
    """The forms of a(u, v) = L(v).

    Parameters
    ----------
    problem : LinearVariationalProblem
        The user's.
    others : sequence of Function or Constant
        What else the preconditioner depends on.

    Attributes
    ----------
    a, L : ufl.Form
        The two sides over the copies; ``L`` is None where it is empty. Neither contains the
        solution.
    """

    operator_depends_on_solution = False

    def __init__(self, problem: LinearVariationalProblem, others: Sequence = ()):
        if not problem.is_linear:
            raise TypeError(
                "LinearVariationalSolver solves a LinearVariationalProblem (a == L), found a"
                " nonlinear one (F == 0): state it as LinearVariationalProblem(a, L, u, bcs), or"
                " use a NonlinearVariationalSolver"
            )
        _refuse_what_is_no_form(problem.J)
        _check_conditions(problem)
        form, cofunctions = _split_residual(problem.F)
        right = _right_hand_side(form, problem)
        if problem.u in coefficients_of(problem.J, problem.Jp):
            raise TypeError(
                f"the bilinear form depends on the solution '{problem.u.name()}', so the problem is"
                " not linear: keep a lagged value in a Function of its own, or state a"
                " NonlinearVariationalProblem"
            )
        super().__init__(problem, right, cofunctions, [problem.J, problem.Jp], others=others)
        with stop_annotating():
            self.a = pin_quadrature(self.problem.J, problem.form_compiler_parameters)
            self.L = None if right is None else self.over_copies(right)

    @property
    def jacobian(self) -> ufl.Form:  # type: ignore[override]
        return self.a

    @cached_property
    def residual(self) -> ufl.Form:  # type: ignore[override]
        F = action(self.a, self.solution)
        return F if self.L is None else F - self.L


class NonlinearForms(Forms):
    """The forms of F(u; v) = 0.

    Parameters
    ----------
    problem : NonlinearVariationalProblem
        The user's.
    others : sequence of Function or Constant
        What else the preconditioner depends on.

    Raises
    ------
    TypeError
        Where UFL cannot differentiate the residual by the solution.
    """

    operator_depends_on_solution = True

    def __init__(self, problem, others: Sequence = ()):
        for form in (problem.J, problem.F):
            _refuse_what_is_no_form(form)
        _check_conditions(problem)
        form, cofunctions = _split_residual(problem.F)
        if form is None:
            raise TypeError(
                "the residual of the problem has no form in it, only Cofunctions: there is nothing"
                " to solve"
            )
        super().__init__(
            problem, form, cofunctions, [problem.J, problem.Jp], unknown=problem.u, others=others
        )
        with stop_annotating():
            self.residual = ufl.replace(self.over_copies(form), {problem.u: self.solution})
            self.jacobian = derivative_of(self.residual, self.solution)
        # The user's Jacobian, which steps are made with, may lack some of them.
        for index in self.indices(coefficients_of(self.jacobian)):
            self.inputs[index].in_operator = True


def derivative_of(form: ufl.Form, coefficient, *direction, what: str = "problem") -> ufl.Form:
    """The Gâteaux derivative of a form, expanded.

    Raises
    ------
    TypeError
        Where UFL cannot take it, with the coefficient's name.
    """
    try:
        return expand_derivatives(derivative(form, coefficient, *direction))
    except Exception as error:  # UFL raises what it likes
        raise TypeError(
            f"UFL cannot differentiate the {what} by '{name_of(coefficient)}': {error}"
        ) from error


def assembled_values(pairs: list[tuple]) -> np.ndarray:
    """Rank-local values of forms, one after the other.

    Parameters
    ----------
    pairs : list of (assembler, Cofunction)
        Of each form, with its tensor; None in the place of the assembler of an empty one.
    """
    values = []
    for assembler, tensor in pairs:
        if assembler is None:
            values.append(np.zeros_like(local_values(tensor)))
        else:
            assemble_into(assembler, tensor)
            values.append(local_values(tensor))
    return values[0] if len(values) == 1 else np.concatenate(values)


def integration_meshes(*forms) -> list:
    """The meshes that are integrated over, each once, in a fixed order."""
    found: dict = {}
    for form in forms:
        if isinstance(form, ufl.Form):
            found |= dict.fromkeys(integral.ufl_domain() for integral in form.integrals())
    return list(found)


def meshes_of(coefficient) -> list:
    """The meshes that a coefficient lives on; none for a Constant."""
    return [] if isinstance(coefficient, Constant) else list(coefficient.function_space().mesh())


def _check_conditions(problem) -> None:
    if problem.restrict:
        raise ValueError(
            "restrict=True is not needed here, and not supported: boundary rows are folded out of"
            " the system already; leave it away"
        )
    for condition in problem.bcs:
        if not isinstance(condition, DirichletBC):
            raise TypeError(
                f"boundary conditions must be DirichletBCs, found a {type(condition).__name__}: "
                "put other conditions into the forms"
            )


def _refuse_what_is_no_form(form) -> None:
    if isinstance(form, (TensorBase, MatrixBase)) or not isinstance(form, ufl.BaseForm):
        raise TypeError(
            f"a problem must be stated in UFL forms, found a {type(form).__name__}: prdp_fem"
            " differentiates forms, and cannot look into assembled matrices or Slate tensors"
        )


def _split_residual(F) -> tuple[ufl.Form | None, list[tuple[Cofunction, float]]]:
    """A residual as one form and the Cofunctions, with weights, that were subtracted from it."""
    if isinstance(F, ufl.Form):
        return F, []
    form, cofunctions = None, []
    components = zip(F.components(), F.weights()) if isinstance(F, ufl.FormSum) else [(F, 1)]
    for component, weight in components:
        if isinstance(component, ufl.Form):
            component = component if weight == 1 else weight * component
            form = component if form is None else form + component
        elif isinstance(component, Cofunction):
            if not isinstance(weight, Real):
                raise TypeError(
                    f"the weight of Cofunction '{component.name()}' in the right-hand side must be"
                    f" a number, found {weight!r}: put it into the form that the Cofunction is"
                    " assembled from"
                )
            cofunctions.append((component, -float(weight)))
        else:
            raise TypeError(
                "the right-hand side must be made of UFL forms and Cofunctions, found a"
                f" {type(component).__name__}: assemble it into a Cofunction first"
            )
    return form, cofunctions


def _right_hand_side(residual: ufl.Form | None, problem) -> ufl.Form | None:
    """L of the residual a(u, ·) - L: what is left without the integrals of the action of a."""
    remaining = [] if residual is None else list(residual.integrals())
    identities = [_identity(integral) for integral in remaining]
    for integral in action(problem.J, problem.u).integrals():
        try:
            place = identities.index(_identity(integral))
        except ValueError:
            raise TypeError(
                "the residual of the problem is not a(u, v) - L(v) with its bilinear form a: state"
                " the problem as LinearVariationalProblem(a, L, u, bcs)"
            ) from None
        del identities[place], remaining[place]
    return -1 * ufl.Form(remaining) if remaining else None


def _identity(integral) -> tuple:
    """Equal for integrals that are equal up to the names of their summation indices."""
    form = ufl.Form([integral])
    return form.signature(), form.coefficients(), tuple(coefficients_of(form))
