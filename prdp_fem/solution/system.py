"""A variational problem as a function of its inputs, and its derivatives, at PETSc's level.

With g the boundary values, continued by zero, a solution is u = g + w, where w is zero at boundary dofs; rows and columns of all
operators there are those of the identity. Derivatives are implicit: J λ̂ = … with J the derivative of the residual by the
solution, at the state that the solve has reached.
"""
from __future__ import annotations

import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import numpy as np
import ufl
from firedrake import Function
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl.algorithms import expand_derivatives

from prdp_fem.assembly.lifting import Lifting
from prdp_fem.assembly.residual import ResidualDerivatives
from prdp_fem.krylov.ksp import RefinedKSP, abandon_preconditioner, in_a_sentence, reset, set_up
from prdp_fem.krylov.nested import has_failed_inside
from prdp_fem.krylov.transposes import Krylov
from prdp_fem.memory.batch import Batch, chunks
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.context import condenses_locally
from prdp_fem.problem.firedrake_internals import (
    SolverContext,
    assemble_operators,
    boundary_expression,
    call_before_jacobian,
    has_block_variable,
    operators,
)
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import (
    Input,
    coefficients_of,
    local_values,
    same_bits,
    set_local_values,
    vector_like,
)
from prdp_fem.problem.point import NO_VALUES, Direction, Point
from prdp_fem.ranks.agreement import agree
from prdp_fem.ranks.finite import LARGEST, is_finite, require_finite
from prdp_fem.refinement.ladders import Setting, checked_setting, in_words
from prdp_fem.refinement.rules import Refinement
from prdp_fem.statistics import Statistics

__all__ = ["System"]


class _Work:
    """A context manager of what each solve enters; plain, since a small solve takes no longer than a few generators."""

    def __init__(self, kind: str, system: System, context: SolverContext | None):
        self._kind, self._event, self._system = kind, _EVENTS[kind], system
        self._context = None if context is None else context()

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        _ANNOTATION.__enter__()
        self._event.begin()
        if self._context is not None:
            try:
                self._context.__enter__()
            except BaseException as error:
                self._leave()
                self._system.spoil(error)
                raise

    def __exit__(self, kind: type | None, error: BaseException | None, traceback) -> None:
        try:
            if self._context is not None:
                self._context.__exit__(kind, error, traceback)
        finally:
            self._leave()
            if error is not None:
                self._system.spoil(error)
        if isinstance(error, PETSc.Error):
            said = in_a_sentence(error, f"the {self._kind} solve for '{self._system.forms.solution.name()}' came to no end")
            raise said from said.__cause__

    def _leave(self) -> None:
        self._event.end()
        _ANNOTATION.__exit__()
        seconds = _SECONDS[self._kind]
        vars(self._system.statistics)[seconds] += time.perf_counter() - self._start


def _numbers(setting: Setting | None) -> tuple | None:
    """What a setting of the moment has, to be compared faster than it is put in words."""
    if setting is None:
        return None
    return setting.rtol, setting.max_it, setting.budget, getattr(setting, "steps", None)


