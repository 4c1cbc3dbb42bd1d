"""What is done at PETSc's level as functions of torch's autograd. Each call keeps what its own backward pass needs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps

import numpy as np
import torch

from prdp_fem.boundary import BoundaryData
from prdp_fem.functional import Functional
from prdp_fem.inputs import local_values
from prdp_fem.point import Point

__all__ = ["BoundaryValues", "FunctionalValue", "Solve"]

# Among the arguments of Solve: where the boundary values and the guess are, and how many come before the inputs' tensors.
_BOUNDARY, _GUESS, _BEFORE_TENSORS = 3, 4, 5


def _first_order(backward):
    """Have a backward pass that is differentiated again raise; torch's own once_differentiable would let some through."""
    @wraps(backward)
    def checked(ctx, cotangent):
        if not torch.is_grad_enabled():
            return backward(ctx, cotangent)
        return _OfFirstOrder.apply(backward, ctx, cotangent, *ctx.saved_tensors)
    return checked


class _OfFirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backward, call, cotangent, *tensors):
        return backward(call, cotangent)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("second derivatives through a SolverLayer are not available: call backward without create_graph=True")


class Solve(torch.autograd.Function):
    """The solve of a batch, sample by sample: each gives the same bits, whatever stands beside it in the batch.

    Called with the solver, the batch axes, the places of the inputs among the system's, the boundary values and the guess (tensors,
    or None for what the problem has), and the inputs' tensors; gives float64.
    """

    @staticmethod
    def forward(ctx, solver, batch: torch.Size, indices: Sequence[int], boundary, guess, *tensors: torch.Tensor) -> torch.Tensor:
        system = solver.system
        point = solver.point(without=indices, has_boundary=boundary is None)
        if boundary is not None:
            point.boundary = _rows(boundary, batch) if boundary.ndim > 1 else _row(boundary)
        if guess is not None:
            point.guess = _rows(guess, batch) if guess.ndim > 1 else _row(guess)
        varying = _place(point, indices, batch, tensors)
        ctx.solver, ctx.batch, ctx.indices, ctx.setting, ctx.point, ctx.varying = solver, batch, indices, solver.setting, point, varying
        ctx.boundary, ctx.guess = _like(boundary), _like(guess)
        ctx.save_for_backward(*tensors)
        solutions = np.empty((batch.numel(), system.size))
        ctx.records = system.solve(point, ctx.setting, solutions, varying)
        ctx.mesh_stamp = system.mesh_stamp()
        # A copy: the caller may change what it gets in place, and the backward pass must not see it.
        ctx.solutions = solutions.copy() if boundary is not None or system.needs_solutions(indices) else None
        return torch.from_numpy(solutions.reshape(*batch, system.size))

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        system, batch = ctx.solver.system, ctx.batch
        if ctx.mesh_stamp != system.mesh_stamp():
            raise RuntimeError("a mesh of the problem has moved between the forward and the backward pass: call backward before moving it")
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[_BEFORE_TENSORS:]
        rows = batch.numel()
        gradients = {index: np.empty((rows, tensor.shape[-1])) for index, tensor, wanted in zip(ctx.indices, tensors, needed) if wanted}
        boundary = np.empty((rows, system.size)) if ctx.needs_input_grad[_BOUNDARY] else None
        guess = np.empty((rows, system.size)) if ctx.needs_input_grad[_GUESS] else None
        system.solve_adjoint(ctx.point, ctx.setting, _rows(cotangent, batch), ctx.solutions, ctx.records, gradients, varying=ctx.varying,
                             boundary=boundary, guess=guess)
        return (None, None, None, None if boundary is None else _reduced(boundary, batch, ctx.boundary),
                None if guess is None else _reduced(guess, batch, ctx.guess),
                *(_reduced(gradients[index], batch, tensor) if index in gradients else None
                  for index, tensor in zip(ctx.indices, tensors)))


