"""The training loop: the same batches for a seed, the gradients of a plain loop, in parallel those of one rank."""
import copy

import numpy as np
import pytest
import torch
from firedrake import *
from problems import CG

from prdp_fem import FixedRefinement, IterationLadder, Iterations, LinearVariationalSolver, ProgressiveRefinement
from prdp_fem.torch import MLP, Gathering, SolverLayer, train

torch.set_num_threads(1)

FIXED = FixedRefinement(Iterations(1))


def double(network):
    return network.double()


def regression(seed=0):
    """A network, and its loss on some of ten samples."""
    torch.manual_seed(seed)
    network = double(MLP(3, 2, width=4))
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    return network, lambda samples: ((network(x[samples]) - y[samples])**2).mean()


def trained(network, loss, optimiser=None, **options):
    options = {"validate": lambda: 1.0, "refinement": FIXED, "solvers": [], "samples": 10, "batch_size": 4, "epochs": 3, "progress": False,
               **options}
    optimiser = optimiser or torch.optim.Adam(network.parameters(), lr=1e-2)
    return train(network, loss, optimiser=optimiser, **options)


def batches_of(seed, noise=0):
    network, loss = regression()
    seen = []

    def recorded(samples):
        seen.append(samples.tolist())
        torch.rand(noise)  # other users of random numbers
        return loss(samples)

    torch.manual_seed(noise)
    trained(network, recorded, seed=seed)
    return seen


def test_the_same_batches_for_the_same_seed():
    seen = batches_of(5)
    assert seen == batches_of(5, noise=3) != batches_of(6)
    assert [len(batch) for batch in seen] == [4, 4, 2]*3
    epochs = [sum(seen[3*epoch:3*epoch + 3], []) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("make_optimiser", [lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
                                            lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9)])
def test_a_plain_loop_gives_the_same_weights_to_the_bit(make_optimiser):
    network, loss = regression()
    ours = copy.deepcopy(network.state_dict())
    optimiser = make_optimiser(network.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    order = torch.Generator().manual_seed(7)
    for _ in range(3):
        for samples in torch.randperm(10, generator=order).split(4):
            optimiser.zero_grad()
            loss(samples).backward()
            optimiser.step()
        scheduler.step()
    plain = copy.deepcopy(network.state_dict())

    network.load_state_dict(ours)
    optimiser = make_optimiser(network.parameters())
    trained(network, loss, optimiser, seed=7, scheduler=torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5))
    for name, weights in network.state_dict().items():
        assert torch.equal(weights, plain[name])


def test_parameters_of_several_types_and_frozen_ones():
    network, loss = regression()
    network.extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
    network.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    trained(network, lambda samples: loss(samples) + (network.extra**2).sum(), torch.optim.SGD(network.parameters(), lr=0.25), epochs=1)
    torch.testing.assert_close(network.extra, torch.full((3,), 0.125))  # halved in each of three steps
    assert network.frozen.grad is None and torch.equal(network.frozen, torch.ones(2))


def test_the_refinement_is_told_and_the_history_kept():
    network, loss = regression()
    network = torch.nn.Sequential(network, torch.nn.Identity())
    metrics = iter([4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0])
    modes = []

    def validate():
        modes.append((network.training, torch.is_grad_enabled()))
        return next(metrics)

    def recorded(samples):
        modes.append((network.training, torch.is_grad_enabled()))
        return loss(samples)

    refinement = ProgressiveRefinement(IterationLadder(), error_window=2, ema_window=1)
    history = trained(network, recorded, validate=validate, refinement=refinement, epochs=7)
    assert modes == [(True, True), (True, True), (True, True), (False, False)]*7
    assert history.metric == [4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0]
    assert history.level == [0, 0, 0, 1, 1, 1, 1] == [record.level for record in refinement.history]
    assert history.solves == [0]*7 and np.all(np.diff(history.seconds) > 0)


