"""Layers whose controls give boundary values and guesses, and whose outputs are components and
functionals.
"""

import copy

import numpy as np
import pytest
import torch
from cases import gradcheck, samples
from firedrake import *
from mpi4py import MPI
from problems import CG, CONVERGED, GMRES, HeatStep, smooth
from ufl.core.ufl_type import ufl_type
from ufl.mathfunctions import MathFunction

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, ScheduledRefinement
from prdp_fem.torch import SolverLayer, to_torch

torch.set_num_threads(1)
pytestmark = pytest.mark.parallel([1, 2, 3])

DIRECT = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


def layer_of(problem, controls, output=None, parameters=None, **kwargs):
    solver = prdp_fem.LinearVariationalSolver(
        problem, solver_parameters=parameters or {**CG, **CONVERGED}, **kwargs
    )
    return SolverLayer(solver, controls, output)


def gradcheck_of_batches(layer, *batches):
    return gradcheck(
        layer,
        [
            samples(control, batch, seed).requires_grad_()
            for seed, (control, batch) in enumerate(zip(layer.controls, batches))
        ],
    )


def mesh_and_space():
    mesh = UnitSquareMesh(3, 3)
    return mesh, FunctionSpace(mesh, "CG", 1)


# Boundary values


@pytest.mark.parametrize(
    "make, value",
    [
        (lambda V: smooth(V, 1, "g"), lambda g, x: g),
        (lambda V: smooth(FunctionSpace(V.mesh(), "CG", 2), 1, "g"), lambda g, x: 2 * g),
        (lambda V: smooth(V, 1, "g"), lambda g, x: g**2 * x[0]),
        (lambda V: Constant([0.3, 0.4], name="g"), lambda g, x: g[0] * g[1] + x[1] * g[1]),
        (
            lambda V: Function(FunctionSpace(V.mesh(), "R", 0), name="g").assign(0.3),
            lambda g, x: g * x[0],
        ),
    ],
    ids=["field", "field of another space", "nonlinear expression", "constant", "real"],
)
def test_boundary_values_are_controls(make, value):
    mesh, V = mesh_and_space()
    g = make(V)
    value = value(g, SpatialCoordinate(mesh))
    problem = HeatStep(mesh=mesh, boundary=value)
    layer = layer_of(problem.problem, [g, problem.u0])
    assert gradcheck_of_batches(layer, (2,), ())
    assert gradcheck_of_batches(layer, (), (2,))
    empty = [
        torch.empty(0, to_torch(control).numel(), dtype=torch.float64, requires_grad=True)
        for control in layer.controls
    ]
    layer(*empty).sum().backward()
    assert all(tensor.grad.shape == tensor.shape for tensor in empty)
    expected = layer.solver.solve()
    given = [to_torch(control, copy=True) for control in layer.controls]
    np.testing.assert_allclose(layer(*given).numpy(), expected.dat.data_ro, rtol=1e-12, atol=1e-14)


def test_a_control_may_be_in_the_forms_and_give_boundary_values():
    mesh, V = mesh_and_space()
    g = smooth(V, 1, "g")
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    problem = LinearVariationalProblem(
        (w * v + exp(g) * inner(grad(w), grad(v))) * dx,
        g * v * dx,
        u,
        bcs=[DirichletBC(V, g, 1), DirichletBC(V, 0, 2)],
    )
    assert gradcheck_of_batches(layer_of(problem, [g]), (2,))


@pytest.mark.slow
def test_boundary_values_of_a_component_and_conditions_that_overlap():
    mesh, _ = mesh_and_space()
    V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
    W = V * Q
    (w, p) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    u = Function(W)
    g, c = smooth(V, 14, "g"), Constant(0.5, name="c")
    a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w) + 10 * p * q) * dx
    bcs = [DirichletBC(W.sub(0), g, (1, 2)), DirichletBC(W.sub(0).sub(1), c, (2, 3))]
    problem = LinearVariationalProblem(a, inner(smooth(V, 15), v) * dx, u, bcs=bcs)
    layer = layer_of(problem, [g, c], parameters=DIRECT)
    assert gradcheck_of_batches(layer, (2,), (2,))
    expected = layer.solver.solve()
    given = [to_torch(control, copy=True) for control in layer.controls]
    np.testing.assert_allclose(
        layer(*given).numpy(), to_torch(expected).numpy(), rtol=1e-9, atol=1e-10
    )


