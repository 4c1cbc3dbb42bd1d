"""Sums over ranks: of gradients, while the backward pass goes on, and of parts of an error.

Each rank's loss is a part of the loss, and the sum over the ranks is the gradient, of a network's
parameters as of anything that all ranks have alike.
"""

from __future__ import annotations

import warnings
import zlib
from functools import partial

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch.nn.parameter import is_lazy

from prdp_fem.arguments import instance, whole_number
from prdp_fem.ranks.agreement import agree

__all__ = ["GradientReduction", "check_replicas", "shared", "total"]

_COMM = "a communicator of mpi4py's, such as mesh.comm"


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
    TypeError
        For what is no tensor of numbers.
    ValueError
        On all ranks, where shapes differ.
    """
    instance("comm", comm, MPI.Comm, _COMM)

    def find() -> tuple:
        instance("part", part, torch.Tensor, "a tensor")
        if part.dtype == torch.bool:
            raise TypeError(
                "part must be a tensor of numbers, found one of torch.bool: call .long() first"
            )
        return list(part.shape), part.dtype

    agree(comm, find, "shapes of what is added up")
    summed = part.detach().clone(memory_format=torch.contiguous_format)
    if comm.size > 1:
        on_host = _for_mpi(summed)
        comm.Allreduce(MPI.IN_PLACE, on_host.numpy())
        summed.copy_(on_host)
    return summed


def shared(x: torch.Tensor, comm: MPI.Comm) -> torch.Tensor:
    """A tensor that all ranks have alike, for a solver layer's Constant or Real space.

    The layer gives each rank the whole gradient by it. Behind this function each has an equal part,
    so that the sum over the ranks is the gradient, as it is for fields.

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

    Raises
    ------
    TypeError
        For what is no tensor, or no communicator.
    """
    instance("x", x, torch.Tensor, "a tensor")
    instance("comm", comm, MPI.Comm, _COMM)
    return _Shared.apply(x, comm.size)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, cotangent: torch.Tensor):
        return cotangent / ctx.ranks, None


class GradientReduction:
    """The gradients of a network's parameters, added up over ranks while the backward pass goes on.

    They are kept in buckets, one array each, and gradients are parts of these. The reduction of a
    bucket starts as soon as the backward pass, of which there is one for each step, has come
    through all of its parameters. As in torch's DistributedDataParallel, parameters fill buckets
    from the last one to the first, as backward passes come to them.

    Which parameters are trained may change from step to step, as in a loop without buckets: what is
    frozen, and what no rank's backward pass has come to, has no gradient after a step, so that
    optimisers leave it alone.

    What comes after :meth:`finish` sees the gradient, as does a hook that
    ``optimiser.register_step_pre_hook`` takes. Hooks of parameters (``register_hook``,
    ``register_post_accumulate_grad_hook``) and of modules are called in the backward pass, where
    each rank has its part. What they make of it is added up, which is right where it is linear in
    the gradient, as a mask is, and wrong where it is not, as clipping.

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
        One-dimensional: gradients, and behind them on how many ranks the backward pass has come to
        each.

    Raises
    ------
    TypeError
        For what is no network, or no communicator.
    ValueError
        For a network without parameters to train; on all ranks, where their networks have other
        parameters.

    Warns
    -----
    UserWarning
        On several ranks, by the first of them, where parameters have hooks.

    Examples
    --------
    In a training loop of one's own, in which ``loss`` is this rank's part of the loss::

        with GradientReduction(network, comm) as gradients:
            for samples in batches:
                gradients.zero()
                loss(samples).backward()
                gradients.finish()
                optimiser.step()

    Gradients are clipped behind ``finish()``. A ``torch.amp.GradScaler`` scales this rank's part of
    the loss, and makes the step.
    """

    def __init__(self, network: torch.nn.Module, comm: MPI.Comm, *, bucket_size: int = 2**22):
        instance("comm", comm, MPI.Comm, _COMM)
        self._network = network
        self._ranks = comm
        self._bucket_size = bucket_size

        def shapes() -> list:
            instance("network", network, torch.nn.Module, "a torch.nn.Module")
            return _checked_shapes(self._trained())

        agree(comm, shapes, "shapes of the network's parameters")
        agree(comm, lambda: whole_number("bucket_size", bucket_size), "sizes of buckets")
        if comm.size > 1 and comm.rank == 0:
            _warn_of_hooks(network)
        # A communicator of its own: the backward pass communicates, too, in an order of its own.
        self._comm = comm.Dup() if comm.size > 1 else comm
        self._hooks: list = []
        self._put_in_buckets(self._trained())
        self.zero()

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self._network.parameters() if parameter.requires_grad][
            ::-1
        ]

    def _put_in_buckets(self, parameters: list[torch.nn.Parameter]) -> None:
        self._remove_hooks()
        self._parameters = parameters
        self.buckets: list[torch.Tensor] = []
        # Of each bucket: its parameters, and their parts of it.
        self._parts: list[list[tuple[torch.nn.Parameter, torch.Tensor]]] = []
        for group in _grouped(parameters, self._bucket_size):
            sizes = [parameter.numel() for parameter in group]
            bucket = torch.zeros(
                sum(sizes) + len(group), dtype=group[0].dtype, device=group[0].device
            )
            parts = bucket[: sum(sizes)].split(sizes)
            self.buckets.append(bucket)
            self._parts.append(
                [(parameter, part.view_as(parameter)) for parameter, part in zip(group, parts)]
            )
            for place, parameter in enumerate(group):
                note = partial(self._note, len(self.buckets) - 1, place)
                self._hooks.append(parameter.register_post_accumulate_grad_hook(note))

    def zero(self) -> None:
        """Before a backward pass. Collective.

        Raises
        ------
        ValueError
            On all ranks, where they train other parameters.
        """
        parameters = self._trained()
        is_new = list(map(id, parameters)) != list(map(id, self._parameters))
        agree(
            self._ranks,
            lambda: _shapes(parameters) if is_new else "those of before",
            "parameters that are trained",
            "freeze and unfreeze parameters on all ranks at the same step",
        )
        if is_new:
            self._put_in_buckets(parameters)
        self._requests: list[MPI.Request] = []
        self._reduced: list[torch.Tensor] = []
        # torch counts what is written to a tensor and its parts.
        self._versions: list[int] = []
        self._missing = [set(range(len(parts))) for parts in self._parts]
        self._network.zero_grad()
        for bucket, parts in zip(self.buckets, self._parts):
            bucket.zero_()
            for parameter, part in parts:
                parameter.grad = part

    def _note(self, bucket: int, place: int, _: torch.nn.Parameter) -> None:
        """The backward pass has come through a parameter of a bucket."""
        if bucket < len(self._requests):
            raise RuntimeError(
                "a second backward pass has come to gradients whose reduction has started: add "
                "losses up, and call backward once between zero() and finish(), or leave it to "
                "train(), which does so; a checkpoint inside the network needs use_reentrant=False"
            )
        self._missing[bucket].discard(place)
        if self._comm.size > 1:
            # In the order of the buckets, which is the same on all ranks, however their backward
            # passes run.
            while (
                len(self._requests) < len(self.buckets) and not self._missing[len(self._requests)]
            ):
                self._start()

    def _start(self) -> None:
        """Start to reduce the next bucket: itself, or a copy of one on a device, or of a type that
        MPI does not know.
        """
        place = len(self._requests)
        bucket = self.buckets[place]
        count = len(self._parts[place])
        missing = self._missing[place]
        bucket[-count:] = torch.tensor(
            [one not in missing for one in range(count)], device="cpu"
        ).to(bucket)
        self._versions.append(bucket._version)
        self._reduced.append(_for_mpi(bucket))
        self._requests.append(self._comm.Iallreduce(MPI.IN_PLACE, self._reduced[-1].numpy()))

    @PETSc.Log.EventDecorator("PRDPReduce")
    def finish(self) -> None:
        """After the backward pass, have gradients be sums over the ranks; collective.

        They are None where no rank has any.

        Raises
        ------
        RuntimeError
            Where gradients are no longer where they were at :meth:`zero`, or have been written to
            while they were added up.
        """
        if self._comm.size > 1:
            while len(self._requests) < len(self.buckets):
                self._start()
            # Before any error: MPI must not write to what Python has thrown away.
            MPI.Request.Waitall(self._requests)
        if any(
            parameter.grad is None or parameter.grad.data_ptr() != part.data_ptr()
            for parts in self._parts
            for parameter, part in parts
        ):
            raise RuntimeError(
                "gradients have been replaced since zero(): leave optimiser.zero_grad() and"
                " create_graph=True away"
            )
        if self._comm.size > 1:
            if [bucket._version for bucket in self.buckets] != self._versions:
                raise RuntimeError(
                    "gradients have been changed while they were added up, as by a "
                    "hook of a parameter, and the change would be lost: make it "
                    "after finish(), as hooks of optimiser.register_step_pre_hook do"
                )
            for bucket, reduced in zip(self.buckets, self._reduced):
                if bucket is not reduced:
                    bucket.copy_(reduced)
            self._missing = [
                {place for place, ranks in enumerate(bucket[-len(parts) :].tolist()) if ranks == 0}
                for bucket, parts in zip(self.buckets, self._parts)
            ]
            self._add_up_latecomers()
        for parts, missing in zip(self._parts, self._missing):
            for place in missing:
                parts[place][0].grad = None

    def _add_up_latecomers(self) -> None:
        """Add up gradients of what was unfrozen, or has joined the network, since :meth:`zero`."""
        before = set(map(id, self._parameters))
        late = [parameter for parameter in self._trained() if id(parameter) not in before]
        agree(
            self._ranks,
            lambda: _shapes(late),
            "parameters that are trained",
            "unfreeze parameters on all ranks at the same step",
        )
        for parameter in late:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            has_gradient = gradient.new_full((1,), float(parameter.grad is not None))
            summed = total(torch.cat([gradient.reshape(-1), has_gradient]), self._ranks)
            parameter.grad = summed[:-1].view_as(parameter) if summed[-1] else None

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> GradientReduction:
        return self

    def __exit__(self, error_type, *_) -> None:
        self._remove_hooks()
        if self._comm.size > 1:
            if error_type is None:
                self._comm.Free()
            else:
                # reductions may be under way, and freeing a communicator waits for the other ranks
                _ABANDONED.append((self._comm, self._reduced, self._requests))


# Kept for MPI, which may still write to them.
_ABANDONED: list[tuple] = []


def _warn_of_hooks(network: torch.nn.Module) -> None:
    # There are no public names.
    hooked = [
        name
        for name, parameter in network.named_parameters()
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    ]
    if hooked:
        warnings.warn(
            f"'{hooked[0]}' of the network has hooks, which see a rank's part of its "
            "gradient, and not the sum over the ranks: optimiser.register_step_pre_hook "
            "takes hooks that see the sum",
            stacklevel=3,
        )


def _checked_shapes(parameters: list[torch.nn.Parameter]) -> list[tuple]:
    if not parameters:
        raise ValueError("the network has no parameters to train")
    return _shapes(parameters)


def _shapes(parameters: list[torch.nn.Parameter]) -> list[tuple]:
    if any(map(is_lazy, parameters)):
        raise ValueError(
            "the network has parameters whose shapes are not known before its first call: call it"
            " with a sample first"
        )
    return [(*parameter.shape, parameter.dtype) for parameter in parameters]


def _for_mpi(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the host, of a type that MPI knows: itself where it is that already."""
    return (tensor.float() if tensor.dtype in _UNKNOWN_TO_MPI else tensor).cpu()


