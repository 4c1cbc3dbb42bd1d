"""Derivatives on pyadjoint's tape, against Taylor's theorem, dense algebra and the definition of an
adjoint.
"""

import numpy as np
import pytest
from checkpoint_schedules import Revolve
from firedrake import *
from firedrake.adjoint import *
from problems import (
    CG,
    CONVERGED,
    GMRES,
    RICHARDSON,
    AdvectionDiffusion,
    HeatStep,
    boundary_dofs,
    dense,
    smooth,
    whole,
)

import prdp_fem
from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    NewtonSteps,
    ScheduledRefinement,
)

pytestmark = pytest.mark.parallel([1, 2, 3])

SOLVERS = {"cg": CG, "gmres": GMRES, "richardson": RICHARDSON}


def functional(problem):
    return assemble((problem.u**2 + sin(problem.u)) * dx)


def perturbation(control):
    if isinstance(control, Constant):
        return Constant(np.full(control.ufl_shape, 0.3))
    return smooth(control.function_space(), 11)


def heat(boundary=0, mesh=None):
    problem = HeatStep(boundary=boundary, mesh=mesh)
    return problem, {
        "initial": problem.u0,
        "source": problem.source,
        "diffusivity": problem.kappa,
        "time step": problem.dt,
    }


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["initial", "source", "diffusivity", "time step"])
def test_taylor_remainders_of_converged_solves(name, solver):
    problem, controls = heat(boundary=1.0)
    prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**SOLVERS[solver], **CONVERGED}
    ).solve()
    control = controls[name]
    reduced = ReducedFunctional(functional(problem), Control(control))
    with stop_annotating():
        start, direction = control._ad_copy(), perturbation(control)
        rate = taylor_test(reduced, start, direction)
    assert rate > 1.95, (
        f"first-order remainders with respect to {name} by {solver} fall at rate {rate}"
    )


def test_taylor_remainders_for_boundary_values_and_the_mesh():
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    g = smooth(V, 12)
    problem = HeatStep(mesh=mesh, boundary=g)
    prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters={**CG, **CONVERGED}).solve()
    reduced = ReducedFunctional(functional(problem), Control(g))
    assert taylor_test(reduced, g.copy(deepcopy=True), smooth(V, 13)) > 1.95


def test_taylor_remainders_for_boundary_values_of_a_mixed_problem():
    mesh = UnitSquareMesh(4, 4)
    V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
    W = V * Q
    (w, p) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    u = Function(W)
    g = smooth(V, 14)
    a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w) + 0.1 * p * q) * dx
    bcs = [DirichletBC(W.sub(0), g, (1, 2)), DirichletBC(W.sub(0), 0, 3)]
    problem = LinearVariationalProblem(a, inner(smooth(V, 15), v) * dx, u, bcs=bcs)
    prdp_fem.LinearVariationalSolver(
        problem, solver_parameters={"ksp_type": "minres", "pc_type": "none", **CONVERGED}
    ).solve()
    velocity, pressure = split(u)
    reduced = ReducedFunctional(
        assemble((inner(velocity, velocity) ** 2 + pressure**3) * dx), Control(g)
    )
    assert taylor_test(reduced, g.copy(deepcopy=True), smooth(V, 16)) > 1.95


def test_taylor_remainders_for_mesh_coordinates():
    with stop_annotating():
        problem = HeatStep()
    coordinates = problem.mesh.coordinates
    displacement = Function(coordinates.function_space())
    coordinates.assign(coordinates + displacement)
    prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters={**CG, **CONVERGED}).solve()
    reduced = ReducedFunctional(functional(problem), Control(displacement))
    with stop_annotating():
        direction = smooth(displacement.function_space(), 18)
        direction.assign(0.05 * direction)
        start = Function(displacement.function_space())
        assert taylor_test(reduced, start, direction) > 1.95
        reduced(start)
        tangent, gradient = reduced.tlm(direction), reduced.derivative()
        assert abs(tangent - assemble(action(gradient, direction))) < 1e-11


