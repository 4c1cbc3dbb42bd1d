"""The right-hand side of a linear problem as a function of its inputs.

b = Σ B m + c - a(g, ·): for each input m that b is affine in, the matrix B is assembled once; c, the rest, when what it depends
on has changed; the last term lifts boundary values g. Rows at boundary dofs are zero.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property

import numpy as np
import ufl
from firedrake import Cofunction, Function, TrialFunction, derivative
from firedrake.petsc import PETSc
from mpi4py import MPI
from ufl import classes
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.corealg.traversal import unique_pre_traversal

from prdp_fem.assembly.lifting import Lifting
from prdp_fem.memory.batch import Batch
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.memory import Memory
from prdp_fem.problem.firedrake_internals import MatrixAssembler, assemble_into
from prdp_fem.problem.forms import Forms, LinearForms
from prdp_fem.problem.inputs import Input, coefficients_of, is_real_space, same_bits, vector_like
from prdp_fem.problem.point import Point

__all__ = ["RightHandSide"]


class RightHandSide:
    """b of A w = b.

    Parameters
    ----------
    forms : LinearForms

    Attributes
    ----------
    terms : dict of int to AffineTerm or CofunctionTerm
        By the inputs that enter b alone, and by a matrix.
    """

    def __init__(self, forms: LinearForms):
        self._forms = forms
        self.terms: dict[int, AffineTerm | CofunctionTerm] = {}
        self._rest: ufl.Form | None = forms.L
        self._split_off_terms()
        self._rest_inputs = set() if self._rest is None else forms.indices(coefficients_of(self._rest))
        self._rest_is_current = False
        self._lifting = Lifting(forms)
        self._assembled = Cofunction(forms.solution.function_space().dual())
        self._lifting_inputs = forms.indices(coefficients_of(forms.jacobian))
        self._comm = forms.solution.function_space().mesh().comm
        self._layout = vector_like(forms.solution)
        self._has_base = False
        self._shared: dict[int, Batch | DeviceBatch] = {}

    def move_to(self, memory: Memory) -> None:
        """Have all vectors in a memory, and everything computed again; the terms are moved by themselves."""
        self._memory = memory
        self._base, self._rest_values, self._lifted, self._boundary = (memory.batches(self._layout)(1) for _ in range(4))
        self._rows, self._products = memory.batches(self._layout), memory.batches(self._layout)
        self._rest_is_current = False
        # The boundary values that were lifted last.
        self._lifted_values: np.ndarray | None = None

    @property
    def boundary(self) -> Batch | DeviceBatch:
        """The boundary values that :meth:`prepare` was given, as one row."""
        return self._boundary

    def _split_off_terms(self) -> None:
        """Find the inputs that b depends on by a matrix, and take their terms out of the form to be assembled."""
        forms = self._forms
        for entry, weight in forms.cofunctions.items():
            self.terms[forms.inputs.index(entry)] = CofunctionTerm(weight, forms)
        if self._rest is None or any(map(is_real_space, forms.solution.function_space())):
            return
        for index, entry in enumerate(forms.inputs):
            copy = entry.copy
            if entry.in_operator or entry.is_real or not isinstance(copy, Function) or not _is_affine(self._rest, copy):
                continue
            part = expand_derivatives(derivative(self._rest, copy, TrialFunction(copy.function_space())))
            if part.empty() or part.coefficients() or len(part.arguments()) != 2:
                continue
            self.terms[index] = AffineTerm(part, forms.indices(coefficients_of(part)), entry, forms.boundary_dofs)
            rest = expand_derivatives(ufl.replace(self._rest, {copy: ufl.zero(copy.ufl_shape)}))
            self._rest = None if rest.empty() else rest
            if self._rest is None:
                return

    @cached_property
    def _rest_assembler(self):
        assert self._rest is not None
        return self._forms.assembler(self._rest)

    def forget(self, changed: set[int], moved: bool) -> None:
        """Have the rest assembled again where it depends on inputs that have changed, or on a mesh that has moved."""
        if moved or self._rest_inputs & changed:
            self._rest_is_current = False
        if moved or self._lifting_inputs & changed:
            self._lifted_values = None

    def prepare(self, point: Point, varying: Mapping[int, np.ndarray]) -> None:
        """Compute what the rows of a batch have in common.

        Parameters
        ----------
        point : Point
        varying : Mapping of int to numpy.ndarray
            The inputs that differ from row to row.
        """
        self._has_base = self._rest is not None or point.boundary is not None
        if self._has_base:
            self._base.set_to_zero()
            if self._rest is not None:
                if not self._rest_is_current:
                    assemble_into(self._rest_assembler, self._assembled)
                    with self._assembled.dat.vec_ro as vector:
                        self._rest_values.fill(vector.array_r)
                    self._rest_is_current = True
                self._base.add(self._rest_values)
            if point.boundary is not None:
                self._lift(point.boundary)
                self._base.add(self._lifted)
        self._shared = {index: term.kept_product(point.values[index], self._memory.batches(self._layout))
                        for index, term in self.terms.items() if index not in varying}

    def _lift(self, boundary: np.ndarray) -> None:
        """Have -J g, and g, of boundary values that most often are those of the last solve."""
        is_current = self._lifted_values is not None and same_bits(boundary, self._lifted_values)
        if self._comm.size > 1:  # assembly is collective
            is_current = self._comm.allreduce(is_current, MPI.LAND)
        if not is_current:
            self._lifted.set_to_zero()
            self._lifted.changed()
            self._lifting.subtract(boundary, self._lifted.vectors[0], self._memory)
            self._boundary.fill(boundary)
            self._lifted_values = boundary.copy()

    def rows(self, varying: Mapping, rows: slice) -> Batch | DeviceBatch:
        """b of some rows, after :meth:`prepare`; until it is called again.

        Terms are added in one order, so that no bit depends on which of them vary.
        """
        b, started = self._rows(rows.stop - rows.start), self._has_base
        if started:
            b.assign(self._base)
        for index, term in self.terms.items():
            if index in self._shared:
                if started:
                    b.add(self._shared[index])
                else:
                    b.assign(self._shared[index])
            elif started:
                b.add(term.products(varying[index][rows], self._products(len(b.vectors))))
            else:
                term.products(varying[index][rows], b)
            started = True
        if not started:
            b.set_to_zero()
        b.changed()
        return b


class AffineTerm:
    """B m of the right-hand side, with B assembled when it is first needed and when what it depends on changed.

    Parameters
    ----------
    form : ufl.Form
        The bilinear form of B, without Functions in it.
    parameters : set of int
        The inputs, all of them Constants, that B depends on.
    entry : Input
        m.
    boundary_dofs : numpy.ndarray
        Rank-local rows of B that are zero.
    """

    def __init__(self, form: ufl.Form, parameters: set[int], entry: Input, boundary_dofs: np.ndarray):
        self.parameters = parameters
        self._boundary_dofs = boundary_dofs
        self._assemble = MatrixAssembler(form, [], parameters=None)
        self._layout = vector_like(entry.copy)
        self.forget()

    def move_to(self, memory: Memory) -> None:
        """Have matrix and vectors in a memory."""
        self._memory = memory
        self._inputs = memory.batches(self._layout)
        self.forget()

    def forget(self) -> None:
        """Have B assembled again."""
        self._matrix: PETSc.Mat | None = None
        self._transpose: PETSc.Mat | None = None
        self._kept: tuple[np.ndarray | None, Batch | DeviceBatch] | None = None

    def _assembled(self) -> PETSc.Mat:
        if self._matrix is None:
            matrix = self._assemble()
            rows = self._boundary_dofs + matrix.getOwnershipRange()[0]
            matrix.zeroRows(rows.astype(PETSc.IntType), diag=0.0)
            # Products with one vector then add up in the order in which those with several do: equal to the bit.
            matrix.setOption(PETSc.Mat.Option.USE_INODES, False)
            self._matrix = self._memory.matrix(matrix)
        return self._matrix

    def products(self, values, b: Batch | DeviceBatch) -> Batch | DeviceBatch:
        """b = B m for the rows m of an array, or of a tensor on the device."""
        matrix, m = self._assembled(), self._inputs(len(values))
        m.fill(values)
        m.multiply(matrix, b)
        return b

    def kept_product(self, values, room: Callable[[int], Batch | DeviceBatch]) -> Batch | DeviceBatch:
        """B m as one row, kept for the next time; ``room`` gives room for rows that nobody else will use."""
        if not self._is_kept(values):
            product = self.products(values[None], room(1) if self._kept is None else self._kept[1])
            self._kept = values.copy() if isinstance(values, np.ndarray) else None, product
            return product
        assert self._kept is not None
        return self._kept[1]

    def _is_kept(self, values) -> bool:
        # A product is collective, and in parallel the values may have changed on some ranks only. To compare values on a device would
        # take as long as the product.
        return (self._kept is not None and self._kept[0] is not None and self._assembled().comm.size == 1
                and isinstance(values, np.ndarray) and same_bits(values, self._kept[0]))

    def transposed_products(self, multipliers: Batch | DeviceBatch, out) -> None:
        """out = Bᵀ λ for the rows λ of a batch; out is an array, or a tensor on the device."""
        matrix, m = self._assembled(), self._inputs(len(out))
        if self._memory.has_explicit_transposes or (len(out) > 1 and matrix.comm.size == 1):
            if self._transpose is None:
                self._transpose = self._memory.transpose(matrix)
            multipliers.multiply(self._transpose, m)
        else:
            for multiplier, product in zip(multipliers.vectors, m.vectors):
                matrix.multTranspose(multiplier, product)
        m.read(out)


class CofunctionTerm:
    """A Cofunction in the right-hand side, with its weight.

    Parameters
    ----------
    weight : float
    forms : Forms
    """

    parameters: frozenset[int] = frozenset()

    def __init__(self, weight: float, forms: Forms):
        self._weight, self._boundary_dofs = weight, forms.boundary_dofs
        self._layout = vector_like(forms.solution)

    def move_to(self, memory: Memory) -> None:
        """Have vectors in a memory."""
        self._boundary = memory.entries(self._layout, self._boundary_dofs)
        self._work = memory.batches(self._layout)
        self._row: Batch | DeviceBatch | None = None

    def forget(self) -> None:
        """Nothing is assembled."""

    def products(self, values, b: Batch | DeviceBatch) -> Batch | DeviceBatch:
        """b = weight · m, zero at the boundary, for the rows m of an array, or of a tensor on the device."""
        b.fill_inside(values, self._boundary)
        b.scale(self._weight)
        b.changed()
        return b

    def kept_product(self, values, room: Callable[[int], Batch | DeviceBatch]) -> Batch | DeviceBatch:
        """weight · m as one row, zero at the boundary."""
        if self._row is None:
            self._row = room(1)
        return self.products(values[None], self._row)

    def transposed_products(self, multipliers: Batch | DeviceBatch, out) -> None:
        """out = weight · λ, zero at the boundary, for the rows λ of a batch; out is an array, or a tensor on the device."""
        work = self._work(len(out))
        work.assign(multipliers)
        work.scale(self._weight)
        work.zero(self._boundary)
        work.read(out)


def _is_affine(form: ufl.Form, coefficient: Function) -> bool:
    """Whether a form is affine in a coefficient, by its structure: derivatives do not tell, they vanish for sign(f), too."""
    for integral in form.integrals():
        for node in unique_pre_traversal(integral.integrand()):
            if not isinstance(node, _LINEAR_OPERATORS) and not node._ufl_is_terminal_ and coefficient in extract_coefficients(node):
                return False
    return True


_LINEAR_OPERATORS = (
    classes.Sum, classes.Product, classes.Division, classes.Indexed, classes.IndexSum, classes.ComponentTensor, classes.ListTensor,
    classes.Inner, classes.Dot, classes.Outer, classes.Cross, classes.Perp, classes.Trace, classes.Transposed, classes.Sym, classes.Skew,
    classes.Deviatoric, classes.Derivative, classes.Restricted, classes.CellAvg, classes.FacetAvg, classes.Conj, classes.Real,
    classes.Variable,
)
