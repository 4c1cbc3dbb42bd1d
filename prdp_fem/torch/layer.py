"""A variational solver as a layer of a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from firedrake import Cofunction, Constant, Function

from prdp_fem.bridge.controls import Controls
from prdp_fem.memory.devices import find_device
from prdp_fem.problem.inputs import name_of
from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.threads import one_thread
from prdp_fem.refinement.settings import Setting, in_words
from prdp_fem.solvers import RefinedSolver
from prdp_fem.torch.arguments import batch_axes, check_tensors
from prdp_fem.torch.autograd import transforms_are_active
from prdp_fem.torch.evaluation import Evaluation
from prdp_fem.torch.placement import CPU, Place, solver_device, tensor_device
from prdp_fem.torch.transforms import TransformedCall

__all__ = ["SolverLayer"]

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
        self._returns_tuple = isinstance(output, (list, tuple))
        outputs = output if self._returns_tuple else [output]
        self._bound = Controls(solver, controls, outputs)
        self.solver = solver
        self.controls = self._bound.coefficients
        self.output = output
        self._comm = solver.system.comm
        self._lock = one_thread(self._comm)
        self._place = Place(CPU)
        self._evaluation = Evaluation(self._bound, outputs)

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
        return self._place.device

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
            self._place = Place(device)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        names = ", ".join(
            f"{name_of(control)}: {size}" for control, size in zip(self.controls, self._bound.sizes)
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
        with self._lock:
            batch, setting = self._look(tensors)
            if transforms_are_active():
                outputs = TransformedCall(self._comm, self._evaluate_now, self._evaluation.stamp)(
                    *tensors
                )
            else:
                outputs = self._evaluation(tensors, batch, self._place, setting)
        return outputs if self._returns_tuple else outputs[0]

    def _look(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Size, Setting | None]:
        """The batch axes and the setting of a call. Collective."""
        if self._comm.size == 1:
            return self._checked(tensors)

        def look() -> list[str]:
            """What ranks must have alike to make the same calls, forward and backward."""
            nonlocal found
            found = self._checked(tensors)
            # Without names: those that Firedrake has chosen are not the same on all ranks.
            return [
                in_words(found[1]),
                *(
                    f"{tuple(one.shape[:-1])}{' with a gradient' if one.requires_grad else ''}"
                    for one in tensors
                ),
            ]

        found: tuple = ()
        agree(
            self._comm,
            look,
            "the setting, batch axes, and whether there are gradients,",
            "give the refinement comm=, and all ranks the same samples",
        )
        return found

    def _checked(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Size, Setting | None]:
        solver, device = self.solver, self.device
        if device != CPU and device != tensor_device(solver.system.place.memory.device):
            raise RuntimeError(
                f"the layer is on {device}, but its solver has been moved to"
                f" '{solver.device}': move the layer, too"
            )
        return check_tensors(tensors, self._bound, device), solver.setting

    def _evaluate_now(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs with the setting of the moment."""
        batch, setting = batch_axes(tensors), self.solver.setting
        return self._evaluation(tensors, batch, self._place, setting)


# Empty until torch compiles, since its compiler takes long to be imported. (It traces through
# functions with a cache.)
_UNCOMPILED: list[Callable] = []


def _uncompiled() -> Callable:
    """What a call is where torch compiles."""
    if not _UNCOMPILED:
        _UNCOMPILED.append(torch.compiler.disable(SolverLayer._call))
    return _UNCOMPILED[0]
