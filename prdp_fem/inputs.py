"""What a variational problem depends on: its coefficients, each with the copy that the assembled forms read.

Solves at other values than the user's (a tensor's, a replayed tape's) write the copies and leave the user's objects alone.
"""
from __future__ import annotations

import numpy as np
import ufl
from firedrake import Cofunction, Constant, Function, FunctionSpace, TensorFunctionSpace, VectorFunctionSpace
from firedrake.petsc import PETSc
from pyadjoint.tape import stop_annotating
from ufl.algorithms.analysis import extract_type

__all__ = ["Input", "coefficients_of", "local_values"]


def is_real(coefficient) -> bool:
    """Whether the values are few and the same on every rank: a Constant, or a Function of a Real space."""
    return isinstance(coefficient, Constant) or coefficient.function_space().ufl_element().family() == "Real"


def local_values(coefficient) -> np.ndarray:
    """A copy of the rank-local values of a coefficient, in the order of its PETSc vector.

    Parameters
    ----------
    coefficient : Function, Cofunction or Constant

    Returns
    -------
    numpy.ndarray
        Shape (n,): the dofs this rank owns, or all components of a Constant or a Real space.
    """
    if isinstance(coefficient, Constant):
        return coefficient.dat.data_ro.reshape(-1).copy()
    parts = [part.data_ro.reshape(-1) for part in coefficient.dat]
    return parts[0].copy() if len(parts) == 1 else np.concatenate(parts)


def set_local_values(coefficient, values: np.ndarray) -> None:
    """The inverse of :func:`local_values`."""
    if isinstance(coefficient, Constant):
        coefficient.dat.data[...] = values.reshape(coefficient.dat.data_ro.shape)
        return
    start = 0
    for part in coefficient.dat:
        data = part.data_wo
        data[...] = values[start:start + data.size].reshape(data.shape)
        start += data.size


def coefficients_of(*forms) -> list:
    """All Functions, Cofunctions and Constants in forms, each once, in a fixed order."""
    found = {}
    for form in forms:
        if form is None:
            continue
        for coefficient in form.coefficients():
            found.setdefault(coefficient)
        if isinstance(form, ufl.Form):
            for constant in sorted(extract_type(form, Constant), key=lambda constant: constant.count()):
                found.setdefault(constant)
    return list(found)


class Input:
    """One coefficient of the problem.

    Parameters
    ----------
    original : Function, Cofunction or Constant
        The user's object.
    mesh : MeshGeometry
        Where a Constant's derivative is assembled.

    Attributes
    ----------
    original
        The user's object.
    copy
        What the assembled forms read.
    variable
        What forms are differentiated by: the copy or, for a Constant, a Function of a Real space that stands for it.
    in_operator : bool
        Whether the operator depends on it.
    """

    def __init__(self, original, mesh):
        self.original = original
        self.in_operator = False
        with stop_annotating():
            if isinstance(original, Constant):
                self.copy = Constant(np.array(original.dat.data_ro).reshape(original.ufl_shape), name=original.name)
                self.variable = Function(_real_space(mesh, original.ufl_shape), name=original.name)
            else:
                self.copy = self.variable = original.copy(deepcopy=True)
                self.copy.rename(original.name())
        self._values = local_values(self.copy)
        self._set_variable(self._values)

    @property
    def name(self) -> str:
        """The user's name for it."""
        name = self.original.name
        return name if isinstance(name, str) else name()

    @property
    def size(self) -> int:
        """Rank-local number of values."""
        return self._values.size

    @property
    def is_real(self) -> bool:
        """Whether the values are the same on every rank."""
        return is_real(self.original)

    def write(self, values: np.ndarray) -> bool:
        """Set the copy; return whether any rank-local value differs from before, to the bit."""
        if np.array_equal(values.view(np.int64), self._values.view(np.int64)):
            return False
        self._values[:] = values
        set_local_values(self.copy, self._values)
        self._set_variable(self._values)
        return True

    def _set_variable(self, values) -> None:
        if self.variable is not self.copy:
            set_local_values(self.variable, values)


def _real_space(mesh, shape: tuple[int, ...]):
    if shape == ():
        return FunctionSpace(mesh, "R", 0)
    if len(shape) == 1:
        return VectorFunctionSpace(mesh, "R", 0, dim=shape[0])
    return TensorFunctionSpace(mesh, "R", 0, shape=shape)


def vector_like(coefficient) -> PETSc.Vec:
    """A PETSc vector with the parallel layout of a Function or Cofunction."""
    return coefficient.function_space().dof_dset.layout_vec.duplicate()
