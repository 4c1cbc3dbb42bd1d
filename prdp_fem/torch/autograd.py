"""What is done at PETSc's level as functions of torch's autograd.

Each call keeps what its own backward pass needs, and lets torch have it: fields are saved as
tensors, which torch releases after the backward pass, and which a checkpoint, or whoever else has
put hooks on saved tensors, takes away.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import wraps
from typing import NamedTuple

import numpy as np
import torch

from prdp_fem.bridge.evaluations import (
    boundary_gradients,
    boundary_values,
    functional_gradients,
    functional_values,
)
from prdp_fem.bridge.samples import Given, Samples, Saved
from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.functional import Functional
from prdp_fem.ranks.finite import LARGEST
from prdp_fem.refinement.settings import Setting
from prdp_fem.statistics import Statistics
from prdp_fem.torch.placement import Place, placed, to_host
from prdp_fem.torch.surroundings import Surroundings, check_number

__all__ = [
    "BoundaryValues",
    "Call",
    "FunctionalValue",
    "OnceOnly",
    "Reverse",
    "transforms_are_active",
]

# What stands before the inputs among what is given: boundary values and the guess.
_BEFORE_INPUTS = 2
_NO_AXES = torch.Size()
_LARGEST_SINGLE = torch.finfo(torch.float32).max

# What torch.autograd.Function asks at each call, too; there are no public names.
transforms_are_active = torch._C._are_functorch_transforms_active
# A batch that is hidden in a tensor by an older mechanism of torch's, of which an autograd.Function
# cannot have a rule.
_is_batched = torch._C._functorch.is_legacy_batchedtensor

_ONCE_ONLY = (
    "second derivatives through a SolverLayer are not available: call backward without"
    " create_graph=True, and do not nest derivatives of torch.func"
)
_BACKWARDS_ONLY = (
    "forward-mode derivatives through a SolverLayer are not available: use backward(), or"
    " torch.func.vjp, grad or jacrev, which give the same by the adjoint"
)


def _first_order(backward):
    """Have a backward pass that is differentiated again raise; torch's own once_differentiable
    would let some through.
    """

    @wraps(backward)
    def checked(ctx, cotangent):
        if torch.is_grad_enabled() or transforms_are_active():
            return _OfFirstOrder.apply(backward, ctx, cotangent, *ctx.saved_tensors)
        if _is_batched(cotangent):
            raise RuntimeError(
                "a SolverLayer takes no batches of cotangents by is_grads_batched=True or"
                " vectorize=True: leave them away, or use torch.func.vjp, vmap and jacrev"
            )
        with ctx.lock:
            return backward(ctx, cotangent)

    return checked


class OnceOnly(torch.autograd.Function):
    """A derivative, which has none itself."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(_ONCE_ONLY)

    @staticmethod
    def jvp(ctx, *_):
        raise RuntimeError(_ONCE_ONLY)


class _OfFirstOrder(OnceOnly):
    """A backward pass that may be differentiated, which raises, or be asked for a batch of
    cotangents by a transform of torch.func.
    """

    @staticmethod
    def forward(backward, call, cotangent, *tensors):
        with call.lock:
            return backward(call, cotangent)

    @staticmethod
    def vmap(info, in_dims, backward, call, cotangent, *tensors):
        each = [
            _OfFirstOrder.apply(backward, call, one, *tensors)
            for one in cotangent.movedim(in_dims[2], 0)
        ]
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each))
        return stacked, tuple(None if part is None else 0 for part in stacked)


class Reverse(torch.autograd.Function):
    """A function that is differentiated backwards only."""

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_BACKWARDS_ONLY)


