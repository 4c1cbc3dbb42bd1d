"""Solves on devices: equal to those on the host, with nothing moved that need not be; and what is
refused.

What runs on a device runs on each one that PETSc was built for and finds. ``make test-device``
builds a PETSc for OpenCL, which PoCL runs on any processor. A stand-in with the host's own types
runs everywhere: its tensors are shared as those on a CUDA device are.
"""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from cases import NEWTON
from firedrake import *
from firedrake.adjoint import *
from problems import CG, CONVERGED, GMRES, RICHARDSON, AdvectionDiffusion, HeatStep, smooth, whole
from torch._subclasses import FakeTensorMode

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps, Tolerance
from prdp_fem.memory.devices import (
    DEVICES,
    HOST,
    Device,
    failure,
    find_device,
    transfers,
    usable_devices,
)
from prdp_fem.memory.memory import DeviceMemory
from prdp_fem.problem.wanted import Wanted
from prdp_fem.torch import SolverLayer, from_torch, to_torch

pytestmark = pytest.mark.parallel([1, 2])

CHEBYSHEV = {"ksp_type": "chebyshev", "pc_type": "jacobi", "ksp_chebyshev_eigenvalues": "0.2,2.2"}
METHODS = {"cg": CG, "gmres": GMRES, "richardson": RICHARDSON, "chebyshev": CHEBYSHEV}
SETTINGS = {"iterations": Iterations(7), "tolerance": Tolerance(1e-8)}
# What a copy of a matrix to a device is called in PETSc's log.
COPIES = {"cuda": "MatCUSPARSCopyTo", "hip": "MatHIPSPARSCopyTo", "opencl": "MatVCLCopyTo"}


@pytest.fixture(params=list(DEVICES))
def device(request):
    why = failure(DEVICES[request.param])
    if why is not None:
        pytest.skip(f"no {request.param}: {why}")
    return request.param


@pytest.fixture(params=["cpu", "device"])
def place(request, device):
    """Where tensors are while the solver is on the device."""
    if request.param == "device" and DEVICES[device].tensors == "cpu":
        pytest.skip(f"torch has no tensors on {device}")
    return DEVICES[device].tensors if request.param == "device" else "cpu"


@cache
def square(cells):
    """One mesh for all that is compared: another one may be partitioned otherwise."""
    return UnitSquareMesh(cells, cells)


def samples(control, rows, seed):
    """Values around those of a control; without batch axes where rows is None."""
    value = to_torch(control, copy=True)
    noise = torch.rand(
        (1 if rows is None else rows, len(value)),
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )
    values = value * (1 + 0.1 * noise)
    return values[0] if rows is None else values


def run(make, on, controls, rows, setting, *, place="cpu", **options):
    """Solutions, gradients by controls, and the solver, of a problem that is made anew."""
    problem = make()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, device=on, refinement=FixedRefinement(setting), **options
    )
    layer = SolverLayer(solver, [getattr(problem, name) for name in controls])
    if on != HOST:
        layer.to(place)
    tensors = [
        samples(control, rows, seed).to(layer.device).requires_grad_()
        for seed, control in enumerate(layer.controls)
    ]
    solution = layer(*tensors)
    (solution**4).sum().backward()
    return solution.detach().cpu(), [tensor.grad.cpu() for tensor in tensors], solver


def agree(one, other, rtol=1e-10):
    """Whether arrays, of which each rank has a part, are the same to a tolerance, relative to the
    largest entry.
    """
    one, other = whole(one.numpy().ravel()), whole(other.numpy().ravel())
    np.testing.assert_allclose(one, other, rtol=0, atol=rtol * np.abs(other).max())


# Equal to the host


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("method", list(METHODS))
def test_iterations_and_results_are_those_of_the_host(
    device, place, method, setting, rows, differentiation
):
    controls = ["u0", "source"]

    def make():
        return HeatStep(mesh=square(8), boundary=0.3)

    found = [
        run(
            make,
            on,
            controls,
            rows,
            SETTINGS[setting],
            place=place,
            solver_parameters=METHODS[method],
            differentiation=differentiation,
        )
        for on in (HOST, device)
    ]
    (u, gradients, on_host), (v, others, on_device) = found
    assert on_device.device == device and on_host.device == HOST
    for name in (
        "solves",
        "forward_iterations",
        "adjoint_solves",
        "adjoint_iterations",
        "assemblies",
    ):
        assert getattr(on_device.statistics, name) == getattr(on_host.statistics, name)
    assert on_device.statistics.forward_iterations > 0
    agree(v, u)
    for one, other in zip(others, gradients):
        agree(one, other)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
