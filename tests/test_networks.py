"""Networks: shapes, batch axes, where they start, and the symmetries of their architectures."""

import copy

import numpy as np
import pytest
import torch
from firedrake import *

from prdp_fem.torch import MLP, Gathering, GraphNetwork, ResNet
from prdp_fem.training.graphs import neighbour_means
from prdp_fem.training.sparse_product import SparseProduct

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    yield
    torch.set_default_dtype(torch.float32)


def graph(mesh=None):
    """Edges and coordinates of a mesh."""
    gathering = Gathering(FunctionSpace(UnitDiskMesh(1) if mesh is None else mesh, "CG", 1))
    return gathering.edges, torch.from_numpy(gathering.coordinates)


def graph_network(inputs=2, outputs=3, *, mesh=None, **options):
    return GraphNetwork(inputs, outputs, *graph(mesh), **{"width": 5, "steps": 2, **options})


def awake(network):
    """The network, with other weights than those it starts with."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


# By name: a network, and the shape of a sample and of what is made of it.
NETWORKS = {
    "MLP": (lambda: MLP(4, 3, width=5, depth=2), (4,), (3,)),
    "MLP, one layer": (lambda: MLP(1, 2, width=3, depth=1, activation=torch.nn.ReLU), (1,), (2,)),
    "ResNet, 1-D": (lambda: ResNet(1, 2, (7,), width=4, blocks=1), (1, 7), (2, 7)),
    "ResNet, 2-D": (
        lambda: ResNet(2, 1, (5, 4), width=4, kernel=5, periodic=True),
        (2, 20),
        (1, 20),
    ),
    "ResNet, 3-D": (lambda: ResNet(3, 3, (3, 4, 5), width=2, blocks=0), (3, 60), (3, 60)),
    "graph": (
        graph_network,
        (2, len(UnitDiskMesh(1).coordinates.dat.data_ro)),
        (3, len(UnitDiskMesh(1).coordinates.dat.data_ro)),
    ),
    "graph with features": (
        lambda: graph_network(mesh=UnitCubeMesh(1, 2, 2), features=torch.randn(2, 18)),
        (2, 18),
        (3, 18),
    ),
    "graph, linear": (
        lambda: graph_network(mesh=UnitIntervalMesh(6), activation=None),
        (2, 7),
        (3, 7),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_start_at_zero(name):
    make, sample, result = NETWORKS[name]
    y = make()(torch.randn(3, *sample))
    assert y.shape == (3, *result) and not y.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_leading_axes_are_batch_axes(name):
    make, sample, result = NETWORKS[name]
    network, x = awake(make()), torch.randn(2, 3, *sample)
    y = network(x)
    assert y.shape == (2, 3, *result) and y.isfinite().all() and y.any()
    for i in range(2):
        torch.testing.assert_close(network(x[i]), y[i], rtol=1e-12, atol=1e-13)
        for j in range(3):
            torch.testing.assert_close(network(x[i, j]), y[i, j], rtol=1e-12, atol=1e-13)
    assert network(x[:, :0]).shape == (2, 0, *result)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_takes_part(name):
    make, sample, _ = NETWORKS[name]
    network = awake(make())
    network(torch.randn(3, *sample)).square().sum().backward()
    for parameter in network.parameters():
        assert parameter.grad is not None and parameter.grad.any()


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_conversions(name):
    make, sample, _ = NETWORKS[name]
    network, x = awake(make()), torch.randn(2, *sample)
    y = network(x)
    assert torch.equal(copy.deepcopy(network)(x), y)
    other = make()
    other.load_state_dict(network.state_dict())
    if "features" not in name:  # those are given, not learned
        assert torch.equal(other(x), y)
    single = copy.deepcopy(network).float()(x.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), y, rtol=1e-4, atol=1e-4)


# Symmetries


@pytest.mark.parametrize("grid", [(8,), (5, 4), (3, 4, 5)])
def test_a_periodic_resnet_commutes_with_shifts(grid):
    periodic, padded = (
        awake(ResNet(2, 1, grid, width=3, periodic=periodic)) for periodic in (True, False)
    )
    x = torch.randn(2, *grid)
    axes = tuple(range(1, len(grid) + 1))

    def shifted(field):
        return (
            field.reshape(-1, *grid).roll([1 + axis for axis in range(len(grid))], axes).flatten(1)
        )

    torch.testing.assert_close(
        periodic(shifted(x)), shifted(periodic(x.flatten(1))), rtol=1e-12, atol=1e-13
    )
    assert not torch.allclose(padded(shifted(x)), shifted(padded(x.flatten(1))), rtol=1e-3)


@pytest.mark.parametrize("activation", [torch.nn.ReLU, None])
def test_a_graph_network_does_not_depend_on_the_order_of_nodes(activation):
    edges, coordinates = graph()
    n = len(coordinates)
    known = torch.randn(2, n)
    network = awake(GraphNetwork(2, 3, edges, coordinates, features=known, activation=activation))
    order = torch.randperm(n)
    place = torch.argsort(order)
    shuffled = place[edges][:, torch.randperm(edges.shape[1])]
    other = GraphNetwork(
        2, 3, shuffled, coordinates[order], features=known[:, order], activation=activation
    )
    other.load_state_dict(network.state_dict())
    x = torch.randn(4, 2, n)
    torch.testing.assert_close(other(x[..., order]), network(x)[..., order], rtol=1e-12, atol=1e-12)


def test_a_periodic_graph_network_commutes_with_shifts():
    n = 12
    gathering = Gathering(FunctionSpace(PeriodicIntervalMesh(n, 3.0), "CG", 1), period=[3.0])
    periodic = awake(GraphNetwork(1, 1, gathering.edges, gathering.coordinates, period=[3.0]))
    unaware = awake(GraphNetwork(1, 1, gathering.edges, gathering.coordinates))
    x = torch.randn(2, 1, n)
    # The coordinates of a periodic mesh are multiples of 1e-9 of its extent.
    torch.testing.assert_close(
        periodic(x.roll(5, -1)), periodic(x).roll(5, -1), rtol=1e-6, atol=1e-7
    )
    assert not torch.allclose(unaware(x.roll(5, -1)), unaware(x).roll(5, -1), rtol=1e-3)


def test_a_graph_network_depends_on_neither_place_nor_scale_of_a_mesh():
    edges, coordinates = graph()
    network = awake(GraphNetwork(1, 1, edges, coordinates))
    other = GraphNetwork(1, 1, edges, 3 * coordinates + torch.tensor([5.0, -2.0]))
    other.load_state_dict(network.state_dict())
    x = torch.randn(1, len(coordinates))
    torch.testing.assert_close(other(x), network(x), rtol=1e-12, atol=1e-12)


def test_a_node_sees_as_many_edges_far_as_there_are_steps():
    steps = 2
    network = awake(graph_network(1, 1, mesh=UnitIntervalMesh(9), steps=steps))
    x = torch.randn(1, 10).requires_grad_()
    for node in (0, 4, 9):
        (seen,) = torch.autograd.grad(network(x)[0, node], x)
        assert seen[0].nonzero().flatten().tolist() == [
            other for other in range(10) if abs(other - node) <= steps
        ]


def test_a_graph_network_without_activation_is_linear():
    network = awake(graph_network(activation=None, features=torch.randn(2, graph()[1].shape[0])))
    x, y = torch.randn(2, 2, graph()[1].shape[0])
    torch.testing.assert_close(
        network(2 * x - 3 * y), 2 * network(x) - 3 * network(y), rtol=1e-10, atol=1e-11
    )


# Means over neighbours


@pytest.mark.parametrize(
    "make_mesh",
    [lambda: UnitDiskMesh(2), lambda: UnitCubeMesh(2, 2, 2), lambda: UnitIntervalMesh(5)],
)
def test_means_over_neighbours_are_derivatives(make_mesh):
    edges, coordinates = graph(make_mesh())
    n, dimension = coordinates.shape
    means = neighbour_means(edges, coordinates)
    assert means.shape == ((dimension + 1) * n, n)
    size = (coordinates[edges[0]] - coordinates[edges[1]]).norm(dim=1).mean()
    slope = torch.randn(dimension)
    _, *gradient = (means @ (7 + coordinates @ slope)).view(dimension + 1, n)
    for component, exact in zip(gradient, size * slope):
        torch.testing.assert_close(component, exact.expand(n), rtol=1e-10, atol=1e-10)
    assert (means @ torch.ones(n)).abs().max() < 1e-12


def test_the_mean_difference_is_the_laplacian_on_an_even_mesh():
    edges, coordinates = graph(UnitIntervalMesh(8))
    second = (neighbour_means(edges, coordinates) @ coordinates[:, 0] ** 2)[1:8]
    torch.testing.assert_close(second, torch.full((7,), 2 / 64), rtol=1e-10, atol=0)


def test_neighbours_in_a_row_have_no_gradient_across():
    """Of what is not seen in some direction nothing is invented."""
    coordinates = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    means = neighbour_means(edges, coordinates).to_dense().view(3, 3, 3)
    assert means[2].abs().max() == 0
    torch.testing.assert_close(means[1] @ coordinates[:, 0], torch.ones(3))


def test_products_with_a_sparse_matrix():
    dense = torch.randn(6, 4) * (torch.rand(6, 4) < 0.4)
    product = SparseProduct(dense.to_sparse_coo())
    x = torch.randn(4, 3, requires_grad=True)
    torch.testing.assert_close(product(x), dense @ x)
    assert torch.autograd.gradcheck(product, x)
    # not contiguous
    assert torch.autograd.gradcheck(lambda y: product(y.T), torch.randn(3, 4, requires_grad=True))
    assert not product.state_dict()


def test_graph_networks_are_differentiable():
    network = awake(
        graph_network(
            1, 1, mesh=UnitSquareMesh(1, 1), features=torch.randn(1, 4), activation=torch.nn.Tanh
        )
    )
    assert torch.autograd.gradcheck(network, torch.randn(2, 1, 4, requires_grad=True))


@pytest.mark.parallel([2, 3])
def test_a_graph_network_is_the_same_on_any_number_of_ranks():
    outputs = []
    for comm in (COMM_WORLD, COMM_SELF):
        gathering = Gathering(FunctionSpace(UnitSquareMesh(3, 4, comm=comm), "CG", 1))
        torch.manual_seed(3)
        network = awake(GraphNetwork(1, 1, gathering.edges, gathering.coordinates))
        x = torch.from_numpy(np.sin(gathering.coordinates @ [3.0, 2.0]))
        outputs.append(network(x[None]))
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-13)


# Types and devices


def outcome(network, x, **autocast):
    """What a network gives, and the derivatives of its square."""
    with torch.autocast("cpu", **(autocast or {"enabled": False})):
        y = network(x)
    loss = y.double().square().sum()
    return y, torch.cat(
        [part.double().flatten() for part in torch.autograd.grad(loss, list(network.parameters()))]
    )


def networks():
    n = len(graph()[1])
    yield awake(graph_network(1, 1, width=8)), (1, n)
    yield awake(graph_network(1, 1, width=8, features=torch.randn(2, n))), (1, n)
    yield awake(ResNet(1, 1, (4, 3))), (1, 12)
    yield awake(MLP(3, 2)), (3,)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_double(place, dtype):
    network, shape = list(networks())[place]
    x = torch.rand(4, *shape)
    y, gradient = outcome(network, x)
    network.float()
    under_autocast = outcome(network, x.float(), dtype=dtype)
    in_half = outcome(network.to(dtype), x.to(dtype))
    for found, derivative in (under_autocast, in_half):
        assert found.dtype == dtype
        assert (found.double() - y).norm() < 0.05 * y.norm()
        assert (derivative - gradient).norm() < 0.1 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_differences_of_constant_states_vanish_in_half_precision(dtype):
    means = graph_network().to(dtype).means
    assert means(torch.ones(means.shape[1], 2, dtype=dtype)).abs().max() < 1e-6
    assert graph_network().to(dtype).double().means.matrix_values.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_default_type(dtype):
    torch.set_default_dtype(dtype)
    network = graph_network(1, 1)
    assert network(torch.rand(1, len(graph()[1]))).dtype == dtype


def test_a_network_is_made_on_the_default_device():
    torch.set_default_device("meta")
    try:
        network = graph_network(features=torch.zeros(2, len(graph()[1])))
        assert {part.device.type for part in [*network.parameters(), *network.buffers()]} == {
            "meta"
        }
    finally:
        torch.set_default_device(None)


def test_gradients_of_graph_networks_by_sample():
    network = awake(graph_network(1, 1))
    x, parameters = torch.rand(3, 1, len(graph()[1])), dict(network.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(network, parameters, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for row, sample in enumerate(x):
        expected = torch.autograd.grad(network(sample).square().sum(), list(parameters.values()))
        for name, other in zip(parameters, expected):
            torch.testing.assert_close(found[name][row], other, rtol=1e-10, atol=1e-12)


def test_graph_networks_are_differentiable_twice():
    network = awake(graph_network(1, 1, mesh=UnitSquareMesh(1, 1), activation=torch.nn.Tanh))
    assert torch.autograd.gradgradcheck(network, torch.randn(1, 1, 4, requires_grad=True))


# Refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResNet(1, 1, (2, 2, 2, 2)), "one, two or three directions"),
        (lambda: ResNet(1, 1, ()), "one, two or three directions"),
        (lambda: ResNet(1, 1, (5,), kernel=4), "kernel must be odd, found 4"),
        (lambda: MLP(1, 1, depth=0), "depth must be at least 1, found 0"),
        (
            lambda: graph_network(features=torch.zeros(2, 3)),
            r"features must have shape \(k, \d+\), found \(2, 3\)",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
