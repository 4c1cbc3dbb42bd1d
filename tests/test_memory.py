"""Repeated calls leave nothing behind, and make no PETSc objects."""

import gc
import resource

import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from problems import CG, GMRES, HeatStep, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.torch import SolverLayer, to_torch

torch.set_num_threads(1)


def resident_bytes():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def objects_made():
    """PETSc numbers its objects one by one."""
    vector = PETSc.Vec().create(PETSc.COMM_SELF)
    number = vector.id
    vector.destroy()
    return number


def assert_flat(call, calls, *, objects=0, warm_up=500):
    for _ in range(warm_up):  # what is made once, and allocators that fill their pools
        call()
    memory, number = resident_bytes(), objects_made()
    for _ in range(calls):
        call()
    assert objects_made() - number - 1 <= objects * calls
    assert resident_bytes() - memory < 2**20


def forward_and_backward(layer, batch):
    tensors = [
        to_torch(control, copy=True).expand(*batch, -1).clone() for control in layer.controls
    ]
    tensors = [
        (tensor * torch.linspace(1, 2, batch[0])[:, None] if batch else tensor).requires_grad_()
        for tensor in tensors
    ]

    def call():
        for tensor in tensors:
            tensor.grad = None
        layer(*tensors).sum().backward()

    return call


@pytest.mark.parametrize("batch", [(), (4,)])
def test_ten_thousand_calls_with_a_constant_operator(batch):
    problem = HeatStep(4)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(3)), solver_parameters=CG
    )
    assert_flat(forward_and_backward(SolverLayer(solver, [problem.u0]), batch), 10_000)
    assert solver.statistics.assemblies == 1


def test_calls_with_an_operator_that_varies():
    problem = HeatStep(4)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(3)), solver_parameters=CG
    )
    assert_flat(forward_and_backward(SolverLayer(solver, [problem.kappa, problem.u0]), (2,)), 1_000)
    assert solver.statistics.assemblies > 2_000


def test_calls_of_a_nonlinear_solver_with_a_functional():
    problem = HeatStep(4)
    V = problem.V
    u = Function(V)
    v = TestFunction(V)
    f = smooth(V, 1)
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(
            ((1 + u**2) * inner(grad(u), grad(v)) - f * v) * dx,
            u,
            bcs=DirichletBC(V, f, "on_boundary"),
        ),
        refinement=FixedRefinement(NewtonSteps(2, Iterations(3))),
        solver_parameters=GMRES,
    )
    assert_flat(forward_and_backward(SolverLayer(solver, [f], u**2 * dx), ()), 1_000, objects=100)


def test_replays_and_gradients_of_a_time_loop():
    problem = HeatStep(4)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(3)), solver_parameters=CG
    )
    control = Control(problem.u0)
    for _ in range(10):
        solver.solve()
        problem.u0.assign(problem.u)
    reduced = ReducedFunctional(assemble(problem.u**2 * dx), control)
    start = smooth(problem.V, 2)

    def call():
        reduced(start)
        reduced.derivative()

    with stop_annotating():
        # Firedrake's assembly of the functional takes longest to settle, with stock solvers, too.
        assert_flat(call, 1_000, objects=100, warm_up=1_000)
