"""The block by which a solve stands on pyadjoint's tape."""
from __future__ import annotations

import sys
from collections.abc import Container, Iterator
from numbers import Number

import numpy as np
from firedrake import Cofunction, DirichletBC, Function
from pyadjoint import Block, get_working_tape
from pyadjoint.tape import no_annotations
from ufl.formatting.ufl2unicode import ufl2unicode

from prdp_fem.firedrake_internals import assigned_from, extract_subfunction, has_schedule, is_lost, maybe_disk_checkpoint
from prdp_fem.inputs import is_real, local_values, set_local_values
from prdp_fem.point import Direction, Point
from prdp_fem.system import System

__all__ = ["SolveBlock"]

# References to a checkpoint while it is looked at: the block variable's, the local name, and the argument of sys.getrefcount.
_OURS_ALONE = 3
_NO_VALUES = np.empty(0)


class SolveBlock(Block):
    """One solve of a variational problem.

    Its dependencies are the inputs of the system, the boundary conditions, the meshes and, where the solve starts from
    one, the guess. Replay, adjoint, tangent and Hessian use the system's KSP with the setting of the last evaluation.

    Parameters
    ----------
    system : System
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

    def __init__(self, system: System, problem, refinement, record, *, warm_start: bool = False, ad_block_tag: str | None = None):
        super().__init__(ad_block_tag=ad_block_tag)
        self._system, self._problem, self._refinement = system, problem, refinement
        self._setting, self._record = None if refinement is None else refinement.setting, record
        tape = get_working_tape()
        # Not any tape: one that its blocks have, too, goes when Python looks for cycles, at another time on each rank, and with it the
        # checkpoints that a later tape would find of a mesh; to make them is collective.
        self._scheduled_tape = tape if has_schedule(tape) else None
        self._evaluation = tape.recompute_count
        system.forget_tapes_of_before([*(entry.original for entry in system.inputs), *problem.bcs, *system.forms.meshes, problem.u])
        self._inputs = [self._depend_on(entry.original) for entry in system.inputs]
        self._conditions = [self._depend_on(condition) for condition in problem.bcs]
        self._condition_values = [condition.function_arg for condition in problem.bcs]
        self._meshes = [self._depend_on(mesh) for mesh in system.forms.meshes]
        self._guess = self._depend_on(problem.u) if warm_start else None
        self._duals: dict = {}
        # Ranks may differ in what else holds an object; and to make one, or to write to it, is collective.
        self._may_reuse = system.is_serial

    def _depend_on(self, original):
        self.add_dependency(original, no_duplicates=True)
        return next(variable for variable in self.get_dependencies() if variable.output is original)

    def __str__(self) -> str:
        return f"solve({ufl2unicode(self._problem.F)} = 0)"

    def _derivative_point(self, unread: Container[int] = ()) -> Point:
        """Where this block is differentiated, without the values of inputs that nobody will read."""
        for index, variable in enumerate(self._inputs):
            if index not in unread and is_lost(variable) and self._system.needs_value(index):
                raise RuntimeError("the checkpointing schedule of the tape has let go of the value that "
                                   f"'{self._system.inputs[index].name}' had when '{self._problem.u.name()}' was solved for, and the "
                                   "derivative of that solve depends on it: use a schedule that keeps it, such as "
                                   "SingleMemoryStorageSchedule, or none")
        return self._point(unread)

    def _point(self, unread: Container[int] = ()) -> Point:
        """Where this block is evaluated, from what the tape saved."""
        for variable in self._meshes:
            self._system.restore_mesh(variable)
        return Point(
            [_NO_VALUES if index in unread else _saved_values(variable) for index, variable in enumerate(self._inputs)],
            self._system.boundary_values([variable.saved_output for variable in self._conditions]),
            None if self._guess is None else _saved_values(self._guess),
        )

    def _solution(self) -> np.ndarray:
        return local_values(self.get_outputs()[0].saved_output)

    # pyadjoint's own versions of the four methods that follow restore all that the block depends on first, the mesh, too.

    @no_annotations
    def recompute(self, markings: bool = False) -> None:
        """Solve again, and save the solution."""
        output, = self.get_outputs()
        if output.is_control or (markings and not output.is_control_dependent):
            return
        # A checkpointing schedule solves again within the same evaluation of the functional: with the same setting.
        tape = self._scheduled_tape
        if tape is None or tape.recompute_count != self._evaluation:
            self._evaluation = None if tape is None else tape.recompute_count
            self._setting = None if self._refinement is None else self._refinement.setting
        self._check_conditions()
        values = np.empty(self._system.size)
        self._record, = self._system.solve(self._point(), self._setting, values[None])
        # Making a Function costs as much as a small solve: where nobody else has the old one, it is used again.
        solution = output.checkpoint
        if type(solution) is not Function or not self._may_reuse or sys.getrefcount(solution) > _OURS_ALONE:
            solution = Function(self._problem.u.function_space())
        output.checkpoint = maybe_disk_checkpoint(_with_values(solution, values))
        self._system.collect_garbage()

    @no_annotations
    def evaluate_adj(self, markings: bool = False) -> None:
        """Add the adjoint's values to the dependencies'."""
        output, = self.get_outputs()
        relevant = self._relevant(markings)
        if output.adj_value is None or not relevant:
            return
        gradients, boundary, meshes = self._wanted(relevant)
        guess = np.empty((1, self._system.size)) if self._system.depends_on_guess and self._guess in relevant else None
        # Where all is a matrix product, neither the solution nor what is multiplied by matrices is looked at.
        assembles = boundary is not None or bool(meshes) or self._system.needs_solutions(gradients)
        point = self._derivative_point(() if assembles else self._system.unread_inputs)
        solutions = self._solution()[None] if assembles else None
        by_mesh = self._system.solve_adjoint(point, self._setting, local_values(output.adj_value)[None], solutions, [self._record],
                                             gradients, boundary=boundary, guess=guess, meshes=meshes)
        if guess is not None:
            self._source(self._guess, markings).add_adj_output(_with_values(Cofunction(self._problem.u.function_space().dual()), guess[0]))
        for variable, value in self._components(relevant, gradients, boundary, by_mesh):
            self._source(variable, markings).add_adj_output(value)
        self._system.collect_garbage()

    def _source(self, variable, markings: bool):
        """Where a derivative by a variable belongs: to what it was assigned from, which spares the adjoint of the assignment."""
        if markings and self._scheduled_tape is None:
            while not variable.is_control and (source := _copied_from(variable)) is not None and source.is_control_dependent:
                variable = source
        return variable

    @no_annotations
    def evaluate_tlm(self, markings: bool = False) -> None:
        """Add the tangent of the solution to the output's."""
        output, = self.get_outputs()
        if (markings and not output.is_control_dependent) or all(variable.tlm_value is None for variable in self.get_dependencies()):
            return
        values = np.empty(self._system.size)
        point = self._derivative_point()
        self._system.solve_tangent(point, self._setting, self._solution(), self._record, self._direction(), values)
        output.add_tlm_output(_with_values(Function(self._problem.u.function_space()), values))
        self._system.collect_garbage()

    @no_annotations
    def evaluate_hessian(self, markings: bool = False) -> None:
        """Add the derivatives of the adjoint's values, in the direction of the tangents, to the dependencies'."""
        output, = self.get_outputs()
        relevant = self._relevant(markings)
        if output.hessian_value is None or not relevant:
            return
        # Where there is no cotangent, or no tangent of the solution, it is zero.
        cotangent, second, tangent = (np.zeros(self._system.size) if value is None else local_values(value)
                                      for value in (output.adj_value, output.hessian_value, output.tlm_value))
        gradients, boundary, meshes = self._wanted(relevant)
        point = self._derivative_point()
        by_mesh = self._system.solve_second_adjoint(point, self._setting, self._solution(), self._record, cotangent, second,
                                                    self._direction(), tangent, gradients, boundary=boundary, meshes=meshes)
        for variable, value in self._components(relevant, gradients, boundary, by_mesh):
            variable.add_hessian_output(value)
        self._system.collect_garbage()

    def _check_conditions(self) -> None:
        """Refuse to replay with values that were given to a condition since, of which the tape has not saved the ones before."""
        for variable, value in zip(self._conditions, self._condition_values):
            if variable.checkpoint is None and variable.output.function_arg is not value:
                raise ValueError(f"a DirichletBC for '{self._problem.u.name()}' was given another value after the solve that is to be "
                                 "replayed, by set_value() or homogenize(), which pyadjoint does not see: make the condition from a "
                                 "Function or Constant, and assign to that")

    def _relevant(self, markings: bool) -> list:
        """The dependencies that derivatives are wanted by."""
        return [variable for variable in self.get_dependencies() if variable.is_control_dependent or not markings]

    def _wanted(self, relevant: list) -> tuple:
        """What is differentiated by: room for gradients by inputs and by boundary values, and meshes."""
        gradients = {index: np.empty((1, entry.size)) for index, (entry, variable) in enumerate(zip(self._system.inputs, self._inputs))
                     if variable in relevant}
        has_boundary = any(variable in relevant for variable in self._conditions)
        return (gradients, np.empty((1, self._system.size)) if has_boundary else None,
                [variable.output for variable in self._meshes if variable in relevant])

    def _components(self, relevant: list, gradients, boundary, by_mesh) -> Iterator[tuple]:
        """The derivatives by dependencies but the guess, with their variables."""
        for index, gradient in gradients.items():
            yield self._inputs[index], self._dual(index, gradient[0])
        for variable in self._conditions:
            if variable in relevant:
                yield variable, [self._boundary_cotangent(variable.output, boundary[0])]
        for variable in self._meshes:
            if variable in relevant:
                yield variable, by_mesh[variable.output]

    def _dual(self, index: int, values: np.ndarray):
        """A derivative by an input; in an object of the last evaluation where nobody else has that any more."""
        dual = self._duals.get(index)
        if dual is not None and self._may_reuse and sys.getrefcount(dual) <= _OURS_ALONE:
            set_local_values(dual, values)
            return dual
        dual = self._system.inputs[index].dual(values)
        if self._scheduled_tape is None:
            self._duals[index] = dual
        return dual

    def _boundary_cotangent(self, condition: DirichletBC, values: np.ndarray) -> DirichletBC:
        cotangent = _with_values(Function(self._problem.u.function_space()), values)
        for later in self._problem.bcs[self._problem.bcs.index(condition) + 1:]:
            later.zero(cotangent)  # where conditions overlap, the last one has given the value
        return condition.reconstruct(g=extract_subfunction(cotangent, condition.function_space()))

    def _direction(self) -> Direction:
        """The direction that the tangents of the dependencies make."""
        conditions = [variable.output.reconstruct(g=0) if variable.tlm_value is None else variable.tlm_value
                      for variable in self._conditions]
        return Direction(
            {index: _values_in(variable.output, variable.tlm_value) for index, variable in enumerate(self._inputs)
             if variable.tlm_value is not None},
            {variable.output: variable.tlm_value for variable in self._meshes if variable.tlm_value is not None},
            self._system.boundary_values(conditions),
            None if self._guess is None or self._guess.tlm_value is None else local_values(self._guess.tlm_value))


def _copied_from(variable):
    """The block variable that one is a mere copy of; None where it is none, or where the other is of another space."""
    source = assigned_from(variable)
    # A Function of a Real space can be assigned to any other. (In place of an assembled Cofunction there may be a checkpoint.)
    is_broadcast = source is not None and isinstance(source.output, Function) and is_real(source.output) and not is_real(variable.output)
    return None if is_broadcast else source


def _saved_values(variable) -> np.ndarray:
    """Rank-local values that the tape has saved; of what a variable is a copy of, rather than of another copy made for the purpose."""
    original = variable.output
    while (source := _copied_from(variable)) is not None:
        variable = source
    return _values_in(original, variable.saved_output)


def _values_in(original, value) -> np.ndarray:
    """Rank-local values of what pyadjoint has for an original: where not of its space, a number or a Function of a Real space."""
    if isinstance(value, Number) or (is_real(value) and not is_real(original)):
        value = Function(original.function_space()).assign(value, annotate=False)
    return local_values(value)


def _with_values(coefficient, values: np.ndarray):
    set_local_values(coefficient, values)
    return coefficient
