"""The solves of a linear system and its transpose."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from firedrake.petsc import PETSc

from prdp_fem.freshness import MEMORY, METHOD, Clock, Kept
from prdp_fem.krylov import nested
from prdp_fem.krylov.consistency import ConsistencyCheck, solves_least_squares
from prdp_fem.krylov.counted_solves import (
    CountedSolve,
    Rows,
    adjoint_rows,
    checked,
    forward_rows,
    scaled,
)
from prdp_fem.krylov.factorisation import FactorisationCheck
from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.null_spaces import NullSpaceCheck, one_sided_null_space
from prdp_fem.krylov.petsc_types import pc_facts
from prdp_fem.krylov.snes import Newton
from prdp_fem.krylov.symmetry import Symmetry
from prdp_fem.ranks.warning import OneWarning
from prdp_fem.refinement.ladders import Setting
from prdp_fem.statistics import Statistics

__all__ = ["Krylov"]


class Krylov:
    """The solves of a linear system and its transpose, each told how far to go.

    They depend on their arguments alone: each starts from zero, or from the guess it is given.

    Parameters
    ----------
    ksp : PETSc.KSP
        It has its operators and options.
    transposed : callable
        A context manager with a KSP for the transposed operator, set up for its present values;
        used only where method or preconditioner cannot be transposed.
    name : str
        The name of what is solved for, for messages.
    prefix : str or None
        The options prefix of the KSP that settings are put on; None for the only iterative one.
    clock : Clock
    operator : sequence of hashable
        The sources of the operator's values; when one changes the KSP is set up anew before it
        solves.
    newton : Newton or None
        The solves of another KSP of the same solver, of which the same warnings are given once.

    Attributes
    ----------
    symmetry : Symmetry
    may_hide_residuals : Kept
        Whether solves may end at what is no solution, without an error.
    keeps_iterates : bool
        Whether solves give PETSc's iterates as they are, with what these have of a null space.
    look_before : callable
        Called with the KSP before the first forward solve with each operator.
    """

    def __init__(
        self,
        ksp: PETSc.KSP,
        transposed: Callable[[], AbstractContextManager[PETSc.KSP]],
        name: str,
        prefix: str | None,
        clock: Clock,
        operator: Sequence[Hashable],
        newton: Newton | None = None,
    ):
        self.refined = RefinedKSP(ksp, name, prefix)
        if newton is not None:
            self.refined.nothing_to_refine = newton.refined.nothing_to_refine
        self.ksp = ksp
        self._transposed = transposed
        self.keeps_iterates = False
        self.look_before: Callable[[PETSc.KSP], None] = lambda ksp: None
        self._name, self._prefix = name, prefix
        self._consistency = ConsistencyCheck(name)
        self._refined_transposed: RefinedKSP | None = None
        # The types of the KSP and its preconditioner, of which all that follows was found.
        self._types = ksp.getType(), ksp.getPC().getType()
        self._clock = clock
        by_values = [*operator, METHOD]
        self.symmetry = Symmetry(self.refined, clock, by_values)
        # What is known of the operator whatever its values are, until it is another matrix.
        few_digits = OneWarning() if newton is None else newton.few_digits
        self._factorisation = Kept(lambda: FactorisationCheck(name, few_digits), clock, [MEMORY])
        inexact = OneWarning() if newton is None else newton.inexact_null_space
        self._null_spaces = Kept(lambda: NullSpaceCheck(name, inexact), clock, [MEMORY])
        self._one_sided_null_space = Kept(
            lambda: one_sided_null_space(ksp.getOperators()[0]), clock, [MEMORY]
        )
        self.may_hide_residuals = Kept(
            lambda: self._one_sided_null_space.value is not None or solves_least_squares(ksp),
            clock,
            [MEMORY, METHOD],
        )
        # How to solve with the operator as it is now.
        self._transposed_solver = Kept(self._find_transposed_solver, clock, by_values)
        # The functions that solve, by the kind of solve.
        self._solves: Kept[dict[str, CountedSolve]] = Kept(dict, clock, by_values)
        # Whether solves are transposed, for those that the factorisation was looked at after.
        self._looked_at: Kept[set[bool]] = Kept(set, clock, by_values)

    def look_at_operator(self) -> None:
        """To be called where the KSP was set up for an operator. Collective.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the first operator does not have the null spaces that it was given.
        """
        self.refined.set_up()
        self._null_spaces.value.look(self.ksp.getOperators()[0])

    def solve(
        self,
        setting: Setting | None,
        rows: Rows,
        statistics: Statistics,
        *,
        guess: bool = False,
        record: Callable[[], Any] | None = None,
    ) -> list:
        """Solve A x = b, one row after the other.

        Parameters
        ----------
        setting : Setting or None
            How far to go; None for what the KSP's options say.
        rows : iterable of pairs of PETSc.Vec
            b and x.
        statistics : Statistics
            Where each row is counted once it is done.
        guess : bool
            Start from ``x`` instead of zero.
        record : callable or None
            Called after each row, for what is kept of it; None for nothing.

        Returns
        -------
        list
            What is kept of each row.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            On NaN, breakdown or divergence, and where a tolerance is not reached; not for a used-up
            budget.
        """
        self._prepare(self.refined, setting, guess, is_absolute=True)
        solves = self._solves.value
        if "forward" not in solves:
            self.look_before(self.ksp)
            solves["forward"] = self._checked(self.refined, self.ksp.solve, "forward")
        return forward_rows(solves["forward"], rows, statistics, record)

    def solve_tangent(self, setting: Setting | None, b: PETSc.Vec, x: PETSc.Vec) -> int:
        """Solve A x = b for a tangent, from zero, and return the iterations spent."""
        self._prepare(self.refined, setting)
        return self._projected(self._scaled(self.refined, self.ksp.solve, "tangent"))(b, x)

    def _prepare(
        self,
        refined: RefinedKSP,
        setting: Setting | None,
        guess: bool = False,
        *,
        is_absolute: bool = False,
    ) -> None:
        """Put a setting on a KSP, and tell the clock of types that were set by hand."""
        if refined.apply(setting, guess, is_absolute=is_absolute):
            self._solves.value.clear()
            types = self.ksp.getType(), self.ksp.getPC().getType()
            if types != self._types:
                self._types = types
                self._clock.changed(METHOD)

    def require_solution(self, setting: Setting | None, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Look at what a solve gave, before it is differentiated by what its operator depends on.

        Collective.

        Parameters
        ----------
        setting : Setting or None
            That of the solve.
        b, x : PETSc.Vec

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where it is no solution, as far as the setting says.
        """
        self._prepare(self.refined, setting)
        self._consistency.look(self.refined, b, x)

    def solve_transposed(self, setting: Setting | None, rows: Rows, statistics: Statistics) -> None:
        """Solve Aᵀ x = b from zero, one row after the other; see :meth:`solve`."""
        self._prepare(self.refined, setting)
        adjoint_rows(self._transposed_solver.value(setting), rows, statistics)

    def _find_transposed_solver(self) -> Callable[[Setting | None], CountedSolve]:
        """What :meth:`solve_transposed` asks, for the operator and the method as they are now."""
        find: Callable[[Setting | None], CountedSolve] = self._solver_of_transposed
        if self.symmetry.is_symmetric.value:
            find = self._solver_by(self.ksp.solve)
        elif self.symmetry.is_transposable.value:
            find = self._solver_by(self.ksp.solveTranspose)
        if self._one_sided_null_space.value is None:
            return find
        return lambda setting: self._projected(find(setting))

    def _solver_by(self, solve: Callable) -> Callable[[Setting | None], CountedSolve]:
        return lambda _: self._scaled(self.refined, solve, "adjoint")

    def _solver_of_transposed(self, setting: Setting | None) -> Callable:
        def solve(b: PETSc.Vec, x: PETSc.Vec) -> int:
            with self._transposed() as ksp:
                if self._refined_transposed is None:
                    self._refined_transposed = RefinedKSP(ksp, self._name, self._prefix)
                    said = self.refined.nothing_to_refine
                    self._refined_transposed.nothing_to_refine = said
                self._refined_transposed.set_up()
                self._prepare(self._refined_transposed, setting)
                return self._scaled(self._refined_transposed, ksp.solve, "adjoint")(b, x)

        return solve

    def _projected(self, solve: CountedSolve) -> CountedSolve:
        """With the null space of a symmetric operator for an unnamed one of its transpose."""
        space = self._one_sided_null_space.value
        if space is None or not self.symmetry.has_symmetric_operator.value:
            return solve

        def solve_projected(b: PETSc.Vec, x: PETSc.Vec) -> int:
            space.remove(b)
            iterations = solve(b, x)
            space.remove(x)
            return iterations

        return solve_projected

    def _scaled(self, refined: RefinedKSP, solve: Callable, kind: str) -> CountedSolve:
        """A solve for a derivative, whose right-hand side has no size to be expected.

        It may write to that.
        """
        solves = self._solves.value
        if kind not in solves:
            solve_and_check = self._checked(refined, solve, kind, is_relative=True)
            solves[kind] = scaled(refined.ksp, solve_and_check, refined.may_have_thresholds)
        return solves[kind]

    def _checked(
        self, refined: RefinedKSP, solve: Callable, kind: str, *, is_relative: bool = False
    ) -> CountedSolve:
        """A solve that raises where it failed, or where a factorisation gives no solution."""
        ksp = refined.ksp
        is_transposed = solve == ksp.solveTranspose

        def look(b: PETSc.Vec, x: PETSc.Vec) -> None:
            looked_at, check = self._looked_at.value, self._factorisation.value
            if is_transposed not in looked_at and check.look(ksp, b, x, kind, is_transposed):
                looked_at.add(is_transposed)  # unless it has raised, and will again

        is_direct = nested.is_direct(ksp) or pc_facts(ksp.getPC().getType()).factorises
        return checked(
            refined,
            solve,
            kind,
            is_relative=is_relative,
            keeps_iterates=self.keeps_iterates,
            look=look if is_direct else None,
        )
