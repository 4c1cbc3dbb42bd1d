"""Derivatives of a solution of the equations, whatever iteration has led to it.

J λ̂ = … with J the derivative of the residual by the solution, at the state that the solve has
reached.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set

import numpy as np

from prdp_fem.assembly.input_derivatives import InputDerivatives
from prdp_fem.krylov.transposes import Krylov
from prdp_fem.memory.batch import Batch
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.problem.point import Direction, Point
from prdp_fem.problem.wanted import Needs, SecondCotangent, Wanted
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.differentiation import Implicit
from prdp_fem.solution.linear import LinearSolve
from prdp_fem.solution.newton import NewtonSolve
from prdp_fem.solution.stretches import stretches

__all__ = ["ImplicitDerivative"]


class ImplicitDerivative:
    """The implicit derivative of a solve: that of a solution of F(u, m) = 0.

    Parameters
    ----------
    forward : LinearSolve or NewtonSolve
    differentiation : Implicit
        It has no settings of its own.
    """

    def __init__(self, forward: LinearSolve | NewtonSolve, differentiation: Implicit):
        self._forward, self._linearisation = forward, forward.linearisation
        linearisation = forward.linearisation
        self._inputs = InputDerivatives(linearisation.forms, forward.terms, linearisation.place)
        self._adjoint_work, self._tangent_work = map(linearisation.work, ("adjoint", "tangent"))

    # Nothing is kept of a solve but its solution.
    record = None

    def check(self, index: int) -> None:
        """Raise a TypeError where UFL cannot differentiate the problem by an input."""
        self._inputs.check(index)

    def check_setting(self, setting: Setting) -> None:
        """Any setting will do."""

    def needs(self, indices: Collection[int], by_forms: bool) -> Needs:
        """What derivatives look at.

        Parameters
        ----------
        indices : collection of int
            The inputs that are differentiated by.
        by_forms : bool
            Whether boundary values, or meshes, are, too.
        """
        terms, takes_device_rows = self._forward.terms, self._forward.takes_device_rows
        is_linear = self._linearisation.copies.state is None
        # Where all is a matrix product, neither the solution nor what is multiplied by matrices is
        # looked at.
        looks = by_forms or not is_linear or not terms.keys() >= set(indices)
        return Needs(
            looks,
            () if looks else terms.keys(),
            device_rows=takes_device_rows,
            device_inputs=terms.keys() if takes_device_rows else (),
        )

    def values_read(self, indices: Iterable[int], by_all: bool) -> Set[int]:
        """The inputs whose values a derivative depends on.

        Parameters
        ----------
        indices : iterable of int
            What is differentiated by, or in a direction of.
        by_all : bool
            Whether all may be: in a second derivative, and by the coordinates of meshes.
        """
        return self._inputs.values_read(indices, by_all)

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
        if wanted.guess is not None:
            wanted.guess[:] = 0.0
        needs_forms = inputs.needs_forms(wanted)
        still = None if needs_forms else linearisation.still
        with self._adjoint_work:
            if needs_forms:
                point = point.on(linearisation.place.memory)  # once for all rows
            size = linearisation.largest_size
            for rows, at in stretches(point, varying, len(cotangents), size, still):
                if at is not None:
                    solution = None if solutions is None else solutions[rows.start]
                    krylov = linearisation.at(at, solution)
                    if needs_forms:
                        assert solutions is not None
                        self._require_solution(
                            at, setting, solutions[rows.start], wanted.gradients, wanted.meshes
                        )
                multipliers = self._solve(krylov, setting, cotangents[rows])
                if needs_forms:
                    # Each row has a point of its own.
                    assert at is not None and solutions is not None
                    self._zero_boundary(multipliers)
                    inputs.at(at, solutions[rows.start], multipliers)
                inputs.write(wanted, rows, multipliers, cotangents)

    def _require_solution(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        indices: Iterable[int],
        meshes: Iterable,
    ) -> None:
        """Raise where a derivative is to be one of a solution that is none; collective.

        Parameters
        ----------
        point, setting, solution
            Of a solve, at which the operator is.
        indices, meshes : iterable
            What to differentiate by: the derivative by a right-hand side is a matter of the
            operator alone, where that does not depend on the solution.
        """
        linearisation = self._linearisation
        inputs, is_nonlinear = linearisation.forms.inputs, linearisation.copies.state is not None
        if linearisation.krylov.may_hide_residuals.value and (
            is_nonlinear or any(inputs[index].in_operator for index in indices) or meshes
        ):
            b, w = self._forward.system_at(point, linearisation.place.memory.on_host(solution))
            linearisation.krylov.require_solution(setting, b, w)

    def _solve(self, krylov: Krylov, setting: Setting | None, cotangents) -> Batch | DeviceBatch:
        """The rows λ from those of an array, or of a tensor on the device."""
        linearisation, count = self._linearisation, len(cotangents)
        inner = linearisation.cotangents.value[count]
        # A truncated solve would see what is at boundary dofs.
        inner.fill_times_zero(cotangents, linearisation.boundary_entries.value)
        multipliers = linearisation.multipliers.value[count]
        pairs = zip(inner.vectors, multipliers.vectors)
        krylov.solve_transposed(setting, pairs, linearisation.statistics)
        return multipliers

    def _zero_boundary(self, multipliers: Batch | DeviceBatch) -> None:
        """Leave boundary rows out of what forms are weighted by, as forward solves leave them out.

        A preconditioner that does not keep them apart has truncated iterations write there.
        """
        multipliers.zero(self._linearisation.boundary_entries.value)

    def tangent(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        record: None,
        direction: Direction,
        out: np.ndarray,
    ) -> None:
        """Write the solution's derivative in a direction; see :meth:`SolutionMap.solve_tangent`."""
        linearisation = self._linearisation
        tangent = linearisation.states.value[1].vectors[0]
        with self._tangent_work:
            krylov = linearisation.at(point, solution)
            self._require_solution(point, setting, solution, direction.inputs, direction.meshes)
            b = self._inputs.in_direction(point, solution, direction)
            iterations = krylov.solve_tangent(setting, b, tangent)
            out[:] = linearisation.place.memory.unload(tangent)
            linearisation.forms.put_boundary(out, direction.boundary)
        linearisation.statistics.tangent_solves += 1
        linearisation.statistics.tangent_iterations += iterations

    def second_adjoint(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        second: SecondCotangent,
        direction: Direction,
        wanted: Wanted,
    ) -> None:
        """Write that of the adjoint; see :meth:`SolutionMap.solve_second_adjoint`."""
        linearisation = self._linearisation
        inputs = self._inputs
        by_forms = self._inputs.by_forms
        with self._adjoint_work:
            krylov = linearisation.at(point, solution)
            self._require_solution(
                point,
                setting,
                solution,
                [*wanted.gradients, *direction.inputs],
                [*wanted.meshes, *direction.meshes],
            )
            multipliers = self._solve(krylov, setting, second.cotangent[None])
            self._zero_boundary(multipliers)
            by_forms.at(point, solution, multipliers.values(0))
            if wanted.first_boundary is not None:
                inputs.write_boundary(second.cotangent, wanted.first_boundary[0])
            by_forms.toward(direction, second.tangent)
            cotangent = second.derivative + by_forms.second_by_solution()
            seconds = {index: by_forms.second_by_input(index) for index in wanted.gradients}
            meshes = {mesh: by_forms.second_by_mesh(mesh) for mesh in wanted.meshes}
            multipliers = self._solve(krylov, setting, cotangent[None])
            self._zero_boundary(multipliers)
            by_forms.at(point, solution, multipliers.values(0))
            inputs.write(wanted, slice(0, 1), multipliers, cotangent[None])
            for index, gradient in wanted.gradients.items():
                gradient[0] += seconds[index]
            for mesh, cofunction in meshes.items():
                cofunction += wanted.by_mesh[mesh]
                wanted.by_mesh[mesh] = cofunction
