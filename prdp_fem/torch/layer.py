"""A variational solver as a layer of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
import ufl
from firedrake import Cofunction, Constant, Function

from prdp_fem.memory.devices import find_device
from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.firedrake_internals import boundary_expression
from prdp_fem.problem.functional import Functional
from prdp_fem.problem.inputs import (
    coefficients_of,
    is_real,
    local_values,
    name_of,
    set_local_values,
)
from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.threads import one_thread
from prdp_fem.refinement.ladders import in_words
from prdp_fem.solvers import RefinedSolver
from prdp_fem.torch.autograd import (
    BoundaryValues,
    FunctionalValue,
    Solve,
    Surroundings,
    TransformedCall,
    transforms_are_active,
)
from prdp_fem.torch.placement import CPU, solver_device, tensor_device

__all__ = ["SolverLayer"]

_DTYPES = (torch.float32, torch.float64)
_TRACED = (
    "a SolverLayer cannot be part of a graph that is traced or exported, nor be called with fake"
    " tensors: use torch.compile, which calls it as it is"
)
# Under make_fx and FakeTensorMode a call's numbers would be constants of the graph; there are no
# public names. To count modes is to know, most often, that there are none.
_count_modes = torch._C._len_torch_dispatch_stack
_mode = torch._C._get_dispatch_mode
_MODES = torch._C._TorchDispatchModeKey
# As torch.nn.Module asks at each call.
_tracing_state = torch._C._get_tracing_state


class SolverLayer(torch.nn.Module):
    """The map from controls of a variational problem to its solution, with its derivative.

    Called with one tensor per control, in their order, it solves with the setting of the moment,
    and returns the solution's dofs, or what ``output`` asks for. Each call keeps what its own
    backward pass needs, its setting included: however many calls, ``step``s of the refinement or
    changes to other coefficients come in between, each is differentiated where and as it was made.
    The user's Functions are neither read for the controls nor written to. In parallel every rank
    makes the same calls.

    Parameters
    ----------
    solver : prdp_fem.LinearVariationalSolver or prdp_fem.NonlinearVariationalSolver
    controls : sequence of Function, Constant or Cofunction
        Coefficients of the problem, each once: in its forms, or in expressions of its boundary
        values. With a solver that starts from a guess, the solution Function itself stands for
        that; an implicit derivative by it is zero.
    output : None, Function, ufl.Form, or a sequence of these
        What to return: the solution (None, or its Function); a component of it, as ``u.sub(1)``; a
        functional of it, a form without arguments, which may contain controls and other
        coefficients, too; for a sequence, a tuple of tensors.

    Raises
    ------
    TypeError
        For another solver, or controls or outputs of another kind, and where UFL cannot
        differentiate by a control.
    ValueError
        For no control, one given twice, one that the problem does not depend on, or one that holds
        a mesh's coordinates.

    Examples
    --------
    >>> physics = SolverLayer(solver, controls=[u0])  # doctest: +SKIP
    >>> physics(torch.randn(25, n, dtype=torch.float64))  # a batch of 25  # doctest: +SKIP
    >>> drag = SolverLayer(solver, [viscosity], output=dot(stress(u), n)[0]*ds(5))  # doctest: +SKIP
    """

    def __init__(
        self,
        solver: RefinedSolver,
        controls: Sequence[Function | Constant | Cofunction],
        output=None,
    ):
        super().__init__()
        if not isinstance(solver, RefinedSolver):
            raise TypeError(
                "expected a prdp_fem.LinearVariationalSolver or NonlinearVariationalSolver, found"
                f" a {type(solver).__module__}.{type(solver).__name__}"
            )
        system, solution = solver.system, solver.problem.u
        self._comm = solution.function_space().mesh().comm

        def look() -> list[str]:
            """What ranks must have alike, where it makes sense on this one."""
            nonlocal controls
            controls = _checked_controls(controls)
            returned = output if isinstance(output, (list, tuple)) else [output]
            if not returned:
                raise ValueError("output must name at least one thing to return, found none")
            return [
                *(_place_in_words(solver, control) for control in controls),
                *(_output_in_words(part, solution) for part in returned),
            ]

        agree(self._comm, look, "controls and outputs of a layer")
        self.solver = solver
        self.controls = controls
        self.output = output
        self._device = CPU
        self._sizes = [local_values(control).size for control in controls]
        self._boundary = BoundaryData(system.forms, controls)
        self._guess = (
            next((place for place, control in enumerate(controls) if control is solution), None)
            if solver.warm_start
            else None
        )
        self._places, self._indices = [], []
        for place, control in enumerate(controls):
            if (
                place == self._guess or place in self._boundary.inputs
            ) and not system.forms.depends_on(control):
                continue
            index = system.forms.find(control)
            system.check_derivative(index)
            self._places.append(place)
            self._indices.append(index)
        self._surroundings = {what: Surroundings(self._comm) for what in ("solve", "boundary")}
        self._returns_tuple = isinstance(output, (list, tuple))
        self._outputs = [
            self._make_output(part) for part in (output if self._returns_tuple else [output])
        ]

    def _make_output(self, output) -> Callable:
        """A function from the solution's tensor, the batch axes and all tensors to an output."""
        solution = self.solver.problem.u
        if output is None or output is solution:
            return lambda dofs, batch, tensors: dofs
        if isinstance(output, ufl.Form):
            functional = Functional(output, solution)
            surroundings = self._surroundings[functional] = Surroundings(self._comm)
            found = {
                functional.find(control): place
                for place, control in enumerate(self.controls)
                if functional.find(control) is not None
            }
            places = list(found)
            return lambda dofs, batch, tensors: FunctionalValue.apply(
                functional,
                surroundings,
                self.solver.statistics,
                batch,
                places,
                dofs,
                *(tensors[found[place]] for place in places),
            )
        with torch.inference_mode(False):  # in which they could not be saved by later calls
            dofs = torch.from_numpy(_dofs_of_component(solution, output))
        there = {CPU: dofs}

        def component(solution, batch, tensors):
            if solution.device not in there:
                there[solution.device] = dofs.to(solution.device)
            return solution[..., there[solution.device]]

        return component

    def __deepcopy__(self, memo) -> SolverLayer:
        """A copy of a network has a layer of its own around the same solver: solves have no state.
        Not collective.
        """
        copied = memo[id(self)] = object.__new__(type(self))
        for name, value in vars(self).items():
            # Hooks are in dictionaries, one for each layer; all else is the same for both.
            vars(copied)[name] = value.copy() if isinstance(value, dict) else value
        return copied

    def __copy__(self) -> SolverLayer:
        return self.__deepcopy__({})

    def _replicate_for_data_parallel(self):
        raise RuntimeError(
            "a SolverLayer cannot be replicated by DataParallel, whose threads would be in "
            "its solver at the same time: give it the whole batch, or have several "
            "processes, each with its part of the samples, as by train(ensemble=…)"
        )

    def __reduce__(self):
        raise TypeError(
            "a SolverLayer holds PETSc objects, which cannot be pickled: save the network's"
            " state_dict(), in which the layer has no part, and make the layer again"
        )

    @property
    def device(self) -> torch.device:
        """Where the layer takes tensors, and returns them.

        The CPU, until the layer or a network that it is part of is moved, by ``to`` or ``cuda``, to
        a CUDA or HIP device. The solver goes along, and comes back by ``cpu``. A solver that is on
        a device, while the layer is on the CPU, has tensors copied there and back.
        """
        return self._device

    def _apply(self, fn, recurse: bool = True) -> SolverLayer:
        """What ``to``, ``cuda`` and ``cpu`` of a network do to each of its modules."""
        device = fn(torch.empty(0, dtype=torch.float64, device=self.device)).device
        if device != self.device:
            name = solver_device(device)
            place = tensor_device(find_device(name, self._comm))
            if device != place:
                raise ValueError(
                    f"the solver cannot go to {device}, since PETSc uses {place} on this rank: move"
                    f" the network to {place}"
                )
            self.solver.to(name)
            self._device = device
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        names = ", ".join(
            f"{name_of(control)}: {size}" for control, size in zip(self.controls, self._sizes)
        )
        return (
            f"({names}) -> {self.solver.problem.u.name()}: {self.solver.system.size},"
            f" refinement={self.solver.refinement!r}, device='{self.device}', solver on"
            f" '{self.solver.device}'"
        )

    def forward(self, *tensors: torch.Tensor):
        """Solve for each sample.

        Parameters
        ----------
        *tensors : torch.Tensor
            One a control, float32 or float64, on ``device``: shape (..., n) with n the dofs of the
            control that this rank owns, or the number of components of a Constant. Leading axes are
            batch axes, broadcast against each other; a control without them is shared by the batch.
            On other devices than the CPU they are contiguous.

        Returns
        -------
        torch.Tensor or tuple of torch.Tensor
            Shape (..., m) with m the dofs of the solution, or of its component, that this rank
            owns, and (...) for a functional, the same on all ranks; float64 if any tensor is.
            Gradients are by dofs, without a mass matrix in between. On several ranks they are those
            of the sum over the ranks of what is made of the dofs that each has, and of a functional
            once; by a Constant each rank has the whole of it (see :func:`~prdp_fem.torch.shared`).
            What is made of several outputs uses the same of them on all ranks: the backward pass of
            each is collective.

        Raises
        ------
        TypeError, ValueError
            For tensors of the wrong number, type, device or shape; on all ranks, where one has
            such, or another batch than others.
        firedrake.exceptions.ConvergenceError
            Where a solve fails.
        RuntimeError
            On several ranks, where another thread is in a solver.

        Notes
        -----
        A layer is called as it is where torch compiles what it is part of. Threads take turns.
        Transforms of torch.func work (``vmap``, ``grad``, ``vjp``, ``jacrev``) but those in forward
        mode, and second derivatives.
        """
        is_compiling = torch.compiler.is_compiling()
        if _tracing_state() or (is_compiling and torch.compiler.is_exporting()):
            raise RuntimeError(_TRACED)
        if is_compiling:
            torch._dynamo.graph_break(
                msg="a SolverLayer is not compiled, and splits the graph: leave fullgraph=True away"
            )
            return _uncompiled()(self, tensors)
        return self._call(tensors)

    def _call(self, tensors: Sequence[torch.Tensor]):
        if _count_modes() and (_mode(_MODES.PROXY) is not None or _mode(_MODES.FAKE) is not None):
            raise RuntimeError(_TRACED)
        with one_thread(self._comm):
            if self._comm.size == 1:
                self._check(tensors)
            else:
                agree(
                    self._comm,
                    lambda: self._checked(tensors),
                    "the setting, batch axes, and whether there are gradients,",
                    "give the refinement comm=, and all ranks the same samples",
                )
            if transforms_are_active():
                outputs = TransformedCall(self._comm, self._evaluate, self._stamp)(*tensors)
            else:
                outputs = self._evaluate(tensors)
        return outputs if self._returns_tuple else outputs[0]

    def _evaluate(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        batch = _batch_axes(tensors)
        boundary = guess = None
        if self._boundary.inputs:
            given = [tensors[place] for place in self._boundary.inputs]
            boundary = BoundaryValues.apply(
                self._boundary,
                self._surroundings["boundary"],
                self.solver.statistics,
                _batch_axes(given),
                *given,
            )
        if self._guess is not None:
            guess = tensors[self._guess]
            if not self.solver.system.needs(self._indices).guess:
                guess = guess.detach()
        call = self.solver, self._surroundings["solve"], self._device, batch, self._indices
        solution = Solve.apply(call, boundary, guess, *[tensors[place] for place in self._places])
        outputs = tuple(output(solution, batch, tensors) for output in self._outputs)
        if all(tensor.dtype is torch.float32 for tensor in tensors):
            outputs = tuple(output.to(torch.float32) for output in outputs)
        return outputs

    def _stamp(self) -> tuple[int, ...]:
        """What tells the setting, the values of coefficients and the meshes of the last call."""
        return (
            self.solver.system.mesh_stamp(),
            *(surroundings.number for surroundings in self._surroundings.values()),
        )

    def _check(self, tensors: Sequence[torch.Tensor]) -> None:
        if self.device not in (CPU, tensor_device(self.solver.system.memory.device)):
            raise RuntimeError(
                f"the layer is on {self.device}, but its solver has been moved to"
                f" '{self.solver.device}': move the layer, too"
            )
        if len(tensors) != len(self.controls):
            raise TypeError(
                f"expected {len(self.controls)} tensor(s), one for each of {self._names()}, found"
                f" {len(tensors)}"
            )
        for tensor, control, size in zip(tensors, self.controls, self._sizes):
            _check(tensor, control, size, self.device)
        try:
            _batch_axes(tensors)
        except RuntimeError:
            raise ValueError(
                "batch axes must be equal, or broadcast against each other, found shapes "
                f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)} for {self._names()}"
            ) from None

    def _checked(self, tensors: Sequence[torch.Tensor]) -> list[str]:
        """What ranks must have alike to make the same calls, forward and backward."""
        self._check(tensors)
        # Without names: those that Firedrake has chosen are not the same on all ranks.
        return [
            in_words(self.solver.setting),
            *(
                f"{tuple(tensor.shape[:-1])}{' with a gradient' if tensor.requires_grad else ''}"
                for tensor in tensors
            ),
        ]

    def _names(self) -> str:
        return ", ".join(f"'{name_of(control)}'" for control in self.controls)


