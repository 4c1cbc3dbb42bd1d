"""What is inside the preconditioner of a stock solver stays when it comes under control, and so
does what was set by hand.
"""

import numpy as np
import pytest
from firedrake import *
from firedrake.adjoint import *
from problems import CG, GMRES, equality, smooth, whole

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps

# On one rank: each solver has a mesh of its own, which several would not share alike.

LU = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


def nested(outer, **options):
    """Options with one prefix in front of all."""
    return {f"{outer}_{name}": value for name, value in options.items()}


def python(name, **options):
    return {"pc_type": "python", "pc_python_type": f"firedrake.{name}", **options}


def levels(*, finest="mg_levels", coarsest="mg_coarse", **options):
    return {**nested(finest, ksp_max_it=2, **options), **nested(coarsest, **LU)}


RICHARDSON = {"ksp_type": "richardson", "ksp_richardson_scale": 0.5}
CHEBYSHEV = {"ksp_type": "chebyshev", "pc_type": "jacobi"}
BLOCKS = {"pc_type": "bjacobi", "pc_bjacobi_blocks": 6, "sub_pc_type": "cholesky"}
FEW = {"ksp_max_it": 3, "ksp_convergence_test": "skip"}
ASSEMBLED_LU = {"ksp_type": "preonly", **python("AssembledPC"), **nested("assembled", **LU)}

