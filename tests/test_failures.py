"""After a failure, whatever it was, a solver is as good as a new one."""

import sys
import types

import numpy as np
import pytest
import torch
from cases import factorised
from firedrake import *
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc
from problems import HeatStep, equality, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps, Tolerance
from prdp_fem.torch import SolverLayer, to_torch

pytestmark = pytest.mark.parallel([1, 2, 3])


class Fragile:
    """A user's preconditioner that raises what it is told to."""

    error = None

    def _raise(self) -> None:
        if Fragile.error is not None:
            raise Fragile.error

    def setUp(self, pc):
        self._raise()

    def apply(self, pc, x, y):
        self._raise()
        x.copy(y)

    applyTranspose = apply


@pytest.fixture
def fragile(monkeypatch):
    module = types.ModuleType("fragile")
    module.Fragile = Fragile
    monkeypatch.setitem(sys.modules, "fragile", module)
    monkeypatch.setattr(Fragile, "error", None)
    return {"ksp_type": "gmres", "pc_type": "python", "pc_python_type": "fragile.Fragile"}


class Diffusion:
    """A problem with a source and a diffusivity, whose solver is yet to be made."""

    def __init__(self, nonlinear: bool = False):
        self.mesh = UnitSquareMesh(8, 8)
        V = self.V = FunctionSpace(self.mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        u = Function(V, name="u")
        self.source, self.kappa = Function(V, name="source"), Function(V, name="kappa").assign(1.0)
        bc = DirichletBC(V, 0, "on_boundary")
        if nonlinear:
            F = self.kappa * (1 + u**2) * inner(grad(u), grad(v)) * dx - self.source * v * dx
            self.problem = NonlinearVariationalProblem(F, u, bcs=bc)
            self.setting = NewtonSteps(2, Iterations(3))
        else:
            a = self.kappa * inner(grad(w), grad(v)) * dx
            self.problem = LinearVariationalProblem(a, self.source * v * dx, u, bcs=bc)
            self.setting = Iterations(3)
        self.good = tuple(1 + 0.3 * to_torch(smooth(V, seed), copy=True) ** 2 for seed in (1, 2))
        self.cotangent = to_torch(smooth(V, 3), copy=True)

    def layer(self, parameters, **options):
        linear = isinstance(self.problem, LinearVariationalProblem)
        make = prdp_fem.LinearVariationalSolver if linear else prdp_fem.NonlinearVariationalSolver
        solver = make(
            self.problem,
            refinement=FixedRefinement(self.setting),
            solver_parameters=parameters,
            warm_start=False,
            **options,
        )
        return SolverLayer(solver, [self.source, self.kappa])

    def evaluate(self, layer, tensors=None, cotangent=None) -> list:
        """The solution, and the derivatives by both controls."""
        tensors = [
            tensor.detach().clone().requires_grad_()
            for tensor in (self.good if tensors is None else tensors)
        ]
        out = layer(*tensors)
        out.backward(self.cotangent if cotangent is None else cotangent)
        return [out.detach(), *(tensor.grad for tensor in tensors)]


def assert_equal(equal, found, expected):
    assert all(equal(one.numpy().T, other.numpy().T) for one, other in zip(found, expected))


PRECONDITIONERS = {
    "jacobi": {"ksp_type": "cg", "pc_type": "jacobi"},
    "pbjacobi": {"ksp_type": "gmres", "pc_type": "pbjacobi"},
    "sor": {"ksp_type": "gmres", "pc_type": "sor"},
    "eisenstat": {"ksp_type": "cg", "pc_type": "eisenstat"},
    "ilu": {"ksp_type": "gmres", **factorised("ilu")},
    "icc": {"ksp_type": "cg", **factorised("icc")},
    "lu": {"ksp_type": "gmres", **factorised("lu")},
    "mumps": {"ksp_type": "gmres", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"},
    "blocks": {"ksp_type": "gmres", "pc_type": "bjacobi", "pc_bjacobi_blocks": 2 * COMM_WORLD.size},
    "blocks swept": {"ksp_type": "bcgs", "pc_type": "bjacobi", "sub_pc_type": "sor"},
    "schwarz": {"ksp_type": "gmres", "pc_type": "asm"},
    "gamg": {"ksp_type": "cg", "pc_type": "gamg"},
    "mg": {"ksp_type": "gmres", "pc_type": "mg"},
    "ksp": {
        "ksp_type": "preonly",
        "pc_type": "ksp",
        "ksp_ksp_type": "gmres",
        "ksp_pc_type": "bjacobi",
    },
    "composite": {
        "ksp_type": "gmres",
        "pc_type": "composite",
        "pc_composite_pcs": "jacobi,bjacobi",
    },
    "assembled": {
        "mat_type": "matfree",
        "ksp_type": "gmres",
        "pc_type": "python",
        "pc_python_type": "firedrake.AssembledPC",
        "assembled_pc_type": "bjacobi",
    },
    "star": {
        "ksp_type": "cg",
        "pc_type": "python",
        "pc_python_type": "firedrake.ASMStarPC",
        "pc_star_construct_dim": 0,
    },
    "descent": {
        "ksp_type": "python",
        "ksp_python_type": "prdp_fem.SteepestDescent",
        "pc_type": "sor",
    },
}
UNROLLED = ("pbjacobi", "sor", "icc", "blocks", "descent")
EVERYWHERE = ("pbjacobi", "sor", "blocks")


def _rows():
    for name in PRECONDITIONERS:
        # PETSc has the one for the matrices of one rank, and on several MUMPS adds up in an order
        # that the load decides.
        marks = [pytest.mark.ranks(1)] if name in ("eisenstat", "mumps") else []
        for nonlinear, how in (
            (False, "implicit"),
            (True, "implicit"),
            (False, "unrolled"),
            (True, "unrolled"),
        ):
            if how == "implicit" or name in UNROLLED:
                # Each costs a while, and the ways of failing do not depend on the number of ranks
                # together with all else.
                few = (
                    [pytest.mark.ranks(1)]
                    if nonlinear or how == "unrolled"
                    else []
                    if name in EVERYWHERE
                    else [pytest.mark.ranks(1, 2)]
                )
                yield pytest.param(
                    name,
                    nonlinear,
                    how,
                    id=f"{name}-{'nonlinear' if nonlinear else 'linear'}-{how}",
                    marks=marks or few,
                )


@pytest.mark.parametrize("name, nonlinear, how", list(_rows()))
def test_good_calls_after_bad_ones_are_those_of_a_fresh_solver(name, nonlinear, how):
    parameters, problem = PRECONDITIONERS[name], Diffusion(nonlinear)
    options = {"differentiation": how, **({"ksp_prefix": ""} if name == "assembled" else {})}
    equal, (source, kappa) = equality(parameters), problem.good
    expected = problem.evaluate(problem.layer(parameters, **options))
    problem.kappa.assign(0)  # as it is when a network supplies it later
    made_with_zero = problem.layer(parameters, **options)
    assert_equal(equal, problem.evaluate(made_with_zero), expected)
    nan = source.clone()
    nan[:1] = torch.nan
    bad_calls = {
        "zero": (source, 0 * kappa),
        "NaN in the source": (nan, kappa),
        "NaN in the operator": (source, nan),
        "in a batch": (source.expand(3, -1), torch.stack([kappa, 0 * kappa, kappa])),
    }
    if name == "mg":
        # it has one level here, whose direct solver meets none
        del bad_calls["NaN in the operator"]
    for tensors in bad_calls.values():
        with pytest.raises(
            ConvergenceError, match="solve (inside that )?for 'u'|preconditioner for 'u'"
        ):
            made_with_zero(*tensors)
        assert_equal(equal, problem.evaluate(made_with_zero), expected)
    batch = [torch.stack([tensor, 2 * tensor]) for tensor in problem.good]
    cotangents = problem.cotangent.expand(2, -1)
    assert_equal(
        equal,
        problem.evaluate(made_with_zero, batch, cotangents),
        problem.evaluate(problem.layer(parameters, **options), batch, cotangents),
    )


@pytest.mark.parametrize("nonlinear", [False, True])
@pytest.mark.parametrize("how", ["implicit", "unrolled"])
def test_errors_of_a_users_preconditioner_are_the_users_and_leave_nothing_behind(
    fragile, nonlinear, how
):
    problem = Diffusion(nonlinear)
    problem.setting = NewtonSteps(2, Iterations(2)) if nonlinear else Iterations(2)
    expected = problem.evaluate(problem.layer(fragile, differentiation=how))
    layer = problem.layer(fragile, differentiation=how)
    for error in (ZeroDivisionError("mine"), KeyboardInterrupt(), ZeroDivisionError("mine")):
        Fragile.error = error
        with pytest.raises(type(error)):
            problem.evaluate(layer)
        Fragile.error = None
        assert_equal(equality(fragile), problem.evaluate(layer), expected)
        out = layer(problem.good[0], problem.good[1].clone().requires_grad_())
        Fragile.error = error
        with pytest.raises(type(error)):
            out.backward(problem.cotangent)
        Fragile.error = None
        assert_equal(equality(fragile), problem.evaluate(layer), expected)


@pytest.mark.parametrize(
    "parameters, make_bad",
    [
        ({"ksp_type": "gmres", "pc_type": "sor"}, lambda kappa: 0 * kappa),
        (
            {"ksp_type": "cg", "pc_type": "jacobi"},
            lambda kappa: kappa * np.cos(np.arange(kappa.size)),
        ),
        ({"ksp_type": "gmres", "pc_type": "jacobi"}, None),
        ({"ksp_type": "gmres", "pc_type": "bjacobi", "ksp_error_if_not_converged": None}, None),
    ],
    ids=["PETSc raises", "indefinite", "too few iterations", "told to raise"],
)
def test_errors_on_the_tape_are_one_sentence_with_a_remedy(parameters, make_bad):
    problem = Diffusion()
    problem.source.assign(1.0)

    def gradient(solver):
        from firedrake.adjoint import Control, ReducedFunctional, Tape, set_working_tape

        with set_working_tape(Tape()):
            solver.solve()
            reduced = ReducedFunctional(
                assemble(problem.problem.u**2 * dx),
                [Control(problem.source), Control(problem.kappa)],
            )
            return [part.dat.data_ro.copy() for part in reduced.derivative()]

    def make():
        return prdp_fem.LinearVariationalSolver(
            problem.problem, solver_parameters={"ksp_rtol": 1e-8, **parameters}
        )

    expected, solver = gradient(make()), make()
    kappa = problem.kappa.copy(deepcopy=True)
    for _ in range(3):  # PETSc has counters that make the third time another one
        if make_bad is None:
            solver.refinement = FixedRefinement(Tolerance(1e-12, max_it=1))
            if "ksp_error_if_not_converged" in parameters:
                solver.refinement = None
                solver.snes.ksp.setTolerances(max_it=1)
        else:
            problem.kappa.dat.data_wo[:] = make_bad(kappa.dat.data_ro)
        with pytest.raises(
            ConvergenceError, match="the forward solve for 'u' .*(look for|use|allow)"
        ) as raised:
            gradient(solver)
        assert raised.value.__cause__ is None and "\n" not in str(raised.value)
        problem.kappa.assign(kappa)
        solver.refinement = None
        solver.snes.ksp.setTolerances(max_it=10_000)
        for found, exact in zip(gradient(solver), expected):
            np.testing.assert_array_equal(found, exact)


def test_a_failed_backward_pass_leaves_nothing_behind():
    """A cotangent that is not finite, one solve after the forward one."""
    problem = Diffusion()
    for parameters in (
        {"ksp_type": "cg", "pc_type": "jacobi"},
        PRECONDITIONERS["blocks"],
        PRECONDITIONERS["ksp"],
    ):
        layer, nan = problem.layer(parameters), problem.cotangent.clone()
        expected = problem.evaluate(layer)
        nan[:] = torch.nan
        with pytest.raises((ConvergenceError, ValueError)):
            problem.evaluate(layer, cotangent=nan)
        assert_equal(equality(parameters), problem.evaluate(layer), expected)


def test_what_was_set_by_hand_stays():
    """A preconditioner that no option says, before and after a failure."""

    class Halving:
        def apply(self, pc, x, y):
            x.copy(y)
            y.scale(0.5)

        applyTranspose = apply

    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(3)),
        solver_parameters={"ksp_type": "richardson", "pc_type": "none"},
    )
    pc = solver.snes.ksp.getPC()
    pc.setType(PETSc.PC.Type.PYTHON)
    pc.setPythonContext(Halving())
    PETSc.Options().delValue(f"{solver.options_prefix}pc_type")
    solver.parameters.pop("pc_type")
    expected = solver.solve().dat.data_ro.copy()
    kappa = problem.kappa.copy(deepcopy=True)
    problem.kappa.assign(np.nan)
    with pytest.raises(ConvergenceError):
        solver.solve()
    problem.kappa.assign(kappa)
    np.testing.assert_array_equal(solver.solve().dat.data_ro, expected)