def test_conditions_without_controls_keep_the_values_of_the_moment():
    mesh, V = mesh_and_space()
    g, other = smooth(V, 1, "g"), Constant(2.0)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    problem = LinearVariationalProblem(
        inner(grad(w), grad(v)) * dx,
        smooth(V, 2) * v * dx,
        u,
        bcs=[DirichletBC(V, g, 1), DirichletBC(V, other, 2)],
    )
    layer = layer_of(problem, [g])
    other.assign(3.0)
    values, nodes = layer(samples(g)).numpy(), problem.bcs[1].nodes
    assert values[nodes[nodes < len(values)]] == pytest.approx(3.0)


# The guess


def test_a_guess_is_a_control_whose_derivative_is_zero():
    problem = HeatStep(cells=3)
    layer = layer_of(
        problem.problem,
        [problem.u, problem.u0],
        parameters=CG,
        refinement=FixedRefinement(Iterations(2)),
        warm_start=True,
    )
    guesses = samples(problem.u, (3,), 1).requires_grad_()
    u0 = samples(problem.u0, (), 2).requires_grad_()
    out = layer(guesses, u0)
    out.sum().backward()
    assert guesses.grad is None and u0.grad.abs().max() > 0
    for guess, row in zip(guesses.detach(), out.detach()):
        problem.u.dat.data[:] = guess.numpy()
        problem.u0.dat.data[:] = u0.detach().numpy()
        np.testing.assert_array_equal(layer.solver.solve().dat.data_ro, row.numpy())


# Outputs


def mixed_layer(output_of):
    mesh, Q = mesh_and_space()
    V = VectorFunctionSpace(mesh, "CG", 2)
    W = V * Q
    (w, p) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    u = Function(W, name="state")
    f, c = smooth(V, 15, "force"), Constant(0.3, name="c")
    a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w) + 0.1 * p * q) * dx
    problem = LinearVariationalProblem(
        a, inner(f, v) * dx + c * q * dx, u, bcs=DirichletBC(W.sub(0), 0, 1)
    )
    return layer_of(problem, [f, c], output_of(u, f, c, mesh), DIRECT)


def test_components_of_a_mixed_solution():
    layer = mixed_layer(lambda u, f, c, mesh: [u, u.sub(0), u.sub(1), u.sub(0).sub(1)])
    whole, velocity, pressure, vertical = layer(
        *(samples(control, (2,)) for control in layer.controls)
    )
    assert [len(part) for part in (velocity, pressure, vertical)] == [2, 2, 2]
    assert [COMM_WORLD.allreduce(part.shape[-1]) for part in (velocity, pressure, vertical)] == [
        98,
        16,
        49,
    ]
    assert torch.equal(torch.cat([velocity, pressure], -1), whole) and torch.equal(
        velocity[..., 1::2], vertical
    )
    assert gradcheck_of_batches(mixed_layer(lambda u, f, c, mesh: u.sub(1)), (2,), ())


def test_functionals_of_the_solution_and_of_controls():
    def output(u, f, c, mesh):
        velocity, pressure = split(u)
        return [
            (inner(velocity, velocity) * exp(c) + pressure**2 * inner(f, f)) * dx,
            pressure * ds(2),
            c * f[0] * dx(domain=mesh),
        ]

    layer = mixed_layer(output)
    values = layer(*(samples(control, (2, 3)) for control in layer.controls))
    assert [value.shape for value in values] == [(2, 3)] * 3
    assert gradcheck_of_batches(layer, (2,), ()) and gradcheck_of_batches(layer, (), (2,))
    f, c = samples(layer.controls[0]), samples(layer.controls[1])
    for control, tensor in zip(layer.controls, (f, c)):
        control.dat.data[...] = tensor.numpy().reshape(control.dat.data.shape)
    layer.solver.solve()
    for value, form in zip(layer(f, c), layer.output):
        assert value.item() == pytest.approx(assemble(form), rel=1e-9)


