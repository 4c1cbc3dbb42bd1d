"""The one place that touches what Firedrake keeps private: names here may change with a Firedrake release."""
from __future__ import annotations

from contextlib import ExitStack, contextmanager

from firedrake import dmhooks
from firedrake.adjoint_utils.blocks.solving import extract_subfunction
from firedrake.adjoint_utils.checkpointing import maybe_disk_checkpoint
from firedrake.petsc import PETSc

__all__ = ["assemble_operators", "extract_subfunction", "maybe_disk_checkpoint", "operators", "solver_context"]


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
