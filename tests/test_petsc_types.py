"""What is said of PETSc's types, against the PETSc installed: which there are, and what they do."""

import ctypes
from dataclasses import fields

import numpy as np
import pytest
from firedrake.petsc import PETSc

from prdp_fem.krylov.nested import all_inside, all_preconditioners
from prdp_fem.krylov.petsc_types import (
    KSP_TYPES,
    PC_TYPES,
    SNES_TYPES,
    KSPFacts,
    PCFacts,
    SNESFacts,
    ksp_facts,
    listed,
    pc_facts,
    snes_facts,
    types_with,
)
from prdp_fem.krylov.view import described

SELF = PETSc.COMM_SELF
PREFIX = "tried_"
KINDS = {
    "KSP": (PETSc.KSP, KSP_TYPES),
    "PC": (PETSc.PC, PC_TYPES),
    "SNES": (PETSc.SNES, SNES_TYPES),
}


def names_of(kind):
    """PETSc's own list."""
    return {name for key, name in vars(kind.Type).items() if not key.startswith("_")}


def is_installed(kind, name):
    try:
        one = kind().create(SELF)
        one.setType(name)
        # Never destroyed: a KSP of type pipelcg cannot be before it is set up.
        one.incRef()
    except PETSc.Error:
        return False
    return True


def tried(kind, table, untried):
    """The types that this PETSc can make, but those that want more than a small matrix."""
    return [name for name in table if name not in untried and is_installed(kind, name)]


# Which types there are


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_has_a_row_for_each_type_and_no_other(kind):
    of_petsc, table = KINDS[kind]
    assert set(table) == names_of(of_petsc)


def test_types_without_a_row_have_cautious_facts_and_none_has_ordinary_ones():
    ksp = ksp_facts("mine")
    pc = pc_facts("mine")
    snes = snes_facts("mine")
    assert not (ksp.is_transposable or ksp.is_linear)
    assert not (ksp.only_applies_preconditioner or ksp.asks_for_symmetry)
    assert ksp.has_thresholds
    assert pc.remembers_values and pc.works_on_host
    assert pc.does_own_richardson and pc.needs_symmetry_to_transpose
    assert not (pc.is_self_contained or pc.factorises or pc.nests or pc.is_multigrid)
    assert snes.remembers_solves and snes.works_on_host
    assert not (snes.solves_linear_systems or snes.steps_along_solution)
    assert ksp_facts(None) == KSPFacts() and pc_facts(None) == PCFacts()
    assert snes_facts(None) == SNESFacts()


def test_each_fact_is_said_in_its_docstring():
    for facts in (KSPFacts, PCFacts, SNESFacts):
        for field in fields(facts):
            assert f"\n    {field.name} : bool\n" in facts.__doc__


def test_most_types_of_any_petsc_are_tried():
    """Options of its configuration matter for some."""
    assert len(TRIED_KSP) >= 45 and len(TRIED_PC) >= 25 and len(TRIED_SNES) >= 14
    assert KSP_UNTRIED.keys() <= KSP_TYPES.keys() and PC_UNTRIED.keys() <= PC_TYPES.keys()
    assert SNES_UNTRIED.keys() <= SNES_TYPES.keys()


def test_messages_list_types_in_the_order_of_the_table():
    assert types_with(SNES_TYPES, "steps_along_solution") == ("newtonls", "ksponly")
    assert listed(["cg"]) == "cg" and listed(["cg", "gmres", "bcgs"]) == "cg, gmres or bcgs"


# KSP

KSP_UNTRIED = {
    "eksm": "it is for operators of many shifts",
    "fetidp": "it is for operators in parts",
    "python": "its author decides",
    "tsirm": "PETSc fails where it has a budget",
}
TRIED_KSP = tried(PETSc.KSP, KSP_TYPES, KSP_UNTRIED)
SIZE = 24


def matrix_of(entries):
    A = PETSc.Mat().createAIJ(entries.shape, nnz=len(entries), comm=SELF)
    for row, values in enumerate(entries):
        for column in np.flatnonzero(values):
            A.setValue(row, column, values[column])
    A.assemble()
    return A


def well_conditioned(symmetric, skew=0.3):
    """A matrix with no zero, whose diagonal is not constant."""
    noise = np.random.default_rng(0).standard_normal((SIZE, SIZE))
    entries = np.diag(np.linspace(2, 3, SIZE)) + 0.05 * (noise + noise.T)
    if not symmetric:
        entries += skew * (np.diag(np.ones(SIZE - 1), 1) - np.diag(np.ones(SIZE - 1), -1))
    return matrix_of(entries)


