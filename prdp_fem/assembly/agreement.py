"""What ranks have alike before they solve: settings, and the values of Constants."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from mpi4py import MPI

from prdp_fem.problem.forms import Forms
from prdp_fem.problem.point import Point
from prdp_fem.ranks.agreement import agree
from prdp_fem.refinement.ladders import Setting, checked_setting, in_words
from prdp_fem.refinement.rules import Refinement

__all__ = ["Agreement"]


def _numbers(setting: Setting | None) -> tuple | None:
    """What a setting of the moment has, to be compared faster than it is put in words."""
    if setting is None:
        return None
    return setting.rtol, setting.max_it, setting.budget, getattr(setting, "steps", None)


class Agreement:
    """The one place where ranks agree, before a solve, on what it is made with.

    With another number of iterations on each rank, all would wait for each other for ever. Solves
    that reduce what has changed, before they iterate, compare checksums on the way; others compare
    settings where they may have changed.

    Parameters
    ----------
    forms : Forms
    written : sequence of int
        The inputs that are written to copies.
    reduces : bool
        Whether ranks may differ in what has changed: an input may have on some of them only,
        but halo exchanges and assembly are collective.

    Attributes
    ----------
    is_needed : bool
        Whether there is more than one rank.
    reduces : bool
        Whether :meth:`on_changes` is called before a solve.
    """

    def __init__(self, forms: Forms, written: Sequence[int], reduces: bool):
        self._comm, self._name = forms.solution.function_space().mesh().comm, forms.solution.name()
        self._constants = [index for index in written if forms.inputs[index].is_real]
        self.is_needed = self._comm.size > 1
        self.reduces = self.is_needed and reduces
        # What the last solve was asked for, in numbers and in words, with the checksum of these;
        # and that which is to be compared by the next reduction, or zero.
        self._asked: tuple | None = ()
        self._words, self._checksum_of_words = "", 0
        self._checksum = 0
        # What ranks last compared where solves have no reduction that could carry a checksum.
        self._compared: tuple | None = None

    def setting_of(self, refinement: Refinement | None) -> Setting | None:
        """What a refinement asks of the next solve, the same on all ranks. Collective.

        Where solves have no reduction it is compared here, but only where the refinement was
        stepped or changed since the last time, which ranks do together, whatever level each has
        come to.

        Raises
        ------
        TypeError, ValueError
            For what is no setting; on all ranks, where they have different ones.
        """
        # Settings of a user's class can have changed since they were looked at.
        setting = None if refinement is None else checked_setting(refinement.setting)
        if self.is_needed and not self.reduces:
            changes = None if refinement is None else refinement.changes
            asked = refinement, changes, _numbers(setting)
            if asked != self._compared:
                self._compare(in_words(setting))
                self._compared = asked
        return setting

    def note(self, setting: Setting | None) -> None:
        """Have the next reduction compare a setting."""
        asked = _numbers(setting)
        if asked != self._asked:
            self._asked, self._words = asked, in_words(setting)
            self._checksum_of_words = zlib.crc32(self._words.encode())
        self._checksum = self._checksum_of_words

    def on_changes(self, changed: list[bool], point: Point) -> list[bool]:
        """What has changed on any rank; settings and Constants are compared on the way. Collective.

        Raises
        ------
        ValueError
            On all ranks, where they have different ones.
        """
        constants = b"".join(point.values[index].tobytes() for index in self._constants)
        one, other = self._checksum, zlib.crc32(constants)
        flags = np.array([*changed, one, -one, other, -other])
        self._comm.Allreduce(MPI.IN_PLACE, flags, MPI.MAX)
        *everywhere, one, minus_one, other, minus_other = flags.tolist()
        self._checksum = 0
        if one != -minus_one:
            self._compare(self._words)
        if other != -minus_other:
            self._compare_constants(point)
        return list(map(bool, everywhere))

    def _compare(self, words: str) -> None:
        """Raise, on all ranks, where they are asked for different settings. Collective."""
        agree(
            self._comm,
            lambda: words,
            f"settings of the solve for '{self._name}'",
            "give the refinement comm=, and have all ranks step and set it alike",
        )

    def _compare_constants(self, point: Point) -> None:
        """Raise, on all ranks, where their Constants have different values. Collective."""
        agree(
            self._comm,
            lambda: [point.values[index].tolist() for index in self._constants],
            f"values of the Constants that '{self._name}' depends on",
            "broadcast those of one rank, as by comm.bcast",
        )
