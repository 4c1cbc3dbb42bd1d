"""The kinds of problems that there are solvers for, and what a solution map is put together from.

Each kind says what a problem is taken apart into, how it is solved, and how that is differentiated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from firedrake import LinearVariationalProblem, NonlinearVariationalProblem

from prdp_fem.assembly.right_hand_side import CofunctionTerm, RightHandSide
from prdp_fem.krylov.snes import Newton
from prdp_fem.memory.place import Place
from prdp_fem.problem.forms import Forms, LinearForms, NonlinearForms
from prdp_fem.solution.differentiation import Implicit, Unrolled
from prdp_fem.solution.implicit import ImplicitDerivative
from prdp_fem.solution.linear import LinearSolve
from prdp_fem.solution.linearisation import Linearisation
from prdp_fem.solution.map import SolutionMap
from prdp_fem.solution.newton import NewtonSolve
from prdp_fem.solution.unrolled import UnrolledKrylov
from prdp_fem.solution.unrolled_newton import UnrolledNewton
from prdp_fem.solvers.linear_solvers import LinearSolvers

__all__ = ["LINEAR", "NEWTON", "Kind"]


class Kind(ABC):
    """A kind of problem.

    Attributes
    ----------
    problem_type : type
        That of Firedrake's.
    refused_callbacks : Mapping of str to str
        Firedrake calls these with the state at hand, and what they change is part of the problem:
        each with what to do instead.
    derivatives : Mapping of type to callable
        How solves are differentiated, by the kind of differentiation.
    """

    problem_type: ClassVar[type]
    refused_callbacks: ClassVar[Mapping[str, str]]
    derivatives: ClassVar[Mapping[type, Callable]]

    @abstractmethod
    def take_apart(self, problem, others: Sequence) -> Forms:
        """The forms of a problem.

        Parameters
        ----------
        problem : NonlinearVariationalProblem
        others : sequence of Function or Constant
            What preconditioners depend on beside these.
        """

    def take_callbacks(self, arguments: dict[str, Any]) -> list[Callable]:
        """Callbacks to be run before a solve, taken out of the arguments of Firedrake's solver."""
        return []

    @abstractmethod
    def make_forward(
        self,
        solver,
        forms: Forms,
        linear_solvers: LinearSolvers,
        ksp_prefix: str | None,
        place: Place,
    ) -> LinearSolve | NewtonSolve:
        """How a problem is solved.

        Parameters
        ----------
        solver : firedrake.NonlinearVariationalSolver
            Of the forms' problem.
        forms : Forms
        linear_solvers : LinearSolvers
        ksp_prefix : str or None
            Options prefix of the KSP that settings are put on; None for the only iterative one.
        place : Place
        """

    def make_map(
        self, forward: LinearSolve | NewtonSolve, differentiation: Implicit | Unrolled
    ) -> SolutionMap:
        """The map from inputs to solutions, which is solved and differentiated in these ways."""
        derivative = next(
            derivative
            for kind, derivative in self.derivatives.items()
            if isinstance(differentiation, kind)
        )
        return SolutionMap(forward, derivative(forward, differentiation))


class _Linear(Kind):
    problem_type = LinearVariationalProblem
    refused_callbacks = dict.fromkeys(
        ("post_function_callback", "marking_callback"),
        "a linear solve assembles no residual; put what it adds into the right-hand side, as a"
        " Cofunction",
    )
    derivatives = {Implicit: ImplicitDerivative, Unrolled: UnrolledKrylov}

    def take_apart(self, problem, others):
        return LinearForms(problem, others)

    def take_callbacks(self, arguments):
        names = "pre_function_callback", "pre_jacobian_callback"
        callbacks = [arguments.pop(name, None) for name in names]
        return [callback for callback in callbacks if callback is not None]

    def make_forward(self, solver, forms, linear_solvers, ksp_prefix, place):
        right_hand_side = RightHandSide(forms, place)
        linearisation = Linearisation(
            forms,
            solver,
            linear_solvers,
            ksp_prefix,
            place,
            unassembled=right_hand_side.terms.keys(),
        )
        return LinearSolve(linearisation, right_hand_side)


class _Newton(Kind):
    problem_type = NonlinearVariationalProblem
    refused_callbacks = dict.fromkeys(
        (
            "pre_function_callback",
            "post_function_callback",
            "pre_jacobian_callback",
            "marking_callback",
        ),
        "what it changes during a solve is no part of the residual that is differentiated; state it"
        " in the forms",
    )
    derivatives = {Implicit: ImplicitDerivative, Unrolled: UnrolledNewton}

    def take_apart(self, problem, others):
        return NonlinearForms(problem, others)

    def make_forward(self, solver, forms, linear_solvers, ksp_prefix, place):
        terms = {
            forms.inputs.index(entry): CofunctionTerm(weight, forms, place)
            for entry, weight in forms.cofunctions.items()
        }
        newton = Newton(solver.snes, forms.solution.name(), ksp_prefix)
        # The residual is assembled from all inputs, Cofunctions too.
        linearisation = Linearisation(
            forms,
            linear_solvers(forms.linearised_problem()),
            linear_solvers,
            ksp_prefix,
            place,
            newton=newton,
        )
        return NewtonSolve(linearisation, terms, solver, newton)


LINEAR = _Linear()
NEWTON = _Newton()
