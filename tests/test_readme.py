"""The README's examples run as printed."""

import re
from pathlib import Path

import pytest
import torch
from firedrake import *
from problems import CG, HeatStep

import prdp_fem
from prdp_fem import FixedRefinement, Iterations

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


TRAINING, LOOP, NEWTON, UNROLLED, CONTROL, EXCHANGE = re.findall(
    r"```python\n(.*?)```", README, re.DOTALL
)


def run(script, variables):
    exec(compile(script, "README.md", "exec"), variables)
    return variables


def test_the_training_script_runs_as_printed(capsys):
    torch.manual_seed(1)
    variables = run(TRAINING, {})
    refinement = variables["refinement"]
    assert len(refinement.history) == 100 and refinement.level > 0
    assert refinement.history[-1].metric < refinement.history[0].metric
    assert "iterations" in capsys.readouterr().out
    history = run(LOOP, variables)["history"]
    assert len(history) == 30 and history.metric[-1] < 0.1 * history.metric[0]


def test_the_other_scripts_run_as_printed():
    problem = HeatStep()
    v = TestFunction(problem.V)
    nonlinear = NonlinearVariationalProblem(
        ((1 + problem.u**2) * inner(grad(problem.u), grad(v)) + (problem.u - problem.u0) * v) * dx,
        problem.u,
    )
    solver = run(NEWTON, {**vars(prdp_fem), "problem": nonlinear})["solver"]
    solver.solve()
    assert (solver.statistics.newton_steps, solver.statistics.forward_iterations) == (1, 4)
    refinement = FixedRefinement(Iterations(3))
    stock = LinearVariationalSolver(problem.problem, solver_parameters=CG)
    run(CONTROL, {"prdp_fem": prdp_fem, "solver": stock, "refinement": refinement})
    exchanged = run(
        EXCHANGE,
        {
            "prdp_fem": prdp_fem,
            "problem": problem.problem,
            "parameters": CG,
            "refinement": refinement,
        },
    )["solver"]
    names = {
        "LinearVariationalSolver": prdp_fem.LinearVariationalSolver,
        "problem": problem.problem,
        "parameters": CG,
    }
    unrolled = run(UNROLLED, {**names, "refinement": refinement})["solver"]
    for solver in (stock, exchanged, unrolled):
        solver.solve()
        assert solver.statistics.forward_iterations == 3


@pytest.mark.parallel([1, 2, 3])
def test_the_script_for_many_ranks_runs_as_printed():
    (script,) = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), re.DOTALL
    )
    variables = run(script, {})
    history = variables["history"]
    assert len(history) == 20 and history.metric[-1] < 0.9 * history.metric[0]
    metrics = COMM_WORLD.allgather(history.metric)
    assert all(metric == metrics[0] for metric in metrics)


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/gpu.md", "docker/README.md"]
)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
        assert ((ROOT / page).parent / target).exists(), target


def test_offloaded_preconditioners_are_refined_as_printed():
    script = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "gpu.md").read_text(), re.DOTALL)[
        -1
    ]
    problem = HeatStep()
    names = {
        "LinearVariationalSolver": prdp_fem.LinearVariationalSolver,
        "problem": problem.problem,
    }
    solver = run(script, {**names, "refinement": FixedRefinement(Iterations(3))})["solver"]
    solver.solve()
    assert solver.statistics.forward_iterations == 3
