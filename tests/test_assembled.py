"""Solvers of assembled systems under control: which matrix they solve with, and what of it is
differentiated.
"""

import numpy as np
import pytest
from firedrake import *
from firedrake.adjoint import *
from problems import CG, CONVERGED, GMRES, HeatStep, whole

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, ScheduledRefinement

pytestmark = pytest.mark.parallel([1, 2])


def controlled(matrix, refinement=None, parameters=CG, **options):
    solver = LinearSolver(matrix, solver_parameters={**parameters, **CONVERGED}, **options)
    return prdp_fem.control(solver, refinement)


def scale(coefficient, factor):
    with stop_annotating():
        coefficient.assign(
            coefficient * factor
            if isinstance(coefficient, Function)
            else float(coefficient) * factor
        )


def solution(problem) -> Function:
    """What Firedrake solves with a factorisation, with the present values."""
    with stop_annotating():
        found = Function(problem.V)
        solve(problem.a == problem.L, found, bcs=problem.bcs)
        return found


@pytest.mark.parametrize("mat_type", ["aij", "matfree"])
@pytest.mark.parametrize("boundary", [0, 1.5, None])
def test_a_matrix_that_is_assembled_again_is_solved_with(boundary, mat_type):
    problem = HeatStep(boundary=boundary)
    A = assemble(problem.a, bcs=problem.bcs, mat_type=mat_type)
    parameters = CG if mat_type == "aij" else {**CG, "pc_type": "none"}
    solver, x = controlled(A, parameters=parameters), Function(problem.V)
    for factor in (1.0, 3.0, 0.5):
        scale(problem.kappa, factor)
        scale(problem.dt, factor)
        assemble(problem.a, bcs=problem.bcs, mat_type=mat_type, tensor=A)
        for _ in range(2):
            solver.solve(x, assemble(problem.L))
            assert errornorm(solution(problem), x) < 1e-10
            scale(problem.source, 2.0)


def test_truncated_solves_are_those_of_the_constructor():
    problem = HeatStep()
    A, x = assemble(problem.a, bcs=problem.bcs), Function(problem.V)
    refinement = ScheduledRefinement(prdp_fem.IterationLadder(2, 3), {1: 1})
    solver = prdp_fem.control(LinearSolver(A, solver_parameters=CG), refinement)
    other = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=CG, refinement=refinement
    )
    for count in (2, 5):
        scale(problem.kappa, 2.0)
        assemble(problem.a, bcs=problem.bcs, tensor=A)
        solver.statistics.reset()
        solver.solve(x, assemble(problem.L))
        other.solve()
        assert solver.statistics.forward_iterations == count
        assert errornorm(problem.u, x) < 1e-14
        refinement.step(1.0)


def test_until_then_the_matrix_has_the_values_that_it_was_assembled_with():
    problem = HeatStep()
    A, x = assemble(problem.a, bcs=problem.bcs), Function(problem.V)
    solver = controlled(A)
    expected = solution(problem)
    b = assemble(problem.L)
    scale(problem.kappa, 2.0)
    for _ in range(2):
        solver.solve(x, b)
        assert errornorm(expected, x) < 1e-10
    assemble(problem.a, bcs=problem.bcs, tensor=A)
    scale(problem.kappa, 2.0)
    with pytest.raises(ValueError, match="have changed since it was assembled"):
        solver.solve(x, b)
    assert errornorm(expected, x) < 1e-10
    assemble(problem.a, bcs=problem.bcs, tensor=A)
    solver.solve(x, b)
    assert errornorm(solution(problem), x) < 1e-10


