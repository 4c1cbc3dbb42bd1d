"""Where the tensors of a layer are, and how they get to where its solver is.

A layer is on the CPU, as any module of torch's, until it is moved. There a solver on the host works
on the memory of the tensors, and one on a device copies them. A layer on a CUDA or HIP device has
its solver there, which works on the memory of tensors there; what Firedrake assembles from is
copied to the host. All copies are counted in the solver's statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from firedrake.petsc import PETSc

from prdp_fem.memory.devices import HOST, Device
from prdp_fem.statistics import Statistics

__all__ = ["CPU", "ordered", "placed", "room", "solver_device", "tensor_device", "to_host"]


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


def room(
    batch: Sequence[int], size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | np.ndarray]:
    """A tensor of shape (*batch, size), and its memory as the rows that a solution map writes to.

    These are an array of NumPy, or a tensor on a device.
    """
    if device == CPU:
        rows = np.empty((math.prod(batch), size))
        return torch.from_numpy(rows.reshape(*batch, size)), rows
    tensor = torch.empty(*batch, size, dtype=torch.float64, device=device)
    return tensor, tensor.view(math.prod(batch), size)


def ordered(device: torch.device) -> AbstractContextManager[None]:
    """Have what is inside begin once torch's work on a device is done, and leave it when PETSc's
    is: each has its own stream there.
    """
    return _AT_ONCE if device == CPU else _in_order(device)


@contextmanager
def _in_order(device: torch.device) -> Iterator[None]:
    torch.cuda.current_stream(device).synchronize()
    try:
        yield
    finally:
        PETSc.DeviceContext.getCurrent().synchronize()


_AT_ONCE = nullcontext()

_TO_DEVICE, _TO_HOST = PETSc.Log.Event("PRDPToDevice"), PETSc.Log.Event("PRDPToHost")
