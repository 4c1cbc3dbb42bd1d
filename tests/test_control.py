"""Stock Firedrake solvers that come under control: what they then do, and what they keep."""

import numpy as np
import pytest
from checkpoint_schedules import Revolve, SingleMemoryStorageSchedule
from firedrake import *
from firedrake.adjoint import *
from problems import CG, CONVERGED, GMRES, HeatStep, smooth, whole

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, NewtonSteps, ScheduledRefinement

pytestmark = pytest.mark.parallel([1, 2, 3])


def truncated_by_options(count):
    return {**CG, "ksp_max_it": count, "ksp_convergence_test": "skip"}


def time_loop(problem, solver, steps=3):
    for _ in range(steps):
        solver.solve()
        problem.u0.assign(problem.u)
    return assemble(problem.u**2 * dx)


def gradients(reduced, control, count=3):
    with stop_annotating():
        found = []
        for _ in range(count):
            reduced(control)
            found.append(whole(reduced.derivative().dat.data_ro))
    return found


@pytest.mark.parametrize("name", ["source", "kappa"])
def test_truncated_gradients_no_longer_depend_on_history(name):
    changes = {}
    for controlled in (False, True):
        with set_working_tape(Tape()):
            problem = HeatStep(16)
            with stop_annotating():
                problem.dt.assign(10.0)
            solver = LinearVariationalSolver(
                problem.problem, solver_parameters=truncated_by_options(5)
            )
            if controlled:
                assert prdp_fem.control(solver, FixedRefinement(Iterations(5))) is solver
            control = getattr(problem, name)
            reduced = ReducedFunctional(time_loop(problem, solver), Control(control))
            first, *later = gradients(reduced, control.copy(deepcopy=True))
            changes[controlled] = max(
                np.linalg.norm(gradient - first) / np.linalg.norm(first) for gradient in later
            )
    assert changes[True] == 0.0 and changes[False] > 0.01


def test_the_solver_keeps_its_identity_its_ksp_and_what_was_set_on_it():
    problem = HeatStep()
    solver = LinearVariationalSolver(
        problem.problem, solver_parameters=CG, options_prefix="heat", ad_block_tag="step"
    )
    solver.solve()
    norms = []
    snes = solver.snes
    ksp = solver.snes.getKSP()
    ksp.setMonitor(lambda ksp, iteration, norm: norms.append(norm))
    refinement = ScheduledRefinement(IterationLadder(3, 2), {1: 1})
    prdp_fem.control(solver, refinement)
    assert isinstance(solver, LinearVariationalSolver) and solver.snes is snes
    for count in (3, 5):
        norms.clear()
        solver.solve()
        assert ksp.getIterationNumber() == count == len(norms) - 1
        refinement.step(1.0)
    assert get_working_tape().get_blocks(tag="step")
    prdp_fem.control(solver, None)
    solver.solve()
    assert ksp.getIterationNumber() > 5


def test_forward_replay_adjoint_tangent_and_hessian_follow_the_level():
    problem = HeatStep(boundary=1.0)
    refinement = ScheduledRefinement(IterationLadder(2, 3), {1: 1})
    solver = prdp_fem.control(
        LinearVariationalSolver(problem.problem, solver_parameters=CG), refinement
    )
    reduced = ReducedFunctional(time_loop(problem, solver, 2), Control(problem.kappa))
    direction = smooth(problem.V, 3)
    counts = solver.statistics
    with stop_annotating():
        for count in (2, 5):
            reduced(problem.kappa.copy(deepcopy=True))
            counts.reset()
            reduced.derivative()
            assert counts.adjoint_iterations == 2 * count
            reduced.hessian(direction)
            assert (
                counts.tangent_iterations == 2 * count
                and counts.adjoint_iterations == (1 + 1 + 2 * 2 + 2 * 2 - 2 * 2) * count
            )
            refinement.step(1.0)


