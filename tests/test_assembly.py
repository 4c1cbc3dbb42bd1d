"""Operators assembled in coordinate format against Firedrake's own assembly."""

import time

import numpy as np
import pytest
from firedrake import *
from firedrake.assemble import get_assembler
from problems import HeatStep

import prdp_fem
from prdp_fem.problem.firedrake_internals import CoordinateAssembler


def diffusion(mesh):
    V = FunctionSpace(mesh, "CG", 2)
    w, v = TrialFunction(V), TestFunction(V)
    kappa = Function(V).interpolate(1 + SpatialCoordinate(mesh)[0])
    return (w * v + kappa * inner(grad(w), grad(v))) * dx, [DirichletBC(V, 0, 1)]


def boundary_terms(mesh):
    V = FunctionSpace(mesh, "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    return inner(grad(w), grad(v)) * dx + 3 * w * v * ds(1) + w.dx(0) * v * ds((2, 3)), [
        DirichletBC(V, 0, 4),
        DirichletBC(V, 1, (3, 4)),
    ]


def burgers(mesh):
    V = VectorFunctionSpace(mesh, "CG", 1)
    u, v = Function(V).interpolate(SpatialCoordinate(mesh)), TestFunction(V)
    return derivative((inner(dot(u, nabla_grad(u)), v) + inner(grad(u), grad(v))) * dx, u), [
        DirichletBC(V, 0, "on_boundary")
    ]


def one_component(mesh):
    form, (condition,) = burgers(mesh)
    return form, [DirichletBC(condition.function_space().sub(1), 0, 2)]


def interior_facets(mesh):
    V = VectorFunctionSpace(mesh, "DG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    n = FacetNormal(mesh)
    return (
        inner(grad(w), grad(v)) * dx
        - inner(avg(grad(w)), outer(v("+"), n("+")) + outer(v("-"), n("-"))) * dS
        + 10 * inner(jump(w), jump(v)) * dS
        + inner(w, v) * ds
    ), []


def stokes(mesh):
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    (u, p), (v, q) = TrialFunctions(W), TestFunctions(W)
    return (inner(grad(u), grad(v)) - p * div(v) - q * div(u)) * dx, [
        DirichletBC(W.sub(0), 0, (1, 2)),
        DirichletBC(W.sub(0).sub(1), 0, 3),
    ]


def subdomains(mesh):
    V = FunctionSpace(
        RelabeledMesh(
            mesh,
            [
                Function(FunctionSpace(mesh, "DG", 0)).interpolate(
                    conditional(SpatialCoordinate(mesh)[0] < 0.5, 1, 0)
                )
            ],
            [7],
        ),
        "CG",
        1,
    )
    w, v = TrialFunction(V), TestFunction(V)
    return inner(grad(w), grad(v)) * dx + w * v * dx(7), []


def difference(one, other) -> float:
    """The relative difference of two matrices."""
    rest = one.copy()
    rest.axpy(-1.0, other, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)
    return rest.norm() / other.norm()


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "case", [diffusion, boundary_terms, burgers, one_component, interior_facets, stokes, subdomains]
)
def test_equals_firedrakes(case):
    form, conditions = case(UnitSquareMesh(6, 5))
    assembler = get_assembler(form, bcs=conditions)
    matrix = assembler.allocate()
    assert CoordinateAssembler.serves(assembler, matrix)
    assemble_by_coordinates = CoordinateAssembler(assembler, matrix)
    assemble_by_coordinates(matrix)
    assert difference(matrix.petscmat, assemble(form, bcs=conditions).petscmat) < 1e-14
    before = matrix.petscmat.copy()
    for _ in range(5):
        assemble_by_coordinates(matrix)
        assert difference(matrix.petscmat, before) == 0.0


def assert_equals_firedrakes(form):
    assembler = get_assembler(form)
    matrix = assembler.allocate()
    CoordinateAssembler(assembler, matrix)(matrix)
    assert difference(matrix.petscmat, assemble(form).petscmat) < 1e-14


