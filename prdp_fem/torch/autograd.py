"""What is done at PETSc's level as functions of torch's autograd.

Each call keeps what its own backward pass needs, and lets torch have it: fields are saved as
tensors, which torch releases after the backward pass, and which a checkpoint, or whoever else has
put hooks on saved tensors, takes away.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import wraps

import numpy as np
import torch
from firedrake.exceptions import ConvergenceError
from mpi4py import MPI

from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.functional import Functional
from prdp_fem.problem.inputs import same_bits
from prdp_fem.problem.point import NO_VALUES, Point
from prdp_fem.problem.wanted import Needs, Wanted
from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.finite import LARGEST, name_sample, require_finite
from prdp_fem.ranks.threads import one_thread
from prdp_fem.refinement.ladders import Setting, in_words
from prdp_fem.statistics import Statistics
from prdp_fem.torch.placement import CPU, ordered, placed, room, to_host

__all__ = [
    "BoundaryValues",
    "FunctionalValue",
    "Surroundings",
    "TransformedCall",
    "transforms_are_active",
]

# Among the arguments of Solve: where the boundary values and the guess are, and how many come
# before the inputs' tensors.
_BOUNDARY = 1
_GUESS = 2
_BEFORE_TENSORS = 3
_LARGEST_SINGLE = torch.finfo(torch.float32).max

# What torch.autograd.Function asks at each call, too; there are no public names.
transforms_are_active = torch._C._are_functorch_transforms_active
# A batch that is hidden in a tensor by an older mechanism of torch's, of which an autograd.Function
# cannot have a rule.
_is_batched = torch._C._functorch.is_legacy_batchedtensor

_MADE_ANEW = (
    "a SolverLayer was called again for its backward pass, by a checkpoint or a transform of"
    " torch.func, and its setting, or coefficients that are no controls, are others than in the"
    " forward pass: call backward before changing them, or make the coefficients controls"
)
_ONCE_ONLY = (
    "second derivatives through a SolverLayer are not available: call backward without"
    " create_graph=True, and do not nest derivatives of torch.func"
)
_BACKWARDS_ONLY = (
    "forward-mode derivatives through a SolverLayer are not available: use backward(), or"
    " torch.func.vjp, grad or jacrev, which give the same by the adjoint"
)


class Surroundings:
    """What calls of a layer depend on beside their tensors: a setting, and the values of
    coefficients, which seldom change.

    Calls share the arrays that are equal to those of the call before. What a checkpoint computes
    again to have what a backward pass needs must be what was computed at first: a number tells.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks that make the calls together.

    Attributes
    ----------
    comm : mpi4py.MPI.Comm
    number : torch.Tensor or None
        Of the last call, made from setting and values.
    """

    def __init__(self, comm: MPI.Comm):
        self.comm = comm
        self.number = None
        self.plan = None
        self._setting: Setting | None = None
        self._arrays: list[np.ndarray] = []
        self._checksums: list[int] = []
        self._saved: list[torch.Tensor] = []

    def saved(self, setting: Setting | None, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The number and the arrays as tensors, for ``save_for_backward``."""
        is_other = setting is not self._setting and setting != self._setting
        if is_other or not self._saved or len(arrays) != len(self._arrays):
            self._renew(setting, arrays, [zlib.crc32(array) for array in arrays])
        else:
            for new, old in zip(arrays, self._arrays):
                if new is not old and not (new.size == old.size and same_bits(new, old)):
                    self._replace(setting, arrays)
                    break
        return self._saved

    def _replace(self, setting: Setting | None, arrays: Sequence[np.ndarray]) -> None:
        """Have other arrays in place of those that have changed."""
        shared, checksums = [], []
        for new, old, checksum in zip(arrays, self._arrays, self._checksums):
            is_same = new is old or (new.size == old.size and same_bits(new, old))
            shared.append(old if is_same else new)
            checksums.append(checksum if is_same else zlib.crc32(new))
        self._renew(setting, shared, checksums)

    def _renew(
        self, setting: Setting | None, arrays: Sequence[np.ndarray], checksums: list[int]
    ) -> None:
        self._setting = setting
        self._arrays = list(arrays)
        self._checksums = checksums
        # Small enough for hooks that convert all tensors to float32.
        number = zlib.crc32(f"{in_words(setting)} {checksums}".encode()) % 2**24
        with torch.inference_mode(False):  # in which they could not be saved by later calls
            self.number = torch.tensor(number, device=CPU)
            self._saved = [self.number, *map(torch.from_numpy, arrays)]