def test_nonlinear_solvers_come_under_control():
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    u = Function(V, name="u")
    v = TestFunction(V)
    f = smooth(V, 1)
    problem = NonlinearVariationalProblem(
        ((1 + u**2) * inner(grad(u), grad(v)) - f * v) * dx, u, bcs=DirichletBC(V, 0, "on_boundary")
    )
    solver = NonlinearVariationalSolver(
        problem, solver_parameters={**GMRES, **CONVERGED, "snes_rtol": 1e-12}
    )
    with stop_annotating():
        solver.solve()
        expected = u.copy(deepcopy=True)
        u.assign(0)
    prdp_fem.control(solver, None)
    solver.solve()
    assert errornorm(expected, u) < 1e-12
    reduced = ReducedFunctional(assemble(u**4 * dx), Control(f))
    with stop_annotating():
        assert taylor_test(reduced, f.copy(deepcopy=True), smooth(V, 2)) > 1.95
        u.assign(0)
        prdp_fem.control(solver, FixedRefinement(NewtonSteps(2, Iterations(4))))
        solver.statistics.reset()
        solver.solve()
    assert (solver.snes.getIterationNumber(), solver.statistics.forward_iterations) == (2, 8)


@pytest.mark.parametrize("boundary", [0, 1.5])
def test_solvers_of_assembled_systems_come_under_control(boundary):
    problem = HeatStep(boundary=boundary)
    A = assemble(problem.a, bcs=problem.bcs)
    solver = LinearSolver(A, solver_parameters={**CG, **CONVERGED})
    x = Function(problem.V)
    with stop_annotating():
        b = assemble(problem.L)
        solver.solve(x, b)
        expected = x.copy(deepcopy=True)
    prdp_fem.control(solver, FixedRefinement(Iterations(60)))
    solver.solve(x, assemble(problem.L))
    assert errornorm(expected, x) < 1e-12 and 10 < solver.ksp.getIterationNumber() <= 60
    reduced = ReducedFunctional(assemble(x**4 * dx), Control(problem.u0))
    with stop_annotating():
        assert taylor_test(reduced, problem.u0.copy(deepcopy=True), smooth(problem.V, 3)) > 1.95
        problem.kappa.assign(2 * problem.kappa)  # the matrix was assembled before
        solver.solve(x, b)
        assert errornorm(expected, x) < 1e-12
        with pytest.raises(ValueError, match="have changed since it was assembled"):
            prdp_fem.control(LinearSolver(A, solver_parameters=CG), FixedRefinement(Iterations(3)))


def test_solvers_share_a_refinement_or_have_their_own():
    problems = [HeatStep(), HeatStep(), HeatStep()]
    shared, own = ScheduledRefinement(IterationLadder(1, 4), {1: 1}), FixedRefinement(Iterations(7))
    solvers = [
        prdp_fem.control(LinearVariationalSolver(problem.problem, solver_parameters=CG), refinement)
        for problem, refinement in zip(problems, (shared, shared, own))
    ]
    for expected in ([1, 1, 7], [5, 5, 7]):
        for solver, count in zip(solvers, expected):
            solver.statistics.reset()
            solver.solve()
            assert solver.statistics.forward_iterations == count
        shared.step(1.0)


def test_long_time_loops_replay_to_the_bit_and_keep_one_assembly():
    problem = HeatStep(4)
    solver = prdp_fem.control(
        LinearVariationalSolver(problem.problem, solver_parameters=CG),
        FixedRefinement(Iterations(2)),
    )
    control = Control(problem.u0)
    # messages take longer than what they are about
    value = time_loop(problem, solver, 2000 if COMM_WORLD.size == 1 else 300)
    start = Function(problem.V).assign(smooth(problem.V, 1))
    reduced = ReducedFunctional(value, control)
    with stop_annotating():
        assert reduced(start) == value
        first = reduced.derivative().dat.data_ro.copy()
        np.testing.assert_array_equal(first, reduced.derivative().dat.data_ro)
    assert solver.statistics.assemblies == 1


