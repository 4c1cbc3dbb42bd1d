"""Fields as networks see them on a distributed mesh: each rank its own nodes, and ghosts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from firedrake import FunctionSpace

from prdp_fem.arguments import instance
from prdp_fem.training.exchange import Exchange
from prdp_fem.training.nodes import Nodes, pairs_of, unique_pairs

__all__ = ["Partition"]


class Partition:
    """The nodes of a space that this rank owns, and their neighbours on other ranks (ghosts).

    For networks that look at neighbours only, such as a :class:`~prdp_fem.torch.GraphNetwork`, or
    at single nodes: each rank computes its own part, where with a
    :class:`~prdp_fem.torch.Gathering` each computes the whole. Ghosts are numbered behind the
    rank's own nodes, and :attr:`halo` fetches their values. What a rank's backward pass gives is
    the part of a gradient that comes from its part of the loss and of the network; the sum over the
    ranks is the gradient.

    Parameters
    ----------
    space : FunctionSpace
        Scalar or vector-valued, not mixed, with unknowns that are values at points.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction; infinite in directions in which it is not.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
    components : int
        Values at each node.
    coordinates : np.ndarray
        Shape (nodes, d), ghosts included.
    edges : torch.Tensor
        Shape (2, e): from which node to which own node of the same cell. On all ranks together,
        those of a :class:`~prdp_fem.torch.Gathering`.
    halo : Exchange
        From values of own nodes, shape (own nodes, ...), to those of own nodes and ghosts, shape
        (nodes, ...); collective.

    Raises
    ------
    ValueError
        As :class:`~prdp_fem.torch.Gathering`, and where a cell has a single node.
    """

    def __init__(self, space: FunctionSpace, *, period: Sequence[float] | None = None):
        nodes = Nodes(space, period)
        self.comm = nodes.comm
        self.components = nodes.components
        self._owned = len(nodes)
        source, target = _edges_to_own_nodes(nodes).T
        own = np.arange(nodes.first, nodes.first + len(nodes))
        numbers = np.concatenate([own, np.setdiff1d(source, own)])
        place = np.argsort(numbers)
        self.edges = torch.from_numpy(
            np.stack([place[np.searchsorted(numbers, source, sorter=place)], target - nodes.first])
        )
        self.halo = Exchange(self.comm, len(nodes), numbers)
        self.coordinates = self.halo(torch.tensor(nodes.coordinates, device="cpu")).numpy()

    def __len__(self) -> int:
        """The nodes that this rank owns."""
        return self._owned

    def by_node(self, local: torch.Tensor) -> torch.Tensor:
        """Values of this rank's nodes, from its unknowns as solver layers take and return them.

        Parameters
        ----------
        local : torch.Tensor
            Shape (..., m).

        Returns
        -------
        torch.Tensor
            Shape (..., components, own nodes).

        Raises
        ------
        TypeError, ValueError
            For what is no tensor, and for another last axis.
        """
        instance("local", local, torch.Tensor, "a tensor")
        if local.shape[-1:] != (self._owned * self.components,):
            raise ValueError(
                f"expected a last axis of {self._owned * self.components} (the unknowns that this "
                f"rank owns), found shape {tuple(local.shape)}"
            )
        return local.unflatten(-1, (self._owned, self.components)).movedim(-1, -2)

    def by_unknown(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse of ``by_node``, and raises as it: (..., components, nodes) to (..., m)."""
        instance("values", values, torch.Tensor, "a tensor")
        if values.shape[-2:] != (self.components, self._owned):
            raise ValueError(
                f"expected last axes of {(self.components, self._owned)} (components, and the "
                f"nodes that this rank owns), found shape {tuple(values.shape)}"
            )
        return values.movedim(-2, -1).flatten(-2)


def _edges_to_own_nodes(nodes: Nodes) -> np.ndarray:
    """Shape (e, 2): all edges (from, to) to nodes of this rank, by number. The cell that makes one
    may be another rank's.
    """
    pairs = pairs_of(nodes.cells())
    bounds = np.searchsorted(np.cumsum(nodes.sizes), pairs[:, 1], side="right")
    received = nodes.comm.alltoall([pairs[bounds == rank] for rank in range(nodes.comm.size)])
    return unique_pairs(np.concatenate(received))
