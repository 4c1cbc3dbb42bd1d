"""What users bring from loops of torch's: in train() as in a plain loop, or refused before work."""

import copy
import inspect

import pytest
import torch
from firedrake import COMM_WORLD, Ensemble
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prdp_fem import FixedRefinement, Iterations
from prdp_fem.torch import train

torch.set_num_threads(1)

X, Y = (
    torch.randn(10, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    for size in (3, 2)
)
SEED, BATCH = 7, 5  # two members have three samples of a batch, and two
KINDS = torch.optim.lr_scheduler


def dense_network():
    """Of matrices only, since Muon takes no vectors."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(3, 4, bias=False), torch.nn.Tanh(), torch.nn.Linear(4, 2, bias=False)
    ).double()


def sparse_network():
    torch.manual_seed(0)
    return torch.nn.Embedding(10, 2, sparse=True).double()


def squares(network, inputs=X):
    return lambda samples: ((network(inputs[samples]) - Y[samples]) ** 2).mean()


def in_a_plain_loop(network, loss, optimiser, scheduler=None):
    order = torch.Generator().manual_seed(SEED)
    for _ in range(3):
        for samples in torch.randperm(10, generator=order).split(BATCH):

            def closure(samples=samples):
                optimiser.zero_grad()
                value = loss(samples)
                value.backward()
                return value

            if isinstance(optimiser, torch.optim.LBFGS):
                optimiser.step(closure)
            else:
                closure()
                optimiser.step()
        if isinstance(scheduler, KINDS.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()


def in_train(network, loss, optimiser, scheduler=None, **options):
    train(
        network,
        loss,
        lambda: 1.0,
        optimiser=optimiser,
        scheduler=scheduler,
        solvers=[],
        refinement=FixedRefinement(Iterations(1)),
        samples=10,
        batch_size=BATCH,
        epochs=3,
        seed=SEED,
        progress=False,
        **options,
    )


def on_members(*arguments):
    in_train(*arguments, ensemble=Ensemble(COMM_WORLD, 1))


def weights(network):
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


def assert_refused(how, network, loss, *arguments, words=None):
    """Before any work, and with weights as they were."""
    before, calls = copy.deepcopy(network.state_dict()), []
    with pytest.raises(ValueError, match=words):
        how(network, lambda samples: calls.append(samples) or loss(samples), *arguments)
    assert not calls
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def compare(make, how, same):
    """Train the network by the loss and steps that ``make`` makes, here and in a plain loop."""
    network, loss, *steps = make()
    try:
        in_a_plain_loop(network, loss, *steps)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError):
        assert_refused(how, *make())
        return
    expected = weights(network)
    network, loss, *steps = make()
    how(network, loss, *steps)
    same(weights(network), expected)


def same_bits(found, expected):
    assert torch.equal(found, expected)


def same_but_for_rounding(found, expected):
    assert (found - expected).norm() <= 1e-9 * expected.norm()


WHERE = [
    pytest.param(in_train, same_bits, id="alone"),
    pytest.param(on_members, same_but_for_rounding, id="members", marks=pytest.mark.parallel(2)),
]


# Optimisers: all that torch has


def is_optimiser(kind):
    return (
        isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    )


OPTIMISERS = [
    kind for kind in map(torch.optim.__dict__.get, torch.optim.__all__) if is_optimiser(kind)
]
# Without a line search LBFGS is refused. With many iterations it makes much of rounding.
WANTED = {torch.optim.LBFGS: {"line_search_fn": "strong_wolfe", "max_iter": 3}}
FLAGS = ["foreach", "fused", "maximize", "capturable", "differentiable", "amsgrad"]


def optimiser_maker(kind, flags=()):
    def make():
        network = dense_network()
        options = {**WANTED.get(kind, {}), **dict.fromkeys(flags, True)}
        return network, squares(network), kind(network.parameters(), **options)

    return make


@pytest.mark.parametrize("how, same", WHERE)
@pytest.mark.parametrize("kind", OPTIMISERS)
def test_each_optimiser(kind, how, same):
    compare(optimiser_maker(kind), how, same)


@pytest.mark.parametrize(
    "kind, flag",
    [
        (kind, flag)
        for kind in OPTIMISERS
        for flag in FLAGS
        if flag in inspect.signature(kind).parameters
    ],
)
def test_each_optimiser_with_each_of_its_flags(kind, flag):
    compare(optimiser_maker(kind, [flag]), in_train, same_bits)


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_for_other_purposes_are_refused(flag):
    refused = optimiser_maker(torch.optim.Adam, [flag])()
    assert_refused(in_train, *refused, words=f"Adam with {flag}=True makes steps")


@pytest.mark.parametrize("how, same", WHERE)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam])
def test_sparse_gradients(kind, how, same):
    """On several ranks they are added up dense."""

    def make():
        network = sparse_network()
        return network, squares(network, torch.arange(10)), kind(network.parameters(), lr=0.1)

    if kind is torch.optim.SparseAdam and how is on_members:
        assert_refused(how, *make(), words="added up over ranks are dense")
    else:
        compare(make, how, same)


@pytest.mark.parametrize(
    "kind, option",
    [
        (kind, option)
        for kind in OPTIMISERS
        for option in (None, "weight_decay", "fused")
        if option is None or option in inspect.signature(kind).parameters
    ],
)
def test_each_optimiser_with_sparse_gradients(kind, option):
    """Of most torch makes no step."""
    options = {**WANTED.get(kind, {}), **({} if option is None else {option: 1})}

    def make():
        network = sparse_network()
        return network, squares(network, torch.arange(10)), kind(network.parameters(), **options)

    compare(make, in_train, same_bits)


def test_dense_steps_for_sparse_gradients_are_refused():
    network = sparse_network()
    refused = network, squares(network), torch.optim.Adam(network.parameters())
    assert_refused(
        in_train,
        *refused,
        words="Adam takes dense gradients only, .* by an Embedding .* SparseAdam",
    )


def test_sparse_steps_for_dense_gradients_are_refused():
    refused = optimiser_maker(torch.optim.SparseAdam)()
    assert_refused(in_train, *refused, words="by the weight of a Linear is dense")


# Schedulers: all that torch has

ARGUMENTS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "StepLR": {"step_size": 1},
    "MultiStepLR": {"milestones": [1]},
    "ExponentialLR": {"gamma": 0.5},
    "CosineAnnealingLR": {"T_max": 3},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 2},
    "ReduceLROnPlateau": {"patience": 0},
    "SWALR": {"swa_lr": 0.01, "anneal_epochs": 2},
}
OF_SCHEDULERS = {
    "ChainedScheduler": lambda one: KINDS.ChainedScheduler([one, KINDS.StepLR(one.optimizer, 1)]),
    "SequentialLR": lambda one: KINDS.SequentialLR(
        one.optimizer, [one, KINDS.StepLR(one.optimizer, 1)], [2]
    ),
    "second": lambda one: KINDS.SequentialLR(
        one.optimizer, [KINDS.ConstantLR(one.optimizer), one], [2]
    ),
    "alone": lambda one: one,
}
SCHEDULERS = [*(name for name in KINDS.__all__ if name != "LRScheduler"), "SWALR"]


def make_scheduler(name, optimiser):
    if name in OF_SCHEDULERS:
        return OF_SCHEDULERS[name](KINDS.ExponentialLR(optimiser, 0.9))
    kind = getattr(KINDS, name, None) or getattr(torch.optim.swa_utils, name)
    return kind(optimiser, **ARGUMENTS.get(name, {}))


def scheduler_maker(name, place):
    def make():
        network = dense_network()
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
        scheduler = OF_SCHEDULERS[place](make_scheduler(name, optimiser))
        return network, squares(network), optimiser, scheduler

    return make


@pytest.mark.parametrize(
    "name, place",
    [
        (name, place)
        for name in SCHEDULERS
        for place in OF_SCHEDULERS
        if name != "ReduceLROnPlateau" or place == "alone"
    ],
)  # which torch takes alone only
def test_each_scheduler(name, place):
    compare(scheduler_maker(name, place), in_train, same_bits)


@pytest.mark.parallel(2)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_each_scheduler_on_members(name):
    compare(scheduler_maker(name, "alone"), on_members, same_but_for_rounding)


@pytest.mark.parametrize(
    "name, place, words",
    [
        ("OneCycleLR", "alone", "made for 2 steps, .* make it with total_steps=3"),
        ("OneCycleLR", "ChainedScheduler", "made for 2 steps, .* make it with total_steps=3"),
        (
            "ChainedScheduler",
            "second",
            "come to a ChainedScheduler after 2 epochs, which torch cannot",
        ),
        ("SequentialLR", "second", "come to a SequentialLR after 2 epochs, which torch cannot"),
    ],
)
def test_schedulers_that_end_before_the_epochs_are_refused(name, place, words):
    assert_refused(in_train, *scheduler_maker(name, place)(), words=words)


@pytest.mark.parametrize("milestone, total, enough", [(1, 1, False), (1, 2, True), (2, 1, True)])
@pytest.mark.parametrize("done", [0, 1])
def test_a_cycle_is_as_long_as_its_turn(milestone, total, enough, done):
    """After a milestone, where it starts without a step, and when some epochs have been before."""

    def make():
        network = dense_network()
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.5)
        cycle = KINDS.OneCycleLR(optimiser, 0.1, total_steps=total)
        turns = [KINDS.ConstantLR(optimiser), cycle]
        scheduler = KINDS.SequentialLR(optimiser, turns, [milestone + done])
        for _ in range(done):
            optimiser.step()
            scheduler.step()
        return network, squares(network), optimiser, scheduler

    if not enough:
        assert_refused(in_train, *make(), words="OneCycleLR was made for 1 steps")
    compare(make, in_train, same_bits)


# What is put around the network, the loss and the steps


def of_loss(change):
    """A loss that is another one of the network's outputs."""

    def make():
        network = dense_network()
        return network, change(network), torch.optim.Adam(network.parameters(), lr=0.01)

    return make


def of_network(change):
    def make():
        network = change(dense_network())
        return network, squares(network), torch.optim.Adam(network.parameters(), lr=0.01)

    return make


def of_steps(change):
    """Hooks of an optimiser."""

    def make():
        network = dense_network()
        optimiser = torch.optim.Adam(network.parameters(), lr=0.01)
        change(network, optimiser)
        return network, squares(network), optimiser

    return make


def clipped_by_norm(network, optimiser):
    def clip(*_):
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.1)

    optimiser.register_step_pre_hook(clip)


