"""The one place that touches what Firedrake keeps private: names here may change with a Firedrake release."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager

import ufl
from firedrake import dmhooks
from firedrake.adjoint_utils.blocks.solving import extract_subfunction
from firedrake.adjoint_utils.checkpointing import maybe_disk_checkpoint
from firedrake.petsc import PETSc
from tsfc.ufl_utils import compute_form_data

__all__ = ["assemble_operators", "boundary_expression", "extract_subfunction", "maybe_disk_checkpoint", "operators",
           "pin_quadrature", "solver_context"]


def operators(solver) -> tuple[PETSc.Mat, PETSc.Mat]:
    """The operator and the matrix to precondition it by, assembled or not."""
    context = solver._ctx
    return context._jac.petscmat, context._pjac.petscmat


@contextmanager
def solver_context(solver):
    """What preconditioners that ask Firedrake for forms, and PETSc objects that ask for options, find in place."""
    with ExitStack() as stack:
        stack.enter_context(solver.inserted_options())
        stack.enter_context(dmhooks.add_hooks(solver.snes.getDM(), solver, appctx=solver._ctx))
        for operator in solver._transfer_operators:
            stack.enter_context(operator)
        yield


def assemble_operators(solver, state: PETSc.Vec) -> None:
    """Assemble the operators anew from the present values of their coefficients, with nullspaces attached."""
    context = solver._ctx
    # A user's promise that the Jacobian is constant makes Firedrake skip the assembly: whoever calls this knows better.
    context._jacobian_assembled = False
    with solver_context(solver):
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
