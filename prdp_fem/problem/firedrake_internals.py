"""The one place that touches what is private to Firedrake: a release may change names here."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import ufl
from firedrake import Constant, DirichletBC, Function, dmhooks
from firedrake.adjoint_utils.blocks.solving import extract_subfunction
from firedrake.adjoint_utils.checkpointing import DelegatedFunctionCheckpoint, maybe_disk_checkpoint
from firedrake.assemble import ExplicitMatrixAssembler, OneFormAssembler, get_assembler
from firedrake.interpolation import Interpolator
from firedrake.matrix import MatrixBase
from firedrake.petsc import PETSc
from petsctools import flatten_parameters
from pyadjoint import AdjFloat
from pyop2 import op2
from pyop2.types.mat import MatBlock
from tsfc.ufl_utils import compute_form_data

from prdp_fem.krylov.callbacks import CallbackPointers
from prdp_fem.krylov.entries import require_finite_entries
from prdp_fem.krylov.nested import is_self_contained
from prdp_fem.memory.memory import Memory

__all__ = [
    "Callbacks",
    "ConstantDerivative",
    "CoordinateAssembler",
    "MatrixAssembler",
    "Predecessor",
    "SolverContext",
    "applies_boundary_first",
    "assemble_directly",
    "assemble_into",
    "assemble_operators",
    "assigned_from",
    "boundary_expression",
    "call_before_jacobian",
    "constructor_arguments",
    "extract_subfunction",
    "has_block_variable",
    "has_saved_values",
    "has_schedule",
    "has_solved",
    "has_taped_number",
    "is_lost",
    "maybe_disk_checkpoint",
    "operators",
    "options_in_place",
    "pin_quadrature",
    "problem_of",
    "share_transfers",
    "spaces_of_basis",
]


class ConstantDerivative(Constant):
    """A derivative by a Constant.

    pyadjoint adds those of several solves up in place, which a Constant refuses.
    """

    def __iadd__(self, other):
        return self._ad_add(other)

    def __array__(self, dtype=None, copy=None):
        # pyadjoint makes a Constant of it, for which NumPy would go through UFL's indices, and fail
        # where there are two or more.
        return np.array(self.dat.data_ro.reshape(self.ufl_shape), dtype=dtype)


def operators(solver) -> tuple[PETSc.Mat, PETSc.Mat]:
    """The operator and the matrix to precondition it by, assembled or not."""
    context = solver._ctx
    return context._jac.petscmat, context._pjac.petscmat


# Options that PETSc reads at each solve.
_LOOKED_UP = ("view", "monitor", "reason", "error", "test")


class SolverContext:
    """What preconditioners that ask Firedrake for forms, and PETSc objects that ask for options,
    find in place.

    Called, it is a context manager. Where neither is the case, :attr:`is_needed` is False once the
    KSP is set up.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver
    """

    def __init__(self, solver):
        self._solver = solver
        problem = solver._ctx._problem
        solution_dm = solver.snes.getDM()
        forms = [form for form in (problem.F, problem.J, problem.Jp, problem.E) if form is not None]
        spaces = [entry.function_space() for form in forms for entry in form.coefficients()]
        spaces += [condition.function_space() for condition in problem.dirichlet_bcs()]
        dms = {
            dm.handle: dm
            for dm in (space.dm for space in spaces)
            if dm is not None and dm.handle != solution_dm.handle
        }
        # Coefficients' DMs need a context the first time only; Firedrake remembers the hooks of the
        # last one.
        self._dms = [*dms.values(), solution_dm]

    @property
    def is_needed(self) -> bool:
        """Whether solves of a KSP that is set up may look for it: to enter costs as much as one."""
        solver = self._solver
        ksp = solver.snes.getKSP()
        return (
            ksp.getType() == "python"
            or not is_self_contained(ksp)
            or bool(solver._transfer_operators)
            or any(operator.getType() == "python" for operator in operators(solver))
            or any(word in option for option in solver.parameters for word in _LOOKED_UP)
        )

    @contextmanager
    def __call__(self):
        solver = self._solver
        with ExitStack() as stack:
            stack.enter_context(solver.inserted_options())
            for hooks in [dmhooks.add_hooks(dm, solver, appctx=solver._ctx) for dm in self._dms]:
                stack.enter_context(hooks)
            del self._dms[:-1]
            for operator in solver._transfer_operators:
                stack.enter_context(operator)
            yield


@contextmanager
def options_in_place(solver):
    """What is there only while a solver's constructor has PETSc objects read options."""
    # Once there are hooks, Firedrake takes no others; and those that are kept would be all of a
    # solve's.
    hooks = dmhooks.add_hooks(
        solver.snes.getDM(), solver, appctx=solver._ctx, save="setup_hooks" in vars(solver)
    )
    with solver.inserted_options(), hooks:
        yield


