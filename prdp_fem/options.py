"""Refinements from PETSc's options database."""
from __future__ import annotations

from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.ladders import IterationLadder, NewtonLadder, ToleranceLadder
from prdp_fem.refinement import ProgressiveRefinement, Record

__all__ = ["refinement_from_options"]

_LADDERS = {"iterations": IterationLadder, "tolerances": ToleranceLadder, "newton": NewtonLadder}


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

    Parameters
    ----------
    prefix : str
        Goes in front of ``prdp_``, as for a solver's options: with ``"heat_"`` the options are ``-heat_prdp_start`` and so on.
    ladder : str
        Default of ``-prdp_ladder``.
    comm : mpi4py.MPI.Comm or None
        Communicator of the refinement, see :class:`~prdp_fem.refinement.Refinement`; the world's where None.
    **defaults
        Defaults of the other options, by the name behind ``prdp_``: ``start``, ``step``, ``stop``, ``tau_step``, ``tau_stop``,
        ``ema_window``, ``error_window``.

    Returns
    -------
    ProgressiveRefinement

    Raises
    ------
    ValueError
        For an unknown ladder, and for values that the ladder or the refinement refuses.
    TypeError
        For a default without an option.
    """
    options = PETSc.Options(f"{prefix}prdp_")
    comm = MPI.COMM_WORLD if comm is None else comm
    kind = options.getString("ladder", ladder)
    if kind not in _LADDERS:
        raise ValueError(f"-{prefix}prdp_ladder must be one of {', '.join(_LADDERS)}, found {kind!r}")
    has_tolerances = kind == "tolerances"
    ladder_readers = {name: options.getReal if has_tolerances else options.getInt for name in ("start", "step", "stop")}
    rule_readers = {"tau_step": options.getReal, "tau_stop": options.getReal, "ema_window": options.getInt, "error_window": options.getInt}
    unknown = defaults.keys() - ladder_readers.keys() - rule_readers.keys()
    if unknown:
        raise TypeError(f"no option has the default {', '.join(sorted(unknown))}: known are {', '.join([*ladder_readers, *rule_readers])}")

    def ask(reader, name):
        try:
            return reader(name)
        except KeyError:
            raise ValueError(f"-{prefix}prdp_{name} needs a value") from None

    def read(readers):
        return {name: ask(reader, name) if options.hasName(name) else defaults[name]
                for name, reader in readers.items() if options.hasName(name) or name in defaults}

    steps = read(ladder_readers)
    if has_tolerances:
        steps = {"factor" if name == "step" else name: value for name, value in steps.items()}
    levels = _LADDERS[kind](**steps)
    refinement = ProgressiveRefinement(levels, **read(rule_readers), comm=comm)
    if options.getBool("view", False):
        PETSc.Sys.Print(repr(refinement), comm=comm)
    if options.getBool("monitor", False):
        refinement.monitors.append(lambda record: PETSc.Sys.Print(_line(refinement, record), comm=comm))
    return refinement


def _line(refinement: ProgressiveRefinement, record: Record) -> str:
    """One line of ``-prdp_monitor``."""
    line = (f"{len(refinement.history) - 1:5d} PRDP metric {record.metric:.6e} smoothed {record.smoothed:.6e} "
            f"level {record.level} ({record.setting})")
    return line + (f", refined to {refinement.setting}" if record.refined else "")
