"""Refinements from PETSc's options database."""
from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.arguments import instance, shown
from prdp_fem.ranks.agreement import agree
from prdp_fem.refinement.ladders import IterationLadder, NewtonLadder, ToleranceLadder
from prdp_fem.refinement.option_names import check_option_names
from prdp_fem.refinement.rules import ProgressiveRefinement, Record

__all__ = ["refinement_from_options"]

_LADDERS = {"iterations": IterationLadder, "tolerances": ToleranceLadder, "newton": NewtonLadder}
_STEPS = ("start", "step", "stop")
_RULE = ("tau_step", "tau_stop", "ema_window", "error_window")
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# As PETSc reads them; an option without a value is one that is switched on.
_SWITCHES = {**dict.fromkeys(("", "true", "yes", "on", "1"), True),
             **dict.fromkeys(("false", "no", "off", "0"), False)}


def refinement_from_options(prefix: str = "", *, ladder: str = "iterations", comm: MPI.Comm | None = None,
                            **defaults) -> ProgressiveRefinement:
    """A :class:`ProgressiveRefinement` as PETSc's options say, on the command line or in the options database.

    ::

        -prdp_ladder <iterations|tolerances|newton>: iterations or tolerances of linear solves, or Newton steps (iterations)
        -prdp_start <number>: iterations or steps, or relative tolerance, at level 0 (1, or 0.1)
        -prdp_step <number>: iterations or steps that each level adds, or factor that each level multiplies the tolerance by (1, or 0.1)
        -prdp_stop <number>: the most iterations or steps, or the smallest tolerance (no limit, or 1e-10)
        -prdp_tau_step <real>: ratio of moving averages above which training counts as plateaued (0.98)
        -prdp_tau_stop <real>: least improvement between plateaus that makes another refinement worth while (0.9)
        -prdp_ema_window <int>: window of the moving average of the metrics (6)
        -prdp_error_window <int>: how many moving averages are looked back over (3)
        -prdp_monitor: print metric, level and setting at each step
        -prdp_view: print the refinement when it is made

    They are looked at when this is called. An option with ``prdp_`` in its name that is none, under
    whatever prefix, is an error at once.

    Parameters
    ----------
    prefix : str
        Goes in front of ``prdp_``, as for a solver's options: with ``"heat_"``, or ``"heat"``, the
        options are ``-heat_prdp_start`` and so on.
    ladder : str
        Default of ``-prdp_ladder``.
    comm : mpi4py.MPI.Comm or None
        Communicator of the refinement, see :class:`~prdp_fem.refinement.rules.Refinement`; the world's
        where None. This is collective on it.
    **defaults
        Defaults of the other options, by the name behind ``prdp_``: ``start``, ``step``, ``stop``, ``tau_step``, ``tau_stop``,
        ``ema_window``, ``error_window``.

    Returns
    -------
    ProgressiveRefinement

    Raises
    ------
    ValueError
        For an unknown option or ladder, and for a value that cannot be meant; on all ranks, where
        it is so on one.
    TypeError
        For a default without an option.
    """
    prefix = instance("prefix", prefix, str, "a string, such as 'heat_'")
    if re.search(r"^-|\s", prefix):
        raise ValueError(f"prefix must have no spaces, and no dash in front, found {shown(prefix)}")
    if prefix and not prefix.endswith("_"):
        prefix = f"{prefix}_"  # as solvers have it
    if not isinstance(comm, (MPI.Comm, type(None))):
        raise TypeError(f"comm must be a communicator of mpi4py's, such as mesh.comm, or None, "
                        f"found {shown(comm)}")
    comm = MPI.COMM_WORLD if comm is None else comm
    refinement: ProgressiveRefinement

    def make() -> tuple:
        nonlocal refinement
        check_option_names()
        refinement, switches = _read(prefix, ladder, defaults, comm)
        return repr(refinement), switches

    _, switches = agree(comm, make, "options of a refinement",
                        "mpiexec may hand the environment on to some ranks only")
    if "view" in switches:
        PETSc.Sys.Print(repr(refinement), comm=comm)
    if "monitor" in switches:
        def print_line(record: Record) -> None:
            PETSc.Sys.Print(_line(refinement, record), comm=comm)
        refinement.monitors.append(print_line)
    return refinement


def _read(prefix: str, ladder: str, defaults: dict[str, Any],
          comm: MPI.Comm) -> tuple[ProgressiveRefinement, list[str]]:
    """The refinement that the options mean, and which switches are on."""
    options = PETSc.Options(f"{prefix}prdp_")
    unknown = defaults.keys() - {*_STEPS, *_RULE}
    if unknown:
        raise TypeError(f"no option has the default {', '.join(sorted(unknown))}: known are "
                        f"{', '.join([*_STEPS, *_RULE])}")
    kind = options.getString("ladder") if options.hasName("ladder") else ladder
    if not isinstance(kind, str) or kind not in _LADDERS:
        raise ValueError(f"-{prefix}prdp_ladder must be one of {', '.join(_LADDERS)}, found "
                         f"{shown(kind)}")
    has_tolerances = kind == "tolerances"

    def read(names: tuple[str, ...], are_real: Callable[[str], bool]) -> tuple[dict[str, Any], str]:
        """Values by name, and how they were written where they are those of options."""
        values = {name: defaults[name] for name in names if name in defaults}
        written = {name: options.getString(name) for name in names if options.hasName(name)}
        for name, text in written.items():
            values[name] = _number(f"-{prefix}prdp_{name}", text, is_real=are_real(name))
        return values, " ".join(f"-{prefix}prdp_{name} {text}" for name, text in written.items())

    def made(make: Callable, values: dict[str, Any], written: str, **others):
        try:
            return make(**values, **others)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (as the options {written} have it)"
                              if written else str(error)) from None

    steps, written = read(_STEPS, lambda name: has_tolerances)
    if has_tolerances:
        steps = {"factor" if name == "step" else name: value for name, value in steps.items()}
    levels = made(_LADDERS[kind], steps, written)
    rule, written = read(_RULE, lambda name: name.startswith("tau"))
    refinement = made(ProgressiveRefinement, rule, written, ladder=levels, comm=comm)
    switches = [name for name in ("view", "monitor") if options.hasName(name)
                and _switch(f"-{prefix}prdp_{name}", options.getString(name))]
    return refinement, switches


def _number(option: str, text: str, *, is_real: bool) -> int | float:
    """What is written for an option, to the last digit."""
    if not text.strip():
        raise ValueError(f"{option} needs a value")
    if (_REAL if is_real else _INTEGER).fullmatch(text) is None:
        raise ValueError(f"{option} must be {'a number' if is_real else 'an integer'}, found "
                         f"{shown(text)}")
    return float(text) if is_real else int(text)


def _switch(option: str, text: str) -> bool:
    if text.lower() not in _SWITCHES:
        raise ValueError(f"{option} must be true or false, or have no value, found {shown(text)}")
    return _SWITCHES[text.lower()]


def _line(refinement: ProgressiveRefinement, record: Record) -> str:
    """One line of ``-prdp_monitor``."""
    line = (f"{len(refinement.history) - 1:5d} PRDP metric {record.metric:.6e} smoothed {record.smoothed:.6e} "
            f"level {record.level} ({record.setting})")
    return line + (f", refined to {refinement.setting}" if record.refined else "")
