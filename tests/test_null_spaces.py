"""Singular operators of which the user names the null space, as the forward solve asks for it,
against pseudo-inverses.
"""

import warnings

import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from firedrake.exceptions import ConvergenceError
from problems import dense, whole

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps, Tolerance
from prdp_fem.torch import SolverLayer

pytestmark = pytest.mark.parallel([1, 2])


class Singular:
    """A problem with a source and a coefficient, its matrices, and what is on the range of its
    operator.
    """

    def __init__(self, V, a, f, k, basis):
        self.V = V
        self.a = a
        self.source = f
        self.k = k
        self.basis = basis
        self.u = Function(V, name="u")
        w = TrialFunction(V)
        v = TestFunction(V)
        self.L = inner(f, v) * dx
        self.A, self.mass = dense(a), dense(inner(w, v) * dx)
        self.inverse = np.linalg.pinv(self.A, rcond=1e-10)
        self.on_range = self.A @ self.inverse
        self.random = np.random.default_rng(1)
        self.source.dat.data_wo[:] = self.own(self.compatible()).reshape(f.dat.data_ro.shape)

    def compatible(self) -> np.ndarray:
        """Whole dofs of a source for which there is a solution."""
        return np.linalg.solve(
            self.mass, self.on_range @ self.mass @ self.random.standard_normal(len(self.A))
        )

    def own(self, values: np.ndarray) -> np.ndarray:
        """The part of whole dofs that this rank has."""
        with self.u.dat.vec_ro as vector:
            return values[slice(*vector.getOwnershipRange())]

    def solver(self, parameters, nonlinear=False, **options):
        setting = Tolerance(1e-12, max_it=5000)
        if nonlinear:
            problem = NonlinearVariationalProblem(action(self.a, self.u) - self.L, self.u)
            return prdp_fem.NonlinearVariationalSolver(
                problem,
                nullspace=self.basis,
                refinement=FixedRefinement(NewtonSteps(2, setting)),
                warm_start=False,
                solver_parameters=parameters,
                **options,
            )
        return prdp_fem.LinearVariationalSolver(
            LinearVariationalProblem(self.a, self.L, self.u),
            nullspace=self.basis,
            refinement=FixedRefinement(setting),
            solver_parameters=parameters,
            **options,
        )


def neumann(skew: float = 0.0) -> Singular:
    mesh = UnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    f = Function(V, name="source")
    k = Function(V, name="k").interpolate(1 + SpatialCoordinate(mesh)[0])
    a = k * inner(grad(w), grad(v)) * dx + (skew * w.dx(0) * v * dx if skew else 0)
    return Singular(V, a, f, k, VectorSpaceBasis(constant=True, comm=mesh.comm))


def floating() -> Singular:
    """An elastic body that nothing holds, with its rigid motions."""
    mesh = UnitSquareMesh(4, 4)
    V = VectorFunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    f = Function(V, name="load")
    k = Function(FunctionSpace(mesh, "CG", 1), name="k").assign(1.3)
    x, y = SpatialCoordinate(mesh)
    basis = VectorSpaceBasis(
        [Function(V).interpolate(as_vector(mode)) for mode in ((1, 0), (0, 1), (-y, x))]
    )
    basis.orthonormalize()
    return Singular(
        V, (k * inner(sym(grad(w)), sym(grad(v))) + k * div(w) * div(v)) * dx, f, k, basis
    )


METHODS = {
    "cg": {"ksp_type": "cg", "pc_type": "jacobi"},
    "gmres": {"ksp_type": "gmres", "pc_type": "jacobi", "ksp_gmres_restart": 100},
    "minres": {"ksp_type": "minres", "pc_type": "jacobi"},
    "without a transpose": {"ksp_type": "gmres", "pc_type": "sor", "ksp_gmres_restart": 100},
    "gamg": {"ksp_type": "cg", "pc_type": "gamg"},
}


