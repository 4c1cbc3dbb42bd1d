"""The small least-squares problem of GMRES."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from firedrake.exceptions import ConvergenceError

__all__ = ["Column", "hessenberg", "least_squares", "solve_normal_equations"]


class Column(NamedTuple):
    """What a vector is in an orthonormal basis that grows by it.

    Attributes
    ----------
    products : numpy.ndarray
        Those with the basis before it.
    norm : float
        That of the rest.
    derivative : object
        What an arithmetic needs of the vector to differentiate its part in a minimisation.
    """

    products: np.ndarray
    norm: float
    derivative: Any = None


def hessenberg(columns: list[Column]) -> np.ndarray:
    """The matrix of shape (k + 1, k) with column j in its first j + 2 rows."""
    size = len(columns)
    H = np.zeros((size + 1, size))
    for j, column in enumerate(columns):
        H[: j + 1, j] = column.products
        H[j + 1, j] = column.norm
    return H


def least_squares(beta: float, H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """y that makes ‖β e₁ - H y‖ least, shape (k,), and β e₁ - H y, shape (k + 1,)."""
    Q, R = np.linalg.qr(H)
    y = _solve(R, beta * Q[0])
    residual = -H @ y
    residual[0] += beta
    return y, residual


def solve_normal_equations(H: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(HᵀH)⁻¹ times a vector of shape (k,).

    HᵀH, whose condition is the square of that of H, is not formed.
    """
    # To NumPy's types every mode gives Q and R.
    R = cast(np.ndarray, np.linalg.qr(H, mode="r"))
    return _solve(R, _solve(R.T, right))


def _solve(R: np.ndarray, right: np.ndarray) -> np.ndarray:
    try:
        return np.linalg.solve(R, right)
    except np.linalg.LinAlgError:
        raise ConvergenceError(
            "the iterations of GMRES have no derivative where they break down: "
            "look for an operator that is singular"
        ) from None
