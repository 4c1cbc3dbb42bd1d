"""Functions that a user has PETSc call are called under this package, too, and so are its own."""

import numpy as np
import pytest
from firedrake import *
from problems import GMRES, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps, control
from prdp_fem.krylov.factorisation import FactorisationCheck

pytestmark = pytest.mark.parallel([1, 2])

INNER = {"ksp_type": "preonly", "pc_type": "ksp", "ksp_ksp_type": "cg", "ksp_pc_type": "jacobi"}
NEWTON = {"snes_linesearch_type": "basic", "snes_rtol": 1e-50, "snes_stol": 0.0, "snes_max_it": 30}
DIRECT = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
STEPS, ITERATIONS = 3, 4
SETTING = NewtonSteps(STEPS, Iterations(ITERATIONS))


@pytest.fixture
def space():
    return FunctionSpace(UnitSquareMesh(6, 6), "CG", 1)


def linear(V):
    w, v = TrialFunction(V), TestFunction(V)
    form = (w * v + inner(grad(w), grad(v))) * dx
    return LinearVariationalProblem(form, smooth(V, 1) * v * dx, Function(V, name="u"))


def nonlinear(V):
    u, v = Function(V, name="u"), TestFunction(V)
    residual = ((1 + u**2) * inner(grad(u), grad(v)) + u * v - smooth(V, 1) * v) * dx
    return NonlinearVariationalProblem(residual, u, DirichletBC(V, 0, "on_boundary"))


class Calls:
    """A user's function, with arguments of its own."""

    def __init__(self):
        self.iterations = []

    def note(self, ksp, b, x, factor, *, shift):
        assert (factor, shift) == (3, 5) and b.norm() > 0 and x.norm() > 0
        self.iterations.append(ksp.getIterationNumber())

    def put_on(self, ksp):
        ksp.setPostSolve(self.note, (3,), {"shift": 5})


def test_what_is_called_after_a_nested_solve_is_called_still(space):
    refinement = FixedRefinement(Iterations(ITERATIONS))
    solver = prdp_fem.LinearVariationalSolver(
        linear(space), refinement=refinement, solver_parameters=INNER
    )
    solver.solve()
    assert solver.statistics.forward_iterations == ITERATIONS
    inner_ksp, calls = solver.snes.ksp.pc.getKSP(), Calls()
    calls.put_on(inner_ksp)
    for count in (1, 2):
        solver.solve()
        assert calls.iterations == [ITERATIONS] * count
        assert solver.statistics.forward_iterations == ITERATIONS * (1 + count)
    inner_ksp.setPostSolve(None)
    solver.solve()
    assert calls.iterations == [ITERATIONS] * 2
    assert solver.statistics.forward_iterations == ITERATIONS * 4


@pytest.mark.parametrize("is_solved", [False, True])
def test_what_is_called_after_linear_solves_stays_under_control(space, is_solved):
    problem = nonlinear(space)
    parameters = {**GMRES, **NEWTON, "snes_rtol": 1e-8}
    solver = NonlinearVariationalSolver(problem, solver_parameters=parameters)
    calls = Calls()
    calls.put_on(solver.snes.ksp)
    if is_solved:
        solver.solve()
        assert calls.iterations
        calls.iterations.clear()
    control(solver, FixedRefinement(SETTING))
    for count in (1, 2):
        problem.u.zero()
        solver.solve()
        assert calls.iterations == [ITERATIONS] * STEPS * count
        assert solver.statistics.forward_iterations == ITERATIONS * STEPS * count
    solver.system.place.move_to(solver.system.place.memory)  # as after an error
    problem.u.zero()
    solver.solve()
    assert calls.iterations == [ITERATIONS] * STEPS * 3


@pytest.mark.parametrize("is_before", [True, False])
def test_direct_solves_are_looked_at_by_users_and_by_checks(space, is_before, monkeypatch):
    looked, look = [], FactorisationCheck.look_at_step

    def note(self, ksp, b, x):
        looked.append(ksp.getIterationNumber())
        look(self, ksp, b, x)

    monkeypatch.setattr(FactorisationCheck, "look_at_step", note)
    problem, calls = nonlinear(space), Calls()
    solver = NonlinearVariationalSolver(problem, solver_parameters={**DIRECT, **NEWTON})
    if is_before:
        calls.put_on(solver.snes.ksp)
    control(solver, FixedRefinement(NewtonSteps(STEPS)))
    if not is_before:
        calls.put_on(solver.snes.ksp)
    solver.solve()
    assert len(calls.iterations) == len(looked) >= STEPS
    before = len(looked)
    problem.u.zero()
    solver.solve()
    assert len(calls.iterations) == len(looked) == before + STEPS


def test_an_error_of_a_users_function_is_raised(space):
    solver = prdp_fem.NonlinearVariationalSolver(
        nonlinear(space), refinement=FixedRefinement(SETTING), solver_parameters={**GMRES, **NEWTON}
    )

    def fail(ksp, b, x):
        raise KeyError("mine")

    solver.snes.ksp.setPostSolve(fail)
    with pytest.raises(KeyError, match="mine"):
        solver.solve()


def test_monitors_add_up_where_newton_steps_are_unrolled(space):
    problem, seen = nonlinear(space), []
    solver = NonlinearVariationalSolver(problem, solver_parameters={**GMRES, **NEWTON})
    solver.snes.setMonitor(lambda snes, step, norm: seen.append(step))
    control(solver, FixedRefinement(SETTING), differentiation="unrolled")
    solver.snes.setMonitor(lambda snes, step, norm: seen.append(-step))
    solver.solve()
    assert seen == [sign * step for step in range(STEPS + 1) for sign in (1, -1)]


@pytest.mark.parametrize("side", ["setPreSolve", "setPostSolve"])
def test_what_is_called_beside_an_outermost_solve_is_left_alone(space, side):
    solver, seen = LinearVariationalSolver(linear(space), solver_parameters=GMRES), []
    getattr(solver.snes.ksp, side)(lambda ksp, b, x: seen.append(b.norm()))
    control(solver, FixedRefinement(Iterations(ITERATIONS)))
    solver.solve()
    solver.solve()
    assert len(seen) == 2 and np.all(np.array(seen) > 0)
