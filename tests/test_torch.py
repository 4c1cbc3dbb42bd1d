"""The torch bridge: gradcheck, batches, types, and independence of calls."""

import numpy as np
import pytest
import torch
from cases import gradcheck, samples
from firedrake import *
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
    smooth,
    whole,
)

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, ScheduledRefinement
from prdp_fem.torch import SolverLayer, from_torch, to_torch

torch.set_num_threads(1)
pytestmark = pytest.mark.parallel([1, 2, 3])


def layer_of(problem, controls, parameters=None, refinement=None, **kwargs):
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=refinement,
        solver_parameters=parameters or {**CG, **CONVERGED},
        **kwargs,
    )
    return SolverLayer(solver, controls)


@pytest.mark.parametrize("boundary", [None, 0, 1.0])
@pytest.mark.parametrize("names", [["u0"], ["source"], ["kappa"], ["dt"], ["kappa", "u0", "dt"]])
def test_gradcheck(names, boundary):
    problem = HeatStep(cells=3, boundary=boundary)
    controls = [getattr(problem, name) for name in names]
    layer = layer_of(problem, controls)
    inputs = [
        samples(control, (2,) if index == 0 else (), index).requires_grad_()
        for index, control in enumerate(controls)
    ]
    assert gradcheck(layer, inputs)


def test_gradcheck_of_a_nonsymmetric_problem_with_a_vector_control():
    problem = AdvectionDiffusion(cells=3)
    layer = layer_of(problem, [problem.wind, problem.source], {**GMRES, **CONVERGED})
    inputs = [
        samples(control, seed=index).requires_grad_()
        for index, control in enumerate(layer.controls)
    ]
    assert gradcheck(layer, inputs)


def test_gradcheck_of_cofunctions_and_vector_constants():
    mesh = UnitSquareMesh(3, 3)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    load, wind = Cofunction(V.dual(), name="load"), Constant([0.3, 0.2], name="wind")
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v)) + dot(wind, grad(w)) * v) * dx,
        3 * load,
        u,
        bcs=[DirichletBC(V, 1.0, 1)],
    )
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem, solver_parameters={**GMRES, **CONVERGED}),
        [load, wind],
    )
    inputs = [samples(load, (2,)).requires_grad_(), samples(wind, (2,)).requires_grad_()]
    assert gradcheck(layer, inputs)


def test_a_truncated_stationary_iteration_passes_gradcheck_in_its_right_hand_side():
    """From a zero guess its implicit derivative is the exact one: the iterate is linear in the
    right-hand side.
    """
    problem = HeatStep(cells=3)
    layer = layer_of(problem, [problem.u0], RICHARDSON, FixedRefinement(Iterations(3)))
    assert gradcheck(layer, samples(problem.u0, (2,)).requires_grad_(), atol=1e-8)


@pytest.mark.parametrize("parameters", [CG, RICHARDSON])
def test_batches_are_their_samples_to_the_bit(parameters):
    problem = HeatStep(boundary=1.0)
    layer = layer_of(
        problem, [problem.u0, problem.kappa], parameters, FixedRefinement(Iterations(4))
    )
    u0, kappa = samples(problem.u0, (2, 3), 1), samples(problem.kappa, (), 2)
    u0.requires_grad_(), kappa.requires_grad_()
    batched = layer(u0, kappa)
    assert batched.shape == u0.shape
    weights = samples(problem.u, (2, 3), 3)
    gradients = torch.autograd.grad((weights * batched).sum(), (u0, kappa))
    summed = torch.zeros_like(kappa)
    for index in np.ndindex(2, 3):
        x, k = u0[index].detach().requires_grad_(), kappa.detach().requires_grad_()
        single = layer(x, k)
        assert torch.equal(single, batched[index])
        gx, gk = torch.autograd.grad((weights[index] * single).sum(), (x, k))
        assert torch.equal(gx, gradients[0][index])
        summed += gk
    torch.testing.assert_close(summed, gradients[1], rtol=1e-13, atol=1e-15)


def test_values_and_gradients_are_those_of_dense_torch():
    """An oracle in torch alone: the same Richardson iterations on dense matrices."""
    problem = AdvectionDiffusion()
    layer = layer_of(
        problem,
        [problem.source],
        {**RICHARDSON, "ksp_richardson_scale": 0.3},
        FixedRefinement(Iterations(5)),
    )
    A, M = (
        torch.from_numpy(dense(*form))
        for form in (
            (problem.a, problem.bcs),
            (TrialFunction(problem.V) * TestFunction(problem.V) * dx,),
        )
    )
    M[boundary_dofs(problem.bcs[0])] = 0
    part = samples(problem.source, (4,)).requires_grad_()
    x, weights = (
        torch.from_numpy(whole(tensor.detach().T)).T.requires_grad_()
        for tensor in (part, samples(problem.u, (4,), 5))
    )
    u = torch.zeros_like(x)
    for _ in range(5):
        u = u + 0.3 * (x @ M.T - u @ A.T) / A.diagonal()
    y = layer(part)
    mine = slice(*problem.V.dof_dset.layout_vec.getOwnershipRange())
    torch.testing.assert_close(y, u[:, mine], rtol=1e-12, atol=1e-15)
    (expected,) = torch.autograd.grad((weights * u).sum(), x)
    (found,) = torch.autograd.grad((weights[:, mine] * y).sum(), part)
    torch.testing.assert_close(found, expected[:, mine], rtol=1e-11, atol=1e-15)