def _checked_controls(controls) -> list:
    if isinstance(controls, (Function, Constant, Cofunction)):
        raise TypeError("controls must be a sequence, found a single one: write controls=[…]")
    if not isinstance(controls, Iterable) or isinstance(controls, (str, Mapping)):
        raise TypeError(
            "controls must be a sequence of Functions, Constants and Cofunctions, "
            f"found {controls!r}"
        )
    controls = list(controls)
    if not controls:
        raise ValueError("controls must name at least one coefficient of the problem, found none")
    for control in controls:
        if not isinstance(control, (Function, Constant, Cofunction)):
            raise TypeError(
                "a control must be a Function, Constant or Cofunction, found a "
                f"{type(control).__name__}"
            )
    if len({id(control) for control in controls}) < len(controls):
        raise ValueError("controls must be named once each")
    return controls


def _place_in_words(solver: RefinedSolver, control) -> str:
    """Which of what a solve depends on a control is; names may differ between ranks."""
    forms = solver.system.forms
    if not forms.depends_on(control):
        if solver.warm_start and control is solver.problem.u:
            return "the guess"
        in_boundary = coefficients_of(*map(boundary_expression, forms.problem_conditions))
        for place, coefficient in enumerate(in_boundary):
            if coefficient is control:
                return f"coefficient {place} of the boundary values"
    return f"coefficient {forms.find(control)}"


