"""Boundary values taken to the right-hand side."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from firedrake import Cofunction, Function, action
from firedrake.petsc import PETSc

from prdp_fem.memory.place import Place
from prdp_fem.problem.firedrake_internals import assemble_into
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import set_local_values

__all__ = ["Lifting"]


class Lifting:
    """b -= J g for values g at boundary dofs; J is the derivative of the residual by the solution.

    Parameters
    ----------
    forms : Forms
    place : Place
        Where b is.
    """

    def __init__(self, forms: Forms, place: Place):
        self._forms, self._place = forms, place
        space = forms.solution.function_space()
        self._values, self._assembled = Function(space), Cofunction(space.dual())

    @cached_property
    def _assembler(self):
        return self._forms.assembler(action(self._forms.jacobian, self._values))

    def subtract(self, boundary: np.ndarray, b: PETSc.Vec) -> None:
        """b -= J g; entries of b at boundary dofs stay.

        Parameters
        ----------
        boundary : numpy.ndarray
            Rank-local g, zero at other dofs.
        b : PETSc.Vec
        """
        set_local_values(self._values, boundary)
        assemble_into(self._assembler, self._assembled)
        with self._assembled.dat.vec_ro as vector:
            b.axpy(-1.0, self._place.memory.from_host(vector))
