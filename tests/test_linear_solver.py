"""Solves: what they compute, what they count, and what they refuse."""

import warnings

import numpy as np
import pytest
from firedrake import *
from firedrake.exceptions import ConvergenceError
from mpi4py import MPI
from problems import (
    CG,
    CONVERGED,
    GMRES,
    RICHARDSON,
    AdvectionDiffusion,
    HeatStep,
    boundary_dofs,
    dense,
    norm_by_dofs,
    smooth,
    whole,
)

import prdp_fem
from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    ProgressiveRefinement,
    ScheduledRefinement,
    Tolerance,
)

pytestmark = pytest.mark.parallel([1, 2, 3])


def dense_right_hand_side(problem, A_full, boundary):
    """The right-hand side with boundary values lifted, and the boundary dofs, by NumPy."""
    b = whole(assemble(problem.L).dat.data_ro) - A_full @ boundary
    if problem.bcs:
        b[boundary_dofs(problem.bcs[0])] = 0.0
    return b


# Drop-in: the solutions are Firedrake's


def poisson_vector(mesh):
    V = VectorFunctionSpace(mesh, "CG", 2)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    g = smooth(V, 5)
    return LinearVariationalProblem(
        inner(grad(w), grad(v)) * dx,
        inner(smooth(V, 6), v) * dx,
        u,
        bcs=[DirichletBC(V, g, 1), DirichletBC(V.sub(0), 0.5, 3)],
    )


def poisson_dg(mesh):
    V = FunctionSpace(mesh, "DG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    n, h = FacetNormal(mesh), CellSize(mesh)
    a = (
        inner(grad(w), grad(v)) * dx
        - inner(avg(grad(w)), jump(v, n)) * dS
        - inner(jump(w, n), avg(grad(v))) * dS
        + 10 / avg(h) * inner(jump(w, n), jump(v, n)) * dS
        + (10 / h * w * v - inner(dot(grad(w), n), v) - inner(w, dot(grad(v), n))) * ds
    )
    return LinearVariationalProblem(a, smooth(V, 7) * v * dx, u)


def darcy_mixed(mesh):
    W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    (s, p) = TrialFunctions(W)
    (t, q) = TestFunctions(W)
    u = Function(W)
    a = (inner(s, t) - p * div(t) + q * div(s) + p * q) * dx
    return LinearVariationalProblem(
        a,
        smooth(W.sub(1).collapse(), 8) * q * dx,
        u,
        bcs=[DirichletBC(W.sub(0), as_vector([0.0, 1.0]), 3)],
    )


def cofunction_source(mesh):
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    load = assemble(smooth(V, 9) * v * dx)
    return LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx,
        load + smooth(V, 10) * v * ds,
        u,
        bcs=[DirichletBC(V, 1.0, 1)],
    )


def heat_expression_boundary(mesh):
    x, y = SpatialCoordinate(mesh)
    return HeatStep(mesh=mesh, boundary=sin(x) + y).problem


PROBLEMS = [
    poisson_vector,
    poisson_dg,
    darcy_mixed,
    cofunction_source,
    heat_expression_boundary,
    lambda mesh: HeatStep(mesh=mesh, boundary=None).problem,
    lambda mesh: HeatStep(mesh=mesh, boundary=0).problem,
]


@pytest.mark.parametrize("quadrilateral", [False, True])
@pytest.mark.parametrize("make", PROBLEMS)
def test_solves_what_firedrake_solves(make, quadrilateral):
    if quadrilateral and make is darcy_mixed:
        make = poisson_dg  # no RT on quadrilaterals under that name
    problem = make(UnitSquareMesh(4, 4, quadrilateral=quadrilateral))
    direct = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
    LinearVariationalSolver(problem, solver_parameters=direct).solve()
    expected = problem.u.copy(deepcopy=True)
    problem.u.assign(0)
    solver = prdp_fem.LinearVariationalSolver(
        problem,
        solver_parameters={
            "ksp_type": "gmres",
            "ksp_gmres_restart": 300,
            **CONVERGED,
            "pc_type": "none",
        },
    )
    assert solver.solve() is problem.u
    assert errornorm(expected, problem.u) < 1e-9 * max(1.0, norm(expected))


