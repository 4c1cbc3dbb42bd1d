"""What is read from the views of PETSc's objects."""

import pytest
from firedrake.petsc import PETSc

from prdp_fem.krylov.view import described, found_in


def test_what_a_view_says_is_found():
    ksp = PETSc.KSP().create()
    ksp.setType("gmres")
    ksp.setGMRESRestart(7)
    assert found_in(described(ksp), r"restart=(\d+)")[1] == "7"


def test_what_a_view_does_not_say_is_an_error_with_what_it_says():
    with pytest.raises(RuntimeError, match=r"nothing like 'restart=.*', found 'type: cg'"):
        found_in("type: cg", r"restart=(\d+)")
