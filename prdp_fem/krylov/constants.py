"""Operators that make nothing of a constant, which nobody has said.

The problem of a pressure that is determined up to a constant, of a body that nothing holds, or of a
heat flow without a temperature at the boundary has no solution, or many. Most iterations go on all
the same, and say that they have converged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.krylov.consistency import solves_least_squares
from prdp_fem.krylov.nested import has_factorisation
from prdp_fem.krylov.null_spaces import null_space
from prdp_fem.krylov.probe import Probe
from prdp_fem.ranks.warning import OneWarning

__all__ = ["ConstantsCheck"]

# How long the product with a constant may be, relative to that with a vector in the same places
# without a pattern. Rounding errors leave less; what is more may be meant, however small it is.
_ROUNDING = 1e-13


class ConstantsCheck:
    """Looks at the first operator that has values and was given no null space.

    That costs two products for each component of the solution, once. There is no false alarm: an
    operator that makes nothing of a vector has no inverse. But there are others without one.

    Parameters
    ----------
    name : str
        Of what is solved for, for messages.
    components : sequence of slice
        The rank-local places of the dofs of each component of the solution, of which all may be the
        same number.
    """

    def __init__(self, name: str, components: Sequence[slice]):
        self._name = name
        self._components = components
        self._warning = OneWarning()
        self._is_done = False

    def look(self, ksp: PETSc.KSP) -> None:
        """Look at what the operator of a KSP makes of constants; collective.

        Factorisations are looked at otherwise, and least squares have a solution.

        Warns
        -----
        RuntimeWarning
            Once, on the first rank, where that is nothing.
        """
        if self._is_done or has_factorisation(ksp) or solves_least_squares(ksp):
            return
        A, _ = ksp.getOperators()
        self._is_done = True
        if null_space(A) is not None:
            return
        probe = Probe(A)
        for place in range(len(self._components)):
            found, expected = self._product_sizes(A, probe, place)
            if not (math.isfinite(expected) and expected > 0):
                self._is_done = False  # it has no values there as yet
            elif found <= _ROUNDING * expected:
                self._is_done = True
                self._warning.give(self._message(place, found, expected), A.comm)
                return

    def _product_sizes(self, A: PETSc.Mat, probe: Probe, place: int) -> tuple[float, float]:
        """How much longer A makes a constant of one component, and a vector in its places."""
        chosen = self._components[place]
        without_pattern = probe.x.array_r[chosen].copy()
        sizes = []
        for values in (1.0, without_pattern):
            entries = np.zeros(probe.y.getLocalSize())
            entries[chosen] = values
            probe.y.setArray(entries)
            A.mult(probe.y, probe.Ay)
            size = probe.y.norm()
            sizes.append(probe.Ay.norm() / size if size > 0 else 0.0)
        found, expected = sizes
        return found, expected

    def _message(self, place: int, found: float, expected: float) -> str:
        if len(self._components) == 1:
            what = "a constant"
            remedy = "nullspace=VectorSpaceBasis(constant=True)"
        else:
            what = f"a constant of component {place} of the solution"
            remedy = (
                "nullspace= with the constants of that component, or with a body's rigid motions"
            )
        return (
            f"the operator of the solve for '{self._name}' is singular: it makes of {what} a "
            f"vector {found:.1e} times as long, and of one as large without a pattern "
            f"{expected:.1e} times, so that solutions and derivatives may be off by any constant: "
            f"give the solver {remedy}, with transpose_nullspace= where the operator is not "
            "symmetric, or a condition that fixes the constant"
        )
