"""The block by which a solve stands on pyadjoint's tape."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from functools import partial, wraps

import numpy as np
from firedrake import Cofunction, Function
from pyadjoint import Block, get_working_tape
from pyadjoint.block_variable import BlockVariable
from pyadjoint.tape import no_annotations
from ufl.formatting.ufl2unicode import ufl2unicode

from prdp_fem.problem.firedrake_internals import (
    assigned_from,
    has_saved_values,
    has_schedule,
    is_lost,
    maybe_disk_checkpoint,
)
from prdp_fem.problem.inputs import (
    Input,
    is_real,
    local_values,
    same_bits,
    set_local_values,
    values_as,
)
from prdp_fem.problem.point import NO_VALUES, Direction, Point
from prdp_fem.problem.wanted import Needs, SecondCotangent, Wanted
from prdp_fem.ranks.threads import one_thread
from prdp_fem.solution.map import SolutionMap
from prdp_fem.taped_objects import TapedMeshes, forget_tapes_of_before

__all__ = ["SolveBlock"]

# References to a checkpoint while it is looked at: the block variable's, the local name, and the
# argument of sys.getrefcount.
_OURS_ALONE = 3


def _alone(method: Callable) -> Callable:
    """Have one thread at a time come to a method of a block, and what it assembles off the tape."""

    @no_annotations
    @wraps(method)
    def alone(self, markings: bool = False) -> None:
        with self._lock:
            method(self, markings)

    return alone


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
        self._lock = one_thread(system.comm)
        self._problem = problem
        self._refinement = refinement
        self._setting, self._record = None if refinement is None else refinement.setting, record
        tape = get_working_tape()
        # Not any tape: one that its blocks have, too, goes when Python looks for cycles, at another
        # time on each rank, and with it the checkpoints that a later tape would find of a mesh; to
        # make them is collective.
        self._scheduled_tape = tape if has_schedule(tape) else None
        self._evaluation = tape.recompute_count
        self._of = _Dependencies(
            self._depend_on, system, taped_meshes, problem, warm_start=warm_start
        )
        self._duals = _Duals(self._of, is_kept=self._scheduled_tape is None)

    def _depend_on(
        self, original, present: Callable[[], np.ndarray], solved_with: _SolvedWith
    ) -> BlockVariable:
        """The block variable of something that has values at present."""
        was_saved = has_saved_values(original)
        self.add_dependency(original, no_duplicates=True)
        found = next(
            variable for variable in self.get_dependencies() if variable.output is original
        )
        if was_saved and self._scheduled_tape is None:
            solved_with.note(found, present())
        return found

    def __str__(self) -> str:
        return f"solve({ufl2unicode(self._problem.F)} = 0)"

    def _solution(self) -> np.ndarray:
        return local_values(self.get_outputs()[0].saved_output)

    # pyadjoint's own versions of the four methods that follow restore all that the block depends on
    # first, the mesh, too.

    @_alone
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
            self._setting = self._system.agreement.setting_of(self._refinement)
        values = np.empty(self._system.size)
        (self._record,) = self._system.solve(self._of.point(), self._setting, values[None])
        # Making a Function costs as much as a small solve: where nobody else has the old one, it is
        # used again. Ranks may differ in what else holds it; and to make one, or to write to it, is
        # collective.
        solution = output.checkpoint
        if (
            type(solution) is not Function
            or not self._system.is_serial
            or sys.getrefcount(solution) > _OURS_ALONE
        ):
            solution = Function(self._problem.u.function_space())
        output.checkpoint = maybe_disk_checkpoint(_with_values(solution, values))
        self._system.collect_garbage()

    @_alone
    def evaluate_adj(self, markings: bool = False) -> None:
        """Add the adjoint's values to the dependencies'."""
        (output,) = self.get_outputs()
        relevant = self._relevant(markings)
        if output.adj_value is None or not relevant:
            return
        of, system = self._of, self._system
        wanted = of.wanted(relevant)
        needs = system.derivative.needs(
            wanted.gradients, by_forms=wanted.boundary is not None or bool(wanted.meshes)
        )
        if needs.guess and of.guess in relevant:
            wanted.guess = np.empty((1, system.size))
        system.solve_adjoint(
            of.derivative_point(needs, wanted.gradients, wanted.meshes),
            self._setting,
            local_values(output.adj_value)[None],
            self._solution()[None] if needs.solutions else None,
            [self._record],
            wanted,
        )
        if wanted.guess is not None:
            of_guess = _with_values(
                Cofunction(self._problem.u.function_space().dual()), wanted.guess[0]
            )
            self._source(of.guess, markings).add_adj_output(of_guess)
        data = of.boundary
        by_boundary = of.by_boundary(
            relevant, wanted.boundary, wanted.by_mesh, data.by_input, data.by_mesh
        )
        for variable, value in self._duals.of(relevant, by_boundary, wanted):
            self._source(variable, markings).add_adj_output(value)
        system.collect_garbage()

    def _source(self, variable, markings: bool):
        """Where a derivative by a variable belongs: to what it was assigned from, which spares the
        adjoint of the assignment.
        """
        if markings and self._scheduled_tape is None:
            while (
                not variable.is_control
                and (source := _copied_from(variable)) is not None
                and source.is_control_dependent
            ):
                variable = source
        return variable

    @_alone
    def evaluate_tlm(self, markings: bool = False) -> None:
        """Add the tangent of the solution to the output's."""
        (output,) = self.get_outputs()
        if (markings and not output.is_control_dependent) or all(
            variable.tlm_value is None for variable in self.get_dependencies()
        ):
            return
        of, system = self._of, self._system
        values = np.empty(system.size)
        directed = [
            index for index, variable in enumerate(of.inputs) if variable.tlm_value is not None
        ]
        meshes = [variable for variable in of.meshes if variable.tlm_value is not None]
        point = of.derivative_point(self._needs_of_all(), directed, meshes)
        system.solve_tangent(
            point, self._setting, self._solution(), self._record, of.direction(), values
        )
        output.add_tlm_output(_with_values(Function(self._problem.u.function_space()), values))
        system.collect_garbage()

    @_alone
    def evaluate_hessian(self, markings: bool = False) -> None:
        """Add the derivatives of the adjoint's values, in the direction of the tangents, to the
        dependencies'.
        """
        (output,) = self.get_outputs()
        relevant = self._relevant(markings)
        if output.hessian_value is None or not relevant:
            return
        of, system = self._of, self._system
        # Where there is no cotangent, or no tangent of the solution, it is zero.
        cotangent, second, tangent = (
            np.zeros(system.size) if value is None else local_values(value)
            for value in (output.adj_value, output.hessian_value, output.tlm_value)
        )
        wanted = of.wanted(relevant)
        wanted.first_boundary = None if wanted.boundary is None else np.empty_like(wanted.boundary)
        point = of.derivative_point(
            self._needs_of_all(), wanted.gradients, wanted.meshes, is_second=True
        )
        data, by_mesh = of.boundary, wanted.by_mesh
        system.solve_second_adjoint(
            point,
            self._setting,
            self._solution(),
            SecondCotangent(cotangent, second, tangent),
            of.direction(),
            wanted,
        )
        by_boundary = of.by_boundary(
            relevant, wanted.boundary, by_mesh, data.by_input, data.by_mesh
        )
        bent = of.by_boundary(
            relevant, wanted.first_boundary, by_mesh, data.second_by_input, data.second_by_mesh
        )
        by_boundary = {place: values + bent[place] for place, values in by_boundary.items()}
        for variable, value in self._duals.of(relevant, by_boundary, wanted):
            variable.add_hessian_output(value)
        system.collect_garbage()

    def _relevant(self, markings: bool) -> list:
        """The dependencies that derivatives are wanted by."""
        return [
            variable
            for variable in self.get_dependencies()
            if variable.is_control_dependent or not markings
        ]

    def _needs_of_all(self) -> Needs:
        """What a derivative looks at that may look at everything."""
        return self._system.derivative.needs(range(len(self._of.inputs)), by_forms=True)


