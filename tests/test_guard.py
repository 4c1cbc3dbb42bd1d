"""The guard of a training: what is silently wrong without it is said, at 3 % of the iterations."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from firedrake import *
from problems import CG, GMRES

from prdp_fem import (
    CoarsePhysicsWarning,
    DiscrepancyRefinement,
    FixedRefinement,
    IterationLadder,
    Iterations,
    LinearVariationalSolver,
    NewtonLadder,
    NonlinearVariationalSolver,
    ProgressiveRefinement,
    ScheduledRefinement,
    Tolerance,
)
from prdp_fem.history import History
from prdp_fem.studies.runs import Run
from prdp_fem.torch import MLP, SolverLayer, deal, to_torch, total, train

torch.set_num_threads(1)

CONVERGED = {**CG, "ksp_rtol": 1e-12}


class Heat:
    """An emulator of heat conduction in one dimension: the network takes the first of two steps."""

    samples, held_back = 100, 25

    def __init__(self, refinement, comm=COMM_SELF):
        mesh = UnitIntervalMesh(31, comm=comm)
        V = FunctionSpace(mesh, "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        old, increment = Function(V), Function(V)
        k = 1e-3
        lumped = dx(scheme="KMV", degree=1)
        problem = LinearVariationalProblem(
            w * v * lumped + k * inner(grad(w), grad(v)) * dx,
            -k * inner(grad(old), grad(v)) * dx,
            increment,
            bcs=DirichletBC(V, 0, "on_boundary"),
        )
        self.refinement = refinement
        self.solver = LinearVariationalSolver(problem, refinement=refinement, solver_parameters=CG)
        self.increment = SolverLayer(self.solver, [old])
        self.reference = SolverLayer(
            LinearVariationalSolver(problem, solver_parameters=CONVERGED), [old]
        )
        x = mesh.coordinates.dat.data_ro
        sines = np.sin(np.pi * np.arange(1, 16)[:, None] * x)
        number = self.samples + self.held_back
        fields = np.random.default_rng(1).uniform(-1, 1, (number, 15)) @ sines
        self.u0 = torch.from_numpy(fields / abs(fields).max(axis=1, keepdims=True))
        with torch.no_grad():
            u1 = self.u0 + self.reference(self.u0)
            self.u2 = u1 + self.reference(u1)
        self.inside = torch.from_numpy((x > 0) & (x < 1))
        torch.manual_seed(1)
        self.network = MLP(len(x), len(x), width=64, depth=1).double()
        self.validation = torch.arange(self.samples, number)

    def errors(self, samples, increment):
        u1 = self.u0[samples] + self.inside * self.network(self.u0[samples])
        found = u1 + increment(u1)
        return ((found - self.u2[samples]) ** 2).sum(-1) / (self.u2[samples] ** 2).sum(-1)

    def validate(self):
        return self.errors(self.validation, self.increment).mean().item()

    def train(self, epochs, rate=2e-3, gamma=1.0, every=10, **options):
        optimiser = torch.optim.Adam(self.network.parameters(), rate)
        return train(
            self.network,
            lambda samples: self.errors(samples, self.increment).mean(),
            self.validate,
            **{
                "optimiser": optimiser,
                "refinement": self.refinement,
                "solvers": [self.solver],
                "samples": self.samples,
                "batch_size": 10,
                "epochs": epochs,
                "seed": 1,
                "scheduler": torch.optim.lr_scheduler.StepLR(optimiser, every, gamma),
                "progress": False,
                **options,
            },
        )

    def true(self):
        """The metric with the reference's solver."""
        with torch.no_grad():
            return self.errors(self.validation, self.reference).mean().item()


def quietly(call, *arguments, **options):
    with warnings.catch_warnings(action="ignore", category=CoarsePhysicsWarning):
        return call(*arguments, **options)


def said(history, *words):
    return [text for text in history.warnings if all(word in text for word in words)]


# --- what was silently wrong ----------------------------------------------------------------------