@pytest.mark.parametrize(
    "schedule, differentiation",
    [
        (lambda steps: Revolve(steps, 3), "implicit"),
        (lambda steps: SingleMemoryStorageSchedule(), "implicit"),
        (lambda steps: SingleMemoryStorageSchedule(), "unrolled"),
    ],
    ids=["Revolve", "SingleMemoryStorage", "SingleMemoryStorage, unrolled"],
)
def test_schedules_give_what_unscheduled_runs_give(schedule, differentiation):
    # one for both runs: each mesh is cut into parts anew, and sums over ranks are rounded
    # accordingly
    mesh = UnitSquareMesh(6, 6)

    def results(schedule):
        with set_working_tape(Tape()) as tape:
            if schedule is not None:
                tape.enable_checkpointing(schedule(8))
            problem = HeatStep(mesh=mesh)
            solver = prdp_fem.control(
                LinearVariationalSolver(problem.problem, solver_parameters=CG),
                FixedRefinement(Iterations(3)),
                differentiation=differentiation,
            )
            controls = [Control(problem.u0), Control(problem.kappa)]
            start = [problem.u0.copy(deepcopy=True), problem.kappa.copy(deepcopy=True)]
            for _ in tape.timestepper(iter(range(8))):
                solver.solve()
                problem.u0.assign(problem.u)
            reduced = ReducedFunctional(assemble(problem.u**2 * dx), controls)
            with stop_annotating():
                # A first derivative under Revolve, before any replay, is wrong in pyadjoint, with
                # stock solvers as with these.
                found = [
                    reduced(start),
                    *(derivative.dat.data_ro.copy() for derivative in reduced.derivative()),
                ]
            # A tape and its schedule refer to each other. Ranks would drop them when Python looks
            # for cycles, each at another time, and the next tape would find the checkpoint of the
            # mesh on some of them only: to make one is collective.
            tape.clear_tape()
            return found

    for one, other in zip(results(schedule), results(None)):
        np.testing.assert_array_equal(one, other)


def test_values_that_a_schedule_has_let_go_of_are_noticed():
    get_working_tape().enable_checkpointing(Revolve(8, 3))
    problem = HeatStep()
    solver = prdp_fem.control(
        LinearVariationalSolver(problem.problem, solver_parameters=CG),
        FixedRefinement(Iterations(3)),
        differentiation="unrolled",
    )
    control = Control(problem.kappa)
    for _ in get_working_tape().timestepper(iter(range(8))):
        solver.solve()
        problem.u0.assign(problem.u)
    reduced = ReducedFunctional(assemble(problem.u**2 * dx), control)
    with pytest.raises(
        RuntimeError, match="schedule of the tape has let go of the value that 'initial' had"
    ):
        reduced.derivative()


def _smoothing_of_the_old_state(V, old, u):
    """The derivative by the time step depends on the old state, though its own matrix does not."""
    w = TrialFunction(V)
    v = TestFunction(V)
    step = Constant(0.5)
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx, step * old * v * dx, u
    )
    return prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}), step


def _square_of_the_old_state(V, old, u):
    v, factor = TestFunction(V), Function(V).assign(0.5)
    problem = NonlinearVariationalProblem((u**3 + u - factor * old**2) * v * dx, u)
    return prdp_fem.NonlinearVariationalSolver(problem), factor


def _unrolled_from_the_last_solution(V, old, u):
    """The derivative of an iteration from a guess depends on that."""
    w = TrialFunction(V)
    v = TestFunction(V)
    source = Function(V).assign(0.5)
    problem = LinearVariationalProblem((w * v + inner(grad(w), grad(v))) * dx, source * v * dx, u)
    solver = prdp_fem.LinearVariationalSolver(
        problem,
        solver_parameters=CG,
        warm_start=True,
        refinement=FixedRefinement(Iterations(1)),
        differentiation="unrolled",
    )
    return solver, source


def _time_steps(make, schedule, mesh):
    """The functional of eight steps, of what a solver is made of by ``make``, and its control."""
    if schedule is not None:
        get_working_tape().enable_checkpointing(schedule)
    with stop_annotating():
        V = FunctionSpace(mesh, "CG", 1)
        u, old = Function(V, name="new"), smooth(V, 30)
        old.rename("old")
    solver, parameter = make(V, old, u)
    control, value = Control(parameter), 0
    for _ in get_working_tape().timestepper(iter(range(8))):
        solver.solve()
        old.assign(u)
        value += assemble(u**2 * dx)
    return ReducedFunctional(value, control)


@pytest.mark.parametrize(
    "make, name",
    [
        (_smoothing_of_the_old_state, "old"),
        (_square_of_the_old_state, "old"),
        (_unrolled_from_the_last_solution, "new"),
    ],
)
@pytest.mark.parametrize("is_replayed", [False, True])
def test_derivatives_that_read_a_value_which_was_let_go_are_refused(make, name, is_replayed):
    reduced = _time_steps(make, Revolve(8, 3), UnitSquareMesh(3, 3))
    with stop_annotating():
        if is_replayed:
            reduced(reduced.controls[0].control)
        with pytest.raises(RuntimeError, match=f"has let go of the value that '{name}' had when"):
            reduced.derivative()


