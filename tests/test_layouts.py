"""Training on meshes over ranks and samples over members: the same as on one rank."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from firedrake import *
from jobs import run_ranks

from prdp_fem import IterationLadder, LinearVariationalSolver, ProgressiveRefinement
from prdp_fem.torch import (
    MLP,
    EnsembleSampler,
    Gathering,
    GraphNetwork,
    Partition,
    SolverLayer,
    deal,
    shared,
    total,
    train,
)

torch.set_num_threads(1)

HERE = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_layouts"""


def losses(ensemble, network, cells=(5, 4)):
    """The history of an emulator's training on the square: 20 steps of the optimiser, and a
    validation after every other.
    """
    V = FunctionSpace(UnitSquareMesh(*cells, comm=ensemble.comm), "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    u0, u = Function(V), Function(V)
    problem = LinearVariationalProblem(
        (w * v + 1e-2 * inner(grad(w), grad(v))) * dx,
        u0 * v * dx,
        u,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    refinement = ProgressiveRefinement(
        IterationLadder(start=1, step=2), ema_window=2, error_window=1, comm=ensemble.global_comm
    )
    solver = LinearVariationalSolver(
        problem, refinement=refinement, solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"}
    )
    physics = SolverLayer(solver, [u0])
    field = Gathering(V)
    samples = torch.randn(
        9, len(field), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    references = field.scatter(0.5 * samples)
    torch.manual_seed(3)
    if network == "dense":
        layers = MLP(len(field), len(field), width=6).double()
        emulator = lambda u: field.scatter(u + layers(u))  # noqa: E731
    else:
        own = Partition(V)
        layers = GraphNetwork(
            1, 1, own.edges, own.coordinates, halo=own.halo, width=4, steps=2
        ).double()

        def emulator(u):
            return field.scatter(u) + layers(field.scatter(u)[..., None, :])[..., 0, :]

    def errors(numbers):
        return ((physics(emulator(samples[numbers])) - references[numbers]) ** 2).sum(-1)

    validation = deal(torch.arange(6, 9), ensemble)
    history = train(
        layers,
        lambda numbers: errors(numbers).mean(),
        lambda: total(errors(validation).sum(), ensemble.global_comm).item() / 3,
        optimiser=torch.optim.Adam(layers.parameters(), 1e-2),
        refinement=refinement,
        solvers=[solver],
        samples=6,
        batch_size=5,
        epochs=10,
        seed=2,
        ensemble=ensemble,
        progress=False,
    )
    assert history.level[-1] > 0  # the refinement has decided something
    return history


def control(ensemble):
    """The history of a network that finds a diffusivity, a Constant, for each of some loads, from
    the mean temperature that it leads to.
    """
    V = FunctionSpace(UnitSquareMesh(5, 4, comm=ensemble.comm), "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    diffusivity = Constant(1.0)
    load = Constant(1.0)
    u = Function(V)
    problem = LinearVariationalProblem(
        diffusivity * inner(grad(w), grad(v)) * dx, load * v * dx, u, bcs=DirichletBC(V, 0, 1)
    )
    refinement = ProgressiveRefinement(
        IterationLadder(start=4, step=2), ema_window=2, error_window=1, comm=ensemble.global_comm
    )
    solver = LinearVariationalSolver(
        problem, refinement=refinement, solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"}
    )
    physics = SolverLayer(solver, [diffusivity, load], output=[u, u * dx])
    loads = torch.linspace(1, 2, 8, dtype=torch.float64)[:, None]
    torch.manual_seed(3)
    network = MLP(1, 1, width=4).double()

    def errors(numbers):
        field, mean = physics(
            1 + shared(network(loads[numbers]), ensemble.comm) ** 2, loads[numbers]
        )
        return (field**2).sum(-1), (mean - 0.3) ** 2

    def loss(numbers):
        # of the field each rank has its part, and the functional, which is whole, counts once
        part, whole = errors(numbers)
        return (1e-3 * part + whole).mean()

    mine = deal(torch.arange(8), ensemble)
    history = train(
        network,
        loss,
        lambda: ensemble.ensemble_comm.allreduce(errors(mine)[1].sum().item()) / 8,
        optimiser=torch.optim.Adam(network.parameters(), 1e-2),
        refinement=refinement,
        solvers=[solver],
        samples=8,
        batch_size=5,
        epochs=10,
        ensemble=ensemble,
        progress=False,
    )
    assert history.metric[-1] != history.metric[0]
    return history


def check_against_one_rank(members, network):
    train_on = control if network == "control" else partial(losses, network=network)
    found = train_on(Ensemble(COMM_WORLD, COMM_WORLD.size // members))
    expected = train_on(Ensemble(COMM_SELF, 1))
    np.testing.assert_allclose(found.metric, expected.metric, rtol=1e-9, atol=0)
    assert (
        found.level == expected.level
        and found.iterations == expected.iterations
        and found.solves == expected.solves
    )
    everywhere = COMM_WORLD.allgather(found.metric)
    assert all(metric == everywhere[0] for metric in everywhere)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("network", ["dense", "graph", "control"])
def test_a_mesh_over_all_ranks(network):
    check_against_one_rank(1, network)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("network", ["dense", "graph", "control"])
def test_samples_over_all_ranks(network):
    check_against_one_rank(COMM_WORLD.size, network)


def test_two_members_of_two_ranks():
    job = run_ranks(
        4,
        f"""{HERE}
for network in ("dense", "graph", "control"):
    test_layouts.check_against_one_rank(2, network)""",
    )
    assert job.status == 0, job.output


def test_two_runs_on_a_layout_give_the_same_bits():
    # So few epochs are too few for the guard, whose warnings are not what is compared.
    script = f"""{HERE}
import warnings
from firedrake import *
warnings.simplefilter("ignore")
history = test_layouts.losses(Ensemble(COMM_WORLD, COMM_WORLD.size), "graph", cells=(20, 20))
if COMM_WORLD.rank == 0:
    print([metric.hex() for metric in history.metric])"""
    first, second = (run_ranks(2, script) for _ in range(2))
    assert first.status == 0 and len(first.output.split(",")) == 10, first.output
    assert first.output == second.output


@pytest.mark.parallel([1, 2, 3])
def test_each_batch_is_dealt_out_whole():
    ensemble = Ensemble(COMM_WORLD, 1)
    sampler, alone = EnsembleSampler(8, 3, seed=4, ensemble=ensemble), EnsembleSampler(8, 3, seed=4)
    assert len(sampler) == 3
    for _ in range(2):
        for (mine, share), (batch, whole) in zip(sampler, alone, strict=True):
            everywhere = ensemble.ensemble_comm.allgather(mine.tolist())
            assert sum(everywhere, []) == batch.tolist() and whole == 1
            assert max(map(len, everywhere)) - min(map(len, everywhere)) <= 1
            assert share == len(mine) / len(batch)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "samples",
    [torch.arange(15).reshape(5, 3) / 7, torch.arange(5) % 2 == 0],
    ids=["numbers", "marks"],
)
def test_what_there_is_for_each_sample_is_dealt_out_as_their_numbers_are(samples):
    ensemble = Ensemble(COMM_WORLD, 1)
    assert deal(samples, ensemble).equal(samples[deal(torch.arange(5), ensemble)])


@pytest.mark.parallel([2, 3])
def test_members_that_have_other_things_in_mind():
    ensemble = Ensemble(COMM_WORLD, 1)
    with pytest.raises(
        ValueError, match="numbers of samples, batch sizes and seeds must be the same on all ranks"
    ):
        EnsembleSampler(8, 3, seed=COMM_WORLD.rank, ensemble=ensemble)


def test_bad_counts():
    for samples, batch_size, message in (
        (0, 1, "samples must be at least 1, found 0"),
        (3, 0, "batch_size must be at least 1, found 0"),
    ):
        with pytest.raises(ValueError, match=message):
            EnsembleSampler(samples, batch_size)