SCALAR = {
    "jacobi": CG,
    "bjacobi": {"ksp_type": "cg", **BLOCKS},
    "bjacobi, iterative": {"ksp_type": "fgmres", **BLOCKS, **nested("sub", **CG, **FEW)},
    "asm": {
        "ksp_type": "gmres",
        "pc_type": "asm",
        "pc_asm_overlap": 2,
        **nested("sub", pc_type="lu"),
    },
    "gasm": {"ksp_type": "gmres", "pc_type": "gasm", **nested("sub", pc_type="lu")},
    "ksp": {"ksp_type": "fgmres", "pc_type": "ksp", **nested("ksp", **CG, **FEW)},
    "ksp in ksp": {
        "ksp_type": "fgmres",
        "pc_type": "ksp",
        **nested("ksp", ksp_type="preonly", pc_type="ksp", **nested("ksp", **CG, **FEW)),
    },
    "composite": {
        "ksp_type": "gmres",
        "pc_type": "composite",
        "pc_composite_type": "multiplicative",
        "pc_composite_pcs": "bjacobi,jacobi",
        **nested("sub_0", **BLOCKS),
    },
    "composite, ksp": {
        "ksp_type": "fgmres",
        "pc_type": "composite",
        "pc_composite_pcs": "ksp,jacobi",
        **nested("sub_0_ksp", **CG, **FEW),
    },
    "redundant": {"ksp_type": "gmres", "pc_type": "redundant", "redundant_pc_type": "cholesky"},
    "gamg": {
        "ksp_type": "cg",
        "pc_type": "gamg",
        "pc_gamg_coarse_eq_limit": 10,
        **levels(**RICHARDSON, pc_type="jacobi"),
    },
    "gamg, chebyshev": {
        "ksp_type": "cg",
        "pc_type": "gamg",
        "pc_gamg_coarse_eq_limit": 10,
        **levels(**CHEBYSHEV),
    },
    "mg": {"ksp_type": "cg", "pc_type": "mg", **levels(**RICHARDSON, pc_type="jacobi")},
    "mg, matfree": {
        "mat_type": "matfree",
        "ksp_type": "cg",
        "pc_type": "mg",
        **nested("mg_levels", ksp_max_it=2, **CHEBYSHEV),
        **nested("mg_coarse", **ASSEMBLED_LU),
    },
    "mg, star": {
        "ksp_type": "cg",
        "pc_type": "mg",
        **levels(**RICHARDSON, **python("ASMStarPC", pc_star_construct_dim=0)),
    },
    "mg, patch": {
        "mat_type": "matfree",
        "ksp_type": "cg",
        "pc_type": "mg",
        **nested("mg_coarse", **ASSEMBLED_LU),
        **nested(
            "mg_levels",
            ksp_max_it=2,
            **RICHARDSON,
            **python("PatchPC"),
            **nested(
                "patch",
                pc_patch_construct_type="star",
                pc_patch_construct_dim=0,
                pc_patch_save_operators=True,
                pc_patch_sub_mat_type="seqdense",
                sub_ksp_type="preonly",
                sub_pc_type="lu",
            ),
        ),
    },
    "AssembledPC": {
        "mat_type": "matfree",
        "ksp_type": "cg",
        **python("AssembledPC"),
        **nested("assembled", **BLOCKS),
    },
    "mg in AssembledPC": {
        "ksp_type": "fgmres",
        **python("AssembledPC"),
        **nested("assembled", pc_type="mg", **levels(**RICHARDSON, pc_type="jacobi")),
    },
    "PMGPC": {
        "ksp_type": "cg",
        **python("PMGPC"),
        **nested("pmg", mg_coarse_degree=1, **levels(**RICHARDSON, pc_type="jacobi")),
    },
    "P1PC": {
        "mat_type": "matfree",
        "ksp_type": "cg",
        **python("P1PC"),
        **nested("pmg", mg_coarse_mat_type="aij", **levels(**CHEBYSHEV)),
    },
}
FIELDSPLIT = {"ksp_type": "fgmres", "pc_type": "fieldsplit"}
SCHUR = {
    **FIELDSPLIT,
    "pc_fieldsplit_type": "schur",
    "pc_fieldsplit_schur_fact_type": "lower",
    **nested("fieldsplit_0", **LU),
}
MATFREE_SCHUR = {**SCHUR, "mat_type": "matfree", **nested("fieldsplit_0", **ASSEMBLED_LU)}
MIXED = {
    "additive": {
        **FIELDSPLIT,
        "pc_fieldsplit_type": "additive",
        **nested("fieldsplit_0", **LU),
        **nested("fieldsplit_1", ksp_type="preonly", pc_type="jacobi"),
    },
    "multiplicative": {
        **FIELDSPLIT,
        "pc_fieldsplit_type": "multiplicative",
        **nested("fieldsplit_0", **BLOCKS, ksp_type="preonly"),
        **nested("fieldsplit_1", **CG, **FEW),
    },
    "schur": {**SCHUR, **nested("fieldsplit_1", ksp_type="gmres", pc_type="none", ksp_rtol=1e-3)},
    "schur, nest": {
        **SCHUR,
        "mat_type": "nest",
        **nested("fieldsplit_0", **BLOCKS),
        **nested("fieldsplit_1", **GMRES, **FEW),
    },
    "schur, selfp": {
        **SCHUR,
        "pc_fieldsplit_schur_precondition": "selfp",
        **nested("fieldsplit_1", **BLOCKS, ksp_type="preonly"),
    },
    "MassInvPC": {
        **MATFREE_SCHUR,
        **nested("fieldsplit_1", ksp_type="preonly", **python("MassInvPC", Mp_pc_type="lu")),
    },
    "PCDPC": {
        **MATFREE_SCHUR,
        **FEW,
        **nested(
            "fieldsplit_1",
            ksp_type="preonly",
            **python(
                "PCDPC",
                Fp_mat_type="matfree",
                **nested("pcd", Mp_pc_type="lu", **nested("Kp", **CG, **FEW)),
            ),
        ),
    },
    "mg in fieldsplit": {
        **FIELDSPLIT,
        "pc_fieldsplit_type": "multiplicative",
        **nested("fieldsplit_0", ksp_type="preonly", pc_type="mg", **levels(**CHEBYSHEV)),
        **nested("fieldsplit_1", ksp_type="preonly", pc_type="jacobi"),
    },
}
ROWS = {**SCALAR, **MIXED}
# LinearSolver has no forms that coarser meshes and orders could have theirs from.
WITHOUT_LINEAR_SOLVER = {name for name in ROWS if "mg" in name and "gamg" not in name} | {
    "PMGPC",
    "P1PC",
    "PCDPC",
}


class Diffusion:
    """A reaction with diffusion, of order two on the finer mesh of two."""

    appctx: dict = {}

    def __init__(self):
        mesh = MeshHierarchy(UnitSquareMesh(4, 4), 1)[-1]
        V = FunctionSpace(mesh, "CG", 2)
        self.u = Function(V)
        w = TrialFunction(V)
        v = TestFunction(V)
        f = smooth(V, 1)
        self.kappa = Function(FunctionSpace(mesh, "CG", 1)).interpolate(
            1 + SpatialCoordinate(mesh)[0]
        )
        self.a, self.L = self.kappa * inner(grad(w), grad(v)) * dx + w * v * dx, f * v * dx
        self.F = ((self.kappa + self.u**2) * inner(grad(self.u), grad(v)) + self.u * v - f * v) * dx
        self.bcs = [DirichletBC(V, 0.3, "on_boundary")]