def test_solves_with_firedrakes_default_direct_solver_and_with_nullspaces():
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    x, _ = SpatialCoordinate(mesh)
    problem = LinearVariationalProblem(inner(grad(w), grad(v)) * dx, (x - 0.5) * v * dx, u)
    nullspace = VectorSpaceBasis(constant=True)
    prdp_fem.LinearVariationalSolver(
        problem,
        nullspace=nullspace,
        transpose_nullspace=nullspace,
        solver_parameters={**CG, **CONVERGED},
    ).solve()
    assert abs(assemble(u * dx)) < 1e-12
    assert norm_by_dofs(assemble(problem.F)) < 1e-10
    heat = HeatStep()
    prdp_fem.LinearVariationalSolver(heat.problem).solve()
    assert norm_by_dofs(assemble(heat.problem.F, bcs=heat.bcs, zero_bc_nodes=True)) < 1e-13


# K iterations are K iterations


@pytest.mark.parametrize("boundary", [None, 0, 1.5])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_richardson_is_richardson(count, boundary):
    problem = HeatStep(boundary=boundary)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(count)), solver_parameters=RICHARDSON
    )
    solver.solve()
    A, full = dense(problem.a, problem.bcs), dense(problem.a)
    g = np.zeros(len(A))
    if problem.bcs:
        g[boundary_dofs(problem.bcs[0])] = boundary
    b = dense_right_hand_side(problem, full, g)
    w = np.zeros_like(b)
    for _ in range(count):
        w += 0.6 * (b - A @ w) / np.diag(A)
    np.testing.assert_allclose(whole(problem.u.dat.data_ro), w + g, rtol=1e-12, atol=1e-15)
    assert (solver.statistics.solves, solver.statistics.forward_iterations) == (1, count)


@pytest.mark.parametrize("parameters", [CG, GMRES, RICHARDSON])
def test_iterations_and_errors_follow_the_level(parameters):
    problem = HeatStep()
    refinement = ScheduledRefinement(IterationLadder(1, 3, 13), {0: 0, 1: 1, 2: 2, 3: 3, 4: 4})
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=refinement, solver_parameters=parameters
    )
    residuals = []
    for level in range(5):
        before = solver.statistics.forward_iterations
        solver.solve()
        assert solver.statistics.forward_iterations - before == 1 + 3 * level
        residuals.append(
            norm_by_dofs(assemble(problem.problem.F, bcs=problem.bcs, zero_bc_nodes=True))
        )
        refinement.step(1.0)
    assert residuals == sorted(residuals, reverse=True) and len(set(residuals)) == 5
    assert solver.statistics.assemblies == 1  # going up a level sets up nothing


def test_an_iteration_ladder_stops_at_its_floor():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(500, rtol_floor=1e-12)),
        solver_parameters=CG,
    )
    solver.solve()
    assert 10 < solver.statistics.forward_iterations < 100


def test_tolerances_are_relative_to_the_right_hand_side_from_a_warm_start_too():
    problem = HeatStep(cells=16)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Tolerance(1e-6)),
        warm_start=True,
        solver_parameters=CG,
    )
    solver.solve()
    first = solver.statistics.forward_iterations
    solver.solve()
    assert first > 5
    # the second started where the first had arrived
    assert solver.statistics.forward_iterations == first


# A truncated solve is a function


