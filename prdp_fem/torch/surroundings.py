"""What calls of a layer depend on beside their tensors, and what tells whether it is the same."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI

from prdp_fem.problem.inputs import same_bits
from prdp_fem.ranks.threads import one_thread
from prdp_fem.refinement.ladders import Setting, in_words
from prdp_fem.torch.placement import CPU

__all__ = ["MADE_ANEW", "Surroundings", "check_number"]

MADE_ANEW = (
    "a SolverLayer was called again for its backward pass, by a checkpoint or a transform of"
    " torch.func, and its setting, or coefficients that are no controls, are others than in the"
    " forward pass: call backward before changing them, or make the coefficients controls"
)


class Surroundings:
    """What calls of a layer depend on beside their tensors: a setting, and the values of
    coefficients, which seldom change.

    Calls share the arrays that are equal to those of the call before. What a checkpoint computes
    again to have what a backward pass needs must be what was computed at first: a number tells.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks that make the calls together.

    Attributes
    ----------
    lock : context manager
        What one thread at a time is in.
    number : torch.Tensor or None
        Of the last call, made from setting and values.
    """

    def __init__(self, comm: MPI.Comm):
        self.lock = one_thread(comm)
        self.number: torch.Tensor | None = None
        self._setting: Setting | None = None
        self._arrays: list[np.ndarray] = []
        self._checksums: list[int] = []
        self._saved: list[torch.Tensor] = []

    def saved(self, setting: Setting | None, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The number and the arrays as tensors, for ``save_for_backward``."""
        is_other = setting is not self._setting and setting != self._setting
        if is_other or not self._saved or len(arrays) != len(self._arrays):
            self._renew(setting, arrays, [_checksum(array) for array in arrays])
        else:
            for new, old in zip(arrays, self._arrays):
                if new is not old and not (new.size == old.size and same_bits(new, old)):
                    self._replace(setting, arrays)
                    break
        return self._saved

    def _replace(self, setting: Setting | None, arrays: Sequence[np.ndarray]) -> None:
        """Have other arrays in place of those that have changed."""
        shared, checksums = [], []
        for new, old, checksum in zip(arrays, self._arrays, self._checksums):
            is_same = new is old or (new.size == old.size and same_bits(new, old))
            shared.append(old if is_same else new)
            checksums.append(checksum if is_same else _checksum(new))
        self._renew(setting, shared, checksums)

    def _renew(
        self, setting: Setting | None, arrays: Sequence[np.ndarray], checksums: list[int]
    ) -> None:
        self._setting = setting
        self._arrays = list(arrays)
        self._checksums = checksums
        # Small enough for hooks that convert all tensors to float32.
        number = zlib.crc32(f"{in_words(setting)} {checksums}".encode()) % 2**24
        with torch.inference_mode(False):  # in which they could not be saved by later calls
            told = torch.tensor(number, device=CPU)
            self.number = told
            self._saved = [told, *map(torch.from_numpy, arrays)]


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(array.data)


def check_number(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise a RuntimeError where what was saved is of another call than the one that is
    differentiated.
    """
    if found.item() != expected.item():
        raise RuntimeError(MADE_ANEW)