class Flow:
    """Taylor-Hood elements in a cavity, a little compressible, so that no pressure is left
    undetermined.
    """

    appctx = {"Re": 1.0, "velocity_space": 0}

    def __init__(self):
        mesh = MeshHierarchy(UnitSquareMesh(3, 3), 1)[-1]
        V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
        W = V * Q
        (w, p) = TrialFunctions(W)
        (v, q) = TestFunctions(W)
        self.u = Function(W)
        f, self.kappa = smooth(V, 1), Constant(0.7)
        self.a = (
            self.kappa * inner(grad(w), grad(v)) - p * div(v) - q * div(w) - 0.01 * p * q
        ) * dx
        self.L = inner(f, v) * dx
        w, p = split(self.u)
        self.F = (
            self.kappa * (1 + inner(w, w)) * inner(grad(w), grad(v))
            - p * div(v)
            - q * div(w)
            - 0.01 * p * q
            - inner(f, v)
        ) * dx
        self.bcs = [
            DirichletBC(W.sub(0), 0, (1, 2, 3)),
            DirichletBC(W.sub(0), Constant((1.0, 0.0)), 4),
        ]


SETTING = Iterations(3, rtol_floor=0)


class Solves:
    """Solves by one solver, however it came about.

    Parameters
    ----------
    name : str
        Of a row.
    kind : str
        ``"linear"``, ``"nonlinear"`` or ``"assembled"``.
    """

    def __init__(self, name, kind, parameters=None):
        self.problem, self.kind = (Flow if name in MIXED else Diffusion)(), kind
        self.options = {
            "solver_parameters": dict(ROWS[name] if parameters is None else parameters),
            "appctx": dict(self.problem.appctx),
        }
        problem = self.problem
        self.stated = (
            NonlinearVariationalProblem(problem.F, problem.u, bcs=problem.bcs)
            if kind == "nonlinear"
            else LinearVariationalProblem(problem.a, problem.L, problem.u, bcs=problem.bcs)
        )
        self.solver_type = (
            "NonlinearVariationalSolver" if kind == "nonlinear" else "LinearVariationalSolver"
        )
        self.setting = NewtonSteps(2, SETTING) if kind == "nonlinear" else SETTING

    def constructed(self, **options):
        make = getattr(prdp_fem, self.solver_type)
        self.solver = make(
            self.stated,
            refinement=FixedRefinement(self.setting),
            ksp_prefix="",
            **self.options,
            **options,
        )
        return self

    def stock(self, **options):
        if self.kind == "assembled":
            problem, mat_type = self.problem, self.options["solver_parameters"].get("mat_type")
            self.solver = LinearSolver(
                assemble(problem.a, bcs=problem.bcs, mat_type=mat_type), **self.options, **options
            )
            self.b = assemble(problem.L)
        else:
            self.solver = {
                "NonlinearVariationalSolver": NonlinearVariationalSolver,
                "LinearVariationalSolver": LinearVariationalSolver,
            }[self.solver_type](self.stated, **self.options, **options)
        return self

    def controlled(self, setting=None, ksp_prefix=""):
        prdp_fem.control(
            self.solver, FixedRefinement(setting or self.setting), ksp_prefix=ksp_prefix
        )
        return self

    def solve(self):
        u = self.problem.u
        u.assign(0)
        if isinstance(self.solver, LinearSolver):
            self.solver.solve(u, self.b)
        else:
            self.solver.solve()
        return self

    @property
    def solution(self):
        with self.problem.u.dat.vec_ro as vector:
            return vector.array_r.copy()

    def outcomes(self):
        """Solutions, and iterations, of two solves, the second of them with another operator where
        that can be.
        """
        found = []
        for _ in range(2):
            self.solve()
            found.append((self.solution, self.solver.statistics.forward_iterations))
            if self.kind != "assembled":
                self.problem.kappa.assign(2 * self.problem.kappa)
        return found


@pytest.fixture(autouse=True)
def no_tape():
    with stop_annotating():
        yield


# Rows that are tried as all kinds of solvers.
KINDS = {
    "bjacobi",
    "asm",
    "ksp in ksp",
    "gamg, chebyshev",
    "mg, matfree",
    "AssembledPC",
    "schur",
    "composite, ksp",
    "mg, star",
    "PMGPC",
    "multiplicative",
    "schur, nest",
    "MassInvPC",
    "mg in fieldsplit",
}
EACH = (
    [(name, "linear") for name in ROWS]
    + [(name, "nonlinear") for name in ROWS if name in KINDS]
    + [(name, "assembled") for name in ROWS if name in KINDS - WITHOUT_LINEAR_SOLVER]
)
TABLE = [pytest.param(name, kind, id=f"{name}-{kind}") for name, kind in EACH]


