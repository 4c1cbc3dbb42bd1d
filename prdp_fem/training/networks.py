"""The architectures of the PRDP paper, and a graph network for unstructured meshes.

All of them are meant for corrections and increments: their last layer starts at zero, so that
adding their output changes nothing at first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from prdp_fem.arguments import flag, instance, shown, whole_number
from prdp_fem.ranks.agreement import agree
from prdp_fem.training.exchange import Exchange
from prdp_fem.training.graphs import checked_graph, neighbour_means
from prdp_fem.training.sparse_product import SparseProduct

__all__ = ["MLP", "GraphNetwork", "ResNet"]


def _starts_at_zero(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, Integral) and size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")
        whole_number(name, size)


def _made(activation) -> nn.Module:
    """A nonlinearity of a class."""
    if isinstance(activation, nn.Module) or not callable(activation):
        raise TypeError(
            "activation must be a class of modules, such as torch.nn.Tanh, found "
            f"{shown(activation)}"
        )
    try:
        made = activation()
    except TypeError:
        made = None
    if not isinstance(made, nn.Module):
        raise TypeError(
            "activation must be a class of modules that needs no arguments, such as "
            f"torch.nn.Tanh, found {shown(activation)}"
        )
    return made


def _check_values(x, *sizes: int, weight: torch.Tensor) -> None:
    """Raise for what a network is not made for; ``sizes`` are those of the last axes, and
    ``weight`` one of its parameters.
    """
    instance("x", x, torch.Tensor, "a tensor")
    if x.shape[-len(sizes) :] != sizes:
        raise ValueError(f"expected last axes of {sizes}, found shape {tuple(x.shape)}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"expected {weight.dtype}, as the network's parameters are, found "
            f"{x.dtype}: convert one of them by .to()"
        )


class MLP(nn.Module):
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

    Raises
    ------
    TypeError, ValueError
        For sizes or a depth below 1, and for another activation than a class.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 2,
        activation: type[nn.Module] = nn.Tanh,
    ):
        super().__init__()
        _check_sizes(inputs=inputs, outputs=outputs, width=width, depth=depth)
        hidden = [
            nn.Sequential(nn.Linear(inputs if layer == 0 else width, width), _made(activation))
            for layer in range(depth)
        ]
        self.layers = nn.Sequential(*hidden, _starts_at_zero(nn.Linear(width, outputs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: Any = self.layers[0]
        first = hidden[0]
        _check_values(x, first.in_features, weight=first.weight)
        return self.layers(x)


class _ResidualBlock(nn.Module):
    def __init__(self, convolution, width: int, activation: type[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(
            convolution(width, width), _made(activation), convolution(width, width)
        )
        self.activation = _made(activation)

    def forward(self, x):
        return self.activation(x + self.layers(x))


class ResNet(nn.Module):
    """Convolutions with residual blocks on the nodes of a structured grid: shape (..., inputs, n)
    to (..., outputs, n).

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

    Raises
    ------
    TypeError, ValueError
        For another grid, sizes below 1, an even kernel or one that reaches round a periodic grid,
        and another activation than a class.

    References
    ----------
    He, Zhang, Ren, Sun, *Deep residual learning for image recognition*, CVPR 2016.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        grid: Sequence[int],
        *,
        width: int = 16,
        blocks: int = 2,
        kernel: int = 3,
        periodic: bool = False,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        instance("grid", grid, Sequence, "a sequence of integers, the nodes in each direction")
        if len(grid) not in (1, 2, 3):
            raise ValueError(f"a grid has one, two or three directions, found {shown(tuple(grid))}")
        grid = tuple(whole_number("a number of nodes of a grid", nodes) for nodes in grid)
        _check_sizes(inputs=inputs, outputs=outputs, width=width, kernel=kernel)
        whole_number("blocks", blocks, 0)
        if kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, found {kernel}")
        if flag("periodic", periodic) and kernel // 2 > min(grid):
            raise ValueError(
                f"kernel must not reach round a periodic grid of {min(grid)} nodes, found {kernel}"
            )
        self.inputs = inputs
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(grid) - 1]

        def convolution(inputs, outputs):
            return kind(
                inputs,
                outputs,
                kernel,
                padding=kernel // 2,
                padding_mode="circular" if periodic else "zeros",
            )

        self.grid = grid
        self.layers = nn.Sequential(
            convolution(inputs, width),
            _made(activation),
            *(_ResidualBlock(convolution, width, activation) for _ in range(blocks)),
            _starts_at_zero(convolution(width, outputs)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first: Any = self.layers[0]
        _check_values(x, self.inputs, math.prod(self.grid), weight=first.weight)
        y = self.layers(x.reshape(-1, x.shape[-2], *self.grid))
        return y.reshape(*x.shape[:-2], y.shape[1], x.shape[-1])


class GraphNetwork(nn.Module):
    """Messages passed along the edges of a mesh: shape (..., inputs, n) to (..., outputs, n).

    In each step a node's state changes by what a hidden layer makes of that state and of d + 1
    means over its neighbours, in d dimensions: of the differences between their states and its own,
    and of these differences weighted such that they are the gradient of a function that is linear
    around the node. They are of about the same size for states that vary over a few edges, and zero
    for constant ones.

    What is known of the nodes and does not change, such as the velocity of a flow, a material or
    where the boundary is, multiplies the hidden layer, as it multiplies derivatives in differential
    equations. Without an activation the network is linear in x.

    The weights of the means depend on the mesh alone, so that they are products with one sparse
    matrix. With messages that are learned along edges, there are six times as many numbers to go
    through, and a network has to find out what a gradient is: an emulator of transport, trained in
    the same way, had six times the error, and took twice as long.

    Parameters
    ----------
    inputs, outputs : int
        Values at a node.
    edges : torch.Tensor
        Shape (2, e): from which node to which; :attr:`prdp_fem.torch.Gathering.edges`, or
        :attr:`prdp_fem.torch.Partition.edges`.
    coordinates : array-like
        Shape (n, d); of a partition, with the ghosts'.
    halo : Exchange or None
        :attr:`prdp_fem.torch.Partition.halo`: each rank has its own part of the nodes (n of them in
        x), and fetches what is next to it in each step.
    features : torch.Tensor or None
        Shape (k, n): what is known of the nodes, of size one.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction, as for :class:`prdp_fem.torch.Gathering`: edges
        across its ends are short ones.
    width : int
        Size of a node's state; hidden layers are twice as wide.
    steps : int
        How often messages are passed: as many edges far a node can see.
    activation : type or None
        The class of the nonlinearity; None for a network that is linear in x, and has no biases.

    Raises
    ------
    TypeError, ValueError
        For sizes below 1, edges between nodes that there are not, coordinates that are not finite,
        or the same at both ends of an edge, a period that they cannot have, features of another
        shape, and another activation than a class. With a halo on all ranks, where it is so on one.

    References
    ----------
    Pfaff, Fortunato, Sanchez-Gonzalez, Battaglia, *Learning mesh-based simulation with graph
    networks*, ICLR 2021. Weights from geometry: Monti, Boscaini, Masci, Rodolà, Svoboda, Bronstein,
    *Geometric deep learning on graphs and manifolds using mixture model CNNs*, CVPR 2017. Features
    that multiply: Perez, Strub, de Vries, Dumoulin, Courville, *FiLM: visual reasoning with a
    general conditioning layer*, AAAI 2018.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        edges: torch.Tensor,
        coordinates,
        *,
        halo: Exchange | None = None,
        features: torch.Tensor | None = None,
        period: Sequence[float] | None = None,
        width: int = 16,
        steps: int = 4,
        activation: type[nn.Module] | None = nn.ReLU,
    ):
        super().__init__()
        instance("halo", halo, (Exchange, type(None)), "the halo of a Partition, or None")

        def look() -> tuple:
            """What ranks must have alike, where it makes sense on this one."""
            nonlocal edges, coordinates, period
            _check_sizes(inputs=inputs, outputs=outputs, width=width)
            whole_number("steps", steps, 0)
            edges, coordinates, period = checked_graph(edges, coordinates, period, halo)
            _check_features(features, len(coordinates) if halo is None else halo.owned)
            return inputs, outputs, width, steps, None if features is None else len(features)

        agree(MPI.COMM_SELF if halo is None else halo.comm, look, "sizes of a graph network")
        self.inputs = inputs
        self.operators = coordinates.shape[1] + 1
        nodes = len(coordinates) if halo is None else halo.owned
        self.nodes = nodes
        weights = neighbour_means(edges, coordinates, period, halo)
        self.halo = halo
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.means = SparseProduct(weights.to(dtype))
        self.activation = nn.Identity() if activation is None else _made(activation)
        hidden, bias = 2 * width, activation is not None
        self.encode = nn.Linear(inputs, width, bias=bias)
        self.update = nn.ModuleList(
            nn.Linear((1 + self.operators) * width, hidden, bias=bias) for _ in range(steps)
        )
        self.mix = nn.ModuleList(nn.Linear(hidden, width, bias=bias) for _ in range(steps))
        self.decode = _starts_at_zero(nn.Linear(width, outputs, bias=bias))
        self.gates = nn.ModuleList()
        if features is not None:
            self.register_buffer(
                "features",
                features.detach().T.to(torch.get_default_dtype(), copy=True),
                persistent=False,
            )
            for _ in range(steps):
                gate: Any = nn.Sequential(
                    nn.Linear(len(features), hidden), nn.Tanh(), nn.Linear(hidden, hidden)
                )
                nn.init.ones_(gate[-1].bias)
                self.gates.append(gate)
        # What is made of the mesh is on the CPU until here.
        self.to(self.encode.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _check_values(x, self.inputs, self.nodes, weight=self.encode.weight)
        batch, n = x.shape[:-2], x.shape[-1]
        # Nodes first, so that one sparse product serves all samples and states.
        state = self.encode(x.reshape(batch.numel(), *x.shape[-2:]).permute(2, 0, 1))
        for step, (update, mix) in enumerate(zip(self.update, self.mix)):
            known = state.flatten(1) if self.halo is None else self.halo(state.flatten(1))
            means = self.means(known).view(self.operators, *state.shape)
            hidden = self.activation(update(torch.cat([state, *means], dim=-1)))
            if self.gates:
                hidden = hidden * self.gates[step](self.features)[:, None]
            state = state + mix(hidden)
        return self.decode(state).permute(1, 2, 0).reshape(*batch, self.decode.out_features, n)


def _check_features(features: torch.Tensor | None, nodes: int) -> None:
    """Raise for what is not known of each node."""
    if features is None:
        return
    instance("features", features, torch.Tensor, "a tensor, or None")
    if features.is_complex() or not (features.is_meta or features.isfinite().all()):
        raise ValueError("features must be finite real numbers, found others among them")
    if features.ndim != 2 or features.shape[1] != nodes:
        raise ValueError(f"features must have shape (k, {nodes}), found {tuple(features.shape)}")
