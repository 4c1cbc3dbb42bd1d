"""What a layer makes of solutions: themselves, components of them, or functionals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import ufl

from prdp_fem.bridge.controls import Controls, dofs_of_component
from prdp_fem.problem.functional import Functional
from prdp_fem.torch.autograd import FunctionalValue
from prdp_fem.torch.placement import CPU
from prdp_fem.torch.surroundings import Surroundings

__all__ = ["output_of"]

# Of the solution, the batch axes, and the tensors of all controls.
Output = Callable[[torch.Tensor, torch.Size, Sequence[torch.Tensor]], torch.Tensor]


def output_of(asked, controls: Controls) -> tuple[Output, Surroundings | None]:
    """A function that makes an output, with what its calls depend on beside tensors, if anything.

    Parameters
    ----------
    asked : None, Function or ufl.Form
    controls : Controls
    """
    solution = controls.samples.solver.problem.u
    if asked is None or asked is solution:
        return _whole, None
    if isinstance(asked, ufl.Form):
        functional = _Functional(asked, controls)
        return functional, functional.surroundings
    with torch.inference_mode(False):  # in which they could not be saved by later calls
        dofs = torch.from_numpy(dofs_of_component(solution, asked))
    return _Component(dofs), None


def _whole(solution: torch.Tensor, batch: torch.Size, tensors: Sequence) -> torch.Tensor:
    return solution


class _Component:
    """The dofs of a component, on any device."""

    def __init__(self, dofs: torch.Tensor):
        self._dofs = {CPU: dofs}

    def __call__(self, solution: torch.Tensor, batch: torch.Size, tensors: Sequence):
        if solution.device not in self._dofs:
            self._dofs[solution.device] = self._dofs[CPU].to(solution.device)
        return solution[..., self._dofs[solution.device]]


class _Functional:
    """A functional of the solution and of the controls that it depends on."""

    def __init__(self, form: ufl.Form, controls: Controls):
        solver = controls.samples.solver
        self._functional = Functional(form, solver.problem.u)
        self._statistics = solver.statistics
        self.surroundings = Surroundings(self._functional.comm)
        found = {
            index: place
            for place, control in enumerate(controls.coefficients)
            if (index := self._functional.find(control)) is not None
        }
        self._indices, self._places = list(found), list(found.values())

    def __call__(self, solution: torch.Tensor, batch: torch.Size, tensors: Sequence):
        return FunctionalValue.apply(
            self._functional,
            self.surroundings,
            self._statistics,
            batch,
            self._indices,
            solution,
            *[tensors[place] for place in self._places],
        )
