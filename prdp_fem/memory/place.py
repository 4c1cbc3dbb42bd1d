"""Where solves are made for now: a memory, and what is kept there until it is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.freshness import MEMORY, Clock, Kept
from prdp_fem.memory.batch import Batches
from prdp_fem.memory.memory import Memory
from prdp_fem.statistics import Statistics

__all__ = ["Place"]

T = TypeVar("T")


class Place:
    """A memory that can be exchanged for another, and the clock that tells when it was.

    Parameters
    ----------
    memory : Memory

    Attributes
    ----------
    memory : Memory
    clock : Clock
    statistics : Statistics
        Where all that is done here is counted.
    """

    def __init__(self, memory: Memory):
        self.clock, self.statistics = Clock(), Statistics()
        self.move_to(memory)

    def move_to(self, memory: Memory) -> None:
        """Have everything in another memory from now on."""
        self.memory = memory
        memory.statistics = self.statistics
        self.clock.changed(MEMORY)

    def kept(self, make: Callable[[], T], on: Iterable[Hashable] = ()) -> Kept[T]:
        """Something that lies in the memory, and is made from other sources, too."""
        return Kept(make, self.clock, (MEMORY, *on))

    def vector(self, like: PETSc.Vec) -> Kept[PETSc.Vec]:
        """A vector of the layout of one on the host."""
        return self.kept(lambda: self.memory.vector(like))

    def batches(self, like: PETSc.Vec) -> Kept[Batches]:
        """Batches of vectors of a layout, by their number of rows."""
        return self.kept(lambda: Batches(lambda rows: self.memory.batch(rows, like)))

    def row(self, like: PETSc.Vec) -> Kept:
        """A batch of one vector of a layout."""
        return self.kept(lambda: self.memory.batch(1, like))

    def entries(self, like: PETSc.Vec, dofs: np.ndarray) -> Kept:
        """Rank-local entries of vectors of a layout."""
        return self.kept(lambda: self.memory.entries(like, dofs))