def has_solved(solver) -> bool:
    """Whether a solver has begun to solve, so that its SNES, KSP and preconditioner are set up."""
    # Firedrake has these since the first solve, and sets up DMs by them from then on.
    return vars(solver).get("setup_hooks") is not None


def applies_boundary_first(solver) -> bool:
    """Whether a guess is given boundary values first; not with ``pre_apply_bcs=False``."""
    return solver._ctx.pre_apply_bcs


def call_before_jacobian(solver, callback) -> None:
    """Have a function of the state called before each assembly of a solver's operators."""
    solver._ctx._pre_jacobian_callback = callback


def spaces_of_basis(basis) -> list:
    """The spaces that vectors of a VectorSpaceBasis are in, or a MixedVectorSpaceBasis is for."""
    if hasattr(basis, "_bases"):
        return [basis._function_space]
    return [vector.function_space() for vector in basis._vecs]


def problem_of(solver):
    """The problem that a solver was made for."""
    return solver._ad_problem


def constructor_arguments(solver) -> dict:
    """The keyword arguments that a solver was made with, completed by what Firedrake has chosen.

    That is the ``options_prefix``, by which all that is inside a preconditioner looks up its
    options, and the ``mat_type`` of a solver that was made for assembled matrices.
    """
    arguments = {
        **solver._ad_kwargs,
        "ad_block_tag": solver.ad_block_tag,
        "options_prefix": solver.options_prefix,
    }
    problem = problem_of(solver)
    matrices = {"mat_type": problem.J, "pmat_type": problem.Jp}
    mat_types = {
        name: matrix.mat_type for name, matrix in matrices.items() if isinstance(matrix, MatrixBase)
    }
    if mat_types:
        given = flatten_parameters(arguments.get("solver_parameters") or {})
        arguments["solver_parameters"] = {**given, **mat_types}
    return arguments


def share_transfers(solver, other) -> None:
    """Have another solver transfer fields between meshes by what one was given for it."""
    other._ctx._transfer_manager = solver._ctx._transfer_manager


class Predecessor:
    """What a solver has been before it is initialised again.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver

    Attributes
    ----------
    is_set_up : bool
        Whether it has begun to solve, so that its SNES, KSP and preconditioner are set up for
        operators, and perhaps meshes, of its own.
    has_passed_on : bool
        Whether its SNES belongs to the solver that was initialised again.
    """

    # What petsctools keeps of the options, those of the command line and Python objects among them.
    _OF_OPTIONS = ("parameters", "to_delete", "appmngr", "_used_options")

    def __init__(self, solver):
        self._type, self._attributes = type(solver), dict(vars(solver))
        self.is_set_up = has_solved(solver)
        vars(solver).pop("setup_hooks", None)
        self.has_passed_on = False

    @property
    def snes(self) -> PETSc.SNES:
        """Its SNES."""
        return self._attributes["snes"]

    def pass_on(self, solver) -> None:
        """Give a solver that is initialised again SNES, options and transfers for its new ones."""
        self.has_passed_on = True
        # The new options are no longer used, which petsctools would report.
        solver._used_options.update(solver.to_delete)
        kept = ("snes", *self._OF_OPTIONS)
        vars(solver).update({name: self._attributes[name] for name in kept})
        solver._ctx._transfer_manager = self._attributes["_ctx"]._transfer_manager

    def restore(self, solver) -> None:
        """Have a solver be again what it has been, but for its preconditioner."""
        solver.__class__ = self._type
        vars(solver).clear()
        vars(solver).update(self._attributes)


