"""A fresh tape, and no options left over, for each test."""
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
