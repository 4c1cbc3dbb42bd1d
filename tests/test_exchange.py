"""Values that ranks have from each other, against NumPy on what all of them have."""

import copy
import pickle

import numpy as np
import pytest
import torch
from firedrake import COMM_WORLD

from prdp_fem.torch import Exchange
from prdp_fem.training import exchange as exchange_module

pytestmark = pytest.mark.parallel([1, 2, 3])
torch.set_num_threads(1)

# How many nodes ranks own; the last has none.
SIZES = {1: [5], 2: [5, 0], 3: [4, 3, 0]}


def make(seed=0):
    """An exchange, in which ranks want nodes several times, and some that nobody wants."""
    sizes = SIZES[COMM_WORLD.size]
    wanted = np.random.default_rng(seed + COMM_WORLD.rank).integers(
        0, sum(sizes) - 1, 3 + 2 * COMM_WORLD.rank
    )
    return Exchange(COMM_WORLD, sizes[COMM_WORLD.rank], wanted)


def random(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1 + COMM_WORLD.rank)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def everywhere(tensor, axis=0):
    return np.concatenate(COMM_WORLD.allgather(tensor.detach().numpy()), axis=axis)


@pytest.mark.parametrize(("before", "after"), [((), ()), ((), (2, 3)), ((4,), (2,)), ((0,), ())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_those_of_the_wanted_nodes(before, after, dtype):
    exchange, axis = make(), len(before)
    values = random(*before, exchange.owned, *after, dtype=dtype)
    received = exchange(values, axis)
    assert received.dtype is dtype
    np.testing.assert_array_equal(received, everywhere(values, axis).take(exchange.wanted, axis))


def test_the_adjoint_by_inner_products():
    exchange = make()
    values = random(exchange.owned, 3).requires_grad_()
    received = exchange(values)
    cotangent = random(*received.shape)
    (gradient,) = torch.autograd.grad(received, values, cotangent)
    left = COMM_WORLD.allreduce((received.detach() * cotangent).sum().item())
    right = COMM_WORLD.allreduce((values.detach() * gradient).sum().item())
    assert left == pytest.approx(right, rel=1e-13)


def test_the_adjoint_adds_up_what_ranks_have_made_of_a_node():
    exchange = make()
    values = random(exchange.owned).requires_grad_()
    cotangent = random(len(exchange.wanted))
    (gradient,) = torch.autograd.grad(exchange(values), values, cotangent)
    expected = np.zeros(sum(SIZES[COMM_WORLD.size]))
    np.add.at(
        expected, np.concatenate(COMM_WORLD.allgather(exchange.wanted)), everywhere(cotangent)
    )
    np.testing.assert_allclose(everywhere(gradient), expected, rtol=1e-14, atol=1e-15)


def test_second_derivatives():
    """Of the sum of the cubes of all values that ranks have."""
    exchange = make()
    values = random(exchange.owned).requires_grad_()
    (first,) = torch.autograd.grad((exchange(values) ** 3).sum(), values, create_graph=True)
    direction = random(exchange.owned)
    (second,) = torch.autograd.grad((first * direction).sum(), values)
    counts = np.bincount(
        np.concatenate(COMM_WORLD.allgather(exchange.wanted)), minlength=sum(SIZES[COMM_WORLD.size])
    )
    mine = slice(sum(SIZES[COMM_WORLD.size][: COMM_WORLD.rank]), None)
    torch.testing.assert_close(
        second, 6 * torch.from_numpy(counts[mine][: exchange.owned]) * values.detach() * direction
    )


def test_the_same_plan_serves_copies_and_other_widths():
    exchange = make()
    assert copy.deepcopy(exchange) is exchange
    for width in (1, 4, 1):
        values = random(exchange.owned, width)
        np.testing.assert_array_equal(exchange(values), everywhere(values)[exchange.wanted])


def test_vectors_of_too_many_entries_are_made_in_pieces(monkeypatch):
    exchange = make()
    monkeypatch.setattr(exchange_module, "_MOST", 2 * sum(SIZES[COMM_WORLD.size]))
    values = random(exchange.owned, 5).requires_grad_()
    received = exchange(values)
    np.testing.assert_array_equal(received.detach(), everywhere(values)[exchange.wanted])
    (gradient,) = torch.autograd.grad(received, values, torch.ones_like(received))
    counts = np.bincount(
        np.concatenate(COMM_WORLD.allgather(exchange.wanted)), minlength=sum(SIZES[COMM_WORLD.size])
    )
    np.testing.assert_array_equal(everywhere(gradient), np.repeat(counts[:, None], 5, axis=1))


def test_bad_input_is_an_error_on_all_ranks():
    exchange, last = make(), COMM_WORLD.size - 1
    with pytest.raises(
        ValueError,
        match=(
            "expected .* nodes along axis 0|rank .* has raised ValueError: expected .* nodes along"
        ),
    ):
        exchange(random(exchange.owned + (COMM_WORLD.rank == last)))
    with pytest.raises(ValueError, match="numbered from 0 to"):
        Exchange(
            COMM_WORLD,
            exchange.owned,
            [sum(SIZES[COMM_WORLD.size])] if COMM_WORLD.rank == last else [],
        )
    with pytest.raises(ValueError, match="numbered from 0 to"):
        Exchange(COMM_WORLD, exchange.owned, [-1] if COMM_WORLD.rank == last else [])
    with pytest.raises(TypeError, match="expected real numbers"):
        exchange(random(exchange.owned).to(torch.complex128))
    with pytest.raises(TypeError, match="state_dict"):
        pickle.dumps(exchange)
    if COMM_WORLD.size > 1:
        with pytest.raises(
            ValueError, match="whether there are gradients, must be the same on all ranks"
        ):
            exchange(random(exchange.owned).requires_grad_(COMM_WORLD.rank == 0))
        with pytest.raises(
            ValueError, match="axes beside that of the nodes.* must be the same on all ranks"
        ):
            exchange(random(exchange.owned, 2 + COMM_WORLD.rank))


@pytest.mark.parametrize("wanted", [[0.5], ["0"], [[0]], [True], [2**32], [-1], None], ids=repr)
def test_numbers_that_are_none_of_nodes_are_an_error_on_all_ranks(wanted):
    """Also where one rank only has them; none becomes another number."""
    is_last = COMM_WORLD.rank == COMM_WORLD.size - 1
    sizes = SIZES[COMM_WORLD.size]
    with pytest.raises((TypeError, ValueError), match="wanted must be|numbered from 0 to"):
        Exchange(COMM_WORLD, sizes[COMM_WORLD.rank], wanted if is_last else [0])
    with pytest.raises(ValueError, match="owned must be an integer of at least 0, found"):
        Exchange(COMM_WORLD, 2.5 if is_last else 3, [0])