@pytest.mark.parametrize("make", [neumann, floating])
@pytest.mark.parametrize(
    "method, how",
    [*((method, "implicit") for method in METHODS), ("cg", "unrolled"), ("gmres", "unrolled")],
)
@pytest.mark.parametrize("nonlinear", [False, True])
def test_the_null_space_of_a_symmetric_operator_is_that_of_its_transpose(
    make, method, how, nonlinear
):
    singular = make()
    layer = SolverLayer(
        singular.solver(METHODS[method], nonlinear, differentiation=how),
        [singular.source, singular.k],
    )
    x, k = (
        torch.from_numpy(control.dat.data_ro.flatten()).requires_grad_()
        for control in (singular.source, singular.k)
    )
    cotangent = singular.random.standard_normal(len(singular.A))
    by_source, by_k = torch.autograd.grad(
        layer(x, k), (x, k), torch.from_numpy(singular.own(cotangent).copy())
    )
    multiplier = cotangent @ singular.inverse
    direction = singular.compatible()
    exact = multiplier @ singular.mass @ direction
    assert abs(whole(by_source.numpy()) @ direction - exact) < 1e-7 * abs(exact)
    if how == "implicit":  # unrolled, also by what no source with a solution has
        np.testing.assert_allclose(
            whole(by_source.numpy()), multiplier @ singular.mass, rtol=1e-7, atol=1e-8
        )
    toward = Function(singular.k.function_space()).interpolate(
        SpatialCoordinate(singular.V.mesh())[1]
    )
    solution = singular.inverse @ singular.mass @ whole(x.detach().numpy())
    exact = -multiplier @ dense(derivative(singular.a, singular.k, toward)) @ solution
    assert abs(whole(by_k.numpy()) @ whole(toward.dat.data_ro) - exact) < 1e-6 * abs(exact)


