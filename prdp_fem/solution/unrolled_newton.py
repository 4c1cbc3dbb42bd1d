"""Derivatives of nonlinear solves as the Newton steps, and their iterations, that they are.

A step u ← u - λ y has y the K-th iterate for J(u) y = F(u) from zero. Its cotangent gives those of
J and F, which are differentiated by the state and by what they depend on; so on to the step before
it. The step lengths λ of a line search count as constant.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace

import numpy as np
from firedrake.logging import warning
from firedrake.petsc import PETSc

from prdp_fem.assembly.input_derivatives import InputDerivatives
from prdp_fem.assembly.operator_derivative import SOLUTION
from prdp_fem.krylov.petsc_types import SNES_TYPES, snes_facts, types_with
from prdp_fem.problem.firedrake_internals import applies_boundary_first
from prdp_fem.problem.point import Direction, Point
from prdp_fem.problem.wanted import Needs, Wanted
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.differentiation import Unrolled
from prdp_fem.solution.newton import NewtonSolve
from prdp_fem.solution.unrolled import NO_SECOND
from prdp_fem.solution.unrolled_iterations import Iterate, UnrolledIterations

__all__ = ["UnrolledNewton"]

# Options that have a step made with another Jacobian or preconditioner than those at its state.
_LAGS = ("snes_lag_jacobian", "snes_lag_preconditioner")


@dataclass
class Trajectory:
    """The steps of a solve.

    Attributes
    ----------
    fields : list of numpy.ndarray
        The states before each step, rank-local.
    iterations : list of int
        Of the linear solve of each step.
    lengths : list of float
        λ of each step.
    """

    fields: list[np.ndarray] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)

    def with_fields(self, fields: list[np.ndarray]) -> Trajectory:
        """A trajectory with other states, or none."""
        return replace(self, fields=fields)


class UnrolledNewton:
    """The exact derivatives of the steps of a nonlinear solve.

    Parameters
    ----------
    forward : NewtonSolve
    differentiation : Unrolled

    Raises
    ------
    ValueError
        For a linear or nonlinear method that cannot be unrolled.
    """

    def __init__(self, forward: NewtonSolve, differentiation: Unrolled):
        linearisation, snes = forward.linearisation, forward.newton.snes
        _check_steps(forward.solver)
        self._forward, self._linearisation = forward, linearisation
        self._place = linearisation.place
        self._iterations = UnrolledIterations(
            linearisation.forms, forward.solver, forward.refined, self._place, differentiation
        )
        self._inputs = InputDerivatives(linearisation.forms, forward.terms, self._place)
        self._adjoint_work, self._tangent_work = map(forward.work, ("adjoint", "tangent"))
        self._only_last = differentiation.steps == "last"
        self._trajectory: Trajectory | None = None
        self._has_warned_of_lengths = snes.getLineSearch().getType() == "basic"
        snes.setMonitor(self._note)
        layout = linearisation.layout
        self._residual, self._of_residual = self._place.vector(layout), self._place.vector(layout)
        self._step, self._of_step = self._place.vector(layout), self._place.vector(layout)

    def check(self, index: int) -> None:
        """Raise a TypeError or ValueError where the solve cannot be differentiated by an input."""
        self._inputs.check(index)
        self._iterations.check(index)

    def check_setting(self, setting: Setting) -> None:
        """Raise a ValueError where a setting is for other iterations than those unrolled."""
        self._iterations.check_setting()

    def needs(self, indices: Collection[int], by_forms: bool) -> Needs:
        """What derivatives by some inputs look at: the steps are made again from all of them."""
        return Needs(solutions=False, boundary=True, guess=not self._only_last, fields=True)

    def values_read(self, indices: Iterable[int], by_all: bool) -> Set[int]:
        """The inputs whose values a derivative depends on: all."""
        return set(range(len(self._linearisation.forms.inputs)))

    # The steps

    def _note(self, snes: PETSc.SNES, step: int, norm: float) -> None:
        """Keep what the derivatives of a step ask for."""
        state, memory = snes.getSolution(), self._place.memory
        if step == 0:
            self._trajectory = Trajectory([memory.unload(state)])
            return
        trajectory = self._trajectory
        update = snes.getSolutionUpdate()
        made = self._step.value
        assert trajectory is not None  # since PETSc begins with step 0
        memory.load(trajectory.fields[-1], made)
        made.axpy(-1.0, state)
        squared = update.dot(update)
        length = made.dot(update) / squared if squared > 0 else 1.0
        if abs(length - 1) > 1e-8 and not self._has_warned_of_lengths:
            self._has_warned_of_lengths = True
            if snes.comm.rank == 0:
                warning(
                    f"a line search has made a step of length {length:g}, which counts as "
                    "constant where Newton steps are unrolled: their derivative is exact with "
                    "snes_linesearch_type basic, and wherever full steps are made"
                )
        trajectory.lengths.append(length)
        trajectory.iterations.append(self._iterations.of_ksp.value.completed_iterations())
        trajectory.fields.append(memory.unload(state))

    def record(self) -> Trajectory:
        """The steps that the last solution is the outcome of."""
        trajectory, self._trajectory = self._trajectory, None
        made = self._forward.newton.snes.getIterationNumber()
        if trajectory is None or len(trajectory.iterations) != made:
            raise RuntimeError(
                "the Newton steps of a solve were not seen by the monitor that "
                "unrolled differentiation has on its SNES: has monitorCancel() been "
                "called?"
            )
        if trajectory.iterations:
            self._iterations.check_method(lambda: False)
        else:
            self._iterations.warn_of_no_iterations()
        return trajectory

    def _differentiated(self, trajectory: Trajectory) -> range:
        """The steps that are differentiated; none where none was made."""
        steps = range(len(trajectory.iterations))
        return steps[-1:] if self._only_last else steps

    # Reverse

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
        dofs = self._linearisation.forms.boundary_dofs
        with self._adjoint_work:
            for row, (cotangent, trajectory) in enumerate(zip(cotangents, records)):
                at = point.at(varying, row)
                self._forward.write(at)
                wanted.by_mesh.clear()
                gradients = wanted.row(row)
                for gradient in gradients.values():
                    gradient[:] = 0.0
                of_state = cotangent.copy()
                for step in reversed(self._differentiated(trajectory)):
                    of_state += self._pull(at, trajectory, step, of_state, gradients, wanted)
                if wanted.boundary is not None:
                    wanted.boundary[row] = 0.0
                    wanted.boundary[row, dofs] = of_state[dofs]
                if wanted.guess is not None:
                    wanted.guess[row] = of_state
                    wanted.guess[row, dofs] = 0.0
                self._linearisation.statistics.adjoint_solves += 1

    def _pull(
        self,
        point: Point,
        trajectory: Trajectory,
        step: int,
        of_state: np.ndarray,
        gradients: Mapping[int, np.ndarray],
        wanted: Wanted,
    ) -> np.ndarray:
        """What a step adds to the cotangent of the state before it; gradients are added to."""
        linearisation, memory = self._linearisation, self._place.memory
        by_forms, dofs = self._inputs.by_forms, linearisation.forms.boundary_dofs
        state, iterations = trajectory.fields[step], trajectory.iterations[step]
        residual = self._residual.value
        of_residual = self._of_residual.value
        of_step = self._of_step.value
        self._forward.assemble_at(state, residual)
        step_cotangent = -trajectory.lengths[step] * of_state
        step_cotangent[dofs] = 0.0
        memory.load(step_cotangent, of_step)
        operators = self._iterations.operators
        self._iterations.pull(
            Iterate(residual, None, iterations),
            of_step,
            b_cotangent=of_residual,
            of_operators=operators,
        )
        # Derivatives of -F, weighted by minus the cotangent of F.
        multiplier = -memory.unload(of_residual)
        multiplier[dofs] = 0.0
        multipliers = linearisation.multipliers.value[1]
        multipliers.fill(multiplier)
        by_forms.at(point, state, multiplier)
        for index, gradient in gradients.items():
            part = np.empty((1, gradient.size))
            self._inputs.gradient(index, multipliers, part)
            gradient += part[0]
        total = by_forms.by_solution()
        by_mesh = wanted.by_mesh
        for mesh in wanted.meshes:
            part = by_forms.by_mesh(mesh)
            if mesh in by_mesh:
                by_mesh[mesh] += part  # in place: the sum of two Cofunctions is a form
            else:
                by_mesh[mesh] = part
        self._iterations.add_by_operators(operators, {**gradients, SOLUTION: total}, by_mesh)
        return total

    # Forward

    def tangent(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        record: Trajectory,
        direction: Direction,
        out: np.ndarray,
    ) -> None:
        """Write that of the last state in a direction; see :meth:`SolutionMap.solve_tangent`."""
        linearisation, dofs = self._linearisation, self._linearisation.forms.boundary_dofs
        with self._tangent_work:
            self._forward.write(point)
            out[:] = 0.0 if direction.guess is None or self._only_last else direction.guess
            linearisation.forms.put_boundary(out, direction.boundary)
            residual, of_step = self._residual.value, self._of_step.value
            for step in self._differentiated(record):
                state = record.fields[step]
                self._forward.assemble_at(state, residual)
                # With the tangent of the state for that of the boundary values, which is minus the
                # tangent of F.
                b = self._inputs.in_direction(point, state, replace(direction, boundary=out.copy()))
                b.scale(-1.0)
                self._iterations.push(
                    Iterate(residual, None, record.iterations[step]),
                    of_step,
                    direction,
                    b_tangent=b,
                    solution=out,
                )
                update = self._place.memory.unload(of_step)
                update[dofs] = 0.0
                out -= record.lengths[step] * update
            linearisation.statistics.tangent_solves += 1

    def second_adjoint(self, *_) -> None:
        """There is none."""
        raise NotImplementedError(NO_SECOND)


def _check_steps(solver) -> None:
    """Refuse nonlinear methods whose steps are not unrolled."""
    snes = solver.snes
    if not snes_facts(snes.getType()).steps_along_solution:
        known = ", ".join(types_with(SNES_TYPES, "steps_along_solution"))
        raise ValueError(
            f"snes_type {snes.getType()} has no unrolled derivative: use one of "
            f"{known}, or implicit differentiation"
        )
    for option in _LAGS:
        if str(solver.parameters.get(option, 1)) != "1":
            raise ValueError(
                f"{option} makes steps with the Jacobian of another state, which is "
                "not unrolled: leave it away"
            )
    if snes.hasNPC():
        raise ValueError(
            "a nonlinear preconditioner (npc_snes_type) is no part of what is "
            "unrolled: leave it away, or use implicit differentiation"
        )
    if not applies_boundary_first(solver):
        raise ValueError(
            "unrolled differentiation needs guesses with the boundary values: leave "
            "pre_apply_bcs=False away"
        )