def _step_of_a_nonlinear_problem(V, old, u):
    """The old state enters by a matrix, and so do its derivatives."""
    v, diffusivity = TestFunction(V), Constant(0.3)
    F = (u - old) * v * dx + (diffusivity + u**2) * inner(grad(u), grad(v)) * dx
    # Not by MUMPS, which on several ranks rounds differently from solve to solve.
    parameters = {"ksp_type": "gmres", "pc_type": "jacobi"}
    problem = NonlinearVariationalProblem(F, u)
    return prdp_fem.NonlinearVariationalSolver(problem, solver_parameters=parameters), diffusivity


@pytest.mark.parametrize("is_replayed", [False, True])
def test_values_that_no_derivative_reads_may_be_let_go(is_replayed):
    mesh, found = UnitSquareMesh(3, 3), []
    for schedule in (None, Revolve(8, 3)):
        with set_working_tape(Tape()) as tape:
            reduced = _time_steps(_step_of_a_nonlinear_problem, schedule, mesh)
            with stop_annotating():
                if is_replayed:
                    reduced(Constant(0.2))
                found.append(reduced.derivative().dat.data_ro.copy())
            tape.clear_tape()
    np.testing.assert_array_equal(*found)


def test_solves_that_are_on_the_tape_already_stay_as_they_were():
    mesh, found = UnitSquareMesh(6, 6), []
    refinement = FixedRefinement(Iterations(3))
    for comes_under_control in (True, False):
        with set_working_tape(Tape()):
            problem = HeatStep(mesh=mesh, boundary=1.0)
            controls = [Control(problem.u0), Control(problem.kappa)]
            starts = [control.control.copy(deepcopy=True) for control in controls]
            solver = LinearVariationalSolver(problem.problem, solver_parameters={**CG, **CONVERGED})
            solver.solve()
            problem.u0.assign(problem.u)
            if comes_under_control:
                prdp_fem.control(solver, refinement)
            else:
                solver = prdp_fem.LinearVariationalSolver(
                    problem.problem, solver_parameters={**CG, **CONVERGED}, refinement=refinement
                )
            solver.solve()
            reduced = ReducedFunctional(assemble(problem.u**4 * dx), controls)
            with stop_annotating():
                solver.statistics.reset()
                for factor in (1.0, 1.3):
                    value = reduced(
                        [
                            Function(start.function_space()).assign(factor * start)
                            for start in starts
                        ]
                    )
                    found.append(
                        [
                            value,
                            *(whole(derivative.dat.data_ro) for derivative in reduced.derivative()),
                        ]
                    )
                assert (
                    solver.statistics.forward_iterations
                    == solver.statistics.adjoint_iterations
                    == 2 * 3
                )
    for one, other in zip(found[:2], found[2:]):
        for values, expected in zip(one, other):
            np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parallel(1)
def test_what_cannot_be_controlled_is_refused_and_left_as_it_was():
    problem = HeatStep()
    with pytest.raises(TypeError, match="expected a Firedrake LinearVariationalSolver.*found a"):
        prdp_fem.control(problem.problem, FixedRefinement(Iterations(3)))
    solver = LinearVariationalSolver(problem.problem)
    before = dict(vars(solver))
    with pytest.raises(TypeError, match="refinement must be a Refinement"):
        prdp_fem.control(solver, 3)
    assert type(solver) is LinearVariationalSolver and vars(solver) == before
    solver.solve()
    ours = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG)
    with pytest.raises(ValueError, match="ksp_prefix is chosen when it is made"):
        prdp_fem.control(ours, FixedRefinement(Iterations(3)), ksp_prefix="")
    assert prdp_fem.control(ours, FixedRefinement(Iterations(3)), warm_start=False) is ours


@pytest.mark.parametrize("make", [LinearVariationalSolver, NonlinearVariationalSolver])
def test_a_solve_that_was_looked_up_before_is_no_silent_one(make):
    V = FunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="heat")
    linear = make is LinearVariationalSolver
    problem = (
        LinearVariationalProblem(w * v * dx, v * dx, u)
        if linear
        else NonlinearVariationalProblem((u - 1) * v * dx, u)
    )
    with stop_annotating():
        solver = make(problem, solver_parameters={**CG, **CONVERGED})
        before = solver.solve
        prdp_fem.control(solver, None)
        with pytest.raises(RuntimeError, match="'heat' had before it came under control"):
            before()
        solver.solve()
        assert abs(assemble(u * dx) - 1) < 1e-8
