"""Graphs of meshes: which nodes are neighbours, and means over these that are derivatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from prdp_fem.arguments import shown
from prdp_fem.training.exchange import Exchange
from prdp_fem.training.nodes import checked_period
from prdp_fem.training.reduction import total

__all__ = ["checked_graph", "neighbour_means"]

# Of the extent of a mesh: points that are closer to each other are the same, as for a Gathering.
_SAME_POINT = 2e-9


def checked_graph(
    edges, coordinates, period, halo: Exchange | None
) -> tuple[torch.Tensor, torch.Tensor, list[float] | None]:
    """Edges, coordinates and period of a graph, as the weights of its edges are made of them.

    Raises
    ------
    TypeError, ValueError
        For edges between nodes that there are not, and coordinates or a period that make no
        directions of them.
    """
    try:
        coordinates = torch.as_tensor(coordinates, device="cpu")
        edges = torch.as_tensor(edges, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "edges and coordinates must be tensors or arrays of numbers, found "
            f"{shown(edges)} and {shown(coordinates)}"
        ) from None
    coordinates = _checked_coordinates(coordinates, halo)
    edges = _checked_edges(edges, len(coordinates), halo)
    period = checked_period(period, coordinates.shape[1])
    if edges.numel():
        _check_lengths(edges, coordinates, period)
    return edges, coordinates, period


def _checked_coordinates(coordinates: torch.Tensor, halo: Exchange | None) -> torch.Tensor:
    """Shape (n, d): of the nodes that edges may begin at."""
    if coordinates.is_complex():
        raise TypeError(f"coordinates must be real numbers, found {coordinates.dtype}")
    coordinates = coordinates.to(torch.float64)
    lacks_nodes = halo is None and len(coordinates) == 0
    if coordinates.ndim != 2 or coordinates.shape[1] == 0 or lacks_nodes:
        raise ValueError(f"coordinates must have shape (n, d), found {tuple(coordinates.shape)}")
    if not coordinates.isfinite().all():
        wrong = (~coordinates.isfinite().all(dim=1)).nonzero().flatten()
        raise ValueError(
            f"coordinates must be finite, found {coordinates[wrong[0]].tolist()} at node "
            f"{int(wrong[0])} and {len(wrong) - 1} more: look for NaN or infinity in the mesh"
        )
    if halo is not None and len(coordinates) != len(halo.wanted):
        raise ValueError(
            f"coordinates must be those of the {len(halo.wanted)} nodes that the halo "
            f"gives, found {len(coordinates)}"
        )
    return coordinates


def _checked_edges(edges: torch.Tensor, nodes: int, halo: Exchange | None) -> torch.Tensor:
    """Shape (2, e): from any node to one that this rank owns."""
    if edges.ndim != 2 or len(edges) != 2 or (halo is None and edges.shape[1] == 0):
        raise ValueError(
            f"edges must have shape (2, e), from which node to which, found {tuple(edges.shape)}"
        )
    if edges.is_floating_point() or edges.is_complex() or edges.dtype == torch.bool:
        raise TypeError(f"edges must be integers, the numbers of nodes, found {edges.dtype}")
    edges = edges.long()
    owned = nodes if halo is None else halo.owned
    for name, ends, there in (("from", edges[0], nodes), ("to", edges[1], owned)):
        if ends.numel() and (ends.min() < 0 or ends.max() >= there):
            raise ValueError(
                f"edges must go {name} nodes 0 to {there - 1}, found "
                f"{int(ends.min())} to {int(ends.max())}"
            )
    return edges


def _check_lengths(
    edges: torch.Tensor, coordinates: torch.Tensor, period: Sequence[float] | None
) -> None:
    """Raise for edges without a length, and for those that a wrong period leaves too long."""
    offset = _offsets(edges, coordinates, period)
    extent = coordinates.max(dim=0).values - coordinates.min(dim=0).values
    length, edge = offset.norm(dim=1).min(dim=0)
    if length <= _SAME_POINT * extent.max():
        raise ValueError(
            "nodes with an edge between them must lie at different points, found "
            f"{edges[:, edge].tolist()} both at {coordinates[edges[1, edge]].tolist()}"
        )
    for direction, size in enumerate(period or ()):
        # With a longer period than the mesh has, edges across its ends are as long as all of it.
        longest = offset[:, direction].abs().max()
        at_most = 1.5 * _step(coordinates[:, direction])
        if math.isfinite(size) and longest > max(float(extent[direction]) / 2, at_most):
            raise ValueError(
                f"period {size:g} in direction {direction} leaves edges that go through half of "
                "the mesh, whose coordinates have an extent of "
                f"{extent[direction]:g} there: give that of the mesh"
            )


def _step(values: torch.Tensor) -> float:
    """The largest distance between neighbours among some numbers."""
    return float(values.sort().values.diff().max()) if len(values) > 1 else 0.0


def _offsets(
    edges: torch.Tensor, coordinates: torch.Tensor, period: Sequence[float] | None
) -> torch.Tensor:
    """Shape (e, d): from which end of each edge to which, the short way round."""
    offset = coordinates[edges[0]] - coordinates[edges[1]]
    if period is None:
        return offset
    lengths = torch.as_tensor(period, dtype=offset.dtype, device=offset.device)
    return offset - torch.where(
        torch.isfinite(lengths), lengths * torch.round(offset / lengths), 0.0
    )


def neighbour_means(
    edges: torch.Tensor,
    coordinates: torch.Tensor,
    period: Sequence[float] | None = None,
    halo: Exchange | None = None,
) -> torch.Tensor:
    """Shape ((d + 1) m, n), sparse: the mean difference to the neighbours, and each component of
    the gradient by least squares.

    Of m nodes, with a halo those that this rank owns, among n. Lengths are in units of the mean
    edge, and the mean difference is scaled to the Laplacian where neighbours lie evenly.
    """
    source, target = edges.to(coordinates.device)
    n, dimension = coordinates.shape
    m = n if halo is None else halo.owned
    offset = _offsets(edges, coordinates, period)
    length = offset.norm(dim=-1).sum()
    count = torch.tensor(len(source), device=offset.device)
    if halo is not None:
        length, count = total(length, halo.comm), total(count, halo.comm)
    offset = offset / (length / count)
    share = 1 / torch.bincount(target, minlength=m)[target].to(offset.dtype)
    moments = offset.new_zeros(m, dimension, dimension).index_add(
        0, target, share[:, None, None] * offset[:, :, None] * offset[:, None]
    )
    gradient = share[:, None] * torch.einsum(
        "eij,ej->ei", torch.linalg.pinv(moments, rtol=1e-6, hermitian=True)[target], offset
    )
    weights = torch.cat([2 * dimension * share[None], gradient.T]).flatten()  # (d + 1) e
    operator = torch.arange(dimension + 1, device=offset.device).repeat_interleave(len(source)) * m
    rows, columns = operator + target.repeat(dimension + 1), source.repeat(dimension + 1)
    own = target.repeat(dimension + 1)
    return torch.sparse_coo_tensor(
        torch.cat([torch.stack([rows, columns]), torch.stack([rows, own])], dim=1),
        torch.cat([weights, -weights]),
        ((dimension + 1) * m, n),
        device=offset.device,
        check_invariants=True,
    ).coalesce()