class Callbacks:
    """What a SNES calls for objective, residual and Jacobian: Firedrake, on the host, whatever
    memory the SNES works in.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver
    memory : Memory
        Where the SNES works.
    """

    def __init__(self, solver, memory: Memory):
        self._solver = solver
        self._context = solver._ctx
        self.memory = memory
        self.renew()
        self._has_pattern = False
        self._pointers: CallbackPointers | None = None

    def renew(self) -> None:
        """Make their vectors anew, which an error can leave locked, from the next time on."""
        with self._context._F.dat.vec_ro as vector:
            self._residual = self.memory.vector(vector)
            self._residual_on_host = vector.duplicate()

    def attach(self) -> None:
        """Have the SNES call them: solvers of one space share its DM, which holds the callbacks."""
        if self._pointers is None:
            self._give()
            self._pointers = CallbackPointers(self._solver.snes)
        else:
            matrices = self.memory.places(*operators(self._solver))
            self._pointers.attach(self._residual, *matrices)

    def _give(self) -> None:
        context, snes = self._context, self._solver.snes
        if self.memory.device is None:
            context.set_objective(snes)
            # Not Firedrake's own vector, which each evaluation writes to: a SNES that tries a step
            # and refuses it still has the residual of where it stands.
            snes.setFunction(context.form_function, self._residual)
            snes.setJacobian(self._form_jacobian_on_host, *operators(self._solver))
        else:
            if not self._has_pattern:
                # The first assembly changes what places there are in a matrix.
                assemble_operators(self._solver, self._residual_on_host)
                self._has_pattern = True
            snes.setObjective(self._form_objective if context._problem.E else None)
            snes.setFunction(self._form_function, self._residual)
            snes.setJacobian(self._form_jacobian, *self.memory.places(*operators(self._solver)))

    def _form_objective(self, snes, x):
        return self._context.form_objective(snes, self.memory.to_host(x))

    def _form_function(self, snes, x, f):
        self._context.form_function(snes, self.memory.to_host(x), self._residual_on_host)
        self.memory.load(self._residual_on_host.array_r, f)

    def _form_jacobian(self, snes, x, J, P):
        A, P = operators(self._solver)
        self._form_jacobian_on_host(snes, self.memory.to_host(x), A, P)
        self.memory.operators(A, P)

    def _form_jacobian_on_host(self, snes, x, J, P):
        self._context.form_jacobian(snes, x, J, P)
        require_finite_entries(self._context._x.name(), J, P)


def assemble_operators(solver, state: PETSc.Vec) -> None:
    """Assemble the operators anew from the present values of their coefficients, with nullspaces
    attached; inside its context.
    """
    context = solver._ctx
    # A user's promise that the Jacobian is constant makes Firedrake skip the assembly: whoever
    # calls this knows better.
    context._jacobian_assembled = False
    context.form_jacobian(solver.snes, state, *operators(solver))


def assemble_directly(solver) -> None:
    """Have a solver assemble its residual without needless questions, and its operators, where they
    allow it, in coordinate format.
    """
    context = solver._ctx
    context._assemble_residual = partial(assemble_into, context._assemble_residual.__self__)
    if context._post_jacobian_callback is not None:
        return  # it may change the pattern of the matrix, which PETSc's plan is made for
    context._assemble_jac = _fastest(context._assembler_jac, context._jac)
    if context._pjac is not context._jac:
        context._assemble_pjac = _fastest(context._assembler_pjac, context._pjac)


def _fastest(assembler, matrix):
    if CoordinateAssembler.serves(assembler, matrix):
        return CoordinateAssembler(assembler, matrix)
    return assembler.assemble


class MatrixAssembler:
    """Assembles a bilinear form into a matrix of its own, with zero rows and columns where there
    are boundary conditions.

    Parameters
    ----------
    form : ufl.Form
    conditions : list of DirichletBC
    parameters : dict or None
        For the form compiler.
    """

    def __init__(self, form: ufl.Form, conditions: list, parameters: dict | None):
        assembler = get_assembler(
            form, bcs=conditions, form_compiler_parameters=parameters, mat_type="aij", weight=0.0
        )
        self._matrix = assembler.allocate()
        self._assemble = _fastest(assembler, self._matrix)

    def __call__(self) -> PETSc.Mat:
        """The matrix, until the next call."""
        self._assemble(self._matrix)
        return self._matrix.petscmat


def assemble_into(assembler, tensor, current_state=None) -> None:
    """Assemble a linear form into a tensor that was made for it.

    Firedrake compares the two spaces at each call, which takes it longer than to assemble a small
    form.
    """
    if not isinstance(assembler, OneFormAssembler):
        assembler.assemble(tensor=tensor, current_state=current_state)
        return
    tensor.dat.zero()
    assembler.execute_parloops(tensor)
    for condition in assembler._bcs:
        assembler._apply_bc(tensor, condition, u=current_state)


