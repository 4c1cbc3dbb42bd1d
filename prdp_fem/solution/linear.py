"""A linear variational problem solved at a point, or at a batch of them.

The system of a problem a(u, v) = L(v): with u = g + w, A w = L - a(g, ·). A solve starts from w = 0
(or from a guess), and so is a function of the inputs, whatever was solved before.

What is constant is assembled once: the operator unless it depends on an input whose value changed,
and what the right-hand side is affine in as a matrix B. A solve then is B.mult, KSPSolve; its
derivative is KSPSolveTranspose, B.multTranspose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.assembly.right_hand_side import RightHandSide
from prdp_fem.memory.batch import Batch
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.problem.point import Point
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.linearisation import Linearisation
from prdp_fem.solution.stretches import stretches

__all__ = ["LinearSolve"]


class LinearSolve:
    """The solve of a linear problem.

    Parameters
    ----------
    linearisation : Linearisation
    right_hand_side : RightHandSide

    Attributes
    ----------
    linearisation, right_hand_side
        As given.
    terms : Mapping of int to AffineTerm or CofunctionTerm
        The inputs that enter the residual by a matrix.
    """

    # Whether rows of solutions, cotangents and terms may be tensors on the device of the memory.
    takes_device_rows = True

    def __init__(self, linearisation: Linearisation, right_hand_side: RightHandSide):
        self.linearisation, self.right_hand_side = linearisation, right_hand_side
        self.terms = right_hand_side.terms
        self._work = linearisation.work("forward")

    def check_setting(self, setting: Setting) -> None:
        """Raise a ValueError where there is no KSP for a setting to be put on, or more than one."""
        self.linearisation.check_setting(setting)

    @property
    def refined(self):
        """The KSP that settings are put on."""
        return self.linearisation.krylov.refined

    def solve(
        self,
        point: Point,
        setting: Setting | None,
        solutions: np.ndarray,
        varying: Mapping[int, np.ndarray],
        record: Callable | None,
    ) -> list:
        """Solve for rows; see :meth:`SolutionMap.solve`, which checks what this gives.

        ``statistics.solves`` counts the rows that are done. ``record`` is called after each, for
        what is kept of it; None for nothing.
        """
        linearisation, right_hand_side = self.linearisation, self.right_hand_side
        statistics, guess, has_guess = (
            linearisation.statistics,
            point.guess,
            point.guess is not None,
        )
        records: list = []
        with self._work:
            for rows, at in self.stretches(point, varying, len(solutions)):
                if at is not None:
                    krylov = linearisation.at(at)
                    right_hand_side.prepare(at, varying)
                b = right_hand_side.rows(varying, rows)
                w = linearisation.states.value[rows.stop - rows.start]
                if guess is not None:
                    self.start(w, guess, rows)
                pairs = zip(b.vectors, w.vectors)
                records += krylov.solve(setting, pairs, statistics, guess=has_guess, record=record)
                # For preconditioners that do not keep the boundary rows apart to the bit.
                w.zero(linearisation.boundary_entries.value)
                if point.boundary is not None:
                    w.add(right_hand_side.boundary.value)
                w.read(solutions[rows])
        return records

    def stretches(
        self,
        point: Point,
        varying: Mapping[int, np.ndarray],
        count: int,
        *,
        has_forms: bool = False,
    ) -> list[tuple[slice, Point | None]]:
        """So many rows, cut where operator or right-hand side are assembled, or forms are."""
        linearisation = self.linearisation
        has_lifting = point.boundary is not None and point.boundary.ndim == 2
        still = None if has_forms or has_lifting else linearisation.still
        return stretches(point, varying, count, linearisation.largest_size, still)

    def start(self, w: Batch | DeviceBatch, guess: np.ndarray, rows: slice) -> None:
        """Have rows start from a guess, shape (n,) or (batch, n), without its boundary values."""
        w.fill_inside(
            guess if guess.ndim == 1 else guess[rows], self.linearisation.boundary_entries.value
        )

    def system_at(self, point: Point, solution: np.ndarray) -> tuple[PETSc.Vec, PETSc.Vec]:
        """b and w, whose residual b - A w is that of a solution, where the operator is."""
        self.right_hand_side.prepare(point, {})
        w = self.linearisation.states.value[1]
        w.fill_inside(solution, self.linearisation.boundary_entries.value)
        return self.right_hand_side.rows({}, slice(0, 1)).vectors[0], w.vectors[0]
