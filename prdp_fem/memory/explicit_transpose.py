"""Products with the transpose of a matrix that are products with an explicit transpose.

On devices PETSc has no transposed product of some matrices (ViennaCL's), and one of others that
adds up in an order which changes from call to call (cuSPARSE's). Here a matrix is given another
one, for whoever asks: a transposed solve of a KSP, or a restated iteration.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from weakref import WeakValueDictionary

from petsc4py import PETSc

__all__ = ["ExplicitTranspose"]

_MULT_TRANSPOSE = 5  # MATOP_MULT_TRANSPOSE in petscmat.h
_PYTHON_ERROR = 101  # what petsc4py returns to PETSc
_PRODUCT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
# petsc4py cannot set an operation of a matrix that has a type. Calls keep the interpreter's lock:
# they call back.
_LIBRARY = ctypes.PyDLL(PETSc.__file__)


class ExplicitTranspose:
    """What a matrix does when it is to be multiplied by transposed; from now on, and as long as
    this is there.

    Parameters
    ----------
    matrix : PETSc.Mat
    make : callable
        Makes the transpose for the values of the moment; called at the first product, and at the
        first one after :meth:`forget`.
    """

    def __init__(self, matrix: PETSc.Mat, make: Callable[[], PETSc.Mat]):
        self._make, self._handle = make, matrix.handle
        self._transpose: PETSc.Mat | None = None
        _KNOWN[self._handle] = self
        _LIBRARY.MatSetOperation(ctypes.c_void_p(self._handle), _MULT_TRANSPOSE, _multiply)

    def forget(self) -> None:
        """The matrix has other values."""
        self._transpose = None

    def transpose(self) -> PETSc.Mat:
        """The transpose."""
        if self._transpose is None:
            self._transpose = self._make()
        return self._transpose


# By the matrix; a memory that goes takes its own along.
_KNOWN: WeakValueDictionary[int, ExplicitTranspose] = WeakValueDictionary()


@_PRODUCT
def _multiply(matrix: int, x: int, y: int) -> int:
    """y = Aᵀ x, for PETSc; an error code."""
    try:
        transpose = _KNOWN[matrix].transpose()
    except Exception as error:  # none may pass through PETSc
        print(
            f"the transpose of an operator on a device could not be made: {error!r}",
            file=sys.stderr,
        )
        return _PYTHON_ERROR
    return _LIBRARY.MatMult(
        ctypes.c_void_p(transpose.handle), ctypes.c_void_p(x), ctypes.c_void_p(y)
    )