@pytest.mark.parametrize("name, kind", TABLE)
def test_iterates_are_those_of_the_constructor(name, kind):
    equal = equality(ROWS[name])
    expected = Solves(name, kind).constructed().outcomes()
    for is_solved, prefix in ((False, {}), (True, {}), (False, {"options_prefix": "named"})):
        solves = Solves(name, kind).stock(**prefix)
        if is_solved:
            solves.solve()
        for (found, count), (wanted, wanted_count) in zip(solves.controlled().outcomes(), expected):
            assert count == wanted_count
            if kind == "assembled":
                # The right-hand side is assembled otherwise.
                assert np.linalg.norm(whole(found - wanted)) <= 1e-12 * np.linalg.norm(
                    whole(wanted)
                )
                break
            assert equal(found, wanted)


@pytest.mark.parametrize("name", ["mg, star", "schur, nest", "PMGPC", "asm"])
@pytest.mark.parametrize("is_solved", [False, True])
def test_a_solver_that_is_refused_solves_on_as_it_did(name, is_solved):
    parameters = {**ROWS[name], "ksp_rtol": 1e-8}
    expected = Solves(name, "linear", parameters).stock().solve()
    solves = Solves(name, "linear", parameters).stock()
    if is_solved:
        solves.solve()
    with pytest.raises(ValueError, match="no iterative KSP with the options prefix 'nowhere_'"):
        solves.controlled(ksp_prefix="nowhere_")
    assert not isinstance(solves.solver, prdp_fem.LinearVariationalSolver)
    solves.solve()
    assert (
        solves.solver.snes.ksp.getIterationNumber() == expected.solver.snes.ksp.getIterationNumber()
    )
    assert equality(parameters)(solves.solution, expected.solution)
    wanted = Solves(name, "linear", parameters).constructed().solve().solution
    assert equality(parameters)(solves.controlled().solve().solution, wanted)


def test_options_are_those_that_the_solver_was_made_with():
    options = PETSc.Options()
    options["here_sub_pc_type"] = "lu"
    blocks = {"ksp_type": "gmres", "pc_type": "bjacobi", "pc_bjacobi_blocks": 6}
    solves = Solves("bjacobi", "linear", blocks).stock(options_prefix="here")
    options.delValue("here_sub_pc_type")
    wanted = (
        Solves("bjacobi", "linear", {**blocks, "sub_pc_type": "lu"}).constructed().solve().solution
    )
    np.testing.assert_array_equal(solves.controlled().solve().solution, wanted)


class Injections(TransferManager):
    """Counts what is brought to finer meshes."""

    count = 0

    def prolong(self, *arguments, **options):
        type(self).count += 1
        super().prolong(*arguments, **options)


@pytest.mark.parametrize("is_solved", [False, True])
def test_transfers_between_meshes_are_those_that_were_chosen(is_solved):
    solves = Solves("mg", "linear").stock()
    solves.solver.set_transfer_manager(Injections())
    if is_solved:
        solves.solve()
    solves.controlled()
    Injections.count = 0
    solves.solve()
    assert Injections.count > 0


# What was set by hand