def test_a_functional_keeps_the_coefficients_of_its_forward_pass():
    problem = HeatStep(cells=3)
    weight = Constant(2.0)
    layer = layer_of(problem.problem, [problem.u0], weight * problem.u**2 * dx)
    x = samples(problem.u0).requires_grad_()
    value = layer(x)
    weight.assign(5.0)
    (gradient,) = torch.autograd.grad(value, x)
    weight.assign(2.0)
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x), x)[0], rtol=0, atol=0)


@pytest.mark.parallel([2, 3])
def test_boundary_controls_and_functionals_agree_with_serial():
    def results(comm):
        mesh = UnitSquareMesh(4, 4, comm=comm)
        V = FunctionSpace(mesh, "CG", 1)
        x, y = SpatialCoordinate(mesh)
        g, c = smooth(V, 1, "g"), Constant([0.3, 0.7], name="c")
        w = TrialFunction(V)
        v = TestFunction(V)
        u = Function(V)
        problem = LinearVariationalProblem(
            (w * v + inner(grad(w), grad(v))) * dx,
            smooth(V, 2) * v * dx,
            u,
            bcs=[DirichletBC(V, g**2, 1), DirichletBC(V, c[0] * x + c[1], (2, 3))],
        )
        layer = layer_of(problem, [g, c], [u, c[0] * u**3 * dx])
        tensors = [to_torch(control, copy=True).requires_grad_() for control in layer.controls]
        _, value = layer(*tensors)
        value.backward()
        projected = Cofunction(V.dual())
        projected.dat.data_wo[:] = tensors[0].grad.numpy()
        return value.item(), assemble(action(projected, smooth(V, 3))), tensors[1].grad.tolist()

    parallel, serial = results(MPI.COMM_WORLD), results(MPI.COMM_SELF)
    for one, other in zip(parallel, serial):
        assert one == pytest.approx(other, rel=1e-9)


# Bad input


@pytest.mark.parallel(1)
def test_what_cannot_be_an_output_or_a_control_is_refused():
    mesh, V = mesh_and_space()
    problem = HeatStep(mesh=mesh, boundary=smooth(V, 1, "g"))
    solver = prdp_fem.LinearVariationalSolver(problem.problem)
    with pytest.raises(
        ValueError, match="Function 'source' is no component of the solution 'solution'"
    ):
        SolverLayer(solver, [problem.u0], problem.source)
    with pytest.raises(TypeError, match="an output must be"):
        SolverLayer(solver, [problem.u0], 3)
    with pytest.raises(ValueError, match="without test or trial functions"):
        SolverLayer(solver, [problem.u0], problem.u * TestFunction(V) * dx)
    with pytest.raises(ValueError, match="coordinates of a mesh of the problem"):
        SolverLayer(solver, [mesh.coordinates])
    with pytest.raises(
        ValueError, match="does not depend on Function 'other'; it depends on .*'g'"
    ):
        SolverLayer(solver, [Function(V, name="other")])


@ufl_type(is_scalar=True, num_ops=1)
class LogGamma(MathFunction):
    """A function that UFL has no derivative of."""

    __slots__ = ()

    def __init__(self, argument):
        MathFunction.__init__(self, "lgamma", argument)


