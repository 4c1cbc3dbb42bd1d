"""What a solver is given: looked at before anything is made of it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import firedrake
from firedrake import Function, MixedVectorSpaceBasis, VectorSpaceBasis

from prdp_fem.arguments import COUNT, flag, instance, shown
from prdp_fem.problem.firedrake_internals import spaces_of_basis
from prdp_fem.refinement.ladders import checked_setting, in_words
from prdp_fem.refinement.option_names import check_solver_parameters
from prdp_fem.refinement.rules import Refinement

__all__ = [
    "OWN",
    "check_bases",
    "check_names",
    "check_numbers",
    "check_solver_arguments",
    "option_in_words",
    "refinement_in_words",
]

# Arguments of this package's solvers, which Firedrake's do not have.
OWN = ("refinement", "differentiation", "warm_start", "ksp_prefix", "device")
_FIREDRAKES = (
    *inspect.signature(firedrake.NonlinearVariationalSolver.__init__).parameters,
    "ad_block_tag",
)
_THEIRS = tuple(name for name in _FIREDRAKES if name not in ("self", "problem"))
# As PETSc reads one.
_INTEGER = re.compile(r"\s*[+-]?[0-9]+\s*")
_BASES = ("nullspace", "transpose_nullspace", "near_nullspace")


def check_names(names: Iterable[str], known: Iterable[str], of: str) -> None:
    """Make sure that keyword arguments have names that are known.

    Raises
    ------
    TypeError
        For the first that is not; it names the nearest one.
    """
    known = tuple(known)
    for name in names:
        if name not in known:
            nearest = get_close_matches(name, known, 1)
            remedy = f"did you mean {nearest[0]}?" if nearest else f"it takes {', '.join(known)}"
            raise TypeError(f"{of} takes no argument {name}: {remedy}")


def refinement_in_words(refinement: Any) -> str:
    """What a refinement, or None, asks for at the moment: the same on all ranks.

    Raises
    ------
    TypeError, ValueError
        Where it is none, or has no setting.
    """
    instance(
        "refinement",
        refinement,
        (Refinement, type(None)),
        "a Refinement, such as ProgressiveRefinement(IterationLadder()), or "
        "FixedRefinement(Iterations(20)) for a constant setting",
    )
    if refinement is None:
        return "no refinement"
    return f"{type(refinement).__name__} ({in_words(checked_setting(refinement.setting))})"


def option_in_words(name: str, value: Any) -> str:
    """An option with its value; of an object, such as one with functions of Python, its class."""
    is_plain = value is None or isinstance(value, (str, Real))
    return f"{name} {value if is_plain else type(value).__name__}"


def check_numbers(options: Mapping[str, Any], of: str) -> None:
    """Make sure that PETSc makes no other numbers of integers among options.

    Parameters
    ----------
    options : Mapping of str
        Solver parameters, flat, together with what PETSc's options have in their place.
    of : str
        What they are for.

    Raises
    ------
    ValueError
        For the first that its integers cannot hold.
    """
    for name, value in options.items():
        for number in value.split(",") if isinstance(value, str) else [value]:
            if isinstance(number, str):
                # Not int(), which refuses thousands of digits.
                is_large = _INTEGER.fullmatch(number) is not None and abs(float(number)) > COUNT
            else:
                is_large = isinstance(number, Integral) and abs(int(number)) > COUNT
            if is_large:
                raise ValueError(
                    f"{of} has {name} {shown(value)}, and PETSc would make another "
                    f"integer of one beyond {COUNT} (a real number can be written as 1e10)"
                )


def check_solver_arguments(
    solution: Function,
    solver_type: type,
    warm_start: Any,
    ksp_prefix: Any,
    device: Any,
    others: Mapping[str, Any],
) -> None:
    """Make sure that a solver can be made of what it is given; without communication.

    Parameters
    ----------
    solution : Function
        Of the problem.
    solver_type : type
        What is made.
    warm_start, ksp_prefix, device
        As its constructor takes them.
    others : Mapping of str
        What Firedrake's constructor takes.

    Raises
    ------
    TypeError, ValueError
        For the first that it cannot be made of.
    """
    flag("warm_start", warm_start)
    instance(
        "ksp_prefix", ksp_prefix, (str, type(None)), "a string, such as 'fieldsplit_1_', or None"
    )
    instance("device", device, (str, type(None)), "a string, such as 'cpu' or 'auto', or None")
    check_names(others, (*OWN, *_THEIRS), solver_type.__name__.strip("_"))
    instance(
        "options_prefix",
        others.get("options_prefix"),
        (str, type(None)),
        "a string, such as 'heat_', or None",
    )
    parameters, context = others.get("solver_parameters"), others.get("appctx")
    instance(
        "solver_parameters",
        parameters,
        (Mapping, type(None)),
        "a dictionary, such as {'ksp_type': 'cg'}, or None",
    )
    if wrong := [name for name in parameters or () if not isinstance(name, str)]:
        raise TypeError(
            f"solver_parameters must have the names of options as keys, found {shown(wrong[0])}"
        )
    check_solver_parameters(parameters or ())
    instance("appctx", context, (Mapping, type(None)), "a dictionary, or None")
    for name, value in others.items():
        if name.endswith("_callback") and value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, or None, found {shown(value)}")
    flag("pre_apply_bcs", others.get("pre_apply_bcs", True))
    for name in _BASES:
        _check_basis(name, others.get(name), solution)


def check_bases(others: Mapping[str, Any]) -> None:
    """Make sure that PETSc can project by the null spaces that a solver is given. Collective.

    Raises
    ------
    ValueError
        For the first that is not orthonormal.
    """
    for name in ("nullspace", "transpose_nullspace"):
        basis = others.get(name)
        if isinstance(basis, VectorSpaceBasis) and not basis.is_orthonormal():
            raise ValueError(
                f"{name} must be an orthonormal basis, since PETSc projects by it: "
                "call its orthonormalize() first"
            )


def _check_basis(name: str, basis: Any, solution: Function) -> None:
    if basis is None:
        return
    instance(
        name,
        basis,
        (VectorSpaceBasis, MixedVectorSpaceBasis),
        "a VectorSpaceBasis or MixedVectorSpaceBasis, or None",
    )
    space = solution.function_space()
    if any(other not in (space, space.dual()) for other in spaces_of_basis(basis)):
        raise ValueError(
            f"{name} must be in the space of the solution '{solution.name()}', "
            f"{space}: it has vectors of another one"
        )
