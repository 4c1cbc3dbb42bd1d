"""Layers in torch's ways: what calls hold, threads, compilers, checkpoints and transforms; against
calls one by one.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import samples
from firedrake import *
from firedrake.adjoint import (
    Control,
    ReducedFunctional,
    continue_annotation,
    pause_annotation,
    set_working_tape,
)
from problems import CG, GMRES, HeatStep, smooth
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.func import grad as gradient_of
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, NewtonSteps, ScheduledRefinement
from prdp_fem.ranks.threads import one_thread
from prdp_fem.torch import SolverLayer, from_torch, to_torch

torch.set_num_threads(1)
pytestmark = pytest.mark.parallel([1, 2])


class Diffusion:
    """A layer by source, diffusivity and boundary values, with coefficients that are no controls in
    all of its parts.
    """

    def __init__(self, differentiation="implicit", refinement=None):
        mesh = UnitSquareMesh(4, 4)
        V = FunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        u = Function(V, name="u")
        f = smooth(V, 1, "f")
        kappa = Function(V, name="kappa").assign(1.5)
        g = smooth(V, 2, "g")
        self.density = Constant(1.0)
        self.shift = smooth(V, 3)
        self.weight = smooth(V, 4)
        self.fixed = Function(V).assign(2.0)
        problem = LinearVariationalProblem(
            (self.density * self.fixed * w * v + kappa * inner(grad(w), grad(v))) * dx,
            f * v * dx,
            u,
            bcs=[DirichletBC(V, g + self.shift, 1), DirichletBC(V, 0.5, 2)],
        )
        self.refinement = refinement or FixedRefinement(Iterations(6))
        self.solver = prdp_fem.LinearVariationalSolver(
            problem,
            refinement=self.refinement,
            differentiation=differentiation,
            solver_parameters=CG,
        )
        self.layer = SolverLayer(
            self.solver, [f, kappa, g], [None, self.weight * u**2 * kappa * dx]
        )
        self.size = self.solver.system.size

    def tensors(self, *batch):
        return [
            samples(control, batch, seed).requires_grad_()
            for seed, control in enumerate(self.layer.controls)
        ]

    def loss(self, *tensors):
        y, energy = self.layer(*tensors)
        return (y**3).sum(-1) + energy / COMM_WORLD.size

    def gradients(self, *tensors):
        tensors = [tensor.detach().clone().requires_grad_() for tensor in tensors]
        return torch.autograd.grad(self.loss(*tensors).sum(), tensors)


def reaction(differentiation):
    """A layer of a nonlinear solver."""
    V = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
    u = Function(V, name="u")
    v = TestFunction(V)
    f = smooth(V, 1, "f")
    F = ((1 + u**2) * inner(grad(u), grad(v)) + u * v - f * v) * dx
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(F, u),
        refinement=FixedRefinement(NewtonSteps(3, Iterations(4))),
        differentiation=differentiation,
        solver_parameters={**GMRES, "snes_linesearch_type": "basic"},
    )
    return SolverLayer(solver, [f])


def assert_equal(found, expected, **bounds):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **(bounds or {"rtol": 0, "atol": 0}))


# What calls hold


def held_by(thing, seen):
    """Arrays and tensors that a node of torch's graph holds itself; torch cannot release them."""
    if isinstance(thing, (np.ndarray, torch.Tensor)):
        yield thing
    elif id(thing) not in seen:
        seen.add(id(thing))
        parts = (
            list(thing.values())
            if isinstance(thing, dict)
            else thing
            if isinstance(thing, (list, tuple))
            else []
        )
        if type(thing).__name__ in ("Point", "Solved", "Trajectory"):
            parts = list(vars(thing).values())
        for part in parts:
            yield from held_by(part, seen)