def test_a_method_that_draws_random_numbers_draws_the_same_again():
    step = HeatStep(8)
    solver = prdp_fem.LinearVariationalSolver(
        step.problem,
        solver_parameters={"ksp_type": "idr", "pc_type": "jacobi"},
        refinement=FixedRefinement(Iterations(4)),
    )
    layer = SolverLayer(solver, [step.u0])
    values = to_torch(step.u0, copy=True)
    expected = layer(values)
    with pytest.raises(ConvergenceError):
        layer(values * float("nan"))
    assert torch.equal(layer(values), expected)


@pytest.mark.parametrize("pc_type", ["ilu", "bjacobi", "lu"])
def test_a_factorisation_that_nobody_has_seen_fail(pc_type):
    """Where no norm is computed, only the numbers tell."""
    mesh = UnitSquareMesh(4, 4)
    V = FunctionSpace(mesh, "CG", 1)
    w, v, u = TrialFunction(V), TestFunction(V), Function(V, name="u")
    k = Function(V, name="k").assign(1.0)
    a = k * (inner(grad(w), grad(v)) + w * v) * dx
    parameters = {
        "ksp_type": "richardson",
        "pc_type": pc_type if COMM_WORLD.size == 1 else "bjacobi",
        "ksp_norm_type": "none",
        "ksp_max_it": 5,
    }
    problem = LinearVariationalProblem(a, v * dx, u)
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem, solver_parameters=parameters), [k]
    )
    values = to_torch(k, copy=True)
    expected = layer(values)
    for _ in range(2):
        with pytest.raises(ConvergenceError, match="gave NaN or infinity"):
            layer(0 * values)
        assert torch.equal(layer(values), expected)


