"""The right-hand side of a linear problem as a function of its inputs.

b = Σ B m + c - a(g, ·): for each input m that b is affine in, the matrix B is assembled once; c,
the rest, when what it depends on has changed; the last term lifts boundary values g. Rows at
boundary dofs are zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import ufl
from firedrake import Cofunction, Function, TrialFunction, derivative
from firedrake.petsc import PETSc
from ufl import classes
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.corealg.traversal import unique_pre_traversal

from prdp_fem.assembly.lifting import Lifting
from prdp_fem.freshness import BOUNDARY, MESH, UNSEEN
from prdp_fem.memory.batch import Batch
from prdp_fem.memory.device_batch import DeviceBatch
from prdp_fem.memory.place import Place
from prdp_fem.problem.firedrake_internals import MatrixAssembler, assemble_into
from prdp_fem.problem.forms import Forms, LinearForms
from prdp_fem.problem.inputs import Input, coefficients_of, is_real_space, same_bits, vector_like
from prdp_fem.problem.point import Point
from prdp_fem.ranks.flags import on_any_rank

__all__ = ["RightHandSide"]


class RightHandSide:
    """b of A w = b.

    Parameters
    ----------
    forms : LinearForms
    place : Place
        Where it is computed.

    Attributes
    ----------
    terms : dict of int to AffineTerm or CofunctionTerm
        By the inputs that enter b alone, and by a matrix.
    boundary : Kept
        The boundary values that were lifted last, as one row.
    """

    def __init__(self, forms: LinearForms, place: Place):
        self._forms, self._place = forms, place
        self.terms: dict[int, AffineTerm | CofunctionTerm] = {}
        self._rest: ufl.Form | None = forms.L
        self._layout = layout = vector_like(forms.solution)
        self._split_off_terms()
        self._lifting = Lifting(forms, place)
        self._assembled = Cofunction(forms.solution.function_space().dual())
        self._comm = forms.solution.function_space().mesh().comm
        self._base, self._room_for_rest = place.row(layout), place.row(layout)
        self._room_for_lifted, self._room_for_boundary = place.row(layout), place.row(layout)
        self._rows, self._products = place.batches(layout), place.batches(layout)
        of_rest = set() if self._rest is None else forms.indices(coefficients_of(self._rest))
        self._rest_row = place.kept(self._assemble_rest, [*of_rest, MESH, UNSEEN])
        # Boundary values most often are those of the last solve.
        self._boundary_values: np.ndarray | None = None
        of_lifting = forms.indices(coefficients_of(forms.jacobian))
        self._lifted = place.kept(self._lift, [*of_lifting, MESH, UNSEEN, BOUNDARY])
        self.boundary = place.kept(self._fill_boundary, [BOUNDARY])
        self._has_base = False
        self._shared: dict[int, Batch | DeviceBatch] = {}

    def _split_off_terms(self) -> None:
        """Find the inputs that b depends on by a matrix, and take their terms out of its form."""
        forms = self._forms
        for entry, weight in forms.cofunctions.items():
            self.terms[forms.inputs.index(entry)] = CofunctionTerm(weight, forms, self._place)
        if self._rest is None or any(map(is_real_space, forms.solution.function_space())):
            return
        for index, entry in enumerate(forms.inputs):
            copy = entry.copy
            if entry.in_operator or entry.is_real or not isinstance(copy, Function):
                continue
            if not _is_affine(self._rest, copy):
                continue
            part = expand_derivatives(
                derivative(self._rest, copy, TrialFunction(copy.function_space()))
            )
            if part.empty() or part.coefficients() or len(part.arguments()) != 2:
                continue
            parameters = forms.indices(coefficients_of(part))
            self.terms[index] = AffineTerm(part, parameters, entry, forms, self._place)
            rest = expand_derivatives(ufl.replace(self._rest, {copy: ufl.zero(copy.ufl_shape)}))
            self._rest = None if rest.empty() else rest
            if self._rest is None:
                return

    @cached_property
    def _rest_assembler(self):
        assert self._rest is not None
        return self._forms.assembler(self._rest)

    def _assemble_rest(self) -> Batch | DeviceBatch:
        assemble_into(self._rest_assembler, self._assembled)
        row = self._room_for_rest.value
        with self._assembled.dat.vec_ro as vector:
            row.fill(vector.array_r)
        return row

    def _lift(self) -> Batch | DeviceBatch:
        """-J g."""
        row = self._room_for_lifted.value
        row.set_to_zero()
        row.changed()
        assert self._boundary_values is not None
        self._lifting.subtract(self._boundary_values, row.vectors[0])
        return row

    def _fill_boundary(self) -> Batch | DeviceBatch:
        row = self._room_for_boundary.value
        row.fill(self._boundary_values)
        return row

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
            base = self._base.value
            base.set_to_zero()
            if self._rest is not None:
                base.add(self._rest_row.value)
            if point.boundary is not None:
                self._note_boundary(point.boundary)
                base.add(self._lifted.value)
        self._shared = {
            index: term.kept_product(point.values[index])
            for index, term in self.terms.items()
            if index not in varying
        }

    def _note_boundary(self, boundary: np.ndarray) -> None:
        """Have boundary values lifted, unless they are those of the last time on all ranks."""
        before = self._boundary_values
        if on_any_rank(self._comm, before is None or not same_bits(boundary, before)):
            self._boundary_values = boundary.copy()
            self._place.clock.changed(BOUNDARY)

    def rows(self, varying: Mapping, rows: slice) -> Batch | DeviceBatch:
        """b of some rows, after :meth:`prepare`; until it is called again.

        Terms are added in one order, so that no bit depends on which of them vary.
        """
        b, started = self._rows.value[rows.stop - rows.start], self._has_base
        if started:
            b.assign(self._base.value)
        for index, term in self.terms.items():
            if index in self._shared:
                if started:
                    b.add(self._shared[index])
                else:
                    b.assign(self._shared[index])
            elif started:
                b.add(term.products(varying[index][rows], self._products.value[len(b.vectors)]))
            else:
                term.products(varying[index][rows], b)
            started = True
        if not started:
            b.set_to_zero()
        b.changed()
        return b


class AffineTerm:
    """B m of the right-hand side, with B assembled when what it depends on has changed.

    Parameters
    ----------
    form : ufl.Form
        The bilinear form of B, without Functions in it.
    parameters : set of int
        The inputs, all of them Constants, that B depends on.
    entry : Input
        m.
    forms : Forms
        Of which rows of B at boundary dofs are zero.
    place : Place
        Where matrix and vectors are.
    """

    def __init__(
        self, form: ufl.Form, parameters: set[int], entry: Input, forms: Forms, place: Place
    ):
        self.parameters = parameters
        self._place, self._boundary_dofs = place, forms.boundary_dofs
        self._assemble = MatrixAssembler(form, [], parameters=None)
        self._inputs = place.batches(vector_like(entry.copy))
        room = place.batches(vector_like(forms.solution))
        of_matrix = [*parameters, MESH, UNSEEN]
        self._matrix = place.kept(self._assembled, of_matrix)
        self._transpose = place.kept(lambda: place.memory.transpose(self._matrix.value), of_matrix)
        self._last = place.kept(lambda: _LastProduct(room.value[1]), of_matrix)

    def _assembled(self) -> PETSc.Mat:
        matrix = self._assemble()
        rows = self._boundary_dofs + matrix.getOwnershipRange()[0]
        matrix.zeroRows(rows.astype(PETSc.IntType), diag=0.0)
        # Products with one vector then add up in the order in which those with several do: equal to
        # the bit.
        matrix.setOption(PETSc.Mat.Option.USE_INODES, False)
        return self._place.memory.matrix(matrix)

    def products(self, values, b: Batch | DeviceBatch) -> Batch | DeviceBatch:
        """b = B m for the rows m of an array, or of a tensor on the device."""
        matrix, m = self._matrix.value, self._inputs.value[len(values)]
        m.fill(values)
        m.multiply(matrix, b)
        return b

    def kept_product(self, values) -> Batch | DeviceBatch:
        """B m as one row, kept for the next time."""
        last = self._last.value
        # A product is collective, and in parallel the values may have changed on some ranks only.
        # To compare values on a device would take as long as the product.
        is_comparable = isinstance(values, np.ndarray)
        is_kept = (
            last.values is not None
            and is_comparable
            and self._matrix.value.comm.size == 1
            and same_bits(values, last.values)
        )
        if not is_kept:
            self.products(values[None], last.product)
            last.values = values.copy() if is_comparable else None
        return last.product

    def transposed_products(self, multipliers: Batch | DeviceBatch, out) -> None:
        """out = Bᵀ λ for the rows λ of a batch; out is an array, or a tensor on the device."""
        matrix, m = self._matrix.value, self._inputs.value[len(out)]
        if self._place.memory.has_explicit_transposes or (len(out) > 1 and matrix.comm.size == 1):
            multipliers.multiply(self._transpose.value, m)
        else:
            for multiplier, product in zip(multipliers.vectors, m.vectors):
                matrix.multTranspose(multiplier, product)
        m.read(out)


@dataclass
class _LastProduct:
    """What was multiplied last, None for what nobody will compare with, and what came of it."""

    product: Batch | DeviceBatch
    values: np.ndarray | None = None


class CofunctionTerm:
    """A Cofunction in the right-hand side, with its weight.

    Parameters
    ----------
    weight : float
    forms : Forms
    place : Place
        Where vectors are.
    """

    def __init__(self, weight: float, forms: Forms, place: Place):
        layout = vector_like(forms.solution)
        self.parameters: frozenset[int] = frozenset()
        self._weight = weight
        self._boundary = place.entries(layout, forms.boundary_dofs)
        self._work, self._row = place.batches(layout), place.row(layout)

    def products(self, values, b: Batch | DeviceBatch) -> Batch | DeviceBatch:
        """b = weight · m, zero at the boundary, for rows m: an array, or a tensor on the device."""
        b.fill_inside(values, self._boundary.value)
        b.scale(self._weight)
        b.changed()
        return b

    def kept_product(self, values) -> Batch | DeviceBatch:
        """weight · m as one row, zero at the boundary."""
        return self.products(values[None], self._row.value)

    def transposed_products(self, multipliers: Batch | DeviceBatch, out) -> None:
        """out = weight · λ, zero at the boundary, for the rows λ of a batch.

        out is an array, or a tensor on the device.
        """
        work = self._work.value[len(out)]
        work.assign(multipliers)
        work.scale(self._weight)
        work.zero(self._boundary.value)
        work.read(out)


def _is_affine(form: ufl.Form, coefficient: Function) -> bool:
    """Whether a form is affine in a coefficient, by its structure.

    Derivatives do not tell: they vanish for sign(f), too.
    """
    for integral in form.integrals():
        for node in unique_pre_traversal(integral.integrand()):
            if isinstance(node, _LINEAR_OPERATORS) or node._ufl_is_terminal_:
                continue
            if coefficient in extract_coefficients(node):
                return False
    return True


_LINEAR_OPERATORS = (
    classes.Sum,
    classes.Product,
    classes.Division,
    classes.Indexed,
    classes.IndexSum,
    classes.ComponentTensor,
    classes.ListTensor,
    classes.Inner,
    classes.Dot,
    classes.Outer,
    classes.Cross,
    classes.Perp,
    classes.Trace,
    classes.Transposed,
    classes.Sym,
    classes.Skew,
    classes.Deviatoric,
    classes.Derivative,
    classes.Restricted,
    classes.CellAvg,
    classes.FacetAvg,
    classes.Conj,
    classes.Real,
    classes.Variable,
)
