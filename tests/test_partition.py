"""Networks on distributed meshes, against the same on the whole mesh."""

import numpy as np
import pytest
import torch
from firedrake import *
from test_gathering import SPACES, space_of

from prdp_fem.torch import Gathering, GraphNetwork, Partition, to_torch

pytestmark = pytest.mark.parallel([1, 2, 3])
torch.set_num_threads(1)

CONTINUOUS = [name for name in SPACES if name != "cells"]


@pytest.fixture(params=CONTINUOUS)
def case(request):
    """The partition of a space, its gathering, and the places of the partition's nodes (ghosts
    last) in the gathering's order.
    """
    V, period = space_of(request.param, COMM_WORLD)
    partition, whole = Partition(V, period=period), Gathering(V, period=period)
    numbers = torch.arange(len(whole), dtype=torch.float64)
    own = whole.scatter(numbers if whole.components == 1 else numbers.expand(whole.components, -1))
    return partition, whole, partition.halo(partition.by_node(own)[0]).long(), period


def test_nodes_are_where_they_are_in_the_whole(case):
    partition, whole, places, period = case
    distance = abs(partition.coordinates - whole.coordinates[places])
    if period is not None:
        distance = np.minimum(distance, abs(distance - np.array(period)))
    assert distance.max() < 1e-8
    assert len(partition) == partition.halo.owned and len(set(places.tolist())) == len(places)


def test_edges_of_all_ranks_are_those_of_the_whole(case):
    partition, whole, places, _ = case
    mine = places[partition.edges].T.tolist()
    everywhere = sum(partition.comm.allgather(mine), [])
    assert sorted(everywhere) == sorted(whole.edges.T.tolist())


def test_every_ghost_is_at_the_end_of_an_edge(case):
    partition, _, places, _ = case
    ghosts = set(range(len(partition), len(places)))
    assert ghosts <= set(partition.edges[0].tolist())
    assert all(target < len(partition) for target in partition.edges[1].tolist())


def test_unknowns_by_node_and_back(case):
    partition, whole, _, _ = case
    generator = torch.Generator().manual_seed(COMM_WORLD.rank)
    local = torch.randn(
        2, 3, len(partition) * partition.components, dtype=torch.float64, generator=generator
    )
    nodes = partition.by_node(local)
    assert nodes.shape == (2, 3, partition.components, len(partition))
    assert torch.equal(partition.by_unknown(nodes), local)
    gathered = whole.gather(local)
    if whole.components == 1:
        gathered = gathered[..., None, :]
    assert torch.equal(
        nodes,
        gathered[
            ...,
            whole.scatter(
                torch.arange(len(whole)).expand(
                    *([whole.components] if whole.components > 1 else []), -1
                )
            ).view(len(partition), -1)[:, 0],
        ],
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_graph_network_is_the_same_on_any_number_of_ranks(case, dtype):
    partition, whole, places, period = case
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(2, whole.components, len(whole), dtype=torch.float64, generator=generator)
    features = torch.randn(2, len(whole), dtype=torch.float64, generator=generator)
    own = places[: len(partition)]
    networks = []
    for of, halo, known in ((whole, None, features), (partition, partition.halo, features[:, own])):
        torch.manual_seed(1)
        network = GraphNetwork(
            whole.components,
            2,
            of.edges,
            of.coordinates,
            halo=halo,
            features=known,
            period=period,
            width=4,
            steps=2,
        )
        torch.nn.init.normal_(network.decode.weight)
        networks.append(network.to(dtype))
    reference, distributed = networks
    x, mine = (values.to(dtype, copy=True).requires_grad_() for values in (field, field[..., own]))
    expected, found = reference(x), distributed(mine)
    tolerance = (
        {"rtol": 1e-10, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-3, "atol": 1e-4}
    )
    # Places of periodic nodes are known to 1e-9 of the mesh.
    if period is not None:
        tolerance = (
            {"rtol": 1e-6, "atol": 1e-6} if dtype is torch.float64 else {"rtol": 1e-2, "atol": 1e-3}
        )
    torch.testing.assert_close(found, expected[..., own], **tolerance)

    (expected**2).sum().backward()
    (found**2).sum().backward()
    torch.testing.assert_close(
        mine.grad, x.grad[..., own], **{name: 10 * value for name, value in tolerance.items()}
    )
    for parameter, other in zip(distributed.parameters(), reference.parameters()):
        summed = torch.from_numpy(COMM_WORLD.allreduce(parameter.grad.double().numpy()))
        scale = other.grad.abs().max().item()
        torch.testing.assert_close(
            summed / scale,
            other.grad.double() / scale,
            **{name: 10 * value for name, value in tolerance.items()},
        )


def test_a_single_node_in_each_cell_has_no_edges():
    with pytest.raises(ValueError, match="no edges"):
        Partition(space_of("cells", COMM_WORLD)[0])


def test_pointwise_networks_need_no_communication():
    V, _ = space_of("triangles", COMM_WORLD)
    local = to_torch(Function(V).interpolate(sin(3 * SpatialCoordinate(V.mesh())[0])), copy=True)
    torch.manual_seed(0)
    pointwise = torch.nn.Sequential(
        torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
    ).double()
    pointwise(local[:, None]).square().sum().backward()
    mine = COMM_WORLD.allreduce(pointwise[0].weight.grad.numpy())
    whole = Gathering(V).gather(local)
    pointwise.zero_grad()
    pointwise(whole[:, None]).square().sum().backward()
    np.testing.assert_allclose(mine, pointwise[0].weight.grad, rtol=1e-12)


def test_ranks_without_nodes():
    V = FunctionSpace(UnitSquareMesh(1, 1), "CG", 1)
    own = Partition(V)
    torch.manual_seed(0)
    network = GraphNetwork(
        1, 1, own.edges, own.coordinates, halo=own.halo, width=2, steps=1
    ).double()
    torch.nn.init.normal_(network.decode.weight)
    values = network(torch.as_tensor(own.coordinates[: len(own), 0])[None])
    values.sum().backward()
    assert values.shape == (1, len(own))
    assert COMM_WORLD.allreduce(len(own)) == 4


@pytest.mark.timeout(120, method="thread")
def test_a_graph_that_is_wrong_on_one_rank_is_an_error_on_all():
    partition = Partition(FunctionSpace(UnitSquareMesh(4, 4), "CG", 1))
    is_last = partition.comm.rank == partition.comm.size - 1
    edges, coordinates = partition.edges.clone(), partition.coordinates.copy()
    if is_last:
        edges[1, 0] = len(partition)  # a ghost, or nobody
        coordinates[0] = np.nan
    for wrong, what in ((edges, partition.coordinates), (partition.edges, coordinates)):
        with pytest.raises(ValueError, match="edges must go to nodes|coordinates must be finite"):
            GraphNetwork(1, 1, wrong, what, halo=partition.halo)
    GraphNetwork(1, 1, partition.edges, partition.coordinates, halo=partition.halo)


@pytest.mark.timeout(120, method="thread")
@pytest.mark.parametrize("make", [Gathering, Partition])
def test_a_mesh_that_is_damaged_on_one_rank_is_an_error_on_all(make):
    mesh = UnitSquareMesh(4, 4)
    values = mesh.coordinates.dat.data  # on all ranks, since halos are exchanged after it
    if mesh.comm.rank == mesh.comm.size - 1:
        values[0, 0] = np.nan
    with pytest.raises(ValueError, match="coordinates of nodes must be finite"):
        make(FunctionSpace(mesh, "CG", 1))
