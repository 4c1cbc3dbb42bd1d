"""What a solver is given, as ranks must have it alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from firedrake import NonlinearVariationalProblem
from firedrake.utils import complex_mode

from prdp_fem.krylov.persistence import options_of, refuse_persistent
from prdp_fem.solution.solver_arguments import check_numbers, option_in_words

__all__ = ["check_problem", "checked_options", "others_in_words", "refuse_callbacks"]


def check_problem(problem: Any, expected: type) -> None:
    """Make sure that something is a problem, whose derivatives are real.

    Raises
    ------
    TypeError
        For another object than a problem.
    ValueError
        Where PETSc has complex numbers.
    """
    if complex_mode:
        raise ValueError(
            "this PETSc was configured for complex scalars, and prdp_fem differentiates real"
            " solves only: use an installation with real scalars"
        )
    if not isinstance(problem, NonlinearVariationalProblem):
        raise TypeError(f"expected a {expected.__name__}, found a {type(problem).__name__}")


def refuse_callbacks(others: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Raise a ValueError for a callback that a kind of solver does without.

    Parameters
    ----------
    others : Mapping of str
        What Firedrake's constructor takes.
    refused : Mapping of str to str
        Names of callbacks, with what to do instead.
    """
    for name, remedy in refused.items():
        if others.get(name) is not None:
            raise ValueError(f"{name} is not supported: {remedy}")


def checked_options(others: Mapping[str, Any], of: str) -> dict[str, Any]:
    """The options of a solver that is to be made, flat, by their names without its prefix.

    Parameters
    ----------
    others : Mapping of str
        What Firedrake's constructor takes.
    of : str
        What they are for.

    Raises
    ------
    ValueError
        For numbers that PETSc makes others of, and for what makes solves depend on others.
    """
    options = options_of(others.get("solver_parameters"), others.get("options_prefix"))
    check_numbers(options, of)
    refuse_persistent(options)
    return options


def others_in_words(others: Mapping[str, Any], options: Mapping[str, Any]) -> list[str]:
    """What ranks must have alike of what Firedrake's constructor takes, and of the options."""
    # Without the prefix: one that Firedrake has chosen need not be the same on all ranks.
    passed = [
        name for name, value in others.items() if value is not None and name != "options_prefix"
    ]
    return [*sorted(passed), *(option_in_words(name, options[name]) for name in sorted(options))]