@pytest.mark.parametrize("method", ["gmres", "richardson"])
def test_operators_that_are_not_symmetric_are_transposed_on_the_device(
    device, place, method, differentiation
):
    (u, (gradient,), on_host), (v, (other,), on_device) = [
        run(
            lambda: AdvectionDiffusion(mesh=square(6)),
            on,
            ["source"],
            2,
            Iterations(6),
            place=place,
            solver_parameters=METHODS[method],
            differentiation=differentiation,
        )
        for on in (HOST, device)
    ]
    agree(v, u)
    agree(other, gradient)
    assert on_device.statistics.adjoint_iterations == on_host.statistics.adjoint_iterations == 12


def set_by_hand(ksp):
    ksp.setTolerances(rtol=1e-12)
    ksp.setGMRESRestart(3)


@pytest.mark.parametrize(
    "parameters, hand, setting",
    [
        (GMRES, set_by_hand, None),
        (GMRES, lambda ksp: ksp.setType("bcgs"), Iterations(4)),
        (GMRES, lambda ksp: ksp.setPCSide(PETSc.PC.Side.RIGHT), Iterations(4)),
        (GMRES, set_by_hand, Iterations(7)),
        ({"ksp_type": "chebyshev", "pc_type": "jacobi"}, lambda ksp: None, Iterations(6)),
        ({"ksp_type": "gmres", "pc_type": "sor"}, lambda ksp: None, Iterations(5)),
        (
            {"ksp_type": "gmres", "pc_type": "jacobi", "pc_jacobi_type": "rowmax"},
            lambda ksp: None,
            Iterations(5),
        ),
    ],
)
def test_transposed_solves_are_those_of_the_same_ksp(device, parameters, hand, setting):
    """With bounds of eigenvalues that it has estimated, and what was set on it by hand."""
    results = []
    for on in (HOST, device):
        problem = AdvectionDiffusion(mesh=square(8))
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            device=on,
            solver_parameters=parameters,
            refinement=None if setting is None else FixedRefinement(setting),
        )
        hand(solver.snes.getKSP())
        layer = SolverLayer(solver, [problem.source])
        x = to_torch(problem.source, copy=True).requires_grad_()
        y = layer(x)
        (y**3).sum().backward()
        results.append((y.detach(), x.grad, solver.statistics))
    (u, gradient, on_host), (v, other, on_device) = results
    agree(v, u)
    agree(other, gradient, 1e-9)
    assert on_device.adjoint_iterations == on_host.adjoint_iterations


def test_transposes_are_those_of_the_present_operator(device):
    """Whatever it was before: symmetric, say."""
    gradients = []
    for on, winds in ((HOST, (3.0,)), (device, (0.0, 3.0, 1.0, 3.0))):
        V = FunctionSpace(square(6), "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        u = Function(V)
        f = smooth(V, 2)
        wind = Constant(0.0)
        problem = LinearVariationalProblem(
            (inner(grad(w), grad(v)) + w * v + wind * w.dx(0) * v) * dx, f * v * dx, u
        )
        solver = prdp_fem.LinearVariationalSolver(
            problem,
            device=on,
            refinement=FixedRefinement(Iterations(5)),
            solver_parameters={**GMRES, "pc_jacobi_type": "rowmax"},
        )
        layer = SolverLayer(solver, [f])
        for value in winds:
            wind.assign(value)
            x = to_torch(f, copy=True).requires_grad_()
            layer(x).sum().backward()
        gradients.append(x.grad)
    agree(*gradients)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_cotangents_at_the_boundary_do_not_matter(device, place, differentiation):
    """However large they are, as of the square root where the boundary value is nearly zero."""
    gradients = []
    for on in (HOST, device):
        problem = HeatStep(mesh=square(6))
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            device=on,
            refinement=FixedRefinement(Iterations(5)),
            solver_parameters=CG,
            differentiation=differentiation,
        )
        layer = SolverLayer(solver, [problem.u0])
        if on != HOST:
            layer.to(place)
        x = to_torch(problem.u0, copy=True).to(layer.device).requires_grad_()
        (layer(x).abs() + 1e-30).sqrt().sum().backward()
        gradients.append(x.grad.cpu())
    assert gradients[1].isfinite().all()
    agree(*gradients[::-1])


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_operators_that_vary_are_assembled_on_the_host(device, place, differentiation):
    (u, gradients, _), (v, others, on_device) = [
        run(
            lambda: HeatStep(mesh=square(6)),
            on,
            ["kappa", "u0"],
            3,
            Iterations(9),
            place=place,
            solver_parameters=CG,
            differentiation=differentiation,
        )
        for on in (HOST, device)
    ]
    agree(v, u)
    for one, other in zip(others, gradients):
        agree(one, other)
    assert on_device.statistics.assemblies >= 3 and on_device.statistics.copies_to_host > 0


