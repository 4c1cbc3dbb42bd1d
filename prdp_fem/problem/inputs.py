"""What a variational problem depends on: coefficients, each with the copy that forms read.

Solves at other values than the user's (a tensor's, a replayed tape's) write the copies and leave
the user's objects alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from numbers import Number

import numpy as np
import ufl
from firedrake import Cofunction, Constant, Function, FunctionSpace
from firedrake.petsc import PETSc
from pyadjoint.tape import stop_annotating
from pyop2 import Global, MixedDat
from ufl.algorithms.analysis import extract_coefficients, extract_type

from prdp_fem.problem.firedrake_internals import ConstantDerivative

__all__ = [
    "Input",
    "coefficients_of",
    "deep_copy",
    "is_component",
    "is_real",
    "is_real_space",
    "local_values",
    "name_of",
    "put_back",
    "same_bits",
    "set_local_values",
    "values_as",
    "vector_like",
]


def is_real(coefficient) -> bool:
    """Whether values are few, and the same on every rank: of a Constant or a Real space."""
    return isinstance(coefficient, Constant) or is_real_space(coefficient.function_space())


def is_real_space(space) -> bool:
    """Whether a function space is that of the numbers."""
    return space.ufl_element().family() == "Real"


def is_component(coefficient) -> bool:
    """Whether a coefficient is f.sub(i) of a vector-valued f, a view of every d-th value."""
    if isinstance(coefficient, Constant):
        return False
    return coefficient.function_space().component is not None


def name_of(coefficient) -> str:
    """The name of a Function (a method there) or Constant (an attribute there)."""
    name = coefficient.name
    return name if isinstance(name, str) else name()


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
    dat = coefficient.dat
    if not isinstance(dat, MixedDat):
        return dat.data_ro.reshape(-1).copy()
    if _has_real_part(dat):
        with dat.vec_ro as vector:
            return vector.array_r.copy()
    return np.concatenate([part.data_ro.reshape(-1) for part in dat])


def values_as(original, value) -> np.ndarray:
    """The rank-local values that a coefficient has where something stands for it.

    Parameters
    ----------
    original : Function, Cofunction or Constant
    value : Function, Cofunction, Constant or number
        Of the same space, or a number, or a Function of a Real space, for all of its dofs.
    """
    if isinstance(value, Number) or (is_real(value) and not is_real(original)):
        value = Function(original.function_space()).assign(value, annotate=False)
    return local_values(value)


def _has_real_part(dat: MixedDat) -> bool:
    """Whether values are mixed with those of a Real space, which stand on every rank but belong to
    the first in a PETSc vector.
    """
    return any(isinstance(part, Global) for part in dat)


def set_local_values(coefficient, values: np.ndarray) -> None:
    """The inverse of :func:`local_values`."""
    dat = coefficient.dat
    if not isinstance(dat, MixedDat):
        data = dat.data if isinstance(coefficient, Constant) else dat.data_wo
        data[...] = values.reshape(data.shape)
        return
    if _has_real_part(dat):
        with dat.vec_wo as vector:
            vector.setArray(values)
        return
    start = 0
    for part in dat:
        data = part.data_wo
        data[...] = values[start : start + data.size].reshape(data.shape)
        start += data.size


@contextmanager
def put_back(function: Function) -> Iterator[None]:
    """Have a Function's rank-local values, whatever happens to them within, as they were before."""
    values, version = local_values(function), function.dat.dat_version
    try:
        yield
    finally:
        if function.dat.dat_version != version:
            set_local_values(function, values)


