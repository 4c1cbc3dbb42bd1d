"""Nonlinear solvers: drop-in, Newton steps and inner iterations under a refinement, and derivatives
at the state reached.
"""

import warnings

import numpy as np
import petsctools
import pytest
import torch
from cases import gradcheck, samples
from firedrake import *
from firedrake.adjoint import *
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from mpi4py import MPI
from problems import (
    CG,
    CONVERGED,
    GMRES,
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
    NewtonLadder,
    NewtonSteps,
    ScheduledRefinement,
    Tolerance,
)
from prdp_fem.tape import SolveBlock
from prdp_fem.torch import SolverLayer, to_torch

torch.set_num_threads(1)
pytestmark = pytest.mark.parallel([1, 2, 3])

EXACT = {
    **GMRES,
    **CONVERGED,
    "ksp_gmres_restart": 200,
    "snes_rtol": 1e-13,
    "snes_atol": 1e-13,
    "snes_stol": 0,
}


class Diffusion:
    """Nonlinear diffusion with a source, a parameter, and boundary values."""

    def __init__(self, cells=4, *, boundary=0.3, mesh=None, **kwargs):
        self.mesh = UnitSquareMesh(cells, cells) if mesh is None else mesh
        V = self.V = FunctionSpace(self.mesh, "CG", 1)
        self.u, v = Function(V, name="u"), TestFunction(V)
        self.f = smooth(V, 1, "f")
        self.c = Constant(0.7, name="c")
        self.g = boundary
        self.F = (
            (1 + self.c * self.u**2) * inner(grad(self.u), grad(v)) + self.u * v - self.f * v
        ) * dx
        self.bcs = [DirichletBC(V, boundary, 1)]
        self.problem = NonlinearVariationalProblem(self.F, self.u, bcs=self.bcs, **kwargs)


class Burgers:
    """An implicit step of viscous Burgers."""

    def __init__(self, cells=4):
        mesh = UnitSquareMesh(cells, cells)
        V = self.V = VectorFunctionSpace(mesh, "CG", 1)
        self.u = Function(V, name="u")
        self.u0 = smooth(V, 2, "u0")
        v = TestFunction(V)
        self.nu = Constant(0.1, name="nu")
        F = (
            inner((self.u - self.u0) / 0.1, v)
            + inner(dot(self.u, nabla_grad(self.u)), v)
            + self.nu * inner(grad(self.u), grad(v))
        ) * dx
        self.problem = NonlinearVariationalProblem(F, self.u, bcs=DirichletBC(V, 0, "on_boundary"))


# Drop-in


@pytest.mark.parametrize("make", [Diffusion, Burgers])
def test_solves_what_firedrake_solves_in_as_many_steps(make):
    problem = make()
    stock = NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT)
    stock.solve()
    expected = problem.u.copy(deepcopy=True)
    problem.u.assign(0)
    solver = prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT)
    assert solver.solve() is problem.u
    assert errornorm(expected, problem.u) < 1e-11 * norm(expected)
    assert solver.statistics.newton_steps == stock.snes.getIterationNumber() > 2
    assert solver.statistics.forward_iterations == stock.snes.getLinearSolveIterations() > 0


def test_steps_that_a_trust_region_refuses_leave_the_residual_where_it_was():
    """As bare PETSc does it, with a residual that nothing else writes to."""
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    u = Function(V, name="u")
    v = TestFunction(V)
    (x, y) = SpatialCoordinate(mesh)
    F = (inner(grad(u), grad(v)) + (u**3 - u - 5 * sin(3 * u)) * v) * dx
    guess = 3 * sin(7 * x) * cos(5 * y)
    parameters = {**EXACT, "snes_type": "newtontr", "snes_tr_delta0": 2.0}

    def residual(snes, state, values):
        with u.dat.vec_wo as mine:
            state.copy(mine)
        with assemble(F).dat.vec_ro as assembled:
            assembled.copy(values)

    def jacobian(snes, state, J, P):
        assemble(derivative(F, u), mat_type="aij").petscmat.copy(J)

    with stop_annotating():
        u.interpolate(guess)
        with u.dat.vec_ro as mine:
            state = mine.copy()
        snes = PETSc.SNES().create(mesh.comm)
        snes.setFunction(residual, state.duplicate())
        snes.setJacobian(jacobian, assemble(derivative(F, u), mat_type="aij").petscmat)
        petsctools.set_from_options(snes, parameters=parameters)
        with petsctools.inserted_options(snes):
            snes.solve(None, state)
        refused = snes.getFunctionEvaluations() - snes.getIterationNumber() - 1
        assert refused > 0
        solver = prdp_fem.NonlinearVariationalSolver(
            NonlinearVariationalProblem(F, u), solver_parameters=parameters
        )
        u.interpolate(guess)
        solver.solve()
    assert solver.statistics.newton_steps == snes.getIterationNumber()
    np.testing.assert_allclose(u.dat.data_ro, state.array_r, atol=1e-12)


