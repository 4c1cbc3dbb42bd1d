"""Where one rank is asked for something else than others: an error on all, and none of them waits.

Without that these tests would not come to an end.
"""

from functools import partial

import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from problems import CG, GMRES, HeatStep, smooth

import prdp_fem
from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    NewtonLadder,
    ProgressiveRefinement,
    control,
)
from prdp_fem.assembly.agreement import Agreement
from prdp_fem.torch import (
    Gathering,
    GradientReduction,
    GraphNetwork,
    Partition,
    SolverLayer,
)

pytestmark = pytest.mark.parallel([2, 3])

LAST = COMM_WORLD.size - 1
IS_LAST = COMM_WORLD.rank == LAST


def constant_operator():
    """A problem that nothing is assembled for when inputs change, so that nothing is reduced."""
    mesh = UnitSquareMesh(6, 6)
    V = FunctionSpace(mesh, "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    u, source = Function(V, name="u"), smooth(V, 1)
    form = (w * v + inner(grad(w), grad(v))) * dx
    problem = LinearVariationalProblem(form, source * v * dx, u, DirichletBC(V, 0, "on_boundary"))
    return problem, source, IterationLadder()


def field_in_the_operator():
    step = HeatStep(boundary=1)
    return step.problem, step.kappa, IterationLadder()


def nonlinear():
    mesh = UnitSquareMesh(6, 6)
    V = FunctionSpace(mesh, "CG", 1)
    v = TestFunction(V)
    u = Function(V, name="u")
    source = smooth(V, 1)
    residual = ((1 + u**2) * inner(grad(u), grad(v)) - source * v) * dx
    problem = NonlinearVariationalProblem(residual, u, DirichletBC(V, 0, "on_boundary"))
    return problem, source, NewtonLadder(linear=IterationLadder())


PROBLEMS = [constant_operator, field_in_the_operator, nonlinear]


def solver_for(problem, refinement, **options):
    kind = (
        prdp_fem.LinearVariationalSolver
        if isinstance(problem, LinearVariationalProblem)
        else prdp_fem.NonlinearVariationalSolver
    )
    parameters = {**GMRES, "snes_linesearch_type": "basic"}
    return kind(problem, refinement=refinement, solver_parameters=parameters, **options)


def raised_everywhere(call, error=ValueError) -> list[str]:
    """The messages of all ranks."""
    message = None
    try:
        call()
    except error as raised:
        message = str(raised)
    messages = COMM_WORLD.allgather(message)
    assert None not in messages
    return messages


@pytest.mark.parametrize("make", PROBLEMS)
def test_solves_at_other_levels_are_an_error_and_levels_can_be_set_right(make):
    problem, _, ladder = make()
    refinement = ProgressiveRefinement(ladder)
    solver = solver_for(problem, refinement, warm_start=False)
    solver.solve()
    for _ in range(2):  # what ranks have not agreed on once, they have not the second time
        refinement.level = COMM_WORLD.rank
        before = problem.u.dat.data_ro.copy()
        messages = raised_everywhere(solver.solve)
        assert len(set(messages)) == 1
        what = f"settings of the solve for '{problem.u.name()}'"
        assert f"{what} must be the same on all ranks, found" in messages[0]
        assert "on rank 0 and" in messages[0] and "give the refinement comm=" in messages[0]
        np.testing.assert_array_equal(problem.u.dat.data_ro, before)
    refinement.level = 2
    solver.solve()
    other = solver_for(problem, FixedRefinement(ladder[2]), warm_start=False)
    found = problem.u.dat.data_ro.copy()
    other.solve()
    np.testing.assert_array_equal(problem.u.dat.data_ro, found)


@pytest.mark.parametrize("make", PROBLEMS)
def test_steps_by_metrics_of_a_rank_are_an_error(make):
    problem, _, ladder = make()
    refinement = ProgressiveRefinement(ladder, ema_window=1, error_window=1)
    solver = solver_for(problem, refinement)
    solver.solve()
    for _ in range(2):
        refinement.step(1.0)
    assert refinement.level == 1
    solver.solve()
    refinement.step(0.95 if IS_LAST else 0.5)
    assert refinement.level == (1 if IS_LAST else 2)
    assert len(set(raised_everywhere(solver.solve))) == 1


@pytest.mark.parametrize("make", [field_in_the_operator, nonlinear])
def test_a_step_of_one_rank_alone_is_an_error_where_solves_reduce_something(make):
    problem, _, ladder = make()
    refinement = ProgressiveRefinement(ladder)
    solver = solver_for(problem, refinement)
    solver.solve()
    if COMM_WORLD.rank == 0:
        refinement.level = 3
    assert len(set(raised_everywhere(solver.solve))) == 1


@pytest.mark.parametrize("make", PROBLEMS)
def test_replays_at_other_levels_are_an_error(make):
    problem, coefficient, ladder = make()
    refinement = ProgressiveRefinement(ladder)
    solver = solver_for(problem, refinement)
    solver.solve()
    functional = ReducedFunctional(assemble(problem.u**2 * dx), Control(coefficient))
    functional(coefficient)
    refinement.level = COMM_WORLD.rank
    assert "settings of the solve for" in raised_everywhere(lambda: functional(coefficient))[0]
    refinement.level = 1
    functional(coefficient)
    functional.derivative()


def test_settings_are_compared_where_they_may_have_changed_only(monkeypatch):
    problem, source, ladder = constant_operator()
    refinement = ProgressiveRefinement(ladder)
    solver = solver_for(problem, refinement)
    compared = []
    monkeypatch.setattr(Agreement, "_compare", lambda _, asked: compared.append(asked))
    for _ in range(3):
        solver.solve()
    assert len(compared) == 1
    refinement.step(1.0)
    assert refinement.level == 0
    for _ in range(3):
        solver.solve()
    assert len(compared) == 2
    for make in (field_in_the_operator, nonlinear):
        problem, _, ladder = make()
        refinement = ProgressiveRefinement(ladder)
        solver = solver_for(problem, refinement)
        for level in range(3):
            refinement.level = level
            solver.solve()
    assert len(compared) == 2


class Drifting(prdp_fem.Refinement):
    """A user's own, whose setting changes without its being set."""

    iterations = 2

    @property
    def setting(self):
        return Iterations(self.iterations)


def test_settings_of_a_users_refinement_are_compared_too():
    problem, _, ladder = constant_operator()
    refinement = Drifting(ladder)
    solver = solver_for(problem, refinement)
    solver.solve()
    refinement.iterations += 1 + COMM_WORLD.rank
    assert "settings of the solve for" in raised_everywhere(solver.solve)[0]


@pytest.mark.parametrize("last", [0.06, np.nextafter(0.05, 1)])
def test_other_values_of_a_constant_are_an_error(last):
    step = HeatStep()
    solver = solver_for(step.problem, FixedRefinement(Iterations(3)))
    solver.solve()
    expected = step.u.dat.data_ro.copy()
    step.dt.assign(last if IS_LAST else 0.05)
    message = (
        f"must be the same on all ranks, found [[0.05]] on rank 0 and [[{last}]] on rank {LAST}"
    )
    assert all(message in one for one in raised_everywhere(solver.solve))
    step.dt.assign(0.05)
    solver.solve()
    np.testing.assert_array_equal(step.u.dat.data_ro, expected)


def test_a_constant_that_one_rank_alone_changes_is_an_error_where_no_field_is_assembled():
    """Only one would assemble what depends on it, which is collective."""
    V = FunctionSpace(UnitSquareMesh(6, 6), "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="u")
    factor, source = Constant(1.0), smooth(V, 1)
    problem = LinearVariationalProblem(w * v * dx, factor * source * v * dx, u)
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters=CG)
    solver.solve()
    factor.assign(2.0 if IS_LAST else 1.0)
    with pytest.raises(ValueError, match="values of the Constants that 'u' depends on"):
        solver.solve()
    factor.assign(2.0)
    solver.solve()


# Arguments

OTHERWISE = "arguments of a solver must be the same"
WRONG = {
    "refinement": ({"refinement": 5}, TypeError, "refinement must be"),
    "setting": ({"refinement": FixedRefinement(Iterations(7))}, None, OTHERWISE),
    "name": ({"solver_parametres": {}}, TypeError, "did you mean solver_parameters"),
    "differentiation": ({"differentiation": "explicit"}, ValueError, "must be one of 'implicit'"),
    "differently": ({"differentiation": "unrolled"}, None, OTHERWISE),
    "warm_start": ({"warm_start": "no"}, TypeError, "warm_start must be True or False"),
    "warm": ({"warm_start": True}, None, OTHERWISE),
    "parameters": ({"solver_parameters": {"ksp_type": "lgmres"}}, ValueError, "of earlier solves"),
    "other parameters": ({"solver_parameters": {**CG, "ksp_rtol": 1e-3}}, None, OTHERWISE),
    "callback": ({"pre_jacobian_callback": 5}, TypeError, "must be a function"),
    "refused callback": ({"post_function_callback": print}, ValueError, "is not supported"),
    "nullspace": ({"nullspace": "constant"}, TypeError, "nullspace must be"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_argument_that_one_rank_alone_has_is_an_error_on_all(case):
    wrong, error, message = WRONG[case]
    problem, _, ladder = constant_operator()
    right = {"refinement": FixedRefinement(Iterations(3)), "solver_parameters": CG}
    given = {**right, **wrong} if IS_LAST else right
    messages = raised_everywhere(
        lambda: prdp_fem.LinearVariationalSolver(problem, **given), (TypeError, ValueError)
    )
    assert message in messages[LAST]
    if error is None:
        assert len(set(messages)) == 1
    else:
        told = f"rank {LAST} of {COMM_WORLD.size} has raised {error.__name__}: "
        assert all(told in message for message in messages[:LAST])
    prdp_fem.LinearVariationalSolver(problem, **right).solve()


def test_a_refinement_that_one_rank_alone_has_is_an_error_on_all():
    problem, _, ladder = constant_operator()
    first = FixedRefinement(Iterations(3))
    solver = solver_for(problem, first)

    def exchange():
        solver.refinement = None if IS_LAST else FixedRefinement(Iterations(4))

    assert "refinements of a solver must be the same" in raised_everywhere(exchange)[0]
    assert solver.refinement is first
    solver.solve()


@pytest.mark.parametrize("is_solved", [False, True])
def test_control_that_one_rank_alone_does_otherwise_is_an_error_on_all(is_solved):
    problem, _, ladder = constant_operator()
    solver = LinearVariationalSolver(problem, solver_parameters=CG)
    if is_solved:
        solver.solve()
    for last in (
        {"refinement": 5},
        {"refinement": FixedRefinement(Iterations(4))},
        {"refinement": FixedRefinement(Iterations(3)), "warm_stat": True},
    ):
        given = last if IS_LAST else {"refinement": FixedRefinement(Iterations(3))}
        raised_everywhere(partial(control, solver, **given), (TypeError, ValueError))
        assert type(solver) is LinearVariationalSolver
    control(solver, FixedRefinement(Iterations(3))).solve()
    raised_everywhere(lambda: control(solver, None, **({"warm_start": True} if IS_LAST else {})))


@pytest.mark.parametrize(
    "last",
    [
        {"controls": []},
        {"controls": 5},
        {"controls": "twice"},
        {"controls": "other"},
        {"controls": "independent"},
        {"output": "text"},
        {"output": []},
        {"output": "functional"},
    ],
    ids=str,
)
def test_a_layer_that_one_rank_alone_makes_otherwise_is_an_error_on_all(last):
    step = HeatStep()
    solver = solver_for(step.problem, FixedRefinement(Iterations(3)))
    of = {
        "twice": [step.u0, step.u0],
        "other": [step.source],
        "independent": [Function(step.V)],
        "functional": step.u * dx,
    }
    given = {"controls": [step.u0], "output": None}
    if IS_LAST:
        ((name, value),) = last.items()
        given[name] = of.get(value, value) if isinstance(value, str) else value
    raised_everywhere(lambda: SolverLayer(solver, **given), (TypeError, ValueError))
    values = torch.tensor(step.u0.dat.data_ro)
    assert SolverLayer(solver, [step.u0])(values).shape == values.shape


@pytest.mark.parametrize("kind", [Gathering, Partition])
@pytest.mark.parametrize("last", [[1.0], [1.0, -1.0], "both", [2.0, np.inf]], ids=str)
def test_a_period_that_one_rank_alone_has_is_an_error_on_all(kind, last):
    V = FunctionSpace(PeriodicUnitSquareMesh(4, 4), "CG", 1)
    given = last if IS_LAST else [1.0, 1.0]
    raised_everywhere(lambda: kind(V, period=given), (TypeError, ValueError))
    # On a mesh as small as this a rank may have no nodes of its own.
    assert COMM_WORLD.allreduce(len(kind(V, period=[1.0, 1.0]))) >= 16


@pytest.mark.parametrize(
    "last", [{"inputs": 0}, {"steps": -1}, {"steps": 2}, {"features": torch.zeros(2, 1)}], ids=str
)
def test_a_graph_network_that_one_rank_alone_makes_otherwise_is_an_error_on_all(last):
    partition = Partition(FunctionSpace(UnitSquareMesh(4, 4), "CG", 1))
    given = {"inputs": 1, "outputs": 1, "steps": 1, **(last if IS_LAST else {})}
    raised_everywhere(
        lambda: GraphNetwork(
            edges=partition.edges, coordinates=partition.coordinates, halo=partition.halo, **given
        ),
        (TypeError, ValueError),
    )


@pytest.mark.parametrize("last", [{"bucket_size": 0}, {"bucket_size": 8}, {"network": 5}], ids=str)
def test_a_reduction_that_one_rank_alone_makes_otherwise_is_an_error_on_all(last):
    given = {"network": torch.nn.Linear(2, 2), "bucket_size": 2**22, **(last if IS_LAST else {})}
    raised_everywhere(lambda: GradientReduction(comm=COMM_WORLD, **given), (TypeError, ValueError))
