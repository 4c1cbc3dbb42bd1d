"""What a SNES calls, as PETSc was given it."""

from __future__ import annotations

import ctypes

from firedrake.petsc import PETSc

__all__ = ["CallbackPointers"]

_LIBRARY = ctypes.CDLL(PETSc.__file__)
_KINDS = "Objective", "Function", "Jacobian"
# Beside the SNES, and before the function and its context, these take or give the residual, and the
# Jacobian with the matrix to precondition it by.
_OBJECTS = {"Objective": 0, "Function": 1, "Jacobian": 2}


class CallbackPointers:
    """The objective, residual and Jacobian of a SNES, to be given to it again just as they are.

    PETSc keeps a pointer to what petsc4py has of a Python function, and petsc4py lets go of that
    when it is given another one, or the same one again. But then solvers inside, such as the coarse
    ones of a full approximation scheme, go on with the pointer that they have found when they were
    set up.

    Parameters
    ----------
    snes : PETSc.SNES
        It has its callbacks, which none but this object gives it again.
    """

    def __init__(self, snes: PETSc.SNES):
        self._snes = snes
        self._pointers = {kind: _get(snes, kind) for kind in _KINDS}

    def attach(self, residual: PETSc.Vec, J: PETSc.Mat, P: PETSc.Mat) -> None:
        """Have the SNES, and the DM that it shares with others, call these again.

        Parameters
        ----------
        residual : PETSc.Vec
            What residuals are written to.
        J, P : PETSc.Mat
            The Jacobian, and what it is preconditioned by.
        """
        objects: dict[str, tuple] = {"Objective": (), "Function": (residual,), "Jacobian": (J, P)}
        for kind, pointers in self._pointers.items():
            handles = (ctypes.c_void_p(given.handle) for given in objects[kind])
            _call(f"SNESSet{kind}", self._snes, *handles, *pointers)


def _get(snes: PETSc.SNES, kind: str) -> tuple[ctypes.c_void_p, ctypes.c_void_p]:
    """A function that a SNES calls, and the context that it is called with."""
    function, context = ctypes.c_void_p(), ctypes.c_void_p()
    unasked = (None,) * _OBJECTS[kind]
    _call(f"SNESGet{kind}", snes, *unasked, ctypes.byref(function), ctypes.byref(context))
    return function, context


def _call(name: str, snes: PETSc.SNES, *arguments) -> None:
    error = getattr(_LIBRARY, name)(ctypes.c_void_p(snes.handle), *arguments)
    if error:
        raise PETSc.Error(error)
