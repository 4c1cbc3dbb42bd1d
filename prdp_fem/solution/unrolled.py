"""Derivatives of linear solves as the iterations that they are.

With w the K-th iterate for A w = b from a guess, its cotangent gives those of A, b and the guess;
then b = L - a(g, ·) and A are differentiated by what they depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set

import numpy as np

from prdp_fem.assembly.input_derivatives import InputDerivatives
from prdp_fem.assembly.operator_derivative import OperatorDerivative
from prdp_fem.memory.batch import Batch
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.problem.point import Direction, Point
from prdp_fem.problem.wanted import Needs, Wanted
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.differentiation import Unrolled
from prdp_fem.solution.linear import LinearSolve
from prdp_fem.solution.unrolled_iterations import Iterate, UnrolledIterations

__all__ = ["UnrolledKrylov"]


class UnrolledKrylov:
    """The exact derivatives of the iterates of a linear solve.

    Parameters
    ----------
    forward : LinearSolve
    differentiation : Unrolled

    Raises
    ------
    ValueError
        For a method that cannot be unrolled.
    """

    def __init__(self, forward: LinearSolve, differentiation: Unrolled):
        self._forward, self._linearisation = forward, forward.linearisation
        linearisation, place = forward.linearisation, forward.linearisation.place
        linearisation.krylov.keeps_iterates = True
        self._iterations = UnrolledIterations(
            linearisation.forms, linearisation.solver, forward.refined, place, differentiation
        )
        self._inputs = InputDerivatives(linearisation.forms, forward.terms, place)
        self._adjoint_work, self._tangent_work = map(linearisation.work, ("adjoint", "tangent"))
        self._no_boundary = np.zeros(linearisation.size)
        self._of_guess = place.row(linearisation.layout)
        self._tangent = place.row(linearisation.layout)

    def check(self, index: int) -> None:
        """Raise a TypeError or ValueError where the solve cannot be differentiated by an input."""
        self._inputs.check(index)
        self._iterations.check(index)

    def check_setting(self, setting: Setting) -> None:
        """Raise a ValueError where a setting is for other iterations than those unrolled."""
        self._iterations.check_setting()

    def needs(self, indices: Collection[int], by_forms: bool) -> Needs:
        """What derivatives by some inputs look at: b is computed again from all of them."""
        return Needs(
            solutions=False,
            boundary=True,
            guess=True,
            device_rows=True,
            device_inputs=self._forward.terms.keys(),
        )

    def values_read(self, indices: Iterable[int], by_all: bool) -> Set[int]:
        """The inputs whose values a derivative depends on: all."""
        return set(range(len(self._linearisation.forms.inputs)))

    def record(self) -> int:
        """The iterations that the last solution is the outcome of."""
        krylov, iterations = self._linearisation.krylov, self._iterations
        iterations.check_method(lambda: krylov.symmetry.has_symmetric_parts.value)
        unrolled = iterations.of_ksp.value
        completed = unrolled.completed_iterations()
        if completed == 0:
            if krylov.refined.is_budget and unrolled.is_linear:
                # PETSc has stopped before the first, having nothing to do; so would all others have
                # had.
                return krylov.ksp.getTolerances()[3]
            iterations.warn_of_no_iterations()
        return completed

    def adjoint(
        self,
        point: Point,
        setting: Setting | None,
        cotangents: np.ndarray,
        solutions: np.ndarray | None,
        records: list,
        wanted: Wanted,
        varying: Mapping[int, np.ndarray],
    ) -> None:
        """Write what is wanted; see :meth:`SolutionMap.solve_adjoint`."""
        linearisation, inputs = self._linearisation, self._inputs
        right_hand_side = self._forward.right_hand_side
        needs_forms = inputs.needs_forms(wanted)
        of_operators = [
            one
            for one in self._iterations.operators
            if wanted.meshes or one.inputs & wanted.gradients.keys()
        ]
        with self._adjoint_work:
            if needs_forms:
                point = point.on(linearisation.place.memory)  # once for all rows
            for rows, at in self._forward.stretches(
                point, varying, len(cotangents), has_forms=needs_forms
            ):
                if at is not None:
                    linearisation.at(at)
                    right_hand_side.prepare(at, varying)
                b = right_hand_side.rows(varying, rows)
                multipliers = self._pull(
                    b,
                    cotangents[rows],
                    records[rows],
                    point.guess,
                    wanted.guess,
                    rows,
                    of_operators,
                )
                if needs_forms:
                    assert at is not None  # since each row has a point of its own
                    # b is what the residual is at the boundary values, with the opposite sign.
                    inputs.at(
                        at, self._no_boundary if at.boundary is None else at.boundary, multipliers
                    )
                inputs.write(wanted, rows, multipliers, cotangents)
                self._iterations.add_by_operators(
                    of_operators, wanted.row(rows.start), wanted.by_mesh
                )

    def _pull(
        self,
        b: Batch | DeviceBatch,
        cotangents,
        iterations: list[int],
        start: np.ndarray | None,
        guess: np.ndarray | None,
        rows: slice,
        of_operators: list[OperatorDerivative],
    ) -> Batch | DeviceBatch:
        """The cotangents of right-hand sides; those of guesses and operators are written."""
        linearisation, count = self._linearisation, len(cotangents)
        inner, multipliers = (
            store.value[count] for store in (linearisation.cotangents, linearisation.multipliers)
        )
        w, of_guess = linearisation.states.value[count], self._of_guess.value
        entries = linearisation.boundary_entries.value
        inner.fill_times_zero(cotangents, entries)
        symmetry = linearisation.krylov.symmetry
        if start is not None:
            self._forward.start(w, start, rows)
        for k in range(count):
            iterate = Iterate(b.vectors[k], None if start is None else w.vectors[k], iterations[k])
            self._iterations.pull(
                iterate,
                inner.vectors[k],
                b_cotangent=multipliers.vectors[k],
                guess_cotangent=None if guess is None else of_guess.vectors[0],
                of_operators=of_operators,
                symmetric=symmetry.has_symmetric_parts.value,
            )
            if guess is not None:
                of_guess.zero(entries)
                of_guess.read(guess[rows.start + k : rows.start + k + 1])
            linearisation.statistics.adjoint_solves += 1
        multipliers.zero(entries)  # b is constant there
        multipliers.changed()
        return multipliers

    def tangent(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        record: int,
        direction: Direction,
        out: np.ndarray,
    ) -> None:
        """Write the iterate's derivative in a direction; see :meth:`SolutionMap.solve_tangent`."""
        linearisation, right_hand_side = self._linearisation, self._forward.right_hand_side
        with self._tangent_work:
            linearisation.at(point)
            right_hand_side.prepare(point, {})
            b, w = right_hand_side.rows({}, slice(0, 1)).vectors[0], linearisation.states.value[1]
            start = guess_tangent = None
            if point.guess is not None:
                self._forward.start(w, point.guess, slice(0, 1))
                start = w.vectors[0]
            boundary = self._no_boundary if point.boundary is None else point.boundary
            b_tangent = self._inputs.in_direction(point, boundary, direction)
            if direction.guess is not None:
                of_guess = self._of_guess.value
                of_guess.fill_inside(direction.guess, linearisation.boundary_entries.value)
                guess_tangent = of_guess.vectors[0]
            tangent = self._tangent.value.vectors[0]
            self._iterations.push(
                Iterate(b, start, record),
                tangent,
                direction,
                b_tangent=b_tangent,
                guess_tangent=guess_tangent,
            )
            out[:] = linearisation.place.memory.unload(tangent)
            linearisation.forms.put_boundary(out, direction.boundary)
        linearisation.statistics.tangent_solves += 1

    def second_adjoint(self, *_) -> None:
        """There is none."""
        raise NotImplementedError(NO_SECOND)


NO_SECOND = (
    "unrolled iterations have no second derivatives here: use differentiation='implicit' "
    "for Hessians"
)
