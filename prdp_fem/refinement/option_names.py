"""The names of this package's options in PETSc's database.

With them a misspelt one is found when options are first read.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

from petsc4py import PETSc

from prdp_fem.refinement import RULES

__all__ = [
    "OF_LADDERS",
    "OF_REFINEMENTS",
    "OF_RULES",
    "OF_SOLVERS",
    "check_option_names",
    "check_solver_parameters",
]

# Behind prdp_: what refinement_from_options reads, and what solvers read.
OF_LADDERS = ("start", "step", "ratio", "stop")
OF_RULES = tuple(dict.fromkeys(name for entry in RULES.values() for name in entry.options))
OF_REFINEMENTS = ("ladder", *OF_LADDERS, "rule", *OF_RULES, "monitor", "view")
OF_SOLVERS = ("device",)
# A prefix, and what is behind prdp_; PETSc does not tell capitals from small letters.
_OWN = re.compile(r"(?P<prefix>|.*_)prdp(?P<separator>[_-]?)(?P<name>.*)", re.IGNORECASE)
# Above it a name that is not known for another package's is taken for a misspelt prdp_ of this one.
_ALIKE = 0.85


def check_option_names() -> None:
    """Make sure that all options in the database that have ``prdp_`` in their names are ones that
    this package reads.

    With any prefix, since there is a refinement or a solver for each.

    Raises
    ------
    ValueError
        For the first that is none; it names the nearest one.

    Warns
    -----
    UserWarning
        For an option whose name is nearly that of one.
    """
    options = PETSc.Options()
    known = (*OF_REFINEMENTS, *OF_SOLVERS)
    for option, value in options.getAll().items():
        written = f"-{option}" if value is None else f"-{option} {value}"
        own = _OWN.fullmatch(option)
        if own is None:
            if alike := get_close_matches(option, [f"prdp_{name}" for name in known], 1, _ALIKE):
                warnings.warn(
                    f"the option {written} is not read by prdp_fem: is it meant to be -{alike[0]}?",
                    stacklevel=3,
                )
        elif own["separator"] != "_" or own["name"].lower() not in known:
            raise ValueError(
                f"there is no option {written}{_nearest(own['name'], known, own['prefix'])}: known "
                f"are {', '.join(f'-prdp_{name}' for name in known)}, with or without a prefix"
            )
        elif not options.hasName(option):
            raise ValueError(f"the option -{written} is not read with two dashes: write {written}")


def check_solver_parameters(names: Iterable[str]) -> None:
    """Make sure that a solver reads those of its parameters that have ``prdp_`` in their names.

    Raises
    ------
    ValueError
        For the first that is none.
    """
    for name in names:
        own = _OWN.fullmatch(name)
        if own is not None and name not in {f"prdp_{known}" for known in OF_SOLVERS}:
            remedy = _nearest(own["name"], OF_SOLVERS, "", dash="")
            if own["name"] in OF_REFINEMENTS:
                remedy = ": it is an option of refinement_from_options(), in PETSc's database"
            raise ValueError(
                f"a solver reads no parameter {name}{remedy or ': it reads prdp_device only'}"
            )


def _nearest(name: str, known: Iterable[str], prefix: str, dash: str = "-") -> str:
    nearest = get_close_matches(name.lower(), known, 1)
    return f", did you mean {dash}{prefix}prdp_{nearest[0]}?" if nearest else ""
