"""The vectors of a batch on a device."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.memory.batch import Entries

__all__ = ["DeviceBatch"]


class DeviceBatch:
    """A batch of vectors on a device, with the methods of :class:`~prdp_fem.memory.batch.Batch`.

    Its arithmetic is that of PETSc's vectors, so that nothing comes to the host unless it is asked
    for.

    Parameters
    ----------
    vectors : list of PETSc.Vec
    memory : DeviceMemory
        That they are in.
    """

    def __init__(self, vectors: list[PETSc.Vec], memory):
        self.vectors = vectors
        self._memory = memory

    def fill(self, values) -> None:
        """Copy values in, of shape (n,) for all rows or (rows, n): an array of NumPy, or a tensor
        on the device.
        """
        if values.ndim == 1:
            for vector in self.vectors[:1]:
                self._memory.load(values, vector)
            for vector in self.vectors[1:]:
                self.vectors[0].copy(vector)
        else:
            for vector, row in zip(self.vectors, values, strict=True):
                self._memory.load(row, vector)

    def fill_inside(self, values, entries: Entries | None) -> None:
        """Copy values in, and zero for some entries of each row, as :meth:`zero` does."""
        if entries is None:
            self.fill(values)
        elif isinstance(values, np.ndarray):
            inside = np.array(values, dtype=float)
            inside[..., entries.dofs] = 0.0
            self.fill(inside)
        else:
            self.fill(values)
            for one in self.vectors:
                # PETSc has x/0 = 0 but for x = 0, and 0/0 = 1; a product alone would keep NaN and
                # infinity.
                one.pointwiseDivide(one, entries.others)
                one.pointwiseMult(one, entries.others)

    def fill_times_zero(self, values, entries: Entries | None) -> None:
        """Copy values in, times zero for some entries: what is not finite there is NaN then."""
        self.fill(values)
        self.zero(entries)

    def read(self, out) -> None:
        """Copy the values to an array of NumPy, or a tensor on the device, of shape (rows, n)."""
        for vector, row in zip(self.vectors, out, strict=True):
            self._memory.unload_into(vector, row)

    def values(self, row: int) -> np.ndarray:
        """The rank-local values of a row, on the host."""
        return self._memory.unload(self.vectors[row])

    def changed(self) -> None:
        """Vectors know when they were written to."""

    def set_to_zero(self) -> None:
        """Set all rows to zero."""
        for one in self.vectors:
            one.set(0.0)

    def assign(self, other: DeviceBatch) -> None:
        """Copy the rows of a batch, or the only one of it to each."""
        for one, more in self._beside(other):
            more.copy(one)

    def add(self, other: DeviceBatch) -> None:
        """Add the rows of a batch, or the only one of it to each."""
        for one, more in self._beside(other):
            one.axpy(1.0, more)

    def _beside(self, other: DeviceBatch) -> Iterable[tuple[PETSc.Vec, PETSc.Vec]]:
        return zip(
            self.vectors, repeat(other.vectors[0]) if len(other.vectors) == 1 else other.vectors
        )

    def scale(self, factor: float) -> None:
        """Multiply all rows by a number."""
        for one in self.vectors:
            one.scale(factor)

    def zero(self, entries: Entries | None) -> None:
        """Set some entries of each row to zero; None is none on any rank. Values are finite."""
        if entries is not None:
            for one in self.vectors:
                one.pointwiseMult(one, entries.others)

    def multiply(self, matrix: PETSc.Mat, out: DeviceBatch) -> None:
        """Set the rows of another batch to the products of a matrix with these."""
        for one, product in zip(self.vectors, out.vectors, strict=True):
            matrix.mult(one, product)
