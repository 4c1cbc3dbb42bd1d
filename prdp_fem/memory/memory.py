"""Where the vectors and matrices of solves lie: with Firedrake's, or on a device."""

from __future__ import annotations

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.memory.batch import Batch, Entries
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.devices import HOST, Device
from prdp_fem.memory.explicit_transpose import ExplicitTranspose
from prdp_fem.statistics import Statistics

__all__ = ["DeviceMemory", "Memory", "is_copied", "memory_of"]


class Memory:
    """The host's memory: everything is used where Firedrake has it.

    Attributes
    ----------
    device : Device or None
    statistics : Statistics
        Of the system whose memory it is, where copies are counted.
    """

    device: Device | None = None
    statistics: Statistics

    @property
    def name(self) -> str:
        """What ``device=`` calls it."""
        return HOST

    def vector(self, like: PETSc.Vec) -> PETSc.Vec:
        """A vector of the layout of one on the host."""
        return like.duplicate()

    def batch(self, rows: int, like: PETSc.Vec) -> Batch | DeviceBatch:
        """A batch of vectors of a layout."""
        return Batch(rows, like)

    def load(self, values, vector: PETSc.Vec) -> None:
        """Write rank-local values to a vector."""
        vector.setArray(values)

    def unload(self, vector: PETSc.Vec) -> np.ndarray:
        """A copy of the rank-local values of a vector."""
        return vector.array_r.copy()

    def on_host(self, values):
        """Rows of rank-local values as an array of NumPy; None, or such an array, as it is."""
        return values

    def from_host(self, vector: PETSc.Vec) -> PETSc.Vec:
        """A vector with the values of one on the host, to be read until the next call."""
        return vector

    def to_host(self, vector: PETSc.Vec) -> PETSc.Vec:
        """A vector on the host with the values of one, to be read until the next call."""
        return vector

    def matrix(self, matrix: PETSc.Mat) -> PETSc.Mat:
        """A matrix that is on the host, with the values that it has now."""
        return matrix

    def operators(self, A: PETSc.Mat, P: PETSc.Mat) -> tuple[PETSc.Mat, PETSc.Mat]:
        """The operators of a KSP, given on the host, with their present values and null spaces."""
        return A, P

    def places(self, A: PETSc.Mat, P: PETSc.Mat) -> tuple[PETSc.Mat, PETSc.Mat]:
        """The matrices that :meth:`operators` gives, whatever their values."""
        return A, P

    def entries(self, like: PETSc.Vec, dofs: np.ndarray):
        """Rank-local entries of vectors of a layout, for :meth:`Batch.zero`.

        On a device None is no entries on any rank.
        """
        others = np.ones(like.getLocalSize())
        others[dofs] = 0.0
        return Entries(dofs.astype(np.intp), others)

    has_explicit_transposes = False

    def transpose(self, matrix: PETSc.Mat) -> PETSc.Mat:
        """The transpose of a matrix, for its present values."""
        return matrix.transpose(PETSc.Mat())


