"""Values that ranks have from each other, with their derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.arguments import instance, shown, whole_number
from prdp_fem.ranks.agreement import agree

__all__ = ["Exchange", "agree_on_axes"]

# Entries that a vector has at most.
_MOST = np.iinfo(PETSc.IntType).max
_EVENT = PETSc.Log.Event("PRDPExchange")


class Exchange:
    """Values of nodes on the ranks that want them, from the ranks that own them.

    The derivative adds up, for each node, the cotangents of all ranks that have its value, since
    each of them goes on with its own part of the loss. Both are scatters of PETSc's between vectors
    on the memory of tensors. They are made in double precision, and can be differentiated again.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    owned : int
        How many nodes this rank owns.
    wanted : Sequence of int
        Which nodes this rank wants, in this order, numbered through all ranks.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
    owned : int
    wanted : numpy.ndarray

    Raises
    ------
    TypeError, ValueError
        On all ranks, where one has no integers, or wants a node that there is not.
    """

    def __init__(self, comm: MPI.Comm, owned: int, wanted: Sequence[int] | np.ndarray):
        self.comm = instance(
            "comm", comm, MPI.Comm, "a communicator of mpi4py's, such as mesh.comm"
        )

        numbers = np.empty(0, dtype=PETSc.IntType)

        def look() -> None:
            nonlocal owned, numbers
            owned = whole_number("owned", owned, 0)
            numbers = _node_numbers(wanted)

        agree(comm, look, "nodes")
        self.owned = owned
        self._total = comm.allreduce(owned)
        self._scatters: dict[int, PETSc.Scatter] = {}
        lowest, highest = numbers.min(initial=0), numbers.max(initial=0)
        lowest, highest = comm.allreduce(lowest, MPI.MIN), comm.allreduce(highest, MPI.MAX)
        is_without_nodes = comm.allreduce(len(numbers)) > 0 and self._total == 0
        if is_without_nodes or lowest < 0 or highest >= max(self._total, 1):
            raise ValueError(
                f"nodes are numbered from 0 to {self._total - 1}, found others among those that are"
                " wanted"
            )
        self.wanted = numbers.astype(PETSc.IntType)

    def __call__(self, values: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """The values that this rank wants; collective, forward and backward.

        Parameters
        ----------
        values : torch.Tensor
            Shape (..., owned, ...), other axes the same on all ranks.
        axis : int
            That of the nodes.

        Returns
        -------
        torch.Tensor
            Shape (..., wanted, ...).

        Raises
        ------
        TypeError, ValueError
            On all ranks, where one has complex numbers, another shape, or no gradient where others
            have.
        """
        agree_on_axes(
            self.comm,
            values,
            axis,
            self.owned,
            f"{self.owned} nodes along axis {axis} (those that this rank owns)",
        )
        return self.without_agreement(values, axis)

    def without_agreement(self, values: torch.Tensor, axis: int = 0) -> torch.Tensor:
        """The same, where it is known that all ranks have tensors of the right shape."""
        if self.comm.size == 1:
            return values.index_select(axis, torch.from_numpy(self.wanted).to(values.device))
        return _Exchanged.apply(self, False, values.movedim(axis, 0)).movedim(0, axis)

    def __deepcopy__(self, memo) -> Exchange:
        """A copy of a network exchanges by the same plans: they have no state."""
        return self

    def __reduce__(self):
        raise TypeError(
            "an exchange, such as a network's halo, belongs to the ranks that it was made on, and"
            " cannot be pickled: save the network's state_dict(), in which it has no part"
        )

    def _apply(self, values: torch.Tensor, adjoint: bool) -> torch.Tensor:
        """The exchange or its adjoint, without a derivative."""
        sent = values.detach().resolve_neg().to(torch.float64)[:, None].flatten(1)
        # PETSc counts the entries of a vector on all ranks, in 32 bits by default.
        received = [
            self._columns(columns.contiguous(), adjoint)
            for columns in sent.split(max(1, _MOST // self._total), dim=1)
        ]
        rows = self.owned if adjoint else len(self.wanted)
        return torch.cat(received, dim=1).reshape(rows, *values.shape[1:]).to(values.dtype)

    def _columns(self, sent: torch.Tensor, adjoint: bool) -> torch.Tensor:
        # Zeros, since nothing is added to what nobody wants.
        received = torch.zeros(
            self.owned if adjoint else len(self.wanted),
            sent.shape[1],
            dtype=torch.float64,
            device=sent.device,
        )
        if width := sent.shape[1]:
            owned, wanted = (received, sent) if adjoint else (sent, received)
            whole = PETSc.Vec().createWithDLPack(
                owned, size=(self.owned * width, self._total * width), comm=self.comm
            )
            part = PETSc.Vec().createWithDLPack(wanted, comm=PETSc.COMM_SELF)
            scatter = self._scatter(width, whole, part)
            with _EVENT:
                if adjoint:
                    scatter.scatter(part, whole, PETSc.InsertMode.ADD, PETSc.ScatterMode.REVERSE)
                else:
                    scatter.scatter(whole, part, PETSc.InsertMode.INSERT, PETSc.ScatterMode.FORWARD)
        return received

    def _scatter(self, width: int, whole: PETSc.Vec, part: PETSc.Vec) -> PETSc.Scatter:
        """For nodes of so many values each."""
        if width not in self._scatters:
            wanted: Any = self.wanted  # PETSc states that it takes a sequence
            blocks = PETSc.IS().createBlock(width, wanted, comm=PETSc.COMM_SELF)
            self._scatters[width] = PETSc.Scatter().create(whole, blocks, part, None)
        return self._scatters[width]


class _Exchanged(torch.autograd.Function):
    """An exchange or its adjoint: each is the other's derivative."""

    @staticmethod
    def forward(ctx, exchange: Exchange, adjoint: bool, values: torch.Tensor) -> torch.Tensor:
        ctx.exchange, ctx.adjoint = exchange, adjoint
        return exchange._apply(values, adjoint)

    @staticmethod
    def backward(ctx, cotangent: torch.Tensor):
        return None, None, _Exchanged.apply(ctx.exchange, not ctx.adjoint, cotangent)