class BoundaryValues(torch.autograd.Function):
    """Boundary values from the tensors that they are made of: called with the boundary data, the batch axes and a tensor an input."""

    @staticmethod
    def forward(ctx, data: BoundaryData, batch: torch.Size, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.data, ctx.batch, ctx.others = data, batch, data.others()
        ctx.save_for_backward(*tensors)
        rows = [data.values(values, ctx.others) for values in _each_row(data.inputs, batch, tensors)]
        return torch.from_numpy(np.array(rows).reshape(*batch, data.size))

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        data, tensors = ctx.data, ctx.saved_tensors
        cotangents = _rows(cotangent, ctx.batch)
        gradients = [np.array([data.gradient(place, values, ctx.others, cotangents[row])
                               for row, values in enumerate(_each_row(data.inputs, ctx.batch, tensors))]).reshape(-1, tensor.shape[-1])
                     if wanted else None for place, wanted, tensor in zip(data.inputs, ctx.needs_input_grad[2:], tensors)]
        return None, None, *(None if gradient is None else _reduced(gradient, ctx.batch, tensor)
                             for gradient, tensor in zip(gradients, tensors))


class FunctionalValue(torch.autograd.Function):
    """A functional of the solution: called with it, the batch axes, the places of its inputs, the solution and their tensors."""

    @staticmethod
    def forward(ctx, functional: Functional, batch: torch.Size, places: Sequence[int], solution: torch.Tensor,
                *tensors: torch.Tensor) -> torch.Tensor:
        ctx.functional, ctx.batch, ctx.places = functional, batch, places
        ctx.others = {index: local_values(entry.original) for index, entry in enumerate(functional.inputs) if index not in places}
        ctx.save_for_backward(solution, *tensors)
        values = [functional.value(row, {**ctx.others, **varying})
                  for row, varying in zip(_rows(solution, batch), _each_row(places, batch, tensors))]
        return torch.tensor(values, dtype=torch.float64).view(batch)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        solution, *tensors = ctx.saved_tensors
        by = [place for place, wanted in zip([None, *ctx.places], ctx.needs_input_grad[3:]) if wanted]
        weights = cotangent.to(torch.float64).expand(ctx.batch).reshape(-1, 1).numpy()
        rows = [ctx.functional.gradients(row, {**ctx.others, **varying}, by)
                for row, varying in zip(_rows(solution, ctx.batch), _each_row(ctx.places, ctx.batch, tensors))]
        gradients = {place: weights*np.stack(column) for place, column in zip(by, zip(*rows))}
        return None, None, None, *(_reduced(gradients[place], ctx.batch, tensor) if place in gradients else None
                                   for place, tensor in zip([None, *ctx.places], (solution, *tensors)))


def _row(tensor: torch.Tensor) -> np.ndarray:
    """A tensor without batch axes as float64; without a copy where it is that already."""
    return _rows(tensor, torch.Size())[0]


def _rows(tensor: torch.Tensor, batch: torch.Size) -> np.ndarray:
    """A tensor as float64 rows, one a sample; without a copy where it is that already."""
    tensor, shape = tensor.detach().resolve_neg(), tensor.shape
    if tensor.dtype is not torch.float64 or shape[:-1] != batch:
        tensor = tensor.to(torch.float64).expand(*batch, shape[-1])
    rows = tensor.numpy()
    return rows if rows.ndim == 2 and rows.flags.c_contiguous else np.ascontiguousarray(rows).reshape(batch.numel(), shape[-1])


def _each_row(places: Sequence[int] | Mapping, batch: torch.Size, tensors: Sequence[torch.Tensor]):
    """The values of inputs by their places, sample by sample."""
    columns = [_rows(tensor, batch) for tensor in tensors]
    for row in range(batch.numel()):
        yield {place: column[row] for place, column in zip(places, columns)}


def _place(point: Point, indices: Sequence[int], batch: torch.Size, tensors: Sequence[torch.Tensor]) -> dict[int, np.ndarray]:
    """Put the inputs where they belong: into the point, or, those with batch axes, among what varies, which is returned."""
    varying = {}
    for index, tensor in zip(indices, tensors):
        if tensor.ndim == 1:
            point.values[index] = _row(tensor)
        else:
            varying[index] = _rows(tensor, batch)
    return varying


def _like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of the same shape and type, that has no values."""
    return None if tensor is None else torch.empty_like(tensor, device="meta")


def _reduced(gradient: np.ndarray, batch: torch.Size, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient by samples, summed over the batch axes that an input was shared by."""
    gradient, shape = torch.from_numpy(gradient), tensor.shape
    if gradient.shape != shape:
        gradient = gradient.view(*batch, shape[-1]).sum_to_size(shape)
    return gradient if tensor.dtype is torch.float64 else gradient.to(tensor.dtype)
