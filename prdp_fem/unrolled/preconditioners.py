"""Preconditioners, their transposes, and how they depend on the matrix they are made from.

Jacobi's, point-block Jacobi's and a forward or backward sweep are the inverses of some entries of
the matrix, each with a weight: B = (W ∘ P)⁻¹. Then Ḃ r = -B (W ∘ Ṗ) z where z = B r, and the
cotangent of P is -W ∘ (Bᵀ z̄) zᵀ. A symmetric sweep is made of two such.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import firedrake.logging
import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.krylov.petsc_types import listed
from prdp_fem.krylov.view import found_in
from prdp_fem.unrolled.operator_cotangent import (
    OperatorCotangent,
    SparsityPattern,
    is_assembled,
    local_values,
)
from prdp_fem.unrolled.registry import PCAsSet, restated_preconditioners

__all__ = ["Preconditioner", "preconditioner_of"]

# How far the preconditioner that formulas give may be from PETSc's own, relative; both are exact to
# rounding.
_AGREEMENT = 1e-9
# The largest group of like rows that PETSc's sweeps treat as a block (inode.c), and how few groups
# make it do so.
_LARGEST_NODE, _FEW_NODES = 5, 0.8


# What else has a transpose, to be recommended.
_TRANSPOSABLE = ("ilu", "bjacobi")


class Preconditioner:
    """A preconditioner that is taken for constant, and the base of those whose derivative is known.

    Subclasses say, by :meth:`add_cotangent` and :meth:`derivative`, how they depend on their
    matrix, and are registered by their type.

    Parameters
    ----------
    pc : PETSc.PC
    matrix : PETSc.Mat
        What it is made from.

    Attributes
    ----------
    is_identity : bool
        Whether it leaves vectors as they are.
    kind : str
        Its type.
    symmetric : bool
        Whether it is known to be symmetric, at present.
    """

    is_identity = False

    def __init__(self, pc: PETSc.PC, matrix: PETSc.Mat):
        self.pc = pc
        self.matrix = matrix
        self.kind = pc.getType()
        self.symmetric = False
        self._has_warned = False
        self._is_transposable: bool | None = None

    @classmethod
    def of(cls, found: PCAsSet) -> Preconditioner | None:
        """The preconditioner as it is set; None where it is set to what is not stated here."""
        return cls(found.pc, found.matrix)

    def refresh(self, symmetric: bool) -> None:
        """To be called before each use."""
        self.symmetric = symmetric

    def apply(self, r: PETSc.Vec, z: PETSc.Vec) -> None:
        """z = B r."""
        self.pc.apply(r, z)

    def apply_transposed(self, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """y = Bᵀ x."""
        if self.symmetric:
            self.pc.apply(x, y)
        else:
            self.pc.applyTranspose(x, y)

    def require_transpose(self) -> None:
        """Raise a ValueError where PETSc has no transpose of it, or another matrix in its place."""
        if self._is_transposable is None:
            self._is_transposable = self._try_transpose()
        if not self._is_transposable:
            known = [f"{entry.name} {entry.note}".rstrip() for entry in _differentiated()]
            raise ValueError(
                "the derivative of unrolled iterations needs the transpose of the "
                f"preconditioner, and pc_type {self.kind}, as it is set, has none: "
                f"use {listed([*known, *_TRANSPOSABLE])}, or implicit differentiation"
            )

    def _try_transpose(self) -> bool:
        """Whether PETSc has the transpose, which only trying tells."""
        (x, Bx), (y, By) = self.matrix.createVecs(), self.matrix.createVecs()
        _fill(x)
        y.setArray(np.cos(2 + 0.7 * np.arange(*y.getOwnershipRange())))
        try:
            self.pc.apply(x, Bx)
            self.pc.applyTranspose(y, By)
            return abs(Bx.dot(y) - By.dot(x)) <= _AGREEMENT * Bx.norm() * y.norm()
        except PETSc.Error:
            for vector in (x, Bx, y, By):
                # Some preconditioners destroy, at their reset, what they had when an error left
                # them.
                vector.incRef()
            operators = self.pc.getOperators()
            self.pc.reset()
            self.pc.setOperators(*operators)
            self.pc.setUp()
            return False

    def add_cotangent(
        self,
        cotangent: OperatorCotangent,
        factor: float,
        z_cotangent: PETSc.Vec,
        r_cotangent: PETSc.Vec,
        r: PETSc.Vec,
        z: PETSc.Vec,
    ) -> None:
        """Add what z = B r gives to the cotangent of the matrix.

        Parameters
        ----------
        cotangent : OperatorCotangent
        factor : float
            What the cotangents are to be multiplied by.
        z_cotangent, r_cotangent : PETSc.Vec
            The cotangent of z, and Bᵀ times it.
        r, z : PETSc.Vec
        """
        self.warn_once()

    def derivative(self, tangent: PETSc.Mat) -> _Derivative | None:
        """A function of r, z = B r and a vector, which it sets to Ḃ r; None for zero."""
        self.warn_once()
        return None

    def _require_pattern(self, tangent: PETSc.Mat) -> None:
        """Refuse, on all ranks, a matrix with another number of entries than that of B."""
        differs = len(local_values(tangent)) != len(local_values(self.matrix))
        if self.pc.comm.tompi4py().allreduce(differs, op=MPI.LOR):
            raise ValueError(
                "the tangent of the matrix that a preconditioner is made from must "
                "have the nonzero pattern of that matrix"
            )

    def warn_once(self) -> None:
        """Say that the preconditioner is taken for constant."""
        if self._has_warned or self.is_identity:
            return
        self._has_warned = True
        if self.pc.comm.rank == 0:
            *others, last = (entry.name for entry in _differentiated())
            firedrake.logging.warning(
                "unrolled differentiation takes the preconditioner for a constant: how pc_type "
                f"{self.kind} (as it is set) depends on the operator is not differentiated; that "
                f"of {', '.join(others)} and {last} is"
            )


_Derivative = Callable[[PETSc.Vec, PETSc.Vec, PETSc.Vec], None]


def _differentiated() -> list:
    """What is registered and depends on a matrix."""
    return [entry for entry in restated_preconditioners if not entry.restated.is_identity]


@restated_preconditioners("none")
class Identity(Preconditioner):
    """No preconditioner."""

    is_identity = True

    def apply(self, r, z):
        r.copy(z)

    apply_transposed = apply

    def require_transpose(self):
        """It is its own."""


class _Entries:
    """Some entries of a matrix, each with a weight: all in rows and columns of this rank.

    Parameters
    ----------
    pattern : SparsityPattern
    chosen : numpy.ndarray
        Shape (entries,), bool.
    weights : numpy.ndarray
        Shape (entries,).
    """

    def __init__(self, pattern: SparsityPattern, chosen: np.ndarray, weights: np.ndarray):
        self.where = np.flatnonzero(chosen)
        self.rows = pattern.rows[self.where]
        self.columns = pattern.columns[self.where] - pattern.first_column
        self.weights = weights[self.where]
        self.size = len(pattern.indptr) - 1
        self._is_diagonal = np.array_equal(self.rows, np.arange(self.size)) and np.array_equal(
            self.columns, self.rows
        )

    def of(self, matrix: PETSc.Mat) -> np.ndarray:
        """W ∘ M, shape (m,), for a matrix with the same pattern."""
        return self.weights * local_values(matrix)[self.where]

    def product(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The matrix of these values, as ``of`` gives them, times a vector."""
        return np.bincount(self.rows, weights=values * x[self.columns], minlength=self.size)

    def add_product(
        self, cotangent: OperatorCotangent, factor: float, left: np.ndarray, right: np.ndarray
    ) -> None:
        """Add factor · W ∘ (left rightᵀ)."""
        if not self._is_diagonal:
            left, right = left[self.rows], right[self.columns]
        cotangent.add_to_entries(self.where, (factor * self.weights) * left * right)


