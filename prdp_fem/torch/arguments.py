"""What tensors a layer takes, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from prdp_fem.bridge.controls import Controls
from prdp_fem.problem.inputs import is_real, name_of
from prdp_fem.torch.placement import CPU

__all__ = ["batch_axes", "check_tensors"]

_DTYPES = (torch.float32, torch.float64)


def check_tensors(
    tensors: Sequence[torch.Tensor], controls: Controls, device: torch.device
) -> torch.Size:
    """The batch axes of tensors, one a control, on a device.

    Raises
    ------
    TypeError, ValueError
        For tensors of the wrong number, type, device or shape.
    """
    coefficients = controls.coefficients
    if len(tensors) != len(coefficients):
        raise TypeError(
            f"expected {len(coefficients)} tensor(s), one for each of {_names(coefficients)}, found"
            f" {len(tensors)}"
        )
    for tensor, control, size in zip(tensors, coefficients, controls.sizes):
        _check(tensor, control, size, device)
    try:
        return batch_axes(tensors)
    except RuntimeError:
        raise ValueError(
            "batch axes must be equal, or broadcast against each other, found shapes "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)} for"
            f" {_names(coefficients)}"
        ) from None


def _names(coefficients: Sequence) -> str:
    return ", ".join(f"'{name_of(control)}'" for control in coefficients)


def batch_axes(tensors: Sequence[torch.Tensor]) -> torch.Size:
    """The axes in front of the last ones, broadcast against each other."""
    if len(tensors) == 1:
        return tensors[0].shape[:-1]
    return torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))


def _check(tensor, control, size: int, device: torch.device) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f"expected a tensor for '{name_of(control)}', found a {type(tensor).__name__}"
        )
    if tensor.dtype not in _DTYPES:
        remedy = (
            "give real numbers, such as torch.view_as_real"
            if tensor.is_complex()
            else "call .float() or .double() first"
        )
        raise TypeError(
            f"expected float32 or float64 for '{name_of(control)}', found {tensor.dtype}: {remedy}"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else str(tensor.layout)
        raise TypeError(
            f"expected a dense tensor for '{name_of(control)}', found {kind}: call .to_dense(), or"
            " .to_padded_tensor(), first"
        )
    if tensor.device != device:
        where = "the CPU" if device == CPU else str(device)
        raise ValueError(
            f"expected a tensor on {where} for '{name_of(control)}', where the layer is, found one"
            f" on {tensor.device}: move the tensor by .to('{device}'), or the layer by"
            f" .to('{tensor.device}')"
        )
    if device != CPU and not tensor.is_contiguous():
        raise ValueError(
            f"expected a contiguous tensor for '{name_of(control)}', since PETSc works on its"
            f" memory, found strides {tensor.stride()}: call .contiguous() first"
        )
    shape = tensor.shape
    if not shape or shape[-1] != size:
        reminder = (
            "the components of the Constant"
            if is_real(control)
            else "the dofs that this rank owns, not all ranks together"
        )
        raise ValueError(
            f"expected a last axis of {size} for '{name_of(control)}' ({reminder}), found shape"
            f" {tuple(shape)}"
        )
