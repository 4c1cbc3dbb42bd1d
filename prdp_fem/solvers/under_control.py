"""Solvers of Firedrake's that are already there, put under a refinement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import firedrake
from firedrake import LinearVariationalProblem
from pyadjoint.tape import annotate_tape

from prdp_fem.problem.assembled import AssembledForm
from prdp_fem.problem.firedrake_internals import (
    Predecessor,
    constructor_arguments,
    has_solved,
    problem_of,
)
from prdp_fem.ranks.agreement import agree
from prdp_fem.refinement.rules import Refinement
from prdp_fem.solution.differentiation import differentiation_of
from prdp_fem.solution.solver_arguments import OWN, check_names, refinement_in_words
from prdp_fem.solvers.refined import RefinedSolver
from prdp_fem.solvers.takeover import refuse_to_lose, reset
from prdp_fem.solvers.variational import LinearVariationalSolver, NonlinearVariationalSolver

__all__ = ["control"]


class _LinearSolver(firedrake.LinearSolver, LinearVariationalSolver):
    """Firedrake's solver of assembled systems, under control: it solves by the other class."""

    # Of A, and of P where that is another one.
    _assembled: list[AssembledForm]

    def solve(self, x: firedrake.Function, b: firedrake.Cofunction) -> None:
        """Solve A x = b, with A as it was assembled last.

        Parameters
        ----------
        x : Function
        b : Cofunction

        Raises
        ------
        ValueError
            Where A was changed otherwise than by assembling its form, or coefficients since then.
        firedrake.exceptions.ConvergenceError
            As :meth:`RefinedSolver.solve`.
        """
        for assembled in self._assembled:
            assembled.follow()
        if annotate_tape():
            for assembled in self._assembled:
                assembled.record()
        super().solve(x, b)


_CONTROLLED = {
    firedrake.LinearVariationalSolver: LinearVariationalSolver,
    firedrake.NonlinearVariationalSolver: NonlinearVariationalSolver,
    firedrake.LinearSolver: _LinearSolver,
}


def control(solver, refinement: Refinement | None, **options):
    """Put a solver that is already there under a refinement.

    The solver stays the object that it is, with its SNES and KSP and what was set on them by hand,
    but becomes one of this package: its solves, and all that its blocks on the tape do from now on
    (replay, adjoint, tangent linear, Hessian), follow the refinement, start from zero and do not
    depend on what was solved before. Solves that are on a tape already stay as they were.

    Inside the preconditioner is what the options say that the solver was made with. What was
    changed there by hand stays where the solver has not solved yet; after a solve, preconditioners
    that have parts are made anew from the options, and types and tolerances that were changed by
    hand are an error that names the option to be used.

    A LinearSolver solves with its matrices as they were assembled last, so that
    ``assemble(a, bcs=bcs, tensor=A)`` between solves is seen, and is differentiated by the
    coefficients of their forms, at the values that they had then.

    Parameters
    ----------
    solver : LinearVariationalSolver, NonlinearVariationalSolver or LinearSolver
        One of Firedrake's; or a solver of this package, whose refinement is exchanged. Several
        solvers may share one refinement.
    refinement : Refinement or None
    **options
        ``differentiation``, ``warm_start``, ``ksp_prefix`` and ``device``, see
        :class:`LinearVariationalSolver`.

    Returns
    -------
    solver
        The same object.

    Raises
    ------
    TypeError, ValueError
        For another object, for a matrix that is not what its form gives, for what was changed
        inside the preconditioner by hand and would be lost, and for what the solvers of this
        package refuse; on all ranks, where it is so on one. The solver is left as it was.

    Examples
    --------
    >>> prdp_fem.control(solver, ProgressiveRefinement(IterationLadder(start=2)))  # doctest: +SKIP
    """
    is_refined = isinstance(solver, RefinedSolver)
    if not is_refined and type(solver) not in _CONTROLLED:
        raise TypeError(
            "expected a Firedrake LinearVariationalSolver, NonlinearVariationalSolver or"
            f" LinearSolver, found a {type(solver).__module__}.{type(solver).__qualname__}"
        )

    def look() -> list[str]:
        """What ranks must have alike, where it makes sense on this one."""
        check_names(options, OWN, "control()")
        if is_refined:
            _check_made_so(solver, options)
        return [type(solver).__name__, refinement_in_words(refinement), *sorted(options)]

    agree(solver.snes.comm.tompi4py(), look, "arguments of control()")
    if is_refined:
        solver.refinement = refinement
        device = options.get("device")
        return solver if device is None else solver.to(device)
    if has_solved(solver):
        refuse_to_lose(solver)
    arguments, assembled = {**constructor_arguments(solver), **options}, []
    if isinstance(solver, firedrake.LinearSolver):
        problem, assembled = _assembled_problem(solver, arguments)
    else:
        problem = problem_of(solver)
    predecessor = Predecessor(solver)
    solver.__class__ = _CONTROLLED[type(solver)]
    try:
        solver._predecessor, solver._assembled = predecessor, assembled
        is_nonlinear = isinstance(solver, NonlinearVariationalSolver)
        refined_type = NonlinearVariationalSolver if is_nonlinear else LinearVariationalSolver
        refined_type.__init__(solver, problem, refinement=refinement, **arguments)
    except BaseException:  # whatever has ended it, the solver is the user's own again
        predecessor.restore(solver)
        if predecessor.has_passed_on:
            reset(solver)
        raise
    del solver._predecessor
    return solver


def _check_made_so(solver: RefinedSolver, options: Mapping[str, Any]) -> None:
    """Raise a ValueError where a solver is to have been made otherwise than it was."""
    for name, value in options.items():
        value = differentiation_of(value) if name == "differentiation" else value
        is_kept = name in ("differentiation", "warm_start") and value == getattr(solver, name)
        if not is_kept and name != "device":
            raise ValueError(
                f"the solver is one of prdp_fem already, whose {name} is chosen when it is made"
            )


def _assembled_problem(solver: firedrake.LinearSolver, arguments: dict) -> tuple:
    """The problem that an assembled system states, and the forms of its matrices."""
    A, P = solver.A, solver.P
    parameters = A.form_compiler_parameters
    kinds = ("nullspace", "transpose_nullspace", "near_nullspace")
    null_spaces = [name for name in kinds if arguments.get(name) is not None]
    assembled = [
        AssembledForm(matrix, A.bcs, parameters, null_spaces)
        for matrix in ([A] if P is A else [A, P])
    ]
    problem = LinearVariationalProblem(
        assembled[0].form,
        solver.b,
        solver.x,
        bcs=A.bcs,
        aP=None if P is A else assembled[1].form,
        form_compiler_parameters=parameters,
    )
    return problem, assembled