@pytest.mark.slow
def test_a_learning_rate_that_falls_while_physics_are_coarse():
    """PRDP waits for a plateau, and by then nothing is learnt any more."""
    histories, true = {}, {}
    for name, refinement in {
        "converged": FixedRefinement(Tolerance(1e-10)),
        "prdp": ProgressiveRefinement(IterationLadder()),
        "discrepancy": DiscrepancyRefinement(),
    }.items():
        heat = Heat(refinement)
        histories[name] = quietly(heat.train, 60, gamma=0.3)
        true[name] = heat.true() ** 0.5
    assert true["prdp"] > 2 * true["converged"]
    prdp, discrepancy = histories["prdp"], histories["discrepancy"]
    (text,) = said(prdp, "after epoch 21 learning rates have fallen below a tenth of the start")
    assert "while physics are too coarse" in text
    assert said(prdp, "the metric is", "with the physics of the moment (", "% apart, where 5% are")
    assert not said(histories["converged"], "")
    # the rule that asks finer physics ends within 5 % of converged, and at a quarter of the cost
    assert true["discrepancy"] < 1.05 * true["converged"]
    assert discrepancy.iterations[-1] < histories["converged"].iterations[-1] / 4
    for history in histories.values():
        assert history.guard_iterations <= 0.03 * history.iterations[-1]


