"""What can be unrolled is registered in one place: by whom, who reads it, and how to add to it."""

import re
from pathlib import Path

import numpy as np
import pytest
from firedrake.petsc import PETSc

from prdp_fem.krylov.petsc_types import PC_TYPES, SNES_TYPES, types_with
from prdp_fem.unrolled import (
    Iteration,
    OperatorCotangent,
    Preconditioner,
    SteepestDescent,
    UnrolledKSP,
    restated_preconditioners,
    unrolled_methods,
)

DOCS = Path(__file__).parents[1] / "docs"
SIZE, ITERATIONS = 20, 4


@pytest.fixture
def registries(monkeypatch):
    """Both, in which nothing stays of what a test registers."""
    for registry in (unrolled_methods, restated_preconditioners):
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return unrolled_methods, restated_preconditioners


# Whoever lists them


def row(document, start):
    (line,) = (
        line for line in (DOCS / document).read_text().splitlines() if line.startswith(start)
    )
    return line.removeprefix(start)


def listed(entries):
    """As the documentation has them."""
    return [f"`{entry.name}`" + (f" ({entry.note})" if entry.note else "") for entry in entries]


@pytest.mark.parametrize(
    "option, registry", [("ksp_type", unrolled_methods), ("pc_type", restated_preconditioners)]
)
def test_the_documentation_lists_what_is_registered(option, registry):
    cell = row("differentiation.md", f"| `{option}`")
    items = listed(registry)
    assert [item for item in items if item not in cell] == []
    # And no other type: what is left are options, and none of those names.
    for item in sorted(items, key=len, reverse=True):
        cell = cell.replace(item, "")
    assert re.findall("`(.*?)`", cell) in ([], ["ksp_python_type"])


@pytest.mark.parametrize(
    "document, start, table, fact",
    [
        ("differentiation.md", "| `snes_type` |", SNES_TYPES, "steps_along_solution"),
        ("gpu.md", "- `pc_type`", PC_TYPES, "works_on_host"),
        ("gpu.md", "- `snes_type`", SNES_TYPES, "works_on_host"),
    ],
)
def test_the_documentation_lists_what_the_table_of_types_says(document, start, table, fact):
    assert set(re.findall("`([a-z]+)`", row(document, start))) == set(types_with(table, fact))


def test_messages_list_what_is_registered(registries):
    A = matrix()
    known = ", ".join(entry.name for entry in unrolled_methods)
    assert known.startswith("bcgs, cg, ") and known.endswith("python with prdp_fem.SteepestDescent")
    with pytest.raises(ValueError, match=f"use one of {known}, or implicit"):
        UnrolledKSP(ksp_of(A, "cgs"))
    unrolled_methods("cgs")(ConjugateGradientsSquared)
    with pytest.raises(ValueError, match="use one of bcgs, cg, cgs, chebyshev, "):
        UnrolledKSP(ksp_of(A, "minres"))
    restated_preconditioners(Shifted)(RestatedShifted)
    ksp = ksp_of(A, "gmres")
    ksp.getPC().setType("kaczmarz")  # which has no transpose
    with pytest.raises(
        ValueError,
        match="use jacobi, pbjacobi, sor with one sweep, python with .*Shifted, ilu or bjacobi",
    ):
        UnrolledKSP(ksp).prepare(symmetric=False)


def test_what_is_registered_already_is_not_replaced(registries):
    with pytest.raises(ValueError, match="ksp_type cg is stated again already, by Conj"):
        unrolled_methods("cg")
    with pytest.raises(ValueError, match="pc_type sor is stated again already, by Relaxation"):
        restated_preconditioners("sor")


def test_methods_in_python_are_found_by_their_class():
    class Mine(SteepestDescent):
        pass

    class Other:
        pass

    ksp = ksp_of(matrix(), "python")
    assert unrolled_methods.find(ksp) is None
    for context, is_known in ((SteepestDescent(), True), (Mine(), True), (Other(), False)):
        ksp.setPythonContext(context)
        assert (unrolled_methods.find(ksp) is not None) == is_known
    named = PETSc.KSP().create(PETSc.COMM_SELF)
    named.setOptionsPrefix("named_")
    named.setType("python")
    PETSc.Options("named_")["ksp_python_type"] = "prdp_fem.SteepestDescent"
    assert unrolled_methods.find(named).restated.__name__ == "SteepestDescentIteration"


# A method and a preconditioner of one's own


class ConjugateGradientsSquared(Iteration):
    """Sonneveld's squared conjugate gradients (1989), preconditioned from the left, in cgs.c."""

    def initial(self, on, b, guess):
        r = on.add(b, -1.0, on.operator(guess)) if guess is not None else b
        r = on.precondition(r)
        return guess, r, r, r, r, on.dot(r, r)

    def advance(self, on, state, iterations):
        x, r, shadow, u, p, rho = state
        v = on.precondition(on.operator(p))
        alpha = rho / on.dot(v, shadow)
        q = on.add(u, -alpha, v)
        both = on.add(u, 1.0, q)
        x = on.add(x, alpha, both)
        r = on.add(r, -alpha, on.precondition(on.operator(both)))
        rho_next = on.dot(r, shadow)
        beta = rho_next / rho
        u = on.add(r, beta, q)
        return x, r, shadow, u, on.add(u, beta, on.add(q, beta, p)), rho_next


