"""Fields gathered over ranks, in an order that does not depend on them."""

import numpy as np
import pytest
import torch
from firedrake import *

from prdp_fem.torch import Gathering, Partition, to_torch

torch.set_num_threads(1)

# By name: a mesh over given ranks, an element, a space with values of so many components (0 for a
# scalar space), and the period.
SPACES = {
    "triangles": (lambda comm: UnitSquareMesh(4, 3, comm=comm), "CG", 1, 0, None),
    "triangles, quadratic, a vector": (
        lambda comm: UnitSquareMesh(3, 4, comm=comm),
        "CG",
        2,
        2,
        None,
    ),
    "discs": (lambda comm: UnitDiskMesh(1, comm=comm), "CG", 1, 0, None),
    "tetrahedra, a vector": (lambda comm: UnitCubeMesh(2, 3, 2, comm=comm), "CG", 1, 3, None),
    "interval": (lambda comm: UnitIntervalMesh(7, comm=comm), "CG", 1, 0, None),
    "periodic interval": (lambda comm: PeriodicIntervalMesh(9, 2.0, comm=comm), "CG", 1, 0, [2]),
    "periodic quadrilaterals": (
        lambda comm: PeriodicUnitSquareMesh(4, 5, quadrilateral=True, comm=comm),
        "CG",
        1,
        2,
        [1, 1],
    ),
    "cells": (lambda comm: UnitSquareMesh(3, 3, comm=comm), "DG", 0, 0, None),
}


def space_of(name, comm):
    make_mesh, family, degree, components, period = SPACES[name]
    mesh = make_mesh(comm)
    return (
        VectorFunctionSpace(mesh, family, degree, dim=components)
        if components
        else FunctionSpace(mesh, family, degree)
    ), period


@pytest.fixture(params=SPACES)
def gathering_and_space(request):
    V, period = space_of(request.param, COMM_WORLD)
    return Gathering(V, period=period), V


def random_part(gathering, V, *batch, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed + 10 * gathering.comm.rank)
    return torch.randn(
        *batch, V.dof_dset.layout_vec.getLocalSize(), dtype=dtype, generator=generator
    )


@pytest.mark.parallel([1, 2, 3])
def test_scatter_is_the_inverse_of_gather(gathering_and_space):
    gathering, V = gathering_and_space
    for batch, dtype in (
        ((), torch.float64),
        ((3,), torch.float32),
        ((2, 0), torch.float64),
        ((2, 3), torch.float64),
    ):
        part = random_part(gathering, V, *batch, dtype=dtype)
        whole = gathering.gather(part)
        expected = (
            (*batch, len(gathering))
            if gathering.components == 1
            else (*batch, gathering.components, len(gathering))
        )
        assert whole.shape == expected and whole.dtype == dtype
        assert torch.equal(gathering.scatter(whole), part)
        everywhere = gathering.comm.allgather(whole.numpy())
        assert all(np.array_equal(everywhere[0], other) for other in everywhere)
        assert torch.equal(gathering.gather(gathering.scatter(whole)), whole)