class Call(NamedTuple):
    """What a call of a layer is made with, beside its tensors.

    Attributes
    ----------
    samples : Samples
    surroundings : Surroundings
    place : Place
        Where all tensors are.
    batch : torch.Size
        The batch axes.
    setting : Setting or None
    """

    samples: Samples
    surroundings: Surroundings
    place: Place
    batch: torch.Size
    setting: Setting | None

    def values(
        self,
        tensors: Sequence[torch.Tensor | None],
        moved: Sequence[torch.Tensor | None] = (),
    ) -> tuple[list, list[torch.Tensor | None]]:
        """What tensors of boundary values, the guess and inputs give.

        Returns
        -------
        values : list
            Rows, or what all rows have alike; None for None.
        moved : list of torch.Tensor or None
            What had to be copied from a device to the host, with None for what had not, or nothing;
            it may be given when it is asked for again.
        """
        values: list = []
        copies: list[torch.Tensor | None] = []
        for place, tensor in enumerate(tensors):
            before = moved[place] if moved else None
            if before is not None:
                values.append(before.numpy())
            elif tensor is None:
                values.append(None)
            else:
                is_shared, stays = tensor.ndim == 1, tensor.is_cpu or self._may_stay(place)
                rows = _rows(tensor, _NO_AXES if is_shared else self.batch)
                found = _handed(rows) if stays else to_host(rows, self.samples.statistics)
                values.append(found[0] if is_shared else found)
                if not stays:
                    copies = copies or [None] * len(tensors)
                    copies[place] = torch.from_numpy(values[-1])
        return values, copies

    def _may_stay(self, place: int) -> bool:
        """Whether the tensor at a place may be on the device of the solver."""
        samples = self.samples
        return place >= _BEFORE_INPUTS and (
            samples.indices[place - _BEFORE_INPUTS] in samples.needs.device_inputs
        )


