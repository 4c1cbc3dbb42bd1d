"""The one place that touches what Firedrake keeps private: names here may change with a Firedrake release."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager

import ufl
from firedrake import Function, dmhooks
from firedrake.adjoint_utils.blocks.solving import extract_subfunction
from firedrake.adjoint_utils.checkpointing import DelegatedFunctionCheckpoint, maybe_disk_checkpoint
from firedrake.petsc import PETSc
from tsfc.ufl_utils import compute_form_data

__all__ = ["SolverContext", "applies_boundary_first", "assemble_operators", "assigned_from", "attach_callbacks", "boundary_expression",
           "constructor_arguments", "extract_subfunction", "forget_set_up",
           "maybe_disk_checkpoint", "operators", "pin_quadrature", "problem_of"]


def operators(solver) -> tuple[PETSc.Mat, PETSc.Mat]:
    """The operator and the matrix to precondition it by, assembled or not."""
    context = solver._ctx
    return context._jac.petscmat, context._pjac.petscmat


# Preconditioners that have all they need once they are set up, and options that PETSc reads at each solve.
_SELF_CONTAINED = frozenset({"none", "jacobi", "pbjacobi", "vpbjacobi", "sor", "eisenstat", "ilu", "icc", "lu", "cholesky"})
_LOOKED_UP = ("view", "monitor", "reason", "error", "test")


class SolverContext:
    """What preconditioners that ask Firedrake for forms, and PETSc objects that ask for options, find in place.

    Called, it is a context manager. Where neither is the case, :attr:`is_needed` is False once the KSP is set up.

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
        dms = {dm.handle: dm for dm in (space.dm for space in spaces) if dm is not None and dm.handle != solution_dm.handle}
        # Coefficients' DMs need a context the first time only; Firedrake remembers the hooks of the last one.
        self._dms = [*dms.values(), solution_dm]

    @property
    def is_needed(self) -> bool:
        """Whether solves with a KSP that is set up may look for it; entering it costs as much as a small solve."""
        solver = self._solver
        ksp = solver.snes.getKSP()
        return (ksp.getType() == "python" or ksp.getPC().getType() not in _SELF_CONTAINED or bool(solver._transfer_operators)
                or any(operator.getType() == "python" for operator in operators(solver))
                or any(word in option for option in solver.parameters for word in _LOOKED_UP))

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


def applies_boundary_first(solver) -> bool:
    """Whether a solver is to be given a guess with the boundary values; False for ``pre_apply_bcs=False``."""
    return solver._ctx.pre_apply_bcs


def problem_of(solver):
    """The problem that a solver was made for."""
    return solver._ad_problem


def constructor_arguments(solver) -> dict:
    """The keyword arguments that a solver was made with; its ``ad_block_tag`` among them."""
    return {**solver._ad_kwargs, "ad_block_tag": solver.ad_block_tag}


def forget_set_up(solver) -> None:
    """Have a solver, that is to be initialised again, set up its DMs at the next solve as a new one does."""
    vars(solver).pop("setup_hooks", None)


def attach_callbacks(solver) -> None:
    """Have a SNES call this solver for residuals: solvers of one function space share its DM, which holds the callbacks."""
    context = solver._ctx
    context.set_objective(solver.snes)
    context.set_function(solver.snes)
    context.set_jacobian(solver.snes)


def assemble_operators(solver, state: PETSc.Vec) -> None:
    """Assemble the operators anew from the present values of their coefficients, with nullspaces attached; inside its context."""
    context = solver._ctx
    # A user's promise that the Jacobian is constant makes Firedrake skip the assembly: whoever calls this knows better.
    context._jacobian_assembled = False
    context.form_jacobian(solver.snes, state, *operators(solver))


def boundary_expression(condition):
    """The UFL expression that a Dirichlet condition was given, before it was interpolated."""
    given = condition._original_arg
    return given if isinstance(given, ufl.classes.Expr) else condition.function_arg


def pin_quadrature(form: ufl.Form, parameters: dict | None) -> ufl.Form:
    """State, on each integral, the quadrature degree that assembling this form would choose.

    Forms derived from it, by taking terms out or by differentiation, then are integrated as it is: a sum of parts is the
    whole, and a derivative is that of what is assembled.
    """
    degree = (parameters or {}).get("quadrature_degree", "auto")
    degrees = {}
    if degree == "auto":
        for data in compute_form_data(form, complex_mode=False).integral_data:
            ids = data.subdomain_id if isinstance(data.subdomain_id, tuple) else (data.subdomain_id,)
            metadata = [integral.metadata() for integral in data.integrals]
            degrees[data.domain, data.integral_type, ids] = max(
                entry.get("quadrature_degree", entry["estimated_polynomial_degree"]) for entry in metadata)
    pinned = []
    for integral in form.integrals():
        metadata = dict(integral.metadata())
        if metadata.get("quadrature_degree", "auto") == "auto" and "quadrature_rule" not in metadata:
            metadata["quadrature_degree"] = _degree(degrees, integral) if degree == "auto" else degree
        pinned.append(integral.reconstruct(metadata=metadata))
    return ufl.Form(pinned)


def _degree(degrees: dict, integral):
    """The degree of an integral; the largest, where UFL has grouped it with others on several parts of the mesh."""
    found, wanted = [], integral.subdomain_id()
    wanted = set(wanted) if isinstance(wanted, tuple) else {wanted}
    for (domain, integral_type, ids), degree in degrees.items():
        if (domain, integral_type) == (integral.ufl_domain(), integral.integral_type()) and (wanted & set(ids) or "everywhere" in wanted):
            found.append(degree)
    return max(found)


def assigned_from(variable):
    """The block variable that one is a mere copy of, by ``f.assign(g)``; None where it is none, or where g is of another space."""
    checkpoint = variable.checkpoint
    if not isinstance(checkpoint, DelegatedFunctionCheckpoint):
        return None
    source = checkpoint.other
    # A Function of a Real space can be assigned to any other. (In place of an assembled Cofunction there may be a checkpoint.)
    is_broadcast = isinstance(source.output, Function) and _is_real(source.output) and not _is_real(variable.output)
    return None if is_broadcast else source


def _is_real(function: Function) -> bool:
    return function.ufl_element().family() == "Real"