class Neumann:
    """A singular operator, whose null space Firedrake has attached."""

    def __init__(self, space):
        V = space(square(6))
        w = TrialFunction(V)
        v = TestFunction(V)
        self.u = Function(V)
        self.source = Cofunction(V.dual(), name="load")
        load = assemble(inner(smooth(V, 3), v) * dx)
        if V.value_size == 1:
            nullspace = self.nullspace = VectorSpaceBasis(constant=True)
            a = inner(grad(w), grad(v)) * dx
        else:
            x, y = SpatialCoordinate(V.mesh())
            nullspace = self.nullspace = VectorSpaceBasis(
                [Function(V).interpolate(as_vector(mode)) for mode in ((1, 0), (0, 1), (-y, x))]
            )
            nullspace.orthonormalize()
            a = inner(sym(grad(w)), sym(grad(v))) * dx
        nullspace.orthogonalize(load)
        with stop_annotating():
            self.source.assign(load)
        self.problem = LinearVariationalProblem(a, self.source, self.u)


@pytest.mark.parametrize(
    "space",
    [lambda mesh: FunctionSpace(mesh, "CG", 1), lambda mesh: VectorFunctionSpace(mesh, "CG", 1)],
    ids=["constants", "rigid motions"],
)
@pytest.mark.parametrize("method", ["cg", "gmres"])
def test_null_spaces_go_to_the_device(device, method, space):
    results = []
    for on in (HOST, device):
        problem = Neumann(space)
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            device=on,
            refinement=FixedRefinement(Iterations(12)),
            solver_parameters=METHODS[method],
            nullspace=problem.nullspace,
            transpose_nullspace=problem.nullspace,
        )
        layer = SolverLayer(solver, [problem.source])
        load = to_torch(problem.source, copy=True).to(layer.device).requires_grad_()
        u = layer(load)
        (u**4).sum().backward()
        results.append((u.detach().cpu(), load.grad.cpu()))
    for one, other in zip(*results):
        agree(other, one)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_nonlinear_problems(device, place, differentiation):
    results = []
    for on in (HOST, device):
        V = FunctionSpace(square(6), "CG", 1)
        u = Function(V, name="u")
        v = TestFunction(V)
        f = smooth(V, 1)
        problem = NonlinearVariationalProblem(
            ((1 + u**2) * inner(grad(u), grad(v)) - f * v) * dx,
            u,
            bcs=DirichletBC(V, 0.2, "on_boundary"),
        )
        solver = prdp_fem.NonlinearVariationalSolver(
            problem,
            device=on,
            differentiation=differentiation,
            warm_start=False,
            solver_parameters={**GMRES, **CONVERGED, **NEWTON},
        )
        layer = SolverLayer(solver, [f])
        if on != HOST:
            layer.to(place)
        x = torch.stack([to_torch(f), 2 * to_torch(f)]).to(layer.device).requires_grad_()
        y = layer(x)
        (y**4).sum().backward()
        results.append((y.detach().cpu(), x.grad.cpu(), solver.statistics))
    (u, gradient, on_host), (v, other, on_device) = results
    agree(v, u)
    agree(other, gradient)
    assert (on_device.newton_steps, on_device.forward_iterations) == (
        on_host.newton_steps,
        on_host.forward_iterations,
    )
    assert on_device.copies_to_device > 0 and on_host.copies_to_device == 0