def without_solution():
    """A singular matrix, whose null space is not that of its transpose, and a right-hand side.

    The last is the norm of the least residual.
    """
    entries = np.diag(np.linspace(2, 3, SIZE)) + 0.3 * np.eye(SIZE, k=1) - 0.3 * np.eye(SIZE, k=-1)
    u, v = np.random.default_rng(3).standard_normal((2, SIZE))
    entries -= np.outer(entries @ u, v) / (v @ u)
    A = matrix_of(entries)
    b = vector(A, 1)
    x, *_ = np.linalg.lstsq(entries, b.array, rcond=1e-10)
    return A, b, np.linalg.norm(entries @ x - b.array)


def vector(A, seed):
    x = A.createVecRight()
    x.setArray(np.random.default_rng(seed).standard_normal(x.getSize()))
    return x


def solver(name, A, iterations, pc_type="jacobi", **options):
    given = {
        "ksp_gmres_restart": 3,
        "ksp_lcd_restart": 3,
        "ksp_chebyshev_eigenvalues": "0.5,4",
        **options,
    }
    database = PETSc.Options(PREFIX)
    for option, value in given.items():
        database[option] = value
    ksp = PETSc.KSP().create(SELF)
    ksp.setOptionsPrefix(PREFIX)
    ksp.setOperators(A)
    ksp.setType(name)
    ksp.getPC().setType(pc_type)
    ksp.setFromOptions()
    ksp.setTolerances(rtol=1e-30, atol=0, divtol=1e300, max_it=iterations)
    for option in given:
        database.delValue(option)
    return ksp


def solved(ksp, b, transposed=False):
    x = b.duplicate()
    (ksp.solveTranspose if transposed else ksp.solve)(b, x)
    return x


def difference(x, y):
    return (x - y).norm() / y.norm()


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_only_applies_the_preconditioner(name):
    A = well_conditioned(symmetric=True)
    ksp, b = solver(name, A, 3), vector(A, 1)
    x, z = solved(ksp, b), b.duplicate()
    ksp.getPC().apply(b, z)
    assert x.equal(z) == ksp_facts(name).only_applies_preconditioner


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_asks_for_symmetry_solves_no_unsymmetric_system(name):
    facts = ksp_facts(name)
    if facts.is_linear:
        # A polynomial of the operator, of which the transpose is that of the transposed operator.
        assert not facts.asks_for_symmetry
        return
    for symmetric in (True, False):
        A = well_conditioned(symmetric, skew=1.5)
        b, rest = vector(A, 1), vector(A, 1)
        ksp = solver(name, A, 60, ksp_gmres_restart=60, ksp_lcd_restart=60)
        ksp.setTolerances(rtol=1e-10)
        A.mult(solved(ksp, b), rest)
        is_solution = difference(rest, b) < 1e-6
        if symmetric:
            assert is_solution or name == "qcg"  # which looks for the least in a ball
        else:
            assert is_solution != facts.asks_for_symmetry


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_is_transposable_makes_the_iterations_of_the_transposed_operator(name):
    A = well_conditioned(symmetric=False)
    if ksp_facts(name).remembers_solves:
        pytest.skip("what it has in memory makes a difference")
    b = vector(A, 1)
    expected = solved(solver(name, A.transpose(out=PETSc.Mat()), 4), b)
    try:
        is_transpose = difference(solved(solver(name, A, 4), b, transposed=True), expected) < 1e-8
    except PETSc.Error:
        is_transpose = False
    assert is_transpose == ksp_facts(name).is_transposable


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_is_linear_in_the_right_hand_side(name):
    A = well_conditioned(symmetric=True)
    ksp = solver(name, A, 3)
    b = vector(A, 1)
    c = vector(A, 2)
    is_linear = difference(solved(ksp, b) + 2 * solved(ksp, c), solved(ksp, b + 2 * c)) < 1e-12
    assert is_linear == ksp_facts(name).is_linear


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_goes_on_to_the_least_residual(name):
    if name == "pipelcg":
        pytest.skip("it comes to no end where an operator is not symmetric")
    A, b, least = without_solution()
    best = np.inf
    for iterations in range(1, SIZE + 6):
        ksp = solver(name, A, iterations, pc_type="none", ksp_gmres_restart=60)
        x, rest = solved(ksp, b), b.copy()
        A.multAdd(-1.0 * x, b, rest)
        best = min(best, abs(rest.norm() - least) / least)
    assert (best < 1e-10) == ksp_facts(name).solves_least_squares


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_remembers_earlier_solves(name):
    remembers = False
    for symmetric in (True, False):
        A = well_conditioned(symmetric)
        b, c = vector(A, 1), vector(A, 2)
        for iterations in (3, 7):
            ksp, x = solver(name, A, iterations), b.duplicate()
            ksp.solve(b, x)
            first = x.copy()
            for other in (c, b):
                ksp.solve(other, x)
            remembers = remembers or not x.equal(first)
    assert remembers == ksp_facts(name).remembers_solves


