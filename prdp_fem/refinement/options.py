"""Refinements from PETSc's options database."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, TypeVar

from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.arguments import instance, shown
from prdp_fem.ranks.agreement import agree
from prdp_fem.refinement import LADDERS, RULES, Record, Refinement
from prdp_fem.refinement.option_names import OF_LADDERS, OF_RULES, check_option_names
from prdp_fem.refinement.registry import Number

__all__ = ["refinement_from_options"]

_Function = TypeVar("_Function", bound=Callable)
_INTEGER = re.compile(r"[+-]?[0-9]{1,100}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
# As PETSc reads them; an option without a value is one that is switched on.
_SWITCHES = {
    **dict.fromkeys(("", "true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _documented(function: _Function) -> _Function:
    """Put the names of all ladders, and their defaults, into the documentation of the options."""

    def defaults(option: str) -> str:
        texts = []
        for entry in LADDERS.values():
            if option in entry.numbers:
                default = signature(entry.make).parameters[entry.numbers[option].argument].default
                texts.append("no limit" if default is None else f"{default:.5g}")
        return ", or ".join(dict.fromkeys(texts))

    texts = {
        "LADDERS": "|".join(LADDERS),
        "RULES": "|".join(RULES),
        **{option.upper(): defaults(option) for option in OF_LADDERS},
    }
    # Docstrings are taken away by python -OO.
    function.__doc__ = re.sub(r"\{(\w+)\}", lambda match: texts[match[1]], function.__doc__ or "")
    return function


@_documented
def refinement_from_options(
    prefix: str = "",
    *,
    ladder: str = "iterations",
    rule: str = "prdp",
    comm: MPI.Comm | None = None,
    **defaults,
) -> Refinement:
    """A :class:`ProgressiveRefinement`, or another rule, as PETSc's options say.

    They are given on the command line, or in the options database::

        -prdp_ladder <{LADDERS}>: what the levels mean (iterations)
        -prdp_start <number>: iterations, steps or relative tolerance at level 0 ({START})
        -prdp_step <number>: what a level adds, or multiplies a tolerance by ({STEP})
        -prdp_ratio <real>: what a level of a geometric ladder multiplies iterations by ({RATIO})
        -prdp_stop <number>: most iterations or steps, or smallest tolerance ({STOP})
        -prdp_rule <{RULES}>: when to refine (prdp)
        -prdp_tau_step <real>: ratio of moving averages above which training has plateaued (0.98)
        -prdp_tau_stop <real>: least improvement that makes another refinement worth while (0.9)
        -prdp_ema_window <int>: window of the moving average of the metrics (6)
        -prdp_error_window <int>: how many moving averages are looked back over (3)
        -prdp_gap <real>: difference to a finer setting above which "discrepancy" refines (0.1)
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
    rule : str
        Default of ``-prdp_rule``.
    comm : mpi4py.MPI.Comm or None
        Communicator of the refinement, see :class:`~prdp_fem.refinement.rules.Refinement`; the
        world's where None. This is collective on it.
    **defaults
        Defaults of the other options, by the name behind ``prdp_``: ``start``, ``step``,
        ``ratio``, ``stop``, ``tau_step``, ``tau_stop``, ``ema_window``, ``error_window``, ``gap``.

    Returns
    -------
    Refinement

    Raises
    ------
    ValueError
        For an unknown option, ladder or rule, for an option that these do not have, and for a value
        that cannot be meant; on all ranks, where it is so on one.
    TypeError
        For a default without an option.
    """
    prefix = instance("prefix", prefix, str, "a string, such as 'heat_'")
    if re.search(r"^-|\s", prefix):
        raise ValueError(f"prefix must have no spaces, and no dash in front, found {shown(prefix)}")
    if prefix and not prefix.endswith("_"):
        prefix = f"{prefix}_"  # as solvers have it
    if not isinstance(comm, (MPI.Comm, type(None))):
        raise TypeError(
            "comm must be a communicator of mpi4py's, such as mesh.comm, or None, "
            f"found {shown(comm)}"
        )
    comm = MPI.COMM_WORLD if comm is None else comm
    refinement: Refinement

    def make() -> tuple:
        nonlocal refinement
        check_option_names()
        refinement, switches = _read(prefix, (ladder, rule), defaults, comm)
        return repr(refinement), switches

    _, switches = agree(
        comm,
        make,
        "options of a refinement",
        "mpiexec may hand the environment on to some ranks only",
    )
    on: Any = comm  # PETSc takes mpi4py's communicators, too
    if "view" in switches:
        PETSc.Sys.Print(repr(refinement), comm=on)
    if "monitor" in switches:

        def print_line(record: Record) -> None:
            PETSc.Sys.Print(_line(refinement, record), comm=on)

        refinement.monitors.append(print_line)
    return refinement


def _read(
    prefix: str, kinds: tuple[str, str], defaults: dict[str, Any], comm: MPI.Comm
) -> tuple[Refinement, list[str]]:
    """The refinement that the options mean, and which switches are on."""
    options = PETSc.Options(f"{prefix}prdp_")
    known = [*OF_LADDERS, *OF_RULES]
    unknown = defaults.keys() - set(known)
    if unknown:
        raise TypeError(
            f"no option has the default {', '.join(sorted(unknown))}: known are {', '.join(known)}"
        )
    ladder = _named(options, prefix, "ladder", kinds[0], LADDERS)
    rule = _named(options, prefix, "rule", kinds[1], RULES)
    given = {name for name in known if name in defaults or options.hasName(name)}
    _refuse_unread(
        prefix, f"ladder {ladder}", given.intersection(OF_LADDERS), LADDERS[ladder].numbers
    )
    _refuse_unread(prefix, f"rule {rule}", given.intersection(OF_RULES), RULES[rule].options)

    def read(numbers: Mapping[str, Number]) -> tuple[dict[str, Any], str]:
        """Values by argument, and how they were written where they are those of options."""
        values = {
            number.argument: defaults[name] for name, number in numbers.items() if name in defaults
        }
        written = {name: options.getString(name) for name in numbers if options.hasName(name)}
        for name, text in written.items():
            number = numbers[name]
            values[number.argument] = _number(f"-{prefix}prdp_{name}", text, is_real=number.is_real)
        return values, " ".join(f"-{prefix}prdp_{name} {text}" for name, text in written.items())

    def made(make: Callable, values: dict[str, Any], written: str, **others):
        try:
            return make(**values, **others)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{error} (as the options {written} have it)" if written else str(error)
            ) from None

    levels = made(LADDERS[ladder].make, *read(LADDERS[ladder].numbers))
    refinement = made(RULES[rule].make, *read(RULES[rule].options), ladder=levels, comm=comm)
    switches = [
        name
        for name in ("view", "monitor")
        if options.hasName(name) and _switch(f"-{prefix}prdp_{name}", options.getString(name))
    ]
    return refinement, switches


def _named(
    options: PETSc.Options, prefix: str, option: str, default: Any, known: Mapping[str, Any]
) -> str:
    """The name of a ladder or a rule that is known."""
    name = options.getString(option) if options.hasName(option) else default
    if not isinstance(name, str) or name not in known:
        raise ValueError(
            f"-{prefix}prdp_{option} must be one of {', '.join(known)}, found {shown(name)}"
        )
    return name


def _refuse_unread(prefix: str, whose: str, given: set[str], read: Mapping[str, Number]) -> None:
    """Raise for an option that would change nothing, as it is another ladder's or rule's."""
    if unread := sorted(given - read.keys()):
        kind = whose.partition(" ")[0]
        raise ValueError(
            f"-{prefix}prdp_{unread[0]} is no option of the {whose}, which has "
            f"{', '.join(read)}: leave it away, or choose another -{prefix}prdp_{kind}"
        )


def _number(option: str, text: str, *, is_real: bool) -> int | float:
    """What is written for an option, to the last digit."""
    if not text.strip():
        raise ValueError(f"{option} needs a value")
    if (_REAL if is_real else _INTEGER).fullmatch(text) is None:
        raise ValueError(
            f"{option} must be {'a number' if is_real else 'an integer'}, found {shown(text)}"
        )
    return float(text) if is_real else int(text)


def _switch(option: str, text: str) -> bool:
    if text.lower() not in _SWITCHES:
        raise ValueError(f"{option} must be true or false, or have no value, found {shown(text)}")
    return _SWITCHES[text.lower()]


def _line(refinement: Refinement, record: Record) -> str:
    """One line of ``-prdp_monitor``."""
    line = (
        f"{len(refinement.history) - 1:5d} PRDP metric {record.metric:.6e} "
        f"smoothed {record.smoothed:.6e} level {record.level} ({record.setting})"
    )
    return line + (f", refined to {refinement.setting}" if record.refined else "")