@pytest.mark.parametrize("method", ["gmres", "fgmres", "bcgs"])
@pytest.mark.parametrize("is_transposed_named", [False, True])
def test_preconditioned_from_the_right(method, is_transposed_named):
    """PETSc leaves a part of the null space in the solution then, which depends on the source."""
    singular = neumann()
    parameters = {"ksp_type": method, "pc_type": "jacobi", "ksp_pc_side": "right"}
    more = {"transpose_nullspace": singular.basis} if is_transposed_named else {}
    layer = SolverLayer(singular.solver(parameters, **more), [singular.source])
    x = torch.from_numpy(singular.source.dat.data_ro.copy()).requires_grad_()
    cotangent = singular.random.standard_normal(len(singular.A))
    solution = layer(x)
    exact = singular.inverse @ singular.mass @ whole(x.detach().numpy())
    np.testing.assert_allclose(whole(solution.detach().numpy()), exact, atol=1e-8)
    (gradient,) = torch.autograd.grad(solution, x, torch.from_numpy(singular.own(cotangent).copy()))
    exact = cotangent @ singular.inverse @ singular.mass
    np.testing.assert_allclose(whole(gradient.numpy()), exact, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("method", ["cg", "gmres"])
def test_derivatives_on_the_tape_have_the_null_space(method):
    singular = neumann()
    singular.solver(METHODS[method]).solve()
    reduced = ReducedFunctional(
        assemble(singular.u**4 * dx), [Control(singular.source), Control(singular.k)]
    )
    direction = Function(singular.V)
    direction.dat.data_wo[:] = singular.own(singular.compatible())
    at = [singular.source.copy(deepcopy=True), singular.k.copy(deepcopy=True)]
    with stop_annotating():
        toward = Function(singular.V).interpolate(SpatialCoordinate(singular.V.mesh())[1])
        rates = taylor_to_dict(reduced, at, [direction, toward])
    assert (
        min(rates["R0"]["Rate"]) > 0.9
        and min(rates["R1"]["Rate"]) > 1.9
        and min(rates["R2"]["Rate"]) > 2.9
    )


@pytest.mark.parametrize("nonlinear", [False, True])
def test_the_pressure_of_a_closed_flow(nonlinear):
    mesh = UnitSquareMesh(3, 3)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    u = Function(W, name="flow")
    (w, p) = TrialFunctions(W)
    (v, q) = TestFunctions(W)
    force = Function(VectorFunctionSpace(mesh, "CG", 1), name="force")
    x, y = SpatialCoordinate(mesh)
    force.interpolate(as_vector([sin(3 * y), x * y]))
    options = {
        "nullspace": MixedVectorSpaceBasis(
            W, [W.sub(0), VectorSpaceBasis(constant=True, comm=mesh.comm)]
        ),
        "solver_parameters": {
            "mat_type": "aij",
            "ksp_type": "minres",
            "pc_type": "none",
            "snes_atol": 1e-12,
            "snes_rtol": 1e-12,
        },
    }
    condition, setting = DirichletBC(W.sub(0), 0, "on_boundary"), Tolerance(1e-12, max_it=5000)
    if nonlinear:
        velocity, pressure = split(u)
        F = (
            (1 + inner(velocity, velocity)) * inner(grad(velocity), grad(v))
            - pressure * div(v)
            - q * div(velocity)
            - inner(force, v)
        ) * dx
        solver = prdp_fem.NonlinearVariationalSolver(
            NonlinearVariationalProblem(F, u, bcs=condition),
            warm_start=False,
            refinement=FixedRefinement(NewtonSteps(6, setting)),
            **options,
        )
    else:
        a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w)) * dx
        solver = prdp_fem.LinearVariationalSolver(
            LinearVariationalProblem(a, inner(force, v) * dx, u, bcs=condition),
            refinement=FixedRefinement(setting),
            **options,
        )
    layer = SolverLayer(solver, [force])
    at = torch.from_numpy(force.dat.data_ro.flatten())
    toward = torch.cos(3 * at)
    x = at.clone().requires_grad_()
    out = layer(x)
    cotangent = torch.sin(torch.arange(len(out), dtype=torch.float64))
    (gradient,) = torch.autograd.grad(out, x, cotangent)
    above, below = ((layer(at + sign * 1e-3 * toward) * cotangent).sum().item() for sign in (1, -1))
    difference = COMM_WORLD.allreduce(above - below) / 2e-3
    assert abs(COMM_WORLD.allreduce((gradient * toward).sum().item()) - difference) < 1e-5 * abs(
        difference
    )