@pytest.mark.parametrize(
    "parameters, words",
    [
        ({"pc_type": "vpbjacobi"}, "asks for something else .*MatSetVariableBlockSizes"),
        ({"pc_type": "nn"}, "asks for something else .*MATIS.* another ksp_type or pc_type"),
        ({"pc_type": "ilu", "mat_type": "matfree"}, "no such factorisation .*ILU.* mat_type or"),
    ],
    ids=lambda value: value["pc_type"] if isinstance(value, dict) else "",
)
def test_what_petsc_refuses_whatever_the_numbers_are(parameters, words):
    solver = prdp_fem.LinearVariationalSolver(
        Diffusion().problem, solver_parameters={"ksp_type": "gmres", **parameters}
    )
    with pytest.raises(ConvergenceError, match=words) as raised:
        solver.solve()
    assert "NaN" not in str(raised.value)


UNSEEN = {
    "sweeps": {"ksp_type": "richardson", "pc_type": "sor"},
    "cycles": {"ksp_type": "richardson", "pc_type": "gamg"},
    "no norm": {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_norm_type": "none"},
    "no test": {"ksp_type": "cg", "pc_type": "jacobi", "ksp_convergence_test": "skip"},
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("how", ["outside", "inside", "newton"])
def test_a_tolerance_that_is_not_reached_is_an_error_where_petsc_says_nothing(name, how):
    parameters = UNSEEN[name]
    problem = Diffusion(how == "newton")
    if how == "newton":
        parameters = {**parameters, "snes_type": "ksponly"}
    if how == "inside":
        nested = {f"ksp_{option}": value for option, value in parameters.items()}
        parameters = {"ksp_type": "preonly", "pc_type": "ksp", **nested}
    kind = "Nonlinear" if how == "newton" else "Linear"
    solver = getattr(prdp_fem, f"{kind}VariationalSolver")(
        problem.problem,
        solver_parameters=parameters,
        refinement=FixedRefinement(Tolerance(1e-9, max_it=2)),
    )
    problem.source.assign(1.0)
    with pytest.raises(ConvergenceError, match="'u' .*CONVERGED_ITS after 2 iterations.*max_it of"):
        solver.solve()
    solver.refinement = FixedRefinement(Iterations(2))
    solver.solve()