def check_number(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise a RuntimeError where what was saved is of another call than the one that is
    differentiated.
    """
    if found is not expected and found.item() != expected.item():
        raise RuntimeError(_MADE_ANEW)


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
        with one_thread(ctx.comm):
            return backward(ctx, cotangent)

    return checked


class _OnceOnly(torch.autograd.Function):
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


class _OfFirstOrder(_OnceOnly):
    """A backward pass that may be differentiated, which raises, or be asked for a batch of
    cotangents by a transform of torch.func.
    """

    @staticmethod
    def forward(backward, call, cotangent, *tensors):
        with one_thread(call.comm):
            return backward(call, cotangent)

    @staticmethod
    def vmap(info, in_dims, backward, call, cotangent, *tensors):
        each = [
            _OfFirstOrder.apply(backward, call, one, *tensors)
            for one in cotangent.movedim(in_dims[2], 0)
        ]
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*each))
        return stacked, tuple(None if part is None else 0 for part in stacked)


class _Reverse(torch.autograd.Function):
    """What the functions below have in common."""

    @staticmethod
    def jvp(ctx, *_):
        raise NotImplementedError(_BACKWARDS_ONLY)


class Solve(_Reverse):
    """The solve of a batch, sample by sample: each gives the same bits, whatever stands beside it
    in the batch.

    Called with a tuple (the solver, the surroundings, the device of the tensors, the batch axes,
    and the places of the inputs among the system's), the boundary values and the guess (tensors, or
    None for what the problem has), and the inputs' tensors; gives float64.
    """

    @staticmethod
    def forward(ctx, call: tuple, boundary, guess, *tensors: torch.Tensor) -> torch.Tensor:
        solver, surroundings, device, batch, indices = call
        system = solver.system
        statistics = solver.statistics
        setting = solver.setting
        if surroundings.plan is None:
            needs = system.needs(indices, by_forms=boundary is not None)
            others = [
                index
                for index in range(len(system.inputs))
                if index not in indices and index not in needs.unread
            ]
            surroundings.plan = needs, others
        needs, others = surroundings.plan
        point, varying = solver.point(without=indices, has_boundary=boundary is None), {}
        arrays = [point.values[index] for index in others]
        has_boundary = boundary is None and point.boundary is not None
        if has_boundary:
            arrays.append(point.boundary)
        has_guess = guess is None and point.guess is not None and needs.guess
        if has_guess:
            arrays.append(point.guess)
        moved = _put_in(point, varying, needs, statistics, batch, indices, boundary, guess, tensors)
        solutions, written = room(batch, system.size, device if needs.device_rows else CPU)
        try:
            with ordered(device):
                records = system.solve(point, setting, written, varying, largest=_largest(tensors))
        except ConvergenceError as error:
            name_sample(error, batch)
            raise
        saved = [
            boundary,
            guess if needs.guess else None,
            *tensors,
            *surroundings.saved(setting, arrays),
        ]
        if needs.solutions:
            # A copy: the caller may change what it gets in place, and the backward pass must not
            # see it.
            saved.append(_rows(solutions.clone(), batch))
        if moved:
            saved += moved
        counts = None
        if needs.fields:
            fields = [record.fields for record in records]
            records = [record.with_fields([]) for record in records]
            counts = [len(one) for one in fields]
            saved += [torch.from_numpy(field) for one in fields for field in one]
        ctx.comm = surroundings.comm
        # Nothing of the size of a field is among these.
        ctx.call = (
            solver,
            surroundings.plan,
            surroundings.number,
            setting,
            batch,
            device,
            indices,
            system.memory,
            system.solved_mesh_stamp,
            has_boundary,
            has_guess,
            bool(moved),
            records,
            counts,
        )
        ctx.save_for_backward(*saved)
        return (
            solutions
            if solutions.device == device
            else placed(solutions.numpy(), device, statistics)
        )

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        (
            solver,
            (needs, others),
            number,
            setting,
            batch,
            device,
            indices,
            memory,
            mesh_stamp,
            has_boundary,
            has_guess,
            has_moved,
            records,
            counts,
        ) = ctx.call
        system, statistics = solver.system, solver.statistics
        if memory is not system.memory:
            raise RuntimeError(
                "the solver has moved to another device between the forward and the backward pass:"
                " call backward before moving it"
            )
        if mesh_stamp != system.mesh_stamp():
            raise RuntimeError(
                "a mesh of the problem has moved between the forward and the backward pass: call"
                " backward before moving it"
            )
        saved, count = ctx.saved_tensors, 2 + len(indices)
        boundary_values, guess_values, *tensors = saved[:count]
        check_number(saved[count], number)
        rest = iter(saved[count + 1 :])
        point, varying = Point([NO_VALUES] * len(system.inputs)), {}
        for index in others:
            point.values[index] = next(rest).numpy()
        if has_boundary:
            point.boundary = next(rest).numpy()
        if has_guess:
            point.guess = next(rest).numpy()
        solutions = _handed(next(rest)) if needs.solutions else None
        moved = _next(rest, count) if has_moved else ()
        if not needs.unread:
            _put_in(
                point,
                varying,
                needs,
                statistics,
                batch,
                indices,
                boundary_values,
                guess_values,
                tensors,
                moved,
            )
        if counts is not None:
            records = [
                record.with_fields([field.numpy() for field in _next(rest, fields)])
                for record, fields in zip(records, counts)
            ]

        needed, rows = ctx.needs_input_grad[_BEFORE_TENSORS:], batch.numel()
        gradients, written = {}, {}
        for index, tensor, wanted in zip(indices, tensors, needed):
            if wanted:
                where = device if index in needs.device_inputs else CPU
                gradients[index], written[index] = room(batch, tensor.shape[-1], where)
        boundary = np.empty((rows, system.size)) if ctx.needs_input_grad[_BOUNDARY] else None
        guess = np.empty((rows, system.size)) if ctx.needs_input_grad[_GUESS] else None
        cotangents = _rows(cotangent, batch)
        cotangents = _handed(cotangents) if needs.device_rows else to_host(cotangents, statistics)
        given = [t for t in (*tensors, boundary_values, guess_values) if t is not None]
        try:
            with ordered(device):
                system.solve_adjoint(
                    point,
                    setting,
                    cotangents,
                    solutions,
                    records,
                    Wanted(written, boundary, guess, largest=_largest(given)),
                    varying=varying,
                )
        except ConvergenceError as error:
            name_sample(error, batch)
            raise
        results: list[torch.Tensor | None] = [None] * _BOUNDARY
        for rows_of, tensor in ((boundary, boundary_values), (guess, guess_values)):
            results.append(
                None
                if rows_of is None
                else _reduced(placed(rows_of, device, statistics), batch, tensor)
            )
        for index, tensor in zip(indices, tensors):
            gradient = gradients.get(index)
            if gradient is not None:
                if device is not CPU and gradient.device != tensor.device:
                    gradient = placed(gradient.numpy(), tensor.device, statistics)
                gradient = _reduced(gradient, batch, tensor)
            results.append(gradient)
        return tuple(results)


def _put_in(
    point: Point,
    varying: dict,
    needs: Needs,
    statistics: Statistics,
    batch: torch.Size,
    indices: Sequence[int],
    boundary: torch.Tensor | None,
    guess: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    moved: Sequence[torch.Tensor | None] = (),
) -> list[torch.Tensor | None]:
    """Put tensors into a point: boundary values, the guess and inputs; those inputs whose values
    vary over the batch apart.

    What had to be copied from a device to the host is returned, with None for what had not, or an
    empty list for nothing; it may be given when it is asked for again.
    """
    copies: list[torch.Tensor | None] = []

    def values_of(place: int, tensor: torch.Tensor, *, stays: bool = False):
        if moved and moved[place] is not None:
            return moved[place].numpy()
        rows = _rows(tensor, batch if tensor.ndim > 1 else torch.Size())
        values = _handed(rows) if stays else to_host(rows, statistics)
        if tensor.ndim == 1:
            values = values[0]
        if not (stays or tensor.is_cpu or moved):
            copies.extend([None] * (2 + len(tensors) - len(copies)))
            copies[place] = torch.from_numpy(values)
        return values

    if boundary is not None:
        point.boundary = values_of(0, boundary)
    if guess is not None:
        point.guess = values_of(1, guess)
    for place, (index, tensor) in enumerate(zip(indices, tensors), 2):
        values = values_of(place, tensor, stays=index in needs.device_inputs)
        if tensor.ndim > 1:
            varying[index] = values
        else:
            point.values[index] = values
    return copies


class BoundaryValues(_Reverse):
    """Boundary values from the tensors that they are made of: called with the boundary data, the
    surroundings, the solver's statistics, the
    batch axes and a tensor an input. They are on the device of these, and go to the host again to
    be lifted: torch works a graph backwards in one thread for each device, and Firedrake is to be
    used by one thread.
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
        ctx.comm = surroundings.comm
        ctx.data = data
        ctx.statistics = statistics
        ctx.batch = batch
        others = data.others()
        ctx.save_for_backward(*tensors, *surroundings.saved(None, others))
        ctx.number = surroundings.number
        rows = [
            data.values(values, others)
            for values in _each_row(data.inputs, batch, tensors, statistics)
        ]
        return placed(np.array(rows).reshape(*batch, data.size), tensors[0].device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        data, saved = ctx.data, iter(ctx.saved_tensors)
        tensors = _next(saved, len(data.inputs))
        number = next(saved)
        others = [other.numpy() for other in saved]
        check_number(number, ctx.number)
        cotangents = to_host(_rows(cotangent, ctx.batch), ctx.statistics)
        samples = list(_each_row(data.inputs, ctx.batch, tensors, ctx.statistics))
        gradients = [
            (
                np.array(
                    [
                        data.gradient(place, values, others, cotangents[row])
                        for row, values in enumerate(samples)
                    ]
                ).reshape(-1, tensor.shape[-1])
                if wanted
                else None
            )
            for place, wanted, tensor in zip(data.inputs, ctx.needs_input_grad[4:], tensors)
        ]
        require_finite(
            data.comm,
            [gradient for gradient in gradients if gradient is not None],
            lambda _: _describe_gradient("the boundary values"),
            largest=_largest(tensors),
            batch=ctx.batch,
        )
        return (
            None,
            None,
            None,
            None,
            *(
                (
                    None
                    if gradient is None
                    else _reduced(
                        placed(gradient, tensor.device, ctx.statistics), ctx.batch, tensor
                    )
                )
                for gradient, tensor in zip(gradients, tensors)
            ),
        )


class FunctionalValue(_Reverse):
    """A functional of the solution: called with it, the surroundings, the solver's statistics, the
    batch axes, the places of its inputs,
    the solution and their tensors.
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
        ctx.comm = surroundings.comm
        ctx.functional = functional
        ctx.statistics = statistics
        ctx.batch = batch
        ctx.places = places
        others = functional.others(places)
        ctx.others = list(others)
        ctx.save_for_backward(solution, *tensors, *surroundings.saved(None, list(others.values())))
        ctx.number = surroundings.number
        values = [
            functional.value(row, {**others, **varying})
            for row, varying in zip(
                to_host(_rows(solution, batch), statistics),
                _each_row(places, batch, tensors, statistics),
            )
        ]
        values = np.array(values, dtype=float)
        # They are the same on all ranks.
        require_finite(
            MPI.COMM_SELF,
            [values[:, None]],
            lambda _: (
                f"{functional.name} gave NaN or infinity: look for what has no finite value there, "
                "such as the logarithm of a negative number or 0/0"
            ),
            largest=_largest(tensors),
            batch=batch,
        )
        return placed(values.reshape(batch), solution.device, statistics)

    @staticmethod
    @_first_order
    def backward(ctx, cotangent: torch.Tensor):
        saved = iter(ctx.saved_tensors)
        (solution, *tensors), number = _next(saved, 1 + len(ctx.places)), next(saved)
        check_number(number, ctx.number)
        others = {index: other.numpy() for index, other in zip(ctx.others, saved)}
        variables = dict(zip([None, *ctx.places], (solution, *tensors)))
        by = [place for place, wanted in zip(variables, ctx.needs_input_grad[5:]) if wanted]
        weights = to_host(
            cotangent.to(torch.float64).expand(ctx.batch).reshape(-1, 1), ctx.statistics
        )
        functional, batch = ctx.functional, ctx.batch
        require_finite(
            functional.comm,
            [weights],
            lambda _: (
                f"the cotangent of {functional.name} is NaN or infinite: look, in what is computed"
                " of it, for an operation whose derivative is not finite"
            ),
            batch=batch,
        )
        gradients = {place: np.empty((len(weights), variables[place].shape[-1])) for place in by}
        for row, (values, varying) in enumerate(
            zip(
                to_host(_rows(solution, ctx.batch), ctx.statistics),
                _each_row(ctx.places, ctx.batch, tensors, ctx.statistics),
            )
        ):
            for place, gradient in zip(
                by, ctx.functional.gradients(values, {**others, **varying}, by)
            ):
                gradients[place][row] = weights[row] * gradient
        require_finite(
            functional.comm,
            list(gradients.values()),
            lambda _: _describe_gradient(functional.name),
            largest=_largest(tensors),
            batch=batch,
        )
        return (
            *(None,) * 5,
            *(
                (
                    _reduced(
                        placed(gradients[place], tensor.device, ctx.statistics), ctx.batch, tensor
                    )
                    if place in gradients
                    else None
                )
                for place, tensor in variables.items()
            ),
        )


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
            raise RuntimeError(_MADE_ANEW)
        return outputs


class _Transformed(_Reverse):
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


class _TransformedBackward(_OnceOnly):
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


def _next(values, count: int) -> list:
    """So many of an iterator."""
    return [next(values) for _ in range(count)]


def _describe_gradient(what: str) -> str:
    return (
        f"the derivative of {what} holds NaN or infinity: look for one that does not exist "
        "there, such as that of a square root at zero, or for numbers that are too large"
    )


def _rows(tensor: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """A tensor as contiguous float64 rows, one a sample, shape (rows, n); without a copy where it
    is that already.
    """
    tensor, shape = tensor.detach().resolve_neg(), tensor.shape
    if tensor.dtype is not torch.float64 or shape[:-1] != batch:
        tensor = tensor.to(torch.float64).expand(*batch, shape[-1])
    return tensor.reshape(batch.numel(), shape[-1]).contiguous()


def _largest(tensors: Sequence[torch.Tensor]) -> float:
    """The largest number that the types of all of these have."""
    for tensor in tensors:
        if tensor.dtype is torch.float32:
            return _LARGEST_SINGLE
    return LARGEST


def _handed(rows: torch.Tensor) -> torch.Tensor | np.ndarray:
    """What a solution map that takes tensors on its device is given."""
    return rows.numpy() if rows.is_cpu else rows


def _wanted(values: Sequence, needed: Sequence[bool]) -> list:
    return [value for value, wanted in zip(values, needed) if wanted]


def _each_row(
    places: Sequence[int] | Mapping,
    batch: torch.Size,
    tensors: Sequence[torch.Tensor],
    statistics: Statistics,
):
    """The values of inputs by their places, sample by sample."""
    columns = [to_host(_rows(tensor, batch), statistics) for tensor in tensors]
    for row in range(batch.numel()):
        yield {place: column[row] for place, column in zip(places, columns)}


def _reduced(gradient: torch.Tensor, batch: torch.Size, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient by samples, summed over the batch axes that an input was shared by."""
    shape = tensor.shape
    if gradient.shape != shape:
        gradient = gradient.view(*batch, shape[-1]).sum_to_size(shape)
    return gradient if tensor.dtype is torch.float64 else gradient.to(tensor.dtype)