def test_a_matrix_to_precondition_with_may_lag_behind():
    problem = HeatStep()
    A, P = assemble(problem.a, bcs=problem.bcs), assemble(problem.a, bcs=problem.bcs)
    exact = {"ksp_type": "gmres", "pc_type": "bjacobi", "sub_pc_type": "lu"}
    solver = prdp_fem.control(
        LinearSolver(A, P=P, solver_parameters={**exact, "ksp_rtol": 1e-11}), None
    )
    x, counts = Function(problem.V), []
    with stop_annotating():
        problem.kappa.interpolate(1 + 30 * SpatialCoordinate(problem.mesh)[0] ** 2)
        assemble(problem.a, bcs=problem.bcs, tensor=A)
    for assembles in (False, True):
        if assembles:
            assemble(problem.a, bcs=problem.bcs, tensor=P)
        solver.solve(x, assemble(problem.L))
        assert errornorm(solution(problem), x) < 1e-9
        counts.append(solver.ksp.getIterationNumber())
    assert counts[1] < counts[0] and (counts[1] == 1 or COMM_WORLD.size > 1)


CHANGES = {
    "entries": lambda A, problem: A.petscmat.scale(2.0),
    "another form": lambda A, problem: assemble(2 * problem.a, bcs=problem.bcs, tensor=A),
    "other conditions": lambda A, problem: assemble(
        problem.a, bcs=DirichletBC(problem.V, 0, 1), tensor=A
    ),
    "no conditions": lambda A, problem: assemble(problem.a, tensor=A),
    "the mesh": lambda A, problem: problem.mesh.coordinates.assign(2 * problem.mesh.coordinates),
}


@pytest.mark.parallel(1)
@pytest.mark.parametrize("change", CHANGES)
def test_what_no_form_describes_is_refused(change):
    problem = HeatStep()
    A, x = assemble(problem.a, bcs=problem.bcs), Function(problem.V)
    solver = controlled(A)
    b = assemble(problem.L)
    expected = solution(problem)
    solver.solve(x, b)
    with stop_annotating():
        CHANGES[change](A, problem)
    for _ in range(2):
        with pytest.raises(
            ValueError,
            match="it is not what its form and boundary conditions give: assemble it again",
        ):
            solver.solve(x, b)
    with pytest.raises(ValueError, match="assemble it again"):
        controlled(A)
    if change != "the mesh":
        assert errornorm(expected, x) < 1e-10
    assemble(problem.a, bcs=problem.bcs, tensor=A)
    solver.solve(x, assemble(problem.L))
    assert errornorm(solution(problem), x) < 1e-10


@pytest.mark.parametrize("name", ["nullspace", "near_nullspace"])
def test_null_spaces_belong_to_the_solver(name):
    problem = HeatStep(boundary=None)
    w, v = TrialFunction(problem.V), TestFunction(problem.V)
    A = assemble(inner(grad(w), grad(v)) * dx)
    basis = VectorSpaceBasis(constant=True, comm=problem.mesh.comm)
    b, x = assemble((SpatialCoordinate(problem.mesh)[0] - 0.5) * v * dx), Function(problem.V)
    solver = controlled(A, parameters=GMRES, nullspace=basis)
    solver.solve(x, b)
    residual = assemble(inner(grad(x), grad(v)) * dx) - b
    assert max(abs(whole(assemble(residual).dat.data_ro))) < 1e-10
    other = assemble(inner(grad(w), grad(v)) * dx + w * v * dx)
    solver = controlled(other)
    put = other.petscmat.setNullSpace if name == "nullspace" else other.petscmat.setNearNullSpace
    put(PETSc.NullSpace().create(constant=True, comm=COMM_WORLD))
    with pytest.raises(ValueError, match=f"a null space .*LinearSolver\\(A, {name}="):
        solver.solve(x, b)
    with pytest.raises(ValueError, match=f"a null space .*LinearSolver\\(A, {name}="):
        controlled(other)


# On the tape


def loop_with(problem, kind, differentiation, setting):
    """A number that comes of three steps, in which the diffusivity moves on, too."""
    refinement = None if setting is None else FixedRefinement(setting)
    parameters = {**CG, **CONVERGED}
    options = {"refinement": refinement, "differentiation": differentiation}
    if kind == "assembled":
        A = assemble(problem.a, bcs=problem.bcs)
        solver = prdp_fem.control(LinearSolver(A, solver_parameters=parameters), **options)
    elif kind == "constructor":
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem, solver_parameters=parameters, **options
        )
    else:
        solver = LinearVariationalSolver(problem.problem, solver_parameters=parameters)
    for step in range(3):
        if step:
            problem.kappa.interpolate(problem.kappa * (1 + 0.2 * problem.u))
        if kind == "assembled":
            assemble(problem.a, bcs=problem.bcs, tensor=A)
            solver.solve(problem.u, assemble(problem.L))
        else:
            solver.solve()
        problem.u0.assign(problem.u)
    return assemble(problem.u**4 * dx)