class Emulator:
    """A network that takes the first of two heat steps, over some ranks."""

    def __init__(self, comm):
        V = FunctionSpace(UnitSquareMesh(4, 3, comm=comm), "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        u0, u = Function(V), Function(V)
        problem = LinearVariationalProblem((w*v + 0.01*inner(grad(w), grad(v)))*dx, u0*v*dx, u, bcs=DirichletBC(V, 0, 1))
        self.refinement = FixedRefinement(Iterations(4), comm=comm)
        self.solver = LinearVariationalSolver(problem, refinement=self.refinement, solver_parameters=CG)
        self.step, self.gathering, self.comm = SolverLayer(self.solver, [u0]), Gathering(V), comm
        n = len(self.gathering)
        torch.manual_seed(2)
        self.network = double(MLP(n, n, width=6))
        waves = np.arange(1, 9)[:, None]*self.gathering.coordinates.sum(axis=1)
        self.u0, self.target = torch.from_numpy(np.sin(waves)), self.gathering.scatter(torch.from_numpy(0.5*np.sin(waves)))

    def squared_errors(self, samples):
        u1 = self.u0[samples] + self.network(self.u0[samples])
        # Part of the loss is between gathered values, as it would be for a network behind the solver.
        u2 = self.step(self.gathering.scatter(u1))
        again = self.gathering.scatter(torch.tanh(self.gathering.gather(u2)))
        return ((u2 - self.target[samples])**2).sum(dim=1) + ((again - self.target[samples])**2).sum(dim=1)

    def train(self, optimiser, **options):
        return train(self.network, lambda samples: self.squared_errors(samples).mean(),
                     lambda: self.gathering.total(self.squared_errors(torch.arange(8))).mean().item(), optimiser=optimiser,
                     refinement=self.refinement, solvers=[self.solver], samples=8, comm=self.comm, progress=False, **options)


@pytest.mark.parallel([2, 3])
def test_gradients_in_parallel_are_those_of_one_rank():
    gradients = []
    for comm in (COMM_WORLD, COMM_SELF):
        emulator = Emulator(comm)
        emulator.train(torch.optim.SGD(emulator.network.parameters(), lr=0.0), batch_size=8, epochs=1)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in emulator.network.parameters()]))
    assert gradients[1].any()
    assert (gradients[0] - gradients[1]).norm() <= 1e-12*gradients[1].norm()


@pytest.mark.parallel([2, 3])
def test_training_in_parallel_is_that_of_one_rank():
    together, alone = Emulator(COMM_WORLD), Emulator(COMM_SELF)
    histories = [emulator.train(torch.optim.SGD(emulator.network.parameters(), lr=1e-2), batch_size=3, epochs=4)
                 for emulator in (together, alone)]
    np.testing.assert_allclose(histories[0].metric, histories[1].metric, rtol=1e-10)
    for counted in ("solves", "adjoint_solves", "forward_iterations", "adjoint_iterations"):
        assert getattr(histories[0], counted) == getattr(histories[1], counted)
    weights = torch.cat([parameter.detach().flatten() for parameter in together.network.parameters()])
    everywhere = COMM_WORLD.allgather(weights.numpy())
    assert all(np.array_equal(everywhere[0], other) for other in everywhere)


@pytest.mark.parametrize("name", ["samples", "batch_size", "epochs"])
def test_counts_below_one_are_refused(name):
    network, loss = regression()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        trained(network, loss, **{name: 0})


def test_a_network_without_parameters_is_refused():
    network, loss = regression()
    with pytest.raises(ValueError, match="no parameters to train"):
        trained(torch.nn.Identity(), loss, torch.optim.Adam(network.parameters()))


@pytest.mark.parametrize(("metric", "message"), [(float("nan"), "diverged"), (float("inf"), "diverged"), (-1.0, "must not be negative")])
def test_metrics_that_are_none_are_refused(metric, message):
    network, loss = regression()
    with pytest.raises(ValueError, match=message):
        trained(network, loss, validate=lambda: metric)


def test_an_optimiser_of_others_parameters_is_refused():
    network, loss = regression()
    with pytest.raises(ValueError, match="parameters that are not the network's"):
        trained(network, loss, torch.optim.SGD([*network.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1))


@pytest.mark.parallel([2, 3])
def test_what_ranks_must_have_alike():
    network, loss = regression()
    for options, message in (({"epochs": 1 + COMM_WORLD.rank}, "epochs, samples, .* must be the same on all ranks"),
                             ({"seed": COMM_WORLD.rank}, "epochs, samples, .* must be the same on all ranks")):
        with pytest.raises(ValueError, match=message):
            trained(network, loss, comm=COMM_WORLD, **options)
    V = FunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    solver = LinearVariationalSolver(LinearVariationalProblem(TrialFunction(V)*TestFunction(V)*dx, TestFunction(V)*dx, Function(V)))
    with pytest.raises(ValueError, match="is on [23] ranks, and training on 1: give comm=mesh.comm"):
        trained(network, loss, solvers=[solver])
    history = trained(network, lambda samples: loss(samples)/COMM_WORLD.size, comm=COMM_WORLD, validate=lambda: 1.0 + 1e-16*COMM_WORLD.rank)
    assert COMM_WORLD.allgather(history.metric) == [history.metric]*COMM_WORLD.size
