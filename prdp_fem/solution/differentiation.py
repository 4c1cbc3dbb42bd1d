"""How solves are differentiated: as solutions of their equations, or as the iterations that they
are.

This module is pure Python: it knows neither PETSc nor Firedrake.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from prdp_fem.arguments import shown

__all__ = ["Implicit", "Unrolled", "differentiation_of"]


@dataclass(frozen=True)
class Implicit:
    """The derivative of a solution of the equations: the adjoint system is solved by the same KSP,
    as far as the forward one was.

    It costs one more solve. After few iterations the solve is no solution yet, and this is no
    derivative of what was computed, but close to that of the solution.
    """


@dataclass(frozen=True)
class Unrolled:
    """The exact derivative of what was computed: of the K-th iterate, by the operator, the
    right-hand side and the guess.

    It costs about two solves, and memory for K vectors or, with checkpoints, for fewer.

    Parameters
    ----------
    checkpoints : int or None
        How many states of a Krylov iteration are kept for the backward pass, beside one stretch
        between two of them that is computed again; None keeps all.
    steps : str
        Of nonlinear solves: ``"all"`` differentiates through all Newton steps; ``"last"`` through
        the last one, with the state before it taken for constant.
    """

    checkpoints: int | None = None
    steps: str = "all"

    def __post_init__(self):
        if self.checkpoints is not None and (
            isinstance(self.checkpoints, bool)
            or not isinstance(self.checkpoints, Integral)
            or self.checkpoints < 1
        ):
            raise ValueError(
                "checkpoints must be an integer of at least 1, or None to keep all, "
                f"found {shown(self.checkpoints)}"
            )
        if not isinstance(self.steps, str) or self.steps not in ("all", "last"):
            raise ValueError(f"steps must be 'all' or 'last', found {shown(self.steps)}")


_BY_NAME = {"implicit": Implicit, "unrolled": Unrolled}


def differentiation_of(value) -> Implicit | Unrolled:
    """The differentiation that a name or an object stands for.

    Raises
    ------
    ValueError
        For anything else.
    """
    if isinstance(value, (Implicit, Unrolled)):
        return value
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]()
    raise ValueError(
        f"differentiation must be one of {', '.join(map(repr, _BY_NAME))}, or an object such as"
        f" Unrolled(checkpoints=8), found {shown(value)}"
    )