def test_a_matrix_of_numbers_as_a_control():
    mesh = UnitSquareMesh(3, 3)
    V = VectorFunctionSpace(mesh, "CG", 1)
    u, w, v, f = Function(V), TrialFunction(V), TestFunction(V), smooth(V, 1)
    A = Constant([[0.5, 0.2], [-0.1, 0.3]])
    problem = LinearVariationalProblem(inner(w, v) * dx, inner(A * f, v) * dx, u)
    prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}).solve()
    reduced = ReducedFunctional(assemble(inner(u, u) * dx), Control(A))
    with stop_annotating():
        # A f is in the space, and so is the solution.
        second_moments = [[assemble(f[i] * f[j] * dx) for j in range(2)] for i in range(2)]
        direction = np.array([[1.0, 2.0], [3.0, 4.0]])
        for found, matrix in (
            (reduced.derivative(), A.dat.data_ro.reshape(2, 2)),
            (reduced.hessian(Constant(direction)), direction),
        ):
            expected = 2 * matrix @ np.array(second_moments)
            assert np.allclose(found.dat.data_ro.reshape(2, 2), expected, rtol=1e-10)


def test_taylor_remainders_through_a_cofunction():
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    source = smooth(V, 9)
    load = assemble(source**2 * v * dx)
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx,
        2 * load + smooth(V, 10) * v * ds,
        u,
        bcs=[DirichletBC(V, 1.0, 1)],
    )
    prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}).solve()
    reduced = ReducedFunctional(assemble(u**3 * dx), Control(source))
    direction = smooth(V, 19)
    assert taylor_test(reduced, source.copy(deepcopy=True), direction) > 1.95
    reduced(source)
    tangent, gradient = reduced.tlm(direction), reduced.derivative()
    assert abs(tangent - assemble(action(gradient, direction))) < 1e-11


# Against dense algebra


@pytest.mark.parametrize("count", [1, 3, 6])
def test_truncated_adjoints_are_those_of_dense_algebra(count):
    """Implicit differentiation: K steps of the same iteration on the transposed system, restated in
    NumPy.
    """
    problem = AdvectionDiffusion()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(count)),
        solver_parameters={**RICHARDSON, "ksp_richardson_scale": 0.3},
    )
    solver.solve()
    weight = smooth(problem.V, 20)
    reduced = ReducedFunctional(assemble(weight * problem.u * dx), Control(problem.source))
    gradient = whole(reduced.derivative().dat.data_ro)
    A = dense(problem.a, problem.bcs)
    M = dense(TestFunction(problem.V) * TrialFunction(problem.V) * dx)
    cotangent, inner_rows = M @ whole(weight.dat.data_ro), M.copy()
    cotangent[boundary_dofs(problem.bcs[0])] = 0
    inner_rows[boundary_dofs(problem.bcs[0])] = 0
    multiplier = np.zeros_like(cotangent)
    for _ in range(count):
        multiplier += 0.3 * (cotangent - A.T @ multiplier) / np.diag(A)
    np.testing.assert_allclose(gradient, inner_rows.T @ multiplier, rtol=1e-11, atol=1e-16)
    assert solver.statistics.adjoint_iterations == count


def test_gradients_are_central_differences():
    problem, controls = heat(boundary=1.0)
    prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters={**CG, **CONVERGED}).solve()
    J = functional(problem)
    first, last = problem.V.dof_dset.layout_vec.getOwnershipRange()
    for name in ("source", "diffusivity"):
        control = controls[name]
        reduced = ReducedFunctional(J, Control(control))
        gradient = whole(reduced.derivative().dat.data_ro)
        for dof in (0, 17, 30):
            values = []
            for sign in (1, -1):
                moved = control.copy(deepcopy=True)
                values_of_rank = moved.dat.data
                if first <= dof < last:
                    values_of_rank[dof - first] += sign * 1e-5
                values.append(reduced(moved))
            assert abs((values[0] - values[1]) / 2e-5 - gradient[dof]) < 1e-8, (name, dof)


@pytest.mark.parametrize("make", [HeatStep, AdvectionDiffusion])
@pytest.mark.parametrize("count", [1, 4, None])
def test_adjoint_identity(make, count):
    """⟨u̇, w⟩ = ⟨ṁ, ū⟩, for truncated stationary iterations too: they are linear in the right-hand
    side.
    """
    problem = make()
    refinement = None if count is None else FixedRefinement(Iterations(count))
    prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=refinement,
        solver_parameters={**RICHARDSON, **CONVERGED, "ksp_richardson_scale": 0.3},
    ).solve()
    reduced = ReducedFunctional(functional(problem), Control(problem.source))
    direction = smooth(problem.V, 21)
    tangent = reduced.tlm(direction)
    with stop_annotating():
        product = assemble(action(reduced.derivative(), direction))
    assert abs(tangent - product) < 1e-12 * max(1, abs(tangent))


class WithoutConditions(AuxiliaryOperatorPC):
    """A preconditioner that mixes boundary rows with others."""

    def form(self, pc, test, trial):
        return inner(grad(trial), grad(test)) * dx + 3 * trial * test * dx, None


