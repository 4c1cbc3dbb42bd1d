"""What would go wrong unseen: structure that derivatives do not show, quadrature, ranks that
differ, preconditioners with memory.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import factorised, gradcheck, samples
from firedrake import *
from firedrake.adjoint import *
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from problems import (
    CG,
    CONVERGED,
    GMRES,
    AdvectionDiffusion,
    HeatStep,
    dense,
    equality,
    norm_by_dofs,
    smooth,
    whole,
)

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, NewtonSteps, ScheduledRefinement
from prdp_fem.torch import SolverLayer, to_torch

pytestmark = pytest.mark.parallel([1, 2, 3])


def solution_of_firedrake(problem, **kwargs):
    before = problem.u.copy(deepcopy=True)
    LinearVariationalSolver(problem, solver_parameters={**GMRES, **CONVERGED}, **kwargs).solve()
    expected = problem.u.copy(deepcopy=True)
    problem.u.assign(before)
    return expected


def step_function(f):
    return conditional(gt(f, 0.5), 1.0, 0.0)


@pytest.mark.parametrize(
    "source",
    [
        lambda f, g: f + step_function(f),
        lambda f, g: f + sign(f - 0.5),
        lambda f, g: f + abs(f - 0.5),
        lambda f, g: f * g + f,
        lambda f, g: max_value(f, g) + f,
        lambda f, g: step_function(g) * f,
        lambda f, g: f.dx(0) + 2 * f / 3 + g,
        lambda f, g: exp(g) + f,
    ],
    ids=["conditional", "sign", "abs", "product", "maximum", "coefficient", "linear", "exp"],
)
def test_right_hand_sides_that_look_affine_to_a_derivative(source):
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    f, g = smooth(V, 1, "f"), smooth(V, 2, "g")
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx,
        source(f, g) * v * dx + f * v * ds(1),
        u,
        bcs=[DirichletBC(V, 1.0, 2)],
    )
    expected = solution_of_firedrake(problem)
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED})
    solver.solve()
    assert errornorm(expected, u) < 1e-11
    f.assign(0.7 * f + 0.1)
    solver.solve()
    assert errornorm(solution_of_firedrake(problem), u) < 1e-11


@pytest.mark.parametrize("parameters", [None, {"quadrature_degree": 2}])
def test_terms_are_integrated_as_the_whole_and_derivatives_as_what_they_derive(parameters):
    mesh = UnitSquareMesh(3, 3)
    V, P4 = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "CG", 4)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    f, g = smooth(P4, 1, "f"), smooth(V, 2, "g")
    L = (f + exp(3 * g)) * v * dx
    problem = LinearVariationalProblem(w * v * dx, L, u, form_compiler_parameters=parameters)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}), [g]
    )
    layer.solver.solve()
    b = whole(assemble(L, form_compiler_parameters=parameters).dat.data_ro)
    np.testing.assert_allclose(
        dense(w * v * dx, form_compiler_parameters=parameters) @ whole(u.dat.data_ro), b, rtol=1e-12
    )
    # Exact to rounding, not only up to quadrature errors: what gradcheck differences is what was
    # differentiated.
    assert gradcheck(layer, to_torch(g, copy=True).requires_grad_(), atol=1e-6, rtol=1e-8)


@pytest.mark.parametrize("name", ["u0", "source", "kappa", "squared"])
def test_a_field_that_changes_on_one_rank_only(name):
    """Halo exchanges and assembly are collective: ranks must agree that something has changed."""
    problem = HeatStep()
    v = TestFunction(problem.V)
    squared = smooth(problem.V, 3)
    variational = LinearVariationalProblem(
        problem.a, problem.L + squared**2 * v * dx, problem.u, bcs=problem.bcs
    )
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(variational, solver_parameters={**CG, **CONVERGED}),
        [problem.dt],
    )
    layer.solver.solve()
    field = squared if name == "squared" else getattr(problem, name)
    data = field.dat.data
    if problem.mesh.comm.rank == 0 and data.size:
        data[0] += 1.0
    dt = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    weights = torch.ones(problem.u.dat.data_ro.size, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weights * layer(dt)).sum(), dt)
    layer.solver.solve()
    assert errornorm(solution_of_firedrake(variational), problem.u) < 1e-11
    values = []
    for sign_ in (1, -1):
        problem.dt.assign(0.05 + sign_ * 1e-5)
        layer.solver.solve()
        values.append(problem.mesh.comm.allreduce(problem.u.dat.data_ro.sum()))
    assert abs((values[0] - values[1]) / 2e-5 - gradient.item()) < 1e-6 * abs(gradient.item())


@pytest.mark.parametrize(
    "parameters",
    [
        {"ksp_type": "cg", "pc_type": "gamg"},
        {"ksp_type": "cg", **factorised("icc")},
        {"ksp_type": "gmres", "pc_type": "sor"},
        {"ksp_type": "chebyshev", "pc_type": "jacobi"},
        {"ksp_type": "bcgs", "pc_type": "bjacobi"},
    ],
)
def test_operators_that_change_and_return_give_the_same_bits(parameters):
    problem, equal = HeatStep(cells=16), equality(parameters)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(3)), solver_parameters=parameters
    )
    first = solver.solve().dat.data_ro.copy()
    kappa = problem.kappa.copy(deepcopy=True)
    problem.kappa.interpolate(1 + 50 * SpatialCoordinate(problem.mesh)[1])
    solver.solve()
    problem.kappa.assign(kappa)
    assert equal(first, solver.solve().dat.data_ro)
    problem.u0.dat.data[:] = np.nan
    with pytest.raises(ConvergenceError):
        solver.solve()
    problem.u0.assign(smooth(problem.V, 1))
    assert equal(first, solver.solve().dat.data_ro)


def stokes():
    mesh = UnitSquareMesh(4, 4)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    (w, p) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    u = Function(W)
    force = smooth(W.sub(0).collapse(), 4, "force")
    a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w)) * dx
    return (
        LinearVariationalProblem(
            a, inner(force, v) * dx, u, bcs=[DirichletBC(W.sub(0), 0, "on_boundary")]
        ),
        force,
    )


SCHUR = {
    "mat_type": "matfree",
    "ksp_type": "fgmres",
    "pc_type": "fieldsplit",
    "pc_fieldsplit_type": "schur",
    "pc_fieldsplit_schur_fact_type": "full",
    "fieldsplit_0": {
        "ksp_type": "preonly",
        "pc_type": "python",
        "pc_python_type": "firedrake.AssembledPC",
        "assembled_pc_type": "lu",
    },
    "fieldsplit_1": {
        "ksp_type": "preonly",
        "pc_type": "python",
        "pc_python_type": "firedrake.MassInvPC",
    },
}


@pytest.mark.parametrize("kind", ["schur", "additive"])
def test_preconditioners_of_firedrake_inside_a_fieldsplit(kind):
    problem, force = stokes()
    W = problem.u.function_space()
    parameters = {**SCHUR, "pc_fieldsplit_type": kind, **CONVERGED, "ksp_rtol": 1e-11}
    nullspace = MixedVectorSpaceBasis(
        W, [W.sub(0), VectorSpaceBasis(constant=True, comm=W.mesh().comm)]
    )
    solver = prdp_fem.LinearVariationalSolver(
        problem, nullspace=nullspace, transpose_nullspace=nullspace, solver_parameters=parameters
    )
    solver.solve()
    with stop_annotating():
        assert (
            norm(
                assemble(problem.F, bcs=problem.bcs, zero_bc_nodes=True).riesz_representation("l2")
            )
            < 1e-8
        )
    reduced = ReducedFunctional(
        assemble(inner(problem.u.sub(0), problem.u.sub(0)) * dx), Control(force)
    )
    assert taylor_test(reduced, force.copy(deepcopy=True), smooth(force.function_space(), 5)) > 1.95


def test_a_matrix_free_hybridised_problem_has_an_adjoint():
    mesh = UnitSquareMesh(3, 3)
    W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    (s, p) = TrialFunctions(W)
    (t, q) = TestFunctions(W)
    u = Function(W)
    source = smooth(W.sub(1).collapse(), 6, "source")
    problem = LinearVariationalProblem(
        (inner(s, t) - p * div(t) + q * div(s) + p * q) * dx, source * q * dx, u
    )
    prdp_fem.LinearVariationalSolver(
        problem,
        solver_parameters={
            "mat_type": "matfree",
            "ksp_type": "preonly",
            "pc_type": "python",
            "pc_python_type": "firedrake.HybridizationPC",
            "hybridization": {"ksp_type": "preonly", "pc_type": "lu"},
        },
    ).solve()
    reduced = ReducedFunctional(assemble(u.sub(1) ** 3 * dx), Control(source))
    assert (
        taylor_test(reduced, source.copy(deepcopy=True), smooth(source.function_space(), 7)) > 1.95
    )


def test_warm_starts_from_far_away_and_users_tolerances():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, warm_start=True, solver_parameters={**CG, **CONVERGED}
    )
    problem.u.assign(1e9)
    solver.solve()
    assert errornorm(solution_of_firedrake(problem.problem), problem.u) < 1e-5
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(3)), solver_parameters=CG
    )
    solver.solve()
    solver.snes.ksp.setTolerances(max_it=9)
    solver.solve()
    # the ladder decides, whatever was done in between
    assert solver.statistics.forward_iterations == 6
    solver.refinement = None
    solver.solve()
    assert solver.statistics.forward_iterations > 6 + 9  # as the options say
    with pytest.raises(TypeError, match="FixedRefinement"):
        solver.refinement = 20


def test_components_of_vector_functions_are_coefficients():
    mesh = UnitSquareMesh(3, 3)
    V, X = FunctionSpace(mesh, "CG", 1), VectorFunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    wind = smooth(X, 8, "wind")
    problem = LinearVariationalProblem((w * v + wind.sub(1) * w * v) * dx, wind.sub(0) * v * dx, u)
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED})
    with stop_annotating():  # pyadjoint cannot keep a component of a Function
        for _ in range(2):
            solver.solve()
            assert errornorm(solution_of_firedrake(problem), u) < 1e-12
            wind.assign(2 * wind)


def test_weights_of_cofunctions():
    problem = HeatStep()
    v = TestFunction(problem.V)
    load = assemble(problem.source * v * dx)
    variational = LinearVariationalProblem(
        problem.a, 2 * load - 0.5 * load, problem.u, bcs=problem.bcs
    )
    prdp_fem.LinearVariationalSolver(variational, solver_parameters={**CG, **CONVERGED}).solve()
    expected = Function(problem.V)
    solve(problem.a == 1.5 * problem.source * v * dx, expected, bcs=problem.bcs)
    assert errornorm(expected, problem.u) < 1e-12
    with pytest.raises(TypeError, match="weight of Cofunction.*must be a number"):
        prdp_fem.LinearVariationalSolver(
            LinearVariationalProblem(problem.a, Constant(2.0) * load, problem.u, bcs=problem.bcs)
        )


def test_where_conditions_overlap_the_last_one_is_differentiated():
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    g = [smooth(V, seed) for seed in (1, 2)]
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx,
        smooth(V, 3) * v * dx,
        u,
        bcs=[DirichletBC(V, g[0], 1), DirichletBC(V, g[1], (2, 3))],
    )
    prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}).solve()
    reduced = ReducedFunctional(assemble(u**4 * dx), [Control(f) for f in g])
    direction = [smooth(V, seed) for seed in (5, 6)]
    assert taylor_test(reduced, [f.copy(deepcopy=True) for f in g], direction) > 1.95


def test_a_functional_replays_outside_its_tape_at_the_setting_of_the_moment():
    refinement = ScheduledRefinement(IterationLadder(2, 5), {1: 1})
    with set_working_tape(Tape()):
        problem = HeatStep()
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem, refinement=refinement, solver_parameters=CG
        )
        solver.solve()
        reduced = ReducedFunctional(assemble(problem.u**2 * dx), Control(problem.u0))
    refinement.step(1.0)
    reduced(problem.u0)
    assert solver.statistics.forward_iterations == 2 + 7


# What ranks could see differently


@pytest.mark.parallel([2, 3])
def test_a_source_that_changes_on_one_rank_only():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**CG, **CONVERGED}
    )
    solver.solve()
    source = problem.source.dat.data
    if COMM_WORLD.rank == 0:
        source[:3] = 5.0
    solver.solve()
    found = problem.u.copy(deepcopy=True)
    assert errornorm(solution_of_firedrake(problem.problem), found) < 1e-11


@pytest.mark.parallel([2, 3])
def test_results_that_one_rank_keeps():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG)
    control = Control(problem.kappa)
    for _ in range(3):
        solver.solve()
        problem.u0.assign(problem.u)
    reduced = ReducedFunctional(assemble(problem.u**2 * dx), control)
    kept = []
    kappa = problem.kappa.copy(deepcopy=True)
    with stop_annotating():
        reduced(kappa)
        expected = reduced.derivative().dat.data_ro.copy()
        for _ in range(4):
            reduced(kappa)
            gradient = reduced.derivative()
            np.testing.assert_array_equal(gradient.dat.data_ro, expected)
            if COMM_WORLD.rank == 0:
                kept.append(gradient)
                kept += [
                    block.get_outputs()[0].saved_output for block in get_working_tape().get_blocks()
                ]


def test_results_that_are_kept_do_not_change():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG)
    control = Control(problem.u0)
    solver.solve()
    reduced = ReducedFunctional(problem.u.copy(deepcopy=True), control)
    start = problem.u0.copy(deepcopy=True)
    with stop_annotating():
        first = reduced(start)
        values = first.dat.data_ro.copy()
        reduced(smooth(problem.V, 9))
        np.testing.assert_array_equal(first.dat.data_ro, values)


# Preconditioners that remember, and that break


@pytest.mark.parametrize(
    "parameters",
    [
        {
            "ksp_type": "cg",
            "pc_type": "python",
            "pc_python_type": "firedrake.AssembledPC",
            "assembled_pc_type": "gamg",
        },
        {"ksp_type": "fgmres", "pc_type": "ksp", "ksp_ksp_type": "preonly", "ksp_pc_type": "gamg"},
    ],
    ids=["assembled", "ksp"],
)
@pytest.mark.parametrize("nonlinear", [False, True])
def test_multigrid_inside_a_preconditioner_does_not_remember(parameters, nonlinear):
    V = FunctionSpace(UnitSquareMesh(12, 12), "CG", 1)
    u = Function(V)
    v = TestFunction(V)
    w = TrialFunction(V)
    k = Function(V)
    f = smooth(V, 1)
    if nonlinear:
        problem = NonlinearVariationalProblem(
            (k * (1 + u**2) * inner(grad(u), grad(v)) + u * v - f * v) * dx, u
        )
        make, setting = prdp_fem.NonlinearVariationalSolver, NewtonSteps(2, Iterations(2))
    else:
        problem = LinearVariationalProblem(
            (k * inner(grad(w), grad(v)) + w * v) * dx, f * v * dx, u
        )
        make, setting = prdp_fem.LinearVariationalSolver, Iterations(2)
    k.assign(1.0)

    def layer():
        return SolverLayer(
            make(problem, solver_parameters=parameters, refinement=FixedRefinement(setting)), [k]
        )

    def evaluate(layer, sample):
        x = sample.clone().requires_grad_()
        out = layer(x)
        out.sum().backward()
        return out.detach(), x.grad

    rough = torch.exp(6 * (samples(k, seed=1) - 1))
    used = layer()
    evaluate(used, torch.ones_like(rough))
    batch = layer()(torch.stack([torch.ones_like(rough), rough]))
    equal = equality(parameters)
    for one, again in zip(evaluate(layer(), rough), evaluate(used, rough)):
        assert equal(one, again)
    assert equal(batch[1].detach(), evaluate(layer(), rough)[0])


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"ksp_type": "cg", "pc_type": "gamg"}, "look for"),
        ({"ksp_type": "gmres", **factorised("ilu")}, "look for"),
        # PETSc's own factorisation, which is for one rank. Once MUMPS has met NaN, its solves fail
        # (INFOG(1)=-3), with stock solvers as well.
        pytest.param(
            {"ksp_type": "preonly", "pc_type": "lu"}, "look for", marks=pytest.mark.ranks(1)
        ),
        ({"ksp_type": "cg", "pc_type": "jacobi"}, "look for"),
    ],
)
def test_a_solver_recovers_from_nan_in_its_operator(parameters, words):
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=parameters)
    expected = solver.solve().dat.data_ro.copy()
    kappa = problem.kappa.copy(deepcopy=True)
    problem.kappa.assign(np.nan)
    for _ in range(2):
        with pytest.raises(ConvergenceError, match=f"'solution'.*{words}"):
            solver.solve()
        np.testing.assert_array_equal(problem.u.dat.data_ro, expected)
    problem.kappa.assign(kappa)
    assert equality(parameters)(solver.solve().dat.data_ro, expected)


@pytest.mark.parametrize("parameters", [CG, {"ksp_type": "preonly", "pc_type": "lu"}])
def test_an_operator_that_turns_singular_is_an_error_with_the_name_of_the_solution(parameters):
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="flame")
    c = Constant(1.0)
    problem = LinearVariationalProblem(c * w * v * dx, v * dx, u)
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters=parameters)
    solver.solve()
    blocks = len(get_working_tape().get_blocks())
    c.assign(0.0)
    with pytest.raises(ConvergenceError, match="'flame'"):
        solver.solve()
    assert len(get_working_tape().get_blocks()) == blocks + 1  # the assignment


def test_a_preconditioner_that_petsc_does_not_have_for_an_operator_is_said_to_be_so():
    pc_type = "tfs" if COMM_WORLD.size == 1 else "cp"
    solver = prdp_fem.LinearVariationalSolver(
        HeatStep().problem, solver_parameters={"ksp_type": "gmres", "pc_type": pc_type}
    )
    with pytest.raises(
        ConvergenceError,
        match=(
            rf"pc_type {pc_type}\).* PETSc does not have it for this operator \(Currently .*"
            r" matr.*\): "
            "use another pc_type"
        ),
    ):
        solver.solve()


@pytest.mark.parallel(1)
@pytest.mark.parametrize("method", ["lgmres", "dgmres", "qmrcgs"])
def test_methods_that_remember_are_refused(method):
    with pytest.raises(ValueError, match=f"{method} keeps vectors of earlier solves"):
        prdp_fem.LinearVariationalSolver(
            HeatStep().problem,
            solver_parameters={"ksp_type": method, "pc_type": "jacobi"},
            refinement=FixedRefinement(Iterations(3)),
        )


@pytest.mark.parametrize("method", ["bicg", "bcgsl", "cgls", "cgne", "gcr", "lsqr", "tfqmr"])
def test_truncated_adjoints_are_the_methods_own_on_the_transposed_matrix(method):
    """PETSc's, on a matrix that was transposed by hand."""
    problem = AdvectionDiffusion()
    V, v = problem.V, TestFunction(problem.V)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        solver_parameters={"ksp_type": method, "pc_type": "jacobi"},
        refinement=FixedRefinement(Iterations(4)),
    )
    solver.solve()
    weight = smooth(V, 8)
    with stop_annotating():
        functional = assemble(weight * v * dx)
    gradient = ReducedFunctional(
        assemble(inner(weight, problem.u) * dx), Control(problem.source)
    ).derivative(apply_riesz=False)
    with stop_annotating():
        A = assemble(problem.a, bcs=problem.bcs, mat_type="aij").petscmat.transpose()
        B = assemble(TrialFunction(V) * v * dx, mat_type="aij").petscmat
        for bc in problem.bcs:
            bc.zero(functional)
        multiplier, expected = Function(V), Cofunction(V.dual())
        ksp = PETSc.KSP().create(V.mesh().comm)
        ksp.setOperators(A)
        ksp.setType(method)
        ksp.getPC().setType("jacobi")
        ksp.setTolerances(rtol=1e-50, max_it=4)
        with functional.dat.vec_ro as b, multiplier.dat.vec as x:
            ksp.solve(b, x)
        for bc in problem.bcs:
            bc.zero(multiplier)
        with multiplier.dat.vec_ro as x, expected.dat.vec as y:
            B.multTranspose(x, y)
    difference = Cofunction(V.dual()).assign(gradient - expected)
    assert norm_by_dofs(difference) < 1e-12 * norm_by_dofs(expected)


