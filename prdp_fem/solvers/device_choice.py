"""Which device a solver is on: the one that was asked for, where it can be there."""

from __future__ import annotations

from collections.abc import Callable

from firedrake.petsc import PETSc

from prdp_fem.krylov.petsc_types import PCFacts, SNESFacts, pc_facts, snes_facts
from prdp_fem.memory.devices import AUTO, HOST, Device, find_device
from prdp_fem.memory.memory import is_copied
from prdp_fem.problem.firedrake_internals import operators
from prdp_fem.ranks.agreement import agree
from prdp_fem.refinement.option_names import check_option_names
from prdp_fem.solvers.named_types import named_types

__all__ = ["find_device_for"]

# What is known of the types that an option names.
_FACTS: dict[str, Callable[[str], PCFacts | SNESFacts]] = {
    "pc_type": pc_facts,
    "snes_type": snes_facts,
}


def find_device_for(solver, name: str | None, *, changes_pattern: bool) -> Device | None:
    """The device of a name for a solver. Collective.

    Parameters
    ----------
    solver : RefinedSolver
        Firedrake's side of it is made.
    name : str or None
        As solvers take it; None for what PETSc's options say.
    changes_pattern : bool
        Whether matrices may have entries in other places each time.

    Returns
    -------
    Device or None
        None for the host.

    Raises
    ------
    ValueError
        For a device that is not there, or where the solver cannot be on it.
    """
    solution = solver.problem.u
    comm = solution.function_space().mesh().comm
    if name is None:
        agree(comm, check_option_names, "options")
        default = solver.parameters.get(
            "prdp_device", PETSc.Options().getString("prdp_device", HOST)
        )
        name = PETSc.Options(solver.options_prefix).getString("prdp_device", default)
    device = find_device(name, comm)
    obstacle = None if device is None else _obstacle(solver, changes_pattern)
    if obstacle is None:
        return device
    if name == AUTO:
        return None
    raise ValueError(
        f"the solver for '{solution.name()}' cannot be on device '{name}': {obstacle}, or"
        " device='cpu'"
    )


def _obstacle(solver, changes_pattern: bool) -> str | None:
    """What of the solver must be on the host, and what to use instead; None for nothing."""
    if changes_pattern:
        return (
            "its post_jacobian_callback may give the matrix entries in other places, leave it away"
        )
    for operator in operators(solver):
        if not is_copied(operator):
            return f"its operator is of type {operator.getType()}, use mat_type aij"
    for option, facts in _FACTS.items():
        for kind in named_types(solver, option):
            if facts(kind).works_on_host:
                return (
                    f"{option} {kind} has vectors go through Firedrake, which is on the host, use "
                    "another one of PETSc's"
                )
    return None
