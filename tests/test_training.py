"""The training loop: the same batches for a seed, the gradients of a plain loop, in parallel those
of one rank.
"""

import copy

import numpy as np
import pytest
import torch
from firedrake import *
from problems import CG

from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    LinearVariationalSolver,
    ProgressiveRefinement,
)
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
    return network, lambda samples: ((network(x[samples]) - y[samples]) ** 2).mean()


def trained(network, loss, optimiser=None, **options):
    options = {
        "validate": lambda: 1.0,
        "refinement": FIXED,
        "solvers": [],
        "samples": 10,
        "batch_size": 4,
        "epochs": 3,
        "progress": False,
        **options,
    }
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
    assert [len(batch) for batch in seen] == [4, 4, 2] * 3
    epochs = [sum(seen[3 * epoch : 3 * epoch + 3], []) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    "make_optimiser",
    [
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2, fused=True),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9),
    ],
)
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
    trained(
        network,
        loss,
        optimiser,
        seed=7,
        scheduler=torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5),
    )
    for name, weights in network.state_dict().items():
        assert torch.equal(weights, plain[name])


def test_parameters_of_several_types_and_frozen_ones():
    network, loss = regression()
    network.extra = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
    network.frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    trained(
        network,
        lambda samples: loss(samples) + (network.extra**2).sum(),
        torch.optim.SGD(network.parameters(), lr=0.25),
        epochs=1,
    )
    # halved in each of three steps
    torch.testing.assert_close(network.extra, torch.full((3,), 0.125))
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
    assert modes == [(True, True), (True, True), (True, True), (False, False)] * 7
    assert history.metric == [4.0, 3.0, 3.0, 3.0, 3.0, 3.0, 2.0]
    assert history.level == [0, 0, 0, 1, 1, 1, 1] == [record.level for record in refinement.history]
    assert history.solves == [0] * 7 and np.all(np.diff(history.seconds) > 0)