def test_two_forwards_then_two_backwards_are_each_their_own():
    problem = HeatStep()
    refinement = ScheduledRefinement(IterationLadder(2, 5), {1: 1})
    layer = layer_of(problem, [problem.kappa], CG, refinement)
    x = [samples(problem.kappa, (2,), seed).requires_grad_() for seed in (1, 2)]
    weights = samples(problem.u, (2,), 3)

    def gradient(y, x):
        return torch.autograd.grad((weights * y**2).sum(), x)[0]

    alone = gradient(layer(x[0]), x[0])
    first = layer(x[0])
    refinement.step(1.0)
    old_source = problem.source.copy(deepcopy=True)
    # what is not a control belongs to its call, too
    problem.source.assign(5), problem.dt.assign(0.2)
    second = layer(x[1])
    second_alone = gradient(layer(x[1]), x[1])
    problem.source.assign(old_source)
    before = layer.solver.statistics.adjoint_iterations
    assert torch.equal(gradient(first, x[0]), alone)
    assert layer.solver.statistics.adjoint_iterations - before == 2 * 2
    assert torch.equal(gradient(second, x[1]), second_alone)
    assert layer.solver.statistics.adjoint_iterations - before == 2 * 2 + 2 * 7


def test_results_may_be_changed_in_place_and_inputs_may_not():
    problem = HeatStep()
    layer = layer_of(problem, [problem.kappa], CG, FixedRefinement(Iterations(3)))
    x = samples(problem.kappa).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = layer(x)
    with torch.no_grad():
        y.mul_(100)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    x = samples(problem.kappa).requires_grad_()
    inner = 1 * x
    y = layer(inner)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_and_partial_gradients(dtype):
    problem = HeatStep()
    layer = layer_of(problem, [problem.u0, problem.source])
    u0, source = (
        samples(control, (3,), seed).to(dtype) for seed, control in enumerate(layer.controls)
    )
    y = layer(u0.requires_grad_(), source)
    assert y.dtype == dtype and y.requires_grad
    y.sum().backward()
    assert u0.grad.dtype == dtype and source.grad is None
    reference = layer(u0.detach().double(), source.double())
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(y.double(), reference, rtol=tolerance, atol=tolerance)
    assert layer(u0, source.double()).dtype == torch.float64
    assert not layer(u0.detach(), source).requires_grad
    with torch.no_grad():
        assert not layer(u0, source).requires_grad


