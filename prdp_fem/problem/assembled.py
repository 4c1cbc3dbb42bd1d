"""The form of an assembled matrix, with the values that its coefficients had when it was assembled.

A solver of an assembled system differentiates the form that its matrix was assembled from. Since
then coefficients may have changed, and the matrix may be assembled again between any two solves.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import ufl
from firedrake import Constant
from firedrake.assemble import get_assembler
from firedrake.matrix import ImplicitMatrix, MatrixBase
from firedrake.ufl_expr import extract_domains
from mpi4py import MPI
from pyadjoint import Block, get_working_tape
from pyadjoint.tape import stop_annotating

from prdp_fem.problem.firedrake_internals import has_block_variable
from prdp_fem.problem.inputs import (
    coefficients_of,
    deep_copy,
    is_component,
    local_values,
    same_bits,
    set_local_values,
)

__all__ = ["AssembledForm"]

# How far entries may be apart that were assembled twice, relative to the largest of their row.
_ROUNDING = 1e-10


class AssembledForm:
    """A form over copies of its coefficients, with the values that a matrix was assembled from.

    A matrix of ``mat_type`` matfree has the values of the moment: its form is the user's.

    Parameters
    ----------
    matrix : firedrake.matrix.MatrixBase
    conditions : sequence of DirichletBC
        What the matrix should have been assembled with.
    parameters : dict
        For the form compiler.
    null_spaces : collection of str
        The kinds of null spaces that the solver was given: of the arguments ``nullspace``,
        ``transpose_nullspace`` and ``near_nullspace``.

    Attributes
    ----------
    form : ufl.Form

    Raises
    ------
    TypeError
        For a matrix that has no form.
    ValueError
        Where the matrix is not what its form gives with the present values of its coefficients,
        and as :meth:`follow`.
    """

    def __init__(
        self, matrix: MatrixBase, conditions, parameters: dict, null_spaces: Collection[str]
    ):
        if not isinstance(matrix.a, ufl.Form):
            raise TypeError(
                "the LinearSolver was made for a matrix without a form, which cannot be "
                "differentiated: assemble a form"
            )
        self._matrix, self._null_spaces = matrix, null_spaces
        self._is_assembled = not isinstance(matrix, ImplicitMatrix)
        self._copies = {}
        if self._is_assembled:
            self._copies = {original: deep_copy(original) for original in coefficients_of(matrix.a)}
        self.form = ufl.replace(matrix.a, self._copies)
        self._coordinates = [mesh.coordinates.dat for mesh in extract_domains(matrix.a)]
        self._seen: tuple | None = None
        # By its id, the tape that knows what the copies have their values from: it need not live
        # on.
        self._tape: int | None = None
        if self._is_assembled:
            with stop_annotating():
                self._assembler = get_assembler(
                    self.form,
                    bcs=conditions,
                    mat_type=matrix.mat_type,
                    form_compiler_parameters=parameters,
                )
                self._again = self._assembler.allocate()
        self.follow()

    def follow(self) -> None:
        """Take up the values that the matrix was assembled with, if it was again. Collective.

        Raises
        ------
        ValueError
            Where the matrix is what its form gives neither with the present values of its
            coefficients nor with those of before, or has a null space of its own. The copies are
            left as they were.
        """
        self._check_null_spaces()
        seen = self._matrix.petscmat.stateGet(), *(dat.dat_version for dat in self._coordinates)
        if not self._is_assembled or not self._agreed(seen != self._seen):
            return
        with stop_annotating():
            last = [local_values(copy) for copy in self._copies.values()]
            present = [local_values(coefficient) for coefficient in self._copies]
            is_taken = self._gives_matrix(present)
            if not is_taken and not self._gives_matrix(last):
                raise ValueError(
                    "the coefficients of the LinearSolver's matrix have changed since it "
                    "was assembled, or its mesh has, or it is not what its form and "
                    "boundary conditions give: assemble it again from the present "
                    "values, as in assemble(a, bcs=bcs, tensor=A)"
                )
        self._seen = seen
        if is_taken:
            self._tape = None

    def _check_null_spaces(self) -> None:
        matrix = self._matrix.petscmat
        own = {"nullspace": matrix.getNullSpace(), "near_nullspace": matrix.getNearNullSpace()}
        transposed = matrix.getTransposeNullSpace()
        if transposed.handle != own["nullspace"].handle:  # PETSc gives that for a symmetric one
            own["transpose_nullspace"] = transposed
        for name, space in own.items():
            if space.handle and name not in self._null_spaces:
                raise ValueError(
                    "the matrix of the LinearSolver has a null space that the solver knows "
                    f"nothing of: give it to the solver, as in LinearSolver(A, {name}=…)"
                )

    def _gives_matrix(self, values: list[np.ndarray]) -> bool:
        """Write values to the copies, and say whether the form then gives the matrix."""
        for copy, written in zip(self._copies.values(), values):
            set_local_values(copy, written)
        self._assembler.assemble(tensor=self._again)
        matrix, again = self._matrix.petscmat, self._again.petscmat
        x, product = matrix.createVecs()
        repeated = product.duplicate()
        random = np.random.default_rng(matrix.comm.rank)
        sizes, difference = 0.0, 0.0
        for _ in range(3):
            x.setArray(random.standard_normal(x.getLocalSize()))
            matrix.mult(x, product)
            again.mult(x, repeated)
            sizes = np.maximum(sizes, np.abs(product.array_r))
            difference = np.maximum(difference, np.abs(product.array_r - repeated.array_r))
        # Where there is NaN, whoever solves will say so.
        return not self._agreed(bool(np.any(difference > _ROUNDING * sizes)))

    def record(self) -> None:
        """Have the working tape know what the copies have their values from. Collective."""
        tape = id(get_working_tape())
        for coefficient, copy in self._copies.items():
            if not self._agreed(self._tape != tape or not has_block_variable(copy)):
                continue
            has_changed = self._agreed(not same_bits(local_values(coefficient), local_values(copy)))
            if has_changed or is_component(coefficient):
                copy.clear_block_variable()  # on this tape a constant: it was assembled before
            elif isinstance(copy, Constant):
                get_working_tape().add_block(_ConstantBlock(coefficient, copy))
            else:
                copy.assign(coefficient)
        self._tape = tape

    def _agreed(self, flag: bool) -> bool:
        """Whether a flag is true on any rank."""
        comm = self._matrix.comm
        return flag if comm.size == 1 else comm.allreduce(flag, MPI.LOR)


class _ConstantBlock(Block):
    """A Constant is given another one's values, which pyadjoint cannot replay for Firedrake's."""

    def __init__(self, constant: Constant, copy: Constant):
        super().__init__()
        self.add_dependency(constant)
        self.add_output(copy.create_block_variable())

    def recompute_component(self, inputs, block_variable, idx, prepared):
        return deep_copy(inputs[0])

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        return adj_inputs[0]

    def evaluate_tlm_component(self, inputs, tlm_inputs, block_variable, idx, prepared=None):
        return tlm_inputs[0]

    def evaluate_hessian_component(
        self,
        inputs,
        hessian_inputs,
        adj_inputs,
        block_variable,
        idx,
        relevant_dependencies,
        prepared=None,
    ):
        return hessian_inputs[0]