class Emulator:
    """A network that takes the first of two heat steps, over some ranks."""

    def __init__(self, comm):
        V = FunctionSpace(UnitSquareMesh(4, 3, comm=comm), "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        u0, u = Function(V), Function(V)
        problem = LinearVariationalProblem(
            (w * v + 0.01 * inner(grad(w), grad(v))) * dx, u0 * v * dx, u, bcs=DirichletBC(V, 0, 1)
        )
        self.refinement = FixedRefinement(Iterations(4), comm=comm)
        self.solver = LinearVariationalSolver(
            problem, refinement=self.refinement, solver_parameters=CG
        )
        self.step = SolverLayer(self.solver, [u0])
        self.gathering = Gathering(V)
        self.comm = comm
        n = len(self.gathering)
        torch.manual_seed(2)
        self.network = double(MLP(n, n, width=6))
        waves = np.arange(1, 9)[:, None] * self.gathering.coordinates.sum(axis=1)
        self.u0, self.target = (
            torch.from_numpy(np.sin(waves)),
            self.gathering.scatter(torch.from_numpy(0.5 * np.sin(waves))),
        )

    def squared_errors(self, samples):
        u1 = self.u0[samples] + self.network(self.u0[samples])
        # Part of the loss is between gathered values, as it would be for a network behind the
        # solver.
        u2 = self.step(self.gathering.scatter(u1))
        again = self.gathering.scatter(torch.tanh(self.gathering.gather(u2)))
        return ((u2 - self.target[samples]) ** 2).sum(dim=1) + (
            (again - self.target[samples]) ** 2
        ).sum(dim=1)

    def train(self, optimiser, **options):
        return train(
            self.network,
            lambda samples: self.squared_errors(samples).mean(),
            lambda: self.gathering.total(self.squared_errors(torch.arange(8))).mean().item(),
            optimiser=optimiser,
            refinement=self.refinement,
            solvers=[self.solver],
            samples=8,
            comm=self.comm,
            progress=False,
            **options,
        )


@pytest.mark.parallel([2, 3])
def test_gradients_in_parallel_are_those_of_one_rank():
    gradients = []
    for comm in (COMM_WORLD, COMM_SELF):
        emulator = Emulator(comm)
        emulator.train(
            torch.optim.SGD(emulator.network.parameters(), lr=0.0), batch_size=8, epochs=1
        )
        gradients.append(
            torch.cat([parameter.grad.flatten() for parameter in emulator.network.parameters()])
        )
    assert gradients[1].any()
    assert (gradients[0] - gradients[1]).norm() <= 1e-12 * gradients[1].norm()


@pytest.mark.parallel([2, 3])
def test_training_in_parallel_is_that_of_one_rank():
    together, alone = Emulator(COMM_WORLD), Emulator(COMM_SELF)
    histories = [
        emulator.train(
            torch.optim.SGD(emulator.network.parameters(), lr=1e-2), batch_size=3, epochs=4
        )
        for emulator in (together, alone)
    ]
    np.testing.assert_allclose(histories[0].metric, histories[1].metric, rtol=1e-10)
    for counted in ("solves", "adjoint_solves", "forward_iterations", "adjoint_iterations"):
        assert getattr(histories[0], counted) == getattr(histories[1], counted)
    weights = torch.cat(
        [parameter.detach().flatten() for parameter in together.network.parameters()]
    )
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


@pytest.mark.parametrize(
    ("metric", "message"),
    [(float("nan"), "diverged"), (float("inf"), "diverged"), (-1.0, "must not be negative")],
)
def test_metrics_that_are_none_are_refused(metric, message):
    network, loss = regression()
    with pytest.raises(ValueError, match=message):
        trained(network, loss, validate=lambda: metric)


def test_an_optimiser_of_others_parameters_is_refused():
    network, loss = regression()
    with pytest.raises(ValueError, match="parameters that are not the network's"):
        trained(
            network,
            loss,
            torch.optim.SGD([*network.parameters(), torch.nn.Parameter(torch.ones(1))], lr=0.1),
        )


@pytest.mark.parallel([2, 3])
def test_what_ranks_must_have_alike():
    network, loss = regression()
    for options, message in (
        ({"epochs": 1 + COMM_WORLD.rank}, "epochs, samples, .* must be the same on all ranks"),
        ({"seed": COMM_WORLD.rank}, "epochs, samples, .* must be the same on all ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            trained(network, loss, comm=COMM_WORLD, **options)
    V = FunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    solver = LinearVariationalSolver(
        LinearVariationalProblem(
            TrialFunction(V) * TestFunction(V) * dx, TestFunction(V) * dx, Function(V)
        )
    )
    with pytest.raises(
        ValueError, match="is on [23] ranks, and training on 1: give comm=mesh.comm"
    ):
        trained(network, loss, solvers=[solver])
    history = trained(
        network,
        lambda samples: loss(samples) / COMM_WORLD.size,
        comm=COMM_WORLD,
        validate=lambda: 1.0 + 1e-16 * COMM_WORLD.rank,
    )
    assert COMM_WORLD.allgather(history.metric) == [history.metric] * COMM_WORLD.size


# What a plain loop does with parameters, on any number of ranks


class Phases:
    """A network in which parameters are frozen, shared, left unused by some batches, and join
    later.
    """

    def __init__(self, comm):
        torch.manual_seed(3)
        self.comm, self.batches = comm, 0
        encoder, tied = torch.nn.Linear(3, 4).double(), torch.nn.Linear(4, 4).double()
        self.network = torch.nn.ModuleDict(
            {
                "encoder": encoder.requires_grad_(False),
                "tied": tied,
                "sometimes": torch.nn.Linear(4, 4).double(),
                "head": torch.nn.Linear(4, 2).double(),
            }
        )
        self.network["again"] = tied
        self.x = torch.randn(10, 3, dtype=torch.float64)
        self.y = torch.randn(10, 2, dtype=torch.float64)
        self.optimiser = torch.optim.SGD(
            self.network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1
        )

    def loss(self, samples):
        """This rank's part; parameters change at other times than between epochs, too."""
        self.batches += 1
        if self.batches == 5:
            self.network["tied"].requires_grad_(False)
        if self.batches == 8:
            self.network["tied"].requires_grad_(True)
        state = torch.tanh(
            self.network["again"](
                torch.tanh(self.network["tied"](self.network["encoder"](self.x[samples])))
            )
        )
        if self.batches % 3 == 0 and self.comm.rank == self.comm.size - 1:
            # By one rank only.
            state = state + self.comm.size * torch.tanh(self.network["sometimes"](state))
        if "late" in self.network:
            state = state + self.network["late"](state)
        return ((self.network["head"](state) - self.y[samples]) ** 2).mean() / self.comm.size

    def validate(self):
        epoch = self.batches // 3
        if epoch == 2:
            self.network["encoder"].requires_grad_(True)
        if epoch == 3:
            self.network["late"] = torch.nn.Linear(4, 4).double()
            for parameter in self.network["late"].parameters():
                torch.nn.init.ones_(parameter)
            self.optimiser.add_param_group(
                {"params": list(self.network["late"].parameters()), "lr": 0.05}
            )
        if epoch == 4:
            self.network["encoder"].requires_grad_(False)
        return 1.0

    def train(self):
        train(
            self.network,
            self.loss,
            self.validate,
            optimiser=self.optimiser,
            refinement=FIXED,
            solvers=[],
            samples=10,
            batch_size=4,
            epochs=6,
            seed=7,
            comm=self.comm,
            progress=False,
        )
        return self.state()

    def state(self):
        weights = [parameter.detach() for parameter in self.network.parameters()]
        averages = [
            self.optimiser.state.get(parameter, {}).get("momentum_buffer")
            for parameter in self.network.parameters()
        ]
        return weights, averages


class Parts(Phases):
    """The sum of what ranks compute, by one."""

    class Rank:
        def __init__(self, rank, size):
            self.rank, self.size = rank, size

    def plain(self, ranks):
        order = torch.Generator().manual_seed(7)
        for _ in range(6):
            for samples in torch.randperm(10, generator=order).split(4):
                self.optimiser.zero_grad()
                batches, total = self.batches, 0.0
                for rank in range(ranks):
                    self.batches, self.comm = batches, self.Rank(rank, ranks)
                    total = total + self.loss(samples)
                total.backward()
                self.optimiser.step()
            self.validate()
        return self.state()


@pytest.mark.parallel([1, 2, 3])
def test_what_is_trained_at_a_batch_is_what_a_plain_loop_trains():
    (weights, averages) = Phases(COMM_WORLD).train()
    (expected, expected_averages) = Parts(COMM_SELF).plain(COMM_WORLD.size)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert [one is None for one in averages] == [other is None for other in expected_averages]
    for one, other in zip(averages, expected_averages):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parallel([2, 3])
def test_ranks_that_freeze_other_parameters_are_an_error_on_all():
    phases = Phases(COMM_WORLD)

    def validate():
        if COMM_WORLD.rank == 0:
            phases.network["head"].requires_grad_(False)
        return 1.0

    phases.validate = validate
    with pytest.raises(
        ValueError, match="parameters that are trained must be the same on all ranks"
    ):
        phases.train()


def test_a_group_of_others_parameters_that_is_added_later_is_refused():
    network, loss = regression()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)

    def validate():
        optimiser.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        return 1.0

    with pytest.raises(ValueError, match="parameters that are not the network's"):
        trained(network, loss, optimiser, validate=validate)


# What is not finite


def snapshot(network, optimiser):
    return copy.deepcopy([network.state_dict(), optimiser.state_dict()])


def assert_same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for parts in zip(one, other):
            assert_same(*parts)
    else:
        assert one == other


def wrong_loss(network):
    return np.nan * network.layers[0][0].weight.sum()


def wrong_number(network):
    return torch.tensor(np.inf)


def wrong_gradient(network):
    return torch.sqrt((0 * network.layers[0][0].weight).abs().sum())


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "wrong, words",
    [
        (wrong_loss, "the loss of samples .* is nan"),
        (wrong_number, "the loss of samples .* is inf"),
        (wrong_gradient, "the gradient by 'layers.0.0.weight' .* is not finite"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
        lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, foreach=True),
    ],
)
def test_what_is_not_finite_moves_nothing(wrong, words, make):
    """Of one rank's part, too; whatever the validation makes of it."""
    network, loss = regression()
    optimiser = make(network.parameters())
    before = []
    calls = []

    def spoiled(samples):
        calls.append(samples)
        before[:] = snapshot(network, optimiser)
        part = loss(samples) / COMM_WORLD.size
        return (
            part + wrong(network)
            if len(calls) == 5 and COMM_WORLD.rank == COMM_WORLD.size - 1
            else part
        )

    with pytest.raises(ValueError, match=words):
        trained(network, spoiled, optimiser, comm=COMM_WORLD, validate=lambda: min(1.0, 2.0))
    assert len(calls) == 5
    assert_same(snapshot(network, optimiser), before)


def test_large_gradients_are_finite_ones():
    """Their sum is not."""
    network, _ = regression()
    network.float()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    trained(
        network,
        lambda samples: sum(
            4e37 * (parameter - parameter.detach()).sum() for parameter in network.parameters()
        ),
        torch.optim.SGD(network.parameters(), lr=2.5e-38),
        epochs=1,
        batch_size=10,
    )
    for one, other in zip(network.parameters(), before):
        torch.testing.assert_close(one.detach(), other - 1)


def test_weights_that_the_last_step_has_spoiled_are_an_error():
    network, loss = regression()
    network.float()
    with pytest.raises(
        ValueError, match="'layers.0.0.weight' of the network is not finite after an epoch"
    ):
        trained(
            network,
            lambda samples: 1e30 * sum(parameter.sum() for parameter in network.parameters()),
            torch.optim.SGD(network.parameters(), lr=1e30),
            epochs=1,
            batch_size=10,
        )


# Optimisers and schedulers


@pytest.mark.parametrize("options", [{}, {"max_iter": 3, "history_size": 2}])
def test_a_closure_is_that_of_a_plain_loop(options):
    network, loss = regression()
    start = copy.deepcopy(network.state_dict())
    optimiser = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe", **options)
    order = torch.Generator().manual_seed(7)
    for _ in range(2):
        for samples in torch.randperm(10, generator=order).split(4):

            def closure(samples=samples):
                optimiser.zero_grad()
                value = loss(samples)
                value.backward()
                return value

            optimiser.step(closure)
    plain = copy.deepcopy(network.state_dict())
    network.load_state_dict(start)
    trained(
        network,
        loss,
        torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe", **options),
        seed=7,
        epochs=2,
    )
    assert_same(network.state_dict(), plain)


@pytest.mark.parallel(2)
def test_a_closure_in_an_ensemble_adds_up_parts_to_the_bit():
    """Line searches compare losses, and what LBFGS makes of rounding is large after a few steps:
    only equal bits show equal functions.

    The sum of two numbers does not depend on their order.
    """
    network, loss = regression()
    start = copy.deepcopy(network.state_dict())
    optimiser = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe")
    order = torch.Generator().manual_seed(7)
    parameters = list(network.parameters())
    for _ in range(4):
        for samples in torch.randperm(10, generator=order).split(5):

            def closure(samples=samples):
                value, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
                for mine in samples.tensor_split(2):
                    part = loss(mine)
                    value += len(mine) / 5 * part.item()
                    for gradient, more in zip(
                        gradients, torch.autograd.grad(len(mine) / 5 * part, parameters)
                    ):
                        gradient += more
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                return value

            optimiser.step(closure)
    plain = copy.deepcopy(network.state_dict())
    network.load_state_dict(start)
    trained(
        network,
        loss,
        torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe"),
        seed=7,
        epochs=4,
        batch_size=5,
        ensemble=Ensemble(COMM_WORLD, 1),
    )
    assert_same(network.state_dict(), plain)


def test_what_lbfgs_would_move_though_it_is_frozen_is_refused():
    """Steps go by the gradients of earlier ones."""
    network, loss = regression()
    frozen, before = network.layers[0][0].weight, []

    def validate():
        frozen.requires_grad_(False)
        before.append(frozen.detach().clone())
        return 1.0

    with pytest.raises(ValueError, match="have been frozen, and LBFGS would move them"):
        trained(
            network,
            loss,
            torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe"),
            validate=validate,
        )
    assert len(before) == 1 and torch.equal(frozen, before[0])
    trained(
        network,
        loss,
        torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe"),
        validate=validate,
    )
    assert torch.equal(frozen, before[0])


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as people write it: two evaluations a step, and a loss that is
    a tensor.
    """

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.losses = []

    def step(self, closure):
        closure = torch.enable_grad()(closure)
        self.losses.append(closure().item())
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        before = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad, alpha=0.05)
            self.losses.append(closure().detach().item())
            for parameter, old in zip(parameters, before):
                parameter.copy_(old).sub_(parameter.grad, alpha=0.1)


def test_what_a_closure_returns_is_a_tensor():
    network, loss = regression()
    start = copy.deepcopy(network.state_dict())
    optimiser, order = Sharpness(network.parameters()), torch.Generator().manual_seed(7)
    for samples in torch.randperm(10, generator=order).split(4):

        def closure(samples=samples):
            optimiser.zero_grad()
            value = loss(samples)
            value.backward()
            return value

        optimiser.step(closure)
    plain = copy.deepcopy(network.state_dict())
    network.load_state_dict(start)
    inside = Sharpness(network.parameters())
    trained(network, loss, inside, seed=7, epochs=1)
    assert_same(network.state_dict(), plain)
    assert inside.losses == optimiser.losses


def test_an_error_among_the_evaluations_of_a_step_leaves_all_as_it_was():
    network, loss = regression()
    optimiser = torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe")
    before = []
    calls = []

    def spoiled(samples):
        if not calls or not torch.equal(calls[-1], samples):
            before[:] = snapshot(network, optimiser)
        calls.append(samples)
        return loss(samples) * (np.nan if len(calls) == 40 else 1.0)

    with pytest.raises(ValueError, match="is nan"):
        trained(network, spoiled, optimiser, epochs=20)
    assert torch.equal(calls[-1], calls[-2])  # in the middle of a step
    assert_same(snapshot(network, optimiser), before)


def test_schedulers_are_told_the_metric():
    network, loss = regression()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, patience=0, factor=0.5)
    metrics = [3.0, 2.0, 2.5, 1.0, 1.5]
    trained(
        network, loss, optimiser, scheduler=scheduler, validate=iter(metrics).__next__, epochs=5
    )
    other = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    expected = torch.optim.lr_scheduler.ReduceLROnPlateau(other, patience=0, factor=0.5)
    for metric in metrics:
        expected.step(metric)
    assert optimiser.param_groups[0]["lr"] == other.param_groups[0]["lr"] < 0.1


KINDS = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    "make",
    [
        lambda optimiser: KINDS.StepLR(optimiser, 2),
        lambda optimiser: KINDS.CosineAnnealingLR(optimiser, 5),
        lambda optimiser: KINDS.OneCycleLR(optimiser, 0.1, total_steps=3),
        lambda optimiser: KINDS.ChainedScheduler(
            [KINDS.StepLR(optimiser, 2), KINDS.ExponentialLR(optimiser, 0.9)]
        ),
        lambda optimiser: KINDS.SequentialLR(
            optimiser, [KINDS.ConstantLR(optimiser), KINDS.ExponentialLR(optimiser, 0.9)], [2]
        ),
    ],
    ids=["StepLR", "CosineAnnealingLR", "OneCycleLR", "ChainedScheduler", "SequentialLR"],
)
def test_schedulers_are_stepped_after_each_epoch(make):
    network, loss = regression()
    mine, other = (torch.optim.SGD(network.parameters(), lr=0.1) for _ in range(2))
    trained(network, loss, mine, scheduler=make(mine))
    scheduler = make(other)
    for _ in range(3):
        other.step()
        scheduler.step()
    assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]


# What is refused before any work


def heat_solver(refinement):
    V = FunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    f = Function(V)
    w = TrialFunction(V)
    v = TestFunction(V)
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx, f * v * dx, Function(V, name="u")
    )
    solver = LinearVariationalSolver(problem, refinement=refinement, solver_parameters=CG)
    return solver, SolverLayer(solver, [f])


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"network": 3}, TypeError, "network must be a Module"),
        ({"loss": 1.0}, TypeError, "loss must be callable"),
        ({"validate": 1.0}, TypeError, "validate must be callable"),
        ({"optimiser": "Adam"}, TypeError, "optimiser must be a Optimizer"),
        ({"refinement": None}, TypeError, "refinement must be a Refinement"),
        ({"solvers": None}, TypeError, "solvers must be a list"),
        ({"solvers": [3]}, TypeError, "solvers must be of prdp_fem's"),
        ({"epochs": 2.5}, (TypeError, ValueError), "epochs must be an integer"),
        ({"epochs": True}, (TypeError, ValueError), "epochs must be an integer"),
        ({"scheduler": 3}, TypeError, "scheduler must be one of"),
        ({"comm": 3}, TypeError, "comm must be a communicator"),
        ({"ensemble": COMM_SELF}, TypeError, "ensemble must be a firedrake.Ensemble"),
    ],
)
def test_arguments_of_other_kinds_are_refused(options, error, words):
    network, loss = regression()
    optimiser, calls = torch.optim.SGD(network.parameters(), lr=0.1), []
    arguments = {
        "network": network,
        "loss": lambda samples: calls.append(0) or loss(samples),
        "validate": lambda: 1.0,
        "optimiser": optimiser,
        "refinement": FIXED,
        "solvers": [],
        "samples": 10,
        "batch_size": 4,
        "epochs": 1,
        "progress": False,
        **options,
    }
    before = snapshot(network, optimiser)
    with pytest.raises(error, match=words):
        train(
            arguments.pop("network"), arguments.pop("loss"), arguments.pop("validate"), **arguments
        )
    assert not calls
    assert_same(snapshot(network, optimiser), before)


@pytest.mark.parametrize(
    "returned, error, words",
    [
        (1.0, TypeError, "loss must return a tensor with one real number, found 1.0"),
        (None, TypeError, "loss must return"),
        (torch.ones(3), TypeError, r"found a tensor of shape \(3,\)"),
        (torch.tensor(1), TypeError, "torch.int64"),
        (torch.tensor(1j), TypeError, "torch.complex64"),
        (torch.tensor(1.0), ValueError, "the loss depends on no parameter that is trained"),
    ],
)
def test_losses_that_are_none_are_refused(returned, error, words):
    network, _ = regression()
    with pytest.raises(error, match=words):
        trained(network, lambda samples: returned)


@pytest.mark.parametrize("metric", [None, "1.0", "abc", 1j, torch.ones(2), [1.0]])
def test_metrics_that_are_no_numbers_are_refused(metric):
    network, loss = regression()
    refinement = ProgressiveRefinement(IterationLadder())
    with (
        pytest.raises(ValueError, match="a metric must be a number"),
        pytest.warns(UserWarning, match="none of the solvers it knows"),
    ):
        trained(network, loss, validate=lambda: metric, refinement=refinement)
    assert not refinement.history


def test_refinements_that_solvers_do_not_follow():
    network, loss = regression()
    given, other = (ProgressiveRefinement(IterationLadder(stop=5)) for _ in range(2))
    (following, layer), (led, _), (free, _) = (
        heat_solver(refinement) for refinement in (given, other, None)
    )
    for solvers, error, words in [
        ([led], ValueError, "the solver for 'u' follows another refinement"),
        ([following, led], ValueError, "the solver for 'u' follows another refinement"),
        ([free], ValueError, "no solver follows the refinement that train"),
        ([layer], TypeError, "found a prdp_fem.torch.layer.SolverLayer: give its solver"),
        (following, TypeError, "solvers must be a list"),
    ]:
        with pytest.raises(error, match=words):
            trained(network, loss, refinement=given, solvers=solvers)
    assert not given.history
    with pytest.warns(UserWarning, match="a refinement that none of the solvers it knows follows"):
        trained(network, loss, refinement=given, epochs=1)
    with pytest.warns(UserWarning, match="the solver for 'u' follows no refinement"):
        trained(network, loss, refinement=given, solvers=[following, free], epochs=1)


def test_optimisers_and_schedulers_that_cannot_do_their_work_are_refused():
    network, loss = regression()
    optimiser, tiny = (torch.optim.SGD(network.parameters(), lr=rate) for rate in (0.1, 1e-30))
    kinds = torch.optim.lr_scheduler
    for options, words in [
        (
            {"optimiser": torch.optim.LBFGS(network.parameters())},
            'compares no losses.*line_search_fn="strong_wolfe"',
        ),
        (
            {"optimiser": optimiser, "scheduler": kinds.StepLR(tiny, 1)},
            "scheduler is that of another optimiser",
        ),
        (
            {"optimiser": tiny, "scheduler": kinds.ReduceLROnPlateau(tiny)},
            "would never reduce learning rates of 1e-30",
        ),
        (
            {"optimiser": optimiser, "scheduler": kinds.OneCycleLR(optimiser, 0.1, total_steps=2)},
            "OneCycleLR was made for 2 steps",
        ),
    ]:
        with pytest.raises(ValueError, match=words):
            trained(network, loss, **options)


@pytest.mark.parallel(2)
@pytest.mark.parametrize("tracks", [True, False])
def test_statistics_of_a_members_part_of_a_batch_are_refused(tracks):
    """But not those of a whole batch, which ranks that share the unknowns see, nor those that are
    kept.
    """

    class Kept(torch.nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    def network_with(layer):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(3, 2), layer)
        x = torch.linspace(-1, 1, 30).view(10, 3)
        return (
            network,
            lambda samples: calls.append(samples) or network(x[samples]).square().mean(),
            torch.optim.Adam(network.parameters()),
        )

    calls = []
    with pytest.raises(
        ValueError,
        match="'1' of the network takes statistics of a batch, of which each of 2 members",
    ):
        trained(
            *network_with(torch.nn.BatchNorm1d(2, track_running_stats=tracks)),
            ensemble=Ensemble(COMM_WORLD, 1),
        )
    assert not calls
    trained(
        *network_with(torch.nn.BatchNorm1d(2, track_running_stats=tracks)),
        ensemble=Ensemble(COMM_WORLD, 2),
    )
    if tracks:
        trained(*network_with(Kept(2)), ensemble=Ensemble(COMM_WORLD, 1))


@pytest.mark.parallel(2)
def test_a_closure_on_ranks_that_share_unknowns_is_refused():
    network, loss = regression()
    with pytest.raises(
        ValueError, match="LBFGS compares values of the loss, of which each of 2 ranks has a part"
    ):
        trained(
            network,
            loss,
            torch.optim.LBFGS(network.parameters(), line_search_fn="strong_wolfe"),
            comm=COMM_WORLD,
        )


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_in_half_precision(dtype):
    network, loss = regression()
    network.to(dtype)
    expected = copy.deepcopy(network)
    x = torch.linspace(-1, 1, 30).view(10, 3).to(dtype)
    trained(
        network,
        lambda samples: network(x[samples]).float().square().mean() / COMM_WORLD.size,
        torch.optim.SGD(network.parameters(), lr=0.0),
        epochs=1,
        batch_size=10,
        comm=COMM_WORLD,
    )
    expected(x).float().square().mean().backward()
    for one, other in zip(network.parameters(), expected.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.05, atol=0.02)


def test_what_is_assessed_at_checkpoints_is_noted_and_not_counted():
    network, loss = regression()
    refinement = FixedRefinement(Iterations(3))
    solver, u = heat_solver(refinement)
    seen = []

    def in_use():
        seen.append((network.training, torch.is_grad_enabled()))
        solver.solve()
        return 0.5

    history = trained(
        network,
        loss,
        refinement=refinement,
        solvers=[solver],
        epochs=7,
        assess={"in_use": in_use, "converged": lambda: 0.25},
        assess_every=3,
    )
    assert history.in_use == [[3, 0.5], [6, 0.5], [7, 0.5]]
    assert history.converged == [[3, 0.25], [6, 0.25], [7, 0.25]]
    assert solver.statistics.solves == 3 and history.solves == [0] * 7
    assert seen == [(False, False)] * 3
    by_itself = trained(*regression(), epochs=61, assess={"in_use": lambda: 1.0})
    assert [epoch for epoch, _ in by_itself.in_use] == [*range(3, 61, 3), 61]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"assess": [print]}, TypeError, "a dictionary of functions by name"),
        ({"assess": {"speed": print}}, ValueError, "assess can have in_use and converged"),
        ({"assess": {"in_use": 3}}, TypeError, "must be callable, found 3"),
        ({"assess": {"in_use": lambda: -1.0}}, ValueError, "-1"),
        ({"assess_every": 0}, ValueError, "assess_every must be at least 1"),
    ],
)
def test_assessments_of_other_kinds_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        trained(*regression(), **options)
