"""The command ``prdp-fem``."""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from firedrake.petsc import PETSc

from prdp_fem.doctor import examine

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the arguments of the command line; exits with 0 where all went well."""
    parser = argparse.ArgumentParser(prog="prdp-fem", description="Progressively refined differentiable physics for Firedrake and PETSc.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("doctor", help="say what this installation has, and whether it works; also under mpiexec",
                        description="Print versions and devices, solve a small problem on each device, and compare its derivative with "
                                    "differences.")
    PETSc.Options().setValue("options_left", False)  # the arguments are none of PETSc's
    parser.parse_args(arguments)
    sys.exit(0 if examine() else 1)
