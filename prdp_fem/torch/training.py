"""The training loop: epochs of batches, a validation after each, and a refinement that is told its result."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from firedrake import Ensemble
from mpi4py import MPI
from tqdm import tqdm

from prdp_fem.history import Account, History
from prdp_fem.parallel import agree
from prdp_fem.refinement import Refinement
from prdp_fem.torch.reduction import GradientReduction, check_replicas
from prdp_fem.torch.sampling import EnsembleSampler

__all__ = ["train"]


def train(network: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], validate: Callable[[], float], *,
          optimiser: torch.optim.Optimizer, refinement: Refinement, solvers: Iterable, samples: int, batch_size: int, epochs: int,
          seed: int = 0, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None, comm: MPI.Comm = MPI.COMM_SELF,
          ensemble: Ensemble | None = None, label: str = "training", progress: bool = True) -> History:
    """Train a network, and refine the physics that it is trained through.

    After each epoch the validation metric is recorded, and handed to ``refinement``, which the solvers inside ``loss`` and
    ``validate`` follow. The order of the samples depends on ``seed`` only, so that runs under different refinements see the same
    batches.

    In parallel each rank holds the whole network and computes its part of the loss, and the parts of the gradient are added up. Ranks
    can share the unknowns of each sample (``comm``), and groups of them the samples of each batch, too (``ensemble``). The result is that
    of one rank, up to the order in which numbers are added.

    Parameters
    ----------
    network : torch.nn.Module
        Whose parameters are trained; equal on all ranks. Its gradients are kept in a few arrays.
    loss : callable
        From sample numbers (a tensor of integers, shape (batch,)) to this rank's part of the loss: the sum over the ranks that share the
        unknowns is the loss. A functional that a solver layer returns is whole on each rank, and counts once: it is not divided. What all
        ranks have alike goes to a layer by :func:`~prdp_fem.torch.shared`. With an ensemble the loss must be a mean over the samples, and
        not be collective on all ranks: a member without samples, of a batch that is smaller than the ensemble, does not call it.
    validate : callable
        Returns the metric, finite and not negative; lower is better. That of rank 0 counts. Called without gradients, at the physics of
        the epoch.
    optimiser : torch.optim.Optimizer
    refinement : Refinement
    solvers : iterable of LinearVariationalSolver or NonlinearVariationalSolver
        Whose iterations and seconds are counted.
    samples : int
        Number of training samples.
    batch_size : int
        Samples for each step of the optimiser.
    epochs : int
    seed : int
        Of the order of the samples.
    scheduler : torch.optim.lr_scheduler.LRScheduler or None
        Called after each epoch.
    comm : mpi4py.MPI.Comm
        The ranks that share the samples' unknowns; left aside where there is an ensemble.
    ensemble : firedrake.Ensemble or None
        Its members deal the samples of each batch out among them; the ranks of a member share the unknowns.
    label : str
        What the progress bar says.
    progress : bool
        Whether rank 0 shows a progress bar.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        For counts below one, for a network without parameters, for an optimiser that has others, for a mesh on other ranks, where ranks
        have different networks, and where the metric is negative or not finite: training has diverged.
    """
    members = MPI.COMM_SELF
    if ensemble is not None:
        comm, members = ensemble.global_comm, ensemble.ensemble_comm
    solvers = list(solvers)

    def alike() -> tuple:
        _check(network, optimiser, solvers, comm if ensemble is None else ensemble.comm, epochs)
        return epochs, samples, batch_size, seed, refinement.level, refinement.setting

    agree(comm, alike, "epochs, samples, batch sizes, seeds and levels of refinement")
    sampler = EnsembleSampler(samples, batch_size, seed=seed, ensemble=ensemble)
    history, account = History(), Account(solvers, comm, members)
    bar = tqdm(range(epochs), desc=label, unit="epoch", mininterval=0.5, disable=not progress or comm.rank > 0)
    with GradientReduction(network, comm) as gradients:
        check_replicas(network, optimiser, comm)
        for _ in bar:
            network.train()
            for batch, share in sampler:
                gradients.zero()
                if share:
                    part = loss(batch)
                    (part if share == 1 else share*part).backward()
                gradients.finish()
                optimiser.step()
            check_replicas(network, optimiser, comm)
            network.eval()
            with torch.no_grad():
                metric = comm.bcast(validate())  # those of ranks may differ by rounding, and decisions must not
            history.record(metric, refinement, account)
            refinement.step(metric)
            if scheduler is not None:
                scheduler.step()
            bar.set_postfix(metric=f"{metric:.3e}", level=refinement.level, physics=refinement.setting, refresh=False)
    return history


def _check(network, optimiser, solvers, comm: MPI.Comm, epochs: int) -> None:
    """Raise for what a rank can see alone; the ranks of ``comm`` share the unknowns."""
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, found {epochs!r}")
    known = {id(parameter) for parameter in network.parameters()}
    optimised = [parameter for group in optimiser.param_groups for parameter in group["params"] if parameter.requires_grad]
    if known and any(id(parameter) not in known for parameter in optimised):
        raise ValueError("the optimiser has parameters that are not the network's: make them parts of one torch.nn.Module")
    for solver in solvers:
        if (ranks := solver.problem.u.function_space().mesh().comm.size) != comm.size and ranks > 1:
            raise ValueError(f"the mesh of '{solver.problem.u.name()}' is on {ranks} ranks, and training on {comm.size}: give "
                             "comm=mesh.comm, or the ensemble that the mesh was made on")
