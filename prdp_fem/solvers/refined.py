"""What the linear and the nonlinear solver have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import firedrake
from firedrake import NonlinearVariationalProblem
from firedrake.petsc import PETSc
from pyadjoint import get_working_tape
from pyadjoint.tape import annotate_tape, stop_annotating

from prdp_fem.citation import cite
from prdp_fem.krylov.factorisation import detect_null_pivots
from prdp_fem.krylov.ksp import lift_bounds
from prdp_fem.memory.devices import Device
from prdp_fem.memory.memory import memory_of
from prdp_fem.memory.place import Place
from prdp_fem.problem.context import coefficients_in, over_copies, users_code, users_context
from prdp_fem.problem.firedrake_internals import (
    Predecessor,
    assemble_directly,
)
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import local_values, put_back, set_local_values, vector_like
from prdp_fem.problem.point import Point
from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.threads import by_one_thread
from prdp_fem.refinement.ladders import Setting, checked_setting
from prdp_fem.refinement.rules import Refinement
from prdp_fem.solution.differentiation import Implicit, Unrolled, differentiation_of
from prdp_fem.solution.solver_arguments import (
    check_bases,
    check_solver_arguments,
    refinement_in_words,
)
from prdp_fem.solvers.arguments import (
    check_problem,
    checked_options,
    others_in_words,
    refuse_callbacks,
)
from prdp_fem.solvers.device_choice import find_device_for
from prdp_fem.solvers.kinds import Kind
from prdp_fem.solvers.linear_solvers import LinearSolvers
from prdp_fem.solvers.takeover import refuse_to_solve_as_before, take_over
from prdp_fem.statistics import Statistics
from prdp_fem.tape import SolveBlock
from prdp_fem.taped_objects import TapedMeshes

__all__ = ["RefinedSolver"]

if TYPE_CHECKING:
    # The one that stands behind it among the bases of each solver.
    from firedrake import NonlinearVariationalSolver as _Firedrakes
else:
    _Firedrakes = object


class RefinedSolver(_Firedrakes):
    """A solver of Firedrake's whose KSP follows a refinement; in front of that among its bases.

    ``arguments`` is what it was made with, for others of the same problem.
    """

    _kind: Kind
    # What a solver has been before it came under control, while it is initialised again.
    _predecessor: Predecessor | None = None
    # What Firedrake's own solve looks for first, and nobody else does.
    _problem = property(refuse_to_solve_as_before)

    def __init__(
        self,
        problem: NonlinearVariationalProblem,
        *,
        refinement: Refinement | None = None,
        differentiation: str | Implicit | Unrolled = "implicit",
        warm_start: bool = False,
        ksp_prefix: str | None = None,
        device: str | None = None,
        **kwargs,
    ):
        check_problem(problem, self._kind.problem_type)
        self.arguments = {**kwargs, "ksp_prefix": ksp_prefix}
        given: dict[str, Any] = {}

        def look() -> list[str]:
            """What ranks must have alike, where a solver can be made of what is on this one."""
            asked = refinement_in_words(refinement)
            check_solver_arguments(problem.u, type(self), warm_start, ksp_prefix, device, kwargs)
            self._differentiation = differentiation_of(differentiation)
            refuse_callbacks(kwargs, self._kind.refused_callbacks)
            given.update(checked_options(kwargs, f"the solver for '{problem.u.name()}'"))
            return [
                type(self).__name__,
                asked,
                f"{self._differentiation}",
                f"warm_start {bool(warm_start)}",
                f"ksp_prefix {ksp_prefix}",
                *others_in_words(kwargs, given),
            ]

        agree(problem.u.function_space().mesh().comm, look, "arguments of a solver")
        check_bases(kwargs)
        code = users_code(given)
        appctx = users_context(kwargs.get("appctx"), problem.u)
        told, named = coefficients_in([appctx, code, kwargs.get("post_jacobian_callback")])
        forms = self._kind.take_apart(problem, [*told, *named])
        self._callbacks = self._kind.take_callbacks(kwargs)
        # Linear solvers, of derivatives, have states of their own, which are none of this problem.
        kwargs["appctx"] = {**over_copies(appctx, forms.copy_of), "state": forms.solution}
        linear_solvers = self._make_firedrakes(forms, kwargs)
        self.problem = problem
        self.warm_start = warm_start
        self._changes_pattern = kwargs.get("post_jacobian_callback") is not None
        place = Place(memory_of(self._find_device(device)))
        with stop_annotating():
            forward = self._kind.make_forward(self, forms, linear_solvers, ksp_prefix, place)
        self.system = self._kind.make_map(forward, self._differentiation)
        self._taped_meshes = TapedMeshes(self.system.comm)
        if code or named:
            self.system.linearisation.lending.serve(named, problem.u)
        self.refinement = refinement
        self.system.collect_garbage()

    def _make_firedrakes(self, forms: Forms, arguments: dict[str, Any]) -> LinearSolvers:
        """Make Firedrake's side of this solver, and what makes linear solvers like it."""
        try:
            super().__init__(forms.problem, **arguments)
        except PETSc.Error as error:
            raise ValueError(
                f"PETSc refuses the solver parameters for '{forms.solution.name()}': "
                f"{str(error).splitlines()[-1].partition('] ')[2]}"
            ) from None
        by_hand = None if self._predecessor is None else take_over(self, self._predecessor)
        linear_solvers = LinearSolvers(self, arguments, by_hand)
        if linear_solvers.have_null_spaces:
            detect_null_pivots(self)
        lift_bounds(self)
        assemble_directly(self)
        return linear_solvers

    @property
    def refinement(self) -> Refinement | None:
        """Whose setting is put on the KSP at each solve; it can be exchanged between solves."""
        return self._refinement

    @refinement.setter
    def refinement(self, refinement: Refinement | None) -> None:
        agree(
            self.system.comm,
            lambda: refinement_in_words(refinement),
            "refinements of a solver",
            "give them comm=, and have all ranks step and set them alike",
        )
        if refinement is not None:
            self.system.check_setting(checked_setting(refinement.setting))
            cite()
        self._refinement = refinement

    @property
    def differentiation(self) -> Implicit | Unrolled:
        """How solves are differentiated; chosen when the solver is made."""
        return self._differentiation

    @property
    def device(self) -> str:
        """Where solves are made: ``"cpu"``, ``"cuda"``, ``"hip"``, ``"kokkos"`` or ``"opencl"``."""
        return self.system.place.memory.name

    def to(self, device: str) -> RefinedSolver:
        """Make solves on another device from now on, or on the host again.

        Parameters
        ----------
        device : str
            As in the constructor.

        Returns
        -------
        RefinedSolver
            This solver.

        Raises
        ------
        ValueError
            For a device that is not there, or that cannot hold the operator. Nothing has changed
            then.
        """
        found = self._find_device(device)
        if found != self.system.place.memory.device:
            self.system.place.move_to(memory_of(found))
        return self

    def _find_device(self, name: str | None) -> Device | None:
        return find_device_for(self, name, changes_pattern=self._changes_pattern)

    @property
    def statistics(self) -> Statistics:
        """What the solver has done: solves, iterations and seconds, forward and adjoint."""
        return self.system.statistics

    @property
    def setting(self) -> Setting | None:
        """What the next solve puts on the KSP."""
        refinement = self._refinement
        # Settings of a user's class can have changed since they were looked at.
        return None if refinement is None else checked_setting(refinement.setting)

    @contextmanager
    def apart(self) -> Iterator[Statistics]:
        """Within, solves leave no trace: they are counted apart, are on no tape, and the solution
        Function is as before. Collective.

        Gives what is counted, once it is left.
        """
        with stop_annotating(), put_back(self.problem.u), self.statistics.apart() as done:
            yield done

    def get_solution(self) -> firedrake.Function:
        """The user's solution Function."""
        return self.problem.u

    @by_one_thread("system")
    def solve(self, bounds=None, **kwargs) -> firedrake.Function:
        """Solve with the setting of the moment, and annotate the solve on the working tape.

        Parameters
        ----------
        bounds
            Not supported: variational inequalities are not differentiable.
        annotate : bool
            False keeps the solve off the tape.
        ad_block_tag : str
            Overrides that of the constructor.

        Returns
        -------
        Function
            The solution.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            On NaN, breakdown or divergence, and where a tolerance is not reached. The solution is
            left as it was, and nothing is put on the tape.
        ValueError
            Where ranks have come to different settings, on all of them.
        """
        if bounds is not None:
            raise ValueError(
                f"the problem for '{self.problem.u.name()}' with bounds is a variational"
                " inequality, and not differentiable: solve it with Firedrake's"
                " NonlinearVariationalSolver"
            )
        annotate = annotate_tape(kwargs)
        tag = kwargs.pop("ad_block_tag", self.ad_block_tag)
        if kwargs:
            raise TypeError(
                f"solve() takes bounds, annotate and ad_block_tag, found {', '.join(kwargs)}"
            )
        u, setting = self.problem.u, self.system.agreement.setting_of(self._refinement)
        with stop_annotating():
            point = self.point()
            solution = local_values(u)
            (record,) = self.system.solve(point, setting, solution[None])
        if annotate:
            block = SolveBlock(
                self.system,
                self._taped_meshes,
                self.problem,
                self.refinement,
                record,
                warm_start=self.warm_start,
                ad_block_tag=tag,
            )
            get_working_tape().add_block(block)
        with stop_annotating():
            set_local_values(u, solution)
        if annotate:
            block.add_output(u.create_block_variable())
        self.system.collect_garbage()
        return u

    def point(self, without: Sequence[int] = (), *, has_boundary: bool = True) -> Point:
        """Where the next solve is made: the present values of the user's coefficients, boundary
        values and guess.

        Parameters
        ----------
        without : sequence of int
            Inputs whose values are not read, because the caller puts in its own.
        has_boundary : bool
            Whether boundary values are read; False where the caller puts in its own, too.

        Notes
        -----
        The user's callbacks run first: they may change coefficients.
        """
        if self._callbacks:
            _call(self._callbacks, self.problem.u)
        present = self.system.present
        return Point(
            present.inputs(without),
            present.boundary(self.problem.bcs) if has_boundary else None,
            local_values(self.problem.u) if self.warm_start else None,
        )


def _call(callbacks: Sequence[Callable], solution: firedrake.Function) -> None:
    """Call what a user has run before a solve, with the state as Firedrake's solver has it."""
    state = vector_like(solution)
    with solution.dat.vec_ro as vector:
        vector.copy(state)
    for callback in callbacks:
        callback(state)
