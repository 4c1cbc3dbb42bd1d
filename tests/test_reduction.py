"""Gradients added up over ranks, against sums by hand."""

import warnings

import numpy as np
import pytest
import torch
from firedrake import COMM_WORLD

from prdp_fem.torch import GradientReduction, total
from prdp_fem.training.reduction import check_replicas

pytestmark = pytest.mark.parallel([1, 2, 3])
torch.set_num_threads(1)


def make_network(seed=0):
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    network.register_parameter("single", torch.nn.Parameter(torch.ones(5)))
    network.register_parameter("frozen", torch.nn.Parameter(torch.ones(2), requires_grad=False))
    return network


def part_of_loss(network, rank):
    x = torch.full((2, 3), 1.0 + rank, dtype=torch.float64)
    return (network(x) ** 2).sum() * (rank + 1) + (network.single**2).sum()


def double_gradient(parameter):
    parameter.grad.mul_(2)


def expected_gradients():
    network = make_network()
    sum(part_of_loss(network, rank) for rank in range(COMM_WORLD.size)).backward()
    return [parameter.grad for parameter in network.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("bucket_size", [1, 50, 2**22])
def test_gradients_are_sums_over_ranks(bucket_size):
    network = make_network()
    with GradientReduction(network, COMM_WORLD, bucket_size=bucket_size) as gradients:
        assert len(gradients.buckets) == {1: 5, 50: 3, 2**22: 2}[bucket_size]
        for _ in range(3):
            gradients.zero()
            part_of_loss(network, COMM_WORLD.rank).backward()
            gradients.finish()
            for parameter, expected in zip(
                (p for p in network.parameters() if p.requires_grad), expected_gradients()
            ):
                torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=0)
    assert network.frozen.grad is None
    # No trace is left at the network: a backward pass afterwards is local.
    network.zero_grad()
    part_of_loss(network, 0).backward()


def test_a_reduction_starts_while_the_backward_pass_goes_on():
    network, started = make_network(), []

    class Noted(GradientReduction):
        def _start(self):
            # the last one that the pass comes to
            started.append(network[0].weight.grad.abs().max().item())
            super()._start()

    with Noted(network, COMM_WORLD, bucket_size=1) as gradients:
        gradients.zero()
        part_of_loss(network, COMM_WORLD.rank).backward()
        assert len(started) == (len(gradients.buckets) if COMM_WORLD.size > 1 else 0)
        gradients.finish()
    if COMM_WORLD.size > 1:
        assert started[0] == 0 and started[-1] > 0


def test_ranks_whose_pass_does_not_come_to_all_parameters():
    """Even to none: without samples, a member of an ensemble has no part of the loss."""
    network = make_network()
    with GradientReduction(network, COMM_WORLD, bucket_size=1) as gradients:
        gradients.zero()
        if COMM_WORLD.rank == 0:
            (network.single**2).sum().backward()
        gradients.finish()
        torch.testing.assert_close(network.single.grad, torch.full((5,), 2.0))
        # as in a plain loop, so that an optimiser leaves it alone
        assert network[0].weight.grad is None


def test_gradients_that_would_be_wrong_are_an_error():
    network = make_network()
    with GradientReduction(network, COMM_WORLD) as gradients:
        optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
        optimiser.zero_grad()  # before zero(), which puts them back
        gradients.zero()
        part_of_loss(network, COMM_WORLD.rank).backward()
        gradients.finish()
        torch.testing.assert_close(
            network[0].weight.grad, expected_gradients()[1], rtol=1e-12, atol=0
        )
        gradients.zero()
        optimiser.zero_grad()
        part_of_loss(network, COMM_WORLD.rank).backward()
        with pytest.raises(RuntimeError, match="gradients have been replaced since zero"):
            gradients.finish()
        gradients.zero()
        part_of_loss(network, COMM_WORLD.rank).backward()
        if COMM_WORLD.size > 1:
            with pytest.raises(RuntimeError, match="a second backward pass"):
                part_of_loss(network, COMM_WORLD.rank).backward()
            # Which has added to them already.
            with pytest.raises(RuntimeError, match="changed while they were added up"):
                gradients.finish()