def test_taped_solves(device):
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, device=device, solver_parameters={**CG, **CONVERGED}
    )
    solver.solve()
    reduced = ReducedFunctional(assemble(problem.u**4 * dx), Control(problem.kappa))
    with stop_annotating():
        rates = taylor_to_dict(reduced, problem.kappa.copy(deepcopy=True), smooth(problem.V, 5))
    assert min(rates["R1"]["Rate"]) > 1.95 and min(rates["R2"]["Rate"]) > 2.9


# What is moved


@pytest.mark.parametrize("method", list(METHODS))
def test_a_repeated_call_moves_inputs_and_results_and_nothing_else(device, place, method):
    """By PETSc's own counts: no copy of an operator, no form assembled, and as many bytes as there
    are in the tensors.
    """
    PETSc.Log.begin()
    problem = HeatStep(8, boundary=0.3)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        device=device,
        refinement=FixedRefinement(Iterations(5)),
        solver_parameters=METHODS[method],
    )
    layer = SolverLayer(solver, [problem.u0, problem.source]).to(place)
    tensors = [
        samples(control, 3, seed).to(layer.device).requires_grad_()
        for seed, control in enumerate(layer.controls)
    ]

    def call():
        layer(*tensors).sum().backward()

    def counts(*events):
        return [PETSc.Log.Event(name).getPerfInfo()["count"] for name in events]

    events = [
        "ParLoopExecute",
        "MatConvert",
        "MatCopy",
        "MatTranspose",
        *([COPIES[device]] if device in COPIES else []),
    ]
    start = counts(*events)
    call()
    # what is looked for below is called so
    assert all(count > none for count, none in zip(counts(*events), start))
    solver.statistics.reset()
    before, moved = counts(*events), transfers()
    call()
    assert counts(*events) == before
    statistics, size = solver.statistics, problem.u.dat.data_ro.nbytes
    assert statistics.assemblies == 0
    # To the device two inputs and a cotangent, and back a solution and two gradients, for each
    # sample.
    expected = (9, 9, 9 * size, 9 * size) if place == "cpu" else (0, 0, 0, 0)
    assert (
        statistics.copies_to_device,
        statistics.copies_to_host,
        statistics.bytes_to_device,
        statistics.bytes_to_host,
    ) == expected
    if device == "opencl" and COMM_WORLD.size == 1:
        # Elsewhere PETSc counts coefficients, too, and on several ranks ghosts, which go by the
        # host.
        assert tuple(late - early for early, late in zip(moved, transfers())) == expected


def test_transfers_are_seen_in_the_log(device):
    PETSc.Log.begin()
    names = ["PRDPToDevice", "PRDPToHost"]
    before = [PETSc.Log.Event(name).getPerfInfo()["count"] for name in names]
    problem = HeatStep()
    prdp_fem.LinearVariationalSolver(problem.problem, device=device, solver_parameters=CG).solve()
    assert all(
        PETSc.Log.Event(name).getPerfInfo()["count"] > count for name, count in zip(names, before)
    )


def test_the_host_moves_nothing():
    *_, solver = run(HeatStep, HOST, ["kappa"], 2, Iterations(3), solver_parameters=CG)
    statistics = solver.statistics
    assert (
        statistics.copies_to_device
        == statistics.copies_to_host
        == statistics.bytes_to_device
        == statistics.bytes_to_host
        == 0
    )


# Moving

NESTED = {"ksp_type": "preonly", "pc_type": "ksp", "ksp_ksp_type": "gmres", "ksp_pc_type": "jacobi"}


