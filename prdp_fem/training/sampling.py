"""Samples and batches: in the order of a seed, and dealt out to members of an ensemble."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral

import torch
from firedrake import Ensemble
from mpi4py import MPI

from prdp_fem.arguments import instance, shown, whole_number
from prdp_fem.ranks.agreement import agree

__all__ = ["EnsembleSampler", "deal"]


def deal(samples: torch.Tensor, ensemble: Ensemble | None) -> torch.Tensor:
    """A member's part of some samples, as even as can be.

    Parameters
    ----------
    samples : torch.Tensor
        Sample numbers, or what there is for each sample, along the first axis; the same on all
        ranks.
    ensemble : firedrake.Ensemble or None
        None for a single member.

    Returns
    -------
    torch.Tensor
        Neighbours in ``samples``; those of all members, one behind the other, are ``samples``.

    Raises
    ------
    TypeError, ValueError
        For what has no samples along a first axis, and for another ensemble than Firedrake's.
    """
    instance("samples", samples, torch.Tensor, "a tensor of sample numbers")
    if samples.ndim == 0:
        raise ValueError(f"samples must lie along an axis, found {shown(samples)}")
    _check_ensemble(ensemble)
    if ensemble is None:
        return samples
    return samples.tensor_split(ensemble.ensemble_size)[ensemble.ensemble_rank]


class EnsembleSampler:
    """Batches of an epoch, and of each the part that a member of an ensemble works on.

    Each iteration over it is an epoch. Which samples make a batch depends on the seed alone; so
    training is the same on any number of members, where each weights its part of the loss by its
    share.

    Parameters
    ----------
    samples : int
        How many there are.
    batch_size : int
        Samples of a batch, of all members together.
    seed : int
        Of the order of the samples.
    ensemble : firedrake.Ensemble or None
        None for a single member.

    Raises
    ------
    TypeError, ValueError
        For counts below one, for what are no integers, and for another ensemble than Firedrake's;
        on all ranks, where they differ.

    Examples
    --------
    >>> for samples, share in EnsembleSampler(200, 20, seed=1, ensemble=ensemble):  # doctest: +SKIP
    ...     if share:  # the mean over no samples is no number
    ...         (share*loss(samples)).backward()
    """

    def __init__(
        self, samples: int, batch_size: int, *, seed: int = 0, ensemble: Ensemble | None = None
    ):
        _check_ensemble(ensemble)
        agree(
            MPI.COMM_SELF if ensemble is None else ensemble.global_comm,
            lambda: _checked(samples, batch_size, seed),
            "numbers of samples, batch sizes and seeds",
        )
        self._samples = int(samples)
        self._batch_size = int(batch_size)
        self._ensemble = ensemble
        self._order = torch.Generator().manual_seed(int(seed))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-self._samples // self._batch_size)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, float]]:
        """Sample numbers of this member, and their share of the batch; none where a batch is
        smaller than the ensemble.
        """
        for batch in torch.randperm(self._samples, generator=self._order, device="cpu").split(
            self._batch_size
        ):
            mine = deal(batch, self._ensemble)
            yield mine, len(mine) / len(batch)


def _check_ensemble(ensemble: Ensemble | None) -> None:
    instance(
        "ensemble",
        ensemble,
        (Ensemble, type(None)),
        "a firedrake.Ensemble, or None for a single member",
    )


def _checked(samples: int, batch_size: int, seed: int) -> tuple[int, int, int]:
    for name, count in (("samples", samples), ("batch_size", batch_size)):
        if isinstance(count, Integral) and count < 1:
            raise ValueError(f"{name} must be at least 1, found {count!r}")
    # PyTorch's seeds have 64 bits.
    return (
        whole_number("samples", samples),
        whole_number("batch_size", batch_size),
        whole_number("seed", seed, -(2**63), 2**64 - 1),
    )