@restated_preconditioners("pbjacobi")
class DiagonalBlocks(Preconditioner):
    """Point-block Jacobi's preconditioner: the inverse of blocks on the diagonal."""

    def __init__(self, pc: PETSc.PC, matrix: PETSc.Mat):
        super().__init__(pc, matrix)
        self._state: int | None = None
        self._agrees = True

    def _block_size(self) -> int:
        return self.matrix.getBlockSize()

    def _is_differentiable(self) -> bool:
        """Whether it is what formulas say: there are variants, and it may be another matrix's."""
        entries = self._entries
        state = self.matrix.stateGet()
        if state != self._state:
            r, z = self._probe, self._work
            self.pc.apply(r, z)
            # (W ∘ P) B r = r
            z.setArray(entries.product(entries.of(self.matrix), z.array_r))
            z.axpy(-1.0, r)
            self._agrees = bool(z.norm() <= _AGREEMENT * r.norm())
            self._state = state
        return self._agrees

    @cached_property
    def _entries(self) -> _Entries:
        """Those of the blocks; made where a derivative asks for them."""
        pattern = SparsityPattern(self.matrix)
        size = self._block_size()
        column_blocks = (pattern.columns - pattern.first_column) // size
        chosen = pattern.owned_columns & (pattern.rows // size == column_blocks)
        return _Entries(pattern, chosen, np.ones(len(pattern.rows)))

    @cached_property
    def _work(self) -> PETSc.Vec:
        return self.matrix.createVecRight()

    @cached_property
    def _probe(self) -> PETSc.Vec:
        probe = self.matrix.createVecRight()
        _fill(probe)
        return probe

    def add_cotangent(self, cotangent, factor, z_cotangent, r_cotangent, r, z):
        if self._is_differentiable():
            self._entries.add_product(cotangent, -factor, r_cotangent.array_r, z.array_r)
        else:
            self.warn_once()

    def derivative(self, tangent):
        if not self._is_differentiable():
            self.warn_once()
            return None
        self._require_pattern(tangent)
        values = self._entries.of(tangent)

        def apply(r, z, out):
            self._work.setArray(self._entries.product(values, z.array_r))
            self.pc.apply(self._work, out)
            out.scale(-1.0)

        return apply


@restated_preconditioners("jacobi")
class Diagonal(DiagonalBlocks):
    """Jacobi's preconditioner: the inverse of the diagonal."""

    def _block_size(self):
        return 1

    def apply_transposed(self, x, y):
        self.pc.apply(x, y)  # whatever it makes its diagonal from

    def require_transpose(self):
        """It is its own."""


class _Sweep:
    """The solution with a triangle of the rows and columns of this rank, and with its transpose.

    Parameters
    ----------
    entries : _Entries
        The triangle.
    """

    def __init__(self, entries: _Entries):
        self.entries = entries
        size = entries.size
        lengths = np.bincount(entries.rows, minlength=size)
        self._indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(PETSc.IntType)
        self._indices = entries.columns.astype(PETSc.IntType)
        ones = np.ones(len(self._indices))
        self._matrix = PETSc.Mat().createAIJ(
            (size, size), csr=(self._indptr, self._indices, ones), comm=PETSc.COMM_SELF
        )
        # A factorisation of a triangle in its natural order has no more entries than it.
        self._pc = PETSc.PC().create(comm=PETSc.COMM_SELF)
        self._pc.setType("lu")
        self._pc.setFactorSolverType("petsc")
        self._pc.setFactorOrdering("natural")
        self._x, self._y = self._matrix.createVecs()

    def refresh(self, matrix: PETSc.Mat) -> None:
        """Take the values of a matrix."""
        self._matrix.setValuesCSR(self._indptr, self._indices, self.entries.of(matrix))
        self._matrix.assemble()
        self._pc.setOperators(self._matrix)
        self._pc.setUp()

    def solve(self, x: np.ndarray) -> np.ndarray:
        """The solution for a right-hand side of this rank's rows."""
        self._x.setArray(x)
        self._pc.apply(self._x, self._y)
        return self._y.array_r.copy()

    def solve_transposed(self, x: np.ndarray) -> np.ndarray:
        """The solution with the transpose."""
        self._x.setArray(x)
        self._pc.applyTranspose(self._x, self._y)
        return self._y.array_r.copy()


@restated_preconditioners("sor", "with one sweep")
class Relaxation(Preconditioner):
    """One sweep of SOR over the rows of each rank, forwards, backwards or both.

    With D, L and U the diagonal of the matrix and what is below and above it, a forward sweep is
    (D/ω + L)⁻¹, a backward one (D/ω + U)⁻¹, and both are (D/ω + U)⁻¹ ((2 - ω)/ω) D (D/ω + L)⁻¹.
    Where PETSc treats groups of rows as blocks (with ω = 1), D is that of blocks.

    Parameters
    ----------
    pc : PETSc.PC
    matrix : PETSc.Mat
    omega : float
    forward, backward : bool
    """

    def __init__(
        self, pc: PETSc.PC, matrix: PETSc.Mat, omega: float, forward: bool, backward: bool
    ):
        super().__init__(pc, matrix)
        pattern = SparsityPattern(matrix)
        owned = pattern.owned_columns
        columns = pattern.columns - pattern.first_column
        # PETSc takes no rows in groups where a matrix is on a device.
        has_blocks = omega == 1 and matrix.getType() in ("seqaij", "mpiaij")
        node = _nodes(pattern, columns) if has_blocks else np.arange(len(pattern.indptr) - 1)
        node_of_row = node[pattern.rows]
        node_of_column = np.where(owned, node[np.where(owned, columns, 0)], -1)
        diagonal = owned & (node_of_row == node_of_column)
        weights = np.where(diagonal, 1 / omega, 1.0)
        triangles = []
        if forward:
            triangles.append(owned & (node_of_column <= node_of_row))
        if backward:
            triangles.append(owned & (node_of_column >= node_of_row))
        self._sweeps = [_Sweep(_Entries(pattern, triangle, weights)) for triangle in triangles]
        self._middle = _Entries(pattern, diagonal, np.full(len(columns), (2 - omega) / omega))
        self._state: int | None = None
        self._probe = matrix.createVecRight()
        self._work = matrix.createVecRight()
        _fill(self._probe)

    @classmethod
    def of(cls, found):
        if not is_assembled(found.matrix):
            return None
        direction, sweeps, local_sweeps = found_in(
            found.text, r"type = (\w+), iterations = (\d+), local iterations = (\d+)"
        ).groups()
        direction = direction.removeprefix("local_")
        if direction not in ("forward", "backward", "symmetric"):
            return None
        if sweeps != "1" or local_sweeps != "1":
            return None
        omega = found.number(r"omega = (\S+)", "pc_sor_omega")
        return cls(found.pc, found.matrix, omega, direction != "backward", direction != "forward")

    def refresh(self, symmetric):
        super().refresh(symmetric)
        state = self.matrix.stateGet()
        if state == self._state:
            return
        for sweep in self._sweeps:
            sweep.refresh(self.matrix)
        self._middle_values = self._middle.of(self.matrix)
        r, z = self._probe, self._work
        self.pc.apply(r, z)
        size = z.norm()
        z.setArray(z.array_r - self._apply(r.array_r)[-1])
        if not z.norm() <= _AGREEMENT * size:
            raise ValueError(
                "the sor preconditioner is not what its settings say: unrolled differentiation "
                "knows one sweep, forwards, backwards or symmetric, with any pc_sor_omega and no "
                "pc_sor_diagonal_shift, set up for the present values of the operator"
            )
        self._state = state

    def require_transpose(self):
        """It has one here, whatever PETSc has."""

    def _apply(self, r: np.ndarray) -> list[np.ndarray]:
        """The results of the sweeps."""
        results = [self._sweeps[0].solve(r)]
        if len(self._sweeps) == 2:
            middle = self._middle.product(self._middle_values, results[0])
            results.append(self._sweeps[1].solve(middle))
        return results

    def _transposed_middle(self, x: np.ndarray) -> np.ndarray:
        weights = self._middle_values * x[self._middle.rows]
        return np.bincount(self._middle.columns, weights=weights, minlength=self._middle.size)

    def apply_transposed(self, x, y):
        if self.symmetric and len(self._sweeps) == 2:
            self.pc.apply(x, y)
            return
        result = self._sweeps[-1].solve_transposed(x.array_r)
        if len(self._sweeps) == 2:
            result = self._sweeps[0].solve_transposed(self._transposed_middle(result))
        y.setArray(result)

    def add_cotangent(self, cotangent, factor, z_cotangent, r_cotangent, r, z):
        first = self._sweeps[0].entries
        if len(self._sweeps) == 1:
            first.add_product(cotangent, -factor, r_cotangent.array_r, z.array_r)
            return
        half = self._sweeps[0].solve(r.array_r)
        last = self._sweeps[1].solve_transposed(z_cotangent.array_r)
        self._sweeps[1].entries.add_product(cotangent, -factor, last, z.array_r)
        self._middle.add_product(cotangent, factor, last, half)
        first.add_product(cotangent, -factor, r_cotangent.array_r, half)

    def derivative(self, tangent):
        self._require_pattern(tangent)
        changes = [sweep.entries.of(tangent) for sweep in self._sweeps]
        middle = self._middle.of(tangent)

        def apply(r, z, out):
            first = self._sweeps[0]
            if len(self._sweeps) == 1:
                out.setArray(-first.solve(first.entries.product(changes[0], z.array_r)))
                return
            last = self._sweeps[1]
            half = first.solve(r.array_r)
            change = -first.solve(first.entries.product(changes[0], half))
            change = self._middle.product(middle, half) + self._middle.product(
                self._middle_values, change
            )
            out.setArray(last.solve(change - last.entries.product(changes[1], z.array_r)))

        return apply


def _fill(vector: PETSc.Vec) -> None:
    """Values without a pattern, the same at every call."""
    vector.setArray(np.sin(1 + 1.3 * np.arange(*vector.getOwnershipRange())))


def _nodes(pattern: SparsityPattern, columns: np.ndarray) -> np.ndarray:
    """The group of like rows that each row is in, shape (rows,), as PETSc groups them."""
    size = len(pattern.indptr) - 1
    patterns = [
        columns[start:stop][pattern.owned_columns[start:stop]]
        for start, stop in zip(pattern.indptr[:-1], pattern.indptr[1:])
    ]
    node = np.zeros(size, dtype=np.intp)
    count = row = 0
    while row < size:
        stop = row + 1
        while (
            stop < size
            and stop - row < _LARGEST_NODE
            and np.array_equal(patterns[stop], patterns[row])
        ):
            stop += 1
        node[row:stop] = count
        count, row = count + 1, stop
    return node if count <= _FEW_NODES * size else np.arange(size)


def preconditioner_of(
    pc: PETSc.PC, matrix: PETSc.Mat, options: Mapping | None = None
) -> Preconditioner:
    """What is known of a preconditioner.

    Parameters
    ----------
    pc : PETSc.PC
        It is set up.
    matrix : PETSc.Mat
        What it is made from.
    options : mapping or None
        Options without prefix, that PETSc's own may have lost.
    """
    entry = restated_preconditioners.find(pc)
    restated = None if entry is None else entry.restated.of(PCAsSet(pc, matrix, options))
    return Preconditioner(pc, matrix) if restated is None else restated