def test_newton_starts_from_the_solution_function_unless_told_not_to():
    problem = Diffusion()
    solver = prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT)
    solver.solve()
    steps = solver.statistics.newton_steps
    solver.solve()
    assert solver.statistics.newton_steps < steps + 2
    cold = prdp_fem.NonlinearVariationalSolver(
        problem.problem, solver_parameters=EXACT, warm_start=False
    )
    for _ in range(2):
        cold.statistics.reset()
        cold.solve()
        assert cold.statistics.newton_steps == steps


def test_changed_coefficients_and_boundary_values_are_seen():
    g = Constant(0.3)
    problem = Diffusion(boundary=g)
    solver = prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT)
    solver.solve()
    for change in (
        lambda: g.assign(0.5),
        lambda: problem.f.assign(2 * problem.f),
        lambda: problem.c.assign(0.1),
    ):
        change()
        solver.solve()
        assert (
            norm_by_dofs(assemble(problem.F, bcs=DirichletBC(problem.V, 0, 1), zero_bc_nodes=True))
            < 1e-11
        )
        assert problem.u.dat.data_ro_with_halos[problem.bcs[0].nodes] == pytest.approx(float(g))


def test_cofunctions_in_the_residual():
    problem = Diffusion()
    v = TestFunction(problem.V)
    load = assemble(smooth(problem.V, 5) * v * dx)
    u = Function(problem.V)
    F = inner((1 + u**2) * grad(u), grad(v)) * dx - 2 * load
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(F, u, bcs=DirichletBC(problem.V, 0, "on_boundary")),
        solver_parameters=EXACT,
    )
    layer = SolverLayer(solver, [load])
    x = to_torch(load, copy=True).requires_grad_()
    assert gradcheck(layer, x)
    load.assign(0.5 * load)
    solver.solve()
    residual = whole(
        assemble(inner((1 + u**2) * grad(u), grad(v)) * dx).dat.data_ro - 2 * load.dat.data_ro
    )
    assert np.abs(np.delete(residual, boundary_dofs(solver.problem.bcs[0]))).max() < 1e-11


# Settings


def test_inner_iterations_and_newton_steps_follow_the_level():
    problem = Diffusion()
    ladder = NewtonLadder(start=1, step=1, stop=3, linear=IterationLadder(start=2, step=1, stop=5))
    refinement = ScheduledRefinement(ladder, {1: 1, 2: 2, 3: 3})
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem,
        refinement=refinement,
        warm_start=False,
        solver_parameters={**EXACT, "snes_linesearch_type": "basic"},
    )
    errors, expected = [], Diffusion(mesh=problem.mesh)
    prdp_fem.NonlinearVariationalSolver(expected.problem, solver_parameters=EXACT).solve()
    for steps, iterations in ((1, 2), (2, 3), (3, 4), (3, 5)):
        solver.statistics.reset()
        solver.solve()
        assert (solver.statistics.newton_steps, solver.statistics.forward_iterations) == (
            steps,
            steps * iterations,
        )
        errors.append(np.linalg.norm(whole(problem.u.dat.data_ro - expected.u.dat.data_ro)))
        refinement.step(1.0)
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 4 * errors[3]


def test_steps_alone_leave_linear_solves_to_the_options():
    problem = Burgers()
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(NewtonSteps(2)), solver_parameters=EXACT
    )
    solver.solve()
    assert solver.statistics.newton_steps == 2 and solver.statistics.forward_iterations > 20
    solver.refinement = None
    problem.u.assign(0)
    solver.solve()
    assert (
        norm_by_dofs(assemble(problem.problem.F, bcs=problem.problem.bcs, zero_bc_nodes=True))
        < 1e-12
    )