class _SolvedWith:
    """The values that a block on the tape was solved with.

    They are those that the tape has saved, but where something was written to an object afterwards
    and nothing was annotated, or where another tape has saved it before. Those count as long as the
    tape is not evaluated at others.
    """

    def __init__(self):
        # By the identity of block variables: what was saved then, and the values.
        self._others: dict[int, tuple] = {}

    def note(self, variable, present: np.ndarray) -> None:
        """Look whether the tape has other values than the present ones, of a variable that was
        saved before.
        """
        if hasattr(variable.output, "coordinates"):  # a mesh
            saved = local_values(variable.checkpoint)
        else:
            saved = self.values(variable)
        if not same_bits(saved, present):
            self._others[id(variable)] = _origin(variable).checkpoint, present

    def others(self, variable) -> np.ndarray | None:
        """Rank-local values that are not those which the tape has, or None."""
        if id(variable) not in self._others:
            return None
        checkpoint, values = self._others[id(variable)]
        return values if _origin(variable).checkpoint is checkpoint else None

    def values(self, variable) -> np.ndarray:
        """Rank-local values of a variable that is no mesh."""
        others = self.others(variable)
        if others is not None:
            return others
        return values_as(variable.output, _origin(variable).saved_output)


class _Dependencies:
    """What a solve depends on, as block variables, and the values that the tape has saved of it.

    Parameters
    ----------
    depend_on : callable
        Makes a block depend on an object, whose present values a function gives, and returns the
        block variable.
    system, taped_meshes, problem, warm_start
        Of the block.

    Attributes
    ----------
    system : SolutionMap
    boundary : BoundaryData
    inputs, boundary_inputs, meshes : list of BlockVariable
    guess : BlockVariable or None
    """

    def __init__(
        self,
        depend_on: Callable,
        system: SolutionMap,
        taped_meshes: TapedMeshes,
        problem,
        *,
        warm_start: bool,
    ):
        self.system, self.boundary = system, system.present.boundary_data()
        self._taped_meshes = taped_meshes
        self._name = problem.u.name()
        boundary_inputs = self.boundary.inputs.values()
        meshes = list(dict.fromkeys([*system.forms.meshes, *self.boundary.meshes]))
        forget_tapes_of_before(
            system.comm,
            [*(entry.original for entry in [*system.inputs, *boundary_inputs]), *meshes, problem.u],
        )
        self._solved_with = _SolvedWith()
        self.inputs, self.boundary_inputs = (
            [
                depend_on(entry.original, entry.present_values, self._solved_with)
                for entry in entries
            ]
            for entries in (system.inputs, boundary_inputs)
        )
        self.meshes = [
            depend_on(mesh, partial(local_values, mesh.coordinates), self._solved_with)
            for mesh in meshes
        ]
        self.guess = None
        if warm_start:
            self.guess = depend_on(problem.u, partial(local_values, problem.u), self._solved_with)

    def point(self, unread: Container[int] = ()) -> Point:
        """Where the block is evaluated; without the values of inputs that nobody will look at."""
        solved_with = self._solved_with
        for variable in self.meshes:
            self._taped_meshes.restore(variable, solved_with.others(variable))
        boundary = None
        if self.boundary.conditions:
            if self.boundary_inputs:
                self.boundary.write(dict(enumerate(map(solved_with.values, self.boundary_inputs))))
            boundary = self.system.present.boundary(self.boundary.conditions)
        return Point(
            [
                NO_VALUES if index in unread else solved_with.values(variable)
                for index, variable in enumerate(self.inputs)
            ],
            boundary,
            None if self.guess is None else solved_with.values(self.guess),
        )

    def derivative_point(
        self, needs: Needs, inputs: Iterable[int], meshes: Sequence, *, is_second: bool = False
    ) -> Point:
        """Where it is differentiated by some inputs and meshes, or in a direction of them.

        Raises
        ------
        RuntimeError
            Where the tape has not kept a value that the derivative depends on.
        """
        system, lost = self.system, []
        places = [index for index, variable in enumerate(self.inputs) if is_lost(variable)]
        if places:
            read = system.derivative.values_read(inputs, by_all=bool(meshes) or is_second)
            lost = [system.inputs[index].name for index in places if index in read]
        boundary = self.boundary
        lost += [
            boundary.inputs[place].name
            for place, variable in enumerate(self.boundary_inputs)
            if is_lost(variable) and (needs.boundary or boundary.needs_value(place))
        ]
        # Records that hold fields hold what the iterations have started from, too.
        reads_guess = needs.guess and not needs.fields
        if self.guess is not None and reads_guess and is_lost(self.guess):
            lost.append(self._name)
        for name in lost:
            raise RuntimeError(
                "the checkpointing schedule of the tape has let go of the value that "
                f"'{name}' had when '{self._name}' was solved for, "
                "and the derivative of that solve depends on it: use a schedule "
                "that keeps it, such as SingleMemoryStorageSchedule, or none"
            )
        return self.point(needs.unread)

    def wanted(self, relevant: list) -> Wanted:
        """Room for the derivatives by those dependencies that are relevant, but for the guess."""
        gradients = {
            index: np.empty((1, entry.size))
            for index, (entry, variable) in enumerate(zip(self.system.inputs, self.inputs))
            if variable in relevant
        }
        meshes = [variable.output for variable in self.meshes if variable in relevant]
        has_boundary = any(variable in relevant for variable in self.boundary_inputs) or any(
            mesh in self.boundary.meshes for mesh in meshes
        )
        return Wanted(
            gradients, np.empty((1, self.system.size)) if has_boundary else None, meshes=meshes
        )

    def by_boundary(
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
            if mesh in self.boundary.meshes:
                by_mesh[mesh] += by_coordinates(mesh, boundary[0])
        return {
            place: by_input(place, boundary[0])
            for place, variable in enumerate(self.boundary_inputs)
            if variable in relevant
        }

    def direction(self) -> Direction:
        """The direction that the tangents of the dependencies make."""
        meshes = {
            variable.output: variable.tlm_value
            for variable in self.meshes
            if variable.tlm_value is not None
        }
        return Direction(
            _tangents(self.inputs),
            meshes,
            self.boundary.tangent(_tangents(self.boundary_inputs), meshes),
            (
                None
                if self.guess is None or self.guess.tlm_value is None
                else local_values(self.guess.tlm_value)
            ),
        )


class _Duals:
    """Derivatives as objects of Firedrake's; those of the last evaluation where nobody else has
    them any more.

    Parameters
    ----------
    dependencies : _Dependencies
    is_kept : bool
        Whether objects are kept for the next evaluation.
    """

    def __init__(self, dependencies: _Dependencies, *, is_kept: bool):
        self._dependencies = dependencies
        self._is_kept = is_kept
        self._there: dict = {}

    def of(
        self, relevant: list, by_boundary: dict[int, np.ndarray], wanted: Wanted
    ) -> Iterator[tuple]:
        """The block variables of all dependencies but the guess, each with the derivative by it."""
        of = self._dependencies
        for index, gradient in wanted.gradients.items():
            yield of.inputs[index], self._dual(index, of.system.inputs[index], gradient[0])
        for place, gradient in by_boundary.items():
            yield (
                of.boundary_inputs[place],
                self._dual(("boundary", place), of.boundary.inputs[place], gradient),
            )
        for variable in of.meshes:
            if variable in relevant:
                yield variable, wanted.by_mesh[variable.output]

    def _dual(self, key: Hashable, entry: Input, values: np.ndarray):
        dual = self._there.get(key)
        # Ranks may differ in what else holds an object.
        may_reuse = self._dependencies.system.is_serial
        if dual is not None and may_reuse and sys.getrefcount(dual) <= _OURS_ALONE:
            set_local_values(dual, values)
            return dual
        dual = entry.dual(values)
        if self._is_kept:
            self._there[key] = dual
        return dual


def _tangents(variables: list) -> dict[int, np.ndarray]:
    """Rank-local tangents of those block variables that have any, by their places."""
    return {
        place: values_as(variable.output, variable.tlm_value)
        for place, variable in enumerate(variables)
        if variable.tlm_value is not None
    }


def _copied_from(variable):
    """The block variable that one is a mere copy of; None where it is none, or where the other is
    of another space.
    """
    source = assigned_from(variable)
    # A Function of a Real space can be assigned to any other. (In place of an assembled Cofunction
    # there may be a checkpoint.)
    is_broadcast = (
        source is not None
        and isinstance(source.output, Function)
        and is_real(source.output)
        and not is_real(variable.output)
    )
    return None if is_broadcast else source


def _origin(variable):
    """What a variable is a copy of, rather than of another copy made for the purpose; or itself."""
    while (source := _copied_from(variable)) is not None:
        variable = source
    return variable


def _with_values(coefficient, values: np.ndarray):
    set_local_values(coefficient, values)
    return coefficient
