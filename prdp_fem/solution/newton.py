"""A nonlinear variational problem solved at a point, or at a batch of them.

A solve is PETSc's SNES on Firedrake's residual and Jacobian, from a guess.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.krylov.entries import require_finite_entries
from prdp_fem.krylov.ksp import renew_preconditioner, set_up
from prdp_fem.krylov.nested import has_memory_inside
from prdp_fem.krylov.snes import Newton
from prdp_fem.problem.firedrake_internals import (
    Callbacks,
    SolverContext,
    applies_boundary_first,
    assemble_operators,
    operators,
)
from prdp_fem.problem.inputs import set_local_values
from prdp_fem.problem.point import Point
from prdp_fem.refinement.settings import Setting
from prdp_fem.solution.linearisation import Linearisation
from prdp_fem.solution.work import Work

__all__ = ["NewtonSolve"]


class NewtonSolve:
    """The solve of a nonlinear problem.

    Parameters
    ----------
    linearisation : Linearisation
        Whose place it is made in; its operator is that of derivatives, whatever Jacobian the steps
        are made with.
    terms : Mapping of int to CofunctionTerm
        The inputs that enter the residual by a matrix.
    solver : firedrake.NonlinearVariationalSolver
        Made for ``forms.problem``: its SNES and options are used.
    newton : Newton
        Its SNES.

    Attributes
    ----------
    linearisation, terms, solver, newton
        As given.
    state : Kept
        The vector that the SNES works on.
    """

    takes_device_rows = False

    def __init__(self, linearisation: Linearisation, terms: Mapping, solver, newton: Newton):
        self.linearisation, self.terms = linearisation, terms
        self.solver, self.newton = solver, newton
        self._context = SolverContext(solver)
        self._work = self.work("forward")
        self._applies_boundary_first = applies_boundary_first(solver)
        self._no_boundary = np.zeros(linearisation.size)
        place = linearisation.place
        self.state = place.vector(linearisation.layout)
        self._made_callbacks: Callbacks | None = None
        self._was_set_up = False
        linearisation.look_after(solver, self._reset)

    @property
    def refined(self):
        """The KSP of the steps that settings are put on."""
        return self.newton.refined

    def _reset(self) -> None:
        with self._context():
            self.newton.reset()
        if self._made_callbacks is not None:
            self._made_callbacks.renew()
        self._was_set_up = False

    def _callbacks(self) -> Callbacks:
        """What the SNES calls, in the memory of the moment.

        The same after an error, which may have left solvers inside that know these.
        """
        memory = self.linearisation.place.memory
        if self._made_callbacks is None or self._made_callbacks.memory is not memory:
            self._made_callbacks = Callbacks(self.solver, memory)
        return self._made_callbacks

    def check_setting(self, setting: Setting) -> None:
        """Raise a ValueError where a setting cannot be put on the SNES, or on a KSP."""
        snes = self.newton.snes
        # Newton steps alone leave the linear solves to their options.
        if setting.max_it is None:
            return
        if not self.newton.solves_linear_systems:
            raise ValueError(
                f"snes_type {snes.getType()} has no linear solves to refine: use "
                "newtonls, or a NewtonLadder"
            )
        if snes.getUseEW():
            raise ValueError(
                "snes_ksp_ew chooses the tolerances of linear solves, and so does the "
                "refinement: leave one of them away"
            )
        self.linearisation.check_setting(setting)
        self.linearisation.find_refined(self.refined, self._context, self._set_up_at)

    def _set_up_at(self, point: Point) -> None:
        self.linearisation.copies.write(point)
        self._set_up()

    def work(self, kind: str) -> Work:
        """See :meth:`Linearisation.work`; what is inside may use the SNES."""
        return self.linearisation.work(kind, self._context)

    def write(self, point: Point) -> np.ndarray:
        """Have a point where the SNES finds it, and return its boundary values."""
        self.linearisation.copies.write(point)
        boundary = self._no_boundary if point.boundary is None else point.boundary
        # Objectives, coarse levels and residuals that delay the boundary values take them from the
        # problem's conditions.
        set_local_values(self.linearisation.forms.boundary, boundary)
        return boundary

    def assemble_at(self, state: np.ndarray, residual: PETSc.Vec) -> None:
        """Set the KSP of the steps up at a state, and write the residual there; inside the work."""
        self.linearisation.place.memory.load(state, self.state.value)
        self._set_up()
        self.newton.snes.computeFunction(self.state.value, residual)

    def _set_up(self) -> None:
        """Set the KSP of the steps up where the state is, with all inside it."""
        self._was_set_up = True
        self._callbacks().attach()
        memory = self.linearisation.place.memory
        assemble_operators(self.solver, memory.to_host(self.state.value))
        require_finite_entries(self.linearisation.name, *operators(self.solver))
        set_up(
            self.newton.snes.getKSP(),
            *memory.operators(*operators(self.solver)),
            self.linearisation.name,
        )

    def _forget_steps(self, setting: Setting | None) -> None:
        """Have the preconditioner of the steps forget earlier solves; inside its context."""
        refined, ksp = self.refined, self.newton.snes.getKSP()
        is_wanted = setting is not None and setting.max_it is not None and not refined.is_found
        if self._was_set_up and has_memory_inside(ksp):
            renew_preconditioner(ksp)
            self._was_set_up = False
        if not self._was_set_up and (refined.is_nested or is_wanted):
            # The KSP that settings are put on is another one now, or there for the first time.
            self._set_up()
            refined.set_up()
        self._was_set_up = True

    def solve(
        self,
        point: Point,
        setting: Setting | None,
        solutions: np.ndarray,
        varying: Mapping[int, np.ndarray],
        record: Callable | None,
    ) -> list:
        """Solve for rows, see :meth:`LinearSolve.solve`."""
        statistics, records = self.linearisation.statistics, []
        with self._work:
            for row, solution in enumerate(solutions):
                steps, iterations = self._solve_one(point.at(varying, row), setting, solution)
                records.append(None if record is None else record())
                statistics.solves += 1
                statistics.newton_steps += steps
                statistics.forward_iterations += iterations
        return records

    def _solve_one(
        self, point: Point, setting: Setting | None, solution: np.ndarray
    ) -> tuple[int, int]:
        memory, work = self.linearisation.place.memory, self.state.value
        dofs = self.linearisation.forms.boundary_dofs
        boundary = self.write(point)
        solution[:] = 0.0 if point.guess is None else point.guess
        if self._applies_boundary_first:
            solution[dofs] = boundary[dofs]
        memory.load(solution, work)
        if self.newton.remembers:
            self.newton.reset()
        self._callbacks().attach()
        self._forget_steps(setting)
        spent = self.newton.solve(work, setting)
        steps, _ = spent
        if steps and self.newton.solves_linear_systems:
            self.linearisation.constants.look(self.newton.snes.getKSP())
        solution[:] = memory.unload(work)
        return spent

    def system_at(self, point: Point, solution: np.ndarray) -> tuple[PETSc.Vec, PETSc.Vec]:
        """b and w, whose residual b - A w is that of a solution, where the operator is."""
        # J w = b with b = J w - F(u), whose residual is the one of the state.
        linearisation, state = self.linearisation, self.state.value
        boundary = self._no_boundary if point.boundary is None else point.boundary
        set_local_values(linearisation.forms.boundary, boundary)
        w, b = linearisation.states.value[1], linearisation.cotangents.value[1].vectors[0]
        residual = linearisation.multipliers.value[1].vectors[0]
        w.fill_inside(solution, linearisation.boundary_entries.value)
        linearisation.place.memory.load(solution, state)
        with self._context():
            self._callbacks().attach()
            self.newton.snes.computeFunction(state, residual)
        linearisation.krylov.ksp.getOperators()[0].mult(w.vectors[0], b)
        b.axpy(-1.0, residual)
        return b, w.vectors[0]