def test_steps_that_convergence_makes_needless_are_not_made():
    problem = Diffusion()
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(NewtonSteps(50)), solver_parameters=EXACT
    )
    solver.solve()
    assert solver.statistics.newton_steps < 10


def test_a_picard_iteration_is_truncated_and_differentiated_by_the_exact_derivative():
    V = Diffusion().V
    u = Function(V)
    v = TestFunction(V)
    w = TrialFunction(V)
    f = smooth(V, 1, "f")
    F = ((1 + u**2) * inner(grad(u), grad(v)) + u * v - f * v) * dx
    picard = ((1 + u**2) * inner(grad(w), grad(v)) + w * v) * dx
    problem = NonlinearVariationalProblem(F, u, J=picard)
    parameters = {**EXACT, "snes_max_it": 200, "snes_rtol": 1e-12}
    solver = prdp_fem.NonlinearVariationalSolver(problem, solver_parameters=parameters)
    assert gradcheck(SolverLayer(solver, [f]), samples(f).requires_grad_(), rtol=1e-5)
    solver.refinement = FixedRefinement(NewtonSteps(4))
    solver.statistics.reset()
    u.assign(0)
    solver.solve()
    assert solver.statistics.newton_steps == 4


# Derivatives


@pytest.mark.parametrize("names", [["f"], ["c"], ["g"], ["f", "c"]])
def test_gradcheck(names):
    mesh = UnitSquareMesh(3, 3)
    problem = Diffusion(mesh=mesh, boundary=smooth(FunctionSpace(mesh, "CG", 1), 4, "g"))
    solver = prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT)
    layer = SolverLayer(solver, [getattr(problem, name) for name in names])
    inputs = [
        to_torch(control, copy=True)
        .expand(*((2, -1) if index == 0 else (-1,)))
        .clone()
        .requires_grad_()
        for index, control in enumerate(layer.controls)
    ]
    assert gradcheck(layer, inputs)


def test_batches_are_their_samples_to_the_bit():
    problem = Burgers()
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(NewtonSteps(2, Iterations(3))),
        solver_parameters=GMRES,
    )
    layer = SolverLayer(solver, [problem.u0, problem.nu])
    u0 = (samples(problem.u0, (3,), seed=1) - 0.5).requires_grad_()
    nu = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    batch = layer(u0, nu)
    (batch**2).sum().backward()
    total = torch.zeros_like(nu)
    for row in range(3):
        one = u0[row].detach().clone().requires_grad_()
        shared = nu.detach().clone().requires_grad_()
        out = layer(one, shared)
        (out**2).sum().backward()
        assert torch.equal(out, batch[row]) and torch.equal(one.grad, u0.grad[row])
        total += shared.grad
    torch.testing.assert_close(total, nu.grad, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "setting", [NewtonSteps(1, Iterations(3)), NewtonSteps(3, Iterations(5)), NewtonSteps(2)]
)
def test_truncated_adjoints_are_those_of_dense_algebra(setting):
    """At the state reached, by the exact Jacobian, with as many GMRES iterations as forward:
    SciPy's, unpreconditioned.
    """
    problem = Diffusion()
    V, v = problem.V, TestFunction(problem.V)
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(setting),
        warm_start=False,
        solver_parameters={**EXACT, "pc_type": "none"},
    )
    solver.solve()
    state, cotangent = problem.u.dat.data_ro.copy(), np.sin(np.arange(V.dim()))
    mine = slice(*V.dof_dset.layout_vec.getOwnershipRange())
    layer = SolverLayer(solver, [problem.f])
    x = to_torch(problem.f, copy=True).requires_grad_()
    layer(x).backward(torch.from_numpy(cotangent[mine]))
    problem.u.dat.data[:] = state
    J, B = dense(derivative(problem.F, problem.u), problem.bcs), dense(TrialFunction(V) * v * dx)
    b = cotangent.copy()
    b[boundary_dofs(problem.bcs[0])] = B[boundary_dofs(problem.bcs[0])] = 0.0
    if setting.linear is None:
        multiplier = np.linalg.solve(J.T, b)
    else:
        # GMRES minimises the residual over the Krylov space: a dense least-squares problem.
        basis = [b]
        for _ in range(setting.linear.iterations - 1):
            basis.append(J.T @ basis[-1])
        K = np.linalg.qr(np.array(basis).T)[0]
        multiplier = K @ np.linalg.lstsq(J.T @ K, b, rcond=None)[0]
    np.testing.assert_allclose(
        whole(x.grad), B.T @ multiplier, rtol=1e-8, atol=1e-11 * np.abs(b).max()
    )