@pytest.mark.parallel([1, 2, 3])
def test_values_stand_at_their_coordinates(gathering_and_space):
    gathering, V = gathering_and_space
    x = SpatialCoordinate(V.mesh())
    # Of the period of the periodic meshes above, and different at all points.
    waves = [cos(2 * pi * x[i]) + 0.3 * sin(2 * pi * x[i]) for i in range(len(x))]
    value = sum((i + 1) * wave for i, wave in enumerate(waves))
    values = (
        value
        if gathering.components == 1
        else as_vector([(k + 1) * value for k in range(gathering.components)])
    )
    whole = gathering.gather(to_torch(Function(V).interpolate(values)))
    points = 2 * np.pi * gathering.coordinates
    expected = (np.cos(points) + 0.3 * np.sin(points)) @ np.arange(1, points.shape[1] + 1)
    for k, component in enumerate(whole.reshape(-1, len(gathering))):
        # points are told apart by 1e-9
        np.testing.assert_allclose(component, (k + 1) * expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parallel([1, 2, 3])
def test_the_adjoint_adds_up_the_cotangents_of_all_ranks(gathering_and_space):
    gathering, V = gathering_and_space
    part = random_part(gathering, V, 2).requires_grad_()
    whole = gathering.gather(part)
    cotangent = torch.randn(
        whole.shape,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(100 + gathering.comm.rank),
    )
    given = cotangent.clone()
    (gradient,) = torch.autograd.grad(whole, part, cotangent)
    left = gathering.comm.allreduce((whole.detach() * cotangent).sum().item())
    right = gathering.comm.allreduce((part.detach() * gradient).sum().item())
    assert left == pytest.approx(right, rel=1e-12)
    assert torch.equal(cotangent, given)


@pytest.mark.parallel([1, 2, 3])
def test_a_part_of_the_loss_on_each_rank_gives_the_gradient_of_the_whole(gathering_and_space):
    """A function of the whole field on all ranks, of which each takes its part: as networks are
    trained.
    """
    gathering, V = gathering_and_space
    part = random_part(gathering, V).requires_grad_()
    gathering.scatter(gathering.gather(part) ** 3).sum().backward()
    torch.testing.assert_close(part.grad, 3 * part.detach() ** 2, rtol=1e-14, atol=0)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("name", SPACES)
def test_the_order_is_that_of_a_single_rank(name):
    (V, period), (alone, _) = space_of(name, COMM_WORLD), space_of(name, COMM_SELF)
    gathering, expected = Gathering(V, period=period), Gathering(alone, period=period)
    np.testing.assert_allclose(gathering.coordinates, expected.coordinates, rtol=0, atol=1e-12)
    if name != "cells":
        assert torch.equal(gathering.edges, expected.edges)
    assert {tuple(sorted(cell)) for cell in gathering.cells.tolist()} == {
        tuple(sorted(cell)) for cell in expected.cells.tolist()
    }
    assert len(gathering.cells) == len(expected.cells)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    ("mesh", "degree", "period", "shape"),
    [
        (lambda: UnitSquareMesh(4, 3), 1, None, (5, 4)),
        (lambda: UnitSquareMesh(4, 3, quadrilateral=True), 2, None, (9, 7)),
        (lambda: UnitCubeMesh(2, 3, 4), 1, None, (3, 4, 5)),
        (lambda: PeriodicUnitSquareMesh(4, 5, quadrilateral=True), 1, [1, 1], (4, 5)),
        (lambda: PeriodicRectangleMesh(4, 5, 2, 3, direction="x"), 1, [2, np.inf], (4, 6)),
        (lambda: PeriodicIntervalMesh(6, 3), 1, [3], (6,)),
    ],
)
def test_structured_meshes_are_in_grid_order(mesh, degree, period, shape):
    mesh = mesh()
    gathering = Gathering(FunctionSpace(mesh, "CG", degree), period=period)
    assert gathering.grid == shape
    extent = {1: (3,), 2: (2, 3) if shape == (4, 6) else (1, 1), 3: (1, 1, 1)}[len(shape)]
    axes = [
        length
        * np.arange(count)
        / (count if period is not None and np.isfinite(period[i]) else count - 1)
        for i, (count, length) in enumerate(zip(shape, extent))
    ]
    np.testing.assert_allclose(
        gathering.coordinates.T.reshape(-1, *shape), np.meshgrid(*axes, indexing="ij"), atol=1e-8
    )


@pytest.mark.parallel([1, 3])
def test_edges_are_those_of_the_mesh_in_both_directions():
    mesh = UnitSquareMesh(1, 2)
    edges = {tuple(edge) for edge in Gathering(FunctionSpace(mesh, "CG", 1)).edges.T.tolist()}
    # Nodes 0, 1, 2 on the left from below, and 3, 4, 5 on the right; one diagonal in each of the
    # two squares.
    sides = {(0, 1), (1, 2), (3, 4), (4, 5), (0, 3), (1, 4), (2, 5)}
    assert edges == {(j, i) for i, j in edges}
    assert sides <= edges and len(edges) == 2 * (len(sides) + 2)


@pytest.mark.parallel([1, 3])
def test_sums_over_ranks():
    gathering = Gathering(FunctionSpace(UnitSquareMesh(3, 3), "CG", 1))
    part = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64).T
    total = gathering.total(part)
    assert torch.equal(total, gathering.comm.size * part)
    assert torch.equal(part, torch.tensor([[1.0, 3.0], [2.0, 4.0]], dtype=torch.float64))


