"""Calls of a layer under transforms of torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mpi4py import MPI

from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.threads import one_thread
from prdp_fem.torch.autograd import OnceOnly, Reverse
from prdp_fem.torch.surroundings import MADE_ANEW

__all__ = ["TransformedCall"]


class TransformedCall:
    """A call of a layer under transforms of torch.func (``vmap``, ``grad``, ``vjp``, ``jacrev``),
    as a function without a state.

    Its derivative makes the call again; with the same setting and values of coefficients, or it is
    an error.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    values : callable
        From tensors to a tuple of outputs, for torch's autograd.
    stamp : callable
        Something that tells the setting and the values of the last call.
    """

    def __init__(self, comm: MPI.Comm, values: Callable, stamp: Callable):
        self._comm = comm
        self._values = values
        self._stamp = stamp
        self._expected = None

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _Transformed.apply(self, *tensors)

    def values(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs, where no transform is active."""
        with one_thread(self._comm):
            # Transforms have hidden the axes that the layer has compared.
            agree(
                self._comm,
                lambda: [tuple(tensor.shape[:-1]) for tensor in tensors],
                "batch axes, under transforms of torch.func,",
                "give all ranks the same samples",
            )
            outputs, stamp = self._values(tensors), self._stamp()
        if self._expected is None:
            self._expected = stamp
        if stamp != self._expected:
            raise RuntimeError(MADE_ANEW)
        return outputs


class _Transformed(Reverse):
    @staticmethod
    def forward(call: TransformedCall, *tensors):
        return call.values(tensors)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.call, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *cotangents):
        wanted = ctx.needs_input_grad[1:]
        gradients = iter(
            _TransformedBackward.apply(ctx.call, wanted, *cotangents, *ctx.saved_tensors)
        )
        return None, *(next(gradients) if is_wanted else None for is_wanted in wanted)

    @staticmethod
    def vmap(info, in_dims, call, *tensors):
        return _Transformed.apply(call, *_with_first_axis(tensors, in_dims[1:])), 0


class _TransformedBackward(OnceOnly):
    """Gradients of a call by the tensors that are wanted: called with it, which are, the cotangents
    of outputs and the tensors.
    """

    @staticmethod
    def forward(call: TransformedCall, wanted: Sequence[bool], *given):
        cotangents, tensors = given[: -len(wanted)], given[-len(wanted) :]
        with torch.enable_grad():
            leaves = [
                tensor.detach().requires_grad_(is_wanted)
                for tensor, is_wanted in zip(tensors, wanted)
            ]
            pairs = [pair for pair in zip(call.values(leaves), cotangents) if pair[0].requires_grad]
        leaves = _wanted(leaves, wanted)
        outputs, cotangents = zip(*pairs)
        gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        return tuple(
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, gradients)
        )

    @staticmethod
    def vmap(info, in_dims, call, wanted, *given):
        first = len(given) - len(wanted)
        cotangents = [
            (cotangent if dim is None else cotangent.movedim(dim, 0)).expand(
                info.batch_size, *_without(cotangent.shape, dim)
            )
            for cotangent, dim in zip(given[:first], in_dims[2:])
        ]
        tensors = _with_first_axis(given[first:], in_dims[2 + first :], info.batch_size)
        gradients = _TransformedBackward.apply(call, wanted, *cotangents, *tensors)
        shapes = [
            _without(tensor.shape, dim) for tensor, dim in zip(given[first:], in_dims[2 + first :])
        ]
        return (
            tuple(
                gradient.reshape(info.batch_size, *shape)
                for gradient, shape in zip(gradients, _wanted(shapes, wanted))
            ),
            0,
        )


def _without(shape: torch.Size, dim: int | None) -> list[int]:
    return [size for place, size in enumerate(shape) if dim is None or place != dim % len(shape)]


def _with_first_axis(
    tensors: Sequence[torch.Tensor], dims: Sequence[int | None], size: int | None = None
) -> list[torch.Tensor]:
    """Tensors with the axis that a transform has hidden as the first batch axis, of as many; all of
    them where its size is given.
    """
    most = max(tensor.ndim - (dim is not None) for tensor, dim in zip(tensors, dims))
    found = []
    for tensor, dim in zip(tensors, dims):
        shape = _without(tensor.shape, dim)
        between = [1] * (most - len(shape))
        if dim is not None:
            tensor = tensor.movedim(dim, 0).reshape(tensor.shape[dim], *between, *shape)
        elif size is not None:
            tensor = tensor.reshape(*between, *shape).expand(size, *between, *shape)
        found.append(tensor)
    return found


def _wanted(values: Sequence, needed: Sequence[bool]) -> list:
    return [value for value, wanted in zip(values, needed) if wanted]