def test_of_an_operator_that_is_not_symmetric_the_transposed_one_is_asked_for():
    singular = neumann(skew=3.0)
    layer = SolverLayer(
        singular.solver(
            {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_richardson_scale": 0.1}
        ),
        [singular.source],
    )
    layer.solver.refinement = FixedRefinement(Tolerance(1e-9, max_it=3))
    with pytest.raises(ConvergenceError, match="give the solver transpose_nullspace=, too"):
        layer(torch.from_numpy(singular.source.dat.data_ro.copy()))
    layer = SolverLayer(singular.solver(METHODS["gmres"]), [singular.source])
    x = torch.from_numpy(singular.source.dat.data_ro.copy()).requires_grad_()
    cotangent, direction = singular.random.standard_normal(len(singular.A)), singular.compatible()
    (gradient,) = torch.autograd.grad(layer(x), x, torch.from_numpy(singular.own(cotangent).copy()))
    exact = cotangent @ singular.inverse @ singular.mass @ direction
    assert abs(whole(gradient.numpy()) @ direction - exact) < 1e-7 * abs(exact)


# Right-hand sides that have no solution


def with_any_source(skew: float) -> Singular:
    singular = neumann(skew)
    singular.source.dat.data_wo[:] = singular.own(singular.random.standard_normal(len(singular.A)))
    return singular


def gradient_by_k(solver, singular: Singular) -> tuple[float, np.ndarray, Function]:
    """The derivative of (c, u) in a direction of k, with c and the direction."""
    toward = Function(singular.V).interpolate(SpatialCoordinate(singular.V.mesh())[1] ** 2)
    cotangent = singular.random.standard_normal(len(singular.A))
    k = torch.from_numpy(singular.k.dat.data_ro.copy()).requires_grad_()
    out = SolverLayer(solver, [singular.k])(k)
    (gradient,) = torch.autograd.grad(out, k, torch.from_numpy(singular.own(cotangent).copy()))
    return whole(gradient.numpy()) @ whole(toward.dat.data_ro), cotangent, toward


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("method", ["gmres", "without a transpose"])
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_without_a_solution_there_is_no_derivative_by_the_operator(skew, method, nonlinear):
    """The KSP takes what its null space holds of the residual for nothing, and has converged."""

    def refinement(setting, steps=1):
        return FixedRefinement(NewtonSteps(steps, setting) if nonlinear else setting)

    singular = with_any_source(skew)
    solver = singular.solver(METHODS[method], nonlinear)
    solver.refinement = refinement(Tolerance(1e-12, max_it=5000))
    finding = r"'u' is to be .*residual is [1-9]\.[0-9]e-01 times .* transpose_nullspace=, too"
    with pytest.raises(ConvergenceError, match=finding):
        gradient_by_k(solver, singular)
    solver.refinement = refinement(Iterations(30))
    with pytest.raises(ConvergenceError, match="transpose_nullspace=, too"):
        gradient_by_k(solver, singular)
    # A budget leaves more in sight than out of it, and so does what has a solution.
    solver.refinement = refinement(Iterations(2))
    gradient_by_k(solver, singular)
    singular = neumann(skew)
    for setting in (Tolerance(1e-12, max_it=5000), Tolerance(1e-2, max_it=5000), Iterations(5)):
        solver = singular.solver(METHODS[method], nonlinear)
        solver.refinement = refinement(setting, steps=2)
        gradient_by_k(solver, singular)


def test_the_null_space_of_the_transpose_makes_a_right_hand_side_one_with_a_solution():
    """A wind without divergence leaves constants in the null space of the transpose, too."""
    mesh = PeriodicUnitSquareMesh(5, 5)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    f = Function(V, name="source")
    k = Function(V, name="k").interpolate(1.5 + sin(2 * pi * SpatialCoordinate(mesh)[0]))
    constants = VectorSpaceBasis(constant=True, comm=mesh.comm)
    singular = Singular(V, (k * inner(grad(w), grad(v)) + 3 * w.dx(0) * v) * dx, f, k, constants)
    f.dat.data_wo[:] = singular.own(singular.random.standard_normal(len(singular.A)))
    solver = singular.solver(METHODS["gmres"], transpose_nullspace=constants)
    found, cotangent, toward = gradient_by_k(solver, singular)

    def solution(step):
        with stop_annotating():
            A = dense(replace(singular.a, {k: Function(V).assign(k + step * toward)}))
        return np.linalg.pinv(A, rcond=1e-10) @ singular.mass @ whole(f.dat.data_ro)

    exact = cotangent @ (solution(1e-5) - solution(-1e-5)) / 2e-5
    assert abs(found - exact) < 1e-6 * abs(exact)


LEAST_SQUARES = {
    "lsqr": {"ksp_type": "lsqr", "pc_type": "none"},
    "cgls": {"ksp_type": "cgls", "pc_type": "none"},
    "svd": {"ksp_type": "preonly", "pc_type": "svd"},
}


@pytest.mark.parallel(1)
@pytest.mark.parametrize("method", LEAST_SQUARES)
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_least_squares(skew, method):
    """The solution is A⁺ b, its derivative by b is A⁺, and that by A has a residual's term."""
    singular = with_any_source(skew)
    solver = prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(singular.a, singular.L, singular.u),
        solver_parameters={**LEAST_SQUARES[method], "ksp_rtol": 1e-12, "ksp_max_it": 5000},
    )
    solver.solve()
    source = whole(singular.source.dat.data_ro)
    expected = singular.inverse @ singular.mass @ source
    np.testing.assert_allclose(whole(singular.u.dat.data_ro), expected, rtol=1e-6, atol=1e-8)
    cotangent = singular.random.standard_normal(len(singular.A))
    x = torch.from_numpy(singular.source.dat.data_ro.copy()).requires_grad_()
    out = SolverLayer(solver, [singular.source])(x)
    (gradient,) = torch.autograd.grad(out, x, torch.from_numpy(singular.own(cotangent).copy()))
    expected = cotangent @ singular.inverse @ singular.mass
    np.testing.assert_allclose(whole(gradient.numpy()), expected, rtol=1e-6, atol=1e-8)
    ksp_type = LEAST_SQUARES[method]["ksp_type"]
    with pytest.raises(ConvergenceError, match=f"the least that ksp_type {ksp_type} .*nullspace="):
        gradient_by_k(solver, singular)
    # Of a right-hand side with a solution there is one, and no word of it.
    singular.source.dat.data_wo[:] = singular.own(singular.compatible())
    if skew == 0:
        found, cotangent, toward = gradient_by_k(solver, singular)
        u = singular.inverse @ singular.mass @ whole(singular.source.dat.data_ro)
        exact = (
            -cotangent @ singular.inverse @ dense(derivative(singular.a, singular.k, toward)) @ u
        )
        assert abs(found - exact) < 1e-6 * abs(exact)


