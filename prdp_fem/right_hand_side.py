"""The right-hand side of a linear problem as a function of its inputs.

b = Σ B m + c - a(g, ·): for each input m that b is affine in, the matrix B is assembled once; c, the rest, when what it depends
on has changed; the last term lifts boundary values g. Rows at boundary dofs are zero.
"""
from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
import ufl
from firedrake import Cofunction, Function, TrialFunction, derivative
from firedrake.petsc import PETSc
from ufl import classes
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.corealg.traversal import unique_pre_traversal

from prdp_fem.batch import Batch, BatchStore
from prdp_fem.firedrake_internals import MatrixAssembler, assemble_into
from prdp_fem.forms import LinearForms
from prdp_fem.inputs import Input, coefficients_of, is_real_space, same_bits, vector_like
from prdp_fem.lifting import Lifting
from prdp_fem.point import Point

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
        self._base, self._rest_values = vector_like(forms.solution), vector_like(forms.solution)
        self._rows, self._products = BatchStore(self._base), BatchStore(self._base)
        self._has_base = False
        self._shared: dict[int, np.ndarray] = {}

    def _split_off_terms(self) -> None:
        """Find the inputs that b depends on by a matrix, and take their terms out of the form to be assembled."""
        forms = self._forms
        for entry, weight in forms.cofunctions.items():
            self.terms[forms.inputs.index(entry)] = CofunctionTerm(weight, forms.boundary_dofs)
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
        return self._forms.assembler(self._rest)

    def forget(self, changed: set[int], moved: bool) -> None:
        """Have the rest assembled again where it depends on inputs that have changed, or on a mesh that has moved."""
        if moved or self._rest_inputs & changed:
            self._rest_is_current = False

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
            self._base.set(0.0)
            if self._rest is not None:
                if not self._rest_is_current:
                    assemble_into(self._rest_assembler, self._assembled)
                    with self._assembled.dat.vec_ro as vector:
                        vector.copy(self._rest_values)
                    self._rest_is_current = True
                self._base.axpy(1.0, self._rest_values)
            if point.boundary is not None:
                self._lifting.subtract(point.boundary, self._base)
        self._shared = {index: term.kept_product(point.values[index], self._products(1))
                        for index, term in self.terms.items() if index not in varying}

    def rows(self, varying: Mapping[int, np.ndarray], rows: slice) -> Batch:
        """b of some rows, after :meth:`prepare`; until it is called again.

        Terms are added in one order, so that no bit depends on which of them vary.
        """
        b, started = self._rows(rows.stop - rows.start), self._has_base
        if started:
            b.array[...] = self._base.array_r
        for index, term in self.terms.items():
            if index not in varying:
                products = self._shared[index]
            elif started:
                products = term.products(varying[index][rows], self._products(len(b.array))).array
            else:
                term.products(varying[index][rows], b)
                started = True
                continue
            if started:
                b.array += products
            else:
                b.array[...] = products
            started = True
        if not started:
            b.array[...] = 0.0
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
        self._inputs = BatchStore(vector_like(entry.copy))
        self._matrix: PETSc.Mat | None = None
        self._transpose: PETSc.Mat | None = None
        self._kept: tuple[np.ndarray, np.ndarray] | None = None

    def forget(self) -> None:
        """Have B assembled again."""
        self._matrix = self._transpose = self._kept = None

    def _assembled(self) -> PETSc.Mat:
        if self._matrix is None:
            self._matrix = self._assemble()
            rows = self._boundary_dofs + self._matrix.getOwnershipRange()[0]
            self._matrix.zeroRows(rows.astype(PETSc.IntType), diag=0.0)
            # Products with one vector then add up in the order in which those with several do: equal to the bit.
            self._matrix.setOption(PETSc.Mat.Option.USE_INODES, False)
        return self._matrix

    def products(self, values: np.ndarray, b: Batch) -> Batch:
        """b = B m for the rows m of an array."""
        matrix, m = self._assembled(), self._inputs(len(values))
        m.fill(values)
        if len(values) > 1 and matrix.comm.size == 1:
            matrix.matMult(m.matrix, b.matrix)
        else:
            for one, product in zip(m.vectors, b.vectors):
                matrix.mult(one, product)
        return b

    def kept_product(self, values: np.ndarray, b: Batch) -> np.ndarray:
        """B m, shape (1, n), kept for the next time; b is room to work in."""
        # A product is collective, and in parallel the values may have changed on some ranks only.
        if self._kept is None or self._assembled().comm.size > 1 or not same_bits(values, self._kept[0]):
            self._kept = values.copy(), self.products(values[None], b).array.copy()
        return self._kept[1]

    def transposed_products(self, multipliers: Batch, out: np.ndarray) -> None:
        """out = Bᵀ λ for the rows λ of a batch."""
        matrix, m = self._assembled(), self._inputs(len(out))
        if len(out) > 1 and matrix.comm.size == 1:
            if self._transpose is None:
                self._transpose = matrix.transpose(PETSc.Mat())
            self._transpose.matMult(multipliers.matrix, m.matrix)
        else:
            for multiplier, product in zip(multipliers.vectors, m.vectors):
                matrix.multTranspose(multiplier, product)
        out[...] = m.array


class CofunctionTerm:
    """A Cofunction in the right-hand side, with its weight."""

    parameters: frozenset[int] = frozenset()

    def __init__(self, weight: float, boundary_dofs: np.ndarray):
        self._weight, self._boundary_dofs = weight, boundary_dofs

    def forget(self) -> None:
        """Nothing is assembled."""

    def products(self, values: np.ndarray, b: Batch) -> Batch:
        """b = weight · m, zero at the boundary, for the rows m of an array."""
        np.multiply(values, self._weight, out=b.array)
        b.array[:, self._boundary_dofs] = 0.0
        b.changed()
        return b

    def kept_product(self, values: np.ndarray, b: Batch) -> np.ndarray:
        """weight · m, zero at the boundary, shape (1, n)."""
        return self.products(values[None], b).array.copy()

    def transposed_products(self, multipliers: Batch, out: np.ndarray) -> None:
        """out = weight · λ, zero at the boundary, for the rows λ of a batch."""
        np.multiply(multipliers.array, self._weight, out=out)
        out[:, self._boundary_dofs] = 0.0


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
