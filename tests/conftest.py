"""A fresh tape, and no options left over, for each test."""
import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import firedrake.adjoint as adjoint  # before petsc4py, which it initialises
import pytest
from firedrake.petsc import PETSc


@pytest.fixture(autouse=True)
def fresh_tape():
    adjoint.continue_annotation()
    with adjoint.set_working_tape(adjoint.Tape()):
        yield
    adjoint.pause_annotation()


@pytest.fixture(autouse=True)
def no_options_left():
    options = PETSc.Options()
    before = dict(options.getAll())
    yield
    for name in dict(options.getAll()):
        if name not in before:
            options.delValue(name)


_TAYLOR_TABLE = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[_TAYLOR_TABLE] = []


@pytest.fixture
def taylor_table(request):
    """Rows of problem, control, solver and the rates at which remainders fall, printed at the end of the log."""
    return request.config.stash[_TAYLOR_TABLE]


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[_TAYLOR_TABLE]
    if rows and PETSc.COMM_WORLD.rank == 0:
        terminalreporter.section(f"Taylor remainders on {PETSc.COMM_WORLD.size} rank(s): {len(rows)} combinations")
        terminalreporter.write_line(f"{'problem':20s} {'control':22s} {'solver':38s} {'first':>7s} {'second':>7s}")
        for problem, control, ksp, first, second in rows:
            terminalreporter.write_line(f"{problem:20s} {control:22s} {ksp:38s} {first:7.3f} {second:7.3f}")


def pytest_unconfigure(config):
    """Leave PETSc in the same state on all ranks.

    At exit it destroys dropped objects collectively, but only on the ranks that have objects, and dropped ones, at all; Python
    drops what is in reference cycles at another time on each rank.
    """
    if PETSc.COMM_WORLD.size > 1:
        config.kept_to_the_end = PETSc.Vec().createMPI(PETSc.COMM_WORLD.size, comm=PETSc.COMM_WORLD)
        gc.collect()
        PETSc.garbage_cleanup(PETSc.COMM_WORLD)