def test_tolerances_of_linear_solves_are_not_chosen_by_a_newton_iteration_that_is_over():
    """Eisenstat and Walker's tolerances are for the steps, neither for their derivative nor for a
    linear problem.
    """
    parameters = {
        **GMRES,
        **CONVERGED,
        "snes_ksp_ew": None,
        "snes_rtol": 1e-13,
        "snes_atol": 1e-13,
        "snes_stol": 0,
    }
    problem = AdvectionDiffusion()
    u, v = problem.u, TestFunction(problem.V)
    nonlinear = NonlinearVariationalProblem(
        replace(problem.a, {TrialFunction(problem.V): u}) + (u**3 - problem.source) * v * dx,
        u,
        bcs=problem.bcs,
    )
    for make in (
        lambda: prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=parameters),
        lambda: prdp_fem.NonlinearVariationalSolver(
            nonlinear, solver_parameters=parameters, warm_start=False
        ),
    ):
        solver = make()
        solver.solve()
        reduced = ReducedFunctional(assemble(inner(u, u) * dx), Control(problem.source))
        reduced.derivative()
        assert solver.statistics.adjoint_iterations > 15
        direction = smooth(problem.V, 9)
        steps = [
            problem.source.copy(deepcopy=True).assign(problem.source + sign * 1e-4 * direction)
            for sign in (1, -1)
        ]
        gradient = reduced.derivative(apply_riesz=False)
        with direction.dat.vec_ro as d, gradient.dat.vec_ro as g:
            slope = d.dot(g)
        above, below = map(reduced, steps)
        assert abs(slope - (above - below) / 2e-4) < 1e-7 * abs(slope)


