"""Firedrake and PETSc objects as tensors, and back; without a copy where memory can be shared."""

from __future__ import annotations

import firedrake
import torch
from firedrake import Cofunction, Constant, Function
from firedrake.functionspaceimpl import WithGeometryBase
from firedrake.petsc import PETSc

from prdp_fem.arguments import flag, instance, shown
from prdp_fem.memory.devices import DEVICES, usable_devices
from prdp_fem.problem.inputs import local_values, set_local_values
from prdp_fem.torch.placement import solver_device

__all__ = ["from_torch", "to_torch"]


def to_torch(
    x: Function | Cofunction | Constant | PETSc.Vec, *, copy: bool = False
) -> torch.Tensor:
    """The rank-local values of ``x`` as a tensor; collective for a Function or Cofunction.

    Parameters
    ----------
    x : Function, Cofunction, Constant or PETSc.Vec
    copy : bool
        Copy even where the memory can be shared.

    Returns
    -------
    torch.Tensor
        Shape (n,), of PETSc's scalar type: the dofs that this rank owns in the order of the PETSc
        vector, or the components of a Constant. It shares the memory of ``x``, so that each sees
        what is written to the other (in parallel, write to the tensor only before the next exchange
        of halos), except for mixed Functions, whose parts lie apart, and vectors on devices that
        torch does not know, which are copied. A CUDA or HIP vector gives a tensor on its device.

    Raises
    ------
    TypeError
        For anything else.
    ValueError
        For a vector that was destroyed, or has no values yet.
    """
    flag("copy", copy)
    if isinstance(x, PETSc.Vec):
        if not x.handle or x.getType() is None:
            raise ValueError(
                "expected a vector with values, found one that was destroyed, or not set up yet"
            )
        if x.getType() in _UNKNOWN_TO_TORCH:
            return torch.from_numpy(x.array_r.copy())
        tensor = torch.from_dlpack(x)
        return tensor.clone() if copy else tensor
    if not isinstance(x, (Function, Cofunction, Constant)):
        raise TypeError(
            f"expected a Function, Cofunction, Constant or PETSc.Vec, found a {type(x).__name__}"
        )
    if copy or (not isinstance(x, Constant) and len(x.dat) > 1):
        return torch.from_numpy(local_values(x))
    # What can be written to: Firedrake exchanges halos again after it.
    return torch.from_numpy(x.dat.data.reshape(-1))


def from_torch(tensor: torch.Tensor, V=None):
    """A tensor of rank-local values as a Firedrake or PETSc object.

    Parameters
    ----------
    tensor : torch.Tensor
        Shape (n,) or, for a scalar Constant, (); on the CPU or, for a vector, on a device that
        PETSc was built for. It is detached.
    V : FunctionSpace, Function, Cofunction, Constant or None
        A space to make a Function (or Cofunction) of, an object to overwrite, or None for a PETSc
        vector.

    Returns
    -------
    Function, Cofunction, Constant or PETSc.Vec
        A vector shares the memory of a contiguous tensor of PETSc's scalar type. Everything else is
        a copy: Firedrake keeps room for halos behind the dofs.

    Raises
    ------
    TypeError
        For what is no tensor of real numbers, and for another ``V``.
    ValueError
        For a tensor of the wrong shape, one on a device that PETSc does not know, one that is not
        on the CPU for a Firedrake object, and one on a device that is not contiguous.
    """
    instance("tensor", tensor, torch.Tensor, "a tensor")
    if V is not None and not isinstance(V, (Function, Cofunction, Constant, WithGeometryBase)):
        raise TypeError(
            f"expected a FunctionSpace, Function, Cofunction, Constant or None, found {shown(V)}"
        )
    if tensor.is_complex() or tensor.layout != torch.strided:
        raise TypeError(
            f"expected a dense tensor of real numbers, found one of {tensor.dtype} and "
            f"{tensor.layout}"
        )
    if not tensor.is_cpu:
        return _vector_on_device(tensor, V)
    values = tensor.detach().to(torch.float64).contiguous().reshape(-1)
    if V is None:
        return _vector_on(values)
    target = V
    if not isinstance(V, (Function, Cofunction, Constant)):
        target = (
            Cofunction(V)
            if isinstance(V, firedrake.functionspaceimpl.FiredrakeDualSpace)
            else Function(V)
        )
    expected = local_values(target).size
    if values.numel() != expected or (
        tensor.ndim > 1 and tuple(tensor.shape) not in _shapes(target)
    ):
        raise ValueError(
            f"expected a tensor of {expected} values (the dofs that this rank owns), found"
            f" {tuple(tensor.shape)}"
        )
    set_local_values(target, values.numpy())
    return target


def _shapes(target) -> list[tuple[int, ...]]:
    """Other shapes than that of a vector, in which values are in the order of the dofs, too: nodes
    by components.
    """
    if isinstance(target, Constant):
        return [target.ufl_shape]
    return [part.shape for part in ([] if len(target.dat) > 1 else [target.dat.data_ro])]


def _vector_on_device(tensor: torch.Tensor, V) -> PETSc.Vec:
    if V is not None:
        raise ValueError(
            "expected a tensor on the CPU, where Firedrake has its values, found one on"
            f" {tensor.device}: call .cpu() first"
        )
    usable = [device.name for device in usable_devices()]
    try:
        wanted = solver_device(tensor.device)
    except ValueError:
        wanted = None
    if wanted not in usable:
        raise ValueError(
            "expected a tensor on the CPU or a device of PETSc's (this one has"
            f" {', '.join(usable) or 'none'}), found one on {tensor.device}: call .cpu() first"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            "expected a contiguous tensor, whose memory the vector can share, found strides"
            f" {tensor.stride()}: call .contiguous() first"
        )
    return _vector_on(tensor.detach().to(torch.float64).reshape(-1))


def _vector_on(values: torch.Tensor) -> PETSc.Vec:
    comm = firedrake.COMM_SELF if firedrake.COMM_WORLD.size == 1 else firedrake.COMM_WORLD
    vector = PETSc.Vec().createWithDLPack(values, comm=comm)
    vector.setAttr("prdp_fem_tensor", values)  # whose memory it is, which petsc4py does not keep
    return vector


_UNKNOWN_TO_TORCH = frozenset(
    f"{prefix}{device.vec_type}"
    for device in DEVICES.values()
    if device.tensors == "cpu"
    for prefix in ("seq", "mpi")
)
