"""Where the tensors of a layer are, and how they get to where its solver is.

A layer is on the CPU, as any module of torch's, until it is moved. There a solver on the host works
on the memory of the tensors, and one on a device copies them. A layer on a CUDA or HIP device has
its solver there, which works on the memory of tensors there; what Firedrake assembles from is
copied to the host. All copies are counted in the solver's statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from firedrake.petsc import PETSc

from prdp_fem.memory.devices import HOST, Device
from prdp_fem.statistics import Statistics

__all__ = ["CPU", "Place", "placed", "solver_device", "tensor_device", "to_host"]


CPU = torch.device("cpu")


def tensor_device(device: Device | None) -> torch.device:
    """Where tensors share memory with the vectors of a solver on a device; None is the host."""
    if device is None or device.tensors == CPU.type:
        return CPU
    # PETSc gives each rank one of the devices of its machine.
    return torch.device(device.tensors, PETSc.DeviceContext.getCurrent().getDevice().getDeviceId())


def solver_device(device: torch.device) -> str:
    """What a solver calls the device that a network is moved to.

    Raises
    ------
    ValueError
        Where PETSc has no such device.
    """
    if device.type == "cpu":
        return HOST
    if device.type == "cuda":
        return "cuda" if torch.version.hip is None else "hip"
    raise ValueError(
        f"a SolverLayer cannot go to {device}, where PETSc has no vectors: move the network to the"
        " CPU, or to a CUDA or HIP device"
    )


def to_host(rows: torch.Tensor, statistics: Statistics) -> np.ndarray:
    """The values of a tensor as an array of NumPy: its memory where that is the host's, or a copy,
    which is counted.
    """
    if rows.is_cpu:
        return rows.numpy()
    with _TO_HOST:
        copied = rows.cpu().numpy()
    statistics.note_to_host(copied.nbytes)
    return copied


def placed(array: np.ndarray, device: torch.device, statistics: Statistics) -> torch.Tensor:
    """An array of NumPy as a tensor: on its memory where that is on the CPU, or a copy, which is
    counted.
    """
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    with _TO_DEVICE:
        copied = tensor.to(device)
    statistics.note_to_device(array.nbytes)
    return copied


class Place:
    """Where the tensors of a layer are, decided when the layer is moved.

    Parameters
    ----------
    device : torch.device

    Attributes
    ----------
    device
        As given.
    empty : callable
        Of a shape: makes room there, as an array of NumPy or, on a device, a tensor.
    in_order : context manager
        Has what is inside begin once torch's work on the device is done, and leaves it when PETSc's
        is: each has its own stream there.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.empty: Callable[[tuple], Any] = np.empty
        self.in_order: AbstractContextManager[None] = nullcontext()
        if device.type != CPU.type:
            self.empty = partial(torch.empty, dtype=torch.float64, device=device)
            self.in_order = _InOrder(device)

    def tensor(self, rows, batch: Sequence[int], statistics: Statistics) -> torch.Tensor:
        """Rows, an array or a tensor of shape (rows, n), as a tensor with batch axes there."""
        shape = *batch, rows.shape[-1]
        if isinstance(rows, np.ndarray):
            return placed(rows.reshape(shape), self.device, statistics)
        return rows.view(shape)


class _InOrder:
    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self) -> None:
        torch.cuda.current_stream(self._device).synchronize()

    def __exit__(self, *_) -> None:
        PETSc.DeviceContext.getCurrent().synchronize()


_TO_DEVICE, _TO_HOST = PETSc.Log.Event("PRDPToDevice"), PETSc.Log.Event("PRDPToHost")
