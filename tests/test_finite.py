"""NaN and infinity, and operators without an inverse, are errors that say where; and what comes
after them is as if nothing had been."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from firedrake.exceptions import ConvergenceError
from problems import CG, smooth
from problems import equality as equality_of_parts

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.ranks.finite import is_finite
from prdp_fem.torch import SolverLayer, to_torch
from prdp_fem.unrolled import UnrolledKSP

pytestmark = pytest.mark.parallel([1, 2])

MUMPS = {
    "ksp_type": "preonly",
    "pc_type": "lu",
    "pc_factor_mat_solver_type": "mumps",
    "mat_type": "aij",
}
CHEBYSHEV = {"ksp_type": "chebyshev", "ksp_chebyshev_eigenvalues": "0.1,2"}
METHODS = {
    "richardson sor": {"ksp_type": "richardson", "pc_type": "sor"},
    "richardson gamg": {"ksp_type": "richardson", "pc_type": "gamg"},
    "richardson none": {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_norm_type": "none"},
    "chebyshev none": {**CHEBYSHEV, "pc_type": "jacobi", "ksp_norm_type": "none"},
    "cg": CG,
    "cg none": {**CG, "ksp_norm_type": "none"},
    "gmres": {"ksp_type": "gmres", "pc_type": "jacobi"},
    "preonly": {"ksp_type": "preonly", "pc_type": "jacobi"},
}
UNROLLED = {
    "richardson": {"ksp_type": "richardson", "pc_type": "sor"},
    "self-scaled": {
        "ksp_type": "richardson",
        "pc_type": "jacobi",
        "ksp_richardson_self_scale": None,
    },
    "chebyshev": {**CHEBYSHEV, "pc_type": "jacobi"},
    "cg": CG,
    "gmres": {"ksp_type": "gmres", "pc_type": "pbjacobi"},
    "fgmres": {"ksp_type": "fgmres", "pc_type": "jacobi"},
    "bcgs": {"ksp_type": "bcgs", "pc_type": "none"},
}
IN_ALL_WAYS = [(name, "implicit") for name in METHODS] + [(name, "unrolled") for name in UNROLLED]


class Diffusion:
    """A problem with a source, a coefficient, a Constant and boundary values, all controls.

    The derivative by the Constant is infinite where that is zero.
    """

    def __init__(
        self,
        parameters,
        differentiation="implicit",
        *,
        nonlinear=False,
        setting=None,
        output=None,
        **options,
    ):
        mesh = UnitSquareMesh(4, 4)
        V = self.V = FunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        u = Function(V, name="heat")
        f, k, g = (smooth(V, seed, name) for seed, name in enumerate(("source", "k", "g")))
        c = Constant(1.0, name="c")
        self.u, self.controls = u, [f, k, c, g]
        bcs = DirichletBC(V, g, 1)
        if nonlinear:
            F = ((1 + u**2) * inner(grad(u), grad(v)) + (k + sqrt(c)) * u * v - f * v) * dx
            problem = NonlinearVariationalProblem(F, u, bcs=bcs)
        else:
            a = ((1 + sqrt(c)) * inner(grad(w), grad(v)) + k * w * v) * dx
            problem = LinearVariationalProblem(a, f * v * dx, u, bcs=bcs)
        kind = ("Nonlinear" if nonlinear else "Linear") + "VariationalSolver"
        if setting is None and parameters["ksp_type"] != "preonly":
            setting = Iterations(3)
        self.solver = getattr(prdp_fem, kind)(
            problem,
            solver_parameters=parameters,
            differentiation=differentiation,
            refinement=None if setting is None else FixedRefinement(setting),
            **options,
        )
        if self.solver.warm_start:
            self.controls.append(u)
        self.layer = SolverLayer(self.solver, self.controls, output)

    def tensors(self, *batch):
        """Positive ones, not the same for the samples."""
        generator, tensors = torch.Generator().manual_seed(1), []
        for control in self.controls:
            size = to_torch(control).numel()
            values = 1 + torch.rand(*batch, 1, generator=generator, dtype=torch.float64)
            tensors.append(values.repeat(*[1] * len(batch), size))
        return tensors

    def evaluate(self, tensors, cotangent=1.0):
        """The output and gradients."""
        tensors = [tensor.clone().requires_grad_() for tensor in tensors]
        y = self.layer(*tensors)
        if not isinstance(cotangent, torch.Tensor):
            cotangent = torch.full_like(y, cotangent)
        gradients = torch.autograd.grad(y, tensors, cotangent, allow_unused=True)
        # An implicit derivative by a guess is zero.
        return [y.detach(), *(gradient for gradient in gradients if gradient is not None)]


def equality(parameters):
    equal = equality_of_parts(parameters)
    return lambda one, other: equal(one.reshape(-1), other.reshape(-1))


def is_last() -> bool:
    return COMM_WORLD.rank == COMM_WORLD.size - 1


@pytest.mark.filterwarnings("error")
def test_numbers_are_told_from_others():
    for finite in ([0.0, -1.0], [1e200, -1e300], [], [5e-324], [1.7e308] * 3):
        assert is_finite(np.array([finite]))
    for other in (math.nan, math.inf, -math.inf):
        assert not is_finite(np.array([[1.0, other], [other, -other]]))
        assert not is_finite(np.array([[1e300, 0.0], [0.0, other]]))
    largest = float(np.finfo(np.float32).max)
    assert is_finite(np.array([[1e30, -largest]]), largest)
    assert not is_finite(np.array([[1e30, -1e39]]), largest)


@pytest.mark.parametrize("method, differentiation", IN_ALL_WAYS)
def test_a_number_that_enters(method, differentiation):
    """In each control of one sample, on one rank, and in the cotangent: also where that is at the
    boundary, as it is for the first half of dofs on one rank or other."""
    parameters = (METHODS if differentiation == "implicit" else UNROLLED)[method]
    case, equal = Diffusion(parameters, differentiation), equality(parameters)
    tensors = case.tensors(2, 3)
    expected = case.evaluate(tensors)

    def as_before():
        for one, other in zip(case.evaluate(tensors), expected, strict=True):
            assert equal(one, other)

    for place, control in enumerate(case.controls):
        for number in (math.nan, math.inf):
            given = [tensor.clone() for tensor in tensors]
            if is_last() or control.ufl_shape == () and isinstance(control, Constant):
                given[place][1, 2] = number
            with pytest.raises(ConvergenceError, match=r"sample \(1, 2\): .*'heat'.*look for"):
                case.layer(*given)
    as_before()
    cotangents = torch.ones_like(expected[0])
    for dof in (0, -1):
        cotangent = cotangents.clone()
        if is_last():
            cotangent[1, 0, dof] = math.nan if dof else math.inf
        with pytest.raises(ConvergenceError, match=r"sample \(1, 0\): the cotangent of 'heat'"):
            case.evaluate(tensors, cotangent)
    as_before()


@pytest.mark.parametrize(
    "method, differentiation",
    [("richardson sor", "implicit"), ("cg", "implicit"), ("cg", "unrolled"), ("gmres", "unrolled")],
)
@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_derivative_that_does_not_exist(method, differentiation, nonlinear):
    parameters = (METHODS if differentiation == "implicit" else UNROLLED)[method]
    case = Diffusion(
        parameters,
        differentiation,
        nonlinear=nonlinear,
        setting=NewtonSteps(1, Iterations(3)) if nonlinear else None,
    )
    tensors = case.tensors(3)
    expected = case.evaluate(tensors)
    at_zero = [tensor.clone() for tensor in tensors]
    at_zero[2][1] = 0.0
    assert case.layer(*at_zero).isfinite().all()
    with pytest.raises(ConvergenceError, match="sample 1: the derivative by 'c' of the solve for"):
        case.evaluate(at_zero)
    for one, other in zip(case.evaluate(tensors), expected, strict=True):
        assert equality(parameters)(one, other)
    # On the tape: forward and reverse.
    c = case.controls[2].assign(0.0)
    case.solver.solve()
    J = assemble(case.u**2 * dx)
    with pytest.raises(ConvergenceError, match="^the derivative by 'c' of the solve for 'heat'"):
        compute_gradient(J, Control(c))
    functional = ReducedFunctional(J, Control(c))
    with pytest.raises(ConvergenceError, match="^the tangent .* for 'heat'"):
        functional.tlm(Constant(1.0))


def test_second_derivatives():
    case = Diffusion({**CG, "ksp_rtol": 1e-12})
    case.solver.refinement = None
    f = case.controls[0]
    case.solver.solve()
    functional = ReducedFunctional(assemble(case.u**4 * dx), Control(f))
    functional.derivative()
    direction = Function(case.V).assign(1.0)
    assert np.isfinite(functional.hessian(direction).dat.data_ro).all()
    direction.dat.data[:] = math.nan
    with pytest.raises(ConvergenceError, match="'heat'"):
        functional.hessian(direction)


@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_numbers_that_are_too_large(differentiation):
    case = Diffusion(CG, differentiation)
    tensors = case.tensors(2)
    with pytest.raises(ConvergenceError, match="sample 0"):
        case.evaluate(tensors, 1e308)
    single = [tensor.float() for tensor in tensors]
    assert all(part.isfinite().all() for part in case.evaluate(single, 1e37))
    cotangent = torch.ones(2, case.layer.solver.system.size)
    cotangent[1] = 3.4e38
    single[2] = single[2] * 1e-4  # by which the derivative is larger
    with pytest.raises(ConvergenceError, match=r"sample 1: the derivative by .* above 3.4e\+38"):
        case.evaluate(single, cotangent)


@pytest.mark.parametrize("where", ["guess", "boundary"])
def test_where_a_solve_starts(where):
    """A guess, and boundary values at dofs that no equation has in it, on one rank."""
    case = Diffusion({**CG, "ksp_norm_type": "none"}, warm_start=where == "guess")
    tensors = case.tensors(2)
    expected = case.evaluate(tensors)
    given = [tensor.clone() for tensor in tensors]
    given[-1][1] = math.nan
    with pytest.raises(ConvergenceError, match="sample 1: .*'heat'"):
        case.layer(*given)
    for one, other in zip(case.evaluate(tensors), expected, strict=True):
        assert equality(CG)(one, other)
    g = case.controls[3].assign(0.0)
    values = g.dat.data_wo
    if is_last():
        values[:] = math.nan
    before = case.u.dat.data_ro.copy()
    with pytest.raises(ConvergenceError, match="^the forward solve for 'heat'"):
        case.solver.solve()
    np.testing.assert_array_equal(case.u.dat.data_ro, before)


def test_boundary_values_that_nobody_else_sees():
    mesh = UnitSquareMesh(1, 1)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="heat")
    g = Function(V)
    problem = LinearVariationalProblem(w * v * dx, v * dx, u, bcs=DirichletBC(V, g, "on_boundary"))
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters=CG)
    solver.solve()
    values = g.dat.data
    if is_last():
        values[:] = math.nan
    has_any = COMM_WORLD.allreduce(values.size if is_last() else 0)
    if has_any:
        with pytest.raises(ConvergenceError, match="'heat'"):
            solver.solve()


NEWTON = {
    "snes_type": "newtonls",
    "snes_linesearch_type": "basic",
    "pc_type": "jacobi",
    "ksp_type": "gmres",
}


@pytest.mark.parametrize(
    "parameters, setting",
    [
        (NEWTON, NewtonSteps(2, Iterations(3))),
        ({**NEWTON, "ksp_type": "richardson", "pc_type": "sor"}, NewtonSteps(1, Iterations(2))),
        ({**NEWTON, "snes_type": "ksponly", "ksp_norm_type": "none"}, Iterations(3)),
        ({**NEWTON, "snes_type": "nrichardson"}, NewtonSteps(2)),
    ],
    ids=["newton", "richardson", "ksponly", "nrichardson"],
)
@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_nonlinear_solves(parameters, setting, differentiation):
    if differentiation == "unrolled" and parameters["snes_type"] == "nrichardson":
        pytest.skip("it is not unrolled")
    case = Diffusion(parameters, differentiation, nonlinear=True, setting=setting)
    tensors = case.tensors(3)
    expected = case.evaluate(tensors)
    for place in range(len(case.controls)):
        given = [tensor.clone() for tensor in tensors]
        if is_last() or place == 2:
            given[place][1] = math.nan
        with pytest.raises(ConvergenceError, match="sample 1: .*'heat'"):
            case.layer(*given)
    cotangent = torch.ones_like(expected[0])
    if is_last():
        cotangent[2, 0] = math.nan
    with pytest.raises(ConvergenceError, match="sample 2: the cotangent of 'heat'"):
        case.evaluate(tensors, cotangent)
    for one, other in zip(case.evaluate(tensors), expected, strict=True):
        assert equality(parameters)(one, other)


def test_functionals():
    case = Diffusion(CG)
    u, k = case.u, case.controls[1]
    layer = SolverLayer(case.solver, case.controls, [ln(u) * dx, sqrt(k) * u * dx, u])
    tensors = case.tensors(2, 2)
    assert all(output.isfinite().all() for output in layer(*tensors))
    negative = [tensor.clone() for tensor in tensors]
    negative[0][1, 0], negative[3][1, 0] = -negative[0][1, 0], -negative[3][1, 0]
    with pytest.raises(ConvergenceError, match=r"sample \(1, 0\): a functional of 'heat' gave"):
        layer(*negative)
    # A value, without a derivative.
    layer.solver.solve()
    at_zero = [tensor.clone().requires_grad_() for tensor in tensors]
    with torch.no_grad():
        at_zero[1][0, 1] = 0.0
    _, value, _ = layer(*at_zero)
    with pytest.raises(ConvergenceError, match=r"sample \(0, 1\): the derivative of a functional"):
        value.sum().backward()
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    cotangent = torch.ones(2, 2, dtype=torch.float64)
    if is_last():
        cotangent[1, 1] = math.nan
    with pytest.raises(ConvergenceError, match=r"sample \(1, 1\): the cotangent of a functional"):
        layer(*given)[1].backward(cotangent)


def test_boundary_values_without_a_derivative():
    mesh = UnitSquareMesh(3, 3)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="heat")
    g = Constant(1.0, name="g")
    problem = LinearVariationalProblem(
        inner(grad(w), grad(v)) * dx, v * dx, u, bcs=DirichletBC(V, sqrt(g), 1)
    )
    layer = SolverLayer(prdp_fem.LinearVariationalSolver(problem, solver_parameters=CG), [g])
    x = torch.tensor([[1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    y = layer(x)
    with pytest.raises(ConvergenceError, match="sample 1: the derivative of the boundary values"):
        y.sum().backward()


def test_unrolled_iterations_by_themselves():
    case = Diffusion(CG, "unrolled")
    case.solver.solve()
    ksp = case.solver.system.linearisation.krylov.ksp
    unrolled, (b, out), (c, b_bar) = (
        UnrolledKSP(ksp),
        *(ksp.getOperators()[0].createVecs() for _ in range(2)),
    )
    b.set(1.0)
    c.set(1.0)
    if is_last():
        c.array[0] = math.nan
    with pytest.raises(ConvergenceError, match="derivative of 3 iterations of ksp_type cg"):
        unrolled.adjoint(b, None, 3, c, b_cotangent=b_bar)
    with pytest.raises(ConvergenceError, match="tangent of 3 iterations of ksp_type cg"):
        unrolled.tangent(b, None, 3, out, b_tangent=c)
    with pytest.raises(ConvergenceError, match="iterate of 3 iterations of ksp_type cg"):
        unrolled.iterate(c, None, 3, out)
    # Numbers may be so large that their squares are not finite.
    c.set(1e200)
    unrolled.adjoint(b, None, 1, c, b_cotangent=b_bar)
    assert np.isfinite(b_bar.array_r).all()


# Operators without an inverse


def neumann(source, shift=0.0):
    mesh = UnitSquareMesh(8, 8)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="heat")
    a = (inner(grad(w), grad(v)) + Constant(shift) * w * v) * dx
    return LinearVariationalProblem(a, source(*SpatialCoordinate(mesh)) * v * dx, u)


def flow(*, nonlinear=False, fixed=False):
    mesh = UnitSquareMesh(6, 6)
    W = VectorFunctionSpace(mesh, "CG", 2) * FunctionSpace(mesh, "CG", 1)
    (v, q) = TestFunctions(W)
    up = Function(W, name="flow")
    (x, y) = SpatialCoordinate(mesh)
    force = Function(W.sub(0).collapse(), name="force").interpolate(as_vector((sin(x * y), x * y)))
    bcs = [
        DirichletBC(W.sub(0), as_vector((y * (1 - y), 0 * x)), (1, 2)),
        DirichletBC(W.sub(0), 0, (3, 4)),
    ]
    if fixed:
        bcs.append(DirichletBC(W.sub(1), 0, 1))
    w, p = split(up) if nonlinear else TrialFunctions(W)
    F = (inner(grad(w), grad(v)) - p * div(v) - q * div(w)) * dx
    if nonlinear:
        F += inner(dot(grad(w), w), v) * dx - inner(force, v) * dx
        return NonlinearVariationalProblem(F, up, bcs=bcs), force
    return LinearVariationalProblem(F, inner(force, v) * dx, up, bcs=bcs), force


def constant_pressure(problem):
    W = problem.u.function_space()
    constants = VectorSpaceBasis(constant=True, comm=COMM_WORLD)
    return MixedVectorSpaceBasis(W, [W.sub(0), constants])


@pytest.mark.parametrize(
    "source",
    [lambda x, y: 1 + x * y, lambda x, y: cos(pi * x)],
    ids=["without a solution", "with many solutions"],
)
def test_a_factorisation_of_an_operator_that_is_singular(source):
    problem = neumann(source)
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters=MUMPS)
    before = problem.u.copy(deepcopy=True)
    for _ in range(2):
        with pytest.raises(ConvergenceError, match="'heat' with pc_type lu .*transpose_nullspace"):
            solver.solve()
    assert errornorm(before, problem.u) == 0
    constants = VectorSpaceBasis(constant=True, comm=COMM_WORLD)
    spaces = {"nullspace": constants, "transpose_nullspace": constants}
    prdp_fem.LinearVariationalSolver(problem, solver_parameters=MUMPS, **spaces).solve()
    expected = problem.u.copy(deepcopy=True)
    LinearVariationalSolver(problem, solver_parameters=MUMPS, **spaces).solve()
    assert errornorm(expected, problem.u) < 1e-10


@pytest.mark.parametrize("has_space", [False, True])
def test_null_pivots_that_are_looked_for_make_no_solution(has_space):
    """They are left out: solved again, it is the same, but the right-hand side has a part there."""
    problem = neumann(lambda x, y: 1 + x * y)
    parameters = {**MUMPS, "mat_mumps_icntl_24": 1}
    constants = VectorSpaceBasis(constant=True, comm=COMM_WORLD)
    spaces = {"nullspace": constants} if has_space else {}
    with pytest.raises(ConvergenceError, match="'heat' .*its residual is .*transpose_nullspace"):
        prdp_fem.LinearVariationalSolver(problem, solver_parameters=parameters, **spaces).solve()


@pytest.mark.parametrize("nonlinear", [False, True])
def test_a_flow_whose_pressure_is_not_determined(nonlinear):
    problem, force = flow(nonlinear=nonlinear)
    kind = prdp_fem.NonlinearVariationalSolver if nonlinear else prdp_fem.LinearVariationalSolver
    with pytest.raises(ConvergenceError, match="'flow' with pc_type lu .*nullspace="):
        kind(problem, solver_parameters=MUMPS).solve()
    space = constant_pressure(problem)
    kind(problem, solver_parameters=MUMPS, nullspace=space, transpose_nullspace=space).solve()
    problem, force = flow(nonlinear=nonlinear, fixed=True)
    layer = SolverLayer(kind(problem, solver_parameters=MUMPS), [force])
    x = to_torch(force, copy=True).requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shift", [1.0, 1e-4, 1e-7])
def test_operators_that_are_nearly_singular_have_solutions(shift):
    problem = neumann(lambda x, y: 1 + x * y, shift)
    layer = prdp_fem.LinearVariationalSolver(problem, solver_parameters=MUMPS)
    layer.solve()
    mean = assemble(problem.u * dx)  # of all solutions, by a test function of one
    assert abs(mean * shift - 1.25) < 1e-6


@pytest.mark.parametrize("nonlinear", [False, True])
def test_operators_that_leave_few_digits(nonlinear):
    """A large penalty takes digits, and somebody may mean it: a warning, on one rank, once."""
    mesh = UnitSquareMesh(8, 8)
    V = VectorFunctionSpace(mesh, "CG", 2)
    v = TestFunction(V)
    u = Function(V, name="flow")
    w = TrialFunction(V)
    force = Function(V, name="force").interpolate(as_vector((SpatialCoordinate(mesh)[1], 0)))
    penalty, bcs = Constant(1e13, name="penalty"), DirichletBC(V, 0, "on_boundary")

    def a(w):
        return (inner(grad(w), grad(v)) + penalty * div(w) * div(v)) * dx

    if nonlinear:
        F = a(u) + inner(dot(grad(u), u) - force, v) * dx
        solver = prdp_fem.NonlinearVariationalSolver(
            NonlinearVariationalProblem(F, u, bcs=bcs),
            warm_start=False,
            solver_parameters={**MUMPS, "snes_type": "ksponly"},
        )
    else:
        solver = prdp_fem.LinearVariationalSolver(
            LinearVariationalProblem(a(w), inner(force, v) * dx, u, bcs=bcs),
            solver_parameters=MUMPS,
        )
    layer = SolverLayer(solver, [penalty])
    x = torch.tensor([[1e13], [1.1e13]], dtype=torch.float64, requires_grad=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            y = layer(x)
            y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()
    said = [str(one.message) for one in caught if one.category is RuntimeWarning]
    assert len(said) == (COMM_WORLD.rank == 0)
    for text in said:
        assert re.search(
            "solve for 'flow' with pc_type lu determines no more than [23] digits", text
        )


@pytest.mark.parametrize("kind", ["linear", "iterative", "nonlinear"])
def test_one_sample_has_an_operator_that_is_singular(kind):
    """Its solution is one all the same; the adjoint's, for another right-hand side, is not."""
    mesh = UnitSquareMesh(8, 8)
    V = FunctionSpace(mesh, "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="heat")
    c = Constant(1.0, name="c")
    x, _ = SpatialCoordinate(mesh)

    def a(w):
        return (inner(grad(w), grad(v)) + c * w * v) * dx

    if kind == "nonlinear":
        solver = prdp_fem.NonlinearVariationalSolver(
            NonlinearVariationalProblem(a(u) - (1 + x) * v * dx, u),
            warm_start=False,
            solver_parameters={**MUMPS, "snes_type": "ksponly"},
        )
    else:
        solver = prdp_fem.LinearVariationalSolver(
            LinearVariationalProblem(a(w), (1 + x) * v * dx, u),
            solver_parameters=MUMPS if kind == "linear" else {**MUMPS, "ksp_type": "gmres"},
        )
    layer = SolverLayer(solver, [c])
    values = torch.tensor([[1.0], [2.0], [0.0], [3.0]], dtype=torch.float64)
    expected = layer(values[[0, 1, 3]])
    with pytest.raises(
        ConvergenceError, match="sample 2: the (forward|nonlinear) solve for 'heat'"
    ):
        layer(values)
    assert equality(MUMPS)(layer(values[[0, 1, 3]]), expected)
