"""A setting put on a PETSc SNES and its KSP."""

from __future__ import annotations

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.krylov.factorisation import FactorisationCheck
from prdp_fem.krylov.ksp import RefinedKSP, forget_zero_pivots, reason_names, reset
from prdp_fem.krylov.nested import is_direct
from prdp_fem.krylov.null_spaces import NullSpaceCheck
from prdp_fem.krylov.petsc_types import snes_facts
from prdp_fem.krylov.post_solve import PostSolve
from prdp_fem.ranks.warning import OneWarning
from prdp_fem.refinement.settings import NewtonSetting, Setting, newton_steps

__all__ = ["Newton", "reset_with_linear_solver", "solves_linear_systems"]

_MANY = 2**30
_REASONS = reason_names(PETSc.SNES.ConvergedReason)
_REMEDIES = {
    "DIVERGED_MAX_IT": (
        "allow more steps (snes_max_it), looser tolerances (snes_rtol, snes_atol), or a number of "
        "steps that is meant to be used up (a NewtonLadder); with truncated linear solves Newton's "
        "method needs more steps"
    ),
    "DIVERGED_LINE_SEARCH": (
        "truncated linear solves may give no direction of descent: use snes_linesearch_type basic, "
        "or more iterations"
    ),
    "DIVERGED_LINEAR_SOLVE": (
        "the Jacobian may be singular at this state: try another guess, ksp_type or pc_type"
    ),
    "DIVERGED_FUNCTION_NANORINF": (
        "look for NaN or infinity in the controls, coefficients and the guess"
    ),
    "DIVERGED_DTOL": (
        "the steps lead away from a solution: try a better guess or a line search "
        "(snes_linesearch_type bt)"
    ),
}


def reset_with_linear_solver(snes: PETSc.SNES) -> None:
    """Have a SNES, its KSP and its preconditioner set up anew at the next solve.

    Inside the solver's context. What was set on SNES and KSP stays.
    """
    forget_zero_pivots(snes.getKSP())  # before it lets go of what has them
    snes.reset()
    # Its DM, which all solvers of a function space share, would restrict its solution to coarser
    # meshes whenever multigrid is set up, and there is none until the next solve.
    snes.setDM(snes.getDM())
    reset(snes.getKSP())


def solves_linear_systems(snes: PETSc.SNES) -> bool:
    """Whether a SNES makes its steps by linear solves.

    Another one leaves the options of its KSP unread.
    """
    return snes_facts(snes.getType()).solves_linear_systems


class Newton:
    """A SNES that is told at each solve how many steps to make, and how far to go in each.

    Parameters
    ----------
    snes : PETSc.SNES
        It has its callbacks and options.
    name : str
        The name of what is solved for, for messages.
    prefix : str or None
        The options prefix of the KSP that settings are put on; None for the only iterative one.

    Attributes
    ----------
    few_digits, inexact_null_space : OneWarning
        What warns of direct solves, and of the null spaces that the Jacobian was given.
    """

    def __init__(self, snes: PETSc.SNES, name: str, prefix: str | None):
        self.snes = snes
        self.refined = RefinedKSP(snes.getKSP(), name, prefix, in_snes=True)
        self._name = name
        self.few_digits = OneWarning()
        self.inexact_null_space = OneWarning()
        self._is_direct = is_direct(snes.getKSP())
        self._look_anew()
        # What options had said, while a setting is put on.
        self._options: tuple | None = None

    @property
    def solves_linear_systems(self) -> bool:
        """Whether there is a KSP to put settings on."""
        return solves_linear_systems(self.snes)

    @property
    def remembers(self) -> bool:
        """Whether the SNES starts with what it has learnt in its last solve, unless it is reset."""
        return snes_facts(self.snes.getType()).remembers_solves

    def reset(self) -> None:
        """Have vectors and preconditioner made anew at the next solve, by the options.

        Inside the solver's context.
        """
        reset_with_linear_solver(self.snes)
        self._look_anew()

    def _look_anew(self) -> None:
        """Have nothing looked at as yet, since operators are other matrices from now on."""
        self._factorisation = FactorisationCheck(self._name, self.few_digits)
        self._null_spaces = NullSpaceCheck(self._name, self.inexact_null_space)
        self._look_at_step: PostSolve | None = None
        if self._is_direct:
            self._look_at_step = PostSolve(self._factorisation.look_at_step)

    def solve(self, x: PETSc.Vec, setting: Setting | NewtonSetting | None) -> tuple[int, int]:
        """Solve from what is in x.

        Parameters
        ----------
        x : PETSc.Vec
            The guess, with boundary values, and then the solution.
        setting : Setting, NewtonSetting or None
            How far to go; None for what the options say.

        Returns
        -------
        tuple of int
            Newton steps, and KSP iterations.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the options' tolerances are not reached, unless the steps were a budget.
        """
        snes = self.snes
        steps = newton_steps(setting)
        self._apply(steps, setting)
        if self._look_at_step is not None:
            self._look_at_step.put_on(snes.getKSP())
        snes.solve(None, x)
        made = snes.getIterationNumber()
        if made and self.solves_linear_systems:
            # First of all, since steps that lack what is in a wrong one may come to no end.
            self._null_spaces.look(snes.getKSP().getOperators()[0])
        reason = snes.getConvergedReason()
        is_spent = steps is not None and reason == PETSc.SNES.ConvergedReason.DIVERGED_MAX_IT
        if reason < 0 and not is_spent:
            self._raise(reason)
        iterations = self.refined.checked_newton_iterations(snes.getLinearSolveIterations())
        if made and self.solves_linear_systems:
            self._factorisation.look_at_state(snes.getKSP(), x)
        return made, iterations

    def _apply(self, steps: int | None, setting: Setting | None) -> None:
        if self.solves_linear_systems:
            self.refined.apply(setting, False)
        if self._options is None:
            if setting is None:
                return
            self._options = self.snes.getTolerances(), self.snes.getMaxKSPFailures()
        (rtol, atol, stol, max_it), failures = self._options
        if steps is not None:
            max_it = steps
        self.snes.setTolerances(rtol=rtol, atol=atol, stol=stol, max_it=max_it)
        if setting is not None and setting.budget:
            # SNES would take a used-up budget of iterations for an error.
            failures = _MANY
        self.snes.setMaxKSPFailures(failures)
        if setting is None:
            self._options = None

    def _raise(self, reason: int) -> None:
        name = _REASONS.get(reason, str(reason))
        inside = ""
        if name == "DIVERGED_LINEAR_SOLVE":
            inside = f" (a linear solve {self.refined.failure()})"
        remedy = f"; {_REMEDIES[name]}" if name in _REMEDIES else ""
        raise ConvergenceError(
            f"the nonlinear solve for '{self._name}' with snes_type {self.snes.getType()} failed: "
            f"{name} after {self.snes.getIterationNumber()} steps, residual norm "
            f"{self.snes.getFunctionNorm():.3e}{inside}{remedy}"
        )
