"""The block by which a solve stands on pyadjoint's tape."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from functools import partial

import numpy as np
from firedrake import Cofunction, Function
from pyadjoint import Block, get_working_tape
from pyadjoint.tape import no_annotations
from ufl.formatting.ufl2unicode import ufl2unicode

from prdp_fem.problem.firedrake_internals import (
    has_saved_values,
    has_schedule,
    is_lost,
    maybe_disk_checkpoint,
)
from prdp_fem.problem.inputs import Input, local_values, set_local_values
from prdp_fem.problem.point import NO_VALUES, Direction, Point
from prdp_fem.problem.wanted import Needs, SecondCotangent, Wanted
from prdp_fem.ranks.threads import by_one_thread
from prdp_fem.solution.map import SolutionMap
from prdp_fem.taped_objects import (
    SolvedWith,
    TapedMeshes,
    copied_from,
    forget_tapes_of_before,
    values_in,
)

__all__ = ["SolveBlock"]

# References to a checkpoint while it is looked at: the block variable's, the local name, and the
# argument of sys.getrefcount.
_OURS_ALONE = 3


class SolveBlock(Block):
    """One solve of a variational problem.

    Its dependencies are the inputs of the system, what the boundary values are made from, the
    meshes and, where the solve starts from one, the guess. Replay, adjoint, tangent and Hessian use
    the system's KSP with the setting of the last evaluation.

    Parameters
    ----------
    system : SolutionMap
    taped_meshes : TapedMeshes
        Those of the solver.
    problem : NonlinearVariationalProblem
        The user's.
    refinement : Refinement or None
        Asked for the setting at each evaluation of the functional.
    record
        What the system returned of the solve.
    warm_start : bool
        Whether the solve starts from the values that the solution has.
    ad_block_tag : str or None
    """

    def __init__(
        self,
        system: SolutionMap,
        taped_meshes: TapedMeshes,
        problem,
        refinement,
        record,
        *,
        warm_start: bool = False,
        ad_block_tag: str | None = None,
    ):
        super().__init__(ad_block_tag=ad_block_tag)
        self._system = system
        self._taped_meshes = taped_meshes
        self._problem = problem
        self._refinement = refinement
        self._setting, self._record = None if refinement is None else refinement.setting, record
        tape = get_working_tape()
        # Not any tape: one that its blocks have, too, goes when Python looks for cycles, at another
        # time on each rank, and with it the checkpoints that a later tape would find of a mesh; to
        # make them is collective.
        self._scheduled_tape = tape if has_schedule(tape) else None
        self._evaluation = tape.recompute_count
        self._boundary = system.present.boundary_data()
        boundary_inputs = self._boundary.inputs.values()
        meshes = list(dict.fromkeys([*system.forms.meshes, *self._boundary.meshes]))
        forget_tapes_of_before(
            system.comm,
            [*(entry.original for entry in [*system.inputs, *boundary_inputs]), *meshes, problem.u],
        )
        self._solved_with = SolvedWith()
        self._inputs, self._boundary_inputs = (
            [self._depend_on(entry.original, entry.present_values) for entry in entries]
            for entries in (system.inputs, boundary_inputs)
        )
        self._meshes = [
            self._depend_on(mesh, partial(local_values, mesh.coordinates)) for mesh in meshes
        ]
        self._guess = (
            self._depend_on(problem.u, partial(local_values, problem.u)) if warm_start else None
        )
        self._duals: dict = {}
        # Ranks may differ in what else holds an object; and to make one, or to write to it, is
        # collective.
        self._may_reuse = system.is_serial

    def _depend_on(self, original, present: Callable[[], np.ndarray]):
        """The block variable of something that has values at present."""
        was_saved = has_saved_values(original)
        self.add_dependency(original, no_duplicates=True)
        found = next(
            variable for variable in self.get_dependencies() if variable.output is original
        )
        if was_saved and self._scheduled_tape is None:
            self._solved_with.note(found, present())
        return found

    def __str__(self) -> str:
        return f"solve({ufl2unicode(self._problem.F)} = 0)"

    def _derivative_point(
        self, needs: Needs, inputs: Iterable[int], meshes: Sequence, *, is_second: bool = False
    ) -> Point:
        """Where this block is differentiated by some inputs and meshes, or in a direction of them.

        The values of the unread inputs, which nobody will look at, are left out.
        """
        system, lost = self._system, []
        places = [index for index, variable in enumerate(self._inputs) if is_lost(variable)]
        if places:
            read = system.values_read(inputs, by_all=bool(meshes) or is_second)
            lost = [system.inputs[index].name for index in places if index in read]
        boundary = self._boundary
        lost += [
            boundary.inputs[place].name
            for place, variable in enumerate(self._boundary_inputs)
            if is_lost(variable) and (needs.boundary or boundary.needs_value(place))
        ]
        # Records that hold fields hold what the iterations have started from, too.
        reads_guess = needs.guess and not needs.fields
        if self._guess is not None and reads_guess and is_lost(self._guess):
            lost.append(self._problem.u.name())
        for name in lost:
            raise RuntimeError(
                "the checkpointing schedule of the tape has let go of the value that "
                f"'{name}' had when '{self._problem.u.name()}' was solved for, "
                "and the derivative of that solve depends on it: use a schedule "
                "that keeps it, such as SingleMemoryStorageSchedule, or none"
            )
        return self._point(needs.unread)

    def _point(self, unread: Container[int] = ()) -> Point:
        """Where this block is evaluated, from what the tape saved."""
        values = self._solved_with.values
        for variable in self._meshes:
            self._taped_meshes.restore(variable, self._solved_with)
        self._boundary.write(dict(enumerate(map(values, self._boundary_inputs))))
        return Point(
            [
                NO_VALUES if index in unread else values(variable)
                for index, variable in enumerate(self._inputs)
            ],
            self._system.present.boundary(self._boundary.conditions),
            None if self._guess is None else values(self._guess),
        )

    def _solution(self) -> np.ndarray:
        return local_values(self.get_outputs()[0].saved_output)

    # pyadjoint's own versions of the four methods that follow restore all that the block depends on
    # first, the mesh, too.

    @no_annotations
    @by_one_thread("_system")
    def recompute(self, markings: bool = False) -> None:
        """Solve again, and save the solution."""
        (output,) = self.get_outputs()
        if output.is_control or (markings and not output.is_control_dependent):
            return
        # A checkpointing schedule solves again within the same evaluation of the functional: with
        # the same setting.
        tape = self._scheduled_tape
        if tape is None or tape.recompute_count != self._evaluation:
            self._evaluation = None if tape is None else tape.recompute_count
            self._setting = self._system.agreed_setting(self._refinement)
        values = np.empty(self._system.size)
        (self._record,) = self._system.solve(self._point(), self._setting, values[None])
        # Making a Function costs as much as a small solve: where nobody else has the old one, it is
        # used again.
        solution = output.checkpoint
        if (
            type(solution) is not Function
            or not self._may_reuse
            or sys.getrefcount(solution) > _OURS_ALONE
        ):
            solution = Function(self._problem.u.function_space())
        output.checkpoint = maybe_disk_checkpoint(_with_values(solution, values))
        self._system.collect_garbage()

    @no_annotations
    @by_one_thread("_system")
    def evaluate_adj(self, markings: bool = False) -> None:
        """Add the adjoint's values to the dependencies'."""
        (output,) = self.get_outputs()
        relevant = self._relevant(markings)
        if output.adj_value is None or not relevant:
            return
        wanted = self._wanted(relevant)
        needs = self._needs(wanted)
        if needs.guess and self._guess in relevant:
            wanted.guess = np.empty((1, self._system.size))
        point = self._derivative_point(needs, wanted.gradients, wanted.meshes)
        solutions = self._solution()[None] if needs.solutions else None
        self._system.solve_adjoint(
            point,
            self._setting,
            local_values(output.adj_value)[None],
            solutions,
            [self._record],
            wanted,
        )
        if wanted.guess is not None:
            of_guess = _with_values(
                Cofunction(self._problem.u.function_space().dual()), wanted.guess[0]
            )
            self._source(self._guess, markings).add_adj_output(of_guess)
        data = self._boundary
        by_boundary = self._by_boundary(
            relevant, wanted.boundary, wanted.by_mesh, data.by_input, data.by_mesh
        )
        for variable, value in self._components(relevant, by_boundary, wanted):
            self._source(variable, markings).add_adj_output(value)
        self._system.collect_garbage()

    def _source(self, variable, markings: bool):
        """Where a derivative by a variable belongs: to what it was assigned from, which spares the
        adjoint of the assignment.
        """
        if markings and self._scheduled_tape is None:
            while (
                not variable.is_control
                and (source := copied_from(variable)) is not None
                and source.is_control_dependent
            ):
                variable = source
        return variable

    @no_annotations
    @by_one_thread("_system")
    def evaluate_tlm(self, markings: bool = False) -> None:
        """Add the tangent of the solution to the output's."""
        (output,) = self.get_outputs()
        if (markings and not output.is_control_dependent) or all(
            variable.tlm_value is None for variable in self.get_dependencies()
        ):
            return
        values = np.empty(self._system.size)
        directed = [
            index for index, variable in enumerate(self._inputs) if variable.tlm_value is not None
        ]
        meshes = [variable for variable in self._meshes if variable.tlm_value is not None]
        point = self._derivative_point(self._needs(), directed, meshes)
        self._system.solve_tangent(
            point, self._setting, self._solution(), self._record, self._direction(), values
        )
        output.add_tlm_output(_with_values(Function(self._problem.u.function_space()), values))
        self._system.collect_garbage()

    @no_annotations
    @by_one_thread("_system")
    def evaluate_hessian(self, markings: bool = False) -> None:
        """Add the derivatives of the adjoint's values, in the direction of the tangents, to the
        dependencies'.
        """
        (output,) = self.get_outputs()
        relevant = self._relevant(markings)
        if output.hessian_value is None or not relevant:
            return
        # Where there is no cotangent, or no tangent of the solution, it is zero.
        cotangent, second, tangent = (
            np.zeros(self._system.size) if value is None else local_values(value)
            for value in (output.adj_value, output.hessian_value, output.tlm_value)
        )
        wanted = self._wanted(relevant)
        wanted.first_boundary = None if wanted.boundary is None else np.empty_like(wanted.boundary)
        point = self._derivative_point(
            self._needs(), wanted.gradients, wanted.meshes, is_second=True
        )
        data, by_mesh = self._boundary, wanted.by_mesh
        self._system.solve_second_adjoint(
            point,
            self._setting,
            self._solution(),
            SecondCotangent(cotangent, second, tangent),
            self._direction(),
            wanted,
        )
        by_boundary = self._by_boundary(
            relevant, wanted.boundary, by_mesh, data.by_input, data.by_mesh
        )
        bent = self._by_boundary(
            relevant, wanted.first_boundary, by_mesh, data.second_by_input, data.second_by_mesh
        )
        by_boundary = {place: values + bent[place] for place, values in by_boundary.items()}
        for variable, value in self._components(relevant, by_boundary, wanted):
            variable.add_hessian_output(value)
        self._system.collect_garbage()

    def _relevant(self, markings: bool) -> list:
        """The dependencies that derivatives are wanted by."""
        return [
            variable
            for variable in self.get_dependencies()
            if variable.is_control_dependent or not markings
        ]

    def _needs(self, wanted: Wanted | None = None) -> Needs:
        """What a derivative looks at; None for what may look at everything."""
        if wanted is None:
            return self._system.needs(range(len(self._inputs)), by_forms=True)
        return self._system.needs(
            wanted.gradients, by_forms=wanted.boundary is not None or bool(wanted.meshes)
        )

    def _wanted(self, relevant: list) -> Wanted:
        """What is differentiated by: room for gradients by inputs and by boundary values, and
        meshes.
        """
        gradients = {
            index: np.empty((1, entry.size))
            for index, (entry, variable) in enumerate(zip(self._system.inputs, self._inputs))
            if variable in relevant
        }
        meshes = [variable.output for variable in self._meshes if variable in relevant]
        has_boundary = any(variable in relevant for variable in self._boundary_inputs) or any(
            mesh in self._boundary.meshes for mesh in meshes
        )
        return Wanted(
            gradients, np.empty((1, self._system.size)) if has_boundary else None, meshes=meshes
        )

    def _by_boundary(
        self,
        relevant: list,
        boundary: np.ndarray | None,
        by_mesh: dict,
        by_input: Callable,
        by_coordinates: Callable,
    ) -> dict[int, np.ndarray]:
        """The derivatives by what boundary values are made from; those by meshes are added to what
        there is.
        """
        if boundary is None:
            return {}
        for mesh in by_mesh:
            if mesh in self._boundary.meshes:
                by_mesh[mesh] += by_coordinates(mesh, boundary[0])
        return {
            place: by_input(place, boundary[0])
            for place, variable in enumerate(self._boundary_inputs)
            if variable in relevant
        }

    def _components(
        self, relevant: list, by_boundary: dict[int, np.ndarray], wanted: Wanted
    ) -> Iterator[tuple]:
        """The derivatives by dependencies but the guess, with their variables."""
        for index, gradient in wanted.gradients.items():
            yield self._inputs[index], self._dual(index, self._system.inputs[index], gradient[0])
        for place, gradient in by_boundary.items():
            yield (
                self._boundary_inputs[place],
                self._dual(("boundary", place), self._boundary.inputs[place], gradient),
            )
        for variable in self._meshes:
            if variable in relevant:
                yield variable, wanted.by_mesh[variable.output]

    def _dual(self, key: Hashable, entry: Input, values: np.ndarray):
        """A derivative by an input; in an object of the last evaluation where nobody else has that
        any more.
        """
        dual = self._duals.get(key)
        if dual is not None and self._may_reuse and sys.getrefcount(dual) <= _OURS_ALONE:
            set_local_values(dual, values)
            return dual
        dual = entry.dual(values)
        if self._scheduled_tape is None:
            self._duals[key] = dual
        return dual

    def _direction(self) -> Direction:
        """The direction that the tangents of the dependencies make."""
        meshes = {
            variable.output: variable.tlm_value
            for variable in self._meshes
            if variable.tlm_value is not None
        }
        return Direction(
            _tangents(self._inputs),
            meshes,
            self._boundary.tangent(_tangents(self._boundary_inputs), meshes),
            (
                None
                if self._guess is None or self._guess.tlm_value is None
                else local_values(self._guess.tlm_value)
            ),
        )


def _tangents(variables: list) -> dict[int, np.ndarray]:
    """Rank-local tangents of those block variables that have any, by their places."""
    return {
        place: values_in(variable.output, variable.tlm_value)
        for place, variable in enumerate(variables)
        if variable.tlm_value is not None
    }


def _with_values(coefficient, values: np.ndarray):
    set_local_values(coefficient, values)
    return coefficient