@pytest.mark.parallel([1, 3])
def test_refusals():
    mesh = UnitSquareMesh(3, 3)
    V = FunctionSpace(mesh, "CG", 1)
    with pytest.raises(ValueError, match="mixed"):
        Gathering(V * V)
    with pytest.raises(ValueError, match="Bernstein elements are not values at points"):
        Gathering(FunctionSpace(mesh, "Bernstein", 2))
    with pytest.raises(ValueError, match="is periodic: name its period"):
        Gathering(FunctionSpace(PeriodicUnitIntervalMesh(12), "CG", 1))
    with pytest.raises(ValueError, match="expected 2 periods, one for each direction, found 1"):
        Gathering(V, period=[1])
    with pytest.raises(ValueError, match="same point"):
        Gathering(FunctionSpace(mesh, FiniteElement("DG", triangle, 1, variant="equispaced")))
    gathering = Gathering(V)
    n = V.dof_dset.layout_vec.getLocalSize()
    with pytest.raises(ValueError, match=rf"last axis of {n} .*found shape \(2, {n + 1}\)"):
        gathering.gather(torch.zeros(2, n + 1))
    with pytest.raises(ValueError, match=r"last axes of \(16,\), found shape \(15,\)"):
        gathering.scatter(torch.zeros(15))
    with pytest.raises(ValueError, match=r"last axes of \(2, 16\), found shape \(16, 2\)"):
        Gathering(VectorFunctionSpace(mesh, "CG", 1)).scatter(torch.zeros(16, 2))
    with pytest.raises(ValueError, match="do not form a grid"):
        _ = Gathering(FunctionSpace(UnitDiskMesh(1), "CG", 1)).grid
    with pytest.raises(ValueError, match="no edges"):
        _ = Gathering(FunctionSpace(mesh, "DG", 0)).edges


@pytest.mark.parallel([1, 2, 3])
def test_cells_of_extruded_meshes_are_those_of_all_layers():
    gathering = Gathering(FunctionSpace(ExtrudedMesh(UnitIntervalMesh(6), 3), "CG", 1))
    corners = gathering.coordinates[gathering.cells]
    assert gathering.grid == (7, 4) and gathering.cells.shape == (18, 4)
    assert np.allclose(np.ptp(corners, axis=1), [1 / 6, 1 / 3])  # each is a cell,
    assert len(np.unique(corners.mean(axis=1).round(9), axis=0)) == 18  # and another one


PERIODIC = {
    "square": (lambda: PeriodicUnitSquareMesh(4, 4), [1, 1]),
    "quadrilaterals": (lambda: PeriodicUnitSquareMesh(4, 4, quadrilateral=True), [1, 1]),
    "in x": (lambda: PeriodicRectangleMesh(4, 5, 2, 3, direction="x"), [2, np.inf]),
    "interval": (lambda: PeriodicIntervalMesh(5, 3.0), [3]),
    "extruded": (lambda: ExtrudedMesh(PeriodicIntervalMesh(5, 2.0), 3), [2, np.inf]),
    "cube": (lambda: PeriodicUnitCubeMesh(3, 3, 3), [1, 1, 1]),
    "not periodic": (lambda: UnitSquareMesh(4, 4), [np.inf, np.inf]),
}


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize("name", PERIODIC)
def test_a_period_that_the_mesh_does_not_have_is_refused(name):
    make, period = PERIODIC[name]
    space = FunctionSpace(make(), "CG", 1)
    assert len(Gathering(space, period=period)) == space.dim()
    assert space.mesh().comm.allreduce(len(Partition(space, period=period))) == space.dim()
    for direction, length in enumerate(period):
        for wrong in (2.0, np.inf, 0.5) if np.isfinite(length) else (1.0, 2.0):
            other = list(period)
            other[direction] = wrong * length if np.isfinite(length) else wrong
            for make_of in (Gathering, Partition):
                with pytest.raises(
                    ValueError,
                    match=rf"has (no period|a period of {length:g}) in "
                    rf"direction {direction}, found period",
                ):
                    make_of(space, period=other)


def test_a_bent_mesh_has_the_period_of_a_straight_one():
    """It goes further than its period."""
    mesh = PeriodicUnitSquareMesh(6, 6)
    x, y = SpatialCoordinate(mesh)
    mesh.coordinates.interpolate(as_vector([x + 0.2 * sin(2 * pi * y), y]))
    assert len(Gathering(FunctionSpace(mesh, "CG", 1), period=[1, 1])) == 36


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_not_finite_are_refused(value):
    mesh = UnitSquareMesh(3, 3)
    mesh.coordinates.dat.data[5, 1] = value
    for make in (Gathering, Partition):
        with pytest.raises(ValueError, match="coordinates of nodes must be finite, found"):
            make(FunctionSpace(mesh, "CG", 1))


def test_a_mesh_without_extent_is_refused():
    mesh = UnitSquareMesh(3, 3)
    mesh.coordinates.assign(0.5)
    with pytest.raises(ValueError, match="lie at the same point"):
        Gathering(FunctionSpace(mesh, "CG", 1))