_FEW = 500


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of float64 are equal to the bit: NaN is itself, and -0.0 is not 0.0."""
    if one is other:
        return True
    one, other = one.view(np.uint64), other.view(np.uint64)
    # Of few numbers most of NumPy's time is that of its calls.
    return one.data == other.data if one.size < _FEW else bool((one == other).all())


def coefficients_of(*forms) -> list:
    """All Functions and Constants in forms and expressions, each once, in a fixed order."""
    found: dict = {}
    for form in forms:
        if form is None:
            continue
        for coefficient in extract_coefficients(form):
            found.setdefault(coefficient)
        for constant in sorted(extract_type(form, Constant), key=lambda constant: constant.count()):
            found.setdefault(constant)
    return list(found)


def deep_copy(coefficient):
    """A coefficient of the same name and values, independent of the original and of the tape."""
    with stop_annotating():
        if isinstance(coefficient, Constant):
            return Constant(
                np.array(coefficient.dat.data_ro).reshape(coefficient.ufl_shape),
                name=coefficient.name,
            )
        if is_component(coefficient):
            # Its copy has a space of its own.
            copied = Function(coefficient.function_space().collapse())
            set_local_values(copied, local_values(coefficient))
        else:
            copied = coefficient.copy(deepcopy=True)
        copied.rename(coefficient.name())
        return copied


class Input:
    """One coefficient of the problem.

    Parameters
    ----------
    original : Function, Cofunction or Constant
        The user's object.
    meshes : list of MeshGeometry
        Where a Constant's derivative is assembled: a Real space is one of a single mesh.

    Attributes
    ----------
    original
        The user's object.
    copy
        What the assembled forms read.
    meshes : list of MeshGeometry
        Of a Constant, those that it has variables on; else one, whose communicator is the input's.
    variables : list of Function
        What forms are differentiated by: the copy or, for a Constant, Functions of the Real space,
        one for each component, mesh by mesh.
    in_operator : bool
        Whether the operator depends on it.
    """

    def __init__(self, original, meshes: list):
        self.original = original
        self.in_operator = False
        self.copy = deep_copy(original)
        self.meshes = meshes if isinstance(original, Constant) else meshes[:1]
        with stop_annotating():
            if isinstance(original, Constant):
                self.variables = [
                    Function(FunctionSpace(mesh, "R", 0))
                    for mesh in meshes
                    for _ in range(self.copy.dat.data_ro.size)
                ]
            else:
                self.variables = [self.copy]
        self._values = local_values(self.copy)
        self._present: np.ndarray | None = None
        self._set_variables()
        self._comm = meshes[0].comm
        # What the user's object had, while it follows the copy.
        self._users: np.ndarray | None = None
        self._has_followed = False
        self._dual_space = (
            None if isinstance(original, Constant) else original.function_space().dual()
        )

    def dual(self, values: np.ndarray):
        """A derivative by the original, with rank-local values, of the type that pyadjoint has."""
        if isinstance(self.original, Constant):
            return ConstantDerivative(values.reshape(self.original.ufl_shape))
        dual_type = Function if isinstance(self.original, Cofunction) else Cofunction
        dual = dual_type(self._dual_space)
        set_local_values(dual, values)
        return dual

    @property
    def name(self) -> str:
        """The user's name for it."""
        return name_of(self.original)

    @property
    def size(self) -> int:
        """Rank-local number of values."""
        return self._values.size

    @property
    def is_real(self) -> bool:
        """Whether the values are the same on every rank."""
        return is_real(self.original)

    def present_values(self) -> np.ndarray:
        """The rank-local values of the original as they are now, not to be written to.

        The same array as long as they do not change, so that calls which keep them share it. By
        their bits: who writes to memory that is shared with the original, as by
        :func:`prdp_fem.torch.to_torch`, tells nobody.
        """
        dat = self.original.dat
        values = (
            local_values(self.original) if isinstance(dat, MixedDat) else dat.data_ro.reshape(-1)
        )
        if self._present is None or not same_bits(values, self._present):
            self._present = values.copy()
        return self._present

    def differs(self, values: np.ndarray) -> bool:
        """Whether any rank-local value differs, to the bit, from those that the copy has."""
        return not same_bits(values, self._values)

    def write(self, values: np.ndarray) -> None:
        """Set the copy. Collective: a write is what makes Firedrake exchange halos, so all ranks
        write or none does.
        """
        self._values[:] = values
        set_local_values(self.copy, self._values)
        self._set_variables()
        if self._users is not None:
            self._follow()

    def lend(self) -> None:
        """Have the user's object follow the copy, for code that reads it, until :meth:`take_back`.

        Collective.
        """
        self._users, self._has_followed = local_values(self.original), False
        if self._comm.size > 1 or self.differs(self._users):
            self._follow()

    def _follow(self) -> None:
        set_local_values(self.original, self._values)
        self._has_followed = True

    def take_back(self) -> None:
        """Give the user's object the values that it had. Collective."""
        if self._has_followed and self._users is not None:
            set_local_values(self.original, self._users)
        self._users = None

    def write_where_needed(self, values: np.ndarray) -> None:
        """Set the copy unless it has these values; collective.

        Where ranks could differ nothing is compared.
        """
        if self._comm.size > 1 or self.differs(values):
            self.write(values)

    def in_variables(self, form, mesh=None):
        """A form, or an expression on a mesh, over the copy, restated over the variables."""
        if not isinstance(self.copy, Constant):
            return form
        if mesh is None and len(self.meshes) > 1:
            return ufl.Form(
                [
                    self.in_variables(integral, integral.ufl_domain())
                    for integral in form.integrals()
                ]
            )
        place = 0 if len(self.meshes) == 1 else self.meshes.index(mesh) * self.size
        components = np.array(self.variables[place : place + self.size], dtype=object)
        components = components.reshape(self.copy.ufl_shape).tolist()
        return ufl.replace(
            form, {self.copy: ufl.as_tensor(components) if self.copy.ufl_shape else components}
        )

    def summed(self, values: np.ndarray) -> np.ndarray:
        """The derivative by the original from those by the variables, one after the other."""
        if len(self.meshes) == 1:
            return values
        return values.reshape(len(self.meshes), self.size).sum(axis=0)

    @cached_property
    def directions(self) -> list[Function]:
        """Directions of the variables."""
        with stop_annotating():
            return [Function(variable.function_space()) for variable in self.variables]

    def set_direction(self, tangent: np.ndarray) -> None:
        """Set the directions from rank-local values."""
        if not isinstance(self.copy, Constant):
            set_local_values(self.directions[0], tangent)
            return
        for place, direction in enumerate(self.directions):
            direction.dat.data_wo[...] = tangent[place % self.size]

    def _set_variables(self) -> None:
        if isinstance(self.copy, Constant):
            for place, variable in enumerate(self.variables):
                variable.dat.data_wo[...] = self._values[place % self.size]


def vector_like(coefficient) -> PETSc.Vec:
    """A PETSc vector with the parallel layout of a Function or Cofunction."""
    return coefficient.function_space().dof_dset.layout_vec.duplicate()
