"""A linear variational problem as a function of its inputs.

The system of a problem a(u, v) = L(v): with u = g + w, A w = L - a(g, ·). A solve starts from w = 0 (or from a guess), and so is a
function of the inputs, whatever was solved before.

What is constant is assembled once: the operator unless it depends on an input whose value changed, and what the right-hand
side is affine in as a matrix B. A solve then is B.mult, KSPSolve; its derivative is KSPSolveTranspose, B.multTranspose.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from firedrake.petsc import PETSc
from pyadjoint.tape import stop_annotating

from prdp_fem.assembly.right_hand_side import RightHandSide
from prdp_fem.memory.batch import Batch, chunks
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.forms import LinearForms
from prdp_fem.problem.point import Point
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.system import System

__all__ = ["LinearSystem"]


class LinearSystem(System):
    """The solve of a linear problem, and its derivatives, as functions of the inputs.

    Parameters
    ----------
    forms : LinearForms
    solver : firedrake.NonlinearVariationalSolver
        Made for ``forms.problem``: its KSP, options, nullspaces and operators are used.
    make_adjoint_solver : callable
        Makes such a solver, of the same options, for the adjoint of the problem.
    ksp_prefix : str or None
        Options prefix of the KSP that settings are put on; None for the only iterative one.
    memory : Memory
        Where solves are made.
    """

    takes_device_rows = True

    def __init__(self, forms: LinearForms, solver, make_adjoint_solver: Callable, ksp_prefix: str | None, memory: Memory):
        with stop_annotating():
            self._right_hand_side = RightHandSide(forms)
        super().__init__(forms, solver, make_adjoint_solver, self._right_hand_side.terms, ksp_prefix, memory)

    def _place_in(self, memory: Memory) -> None:
        super()._place_in(memory)
        self._right_hand_side.move_to(memory)

    def _forget(self, changed: set[int], moved: bool) -> None:
        super()._forget(changed, moved)
        self._right_hand_side.forget(changed, moved)

    def _solve(self, point: Point, setting: Setting | None, solutions: np.ndarray,
               varying: Mapping[int, np.ndarray]) -> list:
        right_hand_side, statistics = self._right_hand_side, self.statistics
        guess, records = point.guess, []
        moves = self._moves(point, varying)
        with self._work_on("forward"):
            for rows in chunks(len(solutions), self._chunk_size(moves)):
                if rows.start == 0 or moves:
                    at = point.at(varying, rows.start) if moves else point
                    self._linearise(at)
                    right_hand_side.prepare(at, varying)
                    solve = self._krylov.solver(setting, guess=guess is not None)
                b, w = right_hand_side.rows(varying, rows), self._states(rows.stop - rows.start)
                if guess is not None:
                    self._start(w, guess, rows)
                for one, solution in zip(b.vectors, w.vectors):
                    statistics.forward_iterations += solve(one, solution)
                    records.append(self._record())
                    statistics.solves += 1
                w.zero(self._boundary_entries)  # for preconditioners that do not keep the boundary rows apart to the bit
                if point.boundary is not None:
                    w.add(right_hand_side.boundary)
                w.read(solutions[rows])
        return records

    def _moves(self, point: Point, varying: Mapping[int, np.ndarray]) -> bool:
        """Whether something is assembled between rows of a batch."""
        return not self._only_enters_terms(varying) or (point.boundary is not None and point.boundary.ndim == 2)

    def _start(self, w: Batch | DeviceBatch, guess: np.ndarray, rows: slice) -> None:
        """Have rows start from a guess, of shape (n,) or (batch, n), without its boundary values."""
        w.fill_inside(guess if guess.ndim == 1 else guess[rows], self._boundary_entries)

    def _system_at(self, point: Point, solution: np.ndarray) -> tuple[PETSc.Vec, PETSc.Vec]:
        self._right_hand_side.prepare(point, {})
        w = self._states(1)
        w.fill_inside(solution, self._boundary_entries)
        return self._right_hand_side.rows({}, slice(0, 1)).vectors[0], w.vectors[0]

    def _record(self):
        """What is kept of the last solve for its derivatives."""
