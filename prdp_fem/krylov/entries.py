"""Entries of operators that are not finite: found before anything is factorised.

Some preconditioners come to no end with them (an incomplete Cholesky factorisation shifts a
diagonal with infinity for ever, and LAPACK's singular values may take minutes), and some leave out
what is no number, so that a solution looks like one.
"""

from __future__ import annotations

import math

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

__all__ = ["require_finite_entries"]

_FROBENIUS = PETSc.NormType.FROBENIUS
# The product of it with any number is finite.
_TINY = 2.0**-1000


def require_finite_entries(name: str, *operators: PETSc.Mat) -> None:
    """Raise, on all ranks, where an entry of an operator is not finite on one.

    Parameters
    ----------
    name : str
        Of what is solved for, for messages.
    *operators : PETSc.Mat
        With their values. An assembled one is read through once, another one multiplied by once.

    Raises
    ------
    firedrake.exceptions.ConvergenceError
    """
    for operator in {operator.handle: operator for operator in operators}.values():
        if not _is_finite(operator):
            raise ConvergenceError(
                f"the operator of the solve for '{name}' holds NaN or infinity: look for them in "
                "the controls, the coefficients and the state that it depends on, for a "
                "derivative that does not exist there, such as that of a square root at zero, or "
                "for numbers that are too large"
            )


def _is_finite(operator: PETSc.Mat) -> bool:
    if "aij" in operator.getType() and math.isfinite(operator.norm(_FROBENIUS)):
        return True
    # There is no such norm of it, or the squares of its entries are too large.
    x, product = operator.createVecs()
    x.set(_TINY)
    operator.mult(x, product)
    return math.isfinite(product.norm())