def clipped_by_value(network, optimiser):
    optimiser.register_step_pre_hook(
        lambda *_: torch.nn.utils.clip_grad_value_(network.parameters(), 0.05)
    )


def averaged(network, optimiser):
    """The weights are those of an average, which the loss sees."""
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimiser.register_step_post_hook(lambda *_: average.update_parameters(network))

    def keep_close(*_):
        for mine, other in zip(network.parameters(), average.parameters()):
            mine.grad.add_((mine - other).detach())

    optimiser.register_step_pre_hook(keep_close)


def several_groups(network, optimiser):
    """One of them with weight decay on what is trained, and on what is frozen."""
    network.register_parameter("frozen", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    first, last = optimiser.param_groups.pop()["params"]
    optimiser.add_param_group({"params": [first, network.frozen], "weight_decay": 0.1})
    optimiser.add_param_group({"params": [last], "lr": 0.1})


def stepped_each_batch(network, optimiser):
    schedule = KINDS.OneCycleLR(optimiser, 0.1, total_steps=6)
    optimiser.register_step_post_hook(lambda *_: schedule.step())


def two_terms(network):
    def loss(samples):
        output = network(X[samples])
        return ((output - Y[samples]) ** 2).mean() + 0.1 * output.abs().mean()

    return loss


def with_penalty(network):
    def loss(samples):
        inputs = X[samples].clone().requires_grad_()
        output = network(inputs)
        (slope,) = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        return ((output - Y[samples]) ** 2).mean() + 0.1 * (slope**2).mean()

    return loss


def used_by_one_sample(network):
    """So that there is a gradient on one member only, or on none."""
    network.extra = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    plain = squares(network)

    def loss(samples):
        has = (samples == 3).sum()
        return plain(samples) + (has / len(samples) * (network.extra**2).sum() if has else 0.0)

    return loss


def recomputed(network):
    return squares(
        lambda inputs: torch.utils.checkpoint.checkpoint(network, inputs, use_reentrant=False)
    )


def tied(network):
    network.append(torch.nn.Linear(2, 4, bias=False).double())
    network.append(torch.nn.Linear(4, 2, bias=False).double())
    network[4].weight = network[2].weight
    return network


def compiled(network):
    return torch.compile(network, backend="aot_eager")


def reparametrised(name):
    def change(network):
        getattr(torch.nn.utils.parametrizations, name)(network[0])
        return network

    return change


WAYS = {
    "clipped by norm": of_steps(clipped_by_norm),
    "clipped by value": of_steps(clipped_by_value),
    "averaged": of_steps(averaged),
    "several groups": of_steps(several_groups),
    "stepped each batch": of_steps(stepped_each_batch),
    "two terms": of_loss(two_terms),
    "penalty": of_loss(with_penalty),
    "used by one sample": of_loss(used_by_one_sample),
    "recomputed": of_loss(recomputed),
    "tied": of_network(tied),
    "compiled": of_network(compiled),
    "weight_norm": of_network(reparametrised("weight_norm")),
    "spectral_norm": of_network(reparametrised("spectral_norm")),
    "orthogonal": of_network(reparametrised("orthogonal")),
}


@pytest.mark.parametrize("how, same", WHERE)
@pytest.mark.parametrize("way", WAYS)
def test_each_way(way, how, same):
    network, loss, optimiser = WAYS[way]()
    in_a_plain_loop(network, loss, optimiser)
    expected = weights(network)
    network, loss, optimiser = WAYS[way]()
    how(network, loss, optimiser)
    same(weights(network), expected)
