"""Preconditioners, their transposes, and how they depend on the matrix they are made from.

Jacobi's, point-block Jacobi's and a forward or backward sweep are the inverses of some entries of the matrix, each with a weight:
B = (W ∘ P)⁻¹. Then Ḃ r = -B (W ∘ Ṗ) z where z = B r, and the cotangent of P is -W ∘ (Bᵀ z̄) zᵀ. A symmetric sweep is made of two such.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import firedrake.logging
import numpy as np
from firedrake.petsc import PETSc
from mpi4py import MPI

from prdp_fem.krylov.view import described, setting
from prdp_fem.unrolled.operator_cotangent import OperatorCotangent, SparsityPattern, is_assembled, local_values

__all__ = ["Preconditioner", "preconditioner_of"]

# How far the preconditioner that formulas give may be from PETSc's own, relative; both are exact to rounding.
_AGREEMENT = 1e-9
# The largest group of like rows that PETSc's sweeps treat as a block (inode.c), and how few groups make it do so.
_LARGEST_NODE, _FEW_NODES = 5, 0.8


class Preconditioner:
    """A preconditioner that is taken for constant.

    Parameters
    ----------
    pc : PETSc.PC
    matrix : PETSc.Mat
        That it is made from.
    """

    is_identity = False
    _warns = True
    _is_transposable: bool | None = None

    def __init__(self, pc: PETSc.PC, matrix: PETSc.Mat):
        self.pc, self.matrix = pc, matrix
        self.kind = pc.getType()
        self.symmetric = False

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
        """Raise a ValueError where PETSc has no transpose of it, or another matrix in its place, which only trying tells."""
        if self._is_transposable is None:
            (x, Bx), (y, By) = self.matrix.createVecs(), self.matrix.createVecs()
            _fill(x)
            y.setArray(np.cos(2 + 0.7*np.arange(*y.getOwnershipRange())))
            try:
                self.pc.apply(x, Bx)
                self.pc.applyTranspose(y, By)
                self._is_transposable = abs(Bx.dot(y) - By.dot(x)) <= _AGREEMENT*Bx.norm()*y.norm()
            except PETSc.Error:
                self._is_transposable = False
                for vector in (x, Bx, y, By):
                    vector.incRef()  # some preconditioners destroy, at their reset, what they had when an error left them
                operators = self.pc.getOperators()
                self.pc.reset()
                self.pc.setOperators(*operators)
                self.pc.setUp()
        if not self._is_transposable:
            raise ValueError("the derivative of unrolled iterations needs the transpose of the preconditioner, and pc_type "
                             f"{self.kind}, as it is set, has none: use jacobi, pbjacobi, sor with one sweep, ilu or bjacobi, or "
                             "implicit differentiation")

    def add_cotangent(self, cotangent: OperatorCotangent, factor: float, z_cotangent: PETSc.Vec, r_cotangent: PETSc.Vec,
                      r: PETSc.Vec, z: PETSc.Vec) -> None:
        """Add what z = B r gives to the cotangent of the matrix.

        Parameters
        ----------
        cotangent : OperatorCotangent
        factor : float
            That the cotangents are to be multiplied by.
        z_cotangent, r_cotangent : PETSc.Vec
            The cotangent of z, and Bᵀ times it.
        r, z : PETSc.Vec
        """
        self.warn_once()

    def derivative(self, tangent: PETSc.Mat) -> Callable[[PETSc.Vec, PETSc.Vec, PETSc.Vec], None] | None:
        """A function of r, z = B r and a vector, which it sets to Ḃ r; None for zero."""
        self.warn_once()
        return None

    def _require_pattern(self, tangent: PETSc.Mat) -> None:
        """Refuse, on all ranks, a matrix with another number of entries than the preconditioner's."""
        differs = len(local_values(tangent)) != len(local_values(self.matrix))
        if self.pc.comm.tompi4py().allreduce(differs, op=MPI.LOR):
            raise ValueError("the tangent of the matrix that a preconditioner is made from must have the nonzero pattern of that matrix")

    def warn_once(self) -> None:
        """Say that the preconditioner is taken for constant."""
        if self._warns:
            self._warns = False
            if self.pc.comm.rank == 0:
                firedrake.logging.warning(
                    f"unrolled differentiation takes the preconditioner for a constant: how pc_type {self.kind} (as it is set) depends "
                    "on the operator is not differentiated; that of jacobi, pbjacobi and sor is")


