"""A nonlinear variational problem as a function of its inputs.

A solve is PETSc's SNES on Firedrake's residual and Jacobian, from a guess. Its derivative is that of a solution of F(u) = 0, at
the state that the solve has reached, by the exact derivative of F, whatever Jacobian the steps were made with.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.assembly.right_hand_side import CofunctionTerm
from prdp_fem.krylov.ksp import renew_preconditioner, set_up
from prdp_fem.krylov.nested import has_memory_inside
from prdp_fem.krylov.snes import Newton
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.firedrake_internals import Callbacks, SolverContext, applies_boundary_first, assemble_operators, operators
from prdp_fem.problem.forms import NonlinearForms
from prdp_fem.problem.inputs import set_local_values
from prdp_fem.problem.point import Point
from prdp_fem.refinement.settings import Setting, newton_steps
from prdp_fem.solution.system import System

__all__ = ["NonlinearSystem"]


class NonlinearSystem(System):
    """The solve of a nonlinear problem, and its derivatives, as functions of the inputs.

    Parameters
    ----------
    forms : NonlinearForms
    solver : firedrake.NonlinearVariationalSolver
        Made for ``forms.problem``: its SNES and options are used.
    make_linear_solver : callable
        Makes a linear solver of the same options for a problem.
    ksp_prefix : str or None
        Options prefix of the KSP that settings are put on; None for the only iterative one.
    memory : Memory
        Where linear systems are solved; residual and Jacobian are assembled on the host.
    """

    def __init__(self, forms: NonlinearForms, solver, make_linear_solver: Callable, ksp_prefix: str | None, memory: Memory):
        terms = {forms.inputs.index(entry): CofunctionTerm(weight, forms) for entry, weight in forms.cofunctions.items()}
        self._solver = solver
        self._solver_context = SolverContext(solver)
        self._applies_boundary_first = applies_boundary_first(solver)
        self.newton = Newton(solver.snes, forms.solution.name(), ksp_prefix)
        self._factorisation, self._null_spaces = self.newton.factorisation, self.newton.null_spaces
        # The residual is assembled from all inputs, Cofunctions too.
        super().__init__(forms, make_linear_solver(forms.linearised_problem()), make_linear_solver, terms, ksp_prefix, memory,
                         assembles_terms=True)
        self._no_boundary = np.zeros(self.size)

    def move_to(self, memory: Memory) -> None:
        with self._solver_context():
            self.newton.reset()
        super().move_to(memory)

    def _ksps(self) -> list[PETSc.KSP]:
        return [*super()._ksps(), self.newton.snes.getKSP()]

    def _place_in(self, memory: Memory) -> None:
        super()._place_in(memory)
        self._work = memory.vector(self._zero)
        self._callbacks = Callbacks(self._solver, memory)
        self._was_set_up = False

    @property
    def _solvers(self) -> list:
        return [*super()._solvers, self._solver]

    def check_setting(self, setting: Setting) -> None:
        snes = self.newton.snes
        # Newton steps alone leave the linear solves to their options.
        if newton_steps(setting) is None or setting.max_it is not None:
            if not self.newton.solves_linear_systems:
                raise ValueError(f"snes_type {snes.getType()} has no linear solves to refine: use newtonls, or a NewtonLadder")
            if snes.getUseEW():
                raise ValueError("snes_ksp_ew chooses the tolerances of linear solves, and so does the refinement: leave one of them away")
            super().check_setting(setting)
            refined = self.newton.refined
            refined.find_without_setup()
            if not (refined.is_found or self._may_end_the_process):
                self._find_inside(refined, self._solver_context, self._set_newton_up_at_present)

    def _set_newton_up_at_present(self) -> None:
        self._write_inputs(Point(self.values()))
        self._set_newton_up()

    def _forget_steps(self, setting: Setting | None) -> None:
        """Have the preconditioner of the steps remember nothing of earlier solves; inside its context."""
        refined = self.newton.refined
        is_wanted = setting is not None and setting.max_it is not None and not refined.is_found
        ksp = self.newton.snes.getKSP()
        if self._was_set_up and has_memory_inside(ksp):
            renew_preconditioner(ksp)
            self._was_set_up = False
        if not self._was_set_up and (refined.is_nested or is_wanted):
            # The KSP that settings are put on is another one now, or there for the first time.
            self._set_newton_up()
            refined.set_up()
        self._was_set_up = True

    def _set_newton_up(self) -> None:
        """Set the KSP of the steps up where the state is, so that what is inside its preconditioner is there; inside its context."""
        self._was_set_up = True
        self._callbacks.attach()
        assemble_operators(self._solver, self.memory.to_host(self._work))
        set_up(self.newton.snes.getKSP(), *self.memory.operators(*operators(self._solver)), self.forms.solution.name())

    def _solve(self, point: Point, setting: Setting | None, solutions: np.ndarray,
               varying: Mapping[int, np.ndarray]) -> list:
        dofs, work, statistics, records = self.forms.boundary_dofs, self._work, self.statistics, []
        with self._work_on("forward", self._solver_context):
            for row, solution in enumerate(solutions):
                at = point.at(varying, row)
                self._write_inputs(at)
                solution[:] = 0.0 if at.guess is None else at.guess
                # Objectives, coarse levels and residuals that delay the boundary values take them from the problem's conditions.
                boundary = self._no_boundary if at.boundary is None else at.boundary
                set_local_values(self.forms.boundary, boundary)
                if self._applies_boundary_first:
                    solution[dofs] = boundary[dofs]
                self.memory.load(solution, work)
                if self.newton.remembers:
                    self.newton.reset()
                self._callbacks.attach()
                self._forget_steps(setting)
                steps, iterations = self.newton.solve(work, setting)
                solution[:] = self.memory.unload(work)
                records.append(self._record())
                statistics.solves += 1
                statistics.newton_steps += steps
                statistics.forward_iterations += iterations
        return records

    def _system_at(self, point: Point, solution: np.ndarray) -> tuple[PETSc.Vec, PETSc.Vec]:
        # J w = b with b = J w - F(u), whose residual is the one of the state.
        boundary = self._no_boundary if point.boundary is None else point.boundary
        set_local_values(self.forms.boundary, boundary)
        w, b, work = self._states(1), self._cotangents(1), self._work
        w.fill_inside(solution, self._boundary_entries)
        self.memory.load(solution, work)
        with self._solver_context():
            self._callbacks.attach()
            self.newton.snes.computeFunction(work, self._multipliers(1).vectors[0])
        self._krylov.ksp.getOperators()[0].mult(w.vectors[0], b.vectors[0])
        b.vectors[0].axpy(-1.0, self._multipliers(1).vectors[0])
        return b.vectors[0], w.vectors[0]

    def _record(self):
        """What is kept of the last solve for its derivatives."""
