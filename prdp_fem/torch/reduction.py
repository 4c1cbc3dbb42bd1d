"""Sums over ranks: of gradients, while the backward pass goes on, and of parts of an error.

Each rank's loss is a part of the loss, and the sum over the ranks is the gradient, of a network's parameters as of anything that all
ranks have alike.
"""
from __future__ import annotations

import zlib
from functools import partial

import torch
from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.parallel import agree

__all__ = ["GradientReduction", "check_replicas", "shared", "total"]


def total(part: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """The sum over ranks of a tensor without gradients, such as a part of an error.

    Parameters
    ----------
    part : torch.Tensor
        Of the same shape on all ranks.
    comm : mpi4py.MPI.Comm
        On which this is collective.

    Returns
    -------
    torch.Tensor
        The same on all ranks, detached.

    Raises
    ------
    ValueError
        On all ranks, where shapes differ.
    """
    agree(comm, lambda: (list(part.shape), part.dtype), "shapes of what is added up")
    summed = part.detach().clone(memory_format=torch.contiguous_format)
    if comm.size > 1:
        on_host = summed.cpu()  # itself where it is there
        comm.Allreduce(MPI.IN_PLACE, on_host.numpy())
        summed.copy_(on_host)
    return summed


def shared(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """A tensor that all ranks have alike, and hand to a solver layer as a Constant, or in a Real space.

    The layer gives each rank the whole gradient by it. Behind this function each has an equal part, so that the sum over the ranks is the
    gradient, as it is for fields.

    Parameters
    ----------
    x : torch.Tensor
        Such as what a network predicts from what all ranks know.
    comm : mpi4py.MPI.Comm
        The ranks that share the layer's mesh.

    Returns
    -------
    torch.Tensor
        ``x``.
    """
    return _Shared.apply(x, comm.size)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, cotangent: torch.Tensor):
        return cotangent/ctx.ranks, None


class GradientReduction:
    """The gradients of a network's parameters, added up over ranks while the backward pass goes on.

    They are kept in buckets, one array each, and gradients are parts of these. The reduction of a bucket starts as soon as the backward
    pass, of which there is one for each step, has come through all of its parameters. As in torch's DistributedDataParallel, parameters
    fill buckets from the last one to the first, as backward passes come to them.

    Parameters
    ----------
    network : torch.nn.Module
        On the CPU, with the same parameters on all ranks.
    comm : mpi4py.MPI.Comm
    bucket_size : int
        Bytes after which a bucket is closed.

    Attributes
    ----------
    buckets : list of torch.Tensor
        One-dimensional.

    Raises
    ------
    ValueError
        For a network without parameters to train; on all ranks, where their networks have other parameters.

    Examples
    --------
    In a training loop of one's own, in which ``loss`` is this rank's part of the loss::

        with GradientReduction(network, comm) as gradients:
            for samples in batches:
                gradients.zero()
                loss(samples).backward()
                gradients.finish()
                optimiser.step()
    """

    def __init__(self, network: torch.nn.Module, comm: MPI.Comm, *, bucket_size: int = 2**22):
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad][::-1]
        agree(comm, lambda: _checked_shapes(parameters), "shapes of the network's parameters")
        # A communicator of its own: the backward pass communicates, too, in an order of its own.
        self._comm = comm.Dup() if comm.size > 1 else comm
        self.buckets: list[torch.Tensor] = []
        self._parts: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._sizes, self._hooks = [], []
        for group in _grouped(parameters, bucket_size):
            sizes = [parameter.numel() for parameter in group]
            self.buckets.append(torch.zeros(sum(sizes), dtype=group[0].dtype, device=group[0].device))
            self._sizes.append(len(group))
            for parameter, part in zip(group, self.buckets[-1].split(sizes)):
                self._parts.append((parameter, part.view_as(parameter)))
                if comm.size > 1:
                    self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(self._note, len(self._sizes) - 1)))
        self.zero()

    def zero(self) -> None:
        """Before a backward pass."""
        self._requests: list[MPI.Request] = []
        self._reduced: list[torch.Tensor] = []
        self._missing = self._sizes.copy()
        for bucket in self.buckets:
            bucket.zero_()
        for parameter, part in self._parts:
            parameter.grad = part

    def _note(self, bucket: int, _: torch.nn.Parameter) -> None:
        """The backward pass has come through a parameter of a bucket."""
        if self._missing[bucket] == 0:
            raise RuntimeError("a second backward pass has come to gradients whose reduction has started: add losses up, and call backward "
                               "once between zero() and finish(); a checkpoint inside the network needs use_reentrant=False")
        self._missing[bucket] -= 1
        # In the order of the buckets, which is the same on all ranks, however their backward passes run.
        while len(self._requests) < len(self.buckets) and self._missing[len(self._requests)] == 0:
            self._start()

    def _start(self) -> None:
        """Start to reduce the next bucket: itself, or a copy on the host of one on a device."""
        self._reduced.append(self.buckets[len(self._requests)].cpu())
        self._requests.append(self._comm.Iallreduce(MPI.IN_PLACE, self._reduced[-1].numpy()))

    @PETSc.Log.EventDecorator("PRDPReduce")
    def finish(self) -> None:
        """After the backward pass: gradients are sums over the ranks. Collective.

        Raises
        ------
        RuntimeError
            Where gradients are no longer where they were at :meth:`zero`.
        """
        if any(parameter.grad is None or parameter.grad.data_ptr() != part.data_ptr() for parameter, part in self._parts):
            raise RuntimeError("gradients have been replaced since zero(): leave optimiser.zero_grad() and create_graph=True away")
        if self._comm.size > 1:
            while len(self._requests) < len(self.buckets):
                self._start()
            MPI.Request.Waitall(self._requests)
            for bucket, reduced in zip(self.buckets, self._reduced):
                if bucket is not reduced:
                    bucket.copy_(reduced)

    def __enter__(self) -> GradientReduction:
        return self

    def __exit__(self, error_type, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._comm.size > 1:
            if error_type is None:
                self._comm.Free()
            else:  # reductions may be under way, and freeing a communicator waits for the other ranks
                _ABANDONED.append((self._comm, self._reduced, self._requests))


# Kept for MPI, which may still write to them.
_ABANDONED: list[tuple] = []


def _checked_shapes(parameters: list[torch.nn.Parameter]) -> list[tuple]:
    if not parameters:
        raise ValueError("the network has no parameters to train")
    return [(*parameter.shape, parameter.dtype) for parameter in parameters]


def _grouped(parameters: list[torch.nn.Parameter], bucket_size: int) -> list[list[torch.nn.Parameter]]:
    """Parameters of one type and device each, in their order."""
    groups: list[list[torch.nn.Parameter]] = []
    for kind in dict.fromkeys((parameter.dtype, parameter.device) for parameter in parameters):
        filled = bucket_size
        for parameter in parameters:
            if (parameter.dtype, parameter.device) != kind:
                continue
            if filled >= bucket_size:
                groups.append([])
                filled = 0
            groups[-1].append(parameter)
            filled += parameter.numel()*parameter.element_size()
    return groups


def check_replicas(network: torch.nn.Module, optimiser: torch.optim.Optimizer, comm: MPI.Comm) -> None:
    """Make sure that ranks have equal networks and optimisers, to the bit.

    Raises
    ------
    ValueError
        On all ranks, where they do not.
    """
    if comm.size == 1:
        return
    weights, buffers = dict(network.named_parameters()), network.state_dict()
    for name in weights:
        del buffers[name]
    agree(comm, lambda: f"{_checksum(weights):08x}", "weights", "call torch.manual_seed before the network is made")
    agree(comm, lambda: f"{_checksum(buffers):08x}", "the network's buffers",
          "each rank sees a part of a batch, of which layers like BatchNorm take statistics; LayerNorm and GroupNorm do not")
    agree(comm, lambda: f"{_checksum(optimiser.state_dict()):08x}", "the optimiser's states", "give it the same parameters and options")


def _checksum(state) -> int:
    """Of nested dictionaries and lists of tensors and numbers."""
    if isinstance(state, torch.Tensor):
        return zlib.crc32(state.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy())
    if isinstance(state, dict):
        return zlib.crc32(repr([(key, _checksum(value)) for key, value in state.items()]).encode())
    if isinstance(state, (list, tuple)):
        return zlib.crc32(repr([_checksum(value) for value in state]).encode())
    return zlib.crc32(repr(state).encode())
