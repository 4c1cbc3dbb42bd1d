"""What the user's coefficients and conditions say at the moment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import ufl
from firedrake import Function
from pyadjoint.tape import stop_annotating

from prdp_fem.problem.boundary import BoundaryData
from prdp_fem.problem.firedrake_internals import boundary_expression
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import local_values
from prdp_fem.problem.point import NO_VALUES
from prdp_fem.ranks.flags import on_any_rank

__all__ = ["PresentValues"]


class PresentValues:
    """The values that a problem has as the user's objects are now.

    Parameters
    ----------
    forms : Forms
    """

    def __init__(self, forms: Forms):
        space = forms.solution.function_space()
        self._forms, self._comm = forms, space.mesh().comm
        with stop_annotating():
            self._boundary = Function(space)
        self._boundary_data: BoundaryData | None = None

    def inputs(self, without: Sequence[int] = ()) -> list[np.ndarray]:
        """Rank-local values of coefficients, not to be written to; empty for those left out."""
        return [
            NO_VALUES if index in without else entry.present_values()
            for index, entry in enumerate(self._forms.inputs)
        ]

    def boundary(self, conditions) -> np.ndarray | None:
        """Rank-local values of boundary conditions, zero elsewhere; None for zero on all ranks."""
        expressions = map(boundary_expression, conditions)
        if all(isinstance(expression, ufl.classes.Zero) for expression in expressions):
            return None
        with stop_annotating():
            self._boundary.dat.zero()
            for condition in conditions:
                condition.apply(self._boundary)
        values = local_values(self._boundary)
        # Not by PETSc's norm: on several ranks that of NaN may be zero.
        return values if on_any_rank(self._comm, bool(values.any())) else None

    def boundary_data(self) -> BoundaryData:
        """The values that the problem's conditions give, as a function of what they depend on."""
        if self._boundary_data is None or not self._boundary_data.is_current:
            self._boundary_data = BoundaryData(self._forms)
        return self._boundary_data
