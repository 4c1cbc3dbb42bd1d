"""What advice is asked about: a user's solver or layer, which is looked at and left as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from pyadjoint.tape import stop_annotating

from prdp_fem.advice.candidates import Candidate
from prdp_fem.advice.trips import LayerTrips, SolverTrips, Trips, first_rows
from prdp_fem.problem.inputs import local_values
from prdp_fem.solvers.refined import RefinedSolver
from prdp_fem.solvers.variational import LinearVariationalSolver, NonlinearVariationalSolver

__all__ = ["Subject"]

# Samples that go through a layer at once: enough to have the operator change between them.
_ROWS = 2


class Subject:
    """A solver or a layer, and the samples that it is to be looked at with.

    Parameters
    ----------
    solver_or_layer : RefinedSolver or SolverLayer
    samples : sequence of torch.Tensor
        One for each control of a layer; none for a solver.

    Attributes
    ----------
    solver : RefinedSolver
    is_nonlinear : bool
    from_zero : bool
        Whether solves start from zero, whatever guess there is.

    Raises
    ------
    TypeError
        For another object, and for samples that do not fit it.
    """

    def __init__(self, solver_or_layer, samples):
        self._layer = None if isinstance(solver_or_layer, RefinedSolver) else solver_or_layer
        self.solver = solver_or_layer if self._layer is None else _solver_of(solver_or_layer)
        expected = 0 if self._layer is None else len(self._layer.controls)
        if len(samples) != expected:
            what = "a solver takes no samples: those are a layer's"
            if self._layer is not None:
                what = f"the layer has {expected} control(s), and takes a tensor for each"
            raise TypeError(f"{what}; found {len(samples)}")
        if wrong := [sample for sample in samples if not hasattr(sample, "requires_grad")]:
            raise TypeError(f"samples must be tensors, found a {type(wrong[0]).__name__}")
        self._samples = first_rows(samples, _ROWS) if samples else []
        self.is_nonlinear = isinstance(self.solver, NonlinearVariationalSolver)
        self.from_zero = False

    @property
    def name(self) -> str:
        """Of what is solved for."""
        return self.solver.problem.u.name()

    @property
    def unknowns(self) -> int:
        """On all ranks."""
        return self.solver.problem.u.function_space().dim()

    @property
    def dimension(self) -> int:
        """That of the domain."""
        return self.solver.problem.u.function_space().mesh().topological_dimension

    @property
    def sizes(self) -> tuple[int, int]:
        """What predicts the cost of a factorisation."""
        return self.dimension, self.unknowns

    @property
    def has_other_preconditioner(self) -> bool:
        """Whether the preconditioner is made of another matrix than the operator."""
        return self.solver.problem.Jp is not None

    @cached_property
    def varies(self) -> bool:
        """Whether the operator is another one for each sample."""
        if self.is_nonlinear:
            return True
        system = self.solver.system
        controls = [] if self._layer is None else self._layer.controls
        return any(
            system.inputs[system.forms.find(control)].in_operator
            for control in controls
            if system.forms.depends_on(control)
        )

    @property
    def at_hand(self) -> Candidate:
        """The user's own method."""
        solver = self.solver
        ksp = solver.snes.getKSP()
        parameters = dict(solver.parameters)
        for option, found in (("ksp_type", ksp.getType()), ("pc_type", ksp.getPC().getType())):
            if found not in (None, "python"):  # what was set by hand, too
                parameters[option] = found
        given = solver.arguments
        words = f"{parameters.get('ksp_type')} + {parameters.get('pc_type')}"
        return Candidate(
            f"yours: {words}", parameters, is_at_hand=True, ksp_prefix=given.get("ksp_prefix")
        )

    def parameters(self, candidate: Candidate) -> Mapping[str, Any]:
        """The options of a candidate, with what the user's say of Newton's method."""
        if candidate.is_at_hand or not self.is_nonlinear:
            return candidate.parameters
        mine = {
            name: value
            for name, value in self.solver.parameters.items()
            if name.startswith("snes_") and name != "snes_ksp_ew"
        }
        return {**mine, **candidate.parameters}

    def trips(self, candidate: Candidate) -> Trips:
        """Trips with another solver of the same problem. Collective."""
        given = {**self.solver.arguments}
        given.update(
            solver_parameters=dict(self.parameters(candidate)),
            options_prefix=None,
            ksp_prefix=candidate.ksp_prefix,
            warm_start=self.solver.warm_start,
            device=self.solver.device,
        )
        kind = NonlinearVariationalSolver if self.is_nonlinear else LinearVariationalSolver
        with stop_annotating():
            twin = kind(self.solver.problem, **given)
        if self._layer is None:
            return SolverTrips(twin, self.varies, from_zero=self.from_zero)
        return LayerTrips(twin, self._layer, self._samples, self.varies)

    def starts_at(self, solutions: np.ndarray) -> bool:
        """Whether a solver's guess is the solution, as after a solve. Collective."""
        if self._layer is not None or not self.solver.warm_start:
            return False
        guess, solution = local_values(self.solver.problem.u), solutions[0]
        squares = np.array([np.sum((guess - solution) ** 2), np.sum(solution**2)])
        total = self.solver.system.comm.allreduce(squares)
        return math.sqrt(total[0]) <= 1e-4 * math.sqrt(total[1])


def _solver_of(layer) -> RefinedSolver:
    solver = getattr(layer, "solver", None)
    if not isinstance(solver, RefinedSolver) or not hasattr(layer, "controls"):
        raise TypeError(
            "expected a prdp_fem.LinearVariationalSolver, NonlinearVariationalSolver or"
            f" SolverLayer, found a {type(layer).__module__}.{type(layer).__name__}: put a solver"
            " of Firedrake's under control() first"
        )
    return solver
