"""Training on meshes over ranks and samples over members: the same as on one rank."""
from pathlib import Path

import numpy as np
import pytest
import torch
from firedrake import *
from jobs import run_ranks

from prdp_fem import IterationLadder, LinearVariationalSolver, ProgressiveRefinement
from prdp_fem.torch import MLP, EnsembleSampler, Gathering, GraphNetwork, Partition, SolverLayer, deal, total, train

torch.set_num_threads(1)


def losses(ensemble, network):
    """Validation errors of an emulator after each of 20 steps of the optimiser, on the square."""
    V = FunctionSpace(UnitSquareMesh(5, 4, comm=ensemble.comm), "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    u0, u = Function(V), Function(V)
    problem = LinearVariationalProblem((w*v + 1e-2*inner(grad(w), grad(v)))*dx, u0*v*dx, u, bcs=DirichletBC(V, 0, "on_boundary"))
    refinement = ProgressiveRefinement(IterationLadder(start=1, step=2), ema_window=2, error_window=1, comm=ensemble.global_comm)
    solver = LinearVariationalSolver(problem, refinement=refinement, solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"})
    physics = SolverLayer(solver, [u0])
    field = Gathering(V)
    samples = torch.randn(9, len(field), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    references = field.scatter(0.5*samples)
    torch.manual_seed(3)
    if network == "dense":
        layers = MLP(len(field), len(field), width=6).double()
        emulator = lambda u: field.scatter(u + layers(u))  # noqa: E731
    else:
        own = Partition(V)
        layers = GraphNetwork(1, 1, own.edges, own.coordinates, halo=own.halo, width=4, steps=2).double()
        emulator = lambda u: field.scatter(u) + layers(field.scatter(u)[..., None, :])[..., 0, :]  # noqa: E731

    def errors(numbers):
        return ((physics(emulator(samples[numbers])) - references[numbers])**2).sum(-1)

    validation = deal(torch.arange(6, 9), ensemble)
    history = train(layers, lambda numbers: errors(numbers).mean(), lambda: total(errors(validation).sum(), ensemble.global_comm).item()/3,
                    optimiser=torch.optim.Adam(layers.parameters(), 1e-2), refinement=refinement, solvers=[solver], samples=6, batch_size=5,
                    epochs=10, seed=2, ensemble=ensemble, progress=False)
    assert history.level[-1] > 0  # the refinement has decided something
    return history


def check_against_one_rank(members, network):
    found, expected = losses(Ensemble(COMM_WORLD, COMM_WORLD.size//members), network), losses(Ensemble(COMM_SELF, 1), network)
    np.testing.assert_allclose(found.metric, expected.metric, rtol=1e-9, atol=0)
    assert found.level == expected.level and found.iterations == expected.iterations and found.solves == expected.solves
    everywhere = COMM_WORLD.allgather(found.metric)
    assert all(metric == everywhere[0] for metric in everywhere)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("network", ["dense", "graph"])
def test_a_mesh_over_all_ranks(network):
    check_against_one_rank(1, network)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize("network", ["dense", "graph"])
def test_samples_over_all_ranks(network):
    check_against_one_rank(COMM_WORLD.size, network)


def test_two_members_of_two_ranks():
    job = run_ranks(4, f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_layouts
for network in ("dense", "graph"):
    test_layouts.check_against_one_rank(2, network)""", timeout=200)
    assert job.status == 0, job.output


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
            assert share == len(mine)/len(batch)


@pytest.mark.parallel([2, 3])
def test_members_that_have_other_things_in_mind():
    ensemble = Ensemble(COMM_WORLD, 1)
    with pytest.raises(ValueError, match="numbers of samples, batch sizes and seeds must be the same on all ranks"):
        EnsembleSampler(8, 3, seed=COMM_WORLD.rank, ensemble=ensemble)


def test_bad_counts():
    for samples, batch_size, message in ((0, 1, "samples must be at least 1, found 0"), (3, 0, "batch_size must be at least 1, found 0")):
        with pytest.raises(ValueError, match=message):
            EnsembleSampler(samples, batch_size)