def test_what_ufl_cannot_differentiate_by_is_named():
    mesh, V = mesh_and_space()
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="u")
    f = smooth(V, 1, "f")
    solver = prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(w * v * dx, LogGamma(f) * v * dx, u), solver_parameters=GMRES
    )
    with pytest.raises(TypeError, match="UFL cannot differentiate the problem by 'f'"):
        SolverLayer(solver, [f])
    with pytest.raises(TypeError, match="UFL cannot differentiate the problem by 'u'"):
        prdp_fem.NonlinearVariationalSolver(
            NonlinearVariationalProblem(LogGamma(u) * v * dx, u, J=w * v * dx)
        )
    with pytest.raises(TypeError, match="UFL cannot differentiate the functional by 'u'"):
        SolverLayer(
            prdp_fem.LinearVariationalSolver(LinearVariationalProblem(w * v * dx, f * v * dx, u)),
            [f],
            LogGamma(u) * dx,
        )


def test_batches_without_samples():
    problem = HeatStep(cells=3)
    layer = layer_of(problem.problem, [problem.u0, problem.kappa])
    x = torch.zeros(0, layer.solver.system.size, dtype=torch.float64)
    kappa = samples(problem.kappa, batch=()).requires_grad_()
    y = layer(x, kappa)
    y.sum().backward()
    assert y.shape == x.shape and not kappa.grad.any()


def test_tensors_whose_signs_torch_has_yet_to_change():
    problem = HeatStep(cells=3)
    layer, x = layer_of(problem.problem, [problem.u0]), samples(problem.u0)
    torch.testing.assert_close(
        layer(torch.imag(torch.complex(x, x).conj())), layer(-x), rtol=0, atol=0
    )


def values_and_gradient(layer, tensor):
    values = layer(tensor)
    return values.detach(), *torch.autograd.grad(values.square().sum(), tensor)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_ranks_cut_batches_alike_whatever_they_own(monkeypatch, differentiation):
    # 49 dofs, which no two or three ranks share evenly
    problem = HeatStep(mesh=UnitSquareMesh(6, 6))
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(3)),
        differentiation=differentiation,
        solver_parameters=CG,
    )
    layer = SolverLayer(solver, [problem.u0])
    sizes = COMM_WORLD.allgather(problem.V.dof_dset.size)
    tensor = samples(problem.u0, (4,)).requires_grad_()
    whole = values_and_gradient(layer, tensor)
    # The ranks that own least could take all rows at once, the others could not.
    monkeypatch.setattr(
        "prdp_fem.solution.stretches._SIZE", 4 * min(sizes) if COMM_WORLD.size > 1 else 2 * sizes[0]
    )
    for one, other in zip(whole, values_and_gradient(layer, tensor)):
        assert torch.equal(one, other)


def test_copies_of_a_layer_can_be_made_by_one_rank():
    problem = HeatStep(boundary=1.0)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={**CG, **CONVERGED}
    )
    network = torch.nn.Sequential(SolverLayer(solver, [problem.u0], output=problem.u**2 * dx))
    tensor = to_torch(problem.u0)
    calls = []
    network[0].register_forward_hook(lambda *_: calls.append("first"))
    if COMM_WORLD.rank == 0:
        copied = copy.deepcopy(network)
        assert copied[0] is not network[0] and copied[0].solver is solver
        copied[0].register_forward_hook(lambda *_: calls.append("second"))
    network(tensor)
    assert calls == ["first"]
    copied = copy.deepcopy(network)
    assert torch.equal(copied(tensor), network(tensor))


def test_ranks_at_different_levels_are_an_error_on_all():
    problem = HeatStep()
    refinement = ScheduledRefinement(IterationLadder(), {1: 1})
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(
            problem.problem, refinement=refinement, solver_parameters=CG
        ),
        [problem.u0],
    )
    if COMM_WORLD.rank == 0:
        refinement.step(1.0)
    tensor = to_torch(problem.u0)
    if COMM_WORLD.size == 1:
        layer(tensor)
        return
    with pytest.raises(
        ValueError,
        match=(
            "the setting, .* max_it 2, .* on rank 0 and .* max_it 1, .* on rank 1: give the"
            " refinement comm="
        ),
    ):
        layer(tensor)
