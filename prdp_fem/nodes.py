"""The nodes of a space: where they are, how ranks number them, and which are of the same cell."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from firedrake import H1, Function, FunctionSpace, SpatialCoordinate, VectorFunctionSpace
from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["Nodes", "pairs_of", "unique_pairs"]

# Elements whose unknowns are values at points.
_NODAL = ("Lagrange", "Q", "Discontinuous Lagrange", "DQ", "Kong-Mulder-Veldhuizen")


class Nodes:
    """The nodes of a space that this rank owns.

    Parameters
    ----------
    space : FunctionSpace
        Scalar or vector-valued, not mixed, with unknowns that are values at points.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction, infinite in directions in which it is not periodic.

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
    ValueError
        Where the space is mixed, where its unknowns are not values at points, where the mesh is periodic and no period is given, or where
        ``period`` has not a number for each direction.
    """

    def __init__(self, space: FunctionSpace, period: Sequence[float] | None = None):
        if len(space) > 1:
            raise ValueError(f"{space} is mixed: take its parts one by one, and give the layer one output for each")
        dimension = space.mesh().geometric_dimension
        if (family := space.ufl_element().family()) not in _NODAL:
            raise ValueError(f"unknowns of {family} elements are not values at points: expected {', '.join(_NODAL)}")
        if period is None and space.mesh().coordinates.function_space().ufl_element() not in H1:
            raise ValueError(f"{space.mesh()} is periodic: name its period, so that its ends are taken for the same points")
        if period is not None and len(period) != dimension:
            raise ValueError(f"expected {dimension} periods, one for each direction, found {len(period)}")
        self.comm = space.mesh().comm
        self.components = space.block_size
        self._scalar = space if space.block_size == 1 else space.sub(0).collapse()
        points = VectorFunctionSpace(space.mesh(), self._scalar.ufl_element())
        self.coordinates = Function(points).interpolate(SpatialCoordinate(space.mesh())).dat.data_ro.reshape(-1, dimension)
        self.sizes = self.comm.allgather(len(self.coordinates))
        self.first = sum(self.sizes[:self.comm.rank])

    def __len__(self) -> int:
        return len(self.coordinates)

    def bounding_box(self) -> tuple[np.ndarray, np.ndarray]:
        """The mesh's lowest and highest coordinates; of a periodic one those of both of its ends. Collective."""
        mesh = self._scalar.mesh()
        local = mesh.coordinates.dat.data_ro.reshape(-1, mesh.geometric_dimension)
        ends = np.stack([local.min(axis=0, initial=np.inf), -local.max(axis=0, initial=-np.inf)])
        self.comm.Allreduce(MPI.IN_PLACE, ends, MPI.MIN)
        return ends[0], -ends[1]

    def cells(self) -> np.ndarray:
        """Shape (cells, nodes of a cell): the nodes, by number, of the cells that this rank owns."""
        cell_nodes = self._scalar.cell_node_map()
        local = cell_nodes.values
        if self._scalar.mesh().extruded:  # the map has the lowest layer's
            layers = self._scalar.mesh().layers
            if np.ndim(layers):
                raise ValueError("expected an extruded mesh of as many layers everywhere, found one whose layers vary")
            local = local[:, None] + np.arange(layers - 1)[:, None]*cell_nodes.offset
        numbers = self._scalar.dof_dset.lgmap.apply(local.ravel().astype(PETSc.IntType))
        return numbers.astype(np.int64).reshape(-1, cell_nodes.arity)


def pairs_of(cells: np.ndarray) -> np.ndarray:
    """Shape (pairs, 2): nodes (from, to) of the same cell, each once, in both directions.

    Raises
    ------
    ValueError
        Where a cell has a single node.
    """
    width = cells.shape[1]
    if width == 1:
        raise ValueError("there are no edges between nodes of a cell where each cell has a single one: use a continuous space")
    return unique_pairs(np.concatenate([cells[:, [i, j]] for i in range(width) for j in range(width) if i != j]))


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """Rows (from, to) of an array, sorted, each once."""
    count = pairs.max(initial=0) + 1
    # As single numbers: several times as fast as NumPy compares rows.
    return np.stack(np.divmod(np.unique(pairs[:, 0]*count + pairs[:, 1]), count), axis=1)