@pytest.mark.parametrize(
    "setting, differentiation, oracle",
    [
        (None, "implicit", "stock"),
        (Iterations(4), "implicit", "constructor"),
        (Iterations(4), "unrolled", "constructor"),
    ],
)
@pytest.mark.parametrize("boundary", [0, 1.5])
def test_derivatives_are_taken_at_the_values_that_the_matrix_was_assembled_with(
    boundary, setting, differentiation, oracle
):
    mesh, found = UnitSquareMesh(5, 5), []
    for kind in ("assembled", oracle):
        with set_working_tape(Tape()):
            problem = HeatStep(mesh=mesh, boundary=boundary)
            controls = [Control(problem.u0), Control(problem.kappa), Control(problem.source)]
            starts = [control.control.copy(deepcopy=True) for control in controls]
            value = loop_with(problem, kind, differentiation, setting)
            reduced = ReducedFunctional(value, controls)
            with stop_annotating():
                values = [value]
                derivatives = reduced.derivative()
                for factor in (1.0, 1.4):
                    values.append(
                        reduced(
                            [
                                Function(start.function_space()).assign(factor * start)
                                for start in starts
                            ]
                        )
                    )
                    derivatives = [*derivatives, *reduced.derivative()]
                found.append(
                    (values, [whole(derivative.dat.data_ro) for derivative in derivatives])
                )
    np.testing.assert_allclose(*(values for values, _ in found), rtol=1e-9)
    for one, other in zip(found[0][1], found[1][1]):
        assert np.linalg.norm(other) > 0
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-9 * np.linalg.norm(other))


def test_a_constant_of_the_matrix_is_a_control():
    problem = HeatStep()
    control = Control(problem.dt)
    A, x = assemble(problem.a, bcs=problem.bcs), Function(problem.V)
    solver = controlled(A)
    solver.solve(x, assemble(problem.L))
    reduced = ReducedFunctional(assemble(x**4 * dx), control)
    with stop_annotating():
        assert taylor_test(reduced, Constant(0.07), Constant(0.05)) > 1.95


def test_a_matrix_that_was_assembled_before_is_a_constant():
    problem = HeatStep()
    A, x = assemble(problem.a, bcs=problem.bcs), Function(problem.V)
    solver, b = controlled(A), assemble(problem.L)
    scale(problem.kappa, 2.0)
    with set_working_tape(Tape()):
        problem.kappa.clear_block_variable()
        control = Control(problem.kappa)
        solver.solve(x, b)
        reduced = ReducedFunctional(assemble(x**2 * dx + problem.kappa * dx), control)
        with stop_annotating():
            gradient = reduced.derivative()
            expected = assemble(TestFunction(problem.V) * dx)
        np.testing.assert_allclose(
            whole(gradient.dat.data_ro), whole(expected.dat.data_ro), rtol=1e-12
        )


def test_each_tape_knows_where_the_matrix_comes_from():
    problem = HeatStep()
    A, x = assemble(problem.a, bcs=problem.bcs), Function(problem.V)
    with stop_annotating():
        solver = controlled(A)
    gradients = []
    for clears in (False, False, True):
        tape = get_working_tape() if clears else Tape()
        with set_working_tape(tape):
            if clears:
                tape.clear_tape()
            control = Control(problem.kappa)
            solver.solve(x, assemble(problem.L))
            reduced = ReducedFunctional(assemble(x**2 * dx), control)
            with stop_annotating():
                gradients.append(whole(reduced.derivative().dat.data_ro))
    assert np.linalg.norm(gradients[0]) > 0
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, gradients[0])
