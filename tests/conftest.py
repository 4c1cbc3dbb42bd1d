"""A fresh tape, and no options left over, for each test."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# with more, partitions of meshes depend on timing
os.environ.setdefault("SCOTCH_PTHREAD_NUMBER", "1")

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


_TAYLOR_ROWS: list = []


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: takes more than five seconds on one rank; make test-fast leaves it out"
    )
    config.addinivalue_line(
        "markers",
        "ranks(*numbers): where a test is made for several numbers of ranks, those of these"
        " parameters",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Give a test the mark of its module, as of the numbers of ranks in a mark mpi-pytest makes
    tests only if the function has it.
    """
    own = getattr(metafunc.function, "pytestmark", [])
    inherited = metafunc.definition.get_closest_marker("parallel")
    if inherited is not None and all(mark.name != "parallel" for mark in own):
        metafunc.function.pytestmark = [*own, inherited]


def pytest_collection_modifyitems(config, items):
    """Leave out parameters on numbers of ranks that they are not for."""

    def is_left_out(item):
        mark = item.get_closest_marker("ranks")
        return mark is not None and item.callspec.params["_nprocs"] not in mark.args

    left_out = [item for item in items if is_left_out(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def taylor_table(record_property):
    """Takes rows of problem, control, solver and the rates at which remainders fall, to be printed
    at the end of the log.
    """
    # As plain numbers, which processes can send each other.
    return lambda row: record_property(
        "taylor", [part if isinstance(part, str) else float(part) for part in row]
    )


def pytest_runtest_logreport(report):
    """Of a test in another process, too."""
    if report.when == "teardown":
        _TAYLOR_ROWS.extend(row for name, row in report.user_properties if name == "taylor")


def pytest_terminal_summary(terminalreporter):
    if _TAYLOR_ROWS and PETSc.COMM_WORLD.rank == 0:
        terminalreporter.section(
            f"Taylor remainders on {PETSc.COMM_WORLD.size} rank(s): {len(_TAYLOR_ROWS)}"
            " combinations"
        )
        terminalreporter.write_line(
            f"{'problem':20s} {'control':22s} {'solver':38s} {'first':>7s} {'second':>7s}"
        )
        for problem, control, ksp, first, second in _TAYLOR_ROWS:
            terminalreporter.write_line(
                f"{problem:20s} {control:22s} {ksp:38s} {first:7.3f} {second:7.3f}"
            )


def pytest_unconfigure(config):
    """Leave PETSc in the same state on all ranks.

    At exit it destroys dropped objects collectively, but only on the ranks that have objects, and
    dropped ones, at all; Python drops what is in reference cycles at another time on each rank.
    """
    if PETSc.COMM_WORLD.size > 1:
        config.kept_to_the_end = PETSc.Vec().createMPI(PETSc.COMM_WORLD.size, comm=PETSc.COMM_WORLD)
        gc.collect()
        PETSc.garbage_cleanup(PETSc.COMM_WORLD)
