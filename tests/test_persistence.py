"""Options by which PETSc keeps something of a solve for the next one: refused, or equal inputs give
equal bits.
"""

import numpy as np
import pytest
from firedrake import *
from firedrake.petsc import PETSc
from problems import CG, GMRES, HeatStep

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.krylov.persistence import refuse_persistent
from prdp_fem.krylov.petsc_types import KSP_TYPES, PC_TYPES, SNES_TYPES, types_with

pytestmark = pytest.mark.parallel([1, 2])

INNER = {
    "ksp_type": "fgmres",
    "pc_type": "ksp",
    "ksp_ksp_type": "gmres",
    "ksp_pc_type": "jacobi",
    "ksp_ksp_max_it": 3,
    "ksp_rtol": 1e-2,
}
REFUSED = {
    "snes_lag_jacobian_persists": {"snes_lag_jacobian": 2, "snes_lag_jacobian_persists": True},
    "snes_lag_preconditioner_persists": {
        "snes_lag_preconditioner": 3,
        "snes_lag_preconditioner_persists": None,
    },
    "snes_lag_jacobian": {"snes_lag_jacobian": -1},
    "snes_lag_preconditioner": {"snes_lag_preconditioner": "-2"},
    "npc_snes_lag_jacobian_persists": {
        "snes_type": "ngmres",
        "npc": {
            "snes_type": "newtonls",
            "snes_lag_jacobian": 2,
            "snes_lag_jacobian_persists": "yes",
        },
    },
    "npc_snes_type": {"snes_type": "ngmres", "npc_snes_type": "qn"},
    "snes_composite_sneses": {"snes_type": "composite", "snes_composite_sneses": "newtonls,qn"},
    "snes_qn_type lbfgs": {"snes_type": "qn"},
    "ksp_reuse_preconditioner": {"ksp_reuse_preconditioner": True},
    "sub_ksp_reuse_preconditioner": {"pc_type": "bjacobi", "sub_ksp_reuse_preconditioner": "1"},
    "ksp_guess_type": {"ksp_guess_type": "fischer"},
    "ksp_ksp_guess_type": {**INNER, "ksp_ksp_guess_type": "pod"},
    "ksp_ksp_initial_guess_nonzero": {**INNER, "ksp_ksp_initial_guess_nonzero": True},
    "ksp_type": {"ksp_type": "lgmres"},
    "ksp_ksp_type": {**INNER, "ksp_ksp_type": "qmrcgs"},
    "pc_type": {"pc_type": "lmvm"},
    "pc_composite_pcs": {"pc_type": "composite", "pc_composite_pcs": "jacobi,deflation"},
}


class Bent:
    """A nonlinear problem with a coefficient."""

    def __init__(self):
        V = FunctionSpace(UnitSquareMesh(8, 8), "CG", 1)
        x, y = SpatialCoordinate(V.mesh())
        self.u = Function(V)
        v = TestFunction(V)
        f = Function(V).interpolate(1 + sin(3 * x) * cos(2 * y))
        self.kappa = Function(V)
        self.problem = NonlinearVariationalProblem(
            (self.u * v + self.kappa * (1 + self.u**2) * inner(grad(self.u), grad(v)) - f * v) * dx,
            self.u,
            bcs=DirichletBC(V, 0, 1),
        )
        self.values = [Function(V).interpolate(value) for value in (1 + x, 1 + 20 * y)]

    def solution(self, solver, coefficient):
        self.kappa.assign(coefficient)
        self.u.assign(0)
        solver.solve()
        return self.u.dat.data_ro.copy()


