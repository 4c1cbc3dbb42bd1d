"""Firedrake's solvers of linear problems, of derivatives, that are set as another solver is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import firedrake

from prdp_fem.krylov.factorisation import detect_null_pivots
from prdp_fem.krylov.ksp import SetByHand, lift_bounds
from prdp_fem.krylov.snes import solves_linear_systems
from prdp_fem.problem.firedrake_internals import assemble_directly, share_transfers

__all__ = ["LinearSolvers"]

# What concerns the other solver's own problem only.
_NOT_SHARED = ("post_jacobian_callback", "pre_apply_bcs")


class LinearSolvers:
    """Called with a linear problem, it makes a solver of that.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver
        The other solver, whose transfers between meshes they share.
    arguments : Mapping of str
        What Firedrake's constructor was given for it.
    by_hand : SetByHand or None
        What was set on its KSP by hand.

    Attributes
    ----------
    have_null_spaces : bool
        Whether operators are given null spaces.
    """

    def __init__(self, solver, arguments: Mapping[str, Any], by_hand: SetByHand | None):
        self._solver = solver
        self._arguments = {
            name: value for name, value in arguments.items() if name not in _NOT_SHARED
        }
        self._by_hand = by_hand
        null_spaces = arguments.get("nullspace"), arguments.get("transpose_nullspace")
        self.have_null_spaces = any(space is not None for space in null_spaces)

    def __call__(self, problem, *, is_adjoint: bool = False) -> firedrake.LinearVariationalSolver:
        """A solver of a problem; of an adjoint one, null spaces are exchanged."""
        arguments = dict(self._arguments)
        if is_adjoint:
            arguments["nullspace"] = self._arguments.get("transpose_nullspace")
            arguments["transpose_nullspace"] = self._arguments.get("nullspace")
        solver = firedrake.LinearVariationalSolver(problem, **arguments)
        if self.have_null_spaces:
            detect_null_pivots(solver)
        lift_bounds(solver)
        if not solves_linear_systems(solver.snes):
            with solver.inserted_options():
                solver.snes.getKSP().setFromOptions()
        share_transfers(self._solver, solver)
        if self._by_hand is not None:
            self._by_hand.put_on(solver.snes.getKSP())
        assemble_directly(solver)
        return solver
