"""A warning tells of operators that make nothing of constants, where nobody has said so."""

import warnings

import pytest
from firedrake import *
from problems import smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations

pytestmark = pytest.mark.parallel([1, 2])

CG = {"ksp_type": "cg", "pc_type": "jacobi"}
GMRES = {"ksp_type": "gmres", "pc_type": "bjacobi"}
MINRES = {"ksp_type": "minres", "pc_type": "none"}
NESTED = {"ksp_type": "preonly", "pc_type": "ksp", "ksp_ksp_type": "cg", "ksp_pc_type": "jacobi"}
MATRIX_FREE = {"ksp_type": "cg", "pc_type": "none", "mat_type": "matfree"}


def heat(more=lambda w, v: 0, degree=1, bcs=lambda V: ()):
    V = FunctionSpace(UnitSquareMesh(4, 4), "CG", degree)
    w, v = TrialFunction(V), TestFunction(V)
    return inner(grad(w), grad(v)) * dx + more(w, v), smooth(V, 1) * v * dx, bcs(V)


def discontinuous(ends=lambda w, v, n: 0):
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "DG", 1)
    w, v, n = TrialFunction(V), TestFunction(V), FacetNormal(mesh)
    a = inner(grad(w), grad(v)) * dx + 40 * inner(jump(w, n), jump(v, n)) * dS
    a -= (inner(avg(grad(w)), jump(v, n)) + inner(jump(w, n), avg(grad(v)))) * dS
    return a + ends(w, v, n), v * dx, ()


def flow(walls):
    mesh = UnitSquareMesh(3, 3)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    (w, p), (v, q) = TrialFunctions(W), TestFunctions(W)
    a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w)) * dx
    return a, v[0] * dx, DirichletBC(W.sub(0), 0, walls)


def body(bcs):
    V = VectorFunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    return inner(sym(grad(w)), sym(grad(v))) * dx, v[0] * dx, bcs(V)


def mixed_heat(is_insulated):
    mesh = UnitSquareMesh(3, 3)
    W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    (s, w), (t, v) = TrialFunctions(W), TestFunctions(W)
    bcs = DirichletBC(W.sub(0), as_vector((0, 0)), "on_boundary") if is_insulated else ()
    return (inner(s, t) + div(t) * w + div(s) * v) * dx, v * dx, bcs


def with_a_mean():
    mesh = UnitSquareMesh(3, 3)
    W = FunctionSpace(mesh, "CG", 1) * FunctionSpace(mesh, "R", 0)
    (w, r), (v, q) = TrialFunctions(W), TestFunctions(W)
    return (inner(grad(w), grad(v)) + r * v + q * w) * dx, v * dx, ()


SINGULAR = {
    "cg": (heat, CG),
    "gmres": (heat, GMRES),
    "minres": (heat, MINRES),
    "high degree": (lambda: heat(degree=7), CG),
    "nested": (heat, NESTED),
    "matrix-free": (heat, MATRIX_FREE),
    "wind without divergence": (lambda: heat(lambda w, v: w.dx(0) * v * dx), GMRES),
    "discontinuous": (discontinuous, CG),
    "closed flow": (lambda: flow("on_boundary"), MINRES),
    "body that nothing holds": (lambda: body(lambda V: ()), CG),
    "body that slides": (lambda: body(lambda V: DirichletBC(V.sub(0), 0, 1)), CG),
    "insulated": (lambda: mixed_heat(True), MINRES),
}
DETERMINED = {
    "mass": (lambda: heat(lambda w, v: w * v * dx), CG),
    "little mass": (lambda: heat(lambda w, v: 1e-9 * w * v * dx), CG),
    "boundary values": (lambda: heat(bcs=lambda V: DirichletBC(V, 1, 1)), CG),
    "at one end by a flux": (lambda: heat(lambda w, v: w * v * ds(1)), CG),
    "waves": (lambda: heat(lambda w, v: -9 * w * v * dx), MINRES),
    "nested": (lambda: heat(bcs=lambda V: DirichletBC(V, 0, 1)), NESTED),
    "matrix-free": (lambda: heat(bcs=lambda V: DirichletBC(V, 0, 1)), MATRIX_FREE),
    "discontinuous": (lambda: discontinuous(lambda w, v, n: 40 * w * v * ds), CG),
    "open flow": (lambda: flow((1, 2, 3)), MINRES),
    "body that is held": (lambda: body(lambda V: DirichletBC(V, 0, 1)), CG),
    "mixed": (lambda: mixed_heat(False), MINRES),
    "given mean": (with_a_mean, {**MINRES, "mat_type": "nest"}),
}


def warnings_of(*calls) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls:
            call()
    return [str(one.message) for one in caught if one.category is RuntimeWarning]


def linear_solver(make, parameters, **spaces):
    a, L, bcs = make()
    space = a.arguments()[0].function_space()
    return prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(a, L, Function(space, name="heat"), bcs=bcs),
        solver_parameters=parameters,
        refinement=FixedRefinement(Iterations(3)),
        **spaces,
    )


@pytest.mark.parametrize("name", SINGULAR)
def test_an_operator_that_is_singular_is_told_of_once(name):
    make, parameters = SINGULAR[name]
    solver = linear_solver(make, parameters)
    found = warnings_of(solver.solve, solver.solve)
    assert len(found) == (COMM_WORLD.rank == 0)
    for message in found:
        assert (
            "solve for 'heat' is singular: " in message and "give the solver nullspace=" in message
        )


@pytest.mark.parametrize("name", DETERMINED)
def test_there_are_no_false_alarms(name):
    make, parameters = DETERMINED[name]
    solver = linear_solver(make, parameters)
    assert not warnings_of(solver.solve)


def test_the_null_space_of_the_transpose_is_not_enough():
    space = VectorSpaceBasis(constant=True, comm=COMM_WORLD)
    solver = linear_solver(heat, GMRES, transpose_nullspace=space)
    assert len(warnings_of(solver.solve)) == (COMM_WORLD.rank == 0)
    solver = linear_solver(heat, GMRES, nullspace=space, transpose_nullspace=space)
    assert not warnings_of(solver.solve)


@pytest.mark.parametrize("is_singular", [True, False])
def test_steps_of_newton(is_singular):
    """Where the state is zero the Jacobian of the other problem is singular, too."""
    V = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
    u, v = Function(V, name="heat"), TestFunction(V)
    x, _ = SpatialCoordinate(V.mesh())
    F = inner(grad(u), grad(v)) * dx - (x - 0.5) * v * dx
    if not is_singular:
        F += u**3 * v * dx
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(F, u), solver_parameters=GMRES
    )
    found = warnings_of(solver.solve)
    assert len(found) == (is_singular and COMM_WORLD.rank == 0)