def test_non_contiguous_and_expanded_tensors():
    problem = HeatStep()
    layer = layer_of(problem, [problem.u0])
    x = samples(problem.u0, (4,))
    strided = torch.stack([x, x + 1], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(layer(strided), layer(x))
    assert torch.equal(layer(x[:1].expand(3, -1)), layer(x[[0, 0, 0]]))
    assert layer(x[:0]).shape == (0, x.shape[-1])


def test_a_network_trains_through_the_layer_and_the_users_functions_stay():
    torch.manual_seed(0)
    problem = HeatStep()
    layer = layer_of(problem, [problem.u0], CG, FixedRefinement(Iterations(4)))
    before = [f.dat.data_ro.copy() for f in (problem.u0, problem.u, problem.source)]
    x = samples(problem.u0, (8,)).float()
    network = torch.nn.Sequential(torch.nn.Linear(x.shape[-1], x.shape[-1]), layer)
    assert len(list(network.parameters())) == 2 and f"initial: {x.shape[-1]}" in repr(network)
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimiser.zero_grad()
        loss = ((network(x) - layer(x**2)) ** 2).mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert all(
        np.array_equal(old, f.dat.data_ro)
        for old, f in zip(before, (problem.u0, problem.u, problem.source))
    )


@pytest.mark.parametrize("count", [4, None])
def test_serial_and_parallel_agree(count):
    """Values, and gradients of a field and of a Constant, against the same solve on each rank's own
    copy of the mesh.
    """

    def run(mesh):
        problem = HeatStep(mesh=mesh, boundary=1.0)
        refinement = None if count is None else FixedRefinement(Iterations(count))
        layer = layer_of(
            problem, [problem.kappa, problem.u0, problem.dt], {**CG, **CONVERGED}, refinement
        )
        x = [to_torch(control, copy=True).requires_grad_() for control in layer.controls]
        y = layer(*x)
        gradients = torch.autograd.grad((y**3).sum(), x)
        coordinates = (
            Function(VectorFunctionSpace(mesh, "CG", 1))
            .interpolate(SpatialCoordinate(mesh))
            .dat.data_ro
        )
        fields = [tensor.detach().numpy() for tensor in (y, *gradients[:2])]
        table = {tuple(np.round(point, 9)): values for point, *values in zip(coordinates, *fields)}
        return table, gradients[2].item()

    table, constant = run(UnitSquareMesh(6, 6))
    reference, reference_constant = run(UnitSquareMesh(6, 6, comm=COMM_SELF))
    worst = max(
        (
            abs(value - expected) / max(1, abs(expected))
            for point in table
            for value, expected in zip(table[point], reference[point])
        ),
        default=0.0,
    )
    assert COMM_WORLD.allreduce(len(table)) >= len(reference)
    assert COMM_WORLD.allreduce(worst, MPI.MAX) < 1e-9
    assert abs(constant - reference_constant) < 1e-9 * abs(reference_constant)


# Bad input


@pytest.mark.parallel(1)
def test_bad_layers_are_refused():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(problem.problem)
    stranger = Function(problem.V, name="stranger")
    with pytest.raises(
        ValueError, match="does not depend on Function 'stranger'; it depends on .*'initial'"
    ):
        SolverLayer(solver, [stranger])
    with pytest.raises(ValueError, match="does not depend on Function 'solution'"):
        SolverLayer(solver, [problem.u])
    with pytest.raises(ValueError, match="at least one"):
        SolverLayer(solver, [])
    with pytest.raises(ValueError, match="once"):
        SolverLayer(solver, [problem.u0, problem.u0])
    with pytest.raises(TypeError, match="sequence"):
        SolverLayer(solver, problem.u0)
    with pytest.raises(TypeError, match="a control must be"):
        SolverLayer(solver, ["u0"])
    with pytest.raises(
        TypeError, match="prdp_fem.LinearVariationalSolver or .*, found a firedrake"
    ):
        SolverLayer(LinearVariationalSolver(problem.problem), [problem.u0])


def test_bad_tensors_are_refused_before_any_work():
    problem = HeatStep()
    layer = layer_of(problem, [problem.u0, problem.dt])
    u0, dt = samples(problem.u0), samples(problem.dt)
    n = u0.numel()
    for tensors, error, words in [
        (
            (u0,),
            TypeError,
            r"expected 2 tensor\(s\), one for each of 'initial', 'time step', found 1",
        ),
        (
            (u0[:-1], dt),
            ValueError,
            (
                rf"last axis of {n} for 'initial' \(the dofs that this rank owns.*found shape"
                rf" \({n - 1},\)"
            ),
        ),
        (
            (u0, dt.expand(2)),
            ValueError,
            r"last axis of 1 for 'time step' \(the components of the Constant\)",
        ),
        ((u0, torch.tensor(0.1)), ValueError, "last axis of 1"),
        ((u0.to(torch.int64), dt), TypeError, "float32 or float64"),
        ((u0.numpy(), dt), TypeError, "expected a tensor"),
        ((u0.expand(2, -1), dt.expand(3, -1)), ValueError, "batch axes"),
        ((u0.to("meta"), dt), ValueError, "CPU"),
    ]:
        with pytest.raises(error, match=words):
            layer(*tensors)
    assert layer.solver.statistics.solves == 0


# Conversion


def test_conversion_shares_memory_where_it_can():
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    f = smooth(V, 1)
    tensor = to_torch(f)
    n = tensor.numel()
    tensor[0] = 7.0
    version = f.dat.dat_version
    assert f.dat.data_ro[0] == 7.0 and to_torch(f, copy=True).data_ptr() != tensor.data_ptr()
    assert f.dat.dat_version == version  # a copy is only read
    with f.dat.vec_ro as vector:
        assert torch.equal(to_torch(vector.copy()), tensor)
    made = from_torch(tensor)
    tensor[-1] = 8.0
    assert made.array_r[-1] == 8.0
    g = from_torch(tensor, V)
    assert isinstance(g, Function) and np.array_equal(g.dat.data_ro, f.dat.data_ro)
    assert isinstance(from_torch(tensor, V.dual()), Cofunction)
    c = Constant([1.0, 2.0])
    assert (
        from_torch(torch.tensor([3.0, 4.0]), c) is c
        and list(c.values()) == [3.0, 4.0]
        and to_torch(c).tolist() == [3.0, 4.0]
    )
    W = V * V
    h = Function(W)
    h.sub(1).assign(f)
    assert torch.equal(to_torch(h)[n:], tensor)
    assert np.array_equal(from_torch(to_torch(h), W).sub(1).dat.data_ro, f.dat.data_ro)
    with pytest.raises(ValueError, match=f"{n} values"):
        from_torch(tensor[1:], V)
    with pytest.raises(TypeError, match="found a float"):
        to_torch(1.0)