@pytest.mark.parametrize("parameters", [CG, GMRES, RICHARDSON])
@pytest.mark.parametrize("operator", ["constant", "changes and returns"])
def test_equal_inputs_give_equal_bits_whatever_ran_between(parameters, operator):
    problem = HeatStep(boundary=1.0)
    refinement = ScheduledRefinement(IterationLadder(3, 4), {1: 5, 2: 5})
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=refinement, solver_parameters=parameters
    )
    first = solver.solve().dat.data_ro.copy()
    kappa, u0 = problem.kappa.copy(deepcopy=True), problem.u0.copy(deepcopy=True)
    problem.u0.assign(smooth(problem.V, 17)), problem.u.assign(7)
    if operator != "constant":
        problem.kappa.assign(3), problem.dt.assign(0.5)
    other = solver.solve().dat.data_ro.copy()
    refinement.step(1.0)
    solver.solve()
    refinement.level = 0
    problem.kappa.assign(kappa), problem.u0.assign(u0), problem.dt.assign(0.05)
    again = solver.solve().dat.data_ro
    if operator != "constant" and problem.mesh.comm.size > 2:
        # PETSc adds what several ranks send to one entry of a matrix in the order of arrival.
        equal = np.allclose(first, again, rtol=1e-13, atol=0)
    else:
        equal = np.array_equal(first, again)
    assert problem.mesh.comm.allreduce(equal, MPI.LAND)
    assert not problem.mesh.comm.allreduce(np.array_equal(first, other), MPI.LAND)


def test_changes_of_coefficients_boundary_values_and_mesh_are_seen():
    """What was assembled once does not go stale, and is not assembled again without need."""
    problem = HeatStep(boundary=Constant(1.0))
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**CG, **CONVERGED}
    )

    def check(assemblies):
        solver.solve()
        fresh = Function(problem.V)
        solve(problem.a == problem.L, fresh, bcs=problem.bcs)
        assert errornorm(fresh, problem.u) < 1e-12
        assert solver.statistics.assemblies == assemblies

    check(1)
    problem.u0.assign(2), problem.source.assign(3)
    check(1)
    problem.bcs[0].set_value(Constant(4.0))
    check(1)
    problem.kappa.dat.data[:] = 2.5  # behind Firedrake's back
    check(2)
    problem.dt.assign(0.1)
    check(3)
    problem.mesh.coordinates.dat.data[:] *= 1.1
    check(4)
    solver.invalidate_jacobian()
    check(5)


def test_a_mesh_that_moves_and_returns_leaves_nothing_on_coarser_meshes():
    """Coefficients are transferred there, to other values where the mesh is another one."""
    mesh = MeshHierarchy(UnitSquareMesh(4, 4), 1)[-1]
    V = FunctionSpace(mesh, "CG", 1)
    u, w, v, f, kappa = Function(V), TrialFunction(V), TestFunction(V), smooth(V, 1), Function(V)
    a = exp(kappa) * inner(grad(w), grad(v)) * dx + w * v * dx
    solver = prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(a, f * v * dx, u),
        refinement=FixedRefinement(Iterations(3)),
        solver_parameters={"ksp_type": "gmres", "pc_type": "mg", "mg_levels_pc_type": "jacobi"},
    )
    some, others = smooth(V, 2), smooth(V, 3)
    kappa.assign(some)
    solver.solve()
    expected = u.dat.data_ro.copy()
    places = mesh.coordinates.copy(deepcopy=True)
    x, y = SpatialCoordinate(mesh)
    mesh.coordinates.interpolate(as_vector([x + 0.05 * sin(pi * x), y]))
    for values in (others, some):
        kappa.assign(values)
        solver.solve()
    mesh.coordinates.assign(places)
    solver.solve()
    assert np.array_equal(u.dat.data_ro, expected)


def test_the_right_hand_side_may_contain_the_solution():
    problem = HeatStep()
    v = TestFunction(problem.V)
    step = LinearVariationalProblem(problem.a, problem.u * v * dx, problem.u, bcs=problem.bcs)
    expected = Function(problem.V).assign(problem.u0)
    problem.u.assign(problem.u0)
    solver = prdp_fem.LinearVariationalSolver(step, solver_parameters={**CG, **CONVERGED})
    for _ in range(3):
        solve(problem.a == expected.copy(deepcopy=True) * v * dx, expected, bcs=problem.bcs)
        solver.solve()
    assert errornorm(expected, problem.u) < 1e-12