@pytest.mark.parametrize("parameters", [GMRES, NESTED], ids=["gmres", "gmres in a preconditioner"])
@pytest.mark.parametrize("nonlinear", [False, True])
def test_solvers_go_to_a_device_and_back(device, nonlinear, parameters):
    V = FunctionSpace(UnitSquareMesh(6, 6), "CG", 1)
    u = Function(V)
    w = TrialFunction(V)
    v = TestFunction(V)
    f = smooth(V, 1)
    if nonlinear:
        problem = NonlinearVariationalProblem(
            (inner(grad(u), grad(v)) + (u + u**3) * v - f * v) * dx, u
        )
        refinement = (
            FixedRefinement(NewtonSteps(2, Iterations(8))) if parameters is NESTED else None
        )
        solver = prdp_fem.NonlinearVariationalSolver(
            problem,
            refinement=refinement,
            warm_start=False,
            solver_parameters={**parameters, **CONVERGED, **NEWTON},
        )
    else:
        problem = LinearVariationalProblem(
            (inner(grad(w), grad(v)) + w * v + w.dx(0) * v) * dx, f * v * dx, u
        )
        solver = prdp_fem.LinearVariationalSolver(
            problem, refinement=FixedRefinement(Iterations(8)), solver_parameters=parameters
        )
    network = torch.nn.Sequential(SolverLayer(solver, [f]))
    layer = network[0]

    def call():
        x = to_torch(f, copy=True).to(layer.device).requires_grad_()
        y = layer(x)
        y.sum().backward()
        return y.detach().cpu(), x.grad.cpu()

    first = call()
    solver.to(device)
    assert solver.device == device and layer.device.type == "cpu"
    there = call()
    for one, other in zip(there, first):
        agree(one, other)
    for one, other in zip(call(), there):
        # whose products may add up in another order
        assert torch.equal(one, other) or device == "cuda"
        agree(one, other)
    network.to("cpu")
    assert solver.device == device  # to which tensors are copied
    solver.to(HOST)
    assert all(torch.equal(one, other) for one, other in zip(call(), first))
    x = to_torch(f, copy=True).requires_grad_()
    y = layer(x)
    solver.to(device)
    with pytest.raises(
        RuntimeError, match="moved to another device between the forward and the backward pass"
    ):
        y.sum().backward()


def test_networks_follow(device):
    """What torch does to a network, it does to the solver inside."""
    if DEVICES[device].tensors == "cpu":
        pytest.skip(f"torch has no tensors on {device}")
    problem = HeatStep()
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.u0]
    )
    network = torch.nn.Sequential(torch.nn.Linear(problem.V.dim(), problem.V.dim()), layer).double()
    x = torch.rand(2, problem.V.dim(), dtype=torch.float64)
    expected = network(x)
    network.to("cuda")
    assert layer.solver.device == device and layer.device.type == "cuda"
    agree(network(x.cuda()).detach().cpu(), expected.detach())
    with pytest.raises(
        ValueError,
        match="expected a tensor on cuda:0 for 'initial', where the layer is, found one on cpu",
    ):
        layer(x)
    layer.solver.to(HOST)
    with pytest.raises(
        RuntimeError, match="the layer is on cuda:0, but its solver has been moved to 'cpu'"
    ):
        layer(x.cuda())
    layer.solver.to(device)
    network.cpu()
    assert layer.solver.device == HOST and torch.equal(network(x), expected)


# Tensors on a device, without one: PETSc's own types of the host stand in for the device's

STAND_IN = Device("stand-in", "aij", "standard", "mpi", "cuda")


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
@pytest.mark.parametrize("rows", [1, 3])
def test_tensors_are_shared_with_the_device(rows, differentiation):
    problem = HeatStep(boundary=0.3)
    load = Cofunction(problem.V.dual(), name="load")
    problem.problem = LinearVariationalProblem(
        problem.a, problem.L + load, problem.u, bcs=problem.bcs
    )
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(5)),
        solver_parameters=CG,
        differentiation=differentiation,
    )
    system = solver.system
    indices = {system.forms.find(control): control for control in (problem.u0, load)}
    values = {index: samples(problem.u0, rows, index) for index in indices}
    results = []
    for memory in (system.place.memory, DeviceMemory(STAND_IN)):
        if memory is not system.place.memory:
            system.place.move_to(memory)
        tensors = memory.device is not None
        varying = {index: value if tensors else value.numpy() for index, value in values.items()}
        rooms = [torch.zeros(rows, system.size, dtype=torch.float64) for _ in range(3)]
        solutions, *gradients = rooms if tensors else [room.numpy() for room in rooms]
        point = solver.point(without=list(indices))
        records = system.solve(point, solver.setting, solutions, varying)
        cotangents = torch.cos(rooms[0])
        cotangents[:, system.forms.boundary_dofs] = 1e100
        system.solve_adjoint(
            point,
            solver.setting,
            cotangents if tensors else cotangents.numpy(),
            None,
            records,
            Wanted(dict(zip(indices, gradients))),
            varying=varying,
        )
        shared = solver.point(without=list(indices))
        for index, value in values.items():
            shared.values[index] = value[0] if tensors else value[0].numpy()
        one = torch.zeros(1, system.size, dtype=torch.float64)
        system.solve(shared, solver.setting, one if tensors else one.numpy())
        assert torch.equal(one[0], rooms[0][0])
        results.append(rooms)
    for one, other in zip(*results):
        assert other.abs().max() > 0
        agree(one, other, 1e-13)