# Null spaces that are none

WRONG = {
    "the same with a reaction": lambda a, w, v: a + w * v * dx,
    "with a boundary term": lambda a, w, v: a + 0.1 * w * v * ds,
}


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("term", WRONG)
def test_a_null_space_that_is_none(term, nonlinear):
    singular = neumann()
    singular.a = WRONG[term](singular.a, TrialFunction(singular.V), TestFunction(singular.V))
    with pytest.raises(ConvergenceError, match="the nullspace= of .* does not hold .* A v = 0"):
        singular.solver(METHODS["gmres"], nonlinear).solve()


@pytest.mark.parametrize("mat_type", ["aij", "matfree"])
def test_a_null_space_of_the_transpose_that_is_none(mat_type):
    """Constants are in the null space of the operator, but what is in the other is none."""
    singular = neumann(skew=3.0)
    parameters = {"ksp_type": "gmres", "pc_type": "none", "mat_type": mat_type}
    finding = "the transpose_nullspace= of the solver for 'u' does not hold .* Aᵀ v = 0"
    with pytest.raises(ConvergenceError, match=finding):
        singular.solver(parameters, transpose_nullspace=singular.basis).solve()
    left = Function(singular.V)
    left.dat.data_wo[:] = singular.own(np.linalg.svd(singular.A)[0][:, -1])
    basis = VectorSpaceBasis([left], comm=COMM_WORLD)
    solver = singular.solver(parameters, transpose_nullspace=basis)
    singular.source.dat.data_wo[:] = singular.own(singular.random.standard_normal(len(singular.A)))
    expected = singular.inverse @ singular.mass @ whole(singular.source.dat.data_ro)
    np.testing.assert_allclose(whole(solver.solve().dat.data_ro), expected, rtol=1e-6, atol=1e-8)


def test_an_operator_without_values_as_yet_is_looked_at_later():
    singular = neumann()
    singular.a = singular.a + singular.k * TrialFunction(singular.V) * TestFunction(singular.V) * dx
    singular.k.assign(0)
    solver = singular.solver(
        {
            "ksp_type": "preonly",
            "pc_type": "bjacobi",
            "sub_ksp_type": "gmres",
            "sub_pc_type": "jacobi",
        }
    )
    with pytest.raises(ConvergenceError, match="'u'"):
        solver.solve()
    singular.k.assign(1)
    with pytest.raises(ConvergenceError, match="the nullspace= of .* does not hold"):
        solver.solve()


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e11])
def test_null_spaces_that_are_ones_are_no_word_worth(scale):
    """Whatever the size of an operator is; rigid motions in a space of quadratic functions, too."""
    mesh = UnitDiskMesh(1)
    V = VectorFunctionSpace(mesh, "CG", 2)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="body")
    x, y = SpatialCoordinate(mesh)
    modes = (1, 0), (0, 1), (-y, x)
    basis = VectorSpaceBasis([Function(V).interpolate(as_vector(mode)) for mode in modes])
    basis.orthonormalize()
    a = scale * (inner(sym(grad(w)), sym(grad(v))) + div(w) * div(v)) * dx
    problem = LinearVariationalProblem(a, inner(as_vector([x, 0]), v) * dx, u)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        prdp_fem.LinearVariationalSolver(
            problem,
            nullspace=basis,
            transpose_nullspace=basis,
            refinement=FixedRefinement(Iterations(3)),
            solver_parameters=METHODS["gmres"],
        ).solve()