@pytest.mark.parametrize("name", TRIED_KSP)
def test_what_has_thresholds_that_are_not_relative_to_the_right_hand_side(name):
    differs = False
    for symmetric, iterations in ((True, 3), (False, 6)):
        A = well_conditioned(symmetric)
        b = vector(A, 1)
        expected = solved(solver(name, A, iterations), b)
        for exponent in (-400, -240, -120, -60, 60, 240):
            x = solved(solver(name, A, iterations), b * 2.0**exponent)
            differs = differs or difference(x * 2.0**-exponent, expected) > 1e-8
    assert differs == ksp_facts(name).has_thresholds


@pytest.mark.parametrize("name", types_with(KSP_TYPES, "has_free_natural_norm"))
def test_a_free_natural_norm_changes_no_bit(name):
    A = well_conditioned(symmetric=True)
    b = vector(A, 1)
    one, other = (
        solved(solver(name, A, 5, ksp_norm_type=norm), b) for norm in ("preconditioned", "natural")
    )
    assert one.equal(other)


# PC

PC_UNTRIED = {
    "bddc": "it is for operators in parts",
    "nn": "it is for operators in parts",
    "exotic": "it is for structured grids",
    "galerkin": "it is made of a KSP",
    "lsc": "it is for Schur complements",
    "mpi": "it is for servers",
    "patch": "it is for meshes",
    "python": "its author decides",
    "shell": "its author decides",
    "tfs": "it is for distributed matrices",
}
TRIED_PC = tried(PETSc.PC, PC_TYPES, PC_UNTRIED)
# PETSc does not apply it but inside of a KSP.
TRIED_ALONE = [name for name in TRIED_PC if name != "eisenstat"]
# Facts of which nothing was seen here, and that options or matrices of other types may bring about.
CAUTIOUS = {("hmg", "remembers_values"), ("lmvm", "remembers_solves")}
_LIBRARY = ctypes.CDLL(PETSc.__file__)


def diffusion(symmetric=True, seed=0):
    """Five-point differences with a coefficient."""
    across, size = 6, 36
    kappa = 1 + np.random.default_rng(seed).random(size)
    entries = np.eye(size)
    for i in range(size):
        for j in (i - across, i - 1, i + 1, i + across):
            if 0 <= j < size:
                entries[i, j] = -kappa[i] - kappa[j] + (0 if symmetric else 0.3 * np.sign(j - i))
                entries[i, i] += kappa[i] + kappa[j]
    return matrix_of(entries)


