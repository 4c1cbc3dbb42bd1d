"""Whether there is a Firedrake, and one that this package works with.

Where there is none, or it fails, one sentence says why.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings

__all__ = ["TESTED", "look_at_release", "require_firedrake"]

TESTED = "2026.10"  # the release of Firedrake that the tests run with; as install.sh installs it
# Where launchers say which rank this is, before MPI is there.
_RANKS = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def look_at_release() -> None:
    """Warn, on rank 0, of another release than the one that is tested; nothing is imported for it.

    Raises
    ------
    ImportError
        Where there is no Firedrake.
    """
    if "firedrake" not in sys.modules and importlib.util.find_spec("firedrake") is None:
        raise _absent()
    difference = _difference()
    if difference and _rank() == 0:
        warnings.warn(
            f"prdp_fem is tested with Firedrake {TESTED}, and {difference}: "
            "run its tests before you rely on it",
            stacklevel=2,
        )


def require_firedrake() -> None:
    """Import Firedrake, and the parts of the package that stand on it.

    Raises
    ------
    ImportError
        Where that fails; it says why.
    """
    _import_firedrake()
    try:
        importlib.import_module("prdp_fem.solvers")
    except (ImportError, AttributeError) as error:
        difference = _difference()
        if not difference:
            raise
        raise ImportError(
            f"prdp_fem works with Firedrake {TESTED}, and {difference} and lacks what "
            f"it needs ({error}): install firedrake=={TESTED}.*"
        ) from None


def _import_firedrake() -> None:
    try:
        importlib.import_module("firedrake")
    except ModuleNotFoundError as error:
        if error.name == "firedrake":
            raise _absent() from None
        raise _broken(error) from error
    except Exception as error:
        raise _broken(error) from error


def _absent() -> ImportError:
    return ImportError(
        f"prdp_fem needs Firedrake {TESTED}, and there is none in {sys.prefix}: "
        "activate the environment that has one, or make one by prdp_fem's install.sh"
    )


def _broken(error: Exception) -> ImportError:
    message = (str(error).strip().splitlines() or [""])[0]
    return ImportError(
        "prdp_fem needs Firedrake, which cannot be imported here "
        f"({type(error).__name__}: {message}): 'prdp-fem doctor' says what works"
    )


def _difference() -> str:
    """In what the release differs from the one that is tested, in words.

    Empty where it does not differ, or has no number.
    """
    # Not above: it takes longer to be imported than all that is pure Python here.
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = version("firedrake")
        found = [int(part) for part in release.split(".")[:2]]
    except (PackageNotFoundError, ValueError):
        return ""
    tested = [int(part) for part in TESTED.split(".")]
    if found == tested:
        return ""
    return f"this is Firedrake {release}, which is {'older' if found < tested else 'newer'}"


def _rank() -> int:
    """The rank of this process, from MPI where it is there, else from its launcher."""
    if "mpi4py.MPI" in sys.modules:
        return sys.modules["mpi4py.MPI"].COMM_WORLD.rank
    return int(next((os.environ[name] for name in _RANKS if name in os.environ), "0"))
