"""What is called after each solve of a KSP, where PETSc has room for a single function."""

from __future__ import annotations

from collections.abc import Callable

from firedrake.petsc import PETSc

__all__ = ["PostSolve"]

# Where petsc4py keeps what setPostSolve was given: a function, positional and keyword arguments.
_ATTRIBUTE = "__postsolve__"


class PostSolve:
    """A function that is called after each solve of a KSP, behind one that was set by hand.

    Parameters
    ----------
    function : callable
        Of the KSP, the right-hand side and the solution.
    """

    def __init__(self, function: Callable[[PETSc.KSP, PETSc.Vec, PETSc.Vec], None]):
        self._function = function

    def put_on(self, ksp: PETSc.KSP) -> None:
        """Have it called for a KSP; once more where something else was set there since then."""
        there = ksp.getAttr(_ATTRIBUTE)
        owner = None if there is None else getattr(there[0], "__self__", None)
        if owner is self:
            return
        # Of another one of this class, whose system was made anew, only what it was behind of.
        by_hand = there[1][0] if isinstance(owner, PostSolve) else there
        ksp.setPostSolve(self._call, (by_hand,))

    def _call(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec, by_hand: tuple | None) -> None:
        if by_hand is not None:
            function, arguments, keywords = by_hand
            function(ksp, b, x, *arguments, **keywords)
        self._function(ksp, b, x)