@pytest.mark.parametrize("kind", ["linear", "nonlinear"])
@pytest.mark.parametrize("when", ["before", "after", "in between"])
def test_what_was_set_on_the_ksp_by_hand_stays(kind, when):
    by_hand = {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_rtol": 1e-3}
    solves = Solves("jacobi", kind, LU).stock()
    if when == "after":
        solves.solve()
    ksp = solves.solver.snes.getKSP()
    ksp.setType("gmres")
    ksp.getPC().setType("jacobi")
    ksp.setTolerances(rtol=1e-3)
    if when == "in between":
        solves.solve()
    wanted = Solves("jacobi", kind, by_hand).constructed()
    assert np.array_equal(solves.controlled().solve().solution, wanted.solve().solution)
    assert solves.solver.snes.getKSP().handle == ksp.handle
    counts = []
    for one in (solves, wanted):
        one.solver.refinement = None
        one.solver.statistics.reset()
        one.solve()
        counts.append(one.solver.statistics.forward_iterations)
    assert counts[0] == counts[1]


class Diagonal:
    """A preconditioner in Python, which is of no more use once PETSc has let go of it."""

    def setUp(self, pc):
        self.diagonal = pc.getOperators()[1].getDiagonal()

    def apply(self, pc, x, y):
        y.pointwiseDivide(x, self.diagonal)

    def destroy(self, pc):
        del self.diagonal


@pytest.mark.parametrize("is_solved", [False, True])
def test_a_preconditioner_in_python_that_was_set_by_hand_stays(is_solved):
    solves = Solves("jacobi", "linear", {"ksp_type": "cg", "pc_type": "bjacobi"}).stock()
    pc = solves.solver.snes.getKSP().getPC()
    pc.setType("python")
    pc.setPythonContext(Diagonal())
    if is_solved:
        solves.solve()
    found = solves.controlled().outcomes()
    wanted = Solves("jacobi", "linear").constructed().outcomes()
    for (one, count), (other, wanted_count) in zip(found, wanted):
        assert count == wanted_count and np.linalg.norm(
            whole(one - other)
        ) <= 1e-13 * np.linalg.norm(whole(other))


def test_parts_that_were_made_by_hand_stay_or_are_refused():
    def by_hand():
        solves = Solves(
            "jacobi",
            "linear",
            {"ksp_type": "gmres", "ksp_rtol": 1e-8, "pc_type": "jacobi", "sub_pc_type": "lu"},
        ).stock()
        solves.solver.snes.getKSP().getPC().setType("bjacobi")
        return solves

    wanted = (
        Solves(
            "bjacobi", "linear", {"ksp_type": "gmres", "pc_type": "bjacobi", "sub_pc_type": "lu"}
        )
        .constructed()
        .solve()
        .solution
    )
    np.testing.assert_array_equal(by_hand().controlled().solve().solution, wanted)
    solves = by_hand().solve()
    count = solves.solver.snes.getKSP().getIterationNumber()
    with pytest.raises(
        ValueError, match="pc_type bjacobi was set by hand.*under control before it solves"
    ):
        solves.controlled()
    solves.solve()
    assert solves.solver.snes.getKSP().getIterationNumber() == count


def block(solver, number=1):
    return solver.snes.getKSP().getPC().getFieldSplitSubKSP()[number]


@pytest.mark.parametrize(
    "name, change, message",
    [
        (
            "additive",
            lambda solver: block(solver).setType("cg"),
            r"fieldsplit_1_ksp_type cg \(options say preonly\)",
        ),
        (
            "additive",
            lambda solver: block(solver).getPC().setType("none"),
            r"fieldsplit_1_pc_type none \(options say jacobi\)",
        ),
        (
            "multiplicative",
            lambda solver: block(solver).setTolerances(max_it=4),
            r"fieldsplit_1_ksp_max_it 4 \(options say 3\)",
        ),
        (
            "mg in fieldsplit",
            lambda solver: block(solver, 0).getPC().getMGSmoother(1).setType("cg"),
            r"fieldsplit_0_mg_levels_1_ksp_type cg \(options say chebyshev\)",
        ),
    ],
)
def test_what_was_changed_inside_by_hand_is_refused_where_it_would_be_lost(name, change, message):
    solves = Solves(name, "linear").stock().solve()
    change(solves.solver)
    expected = solves.solve().solution
    with pytest.raises(ValueError, match=f"{message} was set by hand.*have solver_parameters say"):
        solves.controlled()
    np.testing.assert_array_equal(solves.solve().solution, expected)


@pytest.mark.parametrize("inside", ["", "npc_"])
def test_solvers_on_coarser_meshes_that_have_solved_are_refused(inside):
    parameters = {"ksp_type": "cg", "pc_type": "jacobi", f"{inside}snes_type": "fas"}
    with pytest.raises(ValueError, match="put a solver under control before it solves"):
        Solves("jacobi", "nonlinear", parameters).stock().solve().controlled(NewtonSteps(2))
    assert Solves("jacobi", "nonlinear", parameters).stock().controlled(NewtonSteps(2)).solve()


def test_settings_by_hand_outlive_operators_that_change():
    solves = Solves("gamg", "linear").stock()
    ksp = solves.solver.snes.getKSP()
    ksp.setType("gmres")
    wanted = (
        Solves("gamg", "linear", {**ROWS["gamg"], "ksp_type": "gmres"}).constructed().outcomes()
    )
    for (one, _), (other, _) in zip(solves.controlled().outcomes(), wanted):
        assert equality(ROWS["gamg"])(one, other)
    assert ksp.getType() == "gmres"
