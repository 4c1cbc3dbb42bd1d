"""What is done at PETSc's level as functions of torch's autograd. Each call keeps what its own backward pass needs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import wraps

import numpy as np
import torch

from prdp_fem.boundary import BoundaryData
from prdp_fem.functional import Functional
from prdp_fem.inputs import local_values
from prdp_fem.statistics import Statistics
from prdp_fem.torch.placement import CPU, ordered, placed, room, to_host

__all__ = ["BoundaryValues", "FunctionalValue", "Solve"]

# Among the arguments of Solve: where the boundary values and the guess are, and how many come before the inputs' tensors.
_BOUNDARY, _GUESS, _BEFORE_TENSORS = 4, 5, 6


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

    Called with the solver, the device of the tensors, the batch axes, the places of the inputs among the system's, the boundary values and
    the guess (tensors, or None for what the problem has), and the inputs' tensors; gives float64.
    """

    @staticmethod
    def forward(ctx, solver, device: torch.device, batch: torch.Size, indices: Sequence[int], boundary, guess,
                *tensors: torch.Tensor) -> torch.Tensor:
        system, statistics = solver.system, solver.statistics
        point = solver.point(without=indices, has_boundary=boundary is None)
        if boundary is not None:
            point.boundary = _shared_or_rows(to_host(_rows(boundary, _axes(boundary, batch)), statistics), boundary)
        if guess is not None:
            point.guess = _shared_or_rows(to_host(_rows(guess, _axes(guess, batch)), statistics), guess)
        varying = {}
        for index, tensor in zip(indices, tensors):
            rows = _rows(tensor, _axes(tensor, batch))
            values = _shared_or_rows(_handed(rows) if index in system.device_inputs else to_host(rows, statistics), tensor)
            if tensor.ndim > 1:
                varying[index] = values
            else:
                point.values[index] = values
        ctx.solver, ctx.batch, ctx.indices, ctx.setting, ctx.point, ctx.varying = solver, batch, indices, solver.setting, point, varying
        ctx.boundary, ctx.guess, ctx.memory, ctx.device = _like(boundary), _like(guess), system.memory, device
        ctx.save_for_backward(*tensors)
        solutions, written = room(batch, system.size, device if system.takes_device_rows else CPU)
        with ordered(device):
            ctx.records = system.solve(point, ctx.setting, written, varying)
        ctx.mesh_stamp = system.mesh_stamp()
        # A copy: the caller may change what it gets in place, and the backward pass must not see it.
        ctx.solutions = _handed(_rows(solutions.clone(), batch)) if boundary is not None or system.needs_solutions(indices) else None
        return solutions if solutions.device == device else placed(solutions.numpy(), device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        system, statistics, batch = ctx.solver.system, ctx.solver.statistics, ctx.batch
        if ctx.memory is not system.memory:
            raise RuntimeError("the solver has moved to another device between the forward and the backward pass: call backward before "
                               "moving it")
        if ctx.mesh_stamp != system.mesh_stamp():
            raise RuntimeError("a mesh of the problem has moved between the forward and the backward pass: call backward before moving it")
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[_BEFORE_TENSORS:]
        rows, device = batch.numel(), ctx.device
        rooms = {index: room(batch, tensor.shape[-1], device if index in system.device_inputs else CPU)
                 for index, tensor, wanted in zip(ctx.indices, tensors, needed) if wanted}
        boundary = np.empty((rows, system.size)) if ctx.needs_input_grad[_BOUNDARY] else None
        guess = np.empty((rows, system.size)) if ctx.needs_input_grad[_GUESS] else None
        cotangents = _rows(cotangent, batch)
        cotangents = _handed(cotangents) if system.takes_device_rows else to_host(cotangents, statistics)
        with ordered(device):
            system.solve_adjoint(ctx.point, ctx.setting, cotangents, ctx.solutions, ctx.records,
                                 {index: written for index, (_, written) in rooms.items()}, varying=ctx.varying, boundary=boundary,
                                 guess=guess)
        gradients = {index: gradient if gradient.device == tensor.device else placed(gradient.numpy(), tensor.device, statistics)
                     for (index, (gradient, _)), tensor in zip(rooms.items(), _wanted(tensors, needed))}
        return (None, None, None, None, None if boundary is None else _reduced(placed(boundary, device, statistics), batch, ctx.boundary),
                None if guess is None else _reduced(placed(guess, device, statistics), batch, ctx.guess),
                *(_reduced(gradients[index], batch, tensor) if index in gradients else None
                  for index, tensor in zip(ctx.indices, tensors)))


class BoundaryValues(torch.autograd.Function):
    """Boundary values from the tensors that they are made of: called with the boundary data, the solver's statistics, the batch axes and
    a tensor an input. They are on the device of these, and go to the host again to be lifted: torch works a graph backwards in one
    thread for each device, and Firedrake is to be used by one thread.
    """

    @staticmethod
    def forward(ctx, data: BoundaryData, statistics: Statistics, batch: torch.Size, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.data, ctx.statistics, ctx.batch, ctx.others = data, statistics, batch, data.others()
        ctx.save_for_backward(*tensors)
        rows = [data.values(values, ctx.others) for values in _each_row(data.inputs, batch, tensors, statistics)]
        return placed(np.array(rows).reshape(*batch, data.size), tensors[0].device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        data, tensors = ctx.data, ctx.saved_tensors
        cotangents = to_host(_rows(cotangent, ctx.batch), ctx.statistics)
        samples = list(_each_row(data.inputs, ctx.batch, tensors, ctx.statistics))
        gradients = [np.array([data.gradient(place, values, ctx.others, cotangents[row])
                               for row, values in enumerate(samples)]).reshape(-1, tensor.shape[-1])
                     if wanted else None for place, wanted, tensor in zip(data.inputs, ctx.needs_input_grad[3:], tensors)]
        return None, None, None, *(None if gradient is None else
                                   _reduced(placed(gradient, tensor.device, ctx.statistics), ctx.batch, tensor)
                                   for gradient, tensor in zip(gradients, tensors))


class FunctionalValue(torch.autograd.Function):
    """A functional of the solution: called with it, the solver's statistics, the batch axes, the places of its inputs, the solution and
    their tensors.
    """

    @staticmethod
    def forward(ctx, functional: Functional, statistics: Statistics, batch: torch.Size, places: Sequence[int], solution: torch.Tensor,
                *tensors: torch.Tensor) -> torch.Tensor:
        ctx.functional, ctx.statistics, ctx.batch, ctx.places = functional, statistics, batch, places
        ctx.others = {index: local_values(entry.original) for index, entry in enumerate(functional.inputs) if index not in places}
        ctx.save_for_backward(solution, *tensors)
        values = [functional.value(row, {**ctx.others, **varying})
                  for row, varying in zip(to_host(_rows(solution, batch), statistics), _each_row(places, batch, tensors, statistics))]
        return placed(np.array(values, dtype=float).reshape(batch), solution.device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        solution, *tensors = ctx.saved_tensors
        by = [place for place, wanted in zip([None, *ctx.places], ctx.needs_input_grad[4:]) if wanted]
        weights = to_host(cotangent.to(torch.float64).expand(ctx.batch).reshape(-1, 1), ctx.statistics)
        rows = [ctx.functional.gradients(row, {**ctx.others, **varying}, by)
                for row, varying in zip(to_host(_rows(solution, ctx.batch), ctx.statistics),
                                        _each_row(ctx.places, ctx.batch, tensors, ctx.statistics))]
        gradients = {place: weights*np.stack(column) for place, column in zip(by, zip(*rows))}
        return None, None, None, None, *(_reduced(placed(gradients[place], tensor.device, ctx.statistics), ctx.batch, tensor)
                                         if place in gradients else None
                                         for place, tensor in zip([None, *ctx.places], (solution, *tensors)))


def _rows(tensor: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """A tensor as contiguous float64 rows, one a sample, shape (rows, n); without a copy where it is that already."""
    tensor, shape = tensor.detach().resolve_neg(), tensor.shape
    if tensor.dtype is not torch.float64 or shape[:-1] != batch:
        tensor = tensor.to(torch.float64).expand(*batch, shape[-1])
    return tensor.reshape(batch.numel(), shape[-1]).contiguous()


def _axes(tensor: torch.Tensor, batch: torch.Size) -> torch.Size:
    """The batch axes that a tensor is to have: none where it has none, and is shared by the batch."""
    return batch if tensor.ndim > 1 else torch.Size()


def _shared_or_rows(rows, tensor: torch.Tensor):
    """Rows of a tensor, or the only one where that is shared by the batch."""
    return rows if tensor.ndim > 1 else rows[0]


def _handed(rows: torch.Tensor) -> torch.Tensor | np.ndarray:
    """What a System that takes tensors on its device is given."""
    return rows.numpy() if rows.is_cpu else rows


def _wanted(tensors: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor]:
    return [tensor for tensor, wanted in zip(tensors, needed) if wanted]


def _each_row(places: Sequence[int] | Mapping, batch: torch.Size, tensors: Sequence[torch.Tensor], statistics: Statistics):
    """The values of inputs by their places, sample by sample."""
    columns = [to_host(_rows(tensor, batch), statistics) for tensor in tensors]
    for row in range(batch.numel()):
        yield {place: column[row] for place, column in zip(places, columns)}


def _like(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor of the same shape and type, that has no values."""
    return None if tensor is None else torch.empty_like(tensor, device="meta")


def _reduced(gradient: torch.Tensor, batch: torch.Size, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient by samples, summed over the batch axes that an input was shared by."""
    shape = tensor.shape
    if gradient.shape != shape:
        gradient = gradient.view(*batch, shape[-1]).sum_to_size(shape)
    return gradient if tensor.dtype is torch.float64 else gradient.to(tensor.dtype)

