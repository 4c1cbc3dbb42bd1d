"""What a metric is worth: assessed with converged physics, which leaves no trace."""

import warnings

import numpy as np
import pytest
import torch
from firedrake import *
from problems import CG, GMRES, norm_by_dofs
from pyadjoint import get_working_tape

from prdp_fem import (
    CoarsePhysicsWarning,
    FixedRefinement,
    IterationLadder,
    Iterations,
    LinearVariationalSolver,
    NewtonLadder,
    NewtonSteps,
    NonlinearVariationalSolver,
    ProgressiveRefinement,
    Tolerance,
)
from prdp_fem.refinement.assessment import relative_gap
from prdp_fem.torch import SolverLayer, to_torch

EXACT = {"tau_step": 3 / 4, "tau_stop": 1 / 2, "ema_window": 1, "error_window": 2}


class Heat:
    """A heat step under a refinement, whose metric is the norm of its solution."""

    def __init__(self, refinement, make=LinearVariationalSolver, **options):
        V = FunctionSpace(UnitSquareMesh(8, 7), "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        self.source = Function(V, name="source").assign(1)
        self.u = Function(V, name="u")
        a = (w * v + 0.3 * inner(grad(w), grad(v))) * dx
        problem = LinearVariationalProblem(
            a, self.source * v * dx, self.u, bcs=DirichletBC(V, 0, 1)
        )
        self.refinement = refinement
        self.solver = make(problem, refinement=refinement, solver_parameters=CG, **options)

    def validate(self):
        self.solver.solve()
        return norm_by_dofs(self.u)


def trace(heat):
    """All that an assessment could have changed."""
    return (
        heat.refinement.state_dict(),
        vars(heat.solver.statistics).copy(),
        heat.u.dat.data_ro.tobytes(),
        len(get_working_tape().get_blocks()),
    )


def converged_norm():
    return Heat(FixedRefinement(Tolerance(1e-12))).validate()


@pytest.mark.parallel([1, 2])
def test_the_metric_of_the_moment_and_with_converged_physics():
    heat = Heat(ProgressiveRefinement(IterationLadder(start=2), **EXACT, comm=COMM_WORLD))
    reported = heat.validate()
    before = trace(heat)
    with pytest.warns(CoarsePhysicsWarning, match="with converged ones .* apart.: judge by the"):
        assessment = heat.refinement.assess(heat.validate, [heat.solver])
    assert trace(heat) == before
    assert assessment.reported == reported
    assert assessment.converged == pytest.approx(converged_norm(), rel=1e-6)
    assert assessment.gap == abs(reported - assessment.converged) / assessment.converged > 0.05
    # two iterations, and those to a relative residual of 1e-8
    other = Heat(FixedRefinement(Tolerance(1e-8)))
    other.validate()
    assert assessment.iterations == 2 + other.solver.statistics.forward_iterations
    assert assessment.seconds > 0


@pytest.mark.parallel([1, 2])
def test_what_comes_after_it_has_the_same_bits():
    both = [Heat(ProgressiveRefinement(IterationLadder(), **EXACT, comm=COMM_WORLD)) for _ in "ab"]
    for _ in range(4):
        for heat in both:
            metric = heat.validate()
            if heat is both[0]:
                with warnings.catch_warnings(action="ignore"):
                    heat.refinement.assess(heat.validate, [heat.solver])
            heat.refinement.step(metric)
        assert trace(both[0])[0] == trace(both[1])[0] and trace(both[0])[2] == trace(both[1])[2]
    assert both[0].refinement.level > 0


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_leaves_all_as_it_was(fails_at):
    heat = Heat(FixedRefinement(Iterations(2), comm=COMM_WORLD))
    heat.validate()
    before, calls = trace(heat), []

    def validate():
        calls.append(heat.refinement.setting)
        metric = heat.validate()
        if len(calls) == fails_at:
            raise RuntimeError("no file")
        return metric

    with pytest.raises(RuntimeError, match="no file"):
        heat.refinement.assess(validate, [heat.solver])
    assert calls == [Iterations(2), Tolerance(1e-8)][:fails_at]
    assert trace(heat) == before and heat.refinement.setting == Iterations(2)
    with pytest.raises(ConvergenceError):
        heat.refinement.assess(heat.validate, [heat.solver], converged=Tolerance(1e-8, max_it=3))
    assert trace(heat) == before and heat.refinement.setting == Iterations(2)
    with pytest.raises(ValueError, match="a metric must be finite"):
        heat.refinement.assess(lambda: np.nan, [heat.solver])
    assert trace(heat) == before


@pytest.mark.parallel([1, 2])
def test_solvers_may_be_layers_and_follow_several_refinements():
    refinement = FixedRefinement(Iterations(2), comm=COMM_WORLD)
    heats = [Heat(refinement), Heat(FixedRefinement(Iterations(1))), Heat(None)]
    layers = [SolverLayer(heat.solver, [heat.source]) for heat in heats]
    # each mesh may be partitioned in another way
    ones = [to_torch(heat.source, copy=True).expand(3, -1) for heat in heats]
    seen = []

    def validate():
        with torch.no_grad():
            solutions = [layer(x) for layer, x in zip(layers, ones)]
        seen.append([heat.solver.setting for heat in heats])
        total = sum((solution**2).sum().item() for solution in solutions)
        return COMM_WORLD.allreduce(total)

    with pytest.warns(CoarsePhysicsWarning):
        assessment = refinement.assess(validate, layers)
    assert seen == [[Iterations(2), Iterations(1), None], [Tolerance(1e-8), Tolerance(1e-8), None]]
    assert assessment.iterations > 3 * 3 and heats[0].solver.statistics.iterations == 0
    with pytest.warns(CoarsePhysicsWarning):
        assert refinement.assess(validate, [heat.solver for heat in heats]).gap == assessment.gap


def test_a_guess_is_put_back():
    heat = Heat(FixedRefinement(Iterations(1)), warm_start=True)
    heat.validate()
    before = trace(heat)
    assessment = heat.refinement.assess(heat.validate, [heat.solver], converged=Iterations(2))
    assert trace(heat) == before
    assert heat.validate() == assessment.reported


def test_newtons_method_is_converged_as_its_options_say():
    V = FunctionSpace(UnitSquareMesh(6, 6), "CG", 1)
    u, v = Function(V), TestFunction(V)
    F = ((1 + 5 * u**2) * inner(grad(u), grad(v)) - 30 * v) * dx
    problem = NonlinearVariationalProblem(F, u, bcs=DirichletBC(V, 0, "on_boundary"))
    solutions = []
    for setting in (
        NewtonSteps(1, Iterations(3)),
        NewtonSteps(2),
        NewtonLadder(linear=IterationLadder())[0],
    ):
        refinement = FixedRefinement(setting)
        solver = NonlinearVariationalSolver(
            problem, refinement=refinement, warm_start=False, solver_parameters=GMRES
        )

        def validate(solver=solver):
            solver.solve()
            return norm_by_dofs(u)

        with pytest.warns(CoarsePhysicsWarning):
            solutions.append(refinement.assess(validate, [solver]).converged)
    assert solutions == pytest.approx([solutions[0]] * 3, rel=1e-4)


@pytest.mark.parallel([1, 2])
def test_converged_physics_are_no_warning():
    heat = Heat(FixedRefinement(Tolerance(1e-6), comm=COMM_WORLD))
    with warnings.catch_warnings(action="error"):
        assert heat.refinement.assess(heat.validate, [heat.solver]).gap < 1e-5


@pytest.mark.parallel([1, 2])
def test_metrics_of_rank_0_decide():
    refinement = FixedRefinement(Iterations(2), comm=COMM_WORLD)

    def validate():
        coarse = refinement.setting == Iterations(2)
        return (2.0 if coarse else 1.0) + COMM_WORLD.rank

    with pytest.warns(CoarsePhysicsWarning, match="the metric is 2 with .* 1 with .*100.0% apart"):
        assessment = refinement.assess(validate, [])
    assert (assessment.reported, assessment.converged, assessment.gap) == (2.0, 1.0, 1.0)


def test_gaps():
    assert relative_gap(1.0, 2.0) == 0.5 and relative_gap(3.0, 2.0) == 0.5
    assert relative_gap(0.0, 0.0) == 0.0 and relative_gap(1.0, 0.0) == np.inf


def test_what_cannot_be_assessed():
    refinement = FixedRefinement(Iterations(2))
    with pytest.raises(TypeError, match="validate must be a function that returns a metric"):
        refinement.assess(1.0, [])
    with pytest.raises(TypeError, match="solvers must be a list of solvers"):
        refinement.assess(lambda: 1.0, None)
    with pytest.raises(TypeError, match="solvers must be those of prdp_fem, or layers"):
        refinement.assess(lambda: 1.0, [3])
    with pytest.raises(TypeError, match="a setting must have the attributes"):
        refinement.assess(lambda: 1.0, [], converged=1e-8)


def test_another_setting_is_in_place_for_a_while():
    refinement = ProgressiveRefinement(IterationLadder())
    changes = refinement.changes
    with refinement.at(Tolerance(0.1)):
        assert refinement.setting == Tolerance(0.1) and refinement.level == 0
        with refinement.at(Iterations(7)):
            assert refinement.setting == Iterations(7)
        assert refinement.setting == Tolerance(0.1)
    assert refinement.setting == Iterations(1) and refinement.changes > changes
    assert refinement.state_dict() == ProgressiveRefinement(IterationLadder()).state_dict()