class Shifted:
    """PETSc's side of a preconditioner: the inverse of the diagonal plus one."""

    def setUp(self, pc):
        self.inverse = pc.getOperators()[1].getDiagonal()
        self.inverse.shift(1.0)
        self.inverse.reciprocal()

    def apply(self, pc, x, y):
        y.pointwiseMult(self.inverse, x)

    applyTranspose = apply


class RestatedShifted(Preconditioner):
    """Its derivative: with z = r/(d + 1), ż = -z ḋ/(d + 1)."""

    def _diagonal(self, cotangent):
        return np.flatnonzero(cotangent.pattern.rows == cotangent.pattern.columns)

    def add_cotangent(self, cotangent, factor, z_cotangent, r_cotangent, r, z):
        values = -factor * r_cotangent.array_r * z.array_r
        cotangent.add_to_entries(self._diagonal(cotangent), values)

    def derivative(self, tangent):
        change = tangent.getDiagonal()

        def apply(r, z, out):
            out.pointwiseMult(change, z)
            self.pc.apply(out.copy(), out)
            out.scale(-1.0)

        return apply


def matrix(change=0.0):
    entries = np.diag(np.linspace(1, 2, SIZE)) + 0.3 * np.eye(SIZE, k=1) - 0.2 * np.eye(SIZE, k=-1)
    rows, columns = np.nonzero(entries)
    A = PETSc.Mat().createAIJ((SIZE, SIZE), nnz=3, comm=PETSc.COMM_SELF)
    for i, j in zip(rows, columns):
        A.setValue(i, j, entries[i, j] + change * np.sin(i + 2 * j))
    A.assemble()
    return A


def ksp_of(A, name, context=None):
    ksp = PETSc.KSP().create(A.comm)
    ksp.setOperators(A)
    ksp.setType(name)
    ksp.getPC().setType("jacobi" if context is None else "python")
    if context is not None:
        ksp.getPC().setPythonContext(context)
    ksp.setTolerances(rtol=1e-30, atol=0, divtol=1e300, max_it=ITERATIONS)
    return ksp


def vector(A, phase):
    x = A.createVecRight()
    x.setArray(np.sin(phase + 1.3 * np.arange(SIZE)))
    return x


def solved(ksp, b):
    x = b.duplicate()
    ksp.solve(b, x)
    return x


def check_against_petsc(name, make_context):
    """The iterate, its tangent against differences of PETSc's own solves, and the cotangents."""
    A, step = matrix(), 1e-6
    b, b_dot, c = (vector(A, phase) for phase in (1, 2, 3))
    unrolled = UnrolledKSP(ksp_of(A, name, make_context()))
    out, b_bar = b.duplicate(), b.duplicate()
    unrolled.iterate(b, None, ITERATIONS, out)
    expected = solved(ksp_of(A, name, make_context()), b)
    assert (out - expected).norm() < 1e-12 * expected.norm()
    ends = [
        solved(ksp_of(matrix(sign * step), name, make_context()), b + sign * step * b_dot)
        for sign in (1, -1)
    ]
    expected = (ends[0] - ends[1]) / (2 * step)
    A_dot = matrix(1.0)
    A_dot.axpy(-1.0, A)
    unrolled.tangent(b, None, ITERATIONS, out, b_tangent=b_dot, operator_tangent=A_dot)
    assert (out - expected).norm() < 1e-7 * expected.norm()
    A_bar = OperatorCotangent(A)
    unrolled.adjoint(b, None, ITERATIONS, c, b_cotangent=b_bar, operator_cotangent=A_bar)
    by_adjoint = b_bar.dot(b_dot) + A_bar.values @ A_dot.getValuesCSR()[2]
    assert np.isclose(by_adjoint, c.dot(out), rtol=1e-11)


def test_another_method_of_petscs_is_unrolled_by_one_class(registries):
    unrolled_methods("cgs")(ConjugateGradientsSquared)
    check_against_petsc("cgs", lambda: None)


def test_a_preconditioner_of_ones_own_is_differentiated_by_one_class(registries):
    restated_preconditioners(Shifted)(RestatedShifted)
    check_against_petsc("gmres", Shifted)


def test_without_it_it_is_constant_and_a_warning_lists_the_others(registries, caplog):
    restated_preconditioners("vpbjacobi")(RestatedShifted)
    with pytest.raises(AssertionError):
        check_against_petsc("gmres", Shifted)
    assert "that of jacobi, pbjacobi, sor and vpbjacobi is" in caplog.text
