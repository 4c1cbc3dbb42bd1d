"""The types of PETSc's that a solver is made of, as far as it and its options name them."""

from __future__ import annotations

__all__ = ["named_types"]

# The options that name preconditioners and nonlinear solvers.
_OPTIONS = {
    "pc_type": ("pc_type", "pc_composite_pcs"),
    "snes_type": ("snes_type", "snes_composite_sneses"),
}


def named_types(solver, option: str) -> list[str]:
    """The types of a kind that are in a solver.

    Parameters
    ----------
    solver : firedrake.NonlinearVariationalSolver
    option : str
        ``"pc_type"`` or ``"snes_type"``.

    Returns
    -------
    list of str
        That of the solver first, then those that options name for what is inside.
    """
    snes = solver.snes
    own = snes.getKSP().getPC().getType() if option == "pc_type" else snes.getType()
    named = (value for name, value in solver.parameters.items() if name.endswith(_OPTIONS[option]))
    return [kind for kinds in (own, *named) if kinds is not None for kind in str(kinds).split(",")]
