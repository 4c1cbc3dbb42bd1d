"""A variational solver as a layer of a network."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from firedrake import Cofunction, Constant, Function

from prdp_fem.point import Point
from prdp_fem.solvers import LinearVariationalSolver

__all__ = ["SolverLayer"]


class SolverLayer(torch.nn.Module):
    """The map from controls of a variational problem to its solution, with its derivative.

    Called with one tensor per control, in their order, it solves with the setting of the moment, and returns the solution's
    dofs. Each call keeps what its own backward pass needs, its setting included: however many calls, ``step``s of the
    refinement or changes to other coefficients come in between, each is differentiated where and as it was made. The user's
    Functions are neither read for the controls nor written to. In parallel every rank makes the same calls.

    Parameters
    ----------
    solver : prdp_fem.LinearVariationalSolver
    controls : sequence of Function, Constant or Cofunction
        Coefficients of the problem, each once.

    Raises
    ------
    TypeError
        For another solver, or controls of another kind.
    ValueError
        For no control, one given twice, or one that the problem does not depend on.

    Examples
    --------
    >>> physics = SolverLayer(solver, controls=[u0])  # doctest: +SKIP
    >>> physics(torch.randn(25, n, dtype=torch.float64))  # a batch of 25  # doctest: +SKIP
    """

    def __init__(self, solver: LinearVariationalSolver, controls: Sequence[Function | Constant | Cofunction]):
        super().__init__()
        if not isinstance(solver, LinearVariationalSolver):
            raise TypeError(f"expected a prdp_fem.LinearVariationalSolver, found a {type(solver).__module__}.{type(solver).__name__}")
        if isinstance(controls, (Function, Constant, Cofunction)):
            raise TypeError("controls must be a sequence, found a single one: write controls=[…]")
        controls = list(controls)
        if not controls:
            raise ValueError("controls must name at least one coefficient of the problem, found none")
        for control in controls:
            if not isinstance(control, (Function, Constant, Cofunction)):
                raise TypeError(f"a control must be a Function, Constant or Cofunction, found a {type(control).__name__}")
        self.solver = solver
        self.controls = controls
        self._indices = [solver.system.forms.find(control) for control in controls]
        if len(set(self._indices)) < len(self._indices):
            raise ValueError("controls must be named once each")
        self._inputs = [solver.system.inputs[index] for index in self._indices]
        self._size = solver.system.size

    def __deepcopy__(self, memo) -> SolverLayer:
        """A copy of a network has a layer of its own around the same solver: solves have no state."""
        return SolverLayer(self.solver, self.controls)

    def __reduce__(self):
        raise TypeError("a SolverLayer holds PETSc objects, which cannot be pickled: save the network's state_dict(), in which the layer "
                        "has no part, and make the layer again")

    def extra_repr(self) -> str:
        names = ", ".join(f"{entry.name}: {entry.size}" for entry in self._inputs)
        return f"({names}) -> {self.solver.problem.u.name()}: {self._size}, refinement={self.solver.refinement!r}"

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        """Solve for each sample.

        Parameters
        ----------
        *tensors : torch.Tensor
            One a control, float32 or float64, on the CPU: shape (..., n) with n the dofs of the control that this rank owns, or
            the number of components of a Constant. Leading axes are batch axes, broadcast against each other; a control
            without them is shared by the batch.

        Returns
        -------
        torch.Tensor
            Shape (..., m) with m the dofs of the solution that this rank owns; float64 if any tensor is. Its gradients are
            by dofs, without a mass matrix in between.

        Raises
        ------
        TypeError, ValueError
            For tensors of the wrong number, type, device or shape.
        firedrake.exceptions.ConvergenceError
            Where a solve fails.
        """
        if len(tensors) != len(self._inputs):
            raise TypeError(f"expected {len(self._inputs)} tensor(s), one for each of {self._names()}, found {len(tensors)}")
        for tensor, entry in zip(tensors, self._inputs):
            self._check(tensor, entry)
        try:
            batch = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
        except RuntimeError:
            raise ValueError("batch axes must be equal, or broadcast against each other, found shapes "
                             f"{', '.join(str(tuple(tensor.shape)) for tensor in tensors)} for {self._names()}") from None
        return _Solve.apply(self, batch, *tensors)

    def _names(self) -> str:
        return ", ".join(f"'{entry.name}'" for entry in self._inputs)

    def _check(self, tensor, entry) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected a tensor for '{entry.name}', found a {type(tensor).__name__}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"expected float32 or float64 for '{entry.name}', found {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"expected a tensor on the CPU for '{entry.name}', found one on {tensor.device}: call .cpu() first")
        if tensor.ndim == 0 or tensor.shape[-1] != entry.size:
            reminder = "the components of the Constant" if entry.is_real else "the dofs that this rank owns, not all ranks together"
            raise ValueError(f"expected a last axis of {entry.size} for '{entry.name}' ({reminder}), found shape {tuple(tensor.shape)}")


class _Solve(torch.autograd.Function):
    """The solve of a batch, sample by sample: each gives the same bits, whatever stands beside it in the batch."""

    @staticmethod
    def forward(ctx, layer: SolverLayer, batch: torch.Size, *tensors: torch.Tensor) -> torch.Tensor:
        system, solver = layer.solver.system, layer.solver
        ctx.layer, ctx.batch, ctx.setting, ctx.point = layer, batch, solver.setting, solver.point(without=layer._indices)
        ctx.meshes = system.mesh_versions()
        ctx.save_for_backward(*tensors)
        point, varying = _place(layer, ctx.point, batch, tensors)
        solutions = np.empty((batch.numel(), system.size))
        system.solve(point, ctx.setting, solutions, varying)
        ctx.solutions = solutions
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        # A copy: the caller may change what it gets in place, and the backward pass must not see it.
        return torch.empty((*batch, system.size), dtype=dtype).copy_(torch.from_numpy(solutions).view(*batch, system.size))

    @staticmethod
    def backward(ctx, cotangent: torch.Tensor):
        if ctx.meshes != ctx.layer.solver.system.mesh_versions():
            raise RuntimeError("a mesh of the problem has moved between the forward and the backward pass: call backward before moving it")
        return None, None, *_Gradient.apply(ctx, ctx.needs_input_grad[2:], cotangent, *ctx.saved_tensors)


class _Gradient(torch.autograd.Function):
    """The backward pass as a function, so that differentiating it again raises."""

    @staticmethod
    def forward(ctx, call, needed: Sequence[bool], cotangent: torch.Tensor, *tensors: torch.Tensor):
        layer, rows = call.layer, call.batch.numel()
        gradients = {index: np.empty((rows, tensor.shape[-1])) for index, tensor, wanted in zip(layer._indices, tensors, needed) if wanted}
        point, varying = _place(layer, call.point, call.batch, tensors)
        layer.solver.system.solve_adjoint(point, call.setting, _rows(cotangent, call.batch), call.solutions, gradients, varying=varying)
        return tuple(_reduced(gradients[index], call.batch, tensor) if index in gradients else None
                     for index, tensor in zip(layer._indices, tensors))

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError("second derivatives through a SolverLayer are not available: call backward without create_graph=True")


def _rows(tensor: torch.Tensor, batch: torch.Size) -> np.ndarray:
    """A tensor as float64 rows, one a sample; without a copy where it is that already."""
    values = tensor.detach().to(torch.float64)
    return values.expand(*batch, values.shape[-1]).reshape(batch.numel(), values.shape[-1]).contiguous().numpy()


def _place(layer: SolverLayer, point: Point, batch: torch.Size, tensors: Sequence[torch.Tensor]) -> tuple[Point, dict[int, np.ndarray]]:
    """Put the controls where they belong: into the point, or, those with batch axes, among what varies."""
    values, varying = list(point.values), {}
    for index, tensor in zip(layer._indices, tensors):
        if tensor.ndim == 1:
            values[index] = _rows(tensor, torch.Size())[0]
        else:
            varying[index] = _rows(tensor, batch)
    return Point(values, point.boundary, point.guess), varying


def _reduced(gradient: np.ndarray, batch: torch.Size, tensor: torch.Tensor) -> torch.Tensor:
    """A gradient by samples, summed over the batch axes that a control was shared by."""
    return torch.from_numpy(gradient).reshape(*batch, tensor.shape[-1]).sum_to_size(tensor.shape).to(tensor.dtype)