def prepare(pc, name, size):
    """Tell a preconditioner what some types cannot do without."""
    if name == "composite":
        pc.addCompositePCType("jacobi")
        pc.addCompositePCType("ilu")
    if name == "fieldsplit":
        halves = (
            PETSc.IS().createStride(size // 2, first, 1, comm=SELF) for first in (0, size // 2)
        )
        pc.setFieldSplitIS(*((str(number), half) for number, half in enumerate(halves)))


def preconditioner(name, A):
    if name == "vpbjacobi":
        A.setVariableBlockSizes(np.full(A.getSize()[0] // 3, 3, dtype=PETSc.IntType))
    options = {
        "pc_gamg_coarse_eq_limit": 8,
        "mg_levels_pc_type": "jacobi",
        "redundant_pc_type": "jacobi",
    }
    database = PETSc.Options(PREFIX)
    for option, value in options.items():
        database[option] = value
    pc = PETSc.PC().create(SELF)
    pc.setOptionsPrefix(PREFIX)
    pc.setType(name)
    pc.setOperators(A)
    prepare(pc, name, A.getSize()[0])
    pc.setFromOptions()
    pc.setUp()
    for option in options:
        database.delValue(option)
    return pc


def applied(pc, b):
    z = b.duplicate()
    pc.apply(b, z)
    return z


def around(pc, name="preonly", iterations=1):
    """A KSP of a preconditioner, which keeps it from being let go of, too."""
    ksp = PETSc.KSP().create(SELF)
    ksp.setOperators(*pc.getOperators())
    ksp.setType(name)
    ksp.setPC(pc)
    ksp.setTolerances(rtol=1e-30, atol=0, divtol=1e300, max_it=iterations)
    return ksp


@pytest.mark.parametrize("name", TRIED_ALONE)
def test_what_inverts_and_what_becomes_of_it_where_the_operator_is_singular(name):
    A, facts = diffusion(), pc_facts(name)
    b, rest = vector(A, 1), vector(A, 1)
    A.mult(applied(preconditioner(name, A), b), rest)
    assert (difference(rest, b) < 1e-10) == facts.inverts
    if facts.inverts:
        A, b, least = without_solution()
        A.mult(applied(preconditioner(name, A), b), rest := b.copy())
        is_least = abs((rest - b).norm() - least) < 1e-10 * least
        assert is_least == facts.is_pseudo_inverse != facts.factorises


@pytest.mark.parametrize("name", TRIED_ALONE)
def test_what_is_transposed_only_where_symmetry_is_known(name):
    refuses = {}
    for is_known in (True, False):
        A = diffusion()
        if is_known:
            A.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        ksp = around(preconditioner(name, A), "gmres", 2)
        try:
            solved(ksp, vector(A, 1), transposed=True)
            refuses[is_known] = False
        except PETSc.Error:
            refuses[is_known] = True
    assert (refuses == {True: False, False: True}) == pc_facts(name).needs_symmetry_to_transpose


@pytest.mark.parametrize("name", TRIED_ALONE)
def test_what_remembers_values(name):
    A, other = diffusion(), diffusion(seed=5)
    b = vector(A, 1)
    fresh = applied(preconditioner(name, diffusion(seed=5)), b)
    pc = preconditioner(name, A)
    applied(pc, b)
    A.setValuesCSR(*other.getValuesCSR())
    A.assemble()
    pc.setOperators(A)
    pc.setUp()
    remembers = not applied(pc, b).equal(fresh)
    if (name, "remembers_values") not in CAUTIOUS:
        assert remembers == pc_facts(name).remembers_values
    if pc_facts(name).is_self_contained:
        A.setValuesCSR(*diffusion().getValuesCSR())
        A.assemble()
        pc.reset()
        pc.setOperators(A)
        pc.setUp()
        assert applied(pc, b).equal(applied(preconditioner(name, diffusion()), b))


@pytest.mark.parametrize("name", TRIED_PC)
def test_what_remembers_earlier_solves_with_it(name):
    A = diffusion()
    ksp = around(preconditioner(name, A), "gmres", 3)
    b = vector(A, 1)
    c = vector(A, 2)
    x = vector(A, 3)
    ksp.solve(b, x)
    first = x.copy()
    for other in (c, b):
        ksp.solve(other, x)
    if (name, "remembers_solves") not in CAUTIOUS:
        assert (not x.equal(first)) == pc_facts(name).remembers_solves


@pytest.mark.parametrize("name", TRIED_PC)
def test_what_does_richardsons_iterations_itself(name):
    pc, exists = preconditioner(name, diffusion()), ctypes.c_int(0)
    _LIBRARY.PCApplyRichardsonExists(ctypes.c_void_p(pc.handle), ctypes.byref(exists))
    assert bool(exists.value) == pc_facts(name).does_own_richardson


@pytest.mark.parametrize("name", TRIED_ALONE)
def test_what_changes_the_system_for_the_time_of_a_solve(name):
    A = diffusion()
    pc, scale = preconditioner(name, A), 0.3
    b = vector(A, 1)
    r = vector(A, 1)
    x = vector(A, 1)
    x.zeroEntries()
    for _ in range(2):
        A.mult(x, r)
        r.aypx(-1.0, b)
        x.axpy(scale, applied(pc, r))
    ksp = around(pc, "richardson", 2)
    _LIBRARY.KSPRichardsonSetScale(ctypes.c_void_p(ksp.handle), ctypes.c_double(scale))
    assert (difference(solved(ksp, b), x) > 1e-10) == pc_facts(name).changes_system


@pytest.mark.parametrize("name", TRIED_PC)
def test_what_is_made_of_levels(name):
    assert (preconditioner(name, diffusion()).getMGLevels() > 0) == pc_facts(name).is_multigrid


@pytest.mark.parametrize("name", TRIED_PC)
def test_what_is_inside_is_found_and_where_nothing_can_be_there_is_none(name):
    pc, facts = preconditioner(name, diffusion()), pc_facts(name)
    ksp, text = around(pc), described(pc)
    shown = text.count("KSP Object") + text.count("PC Object") - 1
    found = len(all_inside(ksp)) - 1 + len(list(all_preconditioners(ksp))) - 1
    assert not (facts.is_self_contained and shown)
    assert (found > 0) == (facts.nests or facts.is_multigrid)
    if facts.nests:
        assert found == shown


# SNES

SNES_UNTRIED = {
    "aspin": "it is for distributed meshes",
    "nasm": "it is for distributed meshes",
    "newtonal": "it is for loads that grow",
    "ngs": "it is for coloured operators",
    "patch": "it is for meshes",
    "python": "its author decides",
    "shell": "its author decides",
}
TRIED_SNES = tried(PETSc.SNES, SNES_TYPES, SNES_UNTRIED)


class Cubic:
    """K x + x³ = f, with an unsymmetric K."""

    def __init__(self, f):
        self.f, size = f, len(f)
        self.K = 2.4 * np.eye(size) - np.eye(size, k=1) - 0.6 * np.eye(size, k=-1)

    def residual(self, x):
        return self.K @ x + x**3 - self.f

    def jacobian(self, x):
        return matrix_of(self.K + np.diag(3 * x**2))

    def solver(self, name, steps, lower=None):
        A = matrix_of(self.K)
        snes = PETSc.SNES().create(SELF)
        snes.setFunction(lambda _, x, F: F.setArray(self.residual(x.array_r)), A.createVecLeft())

        def jacobian(_, x, J, P):
            P.setValuesCSR(*self.jacobian(x.array_r).getValuesCSR())
            P.assemble()

        snes.setJacobian(jacobian, A)
        snes.setType(name)
        snes.setOptionsPrefix(PREFIX)
        database = PETSc.Options(PREFIX)
        database["snes_composite_sneses"] = "newtonls,nrichardson"
        database["snes_linesearch_type"] = "basic"
        if lower is not None:
            bounds = A.createVecs()
            bounds[0].set(lower)
            bounds[1].set(1e20)
            snes.setVariableBounds(*bounds)
        snes.setFromOptions()
        for option in ("snes_composite_sneses", "snes_linesearch_type"):
            database.delValue(option)
        snes.setTolerances(rtol=1e-12, atol=0, stol=0, max_it=steps)
        snes.getKSP().setTolerances(rtol=1e-1)
        return snes, A.createVecRight()


VALUES = np.linspace(0.5, 1, 12)


@pytest.mark.parametrize("name", TRIED_SNES)
def test_what_makes_its_steps_by_linear_solves(name):
    snes, x = Cubic(VALUES).solver(name, 3)
    snes.solve(None, x)
    assert (snes.getLinearSolveIterations() > 0) == snes_facts(name).solves_linear_systems


@pytest.mark.parametrize("name", TRIED_SNES)
@pytest.mark.parametrize(
    "between", [np.cos(np.arange(12)), np.full(12, np.nan), VALUES], ids=["other", "nan", "same"]
)
def test_which_nonlinear_solves_depend_on_earlier_ones(name, between):
    if snes_facts(name).is_for_inequalities:
        pytest.skip("it is refused, and some crash with NaN")
    remembers = False
    for steps in (2, 5):
        problem = Cubic(VALUES)
        snes, x = problem.solver(name, steps)
        snes.solve(None, x)
        first = x.copy()
        problem.f = between
        x.set(0.1)
        snes.solve(None, x)
        problem.f = VALUES
        x.zeroEntries()
        snes.solve(None, x)
        remembers = remembers or not x.equal(first)
    assert remembers == snes_facts(name).remembers_solves


@pytest.mark.parametrize("name", TRIED_SNES)
def test_which_steps_are_what_the_ksp_gives(name):
    problem = Cubic(VALUES)
    snes, x = problem.solver(name, 1)
    x.set(0.2)
    start = x.copy()
    snes.solve(None, x)
    ksp, F = PETSc.KSP().create(SELF), x.duplicate()
    F.setArray(problem.residual(start.array_r))
    ksp.setOperators(problem.jacobian(start.array_r))
    ksp.setTolerances(rtol=1e-1)
    is_step = difference(start - x, solved(ksp, F)) < 1e-12
    if snes_facts(name).is_for_inequalities:
        assert is_step  # where no inequality is active
    else:
        assert is_step == snes_facts(name).steps_along_solution


@pytest.mark.parametrize("name", TRIED_SNES)
def test_which_solutions_heed_inequalities(name):
    snes, x = Cubic(VALUES).solver(name, 30, lower=0.6)
    try:
        snes.solve(None, x)
        heeds = x.min()[1] >= 0.6
    except PETSc.Error:  # as it says itself
        heeds = False
    assert heeds == snes_facts(name).is_for_inequalities
