"""Options by which PETSc keeps something of one solve for the next, which is no function then."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from firedrake.petsc import PETSc
from petsctools import flatten_parameters

from prdp_fem.krylov.petsc_types import ksp_facts, pc_facts, snes_facts

__all__ = ["options_of", "refuse_persistent"]

_FLAGS = {
    "snes_lag_jacobian_persists": "has Newton steps made with the Jacobian of an earlier solve",
    "snes_lag_preconditioner_persists": (
        "has Newton steps made with the preconditioner of an earlier solve"
    ),
    "ksp_reuse_preconditioner": "keeps the preconditioner of an earlier operator",
    "ksp_initial_guess_nonzero": "starts an iteration from what is left of the last one",
}
_LAGS = ("snes_lag_jacobian", "snes_lag_preconditioner")
# The options that name types: where their facts are, and what those that remember keep.
_TYPES: dict[str, tuple[Callable, str]] = {
    "ksp_type": (ksp_facts, "keeps vectors of earlier solves"),
    "pc_type": (pc_facts, "keeps vectors of earlier solves"),
    "snes_type": (snes_facts, "keeps an approximation of the Jacobian from earlier solves"),
}
# Of the outermost KSP and SNES the solvers of this package see to that themselves.
_HANDLED = frozenset({"ksp_initial_guess_nonzero", "snes_type"})
_COMPOSITES = {"pc_composite_pcs": "pc_type", "snes_composite_sneses": "snes_type"}


def options_of(parameters: Mapping | None, prefix: str | None) -> dict:
    """The options of a solver that is to be made, by their names without its prefix.

    Parameters
    ----------
    parameters : Mapping or None
        ``solver_parameters``.
    prefix : str or None
        ``options_prefix``: PETSc's options with this prefix come before those.
    """
    options = dict(flatten_parameters(parameters or {}))
    if prefix is not None:
        # Firedrake adds the underscore where there is none.
        prefix = prefix if prefix.endswith("_") or not prefix else f"{prefix}_"
        options |= {
            name.removeprefix(prefix): value
            for name, value in PETSc.Options().getAll().items()
            if name.startswith(prefix)
        }
    return options


def refuse_persistent(options: Mapping) -> None:
    """Raise a ValueError for an option that has solves, of any solver inside, depend on others."""
    for name, value in options.items():
        found = _persistence(name, value)
        if found is not None:
            raise ValueError(
                f"{name} {value} {found}, so that a solve would not be a function of "
                f"its inputs: {_remedy(name)}"
            )
    if options.get("snes_type") == "qn" and options.get("snes_qn_type", "lbfgs") == "lbfgs":
        # By matrices whose sums depend on where PETSc has put them.
        raise ValueError(
            "snes_qn_type lbfgs (that of snes_type qn where options name none) rounds "
            "differently from solve to solve, so that a solve would not be a function "
            "of its inputs: use snes_qn_type broyden, or snes_type newtonls or ngmres"
        )


def _persistence(name: str, value) -> str | None:
    """How an option has a solve depend on earlier ones; None where it does not."""
    if name in _HANDLED:
        return None
    if _is(name, "ksp_guess_type"):
        return "starts a solve from what was solved before"
    for flag, how in _FLAGS.items():
        if _is(name, flag) and _is_true(value):
            return how
    if any(_is(name, lag) for lag in _LAGS) and str(value).lstrip().startswith("-"):
        return "makes all solves with what the first one was made with"
    for option, (facts, how) in _TYPES.items():
        names = [option, *(composite for composite, of in _COMPOSITES.items() if of == option)]
        if any(_is(name, one) for one in names):
            kinds = [] if value is None else str(value).split(",")
            if any(facts(kind).remembers_solves for kind in kinds):
                return how
    return None


def _remedy(name: str) -> str:
    if _is(name, "ksp_guess_type"):
        return "leave it away, or use warm_start=True"
    if any(_is(name, option) for option in (*_TYPES, *_COMPOSITES)):
        return "use another type, such as gmres, fgmres or bcgs, jacobi or ilu, newtonls or ngmres"
    return "leave it away"


def _is(name: str, option: str) -> bool:
    """Whether an option is one of that name, of the solver itself or of one inside."""
    return name == option or name.endswith(f"_{option}")


def _is_true(value) -> bool:
    """Whether PETSc takes a value for true: a flag without one is."""
    return value is None or str(value).strip().lower() in ("", "true", "yes", "on", "1")