class System(ABC):
    """The solve of a problem, and its derivatives, as functions of the inputs.

    Parameters
    ----------
    forms : Forms
    linear_solver : firedrake.NonlinearVariationalSolver
        Of the problem linearised at a state: its KSP, options, nullspaces and operators are used for all derivatives.
    make_adjoint_solver : callable
        Makes such a solver, of the same options, for the adjoint of a problem.
    terms : Mapping of int to AffineTerm or CofunctionTerm
        The inputs that enter the residual by a matrix: nothing is assembled when their values change.
    ksp_prefix : str or None
        Options prefix of the KSP that settings are put on; None for the only iterative one.
    memory : Memory
        Where solves are made.
    assembles_terms : bool
        Whether forms that are assembled read the inputs of the terms all the same.

    Attributes
    ----------
    forms : Forms
    inputs : list of Input
    size : int
        Rank-local number of dofs of the solution.
    statistics : Statistics
    memory : Memory
    """

    def __init__(self, forms: Forms, linear_solver, make_adjoint_solver: Callable, terms: Mapping, ksp_prefix: str | None,
                 memory: Memory, *, assembles_terms: bool = False):
        self.forms = forms
        self.inputs = forms.inputs
        self.size = local_values(forms.solution).size
        self.statistics = Statistics()
        # Whether an error may have left something half-way, which is made anew before it is used again.
        self._is_spoilt = False
        self._terms = terms
        self._comm = forms.solution.function_space().mesh().comm
        self._largest_size = self._comm.allreduce(self.size, MPI.MAX)
        self._linear_solver = linear_solver
        self._make_adjoint_solver = make_adjoint_solver
        ksp = linear_solver.snes.getKSP()
        ksp.setOperators(*operators(linear_solver))
        self._context = SolverContext(linear_solver)
        self._needs_context = True
        self._krylov = Krylov(ksp, self._transposed_ksp, forms.solution.name(), ksp_prefix,
                              self._factorisation, self._null_spaces)
        # What the operator depends on that has changed since it was assembled: inputs by index, "mesh" and "state".
        self._changed: set = set()
        coordinates = [mesh.coordinates.dat for mesh in forms.meshes]
        self._coordinates = [(dat, np.array(dat.data_ro)) for dat in coordinates]
        self._mesh_versions: list = [None]*len(coordinates)
        self._mesh_stamp, self._assembled_stamp = 0, None
        self._restored: dict = {}
        # Of a user's own preconditioners: what they find by themselves.
        self._is_set_up_always = False
        self._lent: list[Input] = []
        self._lent_solution: Function | None = None
        with stop_annotating():
            self._boundary = Function(forms.solution.function_space())
            self._boundary_data: BoundaryData | None = None
            self._derivatives = ResidualDerivatives(forms)
            self._lifting = Lifting(forms)
        self._zero = vector_like(forms.solution)
        self._assembled_inputs = [(index, entry) for index, entry in enumerate(forms.inputs) if assembles_terms or index not in terms]
        self._has_fields_to_assemble = forms.operator_depends_on_solution or any(not entry.is_real for _, entry in self._assembled_inputs)
        self._constants = [index for index, entry in self._assembled_inputs if entry.is_real]
        # What the last solve was asked for, in numbers and in words, with the checksum of these; and
        # that which is to be compared by the next reduction, or zero.
        self._asked: tuple | None = ()
        self._words, self._checksum_of_words = "", 0
        self._checksum = 0
        # What ranks last compared where solves have no reduction that could carry a checksum.
        self._compared: tuple | None = None
        # Where J was last assembled.
        self._state = local_values(forms.solution) if forms.operator_depends_on_solution else None
        self._place_in(memory)

    def move_to(self, memory: Memory) -> None:
        """Make solves in another memory from now on, where everything is assembled again."""
        with self._context():
            reset(self._linear_solver.snes.getKSP())
        if "_adjoint_solver" in vars(self):
            with self._adjoint_context():
                reset(self._adjoint_solver.snes.getKSP())
        self._needs_context = True
        self.invalidate()
        self._place_in(memory)

    def _place_in(self, memory: Memory) -> None:
        """Have all vectors and matrices that solves use in a memory."""
        self.memory = memory
        memory.statistics = self.statistics
        # States or tangents, right-hand sides of adjoint and tangent solves, and multipliers.
        self._states, self._cotangents, self._multipliers = (memory.batches(self._zero) for _ in range(3))
        self._boundary_entries = memory.entries(self._zero, self.forms.boundary_dofs)
        for term in self._terms.values():
            term.move_to(memory)
        self._krylov.forget_operators()
        self._operator_is_current = self._adjoint_is_current = False

    @cached_property
    def _adjoint_solver(self):
        """Firedrake's solver of the adjoint problem, for methods and preconditioners that cannot be transposed."""
        solver = self._make_adjoint_solver(self.forms.adjoint_problem(), is_adjoint=True)
        self._have_state_followed(solver)
        return solver

    @cached_property
    def _adjoint_context(self) -> SolverContext:
        return SolverContext(self._adjoint_solver)

    @contextmanager
    def _transposed_ksp(self):
        solver = self._adjoint_solver
        with self._adjoint_context():
            if not self._adjoint_is_current:
                self._set_up(solver)
                self._adjoint_is_current = True
            yield solver.snes.getKSP()

    def _set_up(self, solver) -> None:
        """Assemble the operators of a linear solver, and set its KSP up; inside its context."""
        # Eisenstat's and Walker's hooks on the KSP would choose tolerances by the norms of a Newton iteration that there is not.
        solver.snes.setUseEW(False)
        if self._state is None:
            # Preconditioners find it as the state of the Newton step that a linear solve is to Firedrake.
            self.forms.solution.dat.zero()
        # The state that operators depend on is in the forms' own Function: the solver's may be any.
        assemble_operators(solver, self._zero)
        set_up(solver.snes.getKSP(), *self.memory.operators(*operators(solver)), self.forms.solution.name())

    def serve_users_code(self, named: Sequence, solution: Function) -> None:
        """Have a user's preconditioners, which find coefficients by themselves, find what a solve is made with.

        Parameters
        ----------
        named : sequence
            The user's objects that they find.
        solution : Function
            The user's.
        """
        # What else they read, nobody knows.
        self._is_set_up_always = True
        self._lent = [entry for entry in self.inputs if any(entry.original is other for other in named)]
        if self._state is not None and any(solution is other for other in named):
            self._lent_solution = solution
            for solver in self._solvers:
                self._have_state_followed(solver)

    def _have_state_followed(self, solver) -> None:
        """Have the user's solution be the state wherever operators are assembled."""
        if self._lent_solution is not None:
            call_before_jacobian(solver, lambda state: set_local_values(
                self._lent_solution, local_values(self.forms.solution)))

    @property
    def _solvers(self) -> list:
        """Firedrake's solvers that there are."""
        return [self._linear_solver]

    @contextmanager
    def _lending(self, context: Callable | None):
        """Inside, a user's objects have the values that a solve is made with."""
        users = None if self._lent_solution is None else local_values(self._lent_solution)
        for entry in self._lent:
            entry.lend()
        try:
            with nullcontext() if context is None else context():
                yield
        finally:
            for entry in self._lent:
                entry.take_back()
            if users is not None:
                set_local_values(self._lent_solution, users)

    def check_setting(self, setting: Setting) -> None:
        """Find the KSP that settings are put on, which may be inside a preconditioner that only exists once it is set up.

        Raises
        ------
        ValueError
            Where there is none, or more than one and none was named.
        """
        refined = self._krylov.refined
        refined.find_without_setup()
        if not (refined.is_found or self._may_end_the_process):
            self._find_inside(refined, self._context, lambda: self._linearise(Point(self.values()), local_values(self.forms.solution)))

    @cached_property
    def _may_end_the_process(self) -> bool:
        """Whether to set the KSP up is no mere try: then the first solve finds what is inside."""
        return condenses_locally(self._linear_solver.parameters)

    def _find_inside(self, refined: RefinedKSP, context: SolverContext, set_up: Callable[[], None]) -> None:
        """Set a KSP up to find the one that settings are put on.

        The values of the moment may be none to solve with, and others come later: then the first solve finds it.
        """
        if self._is_spoilt:
            self._renew()
        with stop_annotating(), self._lending(context):
            try:
                set_up()
            except ConvergenceError:
                self._is_spoilt = True
                return
            self._is_spoilt = self._agreed(has_failed_inside(refined.ksp))
            refined.find()

    def agreed_setting(self, refinement: Refinement | None) -> Setting | None:
        """What a refinement asks of the next solve, the same on all ranks. Collective.

        With another number of iterations on each rank, all would wait for each other for ever.
        Solves that reduce what has changed, before they iterate, compare a checksum of the setting
        on the way. Others have it compared here, but only where the refinement was stepped or
        changed since the last time, which ranks do together, whatever level each has come to.

        Raises
        ------
        TypeError, ValueError
            For what is no setting; on all ranks, where they have different ones.
        """
        # Settings of a user's class can have changed since they were looked at.
        setting = None if refinement is None else checked_setting(refinement.setting)
        if not (self.is_serial or self._has_fields_to_assemble):
            changes = None if refinement is None else refinement.changes
            asked = refinement, changes, _numbers(setting)
            if asked != self._compared:
                self._compare(in_words(setting))
                self._compared = asked
        return setting

    def _compare(self, words: str) -> None:
        """Raise, on all ranks, where they are asked for different settings. Collective."""
        agree(self._comm, lambda: words,
              f"settings of the solve for '{self.forms.solution.name()}'",
              "give the refinement comm=, and have all ranks step and set it alike")

    def _compare_constants(self, point: Point) -> None:
        """Raise, on all ranks, where their Constants have different values. Collective."""
        agree(self._comm, lambda: [point.values[index].tolist() for index in self._constants],
              f"values of the Constants that '{self.forms.solution.name()}' depends on",
              "broadcast those of one rank, as by comm.bcast")

    def check_derivative(self, index: int) -> None:
        """Raise a TypeError where UFL cannot differentiate the problem by an input."""
        if index not in self._terms and index in self._derivatives.inputs:
            self._derivatives.check(index)

    # What is done at each solve

    def _work_on(self, kind: str, context: SolverContext | None = None) -> _Work:
        """Time and log what is inside, and keep its assemblies off pyadjoint's tape."""
        if self._is_spoilt:
            self._renew()
        # Preconditioners may ask for forms and options at their first use, inside KSPSolve.
        context = context or (self._context if self._needs_context else None)
        if self._lent or self._lent_solution is not None:
            context = partial(self._lending, context)
        return _Work(kind, self, context)

    def spoil(self, error: BaseException) -> None:
        """Have all that an error may have left half-way made anew before it is used again, as a new solver has it."""
        self._is_spoilt = True
        if isinstance(error, PETSc.Error):
            for ksp in self._ksps():
                abandon_preconditioner(ksp)

    def _ksps(self) -> list[PETSc.KSP]:
        """The KSPs of solves."""
        solvers = [self._linear_solver, self._adjoint_solver] if "_adjoint_solver" in vars(self) else [self._linear_solver]
        return [solver.snes.getKSP() for solver in solvers]

    def _renew(self) -> None:
        self.move_to(self.memory)
        self._is_spoilt = False

    def values(self, without: Sequence[int] = ()) -> list[np.ndarray]:
        """Rank-local values of the user's coefficients as they are now, not to be written to; empty for those left out."""
        return [NO_VALUES if index in without else entry.present_values() for index, entry in enumerate(self.inputs)]

    def boundary_values(self, conditions) -> np.ndarray | None:
        """Rank-local values of boundary conditions, zero elsewhere; None where they are zero on all ranks."""
        if all(isinstance(boundary_expression(condition), ufl.classes.Zero) for condition in conditions):
            return None
        with stop_annotating():
            self._boundary.dat.zero()
            for condition in conditions:
                condition.apply(self._boundary)
        values = local_values(self._boundary)
        # Not by PETSc's norm: on several ranks that of NaN may be zero.
        return values if self._agreed(bool(values.any())) else None

    def boundary_data(self) -> BoundaryData:
        """The boundary values that the problem's conditions give as they are now, as a function of what they depend on."""
        if self._boundary_data is None or not self._boundary_data.is_current:
            self._boundary_data = BoundaryData(self.forms)
        return self._boundary_data

    def mesh_stamp(self) -> int:
        """A number that changes when a mesh has moved. Collective."""
        versions = [coordinates.dat_version for coordinates, _ in self._coordinates]
        if versions == self._mesh_versions:
            return self._mesh_stamp
        # pyadjoint writes the same coordinates again at each replay: only other values count.
        moved = [not same_bits(coordinates.data_ro, before) for coordinates, before in self._coordinates]
        if self._agreed(any(moved)):
            for coordinates, before in self._coordinates:
                before[...] = coordinates.data_ro
            self._mesh_stamp += 1
        self._mesh_versions = versions
        return self._mesh_stamp

    @property
    def solved_mesh_stamp(self) -> int:
        """What :meth:`mesh_stamp` gave at the last solve."""
        return self._mesh_stamp

    @property
    def comm(self) -> MPI.Comm:
        """The ranks that share the mesh."""
        return self._comm

    @property
    def is_serial(self) -> bool:
        """Whether there is one rank only."""
        return self._comm.size == 1

    def collect_garbage(self) -> None:
        """Destroy the PETSc objects that Python has dropped on all ranks, as Firedrake's solvers do after each solve."""
        if not self.is_serial:
            PETSc.garbage_cleanup(self._comm)

    def _agreed(self, flag: bool) -> bool:
        """Whether a flag is true on any rank."""
        return flag if self.is_serial else self._comm.allreduce(flag, MPI.LOR)

    def forget_tapes_of_before(self, originals: Sequence) -> None:
        """Have all ranks put the present values of something on a tape, where any would. Collective.

        Python finds a tape in a reference cycle to be garbage at another time on each rank. Where it has not yet, pyadjoint would take
        what that tape has saved for what there is now; and where it has, it would make a copy, which is collective.
        """
        if self.is_serial:
            return
        are_new = np.array([not has_block_variable(original) for original in originals], dtype=np.intc)
        self._comm.Allreduce(MPI.IN_PLACE, are_new, MPI.MAX)
        for original, is_new in zip(originals, are_new):
            if is_new:
                original.clear_block_variable()

    def restore_mesh(self, variable) -> None:
        """Move a mesh to where a block variable on the tape has it. Collective."""
        mesh, checkpoint = variable.output, variable.checkpoint
        if checkpoint is None:
            return
        coordinates = mesh.coordinates.dat
        # Restoring costs more than a small solve, and hardly ever changes anything.
        # By identity: to hash a mesh takes UFL longer than all the rest.
        last, version = self._restored.get(id(mesh), (None, None))
        # By ranks together: on some a tape of before may still have the checkpoint, as Python looks for garbage at its own time on each.
        if self._agreed(last is not checkpoint or version != coordinates.dat_version):
            if self._agreed(not same_bits(checkpoint.dat.data_ro, coordinates.data_ro)):
                coordinates.data_wo[...] = checkpoint.dat.data_ro
            self._restored[id(mesh)] = checkpoint, coordinates.dat_version

    def invalidate(self) -> None:
        """Have everything assembled again at the next solve."""
        self._assembled_stamp = None

    def _write_inputs(self, point: Point, solution: np.ndarray | None = None) -> bool:
        """Bring the copies that forms read up to date; whether the state is another than where J was assembled."""
        stamp = self.mesh_stamp()
        moved = stamp != self._assembled_stamp
        if not (moved or self._assembled_inputs or self._state is not None):
            return False
        changed = [entry.differs(point.values[index]) for index, entry in self._assembled_inputs]
        state_changed = solution is not None and self._state is not None and not same_bits(solution, self._state)
        if self._comm.size > 1 and self._has_fields_to_assemble:
            # A field may have changed on some ranks only, but halo exchanges and assembly are collective.
            constants = b"".join(point.values[index].tobytes() for index in self._constants)
            one, other = self._checksum, zlib.crc32(constants)
            flags = np.array([*changed, state_changed, one, -one, other, -other])
            self._comm.Allreduce(MPI.IN_PLACE, flags, MPI.MAX)
            *changed, state_changed, one, minus_one, other, minus_other = flags.tolist()
            self._checksum = 0
            if one != -minus_one:
                self._compare(self._words)
            if other != -minus_other:
                self._compare_constants(point)
        if moved or any(changed):
            indices = {index for (index, _), is_changed in zip(self._assembled_inputs, changed) if is_changed}
            for index in indices:
                self.inputs[index].write(point.values[index])
            in_operator = {index for index in indices if self.inputs[index].in_operator} | ({"mesh"} if moved else set())
            if in_operator:
                self._operator_is_current = False
                self._changed |= in_operator
            self._forget(indices, moved)
            self._assembled_stamp = stamp
        return bool(state_changed)

    def _forget(self, changed: set[int], moved: bool) -> None:
        """Have assembled again what depends on inputs that have changed, or on a mesh that has moved."""
        for term in self._terms.values():
            if moved or term.parameters & changed:
                term.forget()

    def _linearise(self, point: Point, solution: np.ndarray | None = None) -> None:
        """Bring all that is assembled up to date with the inputs of a point and, where it depends on that, a solution."""
        if self._write_inputs(point, solution):
            self._operator_is_current = False
            self._changed.add("state")
        if not self._operator_is_current or self._is_set_up_always:
            if self._state is not None:
                self._state[:] = solution
                set_local_values(self.forms.solution, solution)
            with nullcontext() if self._needs_context else self._context():
                self._set_up(self._linear_solver)
            self._needs_context = self._context.is_needed
            self._krylov.operator_changed(frozenset(self._changed))
            self._changed.clear()
            self.statistics.assemblies += 1
            self._operator_is_current, self._adjoint_is_current = True, False

    def _only_enters_terms(self, varying: Mapping[int, np.ndarray]) -> bool:
        """Whether what varies enters the residual by a matrix only: then nothing is assembled between rows."""
        return varying.keys() <= self._terms.keys()

    def values_read(self, inputs: Iterable[int], meshes: Sequence = (), *,
                    is_second: bool = False) -> set[int]:
        """The inputs whose values a derivative of the solve depends on.

        Parameters
        ----------
        inputs : iterable of int
            What is differentiated by, or in a direction of.
        meshes : sequence of MeshGeometry
            Meshes whose coordinates are.
        is_second : bool
            Whether it is a second derivative.

        Returns
        -------
        set of int
        """
        read = set(self._read_by_operator)
        if meshes or is_second:
            return read | self._derivatives.inputs
        for index in inputs:
            read |= (self._terms[index].parameters if index in self._terms
                     else self._derivatives.values_read(index))
        return read

    @cached_property
    def _read_by_operator(self) -> set[int]:
        """The inputs whose values the operators of derivatives depend on."""
        # Not by in_operator: a Jacobian that UFL has not expanded yet names all of the residual.
        jacobian = expand_derivatives(self.forms.jacobian)
        found = self.forms.indices(coefficients_of(jacobian, self.forms.problem.Jp))
        return found | self.forms.others

    @property
    def unread_inputs(self) -> Container[int]:
        """The inputs whose values derivatives do not look at where :meth:`needs_solutions` is False."""
        return () if self._state is not None else self._terms.keys()

    def needs_solutions(self, indices: Iterable[int]) -> bool:
        """Whether derivatives by inputs depend on the solution."""
        return self._state is not None or not self._terms.keys() >= set(indices)

    # Whether :meth:`solve` and :meth:`solve_adjoint` take, and write to, tensors on the device that the memory is of: for solutions,
    # cotangents, and those inputs in ``device_inputs``. Everything else is on the host.
    takes_device_rows = False

    @property
    def device_inputs(self) -> Container[int]:
        """The inputs whose values, and gradients, may be tensors on the device."""
        return self._terms.keys() if self.takes_device_rows else ()

    # The solve

    def solve(self, point: Point, setting: Setting | None, solutions: np.ndarray,
              varying: Mapping[int, np.ndarray] | None = None, *, largest: float = LARGEST) -> list:
        """Solve at a point, or at a batch of them.

        Parameters
        ----------
        point : Point
        setting : Setting or None
            How far the KSP goes; None for what its options say.
        solutions : numpy.ndarray
            Shape (batch, n), written to: rank-local dofs.
        varying : Mapping of int to numpy.ndarray
            Inputs that differ from row to row, shape (batch, size), instead of their values in the point.
        largest : float
            What is larger counts as infinite: the largest number of the type that solutions will be
            converted to.

        Returns
        -------
        list
            The record of each row: what its derivatives ask for beside the solution.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the solve fails, or gives a number that is not finite; with the row as attribute
            ``row``.
        ValueError
            On all ranks, where they have different settings and that shows before the solve.
        """
        if not self.is_serial:
            asked = _numbers(setting)
            if asked != self._asked:
                self._asked, self._words = asked, in_words(setting)
                self._checksum_of_words = zlib.crc32(self._words.encode())
            self._checksum = self._checksum_of_words
        before = self.statistics.solves
        try:
            records = self._solve(point, setting, solutions, {} if varying is None else varying)
        except ConvergenceError as error:
            error.row = self.statistics.solves - before
            raise
        # Also where PETSc has computed no norm, or one before the last thing that it did.
        if not (self.is_serial and is_finite(solutions, largest)):
            self._require_finite([solutions], self._describe_solution, largest)
        return records

    def _describe_solution(self, _: int) -> str:
        return (
            f"the forward solve for '{self.forms.solution.name()}' gave NaN or infinity: look for "
            "them in the controls, coefficients, boundary values and the guess, or for an operator "
            "that is singular")

    @abstractmethod
    def _solve(self, point: Point, setting: Setting | None, solutions: np.ndarray,
               varying: Mapping[int, np.ndarray]) -> list:
        """What :meth:`solve` does without its checks; ``statistics.solves`` counts rows done."""

    def _require_finite(self, arrays: Sequence, describe: Callable[[int], str],
                        largest: float = LARGEST) -> None:
        require_finite(self._comm, arrays, describe, largest=largest)

    # Whether records of solves hold fields. Then these have methods ``fields_of(record)`` and ``with_fields(record, fields)``, by which
    # somebody else may keep them.
    keeps_fields = False

    # What looks at the direct solves of its steps, and at their null spaces, where those are not
    # made by the same KSP as derivatives.
    _factorisation = None
    _null_spaces = None

    # Its derivatives

    # Whether the derivative by the guess is other than zero.
    depends_on_guess = False
    # Whether derivatives look at the boundary values, of which there is no more to be seen in the solution.
    needs_boundary = False

    def solve_adjoint(self, point: Point, setting: Setting | None, cotangents: np.ndarray, solutions: np.ndarray | None, records: list,
                      gradients: Mapping[int, np.ndarray], *, varying: Mapping[int, np.ndarray] | None = None,
                      boundary: np.ndarray | None = None, guess: np.ndarray | None = None,
                      meshes: Iterable = (), largest: float = LARGEST) -> dict:
        """From the derivatives of numbers E by solutions at a point, or at a batch of them, those by what u depends on.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        cotangents : numpy.ndarray
            Shape (batch, n): rank-local ∂E/∂u. Boundary entries are left out of the system: a truncated iteration would see
            them.
        solutions : numpy.ndarray or None
            Shape (batch, n): what :meth:`solve` gave; None where :meth:`needs_solutions` says so, and nothing else is asked for.
        records : list
            What :meth:`solve` returned.
        gradients : Mapping of int to numpy.ndarray
            By inputs, shape (batch, size), written to: -(∂F/∂m)ᵀ λ, by dofs (no mass matrix in between). For a Constant or a
            Real space the sum over all ranks, on every rank.
        varying : Mapping of int to numpy.ndarray
            As in :meth:`solve`.
        boundary : numpy.ndarray or None
            Shape (batch, n), written to where given: the derivative by the boundary values, zero at other dofs.
        guess : numpy.ndarray or None
            Shape (batch, n), written to where given: the derivative by the guess.
        meshes : iterable of MeshGeometry
            Meshes whose coordinates to differentiate by.
        largest : float
            As in :meth:`solve`, for derivatives.

        Returns
        -------
        dict of MeshGeometry to Cofunction
            The derivatives by coordinates, of the last row.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the solve fails, or where a cotangent or a derivative is not finite; with the row
            as attribute ``row``.
        """
        if not self.is_serial:
            self._require_finite_cotangents(cotangents)
        before = self.statistics.adjoint_solves
        try:
            by_mesh = self._solve_adjoint(point, setting, cotangents, solutions, records, gradients,
                                          {} if varying is None else varying, boundary, guess,
                                          meshes)
            self._require_finite_derivatives(gradients, boundary, guess, by_mesh, largest)
        except ConvergenceError as error:
            # What is not finite in a cotangent is so in all that is made of it: one looks there
            # only where something has failed.
            self._require_finite_cotangents(cotangents)
            if "row" not in vars(error):
                error.row = self.statistics.adjoint_solves - before
            raise
        return by_mesh

    def _require_finite_cotangents(self, *cotangents) -> None:
        # At boundary dofs, too: what does not matter there is still a sign that a loss is wrong.
        self._require_finite(cotangents, lambda _: (
            f"the cotangent of '{self.forms.solution.name()}' holds NaN or infinity: look, in what "
            "is computed of the solution, for an operation whose derivative is not finite, such as "
            "0/0 or the square root of zero"))

    def _require_finite_derivatives(self, gradients: Mapping, boundary: np.ndarray | None,
                                    guess: np.ndarray | None, by_mesh: Mapping,
                                    largest: float = LARGEST) -> None:
        results = [*gradients.values(), *(rows for rows in (boundary, guess) if rows is not None)]
        if by_mesh:
            results += [local_values(cofunction)[None] for cofunction in by_mesh.values()]
        if self.is_serial and all([is_finite(rows, largest) for rows in results]):
            return

        def describe(place: int) -> str:
            names = [f"'{self.inputs[index].name}'" for index in gradients]
            names += ["the boundary values"]*(boundary is not None)
            names += ["the guess"]*(guess is not None) + ["the mesh's coordinates"]*len(by_mesh)
            return (f"the derivative by {names[place]} of the solve for "
                    f"'{self.forms.solution.name()}' holds NaN or infinity: look for a derivative "
                    "that does not exist there, such as that of a square root at zero, for an "
                    "adjoint solve that diverges, or for numbers that are too large")
        self._require_finite(results, describe, largest)

    def _solve_adjoint(self, point: Point, setting: Setting | None, cotangents: np.ndarray,
                       solutions: np.ndarray | None, records: list,
                       gradients: Mapping[int, np.ndarray], varying: Mapping[int, np.ndarray],
                       boundary: np.ndarray | None, guess: np.ndarray | None,
                       meshes: Iterable) -> dict:
        """What :meth:`solve_adjoint` does without its checks; ``statistics`` counts rows done."""
        dofs, by_mesh = self.forms.boundary_dofs, {}
        if guess is not None:
            guess[:] = 0.0
        by_form = boundary is not None or bool(meshes) or not gradients.keys() <= self._terms.keys()
        moves = by_form or self._state is not None or not self._only_enters_terms(varying)
        with self._work_on("adjoint"):
            if by_form:
                point = point.on(self.memory)  # once for all rows
            for rows in chunks(len(cotangents), self._chunk_size(moves)):
                row = rows.start
                if row == 0 or moves:
                    at = point.at(varying, row) if moves else point
                    self._linearise(at, None if solutions is None else solutions[row])
                    if by_form:
                        self._require_solution(at, setting, solutions[row], gradients, meshes)
                    solve = self._krylov.transposed_solver(setting)
                multipliers = self._solve_transposed(solve, cotangents[rows])
                if by_form:
                    self._derivatives.at(at.on(self.memory), self.memory.on_host(solutions[row]), multipliers.values(0))
                for index, gradient in gradients.items():
                    self._gradient(index, multipliers, gradient[rows])
                if boundary is not None:
                    boundary[row] = 0.0
                    boundary[row, dofs] = self.memory.on_host(cotangents[row])[dofs] + self._derivatives.by_solution()[dofs]
                by_mesh = {mesh: self._derivatives.by_mesh(mesh) for mesh in meshes}
        return by_mesh

    def _require_solution(self, point: Point, setting: Setting | None, solution: np.ndarray,
                          inputs: Iterable[int], meshes: Iterable) -> None:
        """Raise where a derivative is to be one of a solution that is none; collective.

        Parameters
        ----------
        point, setting, solution
            Of a solve, at which the operator is.
        inputs, meshes : iterable
            What to differentiate by: the derivative by a right-hand side is a matter of the
            operator alone, where that does not depend on the solution.
        """
        if self._krylov.may_hide_residuals and (
                self._state is not None or any(self.inputs[index].in_operator for index in inputs)
                or meshes):
            b, w = self._system_at(point, self.memory.on_host(solution))
            self._krylov.require_solution(setting, b, w)

    @abstractmethod
    def _system_at(self, point: Point, solution: np.ndarray) -> tuple[PETSc.Vec, PETSc.Vec]:
        """b and w, whose residual b - A w is that of a solution, where the operator is."""

    def _chunk_size(self, moves: bool) -> int:
        """What :func:`chunks` is told of the size of a row, the same on all ranks: all of a chunk where operators differ between rows."""
        return sys.maxsize if moves else self._largest_size

    def _solve_transposed(self, solve: Callable, cotangents) -> Batch | DeviceBatch:
        """The rows λ from those of an array, or of a tensor on the device."""
        inner, multipliers = self._inner(cotangents), self._multipliers(len(cotangents))
        statistics = self.statistics
        for cotangent, multiplier in zip(inner.vectors, multipliers.vectors):
            statistics.adjoint_iterations += solve(cotangent, multiplier)
            statistics.adjoint_solves += 1
        return multipliers

    def _inner(self, cotangents) -> Batch | DeviceBatch:
        """Rows of cotangents, zero at boundary dofs."""
        inner = self._cotangents(len(cotangents))
        inner.fill_times_zero(cotangents, self._boundary_entries)
        return inner

    def _gradient(self, index: int, multipliers: Batch | DeviceBatch, out) -> None:
        """-(∂F/∂m)ᵀ λ for some rows; where it is assembled for one, at which the derivatives are."""
        if index in self._terms:
            self._terms[index].transposed_products(multipliers, out)
        else:
            out[0] = self._derivatives.by_input(index)

    def solve_tangent(self, point: Point, setting: Setting | None, solution: np.ndarray, record, direction: Direction,
                      out: np.ndarray) -> None:
        """The tangent linear solve: the derivative of the solution in a direction of what it depends on.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        solution : numpy.ndarray
            What :meth:`solve` gave at the point.
        record
            What :meth:`solve` returned.
        direction : Direction
        out : numpy.ndarray
            Rank-local, written to.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the solve fails, or gives a number that is not finite.
        """
        self._solve_tangent(point, setting, solution, record, direction, out)
        self._require_finite([out[None]], lambda _: (
            f"the tangent solve for '{self.forms.solution.name()}' gave NaN or infinity: look for "
            "them in the direction, or for a derivative that does not exist there, such as that of "
            "a square root at zero"))

    def _solve_tangent(self, point: Point, setting: Setting | None, solution: np.ndarray, record,
                       direction: Direction, out: np.ndarray) -> None:
        """What :meth:`solve_tangent` does without its checks."""
        tangent = self._states(1).vectors[0]
        with self._work_on("tangent"):
            self._linearise(point, solution)
            self._require_solution(point, setting, solution, direction.inputs, direction.meshes)
            b = self._right_hand_side_tangent(point, solution, direction)
            iterations = self._krylov.solver(setting, kind="tangent")(b, tangent)
            out[:] = self.memory.unload(tangent)
            self._put_boundary(out, direction.boundary)
        self.statistics.tangent_solves += 1
        self.statistics.tangent_iterations += iterations

    def _right_hand_side_tangent(self, point: Point, state: np.ndarray, direction: Direction) -> PETSc.Vec:
        """-(∂F/∂m) ṁ - J ġ at a state; zero at boundary dofs."""
        self._derivatives.at(point, state)
        b, total = self._cotangents(1), np.zeros(self.size)
        for index, values in direction.inputs.items():
            total += (self._terms[index].products(values[None], self._multipliers(1)).values(0) if index in self._terms
                      else self._derivatives.in_direction(index, values))
        for mesh, values in direction.meshes.items():
            total += self._derivatives.in_mesh_direction(mesh, values)
        total[self.forms.boundary_dofs] = 0.0
        b.fill(total)
        if direction.boundary is not None:
            self._lifting.subtract(direction.boundary, b.vectors[0], self.memory)
        return b.vectors[0]

    def _put_boundary(self, values: np.ndarray, boundary: np.ndarray | None) -> None:
        """Have boundary values, None for zero, where rank-local values are at boundary dofs."""
        values[self.forms.boundary_dofs] = 0.0
        if boundary is not None:
            values += boundary

    def solve_second_adjoint(self, point: Point, setting: Setting | None, solution: np.ndarray, record, cotangent: np.ndarray,
                             second_cotangent: np.ndarray, direction: Direction, tangent: np.ndarray, gradients: Mapping[int, np.ndarray],
                             *, boundary: np.ndarray | None = None, first_boundary: np.ndarray | None = None,
                             meshes: Iterable = ()) -> dict:
        """The derivative of what :meth:`solve_adjoint` gives, in a direction: the action of a Hessian.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        solution : numpy.ndarray
            What :meth:`solve` gave at the point.
        record
            What :meth:`solve` returned.
        cotangent, second_cotangent : numpy.ndarray
            Rank-local ∂E/∂u, and its derivative in the direction.
        direction : Direction
        tangent : numpy.ndarray
            What :meth:`solve_tangent` gave in the direction.
        gradients, boundary, meshes
            As in :meth:`solve_adjoint`, of one row, and written to.
        first_boundary : numpy.ndarray or None
            Written to where given: the derivative by the boundary values that :meth:`solve_adjoint` gives.
        """
        dofs, derivatives = self.forms.boundary_dofs, self._derivatives
        self._require_finite_cotangents(cotangent[None], second_cotangent[None])
        with self._work_on("adjoint"):
            self._linearise(point, solution)
            self._require_solution(point, setting, solution, [*gradients, *direction.inputs],
                                   [*meshes, *direction.meshes])
            solve = self._krylov.transposed_solver(setting)
            multipliers = self._solve_transposed(solve, cotangent[None])
            derivatives.at(point, solution, multipliers.values(0))
            if first_boundary is not None:
                first_boundary[0] = 0.0
                first_boundary[0, dofs] = cotangent[dofs] + derivatives.by_solution()[dofs]
            derivatives.toward(direction, tangent)
            second = second_cotangent + derivatives.second_by_solution()
            seconds = {index: derivatives.second_by_input(index) for index in gradients}
            by_mesh = {mesh: derivatives.second_by_mesh(mesh) for mesh in meshes}
            multipliers = self._solve_transposed(solve, second[None])
            derivatives.at(point, solution, multipliers.values(0))
            for index, gradient in gradients.items():
                self._gradient(index, multipliers, gradient)
                gradient[0] += seconds[index]
            if boundary is not None:
                boundary[0] = 0.0
                boundary[0, dofs] = second[dofs] + derivatives.by_solution()[dofs]
            for mesh, cofunction in by_mesh.items():
                cofunction += derivatives.by_mesh(mesh)
        self._require_finite_derivatives(gradients, boundary, None, by_mesh)
        return by_mesh


_ANNOTATION = stop_annotating()
_KINDS = ("forward", "adjoint", "tangent")
_EVENTS = {kind: PETSc.Log.Event(f"PRDP{kind.capitalize()}") for kind in _KINDS}
_SECONDS = {kind: f"{kind}_seconds" for kind in _KINDS}
