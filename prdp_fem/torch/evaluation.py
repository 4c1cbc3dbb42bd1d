"""The outputs of a layer as a function of tensors, differentiated by torch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from prdp_fem.bridge.controls import Controls
from prdp_fem.refinement.settings import Setting
from prdp_fem.torch.arguments import batch_axes
from prdp_fem.torch.autograd import BoundaryValues, Call, Solve
from prdp_fem.torch.outputs import output_of
from prdp_fem.torch.placement import Place
from prdp_fem.torch.surroundings import Surroundings

__all__ = ["Evaluation"]


class Evaluation:
    """Boundary values, a solve, and what is made of the solution.

    Parameters
    ----------
    controls : Controls
    outputs : sequence
        What is made of the solution, see :func:`~prdp_fem.torch.outputs.output_of`.
    """

    def __init__(self, controls: Controls, outputs: Sequence):
        self._controls, self._samples = controls, controls.samples
        comm = self._samples.solver.system.comm
        self._of_solve, self._of_boundary = Surroundings(comm), Surroundings(comm)
        self._all = [self._of_solve, self._of_boundary]
        self._outputs: list[Callable] = []
        for asked in outputs:
            made, surroundings = output_of(asked, controls)
            self._outputs.append(made)
            if surroundings is not None:
                self._all.append(surroundings)

    def __call__(
        self,
        tensors: Sequence[torch.Tensor],
        batch: torch.Size,
        place: Place,
        setting: Setting | None,
    ) -> tuple[torch.Tensor, ...]:
        """The outputs for tensors of all controls, with their batch axes, at a place."""
        controls, samples = self._controls, self._samples
        boundary = guess = None
        if controls.boundary.inputs:
            given = [tensors[place] for place in controls.boundary.inputs]
            boundary = BoundaryValues.apply(
                controls.boundary,
                self._of_boundary,
                samples.statistics,
                batch_axes(given),
                *given,
            )
        if controls.guess is not None:
            guess = tensors[controls.guess]
            if not samples.needs.guess:
                guess = guess.detach()
        call = Call(samples, self._of_solve, place, batch, setting)
        solution = Solve.apply(
            call, boundary, guess, *[tensors[place] for place in controls.places]
        )
        outputs = tuple([output(solution, batch, tensors) for output in self._outputs])
        if all([tensor.dtype is torch.float32 for tensor in tensors]):
            outputs = tuple([output.to(torch.float32) for output in outputs])
        return outputs

    def stamp(self) -> tuple:
        """What tells setting, values of coefficients, and meshes of the last call. Collective."""
        copies = self._samples.solver.system.linearisation.copies
        return copies.look_at_meshes(), *(surroundings.number for surroundings in self._all)