_UNKNOWN_TO_MPI = (torch.float16, torch.bfloat16)


def _grouped(
    parameters: list[torch.nn.Parameter], bucket_size: int
) -> list[list[torch.nn.Parameter]]:
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
            filled += parameter.numel() * parameter.element_size()
    return groups


def check_replicas(
    network: torch.nn.Module, optimiser: torch.optim.Optimizer, comm: MPI.Comm
) -> None:
    """Make sure that ranks have equal networks and optimisers, to the bit.

    Raises
    ------
    TypeError
        For what is no network, no optimiser or no communicator.
    ValueError
        On all ranks, where they do not.
    """
    instance("network", network, torch.nn.Module, "a torch.nn.Module")
    instance("optimiser", optimiser, torch.optim.Optimizer, "a torch.optim.Optimizer")
    instance("comm", comm, MPI.Comm, _COMM)
    if comm.size == 1:
        return
    weights, buffers = dict(network.named_parameters()), network.state_dict()
    for name in weights:
        del buffers[name]
    agree(
        comm,
        lambda: f"{_checksum(weights):08x}",
        "weights",
        "call torch.manual_seed before the network is made",
    )
    agree(
        comm,
        lambda: f"{_checksum(buffers):08x}",
        "the network's buffers",
        "each rank sees a part of a batch, of which layers like BatchNorm take statistics;"
        " LayerNorm and GroupNorm do not",
    )
    agree(
        comm,
        lambda: f"{_checksum(optimiser.state_dict()):08x}",
        "the optimiser's states",
        "give it the same parameters and options",
    )


def _checksum(state) -> int:
    """Of nested dictionaries and lists of tensors and numbers."""
    if isinstance(state, torch.Tensor):
        return zlib.crc32(
            state.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data
        )
    if isinstance(state, dict):
        return zlib.crc32(repr([(key, _checksum(value)) for key, value in state.items()]).encode())
    if isinstance(state, (list, tuple)):
        return zlib.crc32(repr([_checksum(value) for value in state]).encode())
    return zlib.crc32(repr(state).encode())