class Solve(Reverse):
    """The solve of a batch, sample by sample: each gives the same bits, whatever stands beside it
    in the batch.

    Called with a :class:`Call`, the boundary values and the guess (tensors, or None for what the
    problem has), and the inputs' tensors; gives float64.
    """

    @staticmethod
    def forward(ctx, call: Call, boundary, guess, *tensors: torch.Tensor) -> torch.Tensor:
        samples, surroundings, place, batch, setting = call
        needs = samples.needs
        values, moved = call.values((boundary, guess, *tensors))
        with place.in_order:
            solutions, solved, saved = samples.solve(
                Given(batch, values, _largest(tensors), place.empty), setting
            )
        to_save = [
            boundary,
            guess if needs.guess else None,
            *tensors,
            *surroundings.saved(setting, saved.coefficients),
        ]
        if needs.solutions:
            # A copy: the caller may change what it gets in place, and the backward pass must not
            # see it.
            is_on_host = isinstance(solutions, np.ndarray)
            to_save.append(torch.from_numpy(solutions.copy()) if is_on_host else solutions.clone())
        to_save += moved
        to_save += map(torch.from_numpy, saved.fields)
        ctx.lock = surroundings.lock
        # Nothing of the size of a field is among these.
        ctx.call = call, surroundings.number, solved, len(saved.coefficients), bool(moved)
        ctx.save_for_backward(*to_save)
        return place.tensor(solutions, batch, samples.statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        call, number, solved, coefficient_count, has_moved = ctx.call
        samples, _, place, batch, _ = call
        needs, statistics = samples.needs, samples.statistics
        all_saved, count = ctx.saved_tensors, _BEFORE_INPUTS + len(samples.indices)
        tensors = all_saved[:count]
        if all_saved[count] is not number:
            check_number(all_saved[count], number)
        rest = iter(all_saved[count + 1 :])
        coefficients = [one.numpy() for one in _next(rest, coefficient_count)]
        solutions = _handed(next(rest)) if needs.solutions else None
        moved = _next(rest, count) if has_moved else ()
        saved = Saved(coefficients, solutions, [field.numpy() for field in rest])
        values: Sequence = ()
        if not needs.unread:
            values, _ = call.values(tensors, moved)
        cotangents = _rows(cotangent, batch)
        with place.in_order:
            gradients = samples.pull_back(
                solved,
                Given(batch, values, _largest(tensors), place.empty),
                saved,
                _handed(cotangents) if needs.device_rows else to_host(cotangents, statistics),
                ctx.needs_input_grad[1:],
            )
        return None, *[
            None if rows is None else _result(rows, batch, tensor, place, statistics)
            for rows, tensor in zip(gradients, tensors)
        ]


class BoundaryValues(Reverse):
    """Boundary values from the tensors that they are made of.

    Called with the boundary data, the surroundings, the solver's statistics, the batch axes and a
    tensor an input. They are on the device of these, and go to the host again to be lifted: torch
    works a graph backwards in one thread for each device, and Firedrake is to be used by one
    thread.
    """

    @staticmethod
    def forward(
        ctx,
        data: BoundaryData,
        surroundings: Surroundings,
        statistics: Statistics,
        batch: torch.Size,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.lock = surroundings.lock
        ctx.data = data
        ctx.statistics = statistics
        ctx.batch = batch
        others = data.others()
        ctx.save_for_backward(*tensors, *surroundings.saved(None, others))
        ctx.number = surroundings.number
        rows = boundary_values(data, _given(batch, tensors, statistics), others)
        return placed(rows.reshape(*batch, data.size), tensors[0].device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        batch, statistics, saved = ctx.batch, ctx.statistics, iter(ctx.saved_tensors)
        tensors = _next(saved, len(ctx.data.inputs))
        if (number := next(saved)) is not ctx.number:
            check_number(number, ctx.number)
        gradients = boundary_gradients(
            ctx.data,
            _given(batch, tensors, statistics, largest=_largest(tensors)),
            [other.numpy() for other in saved],
            to_host(_rows(cotangent, batch), statistics),
            ctx.needs_input_grad[4:],
        )
        return *(None,) * 4, *[
            None if rows is None else _result(rows, batch, tensor, Place(tensor.device), statistics)
            for rows, tensor in zip(gradients, tensors)
        ]


class FunctionalValue(Reverse):
    """A functional of the solution.

    Called with it, the surroundings, the solver's statistics, the batch axes, the places of its
    inputs, the solution and their tensors.
    """

    @staticmethod
    def forward(
        ctx,
        functional: Functional,
        surroundings: Surroundings,
        statistics: Statistics,
        batch: torch.Size,
        places: Sequence[int],
        solution: torch.Tensor,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.lock = surroundings.lock
        ctx.functional = functional
        ctx.statistics = statistics
        ctx.batch = batch
        ctx.places = places
        others = functional.others(places)
        ctx.others = list(others)
        ctx.save_for_backward(solution, *tensors, *surroundings.saved(None, list(others.values())))
        ctx.number = surroundings.number
        given = _given(batch, (solution, *tensors), statistics, largest=_largest(tensors))
        values = functional_values(functional, places, given, others)
        return placed(values.reshape(batch), solution.device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        batch, statistics, saved = ctx.batch, ctx.statistics, iter(ctx.saved_tensors)
        variables = _next(saved, 1 + len(ctx.places))
        if (number := next(saved)) is not ctx.number:
            check_number(number, ctx.number)
        others = {index: other.numpy() for index, other in zip(ctx.others, saved)}
        weights = cotangent.to(torch.float64).expand(batch).reshape(-1, 1)
        gradients = functional_gradients(
            ctx.functional,
            ctx.places,
            _given(batch, variables, statistics, largest=_largest(variables[1:])),
            others,
            to_host(weights, statistics),
            ctx.needs_input_grad[5:],
        )
        return *(None,) * 5, *[
            None
            if rows is None
            else _result(rows, batch, variable, Place(variable.device), statistics)
            for rows, variable in zip(gradients, variables)
        ]


def _next(values, count: int) -> list:
    """So many of an iterator."""
    return [next(values) for _ in range(count)]


def _given(
    batch: torch.Size,
    tensors: Iterable[torch.Tensor],
    statistics: Statistics,
    *,
    largest: float = LARGEST,
) -> Given:
    """What tensors give on the host, with a row for each sample."""
    return Given(batch, [to_host(_rows(one, batch), statistics) for one in tensors], largest)


def _rows(tensor: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """A tensor as contiguous float64 rows, one a sample, shape (rows, n); without a copy where it
    is that already.
    """
    tensor, shape = tensor.detach().resolve_neg(), tensor.shape
    if tensor.dtype is not torch.float64 or shape[:-1] != batch:
        tensor = tensor.to(torch.float64).expand(*batch, shape[-1])
    return tensor.reshape(batch.numel(), shape[-1]).contiguous()


def _largest(tensors: Iterable[torch.Tensor | None]) -> float:
    """The largest number that the types of all of these have."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float32:
            return _LARGEST_SINGLE
    return LARGEST


def _handed(rows: torch.Tensor) -> torch.Tensor | np.ndarray:
    """What a solution map that takes tensors on its device is given."""
    return rows.numpy() if rows.is_cpu else rows


def _result(
    rows, batch: torch.Size, tensor: torch.Tensor, place: Place, statistics: Statistics
) -> torch.Tensor:
    """Rows of gradients as the gradient by a tensor."""
    return _reduced(place.tensor(rows, batch, statistics), batch, tensor)


def _reduced(gradient: torch.Tensor, batch: torch.Size, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient by samples, summed over the batch axes that an input was shared by."""
    shape = tensor.shape
    if gradient.shape != shape:
        gradient = gradient.view(*batch, shape[-1]).sum_to_size(shape)
    return gradient if tensor.dtype is torch.float64 else gradient.to(tensor.dtype)
