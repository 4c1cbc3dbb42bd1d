"""A pytest plugin that puts this package's solvers where Firedrake's are, to run Firedrake's own
tests on them.

What calls itself a drop-in should pass the tests of what it replaces, and Firedrake's adjoint tests
know corners of pyadjoint that nobody here thought of. With the sources of the installed Firedrake
beside this checkout::

    PYTHONPATH=tests python -m pytest -p put_in_place -m "not parallel or parallel[1]" \\
        ../firedrake/tests/firedrake/adjoint

``solve(a == L, u)`` and ``solve(F == 0, u)`` are made and annotated by this package, too. Systems
that are assembled already, and projections, stay Firedrake's. A run in which no solve was this
package's says so, and fails.
"""

import functools
import inspect
import os
import types
from contextlib import nullcontext

# pytest's arguments are unknown to PETSc
os.environ.setdefault("FIREDRAKE_DISABLE_OPTIONS_LEFT", "1")

import firedrake
import pytest
import ufl
from firedrake import solving
from pyadjoint.tape import annotate_tape, get_working_tape, stop_annotating

import prdp_fem.solvers
from prdp_fem.solvers import linear_solvers

_SOLVERS = {
    name: getattr(prdp_fem, name)
    for name in ("LinearVariationalSolver", "NonlinearVariationalSolver")
}
_COUNTS = ("solves", "adjoint_solves", "tangent_solves")
# Of every solver made; not the solvers, which would live on with all that they hold.
_statistics: list = []


def _put_in() -> None:
    # This package makes Firedrake's solvers by the names that are about to change.
    linear_solvers.firedrake = types.SimpleNamespace(**vars(firedrake))
    # Not in firedrake.variational_solver: preconditioners import from there, and look into what is
    # private to the solvers they make.
    solving.vs = types.SimpleNamespace(**{**vars(solving.vs), **_SOLVERS})
    vars(firedrake).update(_SOLVERS)
    firedrake.solve = solving.solve = _replaced(solving.solve)
    prdp_fem.solvers.RefinedSolver.__init__ = _counted(prdp_fem.solvers.RefinedSolver.__init__)


def _replaced(solve):
    """A ``solve`` that leaves equations, and their annotation, to the solvers put in."""

    @functools.wraps(solve)
    def wrapper(*args, ad_block_tag=None, **kwargs):
        if not isinstance(args[0], ufl.classes.Equation):
            return solve(*args, ad_block_tag=ad_block_tag, **kwargs)
        annotate = annotate_tape(kwargs)
        with nullcontext() if annotate else stop_annotating():
            # The function beneath Firedrake's annotation.
            solution = inspect.unwrap(solve)(*args, **kwargs)
        if annotate:
            get_working_tape().get_blocks()[-1].tag = ad_block_tag
        return solution

    return wrapper


def _counted(init):
    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        init(self, *args, **kwargs)
        _statistics.append(self.statistics)

    return wrapper


def _totals() -> dict[str, int]:
    return {name: sum(getattr(statistics, name) for statistics in _statistics) for name in _COUNTS}


def pytest_configure(config) -> None:
    """Put the solvers in, before the first test module says ``from firedrake import *``."""
    _put_in()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session) -> None:
    """Fail where nothing was put in."""
    if (
        not _totals()["solves"]
        and session.exitstatus == pytest.ExitCode.OK
        and not session.config.option.collectonly
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter) -> None:
    """Say how many solves were this package's."""
    totals = _totals()
    if totals["solves"]:
        counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in totals.items())
        terminalreporter.write_line(
            f"put in place: {len(_statistics)} solvers of prdp_fem, with {counts}"
        )
    else:
        terminalreporter.write_line("put in place: no solve went through prdp_fem", red=True)
