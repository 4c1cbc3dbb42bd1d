"""The nodes of a space: where they are, how ranks number them, and which are of the same cell."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import numpy as np
from firedrake import H1, Function, FunctionSpace, SpatialCoordinate, VectorFunctionSpace
from firedrake.functionspaceimpl import WithGeometry
from mpi4py import MPI
from petsc4py import PETSc
from pyadjoint.tape import stop_annotating

from prdp_fem.arguments import instance, shown
from prdp_fem.ranks.agreement import agree

__all__ = ["Nodes", "checked_period", "pairs_of", "unique_pairs"]

# Elements whose unknowns are values at points.
_NODAL = ("Lagrange", "Q", "Discontinuous Lagrange", "DQ", "Kong-Mulder-Veldhuizen")


# Of the period, by which coordinates on both sides of a periodic mesh's end may differ from it.
_ROUNDING = 1e-6


class Nodes:
    """The nodes of a space that this rank owns.

    Parameters
    ----------
    space : FunctionSpace
        Scalar or vector-valued, not mixed, with unknowns that are values at points.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction, infinite in directions in which it is not
        periodic.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
    components : int
        Values at each node.
    coordinates : np.ndarray
        Shape (owned, d).
    sizes : list of int
        How many nodes each rank owns; they are numbered through all ranks in PETSc's order.
    first : int
        The number of this rank's first node.

    Raises
    ------
    TypeError
        Where the space is none.
    ValueError
        Where the space is mixed, where its unknowns are not values at points, where coordinates are
        not finite, where the mesh is periodic and no period is given, where it has another period,
        or where ``period`` has not a number for each direction.
    """

    def __init__(self, space: FunctionSpace, period: Sequence[float] | None = None):
        instance("space", space, WithGeometry, "a FunctionSpace")
        self.comm = space.mesh().comm
        period = agree(self.comm, lambda: _checked(space, period), "elements and periods")[1]
        self.components = space.block_size
        self._scalar = space if space.block_size == 1 else space.sub(0).collapse()
        points = VectorFunctionSpace(space.mesh(), self._scalar.ufl_element())
        with stop_annotating():  # where nodes are is no part of what is differentiated
            coordinates = Function(points).interpolate(SpatialCoordinate(space.mesh()))
        self.coordinates = coordinates.dat.data_ro.reshape(-1, space.mesh().geometric_dimension)
        agree(self.comm, self._check_coordinates, "coordinates")
        if period is not None:
            _check_period(space.mesh(), period)
        self.sizes = self.comm.allgather(len(self.coordinates))
        self.first = sum(self.sizes[: self.comm.rank])

    def __len__(self) -> int:
        return len(self.coordinates)

    def _check_coordinates(self) -> None:
        """Raise for what a damaged mesh has."""
        wrong = np.flatnonzero(~np.isfinite(self.coordinates).all(axis=1))
        if wrong.size:
            raise ValueError(
                "coordinates of nodes must be finite, found "
                f"{self.coordinates[wrong[0]].tolist()} and {wrong.size - 1} more: "
                "look for NaN or infinity in the coordinates of the mesh"
            )

    def bounding_box(self) -> tuple[np.ndarray, np.ndarray]:
        """The mesh's lowest and highest coordinates, of a periodic one its ends'; collective."""
        mesh = self._scalar.mesh()
        local = mesh.coordinates.dat.data_ro.reshape(-1, mesh.geometric_dimension)
        ends = np.stack([local.min(axis=0, initial=np.inf), -local.max(axis=0, initial=-np.inf)])
        self.comm.Allreduce(MPI.IN_PLACE, ends, MPI.MIN)
        return ends[0], -ends[1]

    def cells(self) -> np.ndarray:
        """The nodes, by number, of the cells this rank owns: shape (cells, nodes of a cell)."""
        cell_nodes = self._scalar.cell_node_map()
        local = cell_nodes.values
        if self._scalar.mesh().extruded:  # the map has the lowest layer's
            layers = self._scalar.mesh().layers
            if np.ndim(layers):
                raise ValueError(
                    "expected an extruded mesh of as many layers everywhere, found one whose layers"
                    " vary"
                )
            local = local[:, None] + np.arange(layers - 1)[:, None] * cell_nodes.offset
        numbers = self._scalar.dof_dset.lgmap.apply(local.ravel().astype(PETSc.IntType))
        return numbers.astype(np.int64).reshape(-1, cell_nodes.arity)


def _checked(space, period: Sequence[float] | None) -> tuple[str, list[float] | None]:
    """The element of a space, and its period, where nodes can be made of them.

    Raises
    ------
    TypeError, ValueError
        Where they cannot.
    """
    if len(space) > 1:
        raise ValueError(
            f"{space} is mixed: take its parts one by one, and give the layer one output for each"
        )
    element = space.ufl_element()
    if (family := element.family()) not in _NODAL:
        raise ValueError(
            f"unknowns of {family} elements are not values at points: expected {', '.join(_NODAL)}"
        )
    mesh = space.mesh()
    if period is None and mesh.coordinates.function_space().ufl_element() not in H1:
        raise ValueError(
            f"{mesh} is periodic: name its period, so that its ends are taken for the same points"
        )
    return str(element), checked_period(period, mesh.geometric_dimension)


def checked_period(period: Sequence[float] | None, dimension: int) -> list[float] | None:
    """The extent of a periodic mesh in each direction.

    Raises
    ------
    TypeError, ValueError
        Where there is not a positive number, or infinity, for each.
    """
    if period is None:
        return None
    try:
        lengths = None if isinstance(period, (str, bytes)) else list(period)
    except TypeError:
        lengths = None
    if lengths is None:
        raise TypeError(
            "period must have a number for each direction, such as [1.0, inf], found "
            f"{shown(period)}"
        )
    if len(lengths) != dimension:
        raise ValueError(
            f"expected {dimension} periods, one for each direction, found {len(lengths)}"
        )
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, Real) or not length > 0:
            raise ValueError(
                "a period must be a positive number, or infinite where a mesh is not "
                f"periodic, found {shown(length)}"
            )
    return [float(length) for length in lengths]


def _check_period(mesh, period: Sequence[float]) -> None:
    """Raise where the mesh has another period, on all ranks; collective.

    Both sides of a periodic mesh's ends are the same nodes of a continuous space, which has the
    coordinates of one. So coordinates in cells are either those of the nodes, or differ by the
    period.
    """
    with stop_annotating():
        coordinates = SpatialCoordinate(mesh)
        at_nodes = Function(VectorFunctionSpace(mesh, "CG", 1)).interpolate(coordinates)
        by_cell = at_nodes.function_space().broken_space()
        jumps = np.abs(Function(by_cell).interpolate(at_nodes - coordinates).dat.data_ro)
    jumps = jumps.reshape(-1, len(period))
    finite = np.isfinite(period)
    multiples = np.where(finite, np.rint(jumps / period), 0)
    off = np.abs(jumps - multiples * np.where(finite, period, 0))
    size = np.where(finite, period, np.abs(mesh.coordinates.dat.data_ro).max(initial=0))
    found = np.stack(
        [
            jumps.max(axis=0, initial=0),
            (off > _ROUNDING * size).max(axis=0, initial=0),
            multiples.max(axis=0, initial=0),
        ]
    )
    mesh.comm.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
    for direction, (largest, is_wrong, multiple) in enumerate(found.T):
        if is_wrong or (finite[direction] and multiple != 1):
            has = (
                f"a period of {largest:g}" if largest > _ROUNDING * size[direction] else "no period"
            )
            raise ValueError(
                f"{mesh} has {has} in direction {direction}, found period {period[direction]:g}: "
                "give its extent in directions in which it is periodic, and infinity in others"
            )


def pairs_of(cells: np.ndarray) -> np.ndarray:
    """Shape (pairs, 2): nodes (from, to) of the same cell, each once, in both directions.

    Raises
    ------
    ValueError
        Where a cell has a single node.
    """
    width = cells.shape[1]
    if width == 1:
        raise ValueError(
            "there are no edges between nodes of a cell where each cell has a single one: use a"
            " continuous space"
        )
    return unique_pairs(
        np.concatenate([cells[:, [i, j]] for i in range(width) for j in range(width) if i != j])
    )


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """Rows (from, to) of an array, sorted, each once."""
    count = pairs.max(initial=0) + 1
    # As single numbers: several times as fast as NumPy compares rows.
    return np.stack(np.divmod(np.unique(pairs[:, 0] * count + pairs[:, 1]), count), axis=1)