def test_an_additive_schwarz_star_is_looked_into_before_it_is_set_up():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(2)),
        solver_parameters={
            "ksp_type": "cg",
            "pc_type": "python",
            "pc_python_type": "firedrake.ASMStarPC",
        },
    )
    solver.solve()
    assert solver.statistics.forward_iterations == 2


# Jacobians, conditions and expressions


def test_inputs_that_the_users_jacobian_lacks_change_the_adjoint():
    V = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
    u = Function(V)
    v = TestFunction(V)
    w = TrialFunction(V)
    k = Constant(1.0)
    f = Function(V)
    F = (k * inner(grad(u), grad(v)) + k * u * v - f * v) * dx
    picard = (inner(grad(w), grad(v)) + w * v) * dx

    def layer():
        return SolverLayer(
            prdp_fem.NonlinearVariationalSolver(
                NonlinearVariationalProblem(F, u, J=picard),
                solver_parameters={"ksp_type": "preonly", "pc_type": "lu"},
            ),
            [f, k],
        )

    def gradient(layer, value):
        source = torch.zeros_like(to_torch(f), requires_grad=True)
        layer(source, torch.tensor([value], dtype=torch.float64)).sum().backward()
        return source.grad

    used = layer()
    first = gradient(used, 1.0)
    torch.testing.assert_close(gradient(used, 2.0), 0.5 * first, rtol=1e-12, atol=0)