@pytest.mark.parallel(1)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("where", ["parameters", "database", "control"])
def test_options_that_keep_something_are_refused_by_name(name, where):
    problem = Bent().problem
    parameters = REFUSED[name]
    prefix = None
    if where == "database":
        prefix, options = "kept_", PETSc.Options()
        given = {
            **parameters,
            **{f"npc_{inner}": value for inner, value in parameters.get("npc", {}).items()},
        }
        for option, value in given.items():
            if not isinstance(value, dict):
                options[prefix + option] = value
        parameters = {}
    with pytest.raises(
        ValueError, match=f"^{name} .* a solve would not be a function of its inputs"
    ):
        if where == "control" and name not in ("snes_lag_jacobian", "snes_lag_preconditioner"):
            # PETSc refuses these values, too
            prdp_fem.control(
                NonlinearVariationalSolver(problem, solver_parameters=parameters), None
            )
        prdp_fem.NonlinearVariationalSolver(
            problem, solver_parameters=parameters, options_prefix=prefix
        )


@pytest.mark.parallel(1)
@pytest.mark.parametrize(
    "option, table",
    [("ksp_type", KSP_TYPES), ("sub_pc_type", PC_TYPES), ("npc_snes_type", SNES_TYPES)],
)
def test_all_types_that_remember_are_refused_and_none_of_them_is_recommended(option, table):
    known = {**KSP_TYPES, **PC_TYPES, **SNES_TYPES}
    remembering = types_with(table, "remembers_solves")
    assert remembering
    for kind in table:
        if kind not in remembering:
            refuse_persistent({option: kind})
            continue
        with pytest.raises(ValueError, match=f"^{option} {kind} keeps") as error:
            refuse_persistent({option: kind})
        words = str(error.value).partition(" such as ")[2].replace(",", "").split()
        recommended = [word for word in words if word in known]
        assert len(recommended) > 5
        assert not any(known[word].remembers_solves for word in recommended)


@pytest.mark.parallel(1)
def test_linear_solvers_refuse_them_too():
    with pytest.raises(ValueError, match="ksp_reuse_preconditioner True keeps the preconditioner"):
        prdp_fem.LinearVariationalSolver(
            HeatStep().problem, solver_parameters={**CG, "ksp_reuse_preconditioner": True}
        )


@pytest.mark.parametrize(
    "parameters",
    [
        {"snes_lag_jacobian": 2},
        {"pc_type": "bjacobi", "snes_lag_preconditioner": 2},
        {"snes_lag_jacobian_persists": False},
        {"ksp_reuse_preconditioner": "no"},
        {"ksp_initial_guess_nonzero": True},
        {"snes_linesearch_type": "nleqerr"},
        {"snes_type": "newtontr"},
    ],
    ids=lambda parameters: "+".join(parameters),
)
def test_what_is_not_refused_makes_solves_that_depend_on_their_inputs_alone(parameters):
    case = Bent()

    def make():
        return prdp_fem.NonlinearVariationalSolver(
            case.problem,
            refinement=FixedRefinement(NewtonSteps(3, Iterations(4))),
            warm_start=False,
            solver_parameters={
                **GMRES,
                "snes_linesearch_type": "basic",
                "snes_rtol": 1e-12,
                "snes_stol": 0,
                **parameters,
            },
        )

    solver = make()
    keep, other = case.values
    results = [case.solution(solver, value) for value in (keep, other, keep, keep, other)]
    assert all(np.array_equal(results[0], result) for result in results[2:4])
    assert np.array_equal(results[4], results[1]) and np.array_equal(
        case.solution(make(), other), results[1]
    )


@pytest.mark.parametrize("kind", ["badbroyden", "broyden"])
def test_quasi_newton_starts_each_solve_anew(kind):
    case = Bent()
    case.values[1].assign(case.values[0] + 0.5)

    def make():
        return prdp_fem.NonlinearVariationalSolver(
            case.problem,
            refinement=FixedRefinement(NewtonSteps(3)),
            warm_start=False,
            solver_parameters={
                "snes_type": "qn",
                "snes_qn_type": kind,
                "snes_linesearch_type": "basic",
            },
        )

    solver = make()
    keep, other = case.values
    results = [case.solution(solver, value) for value in (keep, other, keep)]
    assert np.array_equal(results[0], results[2]) and np.array_equal(
        case.solution(make(), other), results[1]
    )