# Failures say why, and change nothing


def refined(problem, setting, parameters):
    return prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(setting), solver_parameters=parameters
    )


@pytest.mark.parametrize(
    "setting, parameters, words",
    [
        (
            Iterations(50),
            {**RICHARDSON, "ksp_richardson_scale": 40.0},
            ["richardson", "DIVERGED_DTOL", "residual norm", "damp it"],
        ),
        (Tolerance(1e-10, max_it=2), CG, ["cg", "DIVERGED_MAX_IT", "after 2 iterations", "max_it"]),
    ],
)
def test_divergence_raises_with_reason_count_and_residual(setting, parameters, words):
    problem = HeatStep()
    problem.u.assign(3.0)
    with pytest.raises(ConvergenceError) as error:
        refined(problem, setting, parameters).solve()
    assert all(word in str(error.value) for word in words), str(error.value)
    assert np.all(problem.u.dat.data_ro == 3.0)
    from pyadjoint import get_working_tape

    assert not any(
        type(block).__name__ == "LinearSolveBlock" for block in get_working_tape().get_blocks()
    )


def test_nan_and_breakdown_raise():
    problem = HeatStep()
    problem.u0.dat.data[:] = np.nan
    with pytest.raises(ConvergenceError, match="NANORINF.*NaN"):
        refined(problem, Iterations(4), CG).solve()
    problem = HeatStep(boundary=None)
    problem.dt.assign(-1.0)
    with pytest.raises(ConvergenceError, match="INDEFINITE"):
        refined(problem, Iterations(20), CG).solve()


def test_without_a_refinement_the_options_decide():
    problem = HeatStep()
    with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT"):
        prdp_fem.LinearVariationalSolver(
            problem.problem, solver_parameters={**CG, "ksp_max_it": 2, "ksp_rtol": 1e-12}
        ).solve()
    parameters = {**CG, "ksp_max_it": 2, "ksp_convergence_test": "skip"}
    solver = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=parameters)
    solver.solve()
    assert solver.statistics.forward_iterations == 2


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("parameters", [None, {"ksp_type": "preonly", "pc_type": "lu"}])
def test_a_direct_solver_under_a_refinement_solves_at_each_level(parameters):
    problem = HeatStep()
    prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=parameters).solve()
    expected = problem.u.dat.data_ro.copy()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            refinement=ScheduledRefinement(IterationLadder(), {1: 1}),
            solver_parameters=parameters,
        )
        for _ in range(2):
            problem.u.assign(0)
            solver.solve()
            np.testing.assert_allclose(problem.u.dat.data_ro, expected, atol=1e-13)
            solver.refinement.step(1.0)
    about = [warning for warning in said if "nothing to refine" in str(warning.message)]
    assert len(about) == (1 if COMM_WORLD.rank == 0 else 0)


