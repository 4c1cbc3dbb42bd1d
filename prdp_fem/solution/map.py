"""The solution of a variational problem as a function of its inputs, and its derivatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.problem.point import Direction, Point
from prdp_fem.problem.present import PresentValues
from prdp_fem.problem.wanted import SecondCotangent, Wanted
from prdp_fem.ranks.finite import LARGEST, is_finite, require_finite
from prdp_fem.refinement.ladders import Setting
from prdp_fem.solution.implicit import ImplicitDerivative
from prdp_fem.solution.linear import LinearSolve
from prdp_fem.solution.linearisation import Linearisation
from prdp_fem.solution.newton import NewtonSolve
from prdp_fem.solution.unrolled import UnrolledKrylov
from prdp_fem.solution.unrolled_newton import UnrolledNewton

__all__ = ["SolutionMap"]


class SolutionMap:
    """The map from the inputs of a problem to its solution: solved, and differentiated, somehow.

    Parameters
    ----------
    forward : LinearSolve or NewtonSolve
    derivative : ImplicitDerivative, UnrolledKrylov or UnrolledNewton
        Asked itself for what derivatives look at, and whether there are any.

    Attributes
    ----------
    forward, derivative
        As given.
    linearisation : Linearisation
        That both are put together around.
    place : Place
        Where solves are made.
    agreement : Agreement
        What ranks agree on before a solve.
    forms : Forms
    inputs : list of Input
    size : int
        Rank-local number of dofs of the solution.
    statistics : Statistics
    comm : mpi4py.MPI.Comm
        The ranks that share the mesh.
    is_serial : bool
        Whether there is one rank only.
    present : PresentValues
        What the user's objects say at the moment.
    """

    def __init__(
        self,
        forward: LinearSolve | NewtonSolve,
        derivative: ImplicitDerivative | UnrolledKrylov | UnrolledNewton,
    ):
        self.forward, self.derivative = forward, derivative
        self.linearisation = forward.linearisation
        self.place, self.agreement = self.linearisation.place, self.linearisation.copies.agreement
        self.forms, self.inputs = self.linearisation.forms, self.linearisation.forms.inputs
        self.size, self.statistics = self.linearisation.size, self.linearisation.statistics
        self.comm = self.linearisation.comm
        self.is_serial = self.comm.size == 1
        self.present = PresentValues(self.forms)

    def check_setting(self, setting: Setting) -> None:
        """Find the KSP that settings are put on; a ValueError says what is wrong with them."""
        self.forward.check_setting(setting)
        self.derivative.check_setting(setting)

    def collect_garbage(self) -> None:
        """Destroy the PETSc objects that Python has dropped on all ranks. Collective."""
        if not self.is_serial:
            PETSc.garbage_cleanup(self.comm)

    # The solve

    def solve(
        self,
        point: Point,
        setting: Setting | None,
        solutions: np.ndarray,
        varying: Mapping[int, np.ndarray] | None = None,
        *,
        largest: float = LARGEST,
    ) -> list:
        """Solve at a point, or at a batch of them.

        Parameters
        ----------
        point : Point
        setting : Setting or None
            How far the KSP goes; None for what its options say.
        solutions : numpy.ndarray
            Shape (batch, n), written to: rank-local dofs.
        varying : Mapping of int to numpy.ndarray
            Inputs that differ from row to row, shape (batch, size).
        largest : float
            The largest number of the type that solutions will be converted to.

        Returns
        -------
        list
            The record of each row: what its derivatives ask for beside the solution.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the solve fails, or gives a number that is not finite; with the row as attribute
            ``row``.
        ValueError
            On all ranks, where they have different settings and that shows before the solve.
        """
        if not self.is_serial:
            self.agreement.note(setting)
        before = self.statistics.solves
        try:
            records = self.forward.solve(
                point,
                setting,
                solutions,
                {} if varying is None else varying,
                self.derivative.record,
            )
        except ConvergenceError as error:
            error.row = self.statistics.solves - before
            raise
        # Also where PETSc has computed no norm, or one before the last thing that it did.
        if not (self.is_serial and is_finite(solutions, largest)):
            name = self.linearisation.name
            with _spoiled_by_failure(self.linearisation):
                require_finite(
                    self.comm, [solutions], lambda _: _of_solution(name), largest=largest
                )
        return records

    # Its derivatives

    def solve_adjoint(
        self,
        point: Point,
        setting: Setting | None,
        cotangents: np.ndarray,
        solutions: np.ndarray | None,
        records: list,
        wanted: Wanted,
        *,
        varying: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """From the derivatives of numbers E by solutions those by what these depend on.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        cotangents : numpy.ndarray
            Shape (batch, n): rank-local ∂E/∂u. Boundary entries are left out of the system: a
            truncated iteration would see them.
        solutions : numpy.ndarray or None
            Shape (batch, n): what :meth:`solve` gave; None where the derivative needs none.
        records : list
            What :meth:`solve` returned.
        wanted : Wanted
            Written to.
        varying : Mapping of int to numpy.ndarray
            As in :meth:`solve`.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the solve fails, or where a cotangent or a derivative is not finite; with the row
            as attribute ``row``.
        """
        if not self.is_serial:
            self._require_finite_cotangents(cotangents)
        before = self.statistics.adjoint_solves
        try:
            self.derivative.adjoint(
                point,
                setting,
                cotangents,
                solutions,
                records,
                wanted,
                {} if varying is None else varying,
            )
            self._require_finite_derivatives(wanted)
        except ConvergenceError as error:
            # What is not finite in a cotangent is so in all that is made of it: one looks there
            # only where something has failed.
            self._require_finite_cotangents(cotangents)
            if "row" not in vars(error):
                error.row = self.statistics.adjoint_solves - before
            raise

    def _require_finite_cotangents(self, *cotangents) -> None:
        # At boundary dofs, too: what does not matter there is still a sign that a loss is wrong.
        require_finite(self.comm, cotangents, lambda _: _of_cotangent(self.linearisation.name))

    def _require_finite_derivatives(self, wanted: Wanted) -> None:
        results = wanted.results()
        if self.is_serial and all([is_finite(rows, wanted.largest) for rows in results]):
            return

        def describe(place: int) -> str:
            return _of_derivative(self.linearisation.name, list(wanted.names(self.inputs))[place])

        with _spoiled_by_failure(self.linearisation):
            require_finite(self.comm, results, describe, largest=wanted.largest)

    def solve_tangent(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        record,
        direction: Direction,
        out: np.ndarray,
    ) -> None:
        """The tangent linear solve: the derivative of the solution in a direction.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        solution : numpy.ndarray
            What :meth:`solve` gave at the point.
        record
            What :meth:`solve` returned.
        direction : Direction
        out : numpy.ndarray
            Rank-local, written to.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the solve fails, or gives a number that is not finite.
        """
        self.derivative.tangent(point, setting, solution, record, direction, out)
        with _spoiled_by_failure(self.linearisation):
            require_finite(self.comm, [out[None]], lambda _: _of_tangent(self.linearisation.name))

    def solve_second_adjoint(
        self,
        point: Point,
        setting: Setting | None,
        solution: np.ndarray,
        second: SecondCotangent,
        direction: Direction,
        wanted: Wanted,
    ) -> None:
        """The derivative of :meth:`solve_adjoint` in a direction: the action of a Hessian.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        solution : numpy.ndarray
            What :meth:`solve` gave at the point.
        second : SecondCotangent
            With what :meth:`solve_tangent` gave in the direction.
        direction : Direction
        wanted : Wanted
            Of one row, written to.
        """
        self._require_finite_cotangents(second.cotangent[None], second.derivative[None])
        self.derivative.second_adjoint(point, setting, solution, second, direction, wanted)
        self._require_finite_derivatives(wanted)


@contextmanager
def _spoiled_by_failure(linearisation: Linearisation) -> Iterator[None]:
    """Have all made anew where numbers are not finite.

    A preconditioner may have failed, which nobody has seen who computes no norm, and would stay as
    it is.
    """
    try:
        yield
    except ConvergenceError as error:
        linearisation.spoil(error)
        raise


# What is wrong with numbers that are not finite.


def _of_solution(name: str) -> str:
    return (
        f"the forward solve for '{name}' gave NaN or infinity: look for them in the controls, "
        "coefficients, boundary values and the guess, or for an operator that is singular"
    )


def _of_cotangent(name: str) -> str:
    return (
        f"the cotangent of '{name}' holds NaN or infinity: look, in what is computed of the "
        "solution, for an operation whose derivative is not finite, such as 0/0 or the square "
        "root of zero"
    )


def _of_derivative(name: str, by: str) -> str:
    return (
        f"the derivative by {by} of the solve for '{name}' holds NaN or infinity: look for a "
        "derivative that does not exist there, such as that of a square root at zero, for an "
        "adjoint solve that diverges, or for numbers that are too large"
    )


def _of_tangent(name: str) -> str:
    return (
        f"the tangent solve for '{name}' gave NaN or infinity: look for them in the direction, "
        "or for a derivative that does not exist there, such as that of a square root at zero"
    )