@pytest.mark.parallel([1, 3])
@pytest.mark.parametrize(
    "make_mesh",
    [
        lambda: UnitIntervalMesh(30),  # on three ranks one has no end
        lambda: UnitSquareMesh(1, 1),  # fewer cells than ranks
        lambda: PeriodicUnitSquareMesh(3, 3),
    ],
    ids=["no facets on a rank", "no cells on a rank", "no exterior facets"],
)
def test_where_there_is_nothing_to_integrate_over(make_mesh):
    V = FunctionSpace(make_mesh(), "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    assert_equals_firedrakes(w * v * dx + w * v * ds)


def test_meshes_without_interior_facets():
    V = FunctionSpace(UnitTriangleMesh(), "DG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    assert_equals_firedrakes(w * v * dx + avg(w) * avg(v) * dS)


@pytest.mark.parallel([1, 2])
def test_callbacks_may_change_the_pattern():
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    kappa = Constant(1.0)
    problem = LinearVariationalProblem(
        (w * v + kappa * inner(grad(w), grad(v))) * dx,
        exp(SpatialCoordinate(V.mesh())[0]) * v * dx,
        u,
    )

    def couple_far_dofs(_, J):
        extra = PETSc.Mat().createAIJ(J.getSizes(), comm=J.comm, nnz=2)
        for row in range(*J.getOwnershipRange()):
            extra.setValue(row, J.getSize()[0] - 1 - row, 0.01)
        extra.assemble()
        J.axpy(1.0, extra, structure=PETSc.Mat.Structure.DIFFERENT_NONZERO_PATTERN)

    parameters = {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_rtol": 1e-13, "ksp_max_it": 500}
    solver = prdp_fem.LinearVariationalSolver(
        problem, solver_parameters=parameters, post_jacobian_callback=couple_far_dofs
    )
    stock = LinearVariationalSolver(
        problem, solver_parameters=parameters, post_jacobian_callback=couple_far_dofs
    )
    for value in (1.0, 2.0, 3.0):
        kappa.assign(value)
        solver.solve()
        ours = u.copy(deepcopy=True)
        # where a stock solver starts matters, as its residual knows nothing of the callback
        u.assign(0)
        stock.solve()
        assert errornorm(ours, u) < 1e-10 * norm(u)


@pytest.mark.parallel([1, 3])
def test_rows_have_a_diagonal_for_factorisations():
    mesh = UnitSquareMesh(4, 4)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    (u, p), (v, q) = TrialFunctions(W), TestFunctions(W)
    form = (inner(grad(u), grad(v)) - p * div(v) - q * div(u)) * dx  # no pressure block
    assembler = get_assembler(form)
    matrix = assembler.allocate()
    CoordinateAssembler(assembler, matrix)(matrix)
    start, stop = matrix.petscmat.getOwnershipRange()
    assert all(row in matrix.petscmat.getRow(row)[0] for row in range(start, stop))


@pytest.mark.parametrize("mat_type", ["baij", "nest", "matfree"])
def test_other_matrices_are_left_to_firedrake(mat_type):
    W = VectorFunctionSpace(UnitSquareMesh(2, 2), "CG", 1)
    W = W * W if mat_type == "nest" else W
    assembler = get_assembler(inner(TrialFunction(W), TestFunction(W)) * dx, mat_type=mat_type)
    assert not CoordinateAssembler.serves(assembler, assembler.allocate())


def test_extruded_meshes_are_left_to_firedrake():
    V = FunctionSpace(ExtrudedMesh(UnitIntervalMesh(3), 2), "CG", 1)
    assembler = get_assembler(TrialFunction(V) * TestFunction(V) * dx)
    assert not CoordinateAssembler.serves(assembler, assembler.allocate())


@pytest.mark.parallel([1, 2, 3])
def test_what_is_assembled_again_gives_the_same_bits():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"}
    )
    solver.solve()
    first = problem.u.dat.data_ro.copy()
    for repetition in range(30):
        # ranks arrive in changing orders
        time.sleep(0.001 * ((problem.mesh.comm.rank + repetition) % problem.mesh.comm.size))
        solver.invalidate_jacobian()
        solver.solve()
        np.testing.assert_array_equal(problem.u.dat.data_ro, first)