class _Identity(Preconditioner):
    is_identity = True
    _warns = False

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
        self._is_diagonal = np.array_equal(self.rows, np.arange(self.size)) and np.array_equal(self.columns, self.rows)

    def of(self, matrix: PETSc.Mat) -> np.ndarray:
        """W ∘ M, shape (m,), for a matrix with the same pattern."""
        return self.weights*local_values(matrix)[self.where]

    def product(self, values: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The matrix of these values, as ``of`` gives them, times a vector."""
        return np.bincount(self.rows, weights=values*x[self.columns], minlength=self.size)

    def add_product(self, cotangent: OperatorCotangent, factor: float, left: np.ndarray, right: np.ndarray) -> None:
        """Add factor · W ∘ (left rightᵀ)."""
        if not self._is_diagonal:
            left, right = left[self.rows], right[self.columns]
        cotangent.add_to_entries(self.where, (factor*self.weights)*left*right)


class _OfBlocks(Preconditioner):
    """Jacobi's preconditioner, and that of point blocks: the inverse of blocks on the diagonal."""

    _entries: _Entries | None = None
    _state = None
    _agrees = True

    def _block_size(self) -> int:
        return 1 if self.kind == "jacobi" else self.matrix.getBlockSize()

    def apply_transposed(self, x, y):
        if self.kind == "jacobi":
            self.pc.apply(x, y)  # whatever it makes its diagonal from
        else:
            super().apply_transposed(x, y)

    def require_transpose(self):
        if self.kind != "jacobi":
            super().require_transpose()

    def _is_differentiable(self) -> bool:
        """Whether it is what formulas say it is: Jacobi's has variants, and a preconditioner may be reused."""
        if self._entries is None:
            pattern = SparsityPattern(self.matrix)
            size = self._block_size()
            chosen = pattern.owned_columns & (pattern.rows//size == (pattern.columns - pattern.first_column)//size)
            self._entries = _Entries(pattern, chosen, np.ones(len(pattern.rows)))
            self._work, self._probe = self.matrix.createVecRight(), self.matrix.createVecRight()
            _fill(self._probe)
        state = self.matrix.stateGet()
        if state != self._state:
            r, z = self._probe, self._work
            self.pc.apply(r, z)
            # (W ∘ P) B r = r
            z.setArray(self._entries.product(self._entries.of(self.matrix), z.array_r))
            z.axpy(-1.0, r)
            self._agrees = bool(z.norm() <= _AGREEMENT*r.norm())
            self._state = state
        return self._agrees

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
        self._indptr = np.concatenate([[0], np.cumsum(np.bincount(entries.rows, minlength=size))]).astype(PETSc.IntType)
        self._indices = entries.columns.astype(PETSc.IntType)
        self._matrix = PETSc.Mat().createAIJ((size, size), csr=(self._indptr, self._indices, np.ones(len(self._indices))),
                                             comm=PETSc.COMM_SELF)
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
        self._x.setArray(x)
        self._pc.apply(self._x, self._y)
        return self._y.array_r.copy()

    def solve_transposed(self, x: np.ndarray) -> np.ndarray:
        self._x.setArray(x)
        self._pc.applyTranspose(self._x, self._y)
        return self._y.array_r.copy()


class _Relaxation(Preconditioner):
    """One sweep of SOR over the rows of each rank, forwards, backwards or both.

    With D, L and U the diagonal of the matrix and what is below and above it, a forward sweep is (D/ω + L)⁻¹, a backward one
    (D/ω + U)⁻¹, and both are (D/ω + U)⁻¹ ((2 - ω)/ω) D (D/ω + L)⁻¹. Where PETSc treats groups of rows as blocks (with ω = 1), D is that
    of blocks.

    Parameters
    ----------
    pc : PETSc.PC
    matrix : PETSc.Mat
    omega : float
    forward, backward : bool
    """

    def __init__(self, pc: PETSc.PC, matrix: PETSc.Mat, omega: float, forward: bool, backward: bool):
        super().__init__(pc, matrix)
        pattern = SparsityPattern(matrix)
        columns = pattern.columns - pattern.first_column
        has_blocks = omega == 1 and matrix.getType() in ("seqaij", "mpiaij")  # and none of a matrix on a device
        node = _nodes(pattern, columns) if has_blocks else np.arange(len(pattern.indptr) - 1)
        node_of_row = node[pattern.rows]
        node_of_column = np.where(pattern.owned_columns, node[np.where(pattern.owned_columns, columns, 0)], -1)
        diagonal = pattern.owned_columns & (node_of_row == node_of_column)
        weights = np.where(diagonal, 1/omega, 1.0)
        lower = pattern.owned_columns & (node_of_column <= node_of_row)
        upper = pattern.owned_columns & (node_of_column >= node_of_row)
        self._sweeps = [_Sweep(_Entries(pattern, lower, weights))]*forward + [_Sweep(_Entries(pattern, upper, weights))]*backward
        self._middle = _Entries(pattern, diagonal, np.full(len(columns), (2 - omega)/omega))
        self._state = None
        self._probe, self._work = matrix.createVecRight(), matrix.createVecRight()
        _fill(self._probe)

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
        if not z.norm() <= _AGREEMENT*size:
            raise ValueError("the sor preconditioner is not what its settings say: unrolled differentiation knows one sweep, forwards, "
                             "backwards or symmetric, with any pc_sor_omega and no pc_sor_diagonal_shift, set up for the present values of "
                             "the operator")
        self._state = state

    def require_transpose(self):
        """It has one here, whatever PETSc has."""

    def _apply(self, r: np.ndarray) -> list[np.ndarray]:
        """The results of the sweeps."""
        results = [self._sweeps[0].solve(r)]
        if len(self._sweeps) == 2:
            results.append(self._sweeps[1].solve(self._middle.product(self._middle_values, results[0])))
        return results

    def _transposed_middle(self, x: np.ndarray) -> np.ndarray:
        return np.bincount(self._middle.columns, weights=self._middle_values*x[self._middle.rows], minlength=self._middle.size)

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
            change = self._middle.product(middle, half) + self._middle.product(self._middle_values, change)
            out.setArray(last.solve(change - last.entries.product(changes[1], z.array_r)))
        return apply


def _fill(vector: PETSc.Vec) -> None:
    """Values without a pattern, the same at every call."""
    vector.setArray(np.sin(1 + 1.3*np.arange(*vector.getOwnershipRange())))


def _nodes(pattern: SparsityPattern, columns: np.ndarray) -> np.ndarray:
    """The group of like rows that each row is in, shape (rows,), as PETSc groups them."""
    size = len(pattern.indptr) - 1
    patterns = [columns[start:stop][pattern.owned_columns[start:stop]] for start, stop in zip(pattern.indptr[:-1], pattern.indptr[1:])]
    node = np.zeros(size, dtype=np.intp)
    count = row = 0
    while row < size:
        stop = row + 1
        while stop < size and stop - row < _LARGEST_NODE and np.array_equal(patterns[stop], patterns[row]):
            stop += 1
        node[row:stop] = count
        count, row = count + 1, stop
    return node if count <= _FEW_NODES*size else np.arange(size)


def preconditioner_of(pc: PETSc.PC, matrix: PETSc.Mat, options: Mapping | None = None) -> Preconditioner:
    """What is known of a preconditioner.

    Parameters
    ----------
    pc : PETSc.PC
        Set up.
    matrix : PETSc.Mat
        That it is made from.
    options : mapping or None
        Options without prefix, that PETSc's own may have lost.
    """
    kind = pc.getType()
    if kind == "none":
        return _Identity(pc, matrix)
    if kind in ("jacobi", "pbjacobi"):
        return _OfBlocks(pc, matrix)
    if kind == "sor" and is_assembled(matrix):
        text = described(pc)
        direction, sweeps, local_sweeps = re.search(r"type = (\w+), iterations = (\d+), local iterations = (\d+)", text).groups()
        direction = direction.removeprefix("local_")
        if direction in ("forward", "backward", "symmetric") and sweeps == local_sweeps == "1":
            omega = setting(pc, text, r"omega = (\S+)", "pc_sor_omega", options)
            return _Relaxation(pc, matrix, omega, direction != "backward", direction != "forward")
    return Preconditioner(pc, matrix)