@pytest.mark.filterwarnings("ignore:'0.weight' of the network has hooks")
def test_which_hooks_see_the_whole_gradient():
    """Those of the optimiser's steps; what users are told to use where those of parameters see a
    part.
    """
    network, seen = make_network(), {}
    weight = network[0].weight
    optimiser = torch.optim.SGD(network.parameters(), lr=0.0)

    def note(name, gradient):
        seen[name] = gradient.detach().clone()

    weight.register_hook(lambda gradient: note("parameter", gradient))
    weight.register_post_accumulate_grad_hook(lambda _: note("accumulated", weight.grad))
    optimiser.register_step_pre_hook(lambda *_: note("before a step", weight.grad))
    optimiser.register_step_post_hook(lambda *_: note("after a step", weight.grad))
    with GradientReduction(network, COMM_WORLD, bucket_size=1) as gradients:
        gradients.zero()
        part_of_loss(network, COMM_WORLD.rank).backward()
        gradients.finish()
        optimiser.step()
    alone = make_network()
    part_of_loss(alone, COMM_WORLD.rank).backward()
    part, whole = alone[0].weight.grad, expected_gradients()[1]
    assert COMM_WORLD.size == 1 or not torch.allclose(part, whole, rtol=0.1)
    for name, expected in (
        ("parameter", part),
        ("accumulated", part),
        ("before a step", whole),
        ("after a step", whole),
    ):
        torch.testing.assert_close(seen[name], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_warning_tells_of_hooks_of_parameters(kind):
    network = make_network()
    hook = getattr(network[2].bias, kind)(lambda _: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with GradientReduction(network, COMM_WORLD):
            pass
        hook.remove()
        # Nor are those of the reduction itself hooks of a user's.
        with GradientReduction(network, COMM_WORLD):
            pass
    found = [str(warning.message) for warning in caught]
    expected = COMM_WORLD.size > 1 and COMM_WORLD.rank == 0
    assert len(found) == expected and all(
        "'2.bias' of the network has hooks" in one for one in found
    )


@pytest.mark.parametrize("bucket_size", [1, 2**22])
def test_changes_that_would_be_lost_are_an_error(bucket_size):
    """Of a gradient whose reduction has started, by a hook that comes behind the reduction's."""
    network = make_network()
    with GradientReduction(network, COMM_WORLD, bucket_size=bucket_size) as gradients:
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(double_gradient)
        gradients.zero()
        part_of_loss(network, COMM_WORLD.rank).backward()
        if COMM_WORLD.size > 1:
            with pytest.raises(RuntimeError, match="changed while they were added up"):
                gradients.finish()
        else:
            gradients.finish()
            torch.testing.assert_close(network.single.grad, torch.full((5,), 4.0))


def test_networks_that_differ_are_an_error_on_all_ranks():
    odd = COMM_WORLD.rank == COMM_WORLD.size - 1 > 0
    network = make_network()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1)
    check_replicas(network, optimiser, COMM_WORLD)
    if COMM_WORLD.size == 1:
        return
    with pytest.raises(
        ValueError, match="weights must be the same on all ranks.*torch.manual_seed"
    ):
        check_replicas(make_network(seed=int(odd)), optimiser, COMM_WORLD)
    with pytest.raises(ValueError, match="the optimiser's states must be the same on all ranks"):
        check_replicas(
            network, torch.optim.Adam(network.parameters(), lr=0.2 if odd else 0.1), COMM_WORLD
        )
    normalised = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    normalised[0].running_mean += int(odd)
    with pytest.raises(
        ValueError, match="the network's buffers must be the same on all ranks.*LayerNorm"
    ):
        check_replicas(normalised, optimiser, COMM_WORLD)
    part_of_loss(network, int(odd)).backward()
    optimiser.step()
    with pytest.raises(ValueError, match="the optimiser's states|weights"):
        check_replicas(network, optimiser, COMM_WORLD)
    with pytest.raises(
        ValueError, match="shapes of the network's parameters must be the same on all ranks"
    ):
        GradientReduction(torch.nn.Linear(2, 3 if odd else 2), COMM_WORLD)


def test_without_parameters_there_is_nothing_to_train():
    with pytest.raises(ValueError, match="no parameters to train"):
        GradientReduction(torch.nn.Tanh(), COMM_WORLD)


def test_totals():
    part = torch.arange(3.0).requires_grad_() * (COMM_WORLD.rank + 1)
    summed = total(part, COMM_WORLD)
    assert not summed.requires_grad
    np.testing.assert_allclose(summed, np.arange(3) * sum(range(1, COMM_WORLD.size + 1)))
    if COMM_WORLD.size > 1:
        with pytest.raises(ValueError, match="must be the same on all ranks"):
            total(torch.ones(2 + COMM_WORLD.rank), COMM_WORLD)


def test_the_same_gradients_as_those_of_torch_parallel(tmp_path):
    """DistributedDataParallel takes means over processes where this takes sums; solver layers have
    no parameters that it could see.
    """
    folder = COMM_WORLD.bcast(str(tmp_path))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=COMM_WORLD.rank,
        world_size=COMM_WORLD.size,
    )
    try:
        network = make_network()
        network.single.requires_grad_(False)
        parallel = torch.nn.parallel.DistributedDataParallel(network)
        x = torch.full((2, 3), 1.0 + COMM_WORLD.rank, dtype=torch.float64)
        ((parallel(x) ** 2).sum() * COMM_WORLD.size).backward()
        theirs = [
            parameter.grad.clone() for parameter in network.parameters() if parameter.requires_grad
        ]
    finally:
        torch.distributed.destroy_process_group()
    network = make_network()
    network.single.requires_grad_(False)
    with GradientReduction(network, COMM_WORLD) as gradients:
        (network(x) ** 2).sum().backward()
        gradients.finish()
        for parameter, other in zip((p for p in network.parameters() if p.requires_grad), theirs):
            torch.testing.assert_close(parameter.grad, other, rtol=1e-12, atol=0)