@pytest.mark.parallel(1)
def test_bad_input_is_refused_at_construction():
    problem = HeatStep()
    make = prdp_fem.LinearVariationalSolver
    ladder = ProgressiveRefinement(IterationLadder())
    with pytest.raises(ValueError, match="'implicit'.*found 'explicit'"):
        make(problem.problem, differentiation="explicit")
    once = {"ksp_type": "preonly", "pc_type": "jacobi"}
    with pytest.raises(ValueError, match="no iterations to refine.*ksp_type.*cg"):
        make(problem.problem, refinement=ladder, solver_parameters=once)
    with pytest.raises(TypeError, match="FixedRefinement"):
        make(problem.problem, refinement=20, solver_parameters=CG)
    with pytest.raises(TypeError, match="LinearVariationalProblem, found a Form"):
        make(problem.a)
    nonlinear = NonlinearVariationalProblem(problem.u**3 * TestFunction(problem.V) * dx, problem.u)
    with pytest.raises(TypeError, match="a == L"):
        make(nonlinear)
    with pytest.raises(TypeError, match="depends on the solution 'solution'"):
        w, v = TrialFunction(problem.V), TestFunction(problem.V)
        make(
            LinearVariationalProblem(
                (1 + problem.u**2) * w * v * dx, problem.u0 * v * dx, problem.u
            )
        )
    with pytest.raises(ValueError, match="restrict"):
        make(
            LinearVariationalProblem(
                problem.a, problem.L, problem.u, bcs=problem.bcs, restrict=True
            )
        )
    with pytest.raises(ValueError, match="variational inequality"):
        make(problem.problem).solve(bounds=(problem.u0, problem.u0))
    with pytest.raises(ValueError, match="post_function_callback"):
        make(problem.problem, post_function_callback=lambda x, f: None)


@pytest.mark.parallel(1)
def test_complex_petsc_is_refused(monkeypatch):
    monkeypatch.setattr("prdp_fem.solvers.arguments.complex_mode", True)
    with pytest.raises(ValueError, match="complex scalars"):
        prdp_fem.LinearVariationalSolver(HeatStep().problem)


# Native


def test_options_with_a_prefix_reach_the_ksp_and_monitors_print(capfd):
    problem = HeatStep()
    options = PETSc.Options()
    options["warm_ksp_monitor"] = None
    options["warm_ksp_type"] = "gmres"
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        options_prefix="warm_",
        solver_parameters=CG,
        refinement=FixedRefinement(Iterations(4)),
    )
    solver.solve()
    assert solver.snes.ksp.getType() == "gmres"
    output = capfd.readouterr().out
    printed = problem.mesh.comm.rank == 0
    assert ("Residual norms for warm_ solve" in output) is printed and output.count(
        "KSP Residual norm"
    ) == 5 * printed


def test_events_and_citation_are_registered(capfd):
    problem = HeatStep()
    PETSc.Log.begin()
    solver = refined(problem, Iterations(3), CG)
    before = PETSc.Log.Event("PRDPForward").getPerfInfo()["count"]
    solver.solve()
    assert PETSc.Log.Event("PRDPForward").getPerfInfo()["count"] == before + 1


def test_callbacks_and_application_context():
    problem = HeatStep()
    seen = []

    def callback(state):
        seen.append(state.norm())
        problem.kappa.assign(2.0)

    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        pre_jacobian_callback=callback,
        appctx={"diffusivity": problem.kappa},
        solver_parameters={**CG, **CONVERGED},
    )
    solver.solve()
    expected = Function(problem.V)
    solve(problem.a == problem.L, expected, bcs=problem.bcs)
    assert len(seen) == 1 and errornorm(expected, problem.u) < 1e-12


def test_statistics_count_and_reset():
    problem = AdvectionDiffusion()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(5)), solver_parameters=GMRES
    )
    solver.solve(), solver.solve()
    assert (
        solver.statistics.solves,
        solver.statistics.iterations,
        solver.statistics.adjoint_solves,
    ) == (2, 10, 0)
    assert solver.statistics.seconds > 0
    solver.statistics.reset()
    assert (solver.statistics.solves, solver.statistics.iterations, solver.statistics.seconds) == (
        0,
        0,
        0.0,
    )


@pytest.mark.parallel(1)
def test_a_direct_solver_leaves_a_guess_aside():
    problem = HeatStep()
    direct = {"ksp_type": "preonly", "pc_type": "lu"}
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, warm_start=True, solver_parameters=direct
    )
    expected = solver.solve().dat.data_ro.copy()
    problem.u.assign(problem.u + 1)
    np.testing.assert_allclose(solver.solve().dat.data_ro, expected, atol=1e-13)
