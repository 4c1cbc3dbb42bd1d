"""Derivatives are linear in the cotangent: no absolute tolerance, which is meant for right-hand
sides, stops their solves.
"""

import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from problems import boundary_dofs, dense, norm_by_dofs, smooth, whole

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps, Tolerance
from prdp_fem.torch import SolverLayer, to_torch

pytestmark = pytest.mark.parallel([1, 2])

ATOL = {"ksp_atol": 1e-4, "ksp_rtol": 1e-11}
SOLVERS = {
    "cg": ({"ksp_type": "cg", "pc_type": "jacobi", **ATOL}, {}),
    "gmres": ({"ksp_type": "gmres", "pc_type": "jacobi", **ATOL}, {}),
    "bcgs": ({"ksp_type": "bcgs", "pc_type": "bjacobi", "sub_pc_type": "ilu", **ATOL}, {}),
    "without a transpose": ({"ksp_type": "gmres", "pc_type": "sor", **ATOL}, {}),
    "minres": ({"ksp_type": "minres", "pc_type": "jacobi", **ATOL}, {}),
    "symmlq": ({"ksp_type": "symmlq", "pc_type": "jacobi", **ATOL}, {}),
    "descent": (
        {
            "ksp_type": "python",
            "ksp_python_type": "prdp_fem.SteepestDescent",
            "pc_type": "jacobi",
            **ATOL,
        },
        {},
    ),
    "gamg": ({"ksp_type": "cg", "pc_type": "gamg", **ATOL}, {}),
    "nested": (
        {
            "ksp_type": "preonly",
            "pc_type": "ksp",
            "ksp_ksp_type": "cg",
            "ksp_pc_type": "jacobi",
            "ksp_ksp_atol": 1e-2,
        },
        {},
    ),
    "around another": (
        {
            "ksp_type": "fgmres",
            "pc_type": "ksp",
            "ksp_ksp_type": "cg",
            "ksp_pc_type": "jacobi",
            "ksp_ksp_atol": 1e-2,
            "ksp_ksp_rtol": 1e-3,
            **ATOL,
        },
        {"ksp_prefix": ""},
    ),
}


class Reaction:
    """A symmetric problem with a source, of which the exact gradient is known by dense algebra
    where it is linear.
    """

    def __init__(self, nonlinear: bool = False):
        mesh = UnitSquareMesh(6, 6)
        V = self.V = FunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        u = Function(V, name="u")
        self.source, self.bc = Function(V, name="source"), DirichletBC(V, 0, "on_boundary")
        self.a, self.mass = (inner(grad(w), grad(v)) + w * v) * dx, w * v * dx
        if nonlinear:
            F = ((1 + u**2) * inner(grad(u), grad(v)) + (u - self.source) * v) * dx
            self.problem = NonlinearVariationalProblem(F, u, bcs=self.bc)
        else:
            self.problem = LinearVariationalProblem(self.a, self.source * v * dx, u, bcs=self.bc)
        self.values = 1 + to_torch(smooth(V, 1), copy=True)
        self.cotangent = to_torch(smooth(V, 3), copy=True)

    def solver(self, parameters, refinement=None, **options):
        if isinstance(self.problem, LinearVariationalProblem):
            return prdp_fem.LinearVariationalSolver(
                self.problem, refinement=refinement, solver_parameters=parameters, **options
            )
        parameters = {"snes_atol": 1e-6, **parameters}
        return prdp_fem.NonlinearVariationalSolver(
            self.problem,
            refinement=refinement,
            solver_parameters=parameters,
            warm_start=False,
            **options,
        )

    def gradient(self, layer, scale: float) -> np.ndarray:
        x = self.values.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(x), x, scale * self.cotangent)
        return whole(gradient.numpy())

    def exact(self) -> np.ndarray:
        A = dense(self.a, bcs=self.bc)
        M = dense(self.mass)
        nodes = boundary_dofs(self.bc)
        cotangent = whole(self.cotangent.numpy())
        cotangent[nodes] = 0.0
        multiplier = np.linalg.solve(A.T, cotangent)
        multiplier[nodes] = 0.0
        return M.T @ multiplier


