"""What somebody would use who refines nothing: direct solvers, and good preconditioners."""

import numpy as np
import pytest
from firedrake import *
from problems import CG, HeatStep

import prdp_fem
from prdp_fem import FixedRefinement, IterationLadder, Iterations, Tolerance
from prdp_fem.studies import DIRECT, Schedule, factorised, incomplete, solver_parameters

pytestmark = pytest.mark.parallel([1, 2])

HOW = {"ladder": IterationLadder(), "converged": Tolerance(1e-10)}


def test_the_schedule_direct_factorises_once_and_all_others_iterate():
    problem = HeatStep()
    parameters = {**CG, "mat_type": "aij"}
    prdp_fem.LinearVariationalSolver(
        problem.problem, refinement=FixedRefinement(Tolerance(1e-12)), solver_parameters=CG
    ).solve()
    expected = problem.u.dat.data_ro.copy()
    for kind in ("cholesky", "lu"):
        refinement = DIRECT.refinement(**HOW)
        chosen = solver_parameters(refinement, parameters, factorisation=kind, comm=COMM_WORLD)
        assert (chosen["ksp_type"], chosen["pc_type"]) == ("preonly", kind)
        assert chosen["mat_type"] == "aij"
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem, refinement=refinement, solver_parameters=chosen
        )
        for _ in range(3):
            problem.u.assign(0)
            solver.solve()
            np.testing.assert_allclose(problem.u.dat.data_ro, expected, atol=1e-9)
        assert solver.statistics.assemblies == 1 and solver.statistics.forward_iterations == 3
    for schedule in (Schedule("converged"), Schedule("rtol", rtol=1e-2), Schedule("constant", 3)):
        refinement = schedule.refinement(**HOW)
        assert solver_parameters(refinement, parameters, factorisation="lu") == parameters


def test_of_a_singular_operator_mumps_finds_the_null_pivots():
    assert factorised("lu", is_singular=True)["pc_factor_mat_solver_type"] == "mumps"


@pytest.mark.parametrize("kind", ["icc", "ilu"])
def test_an_incomplete_factorisation_converges_in_fewer_iterations(kind):
    counts = []
    for parameters in (CG, {"ksp_type": "cg", **incomplete(kind, COMM_WORLD)}):
        problem = HeatStep(16)
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            refinement=FixedRefinement(Tolerance(1e-8)),
            solver_parameters=parameters,
        )
        solver.solve()
        counts.append(solver.statistics.forward_iterations)
    assert counts[1] < counts[0]
    solver.refinement = FixedRefinement(Iterations(2))
    problem.u.assign(0)
    solver.solve()
    assert solver.statistics.forward_iterations == counts[1] + 2