def test_replays_gradients_and_hessians_do_not_depend_on_history():
    problem = Burgers()
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(NewtonSteps(2, Iterations(3))),
        solver_parameters=GMRES,
    )
    solver.solve()
    reduced = ReducedFunctional(
        assemble(inner(problem.u, problem.u) ** 2 * dx), Control(problem.u0)
    )
    u0 = problem.u0.copy(deepcopy=True)
    other = smooth(problem.V, 9)
    direction = smooth(problem.V, 10)

    def evaluate():
        value = reduced(u0)
        return (
            value,
            reduced.derivative().dat.data_ro.copy(),
            reduced.hessian(direction).dat.data_ro.copy(),
        )

    with stop_annotating():
        first = evaluate()
        reduced(other)
        reduced.derivative()
        solver.solve()
        for one, again in zip(first, evaluate()):
            np.testing.assert_array_equal(one, again)


@pytest.mark.parallel([2, 3])
def test_serial_and_parallel_agree():
    def results(comm):
        mesh = UnitSquareMesh(5, 5, comm=comm)
        problem = Diffusion(mesh=mesh)
        with set_working_tape(Tape()):
            solver = prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT)
            solver.solve()
            J = assemble(problem.u**4 * dx)
            reduced = ReducedFunctional(J, [Control(problem.f), Control(problem.c)])
            with stop_annotating():
                reduced.derivative()
                direction = [smooth(problem.V, 3), Constant(0.2)]
                hessian = reduced.hessian(direction)
                gradient = reduced.derivative()
                return (
                    J,
                    assemble(action(gradient[0], smooth(problem.V, 6))),
                    float(gradient[1]),
                    assemble(action(hessian[0], smooth(problem.V, 6))),
                )

    np.testing.assert_allclose(results(MPI.COMM_WORLD), results(MPI.COMM_SELF), rtol=1e-8)


# Errors


def test_failures_name_reason_and_remedy_and_leave_everything_as_it_was():
    problem = Diffusion()
    solver = prdp_fem.NonlinearVariationalSolver(
        problem.problem, solver_parameters={**EXACT, "snes_max_it": 1}
    )
    before = problem.u.dat.data_ro.copy()
    with pytest.raises(
        ConvergenceError,
        match="nonlinear solve for 'u'.*DIVERGED_MAX_IT after 1 steps.*NewtonLadder",
    ):
        solver.solve()
    np.testing.assert_array_equal(problem.u.dat.data_ro, before)
    assert not any(isinstance(block, SolveBlock) for block in get_working_tape().get_blocks())
    capped = prdp_fem.NonlinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Tolerance(1e-10, max_it=2)),
        solver_parameters=EXACT,
    )
    with pytest.raises(
        ConvergenceError, match="DIVERGED_LINEAR_SOLVE.*gmres.*DIVERGED_MAX_IT after 2 iterations"
    ):
        capped.solve()
    problem.f.assign(np.nan)
    with pytest.raises(ConvergenceError, match="NAN.*look for NaN"):
        prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT).solve()


def test_a_singular_jacobian_is_an_error_with_the_name_of_the_solution():
    problem = Diffusion()
    v, u = TestFunction(problem.V), Function(problem.V, name="flame")
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(u**3 * v * dx - 1 * v * dx, u),
        solver_parameters={"ksp_type": "gmres", "pc_type": "jacobi"},
    )
    with pytest.raises(ConvergenceError, match="nonlinear solve for 'flame'"):
        solver.solve()


