"""The architectures of the PRDP paper, and a graph network for unstructured meshes.

All of them are meant for corrections and increments: their last layer starts at zero, so that adding their output changes nothing
at first.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

__all__ = ["MLP", "GraphNetwork", "ResNet"]


def _starts_at_zero(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class MLP(nn.Sequential):
    """Dense layers: shape (..., inputs) to (..., outputs).

    Parameters
    ----------
    inputs, outputs : int
    width : int
        Of hidden layers.
    depth : int
        Number of hidden layers, at least 1.
    activation : type
        The class of the nonlinearity.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int = 64, depth: int = 2, activation: type[nn.Module] = nn.Tanh):
        hidden = [nn.Sequential(nn.Linear(inputs if layer == 0 else width, width), activation()) for layer in range(depth)]
        super().__init__(*hidden, _starts_at_zero(nn.Linear(width, outputs)))


class _ResidualBlock(nn.Module):
    def __init__(self, convolution, width: int, activation: type[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(convolution(width, width), activation(), convolution(width, width))
        self.activation = activation()

    def forward(self, x):
        return self.activation(x + self.layers(x))


class ResNet(nn.Module):
    """Convolutions with residual blocks on the nodes of a structured grid: shape (..., inputs, n) to (..., outputs, n).

    Parameters
    ----------
    inputs, outputs : int
        Channels.
    grid : Sequence of int
        Nodes in each of one, two or three directions; their product is n.
    width : int
        Channels inside.
    blocks : int
        Residual blocks of two convolutions each, between the first and the last convolution.
    kernel : int
        Extent of the convolutions, odd.
    periodic : bool
        Whether the grid is periodic; else it is surrounded by zeros.
    activation : type
        The class of the nonlinearity.

    References
    ----------
    He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, CVPR 2016.
    """

    def __init__(self, inputs: int, outputs: int, grid: Sequence[int], *, width: int = 16, blocks: int = 2, kernel: int = 3,
                 periodic: bool = False, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        if len(grid) not in (1, 2, 3):
            raise ValueError(f"a grid has one, two or three directions, found {tuple(grid)}")
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, found {kernel}")
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1]

        def convolution(inputs, outputs):
            return kind(inputs, outputs, kernel, padding=kernel//2, padding_mode="circular" if periodic else "zeros")

        self.grid = tuple(grid)
        self.layers = nn.Sequential(convolution(inputs, width), activation(),
                                    *(_ResidualBlock(convolution, width, activation) for _ in range(blocks)),
                                    _starts_at_zero(convolution(width, outputs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x.reshape(-1, x.shape[-2], *self.grid))
        return y.reshape(*x.shape[:-2], -1, x.shape[-1])


class GraphNetwork(nn.Module):
    """Messages passed along the edges of a mesh: shape (..., inputs, n) to (..., outputs, n).

    A node's state changes by what it makes of the mean of its neighbours' messages, and of itself; a message depends on both
    ends of an edge and on its length and direction. The first layer of a message is linear in both states before its
    nonlinearity, and the last one linear behind it, so both are applied at nodes: edges cost sums, not matrix products.

    Parameters
    ----------
    inputs, outputs : int
        Values at a node.
    edges : torch.Tensor
        Shape (2, e): from which node to which; :attr:`prdp_fem.torch.Gathering.edges`.
    coordinates : array-like
        Shape (n, d).
    width : int
        Size of a node's state.
    steps : int
        How often messages are passed: as many edges far a node can see.
    activation : type
        The class of the nonlinearity.

    References
    ----------
    Pfaff, Fortunato, Sanchez-Gonzalez, Battaglia, *Learning mesh-based simulation with graph networks*, ICLR 2021.
    """

    def __init__(self, inputs: int, outputs: int, edges: torch.Tensor, coordinates, *, width: int = 32, steps: int = 4,
                 activation: type[nn.Module] = nn.GELU):
        super().__init__()
        dtype = torch.get_default_dtype()
        coordinates = torch.as_tensor(coordinates, dtype=dtype)
        source, target = edges
        offset = coordinates[source] - coordinates[target]
        offset = offset/offset.norm(dim=-1).mean()
        degree = torch.bincount(target, minlength=len(coordinates)).clamp(min=1)
        self.register_buffer("source", source, persistent=False)
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("geometry", torch.cat([offset, offset.norm(dim=-1, keepdim=True)], dim=-1), persistent=False)
        # The mean over the messages at a node as a product with a sparse matrix: (n, e).
        mean = torch.sparse_coo_tensor(torch.stack([target, torch.arange(len(target))]), 1/degree[target].to(dtype),
                                       (len(coordinates), len(target))).coalesce()
        self.register_buffer("mean", mean, persistent=False)
        self.activation = activation()
        self.encode = nn.Linear(inputs, width)
        self.send = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        self.receive = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(steps))
        self.along = nn.ModuleList(nn.Linear(self.geometry.shape[1], width, bias=False) for _ in range(steps))
        self.update = nn.ModuleList(nn.Linear(2*width, width) for _ in range(steps))
        self.mix = nn.ModuleList(nn.Linear(width, width) for _ in range(steps))
        self.decode = _starts_at_zero(nn.Linear(width, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch = x.shape[:-2]
        # Nodes first, so that gathering along edges copies rows, and averaging is one product for all samples.
        state = self.encode(x.reshape(-1, *x.shape[-2:]).permute(2, 0, 1))
        for send, receive, along, update, mix in zip(self.send, self.receive, self.along, self.update, self.mix):
            message = self.activation(send(state).index_select(0, self.source) + receive(state).index_select(0, self.target)
                                      + along(self.geometry)[:, None])
            mean = (self.mean @ message.flatten(1)).view_as(state)
            state = state + mix(self.activation(update(torch.cat([state, mean], dim=-1))))
        return self.decode(state).permute(1, 2, 0).reshape(*batch, -1, x.shape[-1])