def test_derivatives_of_assembled_forms_see_tensors_on_the_device():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(5)), solver_parameters=CG
    )
    system = solver.system
    by_kappa, by_u0, by_source = map(system.forms.find, (problem.kappa, problem.u0, problem.source))
    values, source = samples(problem.u0, 2, 3), to_torch(problem.source)
    results = []
    for memory in (system.place.memory, DeviceMemory(STAND_IN)):
        if memory is not system.place.memory:
            system.place.move_to(memory)
        tensors = memory.device is not None
        varying = {by_u0: values if tensors else values.numpy()}
        solutions = torch.zeros(2, system.size, dtype=torch.float64)
        point = solver.point(without=[by_u0, by_source])
        point.values[by_source] = source if tensors else source.numpy()
        records = system.solve(
            point, solver.setting, solutions if tensors else solutions.numpy(), varying
        )
        gradient, cotangents = np.zeros((2, system.size)), torch.cos(solutions)
        boundary = np.zeros((2, system.size))
        solver.statistics.reset()
        system.solve_adjoint(
            point,
            solver.setting,
            cotangents if tensors else cotangents.numpy(),
            solutions if tensors else solutions.numpy(),
            records,
            Wanted({by_kappa: gradient}, boundary),
            varying=varying,
        )
        # Of each row input, solution, multiplier and cotangent; and what all rows share.
        assert solver.statistics.copies_to_host == (2 * 4 + 1 if tensors else 0)
        results.append((torch.from_numpy(gradient), torch.from_numpy(boundary)))
    for one, other in zip(*results):
        assert other.abs().max() > 0
        agree(one, other, 1e-13)


# Choice


def heat_solver(problem=None, **options):
    problem = HeatStep() if problem is None else problem
    parameters = options.pop("solver_parameters", CG)
    return prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=parameters, **options
    )


def test_options_choose_the_device():
    best = usable_devices()[0].name if usable_devices() else HOST
    assert heat_solver().device == HOST
    assert heat_solver(device="auto").device == best
    assert heat_solver(solver_parameters={**CG, "prdp_device": "auto"}).device == best
    assert heat_solver(solver_parameters={**CG, "prdp_device": "auto"}, device=HOST).device == HOST
    PETSc.Options()["prdp_device"] = "auto"
    assert heat_solver().device == best
    PETSc.Options()["heat_prdp_device"] = HOST
    assert heat_solver(options_prefix="heat").device == HOST
    PETSc.Options()["prdp_device"] = "abacus"
    with pytest.raises(
        ValueError,
        match="device must be one of auto, cpu, cuda, hip, kokkos, opencl, found 'abacus'",
    ):
        heat_solver()