class CoordinateAssembler:
    """Assembles a bilinear form into a matrix of Firedrake's, by PETSc's coordinate format.

    Firedrake's kernels write the tensors of all cells (and facets) into one array, and PETSc adds
    its entries up by a plan made once. Firedrake itself puts each tensor into the matrix as it is
    computed, which takes longer than to compute it, and takes those of other ranks in the order in
    which they arrive; here assembling again gives the same bits, whatever the number of ranks.

    Parameters
    ----------
    assembler : ExplicitMatrixAssembler
    matrix : firedrake.matrix.Matrix
        What it has allocated; its pattern is changed by nobody else.
    """

    def __init__(self, assembler, matrix):
        self._assembler, self._matrix = assembler, matrix
        # The entries of all tensors and the diagonal's, and how many those of the tensors are; None
        # before the first call.
        self._values: np.ndarray | None = None
        self._size = 0
        self._loops: list = []

    @staticmethod
    def serves(assembler, matrix) -> bool:
        """Whether the matrix is a plain one, and so is the set of entities of each integral."""
        return (
            isinstance(assembler, ExplicitMatrixAssembler)
            and matrix.petscmat.getType() in ("seqaij", "mpiaij")
            and all(isinstance(condition, DirichletBC) for condition in matrix.bcs)
            and all(
                type(map_) is op2.Map and not map_.iterset._extruded
                for loop in assembler.parloops(matrix)
                for map_ in loop.arguments[0].maps
            )
        )

    def __call__(self, tensor) -> None:
        """Assemble into the matrix, which Firedrake passes."""
        assert tensor is self._matrix
        if self._values is None:
            self._values = self._plan()
        self._values[: self._size] = 0.0
        for loop in self._loops:
            loop()
        self._matrix.petscmat.setValuesCOO(self._values)

    def _plan(self) -> np.ndarray:
        """Have PETSc plan where entries go, and return where they will be written."""
        parts = [_ElementTensors(loop) for loop in self._assembler.parloops(self._matrix)]
        diagonal, diagonal_values = self._diagonal()
        rows, columns = zip(*(part.indices() for part in parts), (diagonal, diagonal))
        mat = self._matrix.petscmat
        mat.setPreallocationCOO(np.concatenate(rows), np.concatenate(columns))
        mat.setOption(PETSc.Mat.Option.KEEP_NONZERO_PATTERN, True)  # as PyOP2 has it
        bounds = np.cumsum([0, *(part.size for part in parts)])
        self._size = bounds[-1]
        values = np.concatenate([np.zeros(self._size), diagonal_values])
        self._loops = [
            part.loop_into(values[start:stop])
            for part, start, stop in zip(parts, bounds, bounds[1:])
        ]
        return values

    def _diagonal(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that this rank owns, and their values: those of boundary rows; zero where there
        is only room for factorisations.

        A matrix between two spaces has none.
        """
        space, trial_space = (argument.function_space() for argument in self._matrix.a.arguments())
        if space != trial_space:
            return np.empty(0, PETSc.IntType), np.empty(0)
        rows = np.arange(*self._matrix.petscmat.getOwnershipRange(), dtype=PETSc.IntType)
        values = Function(space)
        for condition in self._matrix.bcs:
            condition.reconstruct(g=self._assembler.weight).apply(values)
        with values.dat.vec_ro as vector:
            return rows, vector.array_r.copy()


class _ElementTensors:
    """The tensors of a loop over cells or facets, and where in the matrix they belong.

    Parameters
    ----------
    loop : pyop2.Parloop
        That puts them into a matrix.
    """

    def __init__(self, loop):
        self._loop = loop
        self._output = loop.arguments[0]
        # Dofs a node has, in rows and in columns: PyOP2 has a table of such pairs, of one entry
        # where there is one block.
        self._block_sizes = loop.global_kernel.arguments[0].dims[0][0]
        self._entities = self._output.maps[0].iterset
        self._shape = tuple(
            map_.arity * size for map_, size in zip(self._output.maps, self._block_sizes)
        )

    @property
    def size(self) -> int:
        """Number of entries, those of entities in the halo included."""
        return self._entities.total_size * int(np.prod(self._shape))

    def loop_into(self, values: np.ndarray):
        """The loop, writing to an array."""
        kernel, arguments = self._loop.global_kernel, self._loop.arguments
        dat = op2.Dat(
            self._entities**self._shape, values.reshape(-1, *self._shape), dtype=values.dtype
        )
        direct = op2.GlobalKernel(
            kernel.local_kernel,
            [op2.DatKernelArg(self._shape), *kernel.arguments[1:]],
            subset=kernel._subset,
        )
        return op2.Parloop(direct, self._loop.iterset, [op2.DatParloopArg(dat), *arguments[1:]])

    def indices(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns in the order of the entries; negative where nothing belongs."""
        if self._output.lgmaps is None:
            lgmaps = self._output.data.handle.getLGMap()
        else:
            lgmaps = self._output.lgmaps[0]
        iterated = self._loop.iterset
        mask = np.zeros(self._entities.total_size, dtype=bool)
        if isinstance(iterated, op2.Subset):
            mask[iterated.indices[: iterated.size]] = True
        else:
            mask[: iterated.size] = True
        dofs = []
        for map_, size, lgmap in zip(self._output.maps, self._block_sizes, lgmaps):
            local = (map_.values_with_halo[:, :, None] * size + np.arange(size)).reshape(
                len(mask), map_.arity * size
            )
            # The map of a block of a mixed matrix says that it has blocks, but counts dofs.
            is_block = isinstance(self._output.data, MatBlock)
            found = (lgmap.block_indices if is_block else lgmap.indices)[local]
            found[~mask] = -1
            dofs.append(found)
        rows, columns = np.broadcast_arrays(dofs[0][:, :, None], dofs[1][:, None, :])
        return rows.reshape(-1).astype(PETSc.IntType), columns.reshape(-1).astype(PETSc.IntType)


def boundary_expression(condition):
    """The UFL expression that a Dirichlet condition has its values from, before it is interpolated.

    That is the one which was set last, also by ``homogenize`` and ``restore``, and of a list or
    tuple the tensor that it makes.
    """
    update = vars(condition).get("_function_arg_update")
    if update is None:
        return condition._function_arg
    method: Any = update.func if isinstance(update, partial) else update
    source = method.__self__
    return source.operand if isinstance(source, Interpolator) else source.source


def has_taped_number(condition) -> bool:
    """Whether a Dirichlet condition was given a float of pyadjoint's tape, to UFL a mere number."""

    def is_one(value) -> bool:
        if isinstance(value, (list, tuple)):
            return any(map(is_one, value))
        return isinstance(value, AdjFloat)

    return is_one(condition._original_arg) and not isinstance(
        condition._function_arg, ufl.classes.Zero
    )


def pin_quadrature(form: ufl.Form, parameters: dict | None) -> ufl.Form:
    """State, on each integral, the quadrature degree that assembling this form would choose.

    Forms derived from it, by taking terms out or by differentiation, then are integrated as it is:
    a sum of parts is the whole, and a derivative is that of what is assembled.
    """
    degree = (parameters or {}).get("quadrature_degree", "auto")
    degrees = {}
    if degree == "auto":
        for data in compute_form_data(form, complex_mode=False).integral_data:
            ids = (
                data.subdomain_id if isinstance(data.subdomain_id, tuple) else (data.subdomain_id,)
            )
            degrees[data.domain, data.integral_type, ids] = max(
                entry.get("quadrature_degree", entry["estimated_polynomial_degree"])
                for entry in (integral.metadata() for integral in data.integrals)
            )
    pinned = []
    for integral in form.integrals():
        metadata = dict(integral.metadata())
        if (
            metadata.get("quadrature_degree", "auto") == "auto"
            and "quadrature_rule" not in metadata
        ):
            metadata["quadrature_degree"] = (
                _degree(degrees, integral) if degree == "auto" else degree
            )
        pinned.append(integral.reconstruct(metadata=metadata))
    return ufl.Form(pinned)


def _degree(degrees: dict, integral):
    """The degree of an integral; the largest, where UFL has grouped it with others on several parts
    of the mesh.
    """
    found, wanted = [], integral.subdomain_id()
    wanted = set(wanted) if isinstance(wanted, tuple) else {wanted}
    for (domain, integral_type, ids), degree in degrees.items():
        if (domain, integral_type) == (integral.ufl_domain(), integral.integral_type()) and (
            wanted & set(ids) or "everywhere" in wanted
        ):
            found.append(degree)
    return max(found)


def assigned_from(variable):
    """The block variable whose value one was given by ``f.assign(g)``; None for no such."""
    checkpoint = variable.checkpoint
    return checkpoint.other if isinstance(checkpoint, DelegatedFunctionCheckpoint) else None


def is_lost(variable) -> bool:
    """Whether the value of a block variable is neither saved nor what its object has now."""
    return (
        variable.checkpoint is None
        and variable.creation_timestep >= 0
        and variable.output.block_variable is not variable
    )


def has_block_variable(original) -> bool:
    """Whether what can stand on a tape does, on one that is still there."""
    return original._block_variable() is not None


def has_saved_values(original) -> bool:
    """Whether a tape that is still there has saved the values of what can stand on it."""
    variable = original._block_variable()
    return variable is not None and variable.checkpoint is not None


def has_schedule(tape) -> bool:
    """Whether checkpoints of a tape come and go by a schedule."""
    return tape._checkpoint_manager is not None
