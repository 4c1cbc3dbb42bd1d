"""The account of what a solver has done, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from prdp_fem.arguments import is_integer, is_real, shown

__all__ = ["Statistics"]


@dataclass
class Statistics:
    """What a solver has done since it was made, or since ``reset``.

    Attributes
    ----------
    solves, adjoint_solves, tangent_solves : int
        Problems solved, and linear systems for their derivatives.
    forward_iterations, adjoint_iterations, tangent_iterations : int
        KSP iterations spent in them.
    newton_steps : int
        Steps of nonlinear solves.
    assemblies : int
        How often the operator was assembled, and its preconditioner set up; outside nonlinear
        solves.
    forward_seconds, adjoint_seconds, tangent_seconds : float
        Wall-clock time of whole solves on this rank: right-hand sides, assembly and KSP.
    copies_to_device, copies_to_host : int
        How often this rank has moved a vector or a matrix to a device, and back. What a
        preconditioner moves that is not on the device, ``-log_view`` tells, and
        :func:`prdp_fem.memory.devices.transfers`.
    bytes_to_device, bytes_to_host : int
        How much that was.
    """

    solves: int = 0
    adjoint_solves: int = 0
    tangent_solves: int = 0
    forward_iterations: int = 0
    adjoint_iterations: int = 0
    tangent_iterations: int = 0
    newton_steps: int = 0
    assemblies: int = 0
    forward_seconds: float = 0.0
    adjoint_seconds: float = 0.0
    tangent_seconds: float = 0.0
    copies_to_device: int = 0
    copies_to_host: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0

    def __post_init__(self):
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            is_right = is_integer(value) if kind is int else is_real(value)
            if not (is_right and value >= 0):
                expected = "an integer" if kind is int else "a number"
                raise ValueError(
                    f"{field.name} must be {expected} of at least 0, found {shown(value)}"
                )

    @property
    def iterations(self) -> int:
        """KSP iterations of all kinds."""
        return self.forward_iterations + self.adjoint_iterations + self.tangent_iterations

    @property
    def seconds(self) -> float:
        """Wall-clock time of all kinds."""
        return self.forward_seconds + self.adjoint_seconds + self.tangent_seconds

    def note_to_device(self, size: int) -> None:
        """Count a copy of so many bytes to a device."""
        self.copies_to_device += 1
        self.bytes_to_device += size

    def note_to_host(self, size: int) -> None:
        """Count a copy of so many bytes to the host."""
        self.copies_to_host += 1
        self.bytes_to_host += size

    @contextmanager
    def apart(self) -> Iterator[Statistics]:
        """Within, what is done is counted apart: in what this gives, once it is left."""
        before, done = dict(vars(self)), Statistics()
        try:
            yield done
        finally:
            for name, value in before.items():
                setattr(done, name, getattr(self, name) - value)
            vars(self).update(before)

    def reset(self) -> None:
        """Start counting from zero."""
        for field in fields(self):
            setattr(self, field.name, field.default)