# The layer


def test_boundary_controls_keep_the_other_coefficients_of_their_forward_pass():
    V = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    a = Constant(1.0)
    t = Constant(1.0)
    problem = LinearVariationalProblem(
        (inner(grad(w), grad(v)) + w * v) * dx, v * dx, u, bcs=DirichletBC(V, a * t, 1)
    )
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}), [a]
    )
    x = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    out = layer(x)
    t.assign(10.0)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], expected, rtol=0, atol=0)


def test_second_derivatives_raise():
    problem = HeatStep()
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.kappa]
    )
    x = (0.5 + samples(problem.kappa)).requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (gradient**2).sum().backward()
    y = layer(x)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])


def test_a_mesh_that_moves_between_forward_and_backward_is_an_error():
    problem = HeatStep()
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.kappa]
    )
    x = torch.ones_like(to_torch(problem.kappa), requires_grad=True)
    y = layer(x)
    problem.mesh.coordinates.dat.data[:] *= 1.1
    with pytest.raises(RuntimeError, match="mesh .* has moved"):
        y.sum().backward()


@pytest.mark.parallel(1)
def test_copies_share_the_solver_and_pickles_are_refused():
    problem = AdvectionDiffusion()
    network = torch.nn.Sequential(
        torch.nn.Linear(49, 49),
        SolverLayer(prdp_fem.LinearVariationalSolver(problem.problem), [problem.source]),
    )
    copied = copy.deepcopy(network)
    assert copied[1] is not network[1] and copied[1].solver is network[1].solver
    assert copied[0].weight is not network[0].weight
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(network)