@pytest.mark.parallel(1)
@pytest.mark.parametrize(
    "make, error, words",
    [
        (
            lambda p: prdp_fem.NonlinearVariationalSolver(
                p, solver_parameters={"snes_type": "vinewtonrsls"}
            ),
            ValueError,
            "variational inequalities.*'u'",
        ),
        (
            lambda p: prdp_fem.NonlinearVariationalSolver(p).solve(bounds=(p.u, p.u)),
            ValueError,
            "'u' with bounds is a variational inequality",
        ),
        (
            lambda p: prdp_fem.NonlinearVariationalSolver(p, pre_function_callback=print),
            ValueError,
            "pre_function_callback is not supported",
        ),
        (
            lambda p: prdp_fem.NonlinearVariationalSolver(
                p,
                refinement=FixedRefinement(Iterations(3)),
                solver_parameters={"snes_type": "qn", "snes_qn_type": "broyden"},
            ),
            ValueError,
            "no linear solves to refine",
        ),
        (
            lambda p: prdp_fem.NonlinearVariationalSolver(
                p,
                refinement=FixedRefinement(Iterations(3)),
                solver_parameters={**CG, "snes_ksp_ew": None},
            ),
            ValueError,
            "snes_ksp_ew",
        ),
        (
            lambda p: prdp_fem.NonlinearVariationalSolver(HeatStep),
            TypeError,
            "expected a NonlinearVariationalProblem",
        ),
        (
            lambda p: prdp_fem.LinearVariationalSolver(p),
            TypeError,
            "use a NonlinearVariationalSolver",
        ),
    ],
)
def test_bad_input_is_refused_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make(Diffusion().problem)


# The ladder


def test_a_direct_solver_under_a_refinement_solves_as_without_and_says_so_once():
    """Newton steps are refined all the same."""
    p = Diffusion()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        refined = FixedRefinement(Iterations(3))
        solver = prdp_fem.NonlinearVariationalSolver(p.problem, refinement=refined)
        solution = solver.solve().dat.data_ro.copy()
        solver.solve()
    about = [warning for warning in said if "nothing to refine" in str(warning.message)]
    assert len(about) == (1 if COMM_WORLD.rank == 0 else 0)
    p.u.assign(0)
    prdp_fem.NonlinearVariationalSolver(p.problem).solve()
    np.testing.assert_allclose(p.u.dat.data_ro, solution, rtol=1e-10, atol=1e-12)
    solver.refinement = FixedRefinement(NewtonSteps(1, Iterations(3)))
    p.u.assign(0)
    solver.solve()
    assert solver.statistics.newton_steps > 2 and norm(p.u) > 0


def test_newton_ladders_are_sequences_of_settings():
    ladder = NewtonLadder(1, 2, 5, linear=(Tolerance(1e-1), Tolerance(1e-2)))
    assert list(ladder) == [
        NewtonSteps(1, Tolerance(1e-1)),
        NewtonSteps(3, Tolerance(1e-2)),
        NewtonSteps(5, Tolerance(1e-2)),
    ]
    assert (
        ladder[-1] == ladder[2]
        and ladder[:2] == list(ladder)[:2]
        and len(NewtonLadder(linear=Iterations(3))) > 10**9
    )
    assert NewtonLadder(1, 1, 2, linear=IterationLadder(1, 1, 4))[3] == NewtonSteps(
        2, Iterations(4)
    )
    assert (
        str(NewtonSteps(1)) == "1 Newton step"
        and str(NewtonSteps(2, Iterations(3))) == "2 Newton steps of 3 iterations"
    )
    assert eval(repr(ladder)) == ladder and hash(eval(repr(ladder))) == hash(ladder) != hash(
        NewtonLadder()
    )
    with pytest.raises(ValueError, match="has no end"):
        NewtonLadder()[2:]
    with pytest.raises(IndexError):
        ladder[3]
    for bad, words in (
        (lambda: NewtonLadder(0), "start must be an integer"),
        (lambda: NewtonLadder(3, 1, 2), "must not exceed stop"),
        (lambda: NewtonLadder(linear=[]), "is empty"),
    ):
        with pytest.raises(ValueError, match=words):
            bad()
    for bad in (3, "x", Iterations, NewtonSteps(1)):
        with pytest.raises(TypeError, match="linear must be the setting of a linear solve"):
            NewtonSteps(1, bad)


def test_linear_solvers_take_the_linear_part():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        solver_parameters=CG,
        refinement=FixedRefinement(NewtonSteps(2, Iterations(3))),
    )
    solver.solve()
    assert solver.statistics.forward_iterations == 3
    solver.refinement = FixedRefinement(NewtonSteps(2))
    solver.solve()
    assert solver.statistics.forward_iterations > 3 + 5


