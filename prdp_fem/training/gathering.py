"""Fields as networks see them: whole, in an order that doesn't depend on how ranks share them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from firedrake import FunctionSpace

from prdp_fem.arguments import instance
from prdp_fem.training.exchange import Exchange, agree_on_axes
from prdp_fem.training.nodes import Nodes, checked_period, pairs_of
from prdp_fem.training.reduction import total

__all__ = ["Gathering"]

# Steps across the mesh that coordinates are told apart by.
_RESOLUTION = 10**9


class Gathering:
    """All unknowns of a space on all ranks, sorted by coordinates.

    A solver layer takes and returns the unknowns that a rank owns, in PETSc's order. A network that
    looks at a whole field (an MLP, convolutions, a graph network) needs them all, in the same order
    on any number of ranks. On a structured mesh that order is that of the grid, the first
    coordinate slowest.

    Each rank computes the whole network and its own part of the loss. Gradients are taken
    accordingly: what a rank's backward pass gives is the part that comes from its part of the loss,
    and the sum over the ranks is the gradient.

    Parameters
    ----------
    space : FunctionSpace
        Scalar or vector-valued, not mixed, with unknowns that are values at distinct points.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction: coordinates are taken modulo it. Infinite in
        directions in which it is not.

    Attributes
    ----------
    coordinates : np.ndarray
        Shape (n, d): the points, sorted.
    components : int
        Values at each point.

    Raises
    ------
    TypeError
        Where the space is none.
    ValueError
        Where the space is mixed, where its unknowns are not values at distinct points, where
        coordinates are not finite, where the mesh is periodic and no period is given, where it has
        another period, or where ``period`` has not a number for each direction.
    """

    def __init__(self, space: FunctionSpace, *, period: Sequence[float] | None = None):
        self._nodes = nodes = Nodes(space, period)
        period = checked_period(period, nodes.coordinates.shape[1])
        self.comm, self.components = nodes.comm, nodes.components
        everywhere = np.concatenate(self.comm.allgather(nodes.coordinates))
        # Coordinates that differ by rounding are the same: compared as integers. Of a periodic mesh
        # either end may stand for both.
        lower, upper = nodes.bounding_box()
        extent = (upper - lower).max()
        if not extent > 0:
            raise ValueError(
                f"all nodes of {space} lie at the same point {lower.tolist()}: the "
                "mesh has no extent"
            )
        marks = np.rint((everywhere - lower) / extent * _RESOLUTION).astype(np.int64)
        for direction, length in enumerate([] if period is None else period):
            if np.isfinite(length):
                marks[:, direction] %= round(length / extent * _RESOLUTION)
        if len(np.unique(marks, axis=0)) < len(marks):
            raise ValueError(
                f"several unknowns of {space} lie at the same point, so that sorting by coordinates"
                " gives them no order: use a continuous space of nodal values"
                + ("" if period else ", and name the period of a periodic mesh")
            )
        order = np.lexsort(marks.T[::-1])
        self._place = np.argsort(order)
        self._marks = marks[order]
        if period is None:
            self.coordinates = everywhere[order]
        else:
            self.coordinates = lower + self._marks * (extent / _RESOLUTION)
        self._mine = torch.from_numpy(self._place[nodes.first : nodes.first + len(nodes)])
        self._exchange = Exchange(self.comm, len(nodes), order)

    def __len__(self) -> int:
        return len(self._place)

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
            raise ValueError(
                f"the {len(self)} points do not form a grid: their coordinates have"
                f" {' x '.join(map(str, shape))} values"
            )
        return shape

    @cached_property
    def cells(self) -> np.ndarray:
        """Shape (cells, nodes of a cell): the nodes of all cells of the mesh, as numbers in this
        order; collective at first.
        """
        cells = self._place[np.concatenate(self.comm.allgather(self._nodes.cells()))]
        return cells[np.lexsort(np.sort(cells, axis=1).T[::-1])]

    @cached_property
    def edges(self) -> torch.Tensor:
        """Shape (2, edges): pairs of nodes (from, to) of the same cell, in both directions;
        collective at first.

        For linear elements on triangles, tetrahedra and intervals, these are the edges of the mesh.

        Raises
        ------
        ValueError
            Where a cell has a single node.
        """
        return torch.from_numpy(pairs_of(self.cells).T.copy())

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
        expected = len(self._nodes) * self.components
        agree_on_axes(
            self.comm,
            local,
            -1,
            expected,
            f"a last axis of {expected} (the unknowns that this rank owns)",
        )
        whole = self._exchange.without_agreement(
            local.unflatten(-1, (-1, self.components)), axis=-2
        )
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
        instance("whole", whole, torch.Tensor, "a tensor")
        expected = (len(self),) if self.components == 1 else (self.components, len(self))
        if whole.shape[-len(expected) :] != expected:
            raise ValueError(f"expected last axes of {expected}, found shape {tuple(whole.shape)}")
        mine = whole.index_select(-1, self._mine)
        return mine if self.components == 1 else mine.movedim(-2, -1).flatten(-2)

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor without gradients, as part of an error; collective."""
        return total(part, self.comm)
