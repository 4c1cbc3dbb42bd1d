"""A nonlinear variational problem as a function of its inputs.

A solve is PETSc's SNES on Firedrake's residual and Jacobian, from a guess. Its derivative is that of a solution of F(u) = 0, at
the state that the solve has reached, by the exact derivative of F, whatever Jacobian the steps were made with.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from prdp_fem.firedrake_internals import SolverContext, applies_boundary_first, attach_callbacks
from prdp_fem.forms import NonlinearForms
from prdp_fem.inputs import set_local_values, vector_like
from prdp_fem.ladders import NewtonSteps, Setting
from prdp_fem.newton import Newton
from prdp_fem.point import Point
from prdp_fem.right_hand_side import CofunctionTerm
from prdp_fem.system import PRECONDITIONERS_WITH_MEMORY, System

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
    """

    def __init__(self, forms: NonlinearForms, solver, make_linear_solver: Callable, ksp_prefix: str | None = None):
        terms = {forms.inputs.index(entry): CofunctionTerm(weight, forms.boundary_dofs) for entry, weight in forms.cofunctions.items()}
        super().__init__(forms, make_linear_solver(forms.linearised_problem()), make_linear_solver, terms, ksp_prefix)
        # The residual is assembled from all of them, Cofunctions too.
        self._assembled_inputs = list(enumerate(forms.inputs))
        self._solver = solver
        self._solver_context = SolverContext(solver)
        self._applies_boundary_first = applies_boundary_first(solver)
        self.newton = Newton(solver.snes, forms.solution.name(), ksp_prefix)
        self._work = vector_like(forms.solution)
        self._no_boundary = np.zeros(self.size)

    def check_setting(self, setting: Setting) -> None:
        snes = self.newton.snes
        if not isinstance(setting, NewtonSteps) or setting.linear is not None:
            if not self.newton.solves_linear_systems:
                raise ValueError(f"snes_type {snes.getType()} has no linear solves to refine: use newtonls, or a NewtonLadder")
            if snes.getUseEW():
                raise ValueError("snes_ksp_ew chooses the tolerances of linear solves, and so does the refinement: leave one of them away")
            super().check_setting(setting)

    def solve(self, point: Point, setting: Setting | None, solutions: np.ndarray, varying: Mapping[int, np.ndarray] | None = None) -> None:
        varying = {} if varying is None else varying
        dofs, work, statistics = self.forms.boundary_dofs, self._work, self.statistics
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
                work.setArray(solution)
                attach_callbacks(self._solver)
                pc = self.newton.snes.getKSP().getPC()
                if pc.getType() in PRECONDITIONERS_WITH_MEMORY:
                    pc.reset()
                steps, iterations = self.newton.solve(work, setting)
                solution[:] = work.array_r
                statistics.solves += 1
                statistics.newton_steps += steps
                statistics.forward_iterations += iterations