def test_real_spaces_beside_fields():
    """Firedrake eliminates them by a Schur complement, whose fieldsplit PETSc cannot apply
    transposed.
    """
    mesh = UnitSquareMesh(5, 5)
    V, R = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "R", 0)
    W = V * R
    (w, r) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    u = Function(W)
    source = smooth(V, 3, "source")
    problem = LinearVariationalProblem(
        (inner(grad(w), grad(v)) + 0.1 * w * v + w * q + v * r) * dx, source * v * dx, u
    )
    with stop_annotating():
        LinearVariationalSolver(problem).solve()
        expected = [part.dat.data_ro.copy() for part in u.subfunctions]
        u.assign(0)
    prdp_fem.LinearVariationalSolver(problem).solve()
    for part, values in zip(u.subfunctions, expected):
        np.testing.assert_allclose(part.dat.data_ro, values, atol=1e-12)
    reduced = ReducedFunctional(assemble(u.sub(0) ** 3 * dx), Control(source))
    assert taylor_test(reduced, source.copy(deepcopy=True), smooth(V, 5)) > 1.95


@pytest.mark.parametrize("method", ["gmres", "schur"])
def test_real_spaces_in_operators_that_are_not_symmetric(method):
    """PyOP2 multiplies by the transpose of their blocks wrongly, which is no error of PETSc's."""
    mesh = UnitSquareMesh(4, 4)
    W = FunctionSpace(mesh, "CG", 1) * FunctionSpace(mesh, "R", 0)
    (w, r) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    u = Function(W)
    V = FunctionSpace(mesh, "CG", 1)
    weight, source = smooth(V, 2), smooth(V, 3)
    a = (inner(grad(w), grad(v)) + w * v + 3 * w.dx(0) * v + weight * r * v + 2 * w * q) * dx
    schur = {
        "ksp_type": "fgmres",
        "pc_type": "fieldsplit",
        "pc_fieldsplit_type": "schur",
        "fieldsplit_0_ksp_type": "preonly",
        "fieldsplit_0_pc_type": "redundant",
        "fieldsplit_1_ksp_type": "preonly",
        "fieldsplit_1_pc_type": "none",
    }
    parameters = schur if method == "schur" else {"ksp_type": method, "pc_type": "none"}
    solver = prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(a, source * v * dx, u),
        solver_parameters={
            "mat_type": "nest",
            **parameters,
            "ksp_gmres_restart": 100,
            "ksp_rtol": 1e-12,
        },
    )
    solver.solve()
    functional = assemble((split(u)[0] ** 3 + split(u)[1] ** 2) * dx)
    reduced = ReducedFunctional(functional, [Control(source), Control(weight)])
    at = [source.copy(deepcopy=True), weight.copy(deepcopy=True)]
    assert taylor_test(reduced, at, [smooth(V, 5), smooth(V, 6)]) > 1.95