def nodes(node):
    yield node
    for other, _ in node.next_functions:
        if other is not None:
            yield from nodes(other)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Diffusion().layer,
        lambda: Diffusion("unrolled").layer,
        lambda: reaction("implicit"),
        lambda: reaction("unrolled"),
    ],
    ids=["linear", "unrolled linear", "nonlinear", "unrolled nonlinear"],
)
def test_all_fields_of_a_call_are_saved_where_torch_can_take_them_away(make):
    layer = make()
    tensors = [samples(control, (2,)).requires_grad_() for control in layer.controls]

    def total(outputs):
        return sum(
            part.square().sum() for part in (outputs if isinstance(outputs, tuple) else (outputs,))
        )

    expected = torch.autograd.grad(total(layer(*tensors)), tensors)
    store = []

    def put_away(tensor):
        store.append(tensor.clone())
        return len(store) - 1

    with torch.autograd.graph.saved_tensors_hooks(put_away, lambda place: store[place]):
        loss = total(layer(*tensors))
    for node in nodes(loss.grad_fn):
        held = held_by(vars(node) if hasattr(node, "__dict__") else {}, set())
        assert not [array for array in held if np.prod(array.shape) >= layer.solver.system.size > 1]
    assert store
    assert_equal(torch.autograd.grad(loss, tensors), expected)


