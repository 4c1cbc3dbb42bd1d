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


def pytest_unconfigure(config):
    """Leave PETSc in the same state on all ranks.

    At exit it destroys dropped objects collectively, but only on the ranks that have objects, and dropped ones, at all; Python
    drops what is in reference cycles at another time on each rank.
    """
    if PETSc.COMM_WORLD.size > 1:
        config.kept_to_the_end = PETSc.Vec().createMPI(PETSc.COMM_WORLD.size, comm=PETSc.COMM_WORLD)
        gc.collect()
        PETSc.garbage_cleanup(PETSc.COMM_WORLD)
