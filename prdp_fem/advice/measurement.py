"""What was measured of a method at a setting: the rows of an advice's table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

__all__ = ["Measurement", "relative_error"]

_TINY = np.finfo(float).tiny


@dataclass(frozen=True)
class Measurement:
    """A method at a setting, for one sample.

    Attributes
    ----------
    method : str
    solver_parameters : Mapping of str
    factorises : bool
        Whether the method has no iterations, since it factorises.
    is_at_hand : bool
        Whether the method is the user's own.
    asked : str
        What was asked for: ``"rtol 1e-04"``, ``"2 digits"``, ``"as it is"``.
    setting : Setting or None
        What was put on the solver; None for what its options say.
    iterations : tuple of int
        Of the Krylov method, forward and backward.
    newton_steps : int
    seconds : tuple of float
        Forward and backward, medians of ``repetitions``; with assembly and set-up where these are
        made for each sample. Processor time, the longest of all ranks.
    set_up : float
        Seconds of assembly and set-up that are made once, and kept; zero where they are made for
        each sample.
    error, gradient_error : float
        Of the solution, and of the derivative by controls (for a solver, of the multiplier), in the
        Euclidean norm of dofs, relative to those of the reference.
    repetitions : int
    spread : float
        Largest less least of the times of forward and backward, relative to their median.
    failure : str
        What is wrong with it, or why it was stopped; empty where it was measured.
    """

    method: str
    solver_parameters: Mapping[str, Any]
    factorises: bool = False
    is_at_hand: bool = False
    asked: str = ""
    setting: Any = None
    iterations: tuple[int, int] = (0, 0)
    newton_steps: int = 0
    seconds: tuple[float, float] = (math.nan, math.nan)
    set_up: float = math.nan
    error: float = math.inf
    gradient_error: float = math.inf
    repetitions: int = 0
    spread: float = 0.0
    failure: str = ""

    @property
    def cost(self) -> float:
        """Seconds of a sample, forward and backward; infinite for what failed."""
        return math.inf if self.failure else sum(self.seconds)

    @property
    def digits(self) -> float:
        """The right decimal digits of solution and derivative, of the worse of the two."""
        if self.failure:
            return -math.inf
        return -math.log10(max(self.error, self.gradient_error, _TINY))


def relative_error(
    comm: MPI.Comm, found: Sequence[np.ndarray], reference: Sequence[np.ndarray]
) -> float:
    """The largest of the errors of rows of arrays, relative to those of others. Collective.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    found, reference : sequence of numpy.ndarray
        Shape (rows, rank-local size). What all ranks have alike counts once for each, in both.
    """
    # Parts have different numbers of rows: what a batch shares has one.
    squares = np.array(
        [
            (np.sum((row - exact) ** 2), np.sum(exact**2))
            for one, other in zip(found, reference)
            for row, exact in zip(one, other)
        ]
    ).reshape(-1, 2)
    comm.Allreduce(MPI.IN_PLACE, squares, MPI.SUM)
    error, size = squares.T
    if not np.isfinite(squares).all():
        return math.inf
    # Where a derivative is zero, nothing is relative to it.
    relative = np.sqrt(np.divide(error, size, out=np.zeros_like(error), where=size > _TINY))
    return float(relative.max(initial=0.0))
