"""A linear variational problem whose solves are differentiated as the iterations that they are.

With w the K-th iterate for A w = b from a guess, its cotangent gives those of A, b and the guess; then b = L - a(g, ·) and A are
differentiated by what they depend on.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from prdp_fem.assembly.operator_derivative import OperatorDerivative
from prdp_fem.memory.batch import Batch, chunks
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.forms import LinearForms
from prdp_fem.problem.point import Direction, Point
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.differentiation import Unrolled
from prdp_fem.solution.linear import LinearSystem
from prdp_fem.solution.unrolled_system import UnrolledSystem

__all__ = ["UnrolledLinearSystem"]


class UnrolledLinearSystem(UnrolledSystem, LinearSystem):
    """The solve of a linear problem, and the exact derivatives of its iterates, as functions of the inputs.

    Parameters
    ----------
    forms, solver, make_adjoint_solver, ksp_prefix, memory
        As in :class:`LinearSystem`.
    differentiation : Unrolled

    Raises
    ------
    ValueError
        For a method that cannot be unrolled.
    """

    depends_on_guess = True

    def __init__(self, forms: LinearForms, solver, make_adjoint_solver: Callable, ksp_prefix: str | None, memory: Memory, *,
                 differentiation: Unrolled):
        self._unroll(forms, solver, differentiation)
        super().__init__(forms, solver, make_adjoint_solver, ksp_prefix, memory)
        self._no_boundary = np.zeros(self.size)

    def _place_in(self, memory: Memory) -> None:
        super()._place_in(memory)
        self._unrolled.forget_operators()
        self._of_guess, self._tangent = memory.batches(self._zero)(1), memory.batches(self._zero)(1)

    def check_setting(self, setting: Setting) -> None:
        super().check_setting(setting)
        self._check_refined(self._krylov.refined)

    def _record(self) -> int:
        """The iterations that the last solution is the outcome of."""
        self._check_method(self._krylov.refined, self._krylov.has_symmetric_parts)
        iterations = self._unrolled.completed_iterations()
        if iterations == 0:
            if self._krylov.refined.is_budget and self._unrolled.is_linear:
                # PETSc has stopped before the first, having nothing to do; so would all others have had.
                return self._krylov.ksp.getTolerances()[3]
            self._warn_of_no_iterations()
        return iterations

    def needs_solutions(self, indices: Iterable[int]) -> bool:
        return False

    def _solve_adjoint(self, point: Point, setting: Setting | None, cotangents: np.ndarray,
                       solutions: np.ndarray | None, records: list,
                       gradients: Mapping[int, np.ndarray], varying: Mapping[int, np.ndarray],
                       boundary: np.ndarray | None, guess: np.ndarray | None,
                       meshes: Iterable) -> dict:
        dofs, right_hand_side, by_mesh = self.forms.boundary_dofs, self._right_hand_side, {}
        by_form = boundary is not None or bool(meshes) or not gradients.keys() <= self._terms.keys()
        moves = by_form or self._moves(point, varying)
        of_operators = [one for one in self._operators if meshes or one.inputs & gradients.keys()]
        with self._work_on("adjoint"):
            if by_form:
                point = point.on(self.memory)  # once for all rows
            for rows in chunks(len(cotangents), self._chunk_size(moves)):
                row = rows.start
                if row == 0 or moves:
                    at = point.at(varying, row) if moves else point
                    self._linearise(at)
                    right_hand_side.prepare(at, varying)
                b = right_hand_side.rows(varying, rows)
                multipliers = self._pull(b, cotangents[rows], records[rows], point.guess, guess, rows, of_operators)
                if by_form:
                    # b is what the residual is at the boundary values, with the opposite sign.
                    boundary_values = self._no_boundary if at.boundary is None else at.boundary
                    self._derivatives.at(at.on(self.memory), boundary_values, multipliers.values(0))
                for index, gradient in gradients.items():
                    self._gradient(index, multipliers, gradient[rows])
                if boundary is not None:
                    boundary[row] = 0.0
                    boundary[row, dofs] = self.memory.on_host(cotangents[row])[dofs] + self._derivatives.by_solution()[dofs]
                by_mesh = {mesh: self._derivatives.by_mesh(mesh) for mesh in meshes}
                self._add_by_operators(of_operators, {index: gradient[row] for index, gradient in gradients.items()}, by_mesh)
        return by_mesh

    def _pull(self, b: Batch | DeviceBatch, cotangents, iterations: list[int], start: np.ndarray | None, guess: np.ndarray | None,
              rows: slice, of_operators: list[OperatorDerivative]) -> Batch | DeviceBatch:
        """The cotangents of right-hand sides; those of guesses and operators, where they are wanted, are written."""
        count = len(cotangents)
        inner, multipliers = self._inner(cotangents), self._multipliers(count)
        w = self._states(count)
        if start is not None:
            self._start(w, start, rows)
        to_guess = None if guess is None else self._of_guess.vectors[0]
        for k in range(count):
            self._pull_iterations(b.vectors[k], None if start is None else w.vectors[k], iterations[k], inner.vectors[k],
                                  b_cotangent=multipliers.vectors[k], guess_cotangent=to_guess, of_operators=of_operators,
                                  symmetric=self._krylov.has_symmetric_parts())
            if guess is not None:
                self._of_guess.zero(self._boundary_entries)
                self._of_guess.read(guess[rows.start + k:rows.start + k + 1])
            self.statistics.adjoint_solves += 1
        multipliers.zero(self._boundary_entries)  # b is constant there
        multipliers.changed()
        return multipliers

    def _solve_tangent(self, point: Point, setting: Setting | None, solution: np.ndarray,
                       record: int, direction: Direction, out: np.ndarray) -> None:
        with self._work_on("tangent"):
            self._linearise(point)
            self._right_hand_side.prepare(point, {})
            b, w = self._right_hand_side.rows({}, slice(0, 1)).vectors[0], self._states(1)
            start = None
            if point.guess is not None:
                self._start(w, point.guess, slice(0, 1))
                start = w.vectors[0]
            b_tangent = self._right_hand_side_tangent(point, self._no_boundary if point.boundary is None else point.boundary, direction)
            guess_tangent = None
            if direction.guess is not None:
                self._of_guess.fill_inside(direction.guess, self._boundary_entries)
                guess_tangent = self._of_guess.vectors[0]
            tangent = self._tangent.vectors[0]
            self._push_iterations(b, start, record, tangent, direction, b_tangent=b_tangent, guess_tangent=guess_tangent)
            out[:] = self.memory.unload(tangent)
            self._put_boundary(out, direction.boundary)
        self.statistics.tangent_solves += 1
