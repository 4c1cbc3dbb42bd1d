"""What a PETSc object is set to, where there is no other way to ask than to read what it says."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping

from firedrake.petsc import PETSc

__all__ = ["described", "found_in", "setting", "settings"]

# PETSc prints numbers as %g does, with six digits; one with fewer is all there.
_PRINTED_DIGITS = 6


def described(thing: PETSc.Object) -> str:
    """The text of its view; collective."""
    comm = thing.comm.tompi4py()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "view")
        viewer = PETSc.Viewer().createASCII(path, mode="w", comm=thing.comm)
        thing.view(viewer)
        viewer.flush()
        viewer.destroy()
        text = None
        if comm.rank == 0:
            with open(path) as file:
                text = file.read()
        return comm.bcast(text)


def found_in(text: str, pattern: str) -> re.Match[str]:
    """What a regular expression finds in the text of a view, which has it in the releases of PETSc
    that there is a table of types for.

    Raises
    ------
    RuntimeError
        Where the text has nothing like it.
    """
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"PETSc's view has nothing like {pattern!r}, found {text!r}")
    return found


def settings(
    thing: PETSc.Object, text: str, pattern: str, option: str, options: Mapping | None
) -> list[float]:
    """Numbers that it is set to, to their last digit.

    Parameters
    ----------
    thing : PETSc.Object
    text : str
        What it says of itself.
    pattern : str
        Regular expression with a group for each number.
    option : str
        The option that sets them, without prefix.
    options : mapping or None
        Options without prefix, to be looked at before PETSc's own.

    Raises
    ------
    ValueError
        Where a number was printed rounded, and no option says which it is.
    """
    printed = found_in(text, pattern).groups()
    given = (options or {}).get(option)
    if given is None:
        given = PETSc.Options(thing.getOptionsPrefix()).getString(option, "")
    numbers = [float(part) for part in re.split(r"[,\s()\[\]]+", str(given)) if part]
    if len(numbers) == len(printed):
        if all(f"{number:g}" == f"{float(shown):g}" for number, shown in zip(numbers, printed)):
            return numbers
    digits = (re.sub(r"e.*|[.\-+]", "", shown).lstrip("0") for shown in printed)
    if any(len(those) >= _PRINTED_DIGITS for those in digits):
        name = f"{thing.getOptionsPrefix() or ''}{option}"
        raise ValueError(
            f"unrolled differentiation must know {option} to its last digit, and "
            f"PETSc tells six ({', '.join(printed)}): leave {name} in PETSc's "
            "options, give it by options=…, or round it to five digits"
        )
    return [float(shown) for shown in printed]


def setting(
    thing: PETSc.Object, text: str, pattern: str, option: str, options: Mapping | None
) -> float:
    """One number: see :func:`settings`."""
    return settings(thing, text, pattern, option, options)[0]
