"""Types that are set on a KSP by hand between solves give what a solver gives that was made so."""

import numpy as np
import pytest
import torch
from firedrake import *
from problems import AdvectionDiffusion, HeatStep, whole

from prdp_fem import FixedRefinement, Iterations, LinearVariationalSolver
from prdp_fem.torch import SolverLayer, to_torch

pytestmark = pytest.mark.parallel([1, 2])


def made(heat, ksp_type: str, pc_type: str = "jacobi", refinement=None, **options):
    parameters = {"ksp_type": ksp_type, "pc_type": pc_type, "ksp_rtol": 1e-10}
    return LinearVariationalSolver(
        heat.problem, refinement=refinement, solver_parameters=parameters, **options
    )


def derivative(solver, control, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """A solution and a gradient, which is divided by the scale again."""
    x = to_torch(control, copy=True).requires_grad_()
    solution = SolverLayer(solver, [control])(x)
    (gradient,) = torch.autograd.grad(solution, x, scale * (1 + solution.detach()))
    return whole(solution.detach().numpy()), whole(gradient.numpy()) / scale


@pytest.mark.parametrize("before, after", [("cg", "minres"), ("gmres", "symmlq")])
def test_method_with_thresholds(before, after):
    heat = HeatStep()
    solver = made(heat, before)
    derivative(solver, heat.u0)
    solver.snes.ksp.setType(after)
    expected = derivative(made(heat, after), heat.u0)
    for scale in (1.0, 2.0**60, 2.0**-60, 2.0**-900):
        np.testing.assert_array_equal(derivative(solver, heat.u0, scale), expected)


def test_preconditioner_without_a_transpose():
    transport = AdvectionDiffusion()
    solver = made(transport, "gmres")
    derivative(solver, transport.source)
    solver.snes.ksp.getPC().setType("sor")
    expected = derivative(made(transport, "gmres", "sor"), transport.source)
    for found, other in zip(derivative(solver, transport.source), expected):
        np.testing.assert_allclose(found, other, rtol=1e-6, atol=1e-9)


def test_method_without_the_norm_of_a_budget():
    heat, budget = HeatStep(), FixedRefinement(Iterations(3))
    solver = made(heat, "cg", refinement=budget)
    derivative(solver, heat.u0)
    solver.snes.ksp.setType("gmres")
    expected = derivative(made(heat, "gmres", refinement=budget), heat.u0)
    np.testing.assert_array_equal(derivative(solver, heat.u0), expected)


@pytest.mark.parametrize("ksp_type, pc_type", [("cg", "jacobi"), ("gmres", "none")])
def test_unrolled_iterations_of_another_method_are_refused(ksp_type, pc_type):
    heat, budget = HeatStep(), FixedRefinement(Iterations(3))
    solver = made(heat, "gmres", refinement=budget, differentiation="unrolled")
    before = derivative(solver, heat.kappa)
    solver.snes.ksp.setType(ksp_type)
    solver.snes.ksp.getPC().setType(pc_type)
    with pytest.raises(ValueError, match=f"ksp_type {ksp_type} with pc_type {pc_type} now"):
        derivative(solver, heat.kappa)
    solver.snes.ksp.setType("gmres")
    solver.snes.ksp.getPC().setType("jacobi")
    np.testing.assert_array_equal(derivative(solver, heat.kappa), before)
