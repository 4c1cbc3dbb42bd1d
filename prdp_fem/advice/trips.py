"""Trips through a solver, forward and backward, for the same samples each time."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from prdp_fem.freshness import UNSEEN
from prdp_fem.memory.devices import HOST
from prdp_fem.problem.wanted import Wanted
from prdp_fem.refinement.rules import FixedRefinement
from prdp_fem.solvers.refined import RefinedSolver

__all__ = ["LayerTrips", "SolverTrips", "Trip", "Trips", "first_rows"]


@dataclass(frozen=True)
class Trip:
    """What a trip gave, and what it cost.

    Attributes
    ----------
    solutions : numpy.ndarray
        Shape (rows, rank-local dofs).
    gradients : list of numpy.ndarray
        One for each of what was differentiated by.
    iterations : tuple of int
        Forward and backward, for a row.
    newton_steps : int
        For a row.
    seconds : tuple of float
        For a row, the longest of all ranks: of the processor, in this thread, so that what else a
        machine does is left out; on a device those of a clock.
    """

    solutions: np.ndarray
    gradients: list[np.ndarray]
    iterations: tuple[int, int]
    newton_steps: int
    seconds: tuple[float, float]


class Trips(ABC):
    """Trips through a solver that nobody else has.

    Parameters
    ----------
    solver : RefinedSolver
    rows : int
        How many samples go through it at once.
    renews : bool
        Whether all is to be assembled anew for each sample, as it will be for others. Several rows
        see to that themselves, forward and backward; what is alone finds on its way back what it
        has left.
    """

    def __init__(self, solver: RefinedSolver, rows: int, renews: bool):
        self.solver = solver
        self.rows = rows
        self.comm = solver.system.comm
        self._renews = renews and rows == 1

    def go(self, setting: Any, cotangents: np.ndarray | None) -> Trip:
        """Solve and differentiate. Collective.

        Parameters
        ----------
        setting : Setting or None
        cotangents : numpy.ndarray or None
            Shape (rows, n); None for the solutions.
        """
        solver, system = self.solver, self.solver.system
        solver.refinement = None if setting is None else FixedRefinement(setting)
        solver.statistics.reset()
        now = time.thread_time if solver.device == HOST else time.perf_counter
        with stop_annotating():
            if self._renews:
                system.place.clock.changed(UNSEEN)
            start = now()
            solutions, others = self._forward()
            forward = now() - start
            start = now()
            gradients = self._backward(others, solutions if cotangents is None else cotangents)
            backward = now() - start
        system.collect_garbage()
        spent = solver.statistics
        seconds = self.comm.allreduce(forward, MPI.MAX), self.comm.allreduce(backward, MPI.MAX)
        counts = spent.forward_iterations, spent.adjoint_iterations, spent.newton_steps
        in_forward, in_backward, steps = (-(-spent_all // self.rows) for spent_all in counts)
        return Trip(
            solutions,
            gradients,
            (in_forward, in_backward),
            steps,
            (seconds[0] / self.rows, seconds[1] / self.rows),
        )

    @abstractmethod
    def _forward(self) -> tuple[np.ndarray, Any]:
        """Solutions, and what the way back takes."""

    @abstractmethod
    def _backward(self, others, cotangents: np.ndarray) -> list[np.ndarray]:
        """Derivatives of the sum of solutions times cotangents."""


class SolverTrips(Trips):
    """Trips at the present values of a problem's coefficients; backward to the multiplier.

    Parameters
    ----------
    from_zero : bool
        Whether to start from zero, whatever guess there is.
    """

    def __init__(self, solver: RefinedSolver, renews: bool, *, from_zero: bool = False):
        super().__init__(solver, 1, renews)
        with stop_annotating():
            self._point = solver.point()
        if from_zero:
            self._point.guess = None

    def _forward(self):
        system = self.solver.system
        solutions = np.empty((1, system.size))
        records = system.solve(self._point, self.solver.setting, solutions)
        return solutions, (records, solutions)

    def _backward(self, others, cotangents):
        records, solutions = others
        system = self.solver.system
        system.solve_adjoint(
            self._point,
            self.solver.setting,
            cotangents.copy(),
            solutions,
            records,
            Wanted({}),
        )
        return [np.array(system.linearisation.multipliers.value[1].values(0))[None]]


class LayerTrips(Trips):
    """Trips of samples through a layer, backward to its controls.

    Parameters
    ----------
    solver : RefinedSolver
    layer : SolverLayer
        The user's, whose class and controls are taken.
    samples : list of torch.Tensor
        As :func:`first_rows` gives them.
    renews : bool
    """

    def __init__(self, solver: RefinedSolver, layer, samples: list, renews: bool):
        rows = max(len(sample) if sample.ndim == 2 else 1 for sample in samples)
        super().__init__(solver, rows, renews)
        self._layer = type(layer)(solver, layer.controls)
        wanted = [sample.requires_grad for sample in samples]
        self._leaves = [
            sample.detach().double().cpu().clone().requires_grad_(is_wanted or not any(wanted))
            for sample, is_wanted in zip(samples, wanted)
        ]

    def _forward(self):
        for leaf in self._leaves:
            leaf.grad = None
        solutions = self._layer(*self._leaves)
        if not solutions.requires_grad:
            raise RuntimeError(
                "advise() measures derivatives, and torch keeps none at the moment: call it"
                " outside torch.no_grad() and inference_mode()"
            )
        found = solutions.detach().numpy()
        return np.array(found).reshape(self.rows, -1), solutions

    def _backward(self, others, cotangents):
        others.backward(others.new_tensor(cotangents).reshape(others.shape))
        return [
            np.array(leaf.grad.numpy()).reshape(1 if leaf.ndim == 1 else self.rows, -1)
            for leaf in self._leaves
            if leaf.grad is not None
        ]


def first_rows(samples, rows: int) -> list:
    """The first samples of a batch, one batch axis for all that have some.

    Parameters
    ----------
    samples : sequence of torch.Tensor
        One for each control, as a layer takes them.
    rows : int
        How many, at the most.
    """
    batch = np.broadcast_shapes(*(tuple(sample.shape[:-1]) for sample in samples))
    return [
        sample
        if sample.ndim == 1
        else sample.expand(*batch, sample.shape[-1]).reshape(-1, sample.shape[-1])[:rows]
        for sample in samples
    ]
