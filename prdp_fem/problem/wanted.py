"""What is wanted of a derivative, and what a derivative needs to be given."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from prdp_fem.problem.inputs import local_values
from prdp_fem.ranks.finite import LARGEST

__all__ = ["Needs", "SecondCotangent", "Wanted"]


@dataclass
class Wanted:
    """What derivatives are taken by, with room for them, by rows of a batch.

    Attributes
    ----------
    gradients : Mapping of int to numpy.ndarray
        By inputs, shape (batch, size), written to: -(∂F/∂m)ᵀ λ, by dofs (no mass matrix in
        between). For a Constant or a Real space it is the sum over all ranks, on every rank. Those
        of inputs that may be there can be tensors on the device.
    boundary : numpy.ndarray or None
        Shape (batch, n), written to: the derivative by the boundary values, zero at other dofs.
    guess : numpy.ndarray or None
        Shape (batch, n), written to: the derivative by the guess.
    meshes : sequence of MeshGeometry
        Meshes whose coordinates to differentiate by.
    first_boundary : numpy.ndarray or None
        Shape (1, n), written to where a second derivative is taken: what the first one has as
        ``boundary``.
    largest : float
        What is larger counts as infinite: the largest number of the type that results will be
        converted to.
    by_mesh : dict of MeshGeometry to Cofunction
        Written to: the derivatives by coordinates, of the last row.
    """

    gradients: Mapping[int, np.ndarray]
    boundary: np.ndarray | None = None
    guess: np.ndarray | None = None
    meshes: Sequence = ()
    first_boundary: np.ndarray | None = None
    largest: float = LARGEST
    by_mesh: dict = field(default_factory=dict)

    def row(self, row: int) -> dict[int, np.ndarray]:
        """Room for the gradients by inputs of one row."""
        return {index: gradient[row] for index, gradient in self.gradients.items()}

    def results(self) -> list:
        """All that was written, as arrays of rows."""
        results = list(self.gradients.values())
        if self.boundary is not None:
            results.append(self.boundary)
        if self.guess is not None:
            results.append(self.guess)
        for cofunction in self.by_mesh.values():
            results.append(local_values(cofunction)[None])
        return results

    def names(self, inputs: Sequence) -> Iterator[str]:
        """What the results are derivatives by, in their order."""
        for index in self.gradients:
            yield f"'{inputs[index].name}'"
        if self.boundary is not None:
            yield "the boundary values"
        if self.guess is not None:
            yield "the guess"
        for _ in self.by_mesh:
            yield "the mesh's coordinates"


@dataclass(frozen=True)
class SecondCotangent:
    """What a second derivative is made from.

    Attributes
    ----------
    cotangent, derivative : numpy.ndarray
        Rank-local ∂E/∂u, and its derivative in the direction.
    tangent : numpy.ndarray
        The derivative of the solution in the direction.
    """

    cotangent: np.ndarray
    derivative: np.ndarray
    tangent: np.ndarray


@dataclass(frozen=True)
class Needs:
    """What derivatives by some inputs look at, and where rows may lie; asked for once.

    Attributes
    ----------
    solutions : bool
        Whether they look at solutions.
    unread : Container of int
        The inputs whose values they do not look at.
    boundary : bool
        Whether they look at boundary values, of which there is no more to be seen in the solution.
    guess : bool
        Whether they look at the guess: without that the derivative by it is zero.
    fields : bool
        Whether records of solves hold fields, as ``fields``, which somebody else may keep, and
        ``with_fields`` takes back.
    device_rows : bool
        Whether solutions and cotangents may be tensors on the device that solves are made on.
    device_inputs : Container of int
        The inputs whose values, and gradients, may be such tensors.
    """

    solutions: bool
    unread: Container[int] = ()
    boundary: bool = False
    guess: bool = False
    fields: bool = False
    device_rows: bool = False
    device_inputs: Container[int] = ()
