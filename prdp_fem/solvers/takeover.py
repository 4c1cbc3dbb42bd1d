"""How a solver goes on with the SNES of the one that it was before it came under control."""

from __future__ import annotations

from typing import NoReturn

from firedrake.petsc import PETSc

from prdp_fem.krylov.ksp import SetByHand, set_inside_by_hand
from prdp_fem.krylov.petsc_types import pc_facts, snes_facts
from prdp_fem.krylov.snes import reset_with_linear_solver
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.firedrake_internals import Callbacks, Predecessor, options_in_place
from prdp_fem.ranks.agreement import agree
from prdp_fem.solvers.named_types import named_types

__all__ = ["refuse_to_lose", "refuse_to_solve_as_before", "reset", "take_over"]


def refuse_to_lose(solver) -> None:
    """Raise a ValueError where what was set by hand inside the preconditioner would be lost.

    And where solvers inside know no other problem than that of the solves that were made.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver
        It has solved, and is not under control as yet.
    """
    with options_in_place(solver):
        found = set_inside_by_hand(solver.snes.getKSP())

    def look() -> None:
        for kind in named_types(solver, "snes_type"):
            if snes_facts(kind).has_levels:
                raise ValueError(
                    f"the solver has solved with snes_type {kind}, whose solvers on coarser meshes "
                    "stay with the problem of then: put a solver under control before it solves"
                )
        if found is not None:
            raise ValueError(
                f"inside the solver's preconditioner {found} was set by hand, and would be lost "
                "with what the last solve has left there: have solver_parameters say it"
            )

    # Blocks of a preconditioner may be each on one rank.
    agree(solver.snes.comm.tompi4py(), look, "preconditioners")


def refuse_to_solve_as_before(solver) -> NoReturn:
    """Raise a RuntimeError where a ``solve`` that was kept from before is called.

    Firedrake's would solve for what is not the user's.
    """
    raise RuntimeError(
        f"this is the solve() that the solver for '{solver.problem.u.name()}' had before it came "
        "under control, which would leave the solution as it is: call solver.solve() of now"
    )


def take_over(solver, predecessor: Predecessor) -> SetByHand | None:
    """Go on with the SNES of the solver that there was, and with what was set on it by hand.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver
        Made of the same options; its SNES is let go of.
    predecessor : Predecessor

    Returns
    -------
    SetByHand or None
        What was set on its KSP by hand; None where that cannot be told.

    Raises
    ------
    ValueError
        Where a type that was set by hand would be lost.
    """
    by_options, ksp = solver.snes.getKSP(), predecessor.snes.getKSP()
    if predecessor.is_set_up:
        pc_type = ksp.getPC().getType()
        keeps_all = pc_facts(pc_type).is_self_contained or pc_type == PETSc.PC.Type.PYTHON
        if pc_type != by_options.getPC().getType() and not keeps_all:
            raise ValueError(
                f"the solver's pc_type {pc_type} was set by hand, and what is inside it would be "
                "lost with what the last solve has left there: put the solver under control "
                f"before it solves, or have solver_parameters say pc_type {pc_type}"
            )
    by_hand = None
    if not predecessor.snes.getUseEW():  # which changes tolerances as it goes on
        by_hand = SetByHand(ksp, by_options)
    predecessor.pass_on(solver)
    if predecessor.is_set_up:
        reset(solver)
    Callbacks(solver, Memory()).attach()
    return by_hand


def reset(solver) -> None:
    """Have SNES, KSP and preconditioner set up anew at the next solve, for its operators."""
    with options_in_place(solver):
        reset_with_linear_solver(solver.snes)
