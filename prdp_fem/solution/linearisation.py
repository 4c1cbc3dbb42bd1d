"""A problem linearised at a point: its operator, and the solvers of linear systems with it.

With g the boundary values, continued by zero, a solution is u = g + w, where w is zero at boundary
dofs; rows and columns of all operators there are those of the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from prdp_fem.assembly.copies import Copies
from prdp_fem.freshness import MEMORY, MESH, STATE, UNSEEN, USERS_CODE, Kept
from prdp_fem.krylov.constants import ConstantsCheck
from prdp_fem.krylov.entries import require_finite_entries
from prdp_fem.krylov.ksp import RefinedKSP, abandon_preconditioner, reset, set_up
from prdp_fem.krylov.nested import has_failed_inside
from prdp_fem.krylov.snes import Newton
from prdp_fem.krylov.transposes import Krylov
from prdp_fem.memory.place import Place
from prdp_fem.problem.components import components_of
from prdp_fem.problem.context import condenses_locally
from prdp_fem.problem.firedrake_internals import SolverContext, assemble_operators, operators
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import local_values, set_local_values, vector_like
from prdp_fem.problem.lending import Lending
from prdp_fem.problem.point import Point
from prdp_fem.ranks.flags import on_any_rank
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.work import Work

__all__ = ["Linearisation"]


class Linearisation:
    """The operator of a problem at a point, and what solves with it and with its transpose.

    Parameters
    ----------
    forms : Forms
    solver : firedrake.NonlinearVariationalSolver
        Of the problem linearised at a state: its KSP, options, nullspaces and operators are used.
    make_adjoint_solver : callable
        Makes such a solver, of the same options, for the adjoint of a problem.
    ksp_prefix : str or None
        Options prefix of the KSP that settings are put on; None for the only iterative one.
    place : Place
        Where solves are made.
    unassembled : Set of int
        Inputs that are read by no form that is assembled at a point.
    newton : Newton or None
        Another KSP of the same problem, whose solves and null spaces are looked at together with
        these.

    Attributes
    ----------
    forms, solver, place
        As given.
    name : str
        Of what is solved for.
    comm : mpi4py.MPI.Comm
        The ranks that share the mesh.
    layout : PETSc.Vec
        A vector of zeros with the layout of the solution.
    size : int
        Rank-local number of dofs of the solution.
    largest_size : int
        That of the rank which has most.
    statistics : Statistics
    copies : Copies
    still : Set of int or None
        The inputs that may differ from row to row of a batch while operator and forms stay as they
        are; None for an operator that depends on the solution, which is another one in each row.
    krylov : Krylov
    constants : ConstantsCheck
        What looks at operators that are solved with by iterations.
    lending : Lending
    states, cotangents, multipliers : Kept of Batches
        States or tangents, right-hand sides of adjoint and tangent solves, and what these give.
    boundary_entries : Kept
        Those of vectors at boundary dofs.
    """

    def __init__(
        self,
        forms: Forms,
        solver,
        make_adjoint_solver: Callable,
        ksp_prefix: str | None,
        place: Place,
        unassembled: Set[int] = frozenset(),
        newton: Newton | None = None,
    ):
        self.forms = forms
        self.solver = solver
        self.place = place
        self.name, self.statistics = forms.solution.name(), place.statistics
        self.comm = forms.solution.function_space().mesh().comm
        self.layout, self.size = vector_like(forms.solution), local_values(forms.solution).size
        self.largest_size = self.comm.allreduce(self.size, MPI.MAX)
        self._make_adjoint_solver = make_adjoint_solver
        self.copies = Copies(forms, place.clock, unassembled)
        self.still = unassembled if self.copies.state is None else None
        self.lending = Lending(forms)
        # Firedrake's solvers, and what resets their KSPs, in which everything is of one memory.
        self._solvers: list = []
        self._resets: list[Callable[[], None]] = []
        self._solvers_are_reset = place.kept(self._reset_solvers)
        self._solvers_are_reset.put(None)
        ksp = solver.snes.getKSP()
        ksp.setOperators(*operators(solver))
        self._context = SolverContext(solver)
        self._needs_context = True
        self._around = place.kept(self._find_around)
        self.look_after(solver, self._reset)
        in_operator = [index for index, entry in enumerate(forms.inputs) if entry.in_operator]
        of_operator = [*in_operator, MESH, STATE, USERS_CODE, UNSEEN, MEMORY]
        self.krylov = Krylov(
            ksp, self._transposed_ksp, self.name, ksp_prefix, place.clock, of_operator, newton
        )
        self.constants = ConstantsCheck(self.name, components_of(forms.solution))
        self.krylov.look_before = self.constants.look
        self._krylov_at_point = Kept(self._set_up_operator, place.clock, of_operator)
        self._adjoint_ksp = Kept(self._set_up_adjoint, place.clock, of_operator)
        self.states, self.cotangents = place.batches(self.layout), place.batches(self.layout)
        self.multipliers = place.batches(self.layout)
        self.boundary_entries = place.entries(self.layout, forms.boundary_dofs)

    # Solvers

    def look_after(self, solver, reset: Callable[[], None]) -> None:
        """Have a solver of Firedrake's made anew where it is left half-way, or in another memory.

        Parameters
        ----------
        solver : firedrake.NonlinearVariationalSolver
        reset : callable
            Has its KSP set up anew at the next use.
        """
        self._solvers.append(solver)
        self._resets.append(reset)
        self.lending.to(solver)

    def _reset_solvers(self) -> None:
        for reset_one in self._resets:
            reset_one()

    def _reset(self) -> None:
        with self._context():
            reset(self.solver.snes.getKSP())
        self._needs_context = True

    def spoil(self, error: BaseException) -> None:
        """Have all that an error may have left half-way made anew, as a new solver has it."""
        self.place.clock.changed(MEMORY)
        if isinstance(error, PETSc.Error):
            for solver in self._solvers:
                abandon_preconditioner(solver.snes.getKSP())

    @cached_property
    def _adjoint_solver(self):
        """Firedrake's solver of the adjoint problem, for what cannot be transposed."""
        return self._make_adjoint_solver(self.forms.adjoint_problem(), is_adjoint=True)

    @cached_property
    def _adjoint_context(self) -> SolverContext:
        self.look_after(self._adjoint_solver, self._reset_adjoint)
        return SolverContext(self._adjoint_solver)

    def _reset_adjoint(self) -> None:
        with self._adjoint_context():
            reset(self._adjoint_solver.snes.getKSP())

    @contextmanager
    def _transposed_ksp(self) -> Iterator[PETSc.KSP]:
        with self._adjoint_context():
            yield self._adjoint_ksp.value

    # Being at a point

    def at(self, point: Point, solution: np.ndarray | None = None) -> Krylov:
        """What solves with the operator at a point and, where it depends on that, at a solution."""
        self.copies.write(point, solution)
        if self.lending.serves:
            self.place.clock.changed(USERS_CODE)
        return self._krylov_at_point.value

    def _set_up_operator(self) -> Krylov:
        if self.copies.state is not None:
            set_local_values(self.forms.solution, self.copies.state)
        with nullcontext() if self._needs_context else self._context():
            self._set_up(self.solver)
        self._needs_context = self._context.is_needed
        self._around.drop()
        self.krylov.look_at_operator()
        self.statistics.assemblies += 1
        return self.krylov

    def _set_up_adjoint(self) -> PETSc.KSP:
        self._set_up(self._adjoint_solver)
        return self._adjoint_solver.snes.getKSP()

    def _set_up(self, solver) -> None:
        """Assemble the operators of a linear solver, and set its KSP up; inside its context."""
        # Eisenstat's and Walker's hooks on the KSP would choose tolerances by the norms of a Newton
        # iteration that there is not.
        solver.snes.setUseEW(False)
        if self.copies.state is None:
            # Preconditioners find it as the state of the Newton step that a linear solve is to
            # Firedrake.
            self.forms.solution.dat.zero()
        # The state that operators depend on is in the forms' own Function: the solver's may be any.
        assemble_operators(solver, self.layout)
        require_finite_entries(self.name, *operators(solver))
        set_up(solver.snes.getKSP(), *self.place.memory.operators(*operators(solver)), self.name)

    # What is done inside

    def work(self, kind: str, context: SolverContext | None = None) -> Work:
        """A context manager of solves of a kind, to be entered for each of them.

        Parameters
        ----------
        kind : str
            ``"forward"``, ``"adjoint"`` or ``"tangent"``.
        context : SolverContext or None
            That of another solver than the linear one.
        """
        around = self._around
        if context is not None:
            around = self.place.kept(lambda: self._inside(context))
        return Work(kind, self.name, self.statistics, self.spoil, around)

    def _find_around(self) -> Callable[[], AbstractContextManager] | None:
        self._solvers_are_reset.ensure()  # after which the context is needed
        # Preconditioners may ask for forms and options at their first use, inside KSPSolve.
        return self._inside(self._context if self._needs_context else None)

    def _inside(self, context: SolverContext | None) -> Callable[[], AbstractContextManager] | None:
        self._solvers_are_reset.ensure()
        return partial(self.lending.inside, context) if self.lending.lends else context

    def check_setting(self, setting: Setting) -> None:
        """Find the KSP that settings are put on; inside a preconditioner, it may have to be set up.

        Raises
        ------
        ValueError
            Where there is none, or more than one and none was named.
        """
        if setting.max_it is not None:
            self.find_refined(self.krylov.refined, self._context, self._set_up_at)

    @cached_property
    def _may_end_the_process(self) -> bool:
        """Whether to set the KSP up is no mere try: then the first solve finds what is inside."""
        return condenses_locally(self.solver.parameters)

    def _set_up_at(self, point: Point) -> None:
        self.at(point, local_values(self.forms.solution))

    def find_refined(
        self, refined: RefinedKSP, context: SolverContext, set_up_at: Callable[[Point], None]
    ) -> None:
        """Find the KSP that settings are put on.

        Where that takes a KSP that is set up, it is at the user's present values. These may be none
        to solve with, and others come later: then the first solve finds it.
        """
        refined.find_without_setup()
        if refined.is_found or self._may_end_the_process:
            return
        self._solvers_are_reset.ensure()
        present = Point([entry.present_values() for entry in self.forms.inputs])
        with stop_annotating(), self.lending.inside(context):
            try:
                set_up_at(present)
            except ConvergenceError:
                self.place.clock.changed(MEMORY)
                return
            if on_any_rank(self.comm, has_failed_inside(refined.ksp)):
                self.place.clock.changed(MEMORY)
            refined.find()
