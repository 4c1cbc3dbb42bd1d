"""Whether there is a Firedrake, and one that this package works with.

Importing this module imports Firedrake, and the parts of the package that stand on it. Where that
fails, one sentence says why.
"""
from __future__ import annotations

import importlib
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

__all__ = ["TESTED"]

TESTED = "2026.10"  # the release of Firedrake that the tests run with; as install.sh installs it


def _import_firedrake():
    try:
        return importlib.import_module("firedrake")
    except ModuleNotFoundError as error:
        if error.name == "firedrake":
            raise ImportError(f"prdp_fem needs Firedrake {TESTED}, and there is none in "
                              f"{sys.prefix}: activate the environment that has one, or make one by prdp_fem's "
                              "install.sh") from None
        raise _broken(error) from error
    except Exception as error:
        raise _broken(error) from error


def _broken(error: Exception) -> ImportError:
    message = (str(error).strip().splitlines() or [""])[0]
    return ImportError("prdp_fem needs Firedrake, which cannot be imported here "
                       f"({type(error).__name__}: {message}): 'prdp-fem doctor' says what works")


def _difference() -> str:
    """In what the release differs from the one that is tested, in words.

    Empty where it does not differ, or has no number.
    """
    try:
        release = version("firedrake")
        found = [int(part) for part in release.split(".")[:2]]
    except (PackageNotFoundError, ValueError):
        return ""
    tested = [int(part) for part in TESTED.split(".")]
    if found == tested:
        return ""
    return f"this is Firedrake {release}, which is {'older' if found < tested else 'newer'}"


def _check() -> None:
    firedrake = _import_firedrake()
    difference = _difference()
    try:
        importlib.import_module("prdp_fem.solvers")
    except (ImportError, AttributeError) as error:
        if not difference:
            raise
        raise ImportError(f"prdp_fem works with Firedrake {TESTED}, and {difference} and lacks "
                          f"what it needs ({error}): install firedrake=={TESTED}.*") from None
    if difference and firedrake.COMM_WORLD.rank == 0:
        warnings.warn(f"prdp_fem is tested with Firedrake {TESTED}, and {difference}: "
                      "run its tests before you rely on it", stacklevel=2)


_check()