@pytest.mark.parametrize("nonlinear", [False, True])
def test_adjoint_identity_where_a_preconditioner_mixes_boundary_rows(nonlinear):
    """Truncated, by inputs of the operator and of boundary values."""
    mesh = UnitSquareMesh(6, 6)
    V = FunctionSpace(mesh, "CG", 1)
    u, w, v, f = Function(V), TrialFunction(V), TestFunction(V), smooth(V, 1)
    kappa = smooth(V, 2)
    conditions = DirichletBC(V, kappa * f, 1)
    parameters = {
        "ksp_type": "richardson",
        "ksp_richardson_scale": 0.3,
        "pc_type": "python",
        "pc_python_type": f"{__name__}.WithoutConditions",
        "aux_pc_type": "bjacobi",
        "aux_sub_pc_type": "lu",
    }
    L = f**2 * v * dx
    a = w * v * dx + exp(kappa) * inner(grad(w), grad(v)) * dx
    if nonlinear:
        problem = NonlinearVariationalProblem(action(a, u) - L, u, bcs=conditions)
        make, setting = prdp_fem.NonlinearVariationalSolver, NewtonSteps(1, Iterations(2))
    else:
        problem = LinearVariationalProblem(a, L, u, bcs=conditions)
        make, setting = prdp_fem.LinearVariationalSolver, Iterations(2)
    make(
        problem, refinement=FixedRefinement(setting), warm_start=False, solver_parameters=parameters
    ).solve()
    controls = f, kappa
    reduced = ReducedFunctional(assemble(u**2 * dx), [Control(control) for control in controls])
    with stop_annotating():
        directions = [smooth(V, 3), smooth(V, 4)]
        tangent = reduced.tlm(directions)
        product = sum(map(assemble, map(action, reduced.derivative(), directions)))
        assert abs(tangent - product) < 1e-12 * abs(tangent)


@pytest.mark.parametrize("name", ["initial", "source", "diffusivity", "time step"])
def test_tangents_are_adjoints_transposed(name):
    problem, controls = heat(boundary=1.0)
    prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters={**CG, **CONVERGED}).solve()
    control = controls[name]
    reduced = ReducedFunctional(functional(problem), Control(control))
    with stop_annotating():
        direction = perturbation(control)
        tangent, gradient = reduced.tlm(direction), reduced.derivative()
        product = (
            gradient._ad_dot(direction)
            if isinstance(control, Constant)
            else assemble(action(gradient, direction))
        )
    assert abs(tangent - product) < 1e-11 * max(1, abs(tangent))


# PETSc's eisenstat fails on several ranks: it asks their blocks for a product that they have not.
@pytest.mark.parametrize(
    "preconditioner", [pytest.param("eisenstat", marks=pytest.mark.ranks(1)), "kaczmarz"]
)
def test_preconditioners_without_a_transpose_get_an_adjoint_of_their_own(preconditioner):
    """These cannot be applied transposed in PETSc."""
    problem = AdvectionDiffusion()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        solver_parameters={
            "ksp_type": "gmres",
            "pc_type": preconditioner,
            **CONVERGED,
            "ksp_rtol": 1e-12,
        },
    )
    solver.solve()
    reduced = ReducedFunctional(functional(problem), Control(problem.source))
    assert taylor_test(reduced, problem.source.copy(deepcopy=True), smooth(problem.V, 22)) > 1.95


# The tape


def test_replays_and_gradients_do_not_depend_on_history():
    problem, controls = heat()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(5)), solver_parameters=CG
    )
    solver.solve()
    first = problem.u.copy(deepcopy=True)
    reduced = ReducedFunctional(functional(problem), Control(problem.u0))
    gradient = reduced.derivative().dat.data_ro.copy()
    assert reduced(smooth(problem.V, 23)) != reduced(smooth(problem.V, 24))
    reduced.derivative()
    reduced(problem.u0)
    assert np.array_equal(reduced.derivative().dat.data_ro, gradient)
    problem.u.assign(3)
    assert np.array_equal(solver.solve().dat.data_ro, first.dat.data_ro)