def _output_in_words(output, solution: Function) -> str:
    """Which output is to be returned, without the names that Firedrake has chosen."""
    if output is None or output is solution:
        return "the solution"
    if isinstance(output, ufl.Form):
        return "a functional"
    if isinstance(output, Function):
        path = _path_to(solution, output)
        if path is None:
            raise ValueError(
                f"Function '{output.name()}' is no component of the solution "
                f"'{solution.name()}': name one as u.sub(1), or put what else you want "
                "into a functional"
            )
        return f"component {path}"
    raise TypeError(
        "an output must be the solution, a component of it as u.sub(1), or a form "
        f"without arguments, found a {type(output).__name__}"
    )


# Empty until torch compiles, since its compiler takes long to be imported. (It traces through
# functions with a cache.)
_UNCOMPILED: list[Callable] = []


def _uncompiled() -> Callable:
    """What a call is where torch compiles."""
    if not _UNCOMPILED:
        _UNCOMPILED.append(torch.compiler.disable(SolverLayer._call))
    return _UNCOMPILED[0]


def _batch_axes(tensors: Sequence[torch.Tensor]) -> torch.Size:
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


def _dofs_of_component(solution: Function, component: Function) -> np.ndarray:
    """The rank-local dofs of the solution that are those of a component of it."""
    numbered = Function(solution.function_space())
    set_local_values(numbered, np.arange(local_values(numbered).size, dtype=float))
    for index in _path_to(solution, component):
        numbered = numbered.sub(index)
    return local_values(numbered).astype(np.int64)


def _path_to(function: Function, component: Function) -> list[int] | None:
    if function is component:
        return []
    space = function.function_space()
    parts = len(space) if len(space) > 1 else space.block_size
    for index in range(parts if parts > 1 else 0):
        path = _path_to(function.sub(index), component)
        if path is not None:
            return [index, *path]
    return None
