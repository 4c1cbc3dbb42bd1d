"""The training loop: epochs of batches, a validation after each, and a refinement that is told its result."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from mpi4py import MPI
from tqdm import tqdm

from prdp_fem.history import Account, History
from prdp_fem.refinement import Refinement

__all__ = ["train"]


def train(network: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], validate: Callable[[], float], *,
          optimiser: torch.optim.Optimizer, refinement: Refinement, solvers: Iterable, samples: int, batch_size: int, epochs: int,
          seed: int = 0, scheduler: torch.optim.lr_scheduler.LRScheduler | None = None, comm: MPI.Comm = MPI.COMM_SELF,
          label: str = "training", progress: bool = True) -> History:
    """Train a network, and refine the physics that it is trained through.

    After each epoch the validation metric is recorded, and handed to ``refinement``, which the solvers inside ``loss`` and
    ``validate`` follow. The order of the samples depends on ``seed`` only, so that runs under different refinements see the same
    batches.

    In parallel each rank holds the whole network and computes its part of the loss: one reduction per step adds up the parts of
    the gradient.

    Parameters
    ----------
    network : torch.nn.Module
        Whose parameters are trained; equal on all ranks. Its gradients are kept in one array for each type of number.
    loss : callable
        From sample numbers (a tensor of integers, shape (batch,)) to this rank's part of the loss: the sum over the ranks is the
        loss.
    validate : callable
        Returns the metric, finite and not negative, the same on all ranks; lower is better. Called without gradients, at the
        physics of the epoch.
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
        The ranks that share the samples' unknowns.
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
        For counts below one, for a network without parameters, and where the metric is negative or not finite: training has diverged.
    """
    for name, count in (("samples", samples), ("batch_size", batch_size), ("epochs", epochs)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, found {count!r}")
    order = torch.Generator().manual_seed(seed)
    gradients = _flat_gradients(network)
    history, account = History(), Account(solvers, comm)
    bar = tqdm(range(epochs), desc=label, unit="epoch", mininterval=0.5, disable=not progress or comm.rank > 0)
    for _ in bar:
        network.train()
        for batch in torch.randperm(samples, generator=order).split(batch_size):
            for gradient in gradients:
                gradient.zero_()
            loss(batch).backward()
            if comm.size > 1:
                for gradient in gradients:
                    comm.Allreduce(MPI.IN_PLACE, gradient.numpy())
            optimiser.step()
        network.eval()
        with torch.no_grad():
            metric = validate()
        history.record(metric, refinement, account)
        refinement.step(metric)
        if scheduler is not None:
            scheduler.step()
        bar.set_postfix(metric=f"{metric:.3e}", level=refinement.level, physics=refinement.setting, refresh=False)
    return history


def _flat_gradients(network: torch.nn.Module) -> list[torch.Tensor]:
    """One array for the gradients of all parameters of a type, to be zeroed and reduced at once; the gradients are parts of it."""
    parameters: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameters.setdefault(parameter.dtype, []).append(parameter)
    if not parameters:
        raise ValueError("the network has no parameters to train")
    gradients = []
    for dtype, group in parameters.items():
        sizes = [parameter.numel() for parameter in group]
        gradients.append(torch.zeros(sum(sizes), dtype=dtype))
        for parameter, part in zip(group, gradients[-1].split(sizes)):
            parameter.grad = part.view_as(parameter)
    return gradients