def relative(found, expected) -> float:
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("nonlinear", [False, True])
def test_gradients_are_linear_down_to_the_smallest_numbers(name, nonlinear):
    parameters, options = SOLVERS[name]
    problem = Reaction(nonlinear)
    setting = Iterations(400)
    layer = SolverLayer(
        problem.solver(
            parameters,
            FixedRefinement(NewtonSteps(3, setting) if nonlinear else setting),
            **options,
        ),
        [problem.source],
    )
    expected = problem.gradient(layer, 1.0)
    if not nonlinear:
        assert relative(expected, problem.exact()) < 1e-9
    for exponent in (-10, -40, -300, -700, -950, 60, 700):  # of two, so that nothing is rounded
        scale = 2.0**exponent
        assert relative(problem.gradient(layer, scale) / scale, expected) < 1e-11, exponent


@pytest.mark.parametrize(
    "ksp",
    [
        {"ksp_type": "cg", "pc_type": "jacobi"},
        {"ksp_type": "gmres", "pc_type": "sor"},
        {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_richardson_scale": 0.6},
    ],
    ids=["cg", "gmres", "richardson"],
)
@pytest.mark.parametrize("nonlinear", [False, True])
def test_unrolled_gradients_are_linear_too(ksp, nonlinear):
    problem, setting = Reaction(nonlinear), Iterations(12)
    refinement = FixedRefinement(NewtonSteps(2, setting) if nonlinear else setting)
    layer = SolverLayer(
        problem.solver({**ksp, **ATOL}, refinement, differentiation="unrolled"), [problem.source]
    )
    expected = problem.gradient(layer, 1.0)
    for exponent in (-40, -300, -900, 700):
        scale = 2.0**exponent
        assert relative(problem.gradient(layer, scale) / scale, expected) < 1e-11, exponent


@pytest.mark.parametrize("is_refined", [True, False])
def test_gradients_do_not_depend_on_the_units_of_an_operator(is_refined):
    """Where that is large, all residuals of an adjoint solve are below PETSc's own absolute
    tolerance.
    """
    for units in (1.0, 2.0**200, 2.0**400):
        problem = Reaction()
        problem.problem = LinearVariationalProblem(
            Constant(units) * problem.a,
            Constant(units) * problem.source * TestFunction(problem.V) * dx,
            problem.problem.u,
            bcs=problem.bc,
        )
        refinement = FixedRefinement(Tolerance(1e-11)) if is_refined else None
        solver = problem.solver(
            {"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": 1e-11}, refinement
        )
        gradient = problem.gradient(SolverLayer(solver, [problem.source]), 1.0)
        # of the same mesh: ranks share out each in their own way
        assert relative(gradient, problem.exact()) < 1e-9
        assert abs(solver.snes.ksp.getTolerances()[1] - 1e-50) < 1e-60


@pytest.mark.parametrize("rtol", [1e-10, 1e-50, 0.0])
def test_tolerances_of_options_are_relative_for_derivatives(rtol):
    """Also where the absolute one was the only one, and on the command line; the forward solve
    stops by it, before and after.
    """
    problem = Reaction()
    solver = problem.solver(
        {"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": rtol}, options_prefix="scaled_"
    )
    PETSc.Options()["scaled_ksp_atol"] = 1e-3
    solver.snes.ksp.setFromOptions()
    layer = SolverLayer(solver, [problem.source])
    before = layer(problem.values)
    iterations = solver.statistics.forward_iterations
    for scale in (1.0, 2.0**-30, 2.0**-400):
        assert relative(problem.gradient(layer, scale) / scale, problem.exact()) < 1e-8
    solver.statistics.reset()
    assert torch.equal(layer(problem.values), before)
    assert solver.statistics.forward_iterations == iterations
    assert abs(solver.snes.ksp.getTolerances()[1] - 1e-3) < 1e-15


@pytest.mark.parametrize("nonlinear", [False, True])
def test_tangents_and_hessians_on_the_tape_are_linear(nonlinear):
    problem = Reaction(nonlinear)
    problem.source.assign(1 + smooth(problem.V, 1))
    solver = problem.solver({"ksp_type": "cg", "pc_type": "jacobi", **ATOL, "ksp_atol": 1e-7})
    solver.solve()
    J = assemble(problem.problem.u**4 * dx)
    reduced = ReducedFunctional(J, Control(problem.source))
    direction, found = smooth(problem.V, 4), []
    with stop_annotating():
        for scale in (1.0, 2.0**-200):
            scaled = direction.copy(deepcopy=True).assign(scale * direction)
            reduced.derivative()
            found.append(
                (
                    reduced.tlm(scaled) / scale,
                    whole(reduced.hessian(scaled, apply_riesz=False).dat.data_ro) / scale,
                )
            )
    (tangent, hessian), (small_tangent, small_hessian) = found
    assert abs(small_tangent - tangent) < 1e-11 * abs(tangent)
    assert relative(small_hessian, hessian) < 1e-11


def test_tiny_cotangents_whatever_an_earlier_solve_has_left():
    """Some methods leave the residual of the solve before where they have found nothing to do."""
    problem = Reaction()
    layer = SolverLayer(problem.solver({"ksp_type": "gcr", "pc_type": "jacobi"}), [problem.source])
    gradient = problem.gradient(layer, 1.0)
    for exponent in (-520, -900):
        tiny = problem.gradient(layer, 2.0**exponent)
        np.testing.assert_allclose(tiny * 2.0**-exponent, gradient, rtol=1e-10)


@pytest.mark.parametrize("how", ["made", "under control", "inside"])
def test_minres_makes_solutions_of_any_size(how):
    """PETSc bounds them, in the norm of the preconditioner, and calls the bound convergence."""
    for units, pc_type in ((1e-9, "none"), (1e20, "jacobi")):
        parameters = {"ksp_type": "minres", "pc_type": pc_type, "ksp_rtol": 1e-11}
        if how == "inside":
            nested = {f"ksp_{option}": value for option, value in parameters.items()}
            parameters = {"ksp_type": "preonly", "pc_type": "ksp", **nested}
        problem = Reaction()
        problem.problem = LinearVariationalProblem(
            Constant(units) * problem.a,
            Constant(units) * problem.source * TestFunction(problem.V) * dx,
            problem.problem.u,
            bcs=problem.bc,
        )
        if how == "under control":
            solver = LinearVariationalSolver(problem.problem, solver_parameters=parameters)
            prdp_fem.control(solver, None)
        else:
            solver = problem.solver(parameters)
        layer = SolverLayer(solver, [problem.source])
        gradient = problem.gradient(layer, 1.0)
        assert relative(gradient, problem.exact()) < 1e-8
        problem.source.assign(1 + smooth(problem.V, 1))
        solver.solve()
        u = problem.problem.u
        residual = assemble(action(problem.a, u) - problem.source * TestFunction(problem.V) * dx)
        problem.bc.zero(residual)
        assert norm_by_dofs(residual) < 1e-9


@pytest.mark.parametrize(
    "parameters, found",
    [
        ({"ksp_type": "minres", "ksp_minres_radius": 1e-3}, "STEP_LENGTH .*ksp_minres_radius"),
        ({"ksp_type": "stcg", "ksp_cg_radius": 1e-3}, "STEP_LENGTH .*ksp_minres_radius"),
        ({"ksp_type": "stcg", "ksp_converged_neg_curve": None}, "NEG_CURVE .*use ksp_type minres"),
    ],
)
def test_where_a_method_stops_at_a_bound_it_has_no_solution(parameters, found):
    problem = Reaction()
    sign = -1 if "ksp_converged_neg_curve" in parameters else 1
    problem.problem = LinearVariationalProblem(
        Constant(sign) * problem.a, problem.source * TestFunction(problem.V) * dx, problem.problem.u
    )
    layer = SolverLayer(problem.solver({**parameters, "pc_type": "none"}), [problem.source])
    with pytest.raises(ConvergenceError, match=f"forward solve .* failed: CONVERGED_{found}"):
        layer(problem.values)
