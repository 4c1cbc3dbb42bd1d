"""A nonlinear variational problem whose solves are differentiated as the Newton steps, and their iterations, that they are.

A step u ← u - λ y has y the K-th iterate for J(u) y = F(u) from zero. Its cotangent gives those of J and F, which are differentiated by
the state and by what they depend on; so on to the step before it. The step lengths λ of a line search count as constant.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from firedrake.logging import warning
from firedrake.petsc import PETSc

from prdp_fem.assembly.operator_derivative import SOLUTION
from prdp_fem.krylov.petsc_types import SNES_TYPES, snes_facts, types_with
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.firedrake_internals import applies_boundary_first
from prdp_fem.problem.forms import NonlinearForms
from prdp_fem.problem.inputs import set_local_values
from prdp_fem.problem.point import Direction, Point
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.differentiation import Unrolled
from prdp_fem.solution.nonlinear import NonlinearSystem
from prdp_fem.solution.unrolled_system import UnrolledSystem

__all__ = ["UnrolledNonlinearSystem"]

# Options that have a step made with another Jacobian or preconditioner than those at its state.
_LAGS = ("snes_lag_jacobian", "snes_lag_preconditioner")


@dataclass
class Trajectory:
    """The steps of a solve.

    Attributes
    ----------
    states : list of numpy.ndarray
        Before each step, rank-local.
    iterations : list of int
        Of the linear solve of each step.
    lengths : list of float
        λ of each step.
    """

    states: list[np.ndarray] = field(default_factory=list)
    iterations: list[int] = field(default_factory=list)
    lengths: list[float] = field(default_factory=list)


class UnrolledNonlinearSystem(UnrolledSystem, NonlinearSystem):
    """The solve of a nonlinear problem, and the exact derivatives of its steps, as functions of the inputs.

    Parameters
    ----------
    forms, solver, make_linear_solver, ksp_prefix, memory
        As in :class:`NonlinearSystem`.
    differentiation : Unrolled

    Raises
    ------
    ValueError
        For a linear or nonlinear method that cannot be unrolled.
    """

    def __init__(self, forms: NonlinearForms, solver, make_linear_solver: Callable, ksp_prefix: str | None, memory: Memory, *,
                 differentiation: Unrolled):
        snes = solver.snes
        if not snes_facts(snes.getType()).steps_along_solution:
            known = ", ".join(types_with(SNES_TYPES, "steps_along_solution"))
            raise ValueError(f"snes_type {snes.getType()} has no unrolled derivative: use one of "
                             f"{known}, or implicit differentiation")
        for option in _LAGS:
            if str(solver.parameters.get(option, 1)) != "1":
                raise ValueError(f"{option} makes steps with the Jacobian of another state, which is not unrolled: leave it away")
        if snes.hasNPC():
            raise ValueError("a nonlinear preconditioner (npc_snes_type) is no part of what is unrolled: leave it away, or use implicit "
                             "differentiation")
        if not applies_boundary_first(solver):
            raise ValueError("unrolled differentiation needs guesses with the boundary values: leave pre_apply_bcs=False away")
        self._unroll(forms, solver, differentiation)
        super().__init__(forms, solver, make_linear_solver, ksp_prefix, memory)
        self._only_last = differentiation.steps == "last"
        self.depends_on_guess = not self._only_last
        self._trajectory: Trajectory | None = None
        self._has_warned_of_lengths = snes.getLineSearch().getType() == "basic"
        snes.setMonitor(self._note)

    def _place_in(self, memory: Memory) -> None:
        super()._place_in(memory)
        self._unrolled.forget_operators()
        self._residual, self._of_residual, self._step, self._of_step = (memory.vector(self._zero) for _ in range(4))

    def check_setting(self, setting: Setting) -> None:
        super().check_setting(setting)
        self._check_refined(self.newton.refined)

    def _note(self, snes: PETSc.SNES, step: int, norm: float) -> None:
        """Keep what the derivatives of a step ask for."""
        state = snes.getSolution()
        if step == 0:
            self._trajectory = Trajectory([self.memory.unload(state)])
            return
        trajectory, update = self._trajectory, snes.getSolutionUpdate()
        self.memory.load(trajectory.states[-1], self._step)
        self._step.axpy(-1.0, state)
        squared = update.dot(update)
        length = self._step.dot(update)/squared if squared > 0 else 1.0
        if abs(length - 1) > 1e-8 and not self._has_warned_of_lengths:
            self._has_warned_of_lengths = True
            if snes.comm.rank == 0:
                warning(f"a line search has made a step of length {length:g}, which counts as constant where Newton steps are unrolled: "
                        "their derivative is exact with snes_linesearch_type basic, and wherever full steps are made")
        trajectory.lengths.append(length)
        trajectory.iterations.append(self._unrolled.completed_iterations())
        trajectory.states.append(self.memory.unload(state))

    def _record(self) -> Trajectory:
        trajectory, self._trajectory = self._trajectory, None
        if trajectory is None or len(trajectory.iterations) != self.newton.snes.getIterationNumber():
            raise RuntimeError("the Newton steps of a solve were not seen by the monitor that unrolled differentiation has on its SNES: "
                               "has monitorCancel() been called?")
        if not trajectory.iterations:
            self._warn_of_no_iterations()
        else:
            self._check_method(self.newton.refined, lambda: False)
        return trajectory

    keeps_fields = True

    @staticmethod
    def fields_of(record: Trajectory) -> list[np.ndarray]:
        """The states of a trajectory."""
        return record.states

    @staticmethod
    def with_fields(record: Trajectory, fields: list[np.ndarray]) -> Trajectory:
        """A trajectory with other states, or none."""
        return replace(record, states=fields)

    def _unrolled_steps(self, trajectory: Trajectory) -> range:
        """The steps that are differentiated; none where none was made."""
        steps = range(len(trajectory.iterations))
        return steps[-1:] if self._only_last else steps

    def _at_step(self, state: np.ndarray) -> None:
        """Assemble residual and Jacobian at a state; inside the solver's context, and where inputs have been written."""
        self.memory.load(state, self._work)
        self._set_newton_up()
        self.newton.snes.computeFunction(self._work, self._residual)

    def _write_all(self, point: Point) -> None:
        self._write_inputs(point)
        set_local_values(self.forms.boundary, self._no_boundary if point.boundary is None else point.boundary)

    def _solve_adjoint(self, point: Point, setting: Setting | None, cotangents: np.ndarray,
                       solutions: np.ndarray | None, records: list,
                       gradients: Mapping[int, np.ndarray], varying: Mapping[int, np.ndarray],
                       boundary: np.ndarray | None, guess: np.ndarray | None,
                       meshes: Iterable) -> dict:
        dofs, by_mesh = self.forms.boundary_dofs, {}
        with self._work_on("adjoint", self._solver_context):
            for row, (cotangent, trajectory) in enumerate(zip(cotangents, records)):
                at = point.at(varying, row)
                self._write_all(at)
                by_mesh = {}
                for gradient in gradients.values():
                    gradient[row] = 0.0
                of_state = cotangent.copy()
                for step in reversed(self._unrolled_steps(trajectory)):
                    of_state += self._pull(at, trajectory, step, of_state, {index: gradient[row] for index, gradient in gradients.items()},
                                           meshes, by_mesh)
                if boundary is not None:
                    boundary[row] = 0.0
                    boundary[row, dofs] = of_state[dofs]
                if guess is not None:
                    guess[row] = of_state
                    guess[row, dofs] = 0.0
                self.statistics.adjoint_solves += 1
        return by_mesh

    def _pull(self, point: Point, trajectory: Trajectory, step: int, of_state: np.ndarray, gradients: Mapping[int, np.ndarray],
              meshes: Iterable, by_mesh: dict) -> np.ndarray:
        """What a step adds to the cotangent of the state before it; to gradients, and those by meshes, it is added."""
        dofs, state, iterations = self.forms.boundary_dofs, trajectory.states[step], trajectory.iterations[step]
        self._at_step(state)
        multipliers = self._multipliers(1)
        step_cotangent = -trajectory.lengths[step]*of_state
        step_cotangent[dofs] = 0.0
        self.memory.load(step_cotangent, self._of_step)
        self._pull_iterations(self._residual, None, iterations, self._of_step, b_cotangent=self._of_residual, of_operators=self._operators)
        # Derivatives of -F, weighted by minus the cotangent of F.
        multiplier = -self.memory.unload(self._of_residual)
        multiplier[dofs] = 0.0
        multipliers.fill(multiplier)
        self._derivatives.at(point, state, multiplier)
        for index, gradient in gradients.items():
            part = np.empty((1, gradient.size))
            self._gradient(index, multipliers, part)
            gradient += part[0]
        total = self._derivatives.by_solution()
        for mesh in meshes:
            part = self._derivatives.by_mesh(mesh)
            if mesh in by_mesh:
                by_mesh[mesh] += part  # in place: the sum of two Cofunctions is a form
            else:
                by_mesh[mesh] = part
        self._add_by_operators(self._operators, {**gradients, SOLUTION: total}, by_mesh)
        return total

    def _solve_tangent(self, point: Point, setting: Setting | None, solution: np.ndarray,
                       record: Trajectory, direction: Direction, out: np.ndarray) -> None:
        dofs = self.forms.boundary_dofs
        with self._work_on("tangent", self._solver_context):
            self._write_all(point)
            out[:] = 0.0 if direction.guess is None or self._only_last else direction.guess
            self._put_boundary(out, direction.boundary)
            for step in self._unrolled_steps(record):
                state = record.states[step]
                self._at_step(state)
                # With the tangent of the state for that of the boundary values, which is minus the tangent of F.
                b = self._right_hand_side_tangent(point, state, replace(direction, boundary=out.copy()))
                b.scale(-1.0)
                self._push_iterations(self._residual, None, record.iterations[step], self._of_step, direction, b_tangent=b, solution=out)
                update = self.memory.unload(self._of_step)
                update[dofs] = 0.0
                out -= record.lengths[step]*update
            self.statistics.tangent_solves += 1
