"""Operators with entries that are not finite are an error before anything is made of them."""

import math

import pytest
import torch
from firedrake import *
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from problems import CG, smooth

import prdp_fem
from prdp_fem.krylov.entries import require_finite_entries
from prdp_fem.torch import SolverLayer, to_torch

# What comes to no end with infinity, or leaves out what is no number where no norm is computed.
WITHOUT_A_NORM = {"ksp_norm_type": "none", "ksp_max_it": 5}
SOLVERS = {
    "shifted for ever": {"ksp_type": "cg", "pc_type": "icc"},
    "singular values": {"ksp_type": "preonly", "pc_type": "svd"},
    "estimated bounds": {"ksp_type": "chebyshev", "pc_type": "jacobi", **WITHOUT_A_NORM},
    "rows left out": {"ksp_type": "richardson", "pc_type": "kaczmarz", **WITHOUT_A_NORM},
    "not looked at": {"ksp_type": "preonly", "pc_type": "none"},
    "not assembled": {**CG, "mat_type": "matfree", "pc_type": "none"},
}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", SOLVERS)
def test_an_operator_of_one_sample(name, value):
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    w, v, u = TrialFunction(V), TestFunction(V), Function(V, name="heat")
    f, k = smooth(V, 1), Function(V, name="k").assign(1.0)
    a = (k * inner(grad(w), grad(v)) + k * w * v) * dx
    problem = LinearVariationalProblem(a, f * v * dx, u)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem, solver_parameters=SOLVERS[name]), [k]
    )
    values = torch.ones(3, to_torch(k).numel(), dtype=torch.float64)
    expected = layer(values)
    wrong = values.clone()
    wrong[1] = value
    with pytest.raises(ConvergenceError, match="sample 1: the operator of the solve for 'heat' "):
        layer(wrong)
    assert torch.equal(layer(values), expected)


def test_a_jacobian_where_the_residual_is_finite():
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    u, v = Function(V, name="heat"), TestFunction(V)
    F = (inner(grad(u), grad(v)) + sqrt(u) * v - v) * dx
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(F, u), solver_parameters=SOLVERS["shifted for ever"]
    )
    with pytest.raises(ConvergenceError, match="^the operator of the solve for 'heat' holds NaN"):
        solver.solve()
    assert norm(u) == 0


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("kind", ["aij", "baij", "dense"])
def test_all_ranks_are_told_and_large_entries_are_finite(kind):
    A = PETSc.Mat().create(COMM_WORLD)
    A.setSizes((4 * COMM_WORLD.size, 4 * COMM_WORLD.size))
    A.setType(kind)
    A.setUp()
    first, end = A.getOwnershipRange()
    for value, is_finite in ((1e308, True), (-1e308, True), (math.nan, False), (-math.inf, False)):
        for row in range(first, end):
            A.setValue(row, row, value if row == end - 2 and COMM_WORLD.rank == 0 else 1.0)
        A.assemble()
        if is_finite:
            require_finite_entries("heat", A, A)
        else:
            with pytest.raises(ConvergenceError, match="'heat' holds NaN or infinity"):
                require_finite_entries("heat", A, A)
