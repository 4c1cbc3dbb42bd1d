"""The command ``prdp-fem``. It is not in the package, whose import may be what does not work."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from prdp_fem_installation.imports import NEEDED, has_launcher, look, look_apart

__all__ = ["main"]

_GRACE = 2.0  # seconds in which all ranks can say what they have found, before one ends the job


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of the command line; exits with 0 where all went well."""
    parser = argparse.ArgumentParser(
        prog="prdp-fem",
        description="Progressively refined differentiable physics for Firedrake and PETSc.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "doctor",
        help="say what this installation has, and whether it works; also under mpiexec",
        description=(
            "Import all that is needed, print versions, devices and which kernels are used, "
            "solve a small problem on each device, and compare its derivative with "
            "differences."
        ),
    )
    parser.parse_args(arguments)
    sys.exit(0 if _doctor() else 1)


def _doctor() -> bool:
    """Import everything, say what cannot be, and go on where all that is needed can."""
    # A launcher waits for its ranks in MPI_Init, where another process can't stand for one of them.
    imports = look() if has_launcher() else look_apart()
    failed = [found for found in imports if found.error]
    if not any(found.module in NEEDED for found in failed):
        from prdp_fem.doctor import examine

        return examine(failed)
    print(f"Python {sys.version.split()[0]} in {sys.prefix}")
    for found in imports:
        print(f"  {found.mark:8s}{found}")
    print(
        "prdp_fem does not work here: see FAILED above, of which the first can be the cause of"
        " others.",
        flush=True,
    )
    if has_launcher():
        _end_job()
    return False


def _end_job() -> None:
    """End all ranks, as others may wait for this one for ever."""
    try:
        from mpi4py import MPI
    except Exception:  # then none has got as far as to wait
        return
    time.sleep(_GRACE)
    MPI.COMM_WORLD.Abort(1)