def saved_by(call):
    """The tensors that are saved for the backward pass of a call, and its outcome."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        outcome = call()
    return saved, outcome


def test_calls_share_coefficients_until_they_change():
    diffusion = Diffusion()
    f, kappa, g = diffusion.tensors(2)
    (first, _), (second, _) = (saved_by(lambda: diffusion.layer(f, kappa, g)) for _ in range(2))
    assert len(first) == len(second)
    shared = {one.data_ptr() for one in first} & {other.data_ptr() for other in second}
    own = {tensor.data_ptr() for tensor in (f, kappa, g)}
    # Density and fixed field, shift and weight, and three numbers that tell calls apart.
    assert len(shared - own) >= (7 if diffusion.size else 0)
    diffusion.fixed.dat.data_wo[:] = 3.0
    third, _ = saved_by(lambda: diffusion.layer(f, kappa, g))
    assert (
        len({one.data_ptr() for one in first} & {other.data_ptr() for other in third})
        <= len(shared) - 2
    )


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_calls_are_differentiated_as_they_were_made_whatever_changes(differentiation):
    diffusion = Diffusion(differentiation)
    tensors = diffusion.tensors()
    # On shared memory: of what is written to it, nobody is told.
    views = [to_torch(field) for field in (diffusion.fixed, diffusion.shift, diffusion.weight)]

    def put(density, entry):
        diffusion.density.assign(density)
        for view in views:
            view[0] = entry

    settings = [(1.0, 1.0), (2.0, 1.0), (2.0, 0.5), (1.0, 1.0)]
    expected = []
    for setting in settings:
        put(*setting)
        expected.append(diffusion.gradients(*tensors))
    pending = []
    for setting in settings:
        put(*setting)
        pending.append(diffusion.loss(*tensors))
    put(7.0, 3.0)
    for loss, gradients in zip(reversed(pending), reversed(expected)):
        assert_equal(torch.autograd.grad(loss, tensors), gradients)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_checkpoints(differentiation):
    diffusion = Diffusion(differentiation)
    f, kappa, g = diffusion.tensors(2)

    def rollout(checkpointed):
        def block(y):
            return diffusion.layer(diffusion.layer(y, kappa, g)[0], kappa, g)[0]

        y = f
        for _ in range(2):
            y = checkpoint(block, y, use_reentrant=False) if checkpointed else block(y)
        return torch.autograd.grad(y.square().sum(), (f, kappa, g))

    assert_equal(rollout(True), rollout(False))


def test_a_checkpoint_that_computes_something_else_again_is_an_error():
    diffusion = Diffusion(refinement=ScheduledRefinement(IterationLadder(2, 3), {1: 1}))
    tensors = diffusion.tensors()
    for change in (
        lambda: diffusion.refinement.step(1.0),
        lambda: diffusion.density.assign(2.0),
        lambda: diffusion.fixed.assign(3.0),
    ):
        loss = checkpoint(diffusion.loss, *tensors, use_reentrant=False)
        change()
        if COMM_WORLD.size == 1:
            with pytest.raises(
                RuntimeError,
                match="its setting, or coefficients .* are others than in the forward pass",
            ):
                loss.backward()


def test_a_call_in_inference_mode_leaves_nothing_that_later_ones_could_not_save():
    diffusion = Diffusion()
    tensors = diffusion.tensors(2)
    with torch.inference_mode():
        layer = SolverLayer(
            diffusion.solver,
            diffusion.layer.controls,
            [diffusion.solver.problem.u, diffusion.layer.output[1]],
        )
        values = layer(*tensors)
    assert_equal(layer(*tensors), values)
    layer(*tensors)[1].sum().backward()


def test_gradients_of_an_empty_batch_are_zero():
    diffusion = Diffusion()
    f, kappa, g = diffusion.tensors(0)
    shared = samples(diffusion.layer.controls[1]).requires_grad_()
    _, energy = diffusion.layer(f, shared, g)
    energy.sum().backward()
    assert shared.grad.shape == shared.shape and not shared.grad.any() and f.grad.shape == f.shape


# Threads


@pytest.mark.parallel(1)
def test_two_threads_have_the_numbers_of_one():
    diffusion = Diffusion("unrolled")
    requests = [[tensor.detach() + place for tensor in diffusion.tensors(3)] for place in range(4)]
    expected = [diffusion.gradients(*request) for request in requests]
    with ThreadPoolExecutor(2) as pool:
        for place, found in enumerate(
            pool.map(lambda place: diffusion.gradients(*requests[place % 4]), range(40))
        ):
            assert_equal(found, expected[place % 4])


@pytest.mark.parallel(1)
def test_a_thread_that_solves_and_one_that_replays_beside_a_layer():
    problem = HeatStep(8)
    solver = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG)
    layer = SolverLayer(solver, [problem.u0])
    continue_annotation()
    with set_working_tape():
        solver.solve()
        functional = ReducedFunctional(assemble(problem.u**2 * dx), Control(problem.u0))
    pause_annotation()
    tensor, control = samples(problem.u0), samples(problem.u0).numpy()

    def replay():
        value = functional(from_torch(torch.from_numpy(control), problem.u0.function_space()))
        return [torch.tensor(value), to_torch(functional.derivative(), copy=True)]

    requests = [lambda: [layer(tensor)], lambda: [to_torch(solver.solve(), copy=True)], replay]
    expected = [request() for request in requests]
    with ThreadPoolExecutor(3) as pool:
        threads = [
            pool.submit(lambda request=request: [request() for _ in range(50)])
            for request in requests
        ]
        for thread, one in zip(threads, expected):
            for found in thread.result():
                assert_equal(found, one)


def test_all_calls_of_one_other_thread():
    diffusion = Diffusion()
    tensors = diffusion.tensors(2)
    expected = diffusion.gradients(*tensors)
    with ThreadPoolExecutor(1) as pool:
        assert_equal(pool.submit(diffusion.gradients, *tensors).result(), expected)


@pytest.mark.parallel([2, 3])
def test_on_several_ranks_a_second_thread_is_refused():
    problem = HeatStep(4)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.u0]
    )
    tensor = samples(problem.u0).requires_grad_()
    y = layer(tensor)
    entered, leave = threading.Event(), threading.Event()

    def stay():
        with one_thread(COMM_WORLD):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    try:
        for call in (lambda: layer(tensor), lambda: y.sum().backward()):
            with pytest.raises(
                RuntimeError,
                match="two threads have come to solvers at the same time, on several ranks",
            ):
                call()
    finally:
        leave.set()
        thread.join()
    layer(tensor).sum().backward()


# Compilers


@pytest.mark.parallel(1)
def test_compiled_networks_are_those_that_are_not():
    torch.manual_seed(0)
    diffusion = Diffusion(refinement=ScheduledRefinement(IterationLadder(2, 3), {1: 1, 2: 2}))
    n = diffusion.size
    before, behind = torch.nn.Linear(n, n).double(), torch.nn.Linear(n, 2).double()

    def network(f, kappa, g):
        y, energy = diffusion.layer(torch.tanh(before(f)), kappa, g)
        return behind(y).sum(-1) + energy

    compiled = torch.compile(network, backend="eager")
    for level, density in enumerate((1.0, 2.0, 1.0)):
        diffusion.density.assign(density)
        for batch in ((4,), (2,), ()):
            tensors = diffusion.tensors(*batch)
            found, expected = (one(*tensors) for one in (compiled, network))
            assert_equal([found], [expected])
            assert_equal(
                torch.autograd.grad(found.sum(), tensors),
                torch.autograd.grad(expected.sum(), tensors),
            )
            with torch.no_grad():
                assert_equal([compiled(*tensors)], [expected.detach()])
        diffusion.refinement.step(1.0)
        assert diffusion.refinement.level == min(level + 1, 2)
    torch.compiler.reset()
    with pytest.raises(
        Exception,
        match="a SolverLayer is not compiled, and splits the graph: leave fullgraph=True away",
    ):
        torch.compile(network, backend="eager", fullgraph=True)(*diffusion.tensors())


@pytest.mark.parallel(1)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_graphs_that_would_do_without_the_solver_are_refused():
    problem = HeatStep(4)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.u0]
    )
    tensor = samples(problem.u0, (2,))
    for record in (torch.jit.trace, torch.export.export):
        with pytest.raises(
            RuntimeError, match="a SolverLayer cannot be part of a graph that is traced or exported"
        ):
            record(layer, (tensor,))
    for record in (make_fx(layer), make_fx(gradient_of(lambda values: layer(values).sum()))):
        with pytest.raises(
            RuntimeError, match="a SolverLayer cannot be part of a graph that is traced or exported"
        ):
            record(tensor)
    with pytest.raises(RuntimeError, match="nor be called with fake tensors"), FakeTensorMode():
        layer(torch.zeros(tensor.shape))


# Transforms


@pytest.mark.parallel(2)
def test_ranks_with_other_batches_under_vmap_are_told():
    problem = HeatStep(4)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.u0]
    )
    tensor = samples(problem.u0, (2 + COMM_WORLD.rank,))
    with pytest.raises(
        ValueError,
        match="batch axes, under transforms of torch.func, must be the same on all ranks",
    ):
        vmap(layer)(tensor)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_transforms_are_calls_one_by_one(differentiation):
    diffusion = Diffusion(differentiation)
    f, kappa, g = (tensor.detach() for tensor in diffusion.tensors(4))
    bounds = {"rtol": 1e-12, "atol": 1e-14}
    assert_equal([vmap(diffusion.loss)(f, kappa, g)], [diffusion.loss(f, kappa, g)])
    assert_equal(
        [vmap(diffusion.loss, (1, None, 0))(f.T, kappa[0], g)], [diffusion.loss(f, kappa[0], g)]
    )
    # Fields hidden in the middle of a batch.
    assert_equal(
        [vmap(lambda k: diffusion.loss(f, k, g))(kappa[:3])],
        [torch.stack([diffusion.loss(f, k, g) for k in kappa[:3]])],
    )
    by_sample = [diffusion.gradients(f[i], kappa[0], g[i]) for i in range(4)]
    found = vmap(gradient_of(diffusion.loss, (0, 1, 2)), (0, None, 0))(f, kappa[0], g)
    assert_equal(found, [torch.stack(parts) for parts in zip(*by_sample)], **bounds)
    shared = vmap(gradient_of(lambda k: diffusion.loss(f, k, g).sum()))(kappa[:3])
    assert_equal(
        [shared], [torch.stack([diffusion.gradients(f, k, g)[1] for k in kappa[:3]])], **bounds
    )
    value, pull = vjp(diffusion.loss, f, kappa, g)
    assert_equal(pull(torch.ones_like(value)), diffusion.gradients(f, kappa, g), **bounds)


@pytest.mark.parallel(1)
def test_jacobians_are_those_row_by_row():
    diffusion = Diffusion()
    f, kappa, g = (tensor.detach() for tensor in diffusion.tensors(2))

    def solution(kappa):
        return diffusion.layer(f[0], kappa, g[0])[0]

    expected = torch.autograd.functional.jacobian(solution, kappa[0])
    bounds = {"rtol": 1e-12, "atol": 1e-14}
    assert_equal([jacrev(solution)(kappa[0])], [expected], **bounds)
    assert_equal(
        [vmap(jacrev(solution))(kappa)[1]],
        [torch.autograd.functional.jacobian(solution, kappa[1])],
        **bounds,
    )
    k = kappa[0].clone().requires_grad_()
    y = solution(k)
    rows = vmap(lambda cotangent: torch.autograd.grad(y, k, cotangent, retain_graph=True)[0])(
        torch.eye(len(y)).double()
    )
    assert_equal([rows], [expected], **bounds)


def test_gradients_by_sample_of_a_network_with_a_layer():
    problem = HeatStep(4)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Iterations(4)), solver_parameters=CG
    )
    n = solver.system.size
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(n, n), torch.nn.Tanh(), SolverLayer(solver, [problem.u0])
    )
    x, parameters = samples(problem.u0, (3,)).float(), dict(network.named_parameters())

    def loss(parameters, x):
        return functional_call(network, parameters, (x,)).square().sum()

    found = vmap(gradient_of(loss), (None, 0))(parameters, x)
    for row, sample in enumerate(x):
        expected = torch.autograd.grad(network(sample).square().sum(), list(parameters.values()))
        assert_equal([found[name][row] for name in parameters], expected, rtol=1e-5, atol=1e-6)


def test_transforms_that_are_not_available_say_so():
    diffusion = Diffusion()
    f, kappa, g = (tensor.detach() for tensor in diffusion.tensors())

    def loss(f):
        return diffusion.loss(f, kappa, g)

    forwards = "forward-mode derivatives through a SolverLayer are not available: use backward"
    twice = (
        "second derivatives through a SolverLayer are not available: call backward without"
        " create_graph=True"
    )
    batches = (
        "a SolverLayer takes no batches of cotangents by is_grads_batched=True or vectorize=True"
    )

    def by_dual_numbers():
        with torch.autograd.forward_ad.dual_level():
            loss(torch.autograd.forward_ad.make_dual(f, f))

    for call, words in [
        (lambda: jvp(loss, (f,), (f,)), forwards),
        (lambda: jacfwd(loss)(f), forwards),
        (lambda: hessian(loss)(f), forwards),
        (by_dual_numbers, forwards),
        (lambda: jacrev(jacrev(loss))(f), twice),
        (lambda: torch.autograd.functional.hvp(loss, f, f), twice),
        (
            lambda: torch.autograd.functional.jacobian(
                lambda f: diffusion.layer(f, kappa, g)[0], f, vectorize=True
            ),
            batches,
        ),
    ]:
        if COMM_WORLD.size > 1 and call is by_dual_numbers:
            continue
        with pytest.raises((RuntimeError, NotImplementedError), match=words):
            call()
    assert_equal(diffusion.gradients(f, kappa, g), diffusion.gradients(f, kappa, g))


def test_a_transform_whose_call_has_changed_in_between_is_an_error():
    diffusion = Diffusion()
    f, kappa, g = (tensor.detach() for tensor in diffusion.tensors())
    value, pull = vjp(diffusion.loss, f, kappa, g)
    diffusion.density.assign(2.0)
    with pytest.raises(
        RuntimeError, match="its setting, or coefficients .* are others than in the forward pass"
    ):
        pull(torch.ones_like(value))


# Tensors


def test_tensors_of_other_types_are_told_what_to_call():
    problem = HeatStep(4)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG), [problem.u0]
    )
    x = samples(problem.u0, (2,))
    for tensor, words in [
        (x.bfloat16(), r"found torch.bfloat16: call \.float\(\) or \.double\(\) first"),
        (x.half(), r"found torch.float16: call \.float\(\)"),
        (x.long(), r"found torch.int64: call \.float\(\)"),
        (x > 0, r"found torch.bool: call \.float\(\)"),
        (torch.complex(x, x), "found torch.complex128: give real numbers"),
        (x.to_sparse(), r"expected a dense tensor .*, found torch.sparse_coo: call \.to_dense\(\)"),
        (x.to_sparse_csr(), r"expected a dense tensor .*, found torch.sparse_csr"),
    ]:
        with pytest.raises(TypeError, match=words):
            layer(tensor)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"call \.float\(\)"),
    ):
        layer(torch.nn.Linear(x.shape[-1], x.shape[-1]).double().float()(x.float()))
    assert layer.solver.statistics.solves == 0


@pytest.mark.parallel(1)
def test_another_default_device_does_not_matter_to_a_layer():
    diffusion = Diffusion()
    tensors = diffusion.tensors(2)
    expected = diffusion.gradients(*tensors)
    torch.set_default_device("meta")
    try:
        other = Diffusion()
        assert_equal(other.gradients(*tensors), expected)
        assert_equal(diffusion.gradients(*tensors), expected)
    finally:
        torch.set_default_device(None)


def test_data_parallel_is_refused():
    with pytest.raises(RuntimeError, match="a SolverLayer cannot be replicated by DataParallel"):
        Diffusion().layer._replicate_for_data_parallel()


@pytest.mark.parallel(1)
@pytest.mark.parametrize("controls", [None, 3, "u0", {"u0": 1}])
def test_controls_that_are_no_sequence_are_refused(controls):
    problem = HeatStep(4)
    solver = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=CG)
    with pytest.raises(TypeError, match="controls must be a sequence"):
        SolverLayer(solver, controls)
    with pytest.raises(ValueError, match="output must name at least one thing"):
        SolverLayer(solver, [problem.u0], [])