def test_a_null_space_that_is_not_quite_one_is_warned_of():
    singular = neumann()
    singular.a = (
        singular.a + Constant(1e-4) * TrialFunction(singular.V) * TestFunction(singular.V) * dx
    )
    solver = singular.solver(METHODS["gmres"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            solver.solve()
    said = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert len(said) == (COMM_WORLD.rank == 0)
    assert all("does not quite hold a null space" in text for text in said)


# Factorisations, whose last pivot is what rounding errors make of zero


def symmetric_stokes() -> tuple:
    mesh = UnitSquareMesh(6, 6)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    (w, p), (v, q) = TrialFunctions(W), TestFunctions(W)
    x, y = SpatialCoordinate(mesh)
    a = (2 * inner(sym(grad(w)), sym(grad(v))) - p * div(v) - q * div(w)) * dx
    return W, a, inner(as_vector([y, x**2]), v) * dx, [DirichletBC(W.sub(0), 0, "on_boundary")]


def closed_darcy(permeability: float) -> tuple:
    mesh = UnitSquareMesh(6, 6)
    W = FunctionSpace(mesh, "RT", 1) * FunctionSpace(mesh, "DG", 0)
    (w, p), (v, q) = TrialFunctions(W), TestFunctions(W)
    source = cos(pi * SpatialCoordinate(mesh)[0])
    a = (inner(w, v) / permeability - p * div(v) - q * div(w)) * dx
    return W, a, -source * q * dx, [DirichletBC(W.sub(0), as_vector([0, 0]), "on_boundary")]


CLOSED = {
    "stokes": symmetric_stokes,
    "darcy 1e4": lambda: closed_darcy(1e4),
    "darcy 1e8": lambda: closed_darcy(1e8),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_factorisation_divides_by_no_rounding_error(name):
    """Solutions had 10¹⁵ times their size of a constant pressure, and no digit without it."""
    W, a, L, bcs = CLOSED[name]()
    u = Function(W, name="flow")
    space = MixedVectorSpaceBasis(W, [W.sub(0), VectorSpaceBasis(constant=True, comm=COMM_WORLD)])
    A = dense(a, bcs)
    constant, b = Function(W), assemble(L, bcs=bcs)
    constant.sub(1).assign(1)

    def dofs(f):
        with f.dat.vec_ro as vector:
            return whole(vector.array_r.copy())

    # By blocks of one size: a pseudo-inverse knows singular values by their sizes.
    pressures = dofs(constant) > 0
    null = pressures / np.sqrt(pressures.sum())
    sizes = abs(A.diagonal())
    sizes[pressures] = 1 / sizes[~pressures].max()
    scale = 1 / np.sqrt(sizes)
    scaled = np.linalg.pinv(scale[:, None] * A * scale, rcond=1e-12)

    def solved(rhs):
        x = scale * (scaled @ (scale * (rhs - null * (null @ rhs))))
        return x - null * (null @ x)

    problem = LinearVariationalProblem(a, L, u, bcs=bcs)
    prdp_fem.LinearVariationalSolver(problem, nullspace=space, transpose_nullspace=space).solve()
    expected = solved(dofs(b))
    for part in (pressures, ~pressures):
        error = np.linalg.norm((dofs(u) - expected)[part])
        assert error < 1e-9 * np.linalg.norm(expected[part])