class Written:
    """A solve by a coefficient, boundary values and a mesh, which are written to without a tape."""

    def __init__(self):
        self.mesh = UnitSquareMesh(4, 4)
        V = self.V = FunctionSpace(self.mesh, "CG", 1)
        self.u, w, v = Function(V), TrialFunction(V), TestFunction(V)
        self.f, self.kappa = smooth(V, 1), smooth(V, 2)
        self.g = Function(V).interpolate(cos(sum(SpatialCoordinate(self.mesh))))
        self.weights = assemble(self.f * v * dx)
        a = w * v * dx + exp(self.kappa) * inner(grad(w), grad(v)) * dx
        problem = LinearVariationalProblem(
            a, self.f * v * dx, self.u, bcs=DirichletBC(V, (1 + self.g) ** 2, 1)
        )
        self.solver = prdp_fem.LinearVariationalSolver(
            problem, solver_parameters={**CG, **CONVERGED}
        )
        self.written = {
            "coefficient": self.kappa,
            "boundary": self.g,
            "mesh": self.mesh.coordinates,
        }

    def write(self, what, factor):
        values = self.written[what].dat
        values.data[...] *= factor

    def reduced(self):
        """Of what depends on the solution alone, since Firedrake's own blocks look at the tape."""
        with set_working_tape(Tape()):
            self.solver.solve()
            controls = [Control(self.kappa), Control(self.g)]
            return ReducedFunctional(assemble(action(self.weights, self.u)), controls)


@pytest.mark.parametrize("what", ["coefficient", "boundary", "mesh"])
def test_what_is_written_between_tapes_is_what_solves_are_differentiated_at(what):
    """Though a tape of before is still there, with other values of it."""
    with stop_annotating():
        written, anew = Written(), Written()
    first = written.reduced()
    written.write(what, 1.5)
    second = written.reduced()
    anew.write(what, 1.5)

    def gradients(reduced) -> list:
        """Sorted, since the two meshes may be dealt to ranks in two ways."""
        return [np.sort(whole(gradient.dat.data_ro)) for gradient in reduced.derivative()]

    expected = gradients(anew.reduced())

    def is_expected(reduced) -> bool:
        return all(map(np.allclose, gradients(reduced), expected))

    assert is_expected(second)
    with stop_annotating():
        if what != "mesh":
            assert not is_expected(first)
            # From now on the tape has values of its own.
            point = [written.kappa.copy(deepcopy=True), written.g.copy(deepcopy=True)]
            second([Function(value).assign(0.5 * value) for value in point])
            assert not is_expected(second)
            second(point)
            assert is_expected(second)


def test_replay_leaves_the_users_functions_alone():
    problem, controls = heat()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(5)), solver_parameters=CG
    )
    solver.solve()
    reduced = ReducedFunctional(functional(problem), [Control(problem.u0), Control(problem.kappa)])
    before = [f.dat.data_ro.copy() for f in (problem.u0, problem.kappa, problem.u, problem.source)]
    reduced([smooth(problem.V, 25), Function(problem.V).assign(3.0)])
    reduced.derivative()
    after = [f.dat.data_ro for f in (problem.u0, problem.kappa, problem.u, problem.source)]
    assert all(np.array_equal(x, y) for x, y in zip(before, after))


def test_a_backward_pass_uses_the_setting_of_its_forward_pass():
    problem, _ = heat()
    refinement = ScheduledRefinement(IterationLadder(2, 5), {1: 1, 2: 2})
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=refinement, solver_parameters=CG
    )
    solver.solve()
    reduced = ReducedFunctional(functional(problem), Control(problem.u0))
    gradient = reduced.derivative().dat.data_ro.copy()
    refinement.step(1.0)
    assert np.array_equal(reduced.derivative().dat.data_ro, gradient)
    assert solver.statistics.adjoint_iterations == 4
    reduced(problem.u0)  # a new evaluation: at the new level
    reduced.derivative()
    assert (solver.statistics.forward_iterations, solver.statistics.adjoint_iterations) == (
        2 + 7,
        4 + 7,
    )


def time_loop(schedule, mesh):
    """Value and gradient of a functional of truncated solves in a time loop."""
    with set_working_tape(Tape()) as tape:
        if schedule is not None:
            tape.enable_checkpointing(schedule)
        problem, _ = heat(mesh=mesh)
        refinement = ScheduledRefinement(IterationLadder(3, 3), {1: 3})
        state = Function(problem.V).assign(problem.u0)
        step = LinearVariationalProblem(
            problem.a, state * TestFunction(problem.V) * dx, problem.u, bcs=problem.bcs
        )
        solver = prdp_fem.LinearVariationalSolver(step, refinement=refinement, solver_parameters=CG)
        for _ in tape.timestepper(iter(range(6))):
            solver.solve()
            state.assign(problem.u)
        reduced = ReducedFunctional(assemble(state**2 * dx), Control(problem.u0))
        value = reduced(smooth(problem.V, 26))
        refinement.step(1.0)  # the backward pass, and what it recomputes, must not see it
        gradient = reduced.derivative().dat.data_ro.copy()
        assert solver.statistics.adjoint_iterations == 6 * 3
        return value, gradient


