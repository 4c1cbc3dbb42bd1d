"""Fields as networks see them: whole, and in an order that does not depend on how ranks share them."""
from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from firedrake import H1, Function, FunctionSpace, SpatialCoordinate, VectorFunctionSpace
from mpi4py import MPI
from petsc4py import PETSc

__all__ = ["Gathering"]


class Gathering:
    """All unknowns of a space on all ranks, sorted by coordinates.

    A solver layer takes and returns the unknowns that a rank owns, in PETSc's order. A network that looks at a whole field (an
    MLP, convolutions, a graph network) needs them all, in the same order on any number of ranks. On a structured mesh that
    order is that of the grid, the first coordinate slowest.

    Each rank computes the whole network and its own part of the loss. Gradients are taken accordingly: what a rank's backward pass
    gives is the part that comes from its part of the loss, and the sum over the ranks is the gradient.

    Parameters
    ----------
    space : FunctionSpace
        Scalar or vector-valued, not mixed, with unknowns that are values at distinct points.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction: coordinates are taken modulo it. Infinite in directions in which it is not.

    Attributes
    ----------
    coordinates : np.ndarray
        Shape (n, d): the points, sorted.
    components : int
        Values at each point.

    Raises
    ------
    ValueError
        Where the space is mixed, where its unknowns are not values at distinct points, where the mesh is periodic and no period is given,
        or where ``period`` has not a number for each direction.
    """

    def __init__(self, space: FunctionSpace, *, period: Sequence[float] | None = None):
        if len(space) > 1:
            raise ValueError(f"{space} is mixed: make a Gathering for each of its parts, and give the layer one output for each")
        dimension = space.mesh().geometric_dimension
        if (family := space.ufl_element().family()) not in _NODAL:
            raise ValueError(f"unknowns of {family} elements are not values at points: expected {', '.join(_NODAL)}")
        if period is None and space.mesh().coordinates.function_space().ufl_element() not in H1:
            raise ValueError(f"{space.mesh()} is periodic: name its period, so that its ends are taken for the same points")
        if period is not None and len(period) != dimension:
            raise ValueError(f"expected {dimension} periods, one for each direction, found {len(period)}")
        self.comm = space.mesh().comm
        self.components = space.block_size
        self._nodes = space if space.block_size == 1 else space.sub(0).collapse()
        points = VectorFunctionSpace(space.mesh(), self._nodes.ufl_element())
        local = Function(points).interpolate(SpatialCoordinate(space.mesh())).dat.data_ro.reshape(-1, dimension)
        self._sizes = self.comm.allgather(len(local))
        everywhere = np.concatenate(self.comm.allgather(local))
        # Coordinates that differ by rounding are the same: compared as integers. Of a periodic mesh either end may stand for both.
        lower, upper = _bounding_box(space.mesh())
        extent = (upper - lower).max()
        marks = np.rint((everywhere - lower)/extent*_RESOLUTION).astype(np.int64)
        for direction, length in enumerate([] if period is None else period):
            if np.isfinite(length):
                marks[:, direction] %= round(length/extent*_RESOLUTION)
        if len(np.unique(marks, axis=0)) < len(marks):
            raise ValueError(f"several unknowns of {space} lie at the same point, so that sorting by coordinates gives them no order: "
                             "use a continuous space of nodal values" + ("" if period else ", and name the period of a periodic mesh"))
        self._order = np.lexsort(marks.T[::-1])
        self._place = np.argsort(self._order)
        self._marks = marks[self._order]
        self.coordinates = lower + self._marks*(extent/_RESOLUTION) if period is not None else everywhere[self._order]
        first = sum(self._sizes[:self.comm.rank])
        self._mine = torch.from_numpy(self._place[first:first + self._sizes[self.comm.rank]])
        self._sorted = torch.from_numpy(self._order)

    def __len__(self) -> int:
        return len(self._order)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The points in each direction, where they form a structured grid.

        Raises
        ------
        ValueError
            Where they do not.
        """
        shape = tuple(len(np.unique(marks)) for marks in self._marks.T)
        if np.prod(shape) != len(self):
            raise ValueError(f"the {len(self)} points do not form a grid: their coordinates have {' x '.join(map(str, shape))} values")
        return shape

    @cached_property
    def cells(self) -> np.ndarray:
        """Shape (cells, nodes of a cell): the nodes of all cells of the mesh, as numbers in this order; collective at first."""
        cell_nodes, width = self._nodes.cell_node_map(), self._nodes.cell_node_map().arity
        local = cell_nodes.values
        if self._nodes.mesh().extruded:  # the map has the lowest layer's
            layers = self._nodes.mesh().layers
            if np.ndim(layers):
                raise ValueError("expected an extruded mesh of as many layers everywhere, found one whose layers vary")
            local = local[:, None] + np.arange(layers - 1)[:, None]*cell_nodes.offset
        nodes = self._nodes.dof_dset.lgmap.apply(local.ravel().astype(PETSc.IntType))
        cells = self._place[np.concatenate(self.comm.allgather(nodes)).astype(np.int64)].reshape(-1, width)
        return cells[np.lexsort(np.sort(cells, axis=1).T[::-1])]

    @cached_property
    def edges(self) -> torch.Tensor:
        """Shape (2, edges): pairs of nodes (from, to) of the same cell, in both directions; collective at first.

        For linear elements on triangles, tetrahedra and intervals, these are the edges of the mesh.

        Raises
        ------
        ValueError
            Where a cell has a single node.
        """
        width = self.cells.shape[1]
        if width == 1:
            raise ValueError("there are no edges between nodes of a cell where each cell has a single one: use a continuous space")
        pairs = np.concatenate([self.cells[:, [i, j]] for i in range(width) for j in range(width) if i != j])
        return torch.from_numpy(np.unique(pairs, axis=0).T.copy())

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The whole field from this rank's part; collective, forward and backward.

        Parameters
        ----------
        local : torch.Tensor
            Shape (..., m): the unknowns that this rank owns, in PETSc's order.

        Returns
        -------
        torch.Tensor
            Shape (..., n) for one component, (..., components, n) for more; the same on all ranks.

        Raises
        ------
        ValueError
            For another last axis.
        """
        expected = self._sizes[self.comm.rank]*self.components
        if local.shape[-1] != expected:
            raise ValueError(f"expected a last axis of {expected} (the unknowns that this rank owns), found shape {tuple(local.shape)}")
        nodes = local.unflatten(-1, (-1, self.components))
        if self.comm.size > 1:
            nodes = _GatherNodes.apply(nodes, self.comm, self._sizes)
        whole = nodes.index_select(-2, self._sorted)
        return whole.squeeze(-1) if self.components == 1 else whole.movedim(-1, -2)

    def scatter(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole field: the inverse of ``gather``, without communication.

        Parameters
        ----------
        whole : torch.Tensor
            Shape (..., n) for one component, (..., components, n) for more.

        Returns
        -------
        torch.Tensor
            Shape (..., m).

        Raises
        ------
        ValueError
            For other last axes.
        """
        expected = (len(self),) if self.components == 1 else (self.components, len(self))
        if whole.shape[-len(expected):] != expected:
            raise ValueError(f"expected last axes of {expected}, found shape {tuple(whole.shape)}")
        mine = whole.index_select(-1, self._mine)
        return mine if self.components == 1 else mine.movedim(-2, -1).flatten(-2)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor without gradients, such as a part of an error; collective."""
        if self.comm.size == 1:
            return part.detach()
        summed = part.detach().clone().contiguous()
        self.comm.Allreduce(MPI.IN_PLACE, summed.numpy())
        return summed


# Elements whose unknowns are values at points.
_NODAL = ("Lagrange", "Q", "Discontinuous Lagrange", "DQ", "Kong-Mulder-Veldhuizen")

# Steps across the mesh that coordinates are told apart by.
_RESOLUTION = 10**9


def _bounding_box(mesh) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest coordinates; of a periodic mesh those of both of its ends."""
    local = mesh.coordinates.dat.data_ro.reshape(-1, mesh.geometric_dimension)
    ends = np.stack([local.min(axis=0, initial=np.inf), -local.max(axis=0, initial=-np.inf)])
    mesh.comm.Allreduce(MPI.IN_PLACE, ends, MPI.MIN)
    return ends[0], -ends[1]


class _GatherNodes(torch.autograd.Function):
    """Nodes of all ranks, one rank behind the other, along the axis before the last.

    Every rank goes on with the same values but its own part of the loss, so the cotangents of all ranks add up.
    """

    @staticmethod
    def forward(ctx, nodes, comm, sizes):
        ctx.comm, ctx.sizes = comm, sizes
        batch, components = nodes.shape[:-2], nodes.shape[-1]
        mine = nodes.detach().contiguous().numpy()
        counts = np.array(sizes)*(batch.numel()*components)
        received = np.empty(counts.sum(), mine.dtype)
        comm.Allgatherv(mine, (received, counts))
        parts = np.split(received, np.cumsum(counts)[:-1])
        return torch.from_numpy(np.concatenate([part.reshape(*batch, size, components) for part, size in zip(parts, sizes)], axis=-2))

    @staticmethod
    def backward(ctx, cotangent):
        summed = cotangent.clone(memory_format=torch.contiguous_format)
        ctx.comm.Allreduce(MPI.IN_PLACE, summed.numpy())
        return summed.split(ctx.sizes, dim=-2)[ctx.comm.rank], None, None