def _node_numbers(wanted: Sequence[int] | np.ndarray) -> np.ndarray:
    """Numbers of nodes, none of which has become another one on the way."""
    try:
        numbers = np.asarray(wanted)
    except (TypeError, ValueError):
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or not (numbers.dtype.kind in "iu" or numbers.size == 0):
        raise TypeError(
            f"wanted must be a sequence of integers, the numbers of nodes, found {shown(wanted)}"
        )
    if numbers.dtype.kind == "u" and numbers.max(initial=0) > np.iinfo(np.int64).max:
        raise ValueError(f"wanted must be numbers of nodes, found {numbers.max()}")
    return numbers.astype(np.int64)


def agree_on_axes(
    comm: MPI.Comm, values: torch.Tensor, axis: int, size: int, expected: str
) -> None:
    """Make sure that ranks have tensors for the same calls, forward and backward; collective.

    One axis, of which each rank has a ``size`` of its own, is called ``expected`` in an error.
    """

    def find() -> tuple:
        instance("values", values, torch.Tensor, "a tensor")
        if not isinstance(axis, int) or isinstance(axis, bool):
            raise ValueError(f"axis must be an integer, found {shown(axis)}")
        if not -values.ndim <= axis < values.ndim:
            raise ValueError(f"expected {expected}, found shape {tuple(values.shape)}")
        if values.is_complex():
            raise TypeError(
                f"expected real numbers, found {values.dtype}: give torch.view_as_real of them"
            )
        shape = list(values.shape)
        if shape.pop(axis) != size:
            raise ValueError(f"expected {expected}, found shape {tuple(values.shape)}")
        return tuple(shape), values.requires_grad and torch.is_grad_enabled()

    agree(comm, find, "axes beside that of the nodes, and whether there are gradients,")