class DeviceMemory(Memory):
    """The memory of a device, of which the host's matrices and vectors have copies.

    What stays the same is copied once. A product with a transpose is one with an explicit
    transpose: PETSc's transposed products are not on all devices, or add up in an order that
    changes from call to call.

    Parameters
    ----------
    device : Device
    """

    has_explicit_transposes = True

    def __init__(self, device: Device):
        self.device: Device = device
        self.statistics = Statistics()
        self._copies: dict[int, tuple[PETSc.Mat, PETSc.Mat, ExplicitTranspose]] = {}
        self._staged: dict[tuple, tuple[PETSc.Vec, PETSc.Vec]] = {}
        self._spaces: dict[tuple, tuple[PETSc.NullSpace, PETSc.NullSpace]] = {}

    @property
    def name(self) -> str:
        return self.device.name

    def vector(self, like: PETSc.Vec) -> PETSc.Vec:
        vector = PETSc.Vec().create(comm=like.comm)
        vector.setSizes(like.getSizes())
        vector.setType(self.device.vec_type)
        vector.set(0.0)
        return vector

    def batch(self, rows, like):
        return DeviceBatch([self.vector(like) for _ in range(rows)], self)

    def load(self, values, vector):
        is_on_host = isinstance(values, np.ndarray)
        source = self._uploaded(values, vector) if is_on_host else _shared(values, vector)
        source.copy(vector)

    def unload(self, vector):
        with _TO_HOST:
            values = vector.array_r.copy()
        self.statistics.note_to_host(values.nbytes)
        return values

    def unload_into(self, vector: PETSc.Vec, out) -> None:
        """Copy the rank-local values of a vector to a row, which is an array of NumPy or a tensor
        on this device.
        """
        if isinstance(out, np.ndarray):
            with _TO_HOST:
                out[...] = vector.array_r
            self.statistics.note_to_host(out.nbytes)
        else:
            vector.copy(_shared(out, vector))

    def on_host(self, values):
        if values is None or isinstance(values, np.ndarray):
            return values
        rows = values if values.ndim == 2 else values[None]
        with _TO_HOST:
            if len(rows):
                copied = np.stack([_alone(row).array_r for row in rows])
            else:
                copied = np.empty(tuple(rows.shape))
        for row in copied:
            self.statistics.note_to_host(row.nbytes)
        return copied.reshape(tuple(values.shape))

    def _uploaded(self, values: np.ndarray, like: PETSc.Vec) -> PETSc.Vec:
        """A vector of a layout with values from the host; until the next call."""
        # Nothing else writes to it, least of all the device: PETSc would copy that to the host
        # first.
        _, staged = self._stage(like)
        with _TO_DEVICE:
            staged.setArray(values)
            self._update(staged)
        self.statistics.note_to_device(staged.getLocalSize() * staged.array_r.itemsize)
        return staged

    def _update(self, vector: PETSc.Vec) -> None:
        """Have a vector's values copied to the device, and wait for it.

        Not at its first use, which would count as that of another event, and may be a copy that is
        under way when the next values are written over these.
        """
        match self.device.vec_type:
            case "cuda":
                vector.restoreCUDAHandle(vector.getCUDAHandle("r"), "r")
            case "hip":
                vector.restoreHIPHandle(vector.getHIPHandle("r"), "r")
            case "viennacl":
                vector.getCLMemHandle("r")  # of which nothing is to be given back

    def from_host(self, vector):
        return self._uploaded(vector.array_r, vector)

    def to_host(self, vector):
        staged, _ = self._stage(vector)
        staged.setArray(self.unload(vector))
        return staged

    def _stage(self, vector: PETSc.Vec) -> tuple[PETSc.Vec, PETSc.Vec]:
        """A vector on the host and one here, of the layout of one."""
        key = vector.comm.tompi4py().py2f(), vector.getSizes()
        if key not in self._staged:
            on_host = PETSc.Vec().create(comm=vector.comm)
            on_host.setSizes(vector.getSizes())
            on_host.setType(PETSc.Vec.Type.STANDARD)
            self._staged[key] = on_host, self.vector(vector)
        return self._staged[key]

    def matrix(self, matrix):
        with _TO_DEVICE:
            # Not by one call: PETSc's conversion to a new ViennaCL matrix changes the operations of
            # the old one.
            copy = matrix.duplicate(copy=True).convert(self.device.mat_type)
        self.statistics.note_to_device(_size(copy, whole=True))
        return copy

    def operators(self, A, P):
        copied = self._copied(A)
        return copied, copied if P.handle == A.handle else self._copied(P)

    def places(self, A, P):
        return self._copy(A), self._copy(P)

    def _copy(self, matrix: PETSc.Mat) -> PETSc.Mat:
        if matrix.handle not in self._copies:
            # The original is kept, too, so that nothing else can have its handle.
            copy = self.matrix(matrix)
            self._copies[matrix.handle] = (
                matrix,
                copy,
                ExplicitTranspose(copy, lambda: self._transposed(matrix)),
            )
        return self._copies[matrix.handle][1]

    def _transposed(self, matrix: PETSc.Mat) -> PETSc.Mat:
        """The transpose of a matrix on the host."""
        return self.matrix(matrix.transpose(PETSc.Mat()))

    def _copied(self, matrix: PETSc.Mat) -> PETSc.Mat:
        copy = self._copy(matrix)
        with _TO_DEVICE:
            matrix.copy(copy, PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
        self.statistics.note_to_device(_size(copy))
        self._copies[matrix.handle][2].forget()
        for kind in ("NullSpace", "TransposeNullSpace", "NearNullSpace"):
            space = getattr(matrix, f"get{kind}")()
            if space is not None and space.handle:
                getattr(copy, f"set{kind}")(self._copied_space((matrix.handle, kind), space))
        return copy

    def _copied_space(self, whose: tuple, space: PETSc.NullSpace) -> PETSc.NullSpace:
        original, copied = self._spaces.get(whose, (None, None))
        if original is None or original.handle != space.handle:
            vectors = []
            for vector in space.getVecs():
                vectors.append(self.vector(vector))
                self.load(vector.array_r, vectors[-1])
            copied = PETSc.NullSpace().create(
                constant=space.hasConstant(), vectors=vectors, comm=space.comm
            )
            self._spaces[whose] = space, copied
        return copied

    def entries(self, like, dofs):
        if like.comm.tompi4py().allreduce(len(dofs)) == 0:
            return None
        others = np.ones(like.getLocalSize())
        others[dofs] = 0.0
        mask = self.vector(like)
        self.load(others, mask)
        return Entries(dofs, mask)

    def transpose(self, matrix):
        with _TO_DEVICE:
            # made on the host, where such a matrix has its values, too
            transposed = matrix.transpose(PETSc.Mat())
            if transposed.getType() != matrix.getType():
                transposed.convert(self.device.mat_type)
        self.statistics.note_to_device(_size(transposed, whole=True))
        return transposed


def is_copied(matrix: PETSc.Mat) -> bool:
    """Whether devices have a type for the copy of a matrix that Firedrake has allocated."""
    return matrix.getType() in ("seqaij", "mpiaij")


def _size(matrix: PETSc.Mat, *, whole: bool = False) -> int:
    """Bytes of the values of the rows of this rank, and where they are in the matrix."""
    entries = int(matrix.getInfo(PETSc.Mat.InfoType.LOCAL)["nz_used"])
    size = entries * np.dtype(PETSc.ScalarType).itemsize
    if whole:
        size += (entries + matrix.getLocalSize()[0] + 1) * np.dtype(PETSc.IntType).itemsize
    return size


def _shared(row, like: PETSc.Vec) -> PETSc.Vec:
    """A vector on the memory of a tensor on a device; to be used as long as that is there."""
    return PETSc.Vec().createWithDLPack(row, size=like.getSizes(), comm=like.comm)


def _alone(row) -> PETSc.Vec:
    return PETSc.Vec().createWithDLPack(row, comm=PETSc.COMM_SELF)


def memory_of(device: Device | None) -> Memory:
    """The memory of a device; the host's for None."""
    return Memory() if device is None else DeviceMemory(device)


_TO_DEVICE, _TO_HOST = PETSc.Log.Event("PRDPToDevice"), PETSc.Log.Event("PRDPToHost")