@pytest.mark.parametrize("kind", ["nrichardson", "ncg", "ngmres"])
def test_derivatives_have_the_options_of_the_ksp_where_steps_need_none(kind):
    problem = Diffusion()
    prdp_fem.NonlinearVariationalSolver(problem.problem, solver_parameters=EXACT).solve()
    gradients = []
    for steps in ("newtonls", kind):
        parameters = {**EXACT, "snes_type": steps, "snes_linesearch_type": "basic"}
        solver = prdp_fem.NonlinearVariationalSolver(
            problem.problem,
            refinement=FixedRefinement(NewtonSteps(1)),
            solver_parameters=parameters,
        )
        f = to_torch(problem.f, copy=True).requires_grad_()
        SolverLayer(solver, [problem.f])(f).square().sum().backward()
        gradients.append(whole(f.grad))
        assert solver.statistics.adjoint_iterations > 5
    expected, found = gradients
    assert np.linalg.norm(found - expected) < 1e-9 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "snes",
    [
        {"snes_type": "qn", "snes_qn_type": "broyden"},
        {"snes_type": "ngmres"},
        {"snes_type": "anderson"},
    ],
    ids=lambda snes: snes["snes_type"],
)
def test_derivatives_of_methods_without_linear_solves_are_made_as_options_say(snes):
    """To PETSc their KSP has no options, but derivatives are linear solves; before and after a
    failure.
    """
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    u = Function(V, name="u")
    v = TestFunction(V)
    f = Function(V, name="f")
    problem = NonlinearVariationalProblem((u + 0.1 * u**3 - f) * v * dx, u)
    parameters = {
        **snes,
        "snes_rtol": 1e-12,
        "snes_max_it": 500,
        "ksp_type": "cg",
        "ksp_rtol": 1e-12,
        "pc_type": "jacobi",
    }
    # Quasi-Newton's are not on all devices.
    layer = SolverLayer(
        prdp_fem.NonlinearVariationalSolver(
            problem, solver_parameters=parameters, warm_start=False, device="cpu"
        ),
        [f],
    )
    exact = SolverLayer(
        prdp_fem.NonlinearVariationalSolver(
            problem,
            warm_start=False,
            solver_parameters={
                "snes_rtol": 1e-13,
                "ksp_type": "gmres",
                "ksp_rtol": 1e-13,
                "pc_type": "jacobi",
            },
        ),
        [f],
    )
    values, cotangent = (torch.as_tensor(1 + smooth(V, seed).dat.data_ro) for seed in (1, 2))

    def gradient(layer):
        x = values.clone().requires_grad_()
        return torch.autograd.grad(layer(x), x, cotangent)[0].numpy()

    first, expected = gradient(layer), gradient(exact)
    ksp = layer.solver.system.linearisation.solver.snes.getKSP()
    assert (ksp.getType(), ksp.getPC().getType()) == ("cg", "jacobi")
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-6 * abs(expected).max(initial=0.0))
    with pytest.raises(ConvergenceError):
        layer(float("nan") * values)
    np.testing.assert_array_equal(gradient(layer), first)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("inside", ["", "npc_"])
def test_solvers_on_coarser_meshes_solve_again(inside):
    """Also after an error, and beside another solver of the same function space."""
    parameters = {
        "ksp_type": "cg",
        "pc_type": "jacobi",
        f"{inside}snes_type": "fas",
        f"{inside}fas_levels_ksp_type": "cg",
        f"{inside}fas_levels_pc_type": "jacobi",
        f"{inside}fas_coarse_ksp_type": "cg",
        f"{inside}fas_coarse_pc_type": "jacobi",
    }
    problem = Diffusion(mesh=MeshHierarchy(UnitSquareMesh(4, 4), 1)[-1])
    solver, other = (
        prdp_fem.NonlinearVariationalSolver(
            problem.problem, warm_start=False, solver_parameters=options
        )
        for options in (parameters, GMRES)
    )
    solutions = []
    for source in (1.0, np.nan, 1.0, 1.0):
        with stop_annotating():
            good = problem.f.copy(deepcopy=True)
            problem.f.assign(source * good)
            if np.isnan(source):
                with pytest.raises(ConvergenceError):
                    solver.solve()
            else:
                other.solve()
                solver.solve()
                solutions.append(problem.u.dat.data_ro.copy())
            problem.f.assign(good)
    assert all(np.array_equal(solution, solutions[0]) for solution in solutions)