def test_time_loops_give_the_same_bits_under_a_checkpoint_schedule():
    # one for both: each mesh is cut into parts anew, and sums over ranks are rounded accordingly
    mesh = UnitSquareMesh(6, 6)
    value, gradient = time_loop(None, mesh)
    scheduled_value, scheduled_gradient = time_loop(Revolve(6, 2), mesh)
    assert value == scheduled_value and np.array_equal(gradient, scheduled_gradient)


def test_ranks_may_have_the_checkpoint_of_a_mesh_from_different_tapes():
    """As where Python has not yet found a tape of before to be garbage, and the mesh's block
    variable is still that tape's.
    """
    problem, _ = heat()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**CG, **CONVERGED}
    )
    solver.solve()
    reduced = ReducedFunctional(functional(problem), Control(problem.u0))
    with stop_annotating():
        value = reduced(problem.u0)
        gradient = reduced.derivative().dat.data_ro.copy()
        variable = problem.mesh.block_variable
        another = variable.checkpoint.copy(deepcopy=True)
        if COMM_WORLD.rank > 0:
            variable.checkpoint = another
        assert reduced(problem.u0) == value
        np.testing.assert_array_equal(reduced.derivative().dat.data_ro, gradient)
    assert solver.statistics.assemblies == 1


def test_what_a_tape_of_before_has_saved_is_forgotten_on_all_ranks():
    with stop_annotating():
        problem, _ = heat()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**CG, **CONVERGED}
    )
    kept = []

    def gradient(problem, solver):
        with set_working_tape(Tape()) as tape:
            solver.solve()
            reduced = ReducedFunctional(functional(problem), Control(problem.kappa))
            if COMM_WORLD.rank == 0:  # as where Python has not yet found it to be garbage
                kept.append(tape)
            return reduced.derivative().dat.data_ro.copy()

    gradient(problem, solver)
    with stop_annotating():  # the block variables on the tape of before know nothing of this
        problem.u0.assign(2 * problem.u0)
        problem.kappa.assign(3 * problem.kappa)
    found = gradient(problem, solver)
    if COMM_WORLD.size == 1:
        return  # pyadjoint's rule: what is on a tape has the value that it had there
    with stop_annotating():
        fresh, _ = heat(mesh=problem.mesh)
        fresh.u0.assign(problem.u0)
        fresh.kappa.assign(problem.kappa)
    np.testing.assert_array_equal(
        found,
        gradient(
            fresh,
            prdp_fem.LinearVariationalSolver(fresh.problem, solver_parameters={**CG, **CONVERGED}),
        ),
    )


def test_warm_starts_depend_on_the_guess_and_on_nothing_else():
    problem, _ = heat(boundary=1.0)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(2)),
        warm_start=True,
        solver_parameters=CG,
    )
    guess = smooth(problem.V, 27)
    problem.u.assign(guess)
    solver.solve()
    first = problem.u.dat.data_ro.copy()
    reduced = ReducedFunctional(functional(problem), [Control(problem.u0)])
    value = reduced([problem.u0])
    solver.solve()
    assert not np.array_equal(problem.u.dat.data_ro, first)
    assert reduced([problem.u0]) == value


def test_minimize_finds_a_source():
    problem, _ = heat()
    target = problem.source.copy(deepcopy=True)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**CG, **CONVERGED}
    )
    solver.solve()
    observed = problem.u.copy(deepcopy=True)
    get_working_tape().clear_tape()
    problem.source.assign(0)
    solver.solve()
    reduced = ReducedFunctional(
        assemble(1e6 * (problem.u - observed) ** 2 * dx), Control(problem.source)
    )
    found = minimize(
        reduced,
        method="L-BFGS-B",
        options={"maxiter": 200, "ftol": 1e-16, "gtol": 1e-12, "disp": False},
    )
    assert reduced(found) < 1e-6 * reduced(Function(problem.V))
    assert errornorm(found, target) < 0.5 * norm(target)


def test_annotation_can_be_left_out_and_blocks_carry_tags():
    problem, _ = heat()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, ad_block_tag="heat", solver_parameters=CG
    )
    tape = get_working_tape()
    before = len(tape.get_blocks())
    solver.solve(annotate=False)
    assert len(tape.get_blocks()) == before
    solver.solve()
    assert tape.get_blocks()[-1].tag == "heat" and "solve" in str(tape.get_blocks()[-1])
