"""The command line that all studies share."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from firedrake import Ensemble
from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.ranks.job import say_refusals
from prdp_fem.studies.schedules import CONVERGED, PRDP, Schedule, forms

__all__ = ["Parser", "SOLVER_PREFIX", "command_line", "count"]

SOLVER_PREFIX = "physics_"  # of PETSc's options for the solver that a study is about
_SPACE = 2**18  # bytes that there must be for results


class Parser(argparse.ArgumentParser):
    """A parser for scripts that run on many ranks, and leave PETSc's options to PETSc."""

    def __init__(self, **options):
        super().__init__(
            epilog="Options with a single dash are PETSc's, for example -log_view.", **options
        )

    def _print_message(self, message, file=None):
        """Once, not from every rank."""
        if MPI.COMM_WORLD.rank == 0:
            super()._print_message(message, file)

    def parse(self) -> tuple[argparse.Namespace, list[str]]:
        """What was read, and what is left for PETSc.

        What is wrong later on, see :class:`~prdp_fem.ranks.job.Refused`, is said without a
        traceback.
        """
        say_refusals()
        for word in sys.argv[1:]:
            if word.startswith("--") or word == "-h":
                # PETSc has read it, too, and would say in the end that nobody has asked for it.
                PETSc.Options().delValue(word)
        arguments, others = self.parse_known_args()
        if wrong := [option for option in others if f"-{option}" in self._option_string_actions]:
            self.error(f"{wrong[0]} would be an option of PETSc: write -{wrong[0]}")
        # Behind an option of PETSc a word may be its value, in front of all of them it is nothing.
        if unknown := [
            option for option in others if option.startswith("--") or not others[0].startswith("-")
        ]:
            self.error(f"cannot make anything of {' '.join(unknown)}")
        return arguments, others

    def add_ensemble(self, what: str) -> None:
        """The option ``--ensemble``, a number for :meth:`make_ensemble`; ``what`` is dealt out."""
        self.add_argument(
            "--ensemble",
            type=count,
            default=1,
            metavar="N",
            help=(
                f"deal {what} out to N groups of ranks; the ranks of a group share a mesh (default:"
                " %(default)s)"
            ),
        )

    def make_ensemble(self, members: int) -> Ensemble:
        """So many groups of all ranks, or an error."""
        ranks = MPI.COMM_WORLD.size
        if members == 0 or ranks % members:
            self.error(
                f"--ensemble {members} cannot share {ranks} rank{'s' if ranks > 1 else ''} out"
                " evenly"
            )
        return Ensemble(MPI.COMM_WORLD, ranks // members)

    def make_folder(self, folder: Path) -> None:
        """Where results are to be put, or an error."""

        def make():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(_SPACE))

        try:
            from_first_rank(MPI.COMM_WORLD, make)  # the rank that writes
        except OSError as error:
            self.error(f"cannot put results into {folder}: {error.strerror}")


def count(text: str) -> int:
    """A whole number, as the type of an option."""
    if not text.isdecimal() or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number below 2^31, found {text}")
    return int(text)


def _schedule(text: str) -> Schedule:
    try:
        return Schedule.from_text(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def command_line(
    script: str,
    description: str,
    *,
    configure: Callable[[argparse.ArgumentParser], None] | None = None,
    check: Callable[[argparse.Namespace], str | None] | None = None,
) -> argparse.Namespace:
    """What a study's command line says.

    ::

        --seed N [N ...]        of data, initial weights and order of samples
        --schedules S [S ...]   converged, direct, rtol:TOLERANCE, the name of a rule, such as
                                prdp, with its numbers or without, as in
                                prdp:TAU_STEP:TAU_STOP, or a number of iterations
        --quick, --full         a short run, or one for larger machines; QUICK=1 in the
                                environment means --quick
        --epochs N              instead of what the size says
        --output DIR            where runs and figures are put
        --resume                take runs that are there already from their files; without,
                                those of another set-up are kept under other names, and those
                                of the same are replaced
        --ensemble N            deal samples out to N groups of ranks; the ranks of a group
                                share a mesh

    Options with a single dash are PETSc's, which reads them itself, and says in the end which of
    them nobody has asked for.

    Parameters
    ----------
    script : str
        ``__file__`` of the study: results go to the folder output beside it, where nothing else is
        said.
    description : str
        Its first line is printed by ``--help``.
    configure : callable or None
        Adds options of the study's own to the parser that it is given.
    check : callable or None
        Given what was read, returns what is wrong with it, or None.

    Returns
    -------
    argparse.Namespace
        With ``seeds``, ``schedules``, ``size`` (``"quick"``, ``"default"`` or ``"full"``),
        ``epochs`` (or None), ``output`` and ``resume``, what ``configure`` has added, ``ensemble``,
        a :class:`firedrake.Ensemble`, and ``solver_options``, PETSc's options with prefix
        ``physics_``.
    """
    parser = Parser(prog=Path(script).name, description=description.strip().partition("\n")[0])
    parser.add_argument(
        "--seed",
        dest="seeds",
        type=count,
        nargs="+",
        default=[1],
        metavar="N",
        help="of data, initial weights and order of samples; several for several runs (default: 1)",
    )
    parser.add_argument(
        "--schedules",
        type=_schedule,
        nargs="+",
        default=[CONVERGED, PRDP],
        metavar="S",
        help=(
            f"what is compared: {', '.join(forms())} (numbers in capitals are put in their "
            "places), or a number of iterations (default: converged prdp)"
        ),
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        dest="size",
        action="store_const",
        const="quick",
        help="a short run, which ends while refining; QUICK=1 in the environment does the same",
    )
    size.add_argument(
        "--full",
        dest="size",
        action="store_const",
        const="full",
        help="a large run, for hours on a larger machine",
    )
    # mpiexec may not send it to others
    is_quick = from_first_rank(MPI.COMM_WORLD, lambda: os.environ.get("QUICK", "") not in ("", "0"))
    parser.set_defaults(size="quick" if is_quick else "default")
    parser.add_argument(
        "--epochs", type=count, metavar="N", help="outer iterations (default: as the size says)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help=(
            "where runs and figures are put (default: output beside this script, or output/quick or"
            " output/full)"
        ),
    )
    parser.add_argument(
        "--resume", action="store_true", help="take runs that are in DIR already from there"
    )
    parser.add_ensemble("samples")
    if configure is not None:
        configure(parser)
    arguments, others = parser.parse()
    if arguments.epochs == 0:
        parser.error("there must be at least one epoch")
    ensemble = parser.make_ensemble(arguments.ensemble)
    if check is not None and (problem := check(arguments)):
        parser.error(problem)
    if arguments.output is None:
        # Runs of another size are not overwritten.
        arguments.output = (
            Path(script).resolve().parent
            / "output"
            / ("" if arguments.size == "default" else arguments.size)
        )
    parser.make_folder(arguments.output)
    arguments.ensemble = ensemble
    arguments.solver_options = " ".join(
        word
        for option, word in zip(_options_of(others), others)
        if option.startswith(f"-{SOLVER_PREFIX}")
    )
    return arguments


def _options_of(words: list[str]) -> list[str]:
    """The option that each word is, or belongs to."""
    options: list[str] = []
    for word in words:
        is_option = word.startswith("-") and not word[1:2].isdigit()  # and no negative number
        options.append(word if is_option else options[-1])
    return options