class Rods(Heat):
    """A source that is found from a solution, where conductivities differ by a thousand."""

    samples, held_back = 40, 10

    def __init__(self, refinement, method="richardson"):
        mesh = UnitSquareMesh(12, 12, comm=COMM_SELF)
        V = FunctionSpace(mesh, "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        source, u = Function(V), Function(V)
        x, y = SpatialCoordinate(mesh)
        k = conditional(sin(3 * pi * x) * sin(3 * pi * y) > 0.3, 1e3, 1.0)
        problem = LinearVariationalProblem(
            k * inner(grad(w), grad(v)) * dx, source * v * dx, u, bcs=DirichletBC(V, 0, 1)
        )
        self.refinement = refinement
        options = {"ksp_type": method, "pc_type": "jacobi"}
        if method == "richardson":
            options["ksp_richardson_scale"] = 0.7
        self.solver = LinearVariationalSolver(
            problem, refinement=refinement, solver_parameters=options
        )
        self.increment = SolverLayer(self.solver, [source])
        self.reference = SolverLayer(
            LinearVariationalSolver(problem, solver_parameters=CONVERGED), [source]
        )
        at = mesh.coordinates.dat.data_ro
        waves = [
            np.cos(np.pi * i * at[:, 0]) * np.cos(np.pi * j * at[:, 1])
            for i in range(4)
            for j in range(4)
        ]
        weights = np.random.default_rng(1).uniform(-1, 1, (self.samples + self.held_back, 16))
        with torch.no_grad():
            self.u2 = self.reference(torch.from_numpy(1 + weights @ np.array(waves)))
        torch.manual_seed(1)
        self.network = MLP(V.dim(), V.dim(), width=32, depth=1).double()
        self.validation = torch.arange(self.samples, len(self.u2))

    def errors(self, samples, solve):
        u = self.u2[samples]
        found = solve(self.network(u / self.u2.abs().mean()))
        return ((found - u) ** 2).sum(-1) / (u**2).sum(-1)


def test_a_ladder_that_is_stuck_at_a_few_iterations():
    """Each level gains less than tau_stop, though residuals have hardly fallen."""
    rods = Rods(ProgressiveRefinement(IterationLadder()))
    with pytest.warns(CoarsePhysicsWarning, match="the refinement has stopped there"):
        history = rods.train(100, rate=1e-3)
    assert rods.refinement.setting.iterations <= 5 and rods.true() > 10 * history.metric[-1]
    (text,) = said(history, "after epoch 100 the metric is", "apart, where 5% are allowed")
    assert "(this level gains less than tau_stop asks)" in text and "judge by the latter" in text
    (text,) = said(history, "after epoch 100 the refinement has stopped at", "residuals are still")
    assert "of the right-hand side" in text
    assert history.guard_iterations <= 0.03 * history.iterations[-1]


def test_a_rule_that_compares_neighbours_heeds_what_the_guard_finds():
    """Twice as many iterations tell nearly the same wrong metric."""
    alone, guarded = (Rods(DiscrepancyRefinement(IterationLadder())) for _ in "ab")
    quietly(alone.train, 100, rate=1e-3, guard=None)
    history = quietly(guarded.train, 100, rate=1e-3)
    assert alone.refinement.level < guarded.refinement.level
    # and it is not said to be right where 3 % of the iterations don't tell
    assert said(history, "after epoch 100 the metric is", "are not converged")


def test_levels_that_climb_beyond_the_floor():
    ladder = IterationLadder(start=5, step=20)
    heat = Heat(ScheduledRefinement(ladder, {0: 0, 2: 1, 4: 2, 6: 3}))
    history = quietly(heat.train, 12)
    assert history.settings[3] == "65 iterations"
    (text,) = said(history, "at the floor of their own rounding")
    assert "after epoch 12 solves end after" in text and "climbed to 65 iterations" in text
    # where the last level has been of use, nothing is said
    assert not said(quietly(Heat(ScheduledRefinement([5, 10], {3: 1})).train, 6), "at the floor")


# --- what it costs and leaves alone ---------------------------------------------------------------


@pytest.mark.parametrize(
    "make", [lambda: ProgressiveRefinement(), lambda: FixedRefinement(Iterations(3))]
)
def test_weights_and_history_are_those_without_it_to_the_bit(make):
    one, other = Heat(make()), Heat(make())
    guarded = quietly(one.train, 30, gamma=0.5)
    free = other.train(30, gamma=0.5, guard=None)
    for mine, theirs in zip(one.network.parameters(), other.network.parameters()):
        assert torch.equal(mine, theirs)
    assert guarded.guard_iterations > 0 and guarded.warnings and not free.warnings
    for name in ("metric", "level", "solves", "forward_iterations", "adjoint_iterations"):
        assert getattr(guarded, name) == getattr(free, name)
    assert one.refinement.state_dict() == other.refinement.state_dict()
    assert one.solver.statistics.solves == other.solver.statistics.solves


def test_random_numbers_are_those_without_it():
    heats = [Heat(FixedRefinement(Iterations(2))) for _ in "ab"]
    drawn = []
    for heat, guard in zip(heats, ("warn", None)):
        heat.network = torch.nn.Sequential(torch.nn.Dropout(0.1), heat.network)
        validate = heat.validate
        torch.manual_seed(3)

        def noisy(heat=heat, validate=validate):
            drawn.append(torch.rand(1).item())
            return validate()

        heat.validate = noisy
        quietly(heat.train, 5, guard=guard)
    assert drawn[:5] == drawn[6:] and drawn[5] == drawn[4]  # the end is assessed with equal ones


@pytest.mark.parametrize("iterations", [2, 4, 8])
@pytest.mark.parametrize("epochs", [15, 40])
def test_it_costs_three_percent_at_most(iterations, epochs):
    heat = Heat(FixedRefinement(Iterations(iterations)))
    history = quietly(heat.train, epochs)
    assert 0 < history.guard_iterations <= 0.03 * history.iterations[-1]


def test_converged_physics_cost_nothing():
    heat = Heat(FixedRefinement(Tolerance(1e-10)))
    with warnings.catch_warnings(action="error"):
        history = heat.train(3)
    assert history.guard_iterations == 0 and history.converged == [[3, history.metric[-1]]]


def test_what_it_finds_is_true():
    heat = Heat(FixedRefinement(Iterations(4)))
    history = quietly(heat.train, 60)
    epoch, metric = history.converged[-1]
    assert epoch == 60 and metric == pytest.approx(heat.true(), rel=1e-6)
    assert [epoch for epoch, _ in history.converged] == sorted({e for e, _ in history.converged})
    assert len(history.converged) <= 21


# --- what is asked of it --------------------------------------------------------------------------


def test_it_can_be_an_error():
    heat = Heat(FixedRefinement(Iterations(1)))
    with pytest.raises(CoarsePhysicsWarning, match="the refinement has stopped there.*no other le"):
        try:
            heat.train(40, guard="error")
        except CoarsePhysicsWarning as error:
            assert 1 < len(error.history) < 40 and str(error) in error.history.warnings
            raise
    # on the way, while it may refine, it is none
    heat = Heat(ProgressiveRefinement(IterationLadder()))
    with pytest.raises(CoarsePhysicsWarning, match="after epoch 10 "):
        heat.train(10, guard="error")


def test_it_can_be_switched_off():
    heat = Heat(FixedRefinement(Iterations(1)))
    with warnings.catch_warnings(action="error"):
        history = heat.train(10, guard=None)
    assert history.converged == [] and history.guard_iterations == 0
    for wrong in ("off", False, True, 1):
        with pytest.raises(ValueError, match='guard must be "warn", "error" or None'):
            heat.train(1, guard=wrong)


def test_it_is_said_once_and_at_the_end():
    heat = Heat(FixedRefinement(Iterations(1)))
    with pytest.warns(CoarsePhysicsWarning) as caught:
        history = heat.train(100)
    assert [str(one.message) for one in caught] == history.warnings
    assert {one.filename for one in caught} == {__file__}
    assert len(said(history, "the metric is")) == 2
    assert history.warnings[-1].startswith("after epoch 100 the metric is")


def test_a_solver_that_fails_when_it_goes_on_is_no_end():
    heat = Heat(FixedRefinement(Iterations(3)))
    calls, validate = [], heat.validate

    def fails():
        calls.append(heat.refinement.setting)
        if heat.refinement.setting != Iterations(3):
            raise ConvergenceError("the forward solve failed")
        return validate()

    heat.validate = fails
    history = quietly(heat.train, 5)
    assert len(history) == 5 and len(calls) == 6
    (text,) = history.warnings
    assert "after epoch 5 the metric could not be assessed" in text and "solve failed" in text


# --- other solvers, and ranks ---------------------------------------------------------------------


def test_newtons_method():
    V = FunctionSpace(UnitIntervalMesh(20, comm=COMM_SELF), "CG", 1)
    u, v, f = Function(V), TestFunction(V), Function(V)
    F = ((1 + 10 * u**2) * inner(grad(u), grad(v)) - f * v) * dx
    problem = NonlinearVariationalProblem(F, u, bcs=DirichletBC(V, 0, "on_boundary"))
    refinement = FixedRefinement(NewtonLadder(stop=1, linear=[3])[0])
    solver = NonlinearVariationalSolver(
        problem, refinement=refinement, warm_start=False, solver_parameters=GMRES
    )
    physics = SolverLayer(solver, [f])
    network = MLP(V.dim(), V.dim(), width=8).double()
    x = torch.linspace(1, 20, 12, dtype=torch.float64)[:, None].expand(-1, V.dim())
    target = 0.3 * to_torch(Function(V).interpolate(sin(pi * SpatialCoordinate(V.mesh())[0])))

    def errors(samples):
        return ((physics(network(x[samples])) - target) ** 2).sum(-1) / (target**2).sum()

    with pytest.warns(CoarsePhysicsWarning, match="with the physics of the moment .1 Newton step"):
        history = train(
            network,
            lambda samples: errors(samples).mean(),
            lambda: errors(torch.arange(10, 12)).mean().item(),
            optimiser=torch.optim.Adam(network.parameters(), 1e-2),
            refinement=refinement,
            solvers=[solver],
            samples=10,
            batch_size=5,
            epochs=100,
            progress=False,
        )
    assert 0 < history.guard_iterations <= 0.03 * history.iterations[-1]


@pytest.mark.parallel([2, 3])
def test_all_ranks_find_the_same():
    """Each trains the same, and ranks add up gradients and counts."""
    heat = Heat(ProgressiveRefinement(IterationLadder(), comm=COMM_WORLD))
    history = quietly(heat.train, 30, gamma=0.3, comm=COMM_WORLD)
    found = json.dumps([history.warnings, history.converged, history.guard_iterations])
    assert COMM_WORLD.allgather(found) == [found] * COMM_WORLD.size
    assert said(history, "learning rates have fallen below a tenth")
    assert history.guard_iterations <= 0.03 * history.iterations[-1]


@pytest.mark.parallel([2])
def test_members_of_an_ensemble_find_what_one_rank_finds():
    ensemble = Ensemble(COMM_WORLD, 1)
    alone = Heat(ProgressiveRefinement(IterationLadder(), comm=COMM_WORLD))
    expected = quietly(alone.train, 40, comm=COMM_WORLD)
    heat = Heat(ProgressiveRefinement(IterationLadder(), comm=COMM_WORLD), ensemble.comm)
    mine = deal(heat.validation, ensemble)

    def validate():
        return total(heat.errors(mine, heat.increment).sum(), COMM_WORLD).item() / heat.held_back

    heat.validate = validate
    history = quietly(heat.train, 40, ensemble=ensemble)
    assert history.guard_iterations == pytest.approx(expected.guard_iterations, rel=0.02)
    assert len(history.warnings) == len(expected.warnings) > 0
    assert history.iterations[-1] == expected.iterations[-1]


@pytest.mark.parallel([2])
def test_ranks_that_ask_for_other_guards():
    heat = Heat(FixedRefinement(Iterations(1), comm=COMM_WORLD))
    with pytest.raises(ValueError, match="guards"):
        heat.train(1, comm=COMM_WORLD, guard=["warn", "error"][COMM_WORLD.rank])


# --- a rule that is told how to validate ----------------------------------------------------------


def test_training_tells_a_rule_how_to_validate():
    heat = Heat(DiscrepancyRefinement([1, 2, 4], gap=0.2))
    calls, validate = [], heat.validate

    def noted():
        calls.append(heat.refinement.setting.iterations)
        return validate()

    heat.validate = noted
    history = heat.train(4, guard=None)
    levels = [*history.level, heat.refinement.level]
    finer = {1: 2, 2: 4}
    assert calls[:2] == [1, 2]
    expected = []
    for level in history.level:
        now = [1, 2, 4][level]
        expected += [now, finer[now]] if now in finer else [now]
    assert calls == expected and levels[-1] > 0
    assert [record.metric for record in heat.refinement.history] == history.metric
    # what the comparison takes is the run's, of each epoch
    assert history.solves[0] == heat.samples + 2 * heat.held_back


# --- what is kept ---------------------------------------------------------------------------------


def test_histories_and_runs_keep_it(tmp_path):
    heat = Heat(FixedRefinement(Iterations(2)))
    history = quietly(heat.train, 100)
    assert history.warnings and history.converged
    plain = json.loads(json.dumps(dataclasses.asdict(history)))
    assert History.from_plain(plain) == history
    path = tmp_path / "run.json"
    Run("heat", "4", 1, history).write(path)
    assert json.loads(path.read_text())["warnings"] == history.warnings
    assert Run.read(path).history == history
    # those of earlier versions have none of it
    older = {name: plain[name] for name in plain if name not in GUARDS}
    assert History.from_plain(older) == dataclasses.replace(
        history, converged=[], warnings=[], guard_iterations=0
    )


GUARDS = ("converged", "warnings", "guard_iterations")


@pytest.mark.parametrize(
    "name, value",
    [
        ("converged", [1.0]),
        ("converged", [[1, "a"]]),
        ("converged", [[1.5, 2.0]]),
        ("converged", {}),
        ("warnings", [1]),
        ("warnings", "text"),
        ("guard_iterations", -1),
        ("guard_iterations", 1.5),
    ],
)
def test_histories_that_hold_something_else(name, value):
    plain = json.loads(json.dumps(dataclasses.asdict(quietly(small_history))))
    with pytest.raises(ValueError, match=f"{name} must be"):
        History.from_plain({**plain, name: value})


def small_history():
    return Heat(FixedRefinement(Iterations(1))).train(1)
