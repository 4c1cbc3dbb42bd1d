"""The architectures of the PRDP paper, and a graph network for unstructured meshes.

All of them are meant for corrections and increments: their last layer starts at zero, so that adding their output changes nothing
at first.
"""
from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from prdp_fem.torch.autograd import transforms_are_active
from prdp_fem.torch.exchange import Exchange
from prdp_fem.torch.reduction import total

__all__ = ["MLP", "GraphNetwork", "ResNet"]


_HALF = (torch.float16, torch.bfloat16)


def _starts_at_zero(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


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
    ValueError
        For a depth below 1.
    """

    def __init__(self, inputs: int, outputs: int, *, width: int = 64, depth: int = 2, activation: type[nn.Module] = nn.Tanh):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, found {depth}")
        hidden = [nn.Sequential(nn.Linear(inputs if layer == 0 else width, width), activation()) for layer in range(depth)]
        self.layers = nn.Sequential(*hidden, _starts_at_zero(nn.Linear(width, outputs)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


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
        return y.reshape(*x.shape[:-2], y.shape[1], x.shape[-1])


class GraphNetwork(nn.Module):
    """Messages passed along the edges of a mesh: shape (..., inputs, n) to (..., outputs, n).

    In each step a node's state changes by what a hidden layer makes of that state and of d + 1 means over its neighbours, in d dimensions:
    of the differences between their states and its own, and of these differences weighted such that they are the gradient of a
    function that is linear around the node. They are of about the same size for states that vary over a few edges, and zero for
    constant ones.

    What is known of the nodes and does not change, such as the velocity of a flow, a material or where the boundary is, multiplies the
    hidden layer, as it multiplies derivatives in differential equations. Without an activation the network is linear in x.

    The weights of the means depend on the mesh alone, so that they are products with one sparse matrix. With messages that are
    learned along edges, there are six times as many numbers to go through, and a network has to find out what a gradient is: an
    emulator of transport, trained in the same way, had six times the error, and took twice as long.

    Parameters
    ----------
    inputs, outputs : int
        Values at a node.
    edges : torch.Tensor
        Shape (2, e): from which node to which; :attr:`prdp_fem.torch.Gathering.edges`, or :attr:`prdp_fem.torch.Partition.edges`.
    coordinates : array-like
        Shape (n, d); of a partition, with the ghosts'.
    halo : Exchange or None
        :attr:`prdp_fem.torch.Partition.halo`: each rank has its own part of the nodes (n of them in x), and fetches what is next to it
        in each step.
    features : torch.Tensor or None
        Shape (k, n): what is known of the nodes, of size one.
    period : Sequence of float or None
        Extent of a periodic mesh in each direction, as for :class:`prdp_fem.torch.Gathering`: edges across its ends are short ones.
    width : int
        Size of a node's state; hidden layers are twice as wide.
    steps : int
        How often messages are passed: as many edges far a node can see.
    activation : type or None
        The class of the nonlinearity; None for a network that is linear in x, and has no biases.

    References
    ----------
    Pfaff, Fortunato, Sanchez-Gonzalez, Battaglia, *Learning mesh-based simulation with graph networks*, ICLR 2021. Weights from geometry:
    Monti, Boscaini, Masci, Rodolà, Svoboda, Bronstein, *Geometric deep learning on graphs and manifolds using mixture model CNNs*,
    CVPR 2017. Features that multiply: Perez, Strub, de Vries, Dumoulin, Courville, *FiLM: visual reasoning with a general
    conditioning layer*, AAAI 2018.
    """

    def __init__(self, inputs: int, outputs: int, edges: torch.Tensor, coordinates, *, halo: Exchange | None = None,
                 features: torch.Tensor | None = None, period: Sequence[float] | None = None, width: int = 16, steps: int = 4,
                 activation: type[nn.Module] | None = nn.ReLU):
        super().__init__()
        coordinates = torch.as_tensor(coordinates, dtype=torch.float64, device="cpu")
        self.operators, nodes = coordinates.shape[1] + 1, len(coordinates) if halo is None else halo.owned
        weights = _neighbour_means(edges, coordinates, period, halo)
        self.halo = halo
        self.means = _SparseProduct(weights.to(torch.promote_types(torch.get_default_dtype(), torch.float32)))
        self.activation = nn.Identity() if activation is None else activation()
        hidden, bias = 2*width, activation is not None
        self.encode = nn.Linear(inputs, width, bias=bias)
        self.update = nn.ModuleList(nn.Linear((1 + self.operators)*width, hidden, bias=bias) for _ in range(steps))
        self.mix = nn.ModuleList(nn.Linear(hidden, width, bias=bias) for _ in range(steps))
        self.decode = _starts_at_zero(nn.Linear(width, outputs, bias=bias))
        self.gates = nn.ModuleList()
        if features is not None:
            if features.ndim != 2 or features.shape[1] != nodes:
                raise ValueError(f"features must have shape (k, {nodes}), found {tuple(features.shape)}")
            self.register_buffer("features", features.detach().T.to(torch.get_default_dtype(), copy=True), persistent=False)
            for _ in range(steps):
                self.gates.append(nn.Sequential(nn.Linear(len(features), hidden), nn.Tanh(), nn.Linear(hidden, hidden)))
                nn.init.ones_(self.gates[-1][-1].bias)
        # What is made of the mesh is on the CPU until here.
        self.to(self.encode.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, n = x.shape[:-2], x.shape[-1]
        # Nodes first, so that one sparse product serves all samples and states.
        state = self.encode(x.reshape(batch.numel(), *x.shape[-2:]).permute(2, 0, 1))
        for step, (update, mix) in enumerate(zip(self.update, self.mix)):
            known = state.flatten(1) if self.halo is None else self.halo(state.flatten(1))
            means = self.means(known).view(self.operators, *state.shape)
            hidden = self.activation(update(torch.cat([state, *means], dim=-1)))
            if self.gates:
                hidden = hidden*self.gates[step](self.features)[:, None]
            state = state + mix(hidden)
        return self.decode(state).permute(1, 2, 0).reshape(*batch, self.decode.out_features, n)


def _neighbour_means(edges: torch.Tensor, coordinates: torch.Tensor, period: Sequence[float] | None = None,
                     halo: Exchange | None = None) -> torch.Tensor:
    """Shape ((d + 1) m, n), sparse: the mean difference to the neighbours, and each component of the gradient by least squares.

    Of m nodes, with a halo those that this rank owns, among n. Lengths are in units of the mean edge, and the mean difference is scaled to
    the Laplacian where neighbours lie evenly.
    """
    source, target = edges.to(coordinates.device)
    n, dimension = coordinates.shape
    m = n if halo is None else halo.owned
    offset = coordinates[source] - coordinates[target]
    if period is not None:
        lengths = torch.as_tensor(period, dtype=offset.dtype, device=offset.device)
        offset = offset - torch.where(torch.isfinite(lengths), lengths*torch.round(offset/lengths), 0.0)
    length, count = offset.norm(dim=-1).sum(), torch.tensor(len(source), device=offset.device)
    if halo is not None:
        length, count = total(length, halo.comm), total(count, halo.comm)
    offset = offset/(length/count)
    share = 1/torch.bincount(target, minlength=m)[target].to(offset.dtype)
    moments = offset.new_zeros(m, dimension, dimension).index_add(0, target, share[:, None, None]*offset[:, :, None]*offset[:, None])
    gradient = share[:, None]*torch.einsum("eij,ej->ei", torch.linalg.pinv(moments, rtol=1e-6, hermitian=True)[target], offset)
    weights = torch.cat([2*dimension*share[None], gradient.T]).flatten()  # (d + 1) e
    operator = torch.arange(dimension + 1, device=offset.device).repeat_interleave(len(source))*m
    rows, columns = operator + target.repeat(dimension + 1), source.repeat(dimension + 1)
    own = target.repeat(dimension + 1)
    return torch.sparse_coo_tensor(torch.cat([torch.stack([rows, columns]), torch.stack([rows, own])], dim=1),
                                   torch.cat([weights, -weights]), ((dimension + 1)*m, n), device=offset.device,
                                   check_invariants=True).coalesce()


class _SparseProduct(nn.Module):
    """A constant sparse matrix times dense ones: shape (n, k) to (m, k).

    Stored by rows, and so is the transpose: several times as fast as torch's other formats, and as its own derivative, which
    transposes the matrix in each backward pass. Of the three arrays of each, since torch cannot copy or convert such matrices.
    """

    def __init__(self, matrix: torch.Tensor):
        super().__init__()
        self.shape = tuple(matrix.shape)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            for name, by_rows in (("matrix", matrix.to_sparse_csr()), ("transposed", matrix.T.to_sparse_csr())):
                self.register_buffer(f"{name}_rows", by_rows.crow_indices(), persistent=False)
                self.register_buffer(f"{name}_columns", by_rows.col_indices(), persistent=False)
                self.register_buffer(f"{name}_values", by_rows.values(), persistent=False)

    def _parts(self, name: str) -> tuple[torch.Tensor, ...]:
        return tuple(getattr(self, f"{name}_{part}") for part in ("rows", "columns", "values"))

    def _apply(self, fn, recurse: bool = True) -> _SparseProduct:
        """What ``to`` and ``half`` do to each module; but weights that add up to zero are not rounded so far that they do not."""
        before = {name: values for name, values in self.named_buffers() if name.endswith("_values")}
        super()._apply(fn, recurse)
        for name, values in before.items():
            converted = getattr(self, name)
            if converted.dtype in _HALF:
                setattr(self, name, values.to(converted.device))
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        matrix = self._parts("matrix")
        if transforms_are_active():
            rows, columns, values = matrix
            rows = torch.repeat_interleave(torch.arange(self.shape[0], device=rows.device), rows.diff())
            terms = values[:, None]*x[columns].to(values.dtype)
            return torch.zeros_like(terms[:1]).expand(self.shape[0], -1).index_add(0, rows, terms).to(x.dtype)
        return _MatrixProduct.apply(self.shape, matrix, self._parts("transposed"), x)


class _MatrixProduct(torch.autograd.Function):
    """In the type of the matrix, which may be more accurate than that of what it is multiplied with, as under autocast."""

    @staticmethod
    def forward(ctx, shape, matrix, transposed, x):
        ctx.shape, ctx.matrix, ctx.transposed = shape, matrix, transposed
        by_rows = torch.sparse_csr_tensor(*matrix, shape, check_invariants=False)
        dense = x.to(matrix[2].dtype)
        if not torch.is_autocast_enabled(x.device.type):
            return (by_rows @ dense).to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return (by_rows @ dense).to(x.dtype)

    @staticmethod
    def backward(ctx, cotangent):
        return None, None, None, _MatrixProduct.apply(ctx.shape[::-1], ctx.transposed, ctx.matrix, cotangent.contiguous())