@pytest.mark.parametrize(
    "parameters, words",
    [
        (
            {"mat_type": "matfree", "ksp_type": "cg", "pc_type": "none"},
            "its operator is of type python, use mat_type aij",
        ),
        (
            {"ksp_type": "cg", "pc_type": "python", "pc_python_type": "firedrake.AssembledPC"},
            "pc_type python has vectors go through Firedrake",
        ),
        (
            {
                "ksp_type": "cg",
                "pc_type": "composite",
                "pc_composite_pcs": "jacobi,python",
                "sub_1_pc_python_type": "firedrake.AssembledPC",
            },
            "pc_type python has vectors go through Firedrake",
        ),
    ],
)
def test_what_must_be_on_the_host_stays_there(device, parameters, words):
    assert heat_solver(solver_parameters=parameters, device="auto").device == HOST
    solver = heat_solver(solver_parameters=parameters)
    for attempt in (
        lambda: heat_solver(solver_parameters=parameters, device=device),
        lambda: solver.to(device),
    ):
        with pytest.raises(
            ValueError,
            match=f"'solution' cannot be on device '{device}': {words}.*, or device='cpu'",
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    solver.solve()
    assert solver.device == HOST


# Bad input


def absent():
    return next((name for name, device in DEVICES.items() if failure(device) is not None), None)


def test_absent_devices_are_refused_in_one_line():
    name = absent()
    solver = heat_solver()
    u = solver.solve().copy(deepcopy=True)
    for attempt in (
        lambda: heat_solver(device=name),
        lambda: solver.to(name),
        lambda: find_device(name, COMM_WORLD),
        lambda: heat_solver(solver_parameters={**CG, "prdp_device": name}),
    ):
        with pytest.raises(
            ValueError, match=f"device '{name}' is not there: .*use device='cpu'"
        ) as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert np.array_equal(solver.solve().dat.data_ro, u.dat.data_ro)


def test_tensors_on_other_devices_are_refused():
    """Tensors of torch's that have a device but no values."""
    problem = HeatStep()
    layer = SolverLayer(heat_solver(problem), [problem.u0, problem.source])
    x = to_torch(problem.u0, copy=True)
    expected = layer(x, x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(len(x), dtype=torch.float64, device="cuda")
    for tensors in ((there, there), (x, there), (there, x)):
        with pytest.raises(
            ValueError,
            match=(
                r"expected a tensor on the CPU for '\w+', where the layer is, found one on cuda:0: "
                r"move the tensor by .to\('cpu'\), or the layer by .to\('cuda:0'\)"
            ),
        ):
            layer(*tensors)
    with pytest.raises(
        ValueError,
        match=(
            r"expected a tensor on the CPU or a device of PETSc's \(this one has .*\), found one on"
            r" cuda:0: "
            r"call .cpu\(\) first"
        ),
    ):
        from_torch(there)
    with pytest.raises(
        ValueError,
        match="expected a tensor on the CPU, where Firedrake has its values, found one on cuda:0",
    ):
        from_torch(there, problem.V)
    with pytest.raises(
        ValueError, match="a SolverLayer cannot go to meta, where PETSc has no vectors"
    ):
        torch.nn.Sequential(layer).to("meta")
    assert torch.equal(layer(x, x), expected)


def test_tensors_on_a_device_must_be_contiguous(monkeypatch):
    problem = HeatStep()
    layer = SolverLayer(heat_solver(problem), [problem.u0])
    n = len(to_torch(problem.u0))
    # on the CPU
    assert torch.equal(
        layer(torch.ones(n, 2, dtype=torch.float64).T), layer(torch.ones(2, n, dtype=torch.float64))
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.empty(n, 2, dtype=torch.float64, device="cuda").T
    monkeypatch.setattr(SolverLayer, "device", torch.device("cuda", 0))
    monkeypatch.setattr(
        "prdp_fem.torch.layer.tensor_device", lambda device: torch.device("cuda", 0)
    )
    with pytest.raises(
        ValueError,
        match=(
            r"expected a contiguous tensor for 'initial', .* found strides \(1, 2\): call"
            r" .contiguous\(\) f"
        ),
    ):
        layer(there)


def test_vectors_keep_the_memory_that_they_share():
    # of another type, so that what is shared is a copy of it
    vector = from_torch(torch.arange(50_000, dtype=torch.float32))
    others = [torch.full((50_000,), 7.0, dtype=torch.float64) for _ in range(10)]
    assert np.array_equal(vector.array_r, np.arange(50_000)) and others


def test_vectors_on_devices_become_tensors(device):
    with HeatStep().u0.dat.vec_ro as values:
        vector = DeviceMemory(DEVICES[device]).from_host(values)
        tensor = to_torch(vector)
        assert tensor.device.type == DEVICES[device].tensors
        assert np.array_equal(tensor.cpu().numpy(), values.array_r)


def test_every_kind_of_device_is_complete():
    for one, other in itertools.combinations(DEVICES.values(), 2):
        assert not {one.name, one.mat_type, one.vec_type, one.package} & {
            other.name,
            other.mat_type,
            other.vec_type,
            other.package,
        }
