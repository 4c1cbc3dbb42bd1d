"""Whether what a factorisation gives is determined by what it was asked for.

Of an operator without an inverse PETSc and its packages factorise what rounding errors have made of
it, and say nothing: a solution then has any multiple of what is in the null space, and its residual
may be small all the same. What shows it is to solve again: with x solved for, A x' = A x has
another solution. The relative difference is an estimate of the relative error of x, whatever the
operator.
"""

from __future__ import annotations

import math

import numpy as np
from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.krylov.nested import has_factorisation, is_direct
from prdp_fem.krylov.null_spaces import null_space
from prdp_fem.krylov.probe import Probe
from prdp_fem.krylov.view import described
from prdp_fem.ranks.warning import OneWarning

__all__ = ["FEW", "SUSPICIOUS", "FactorisationCheck", "detect_null_pivots"]

# Without two digits a solution is none: of a singular operator rounding errors take all, or all but
# one. Of its about 16 digits it is to have a quarter, or a warning says how many it has: rounding
# errors take half where the condition is 10⁸, three quarters where it is 10¹², and more with large
# penalties, which somebody may mean. A residual that has lost half is a reason to look closer.
_EPSILON = np.finfo(PETSc.ScalarType).eps
_WORST = 1e-2
FEW = _EPSILON**0.25
SUSPICIOUS = _EPSILON**0.5
# Rounding errors of one entry that add up in a residual.
_MANY = 1e4

# Where a factorisation of the operator has its options: with the solver's, or with those of
# Firedrake's AssembledPC.
_PLACES = ("", "assembled_")


def detect_null_pivots(solver) -> None:
    """Have MUMPS look for null pivots of an operator that has a null space.

    It would divide by what rounding errors have made of them: the solution then has 10¹⁵ times its
    size, or more, of what is in the null space, with which all its digits may be taken out. What
    options say of it stays.

    Parameters
    ----------
    solver : petsctools.OptionsManager
        One of Firedrake's, before it is set up.
    """
    for place in _PLACES:
        if solver.parameters.get(f"{place}pc_factor_mat_solver_type") == "mumps":
            solver.set_default_parameter(f"{place}mat_mumps_icntl_24", 1)


class FactorisationCheck:
    """Looks at the first solution that each factorisation gives, forward and transposed.

    That costs a product. An operator that is singular whatever its coefficients are, as a flow's
    whose pressure is determined up to a constant, shows at the first of all, which is solved for
    again.

    Parameters
    ----------
    name : str
        Of what is solved for, for messages.
    warning : OneWarning
        What gives a warning.
    """

    def __init__(self, name: str, warning: OneWarning):
        self._name = name
        self._warning = warning
        self._is_determined = False
        self._work: tuple[PETSc.Vec, PETSc.Vec] | None = None

    def look(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec, kind: str, transposed: bool) -> bool:
        """Look at what ``ksp.solve``, or ``ksp.solveTranspose``, has just given; collective.

        Parameters
        ----------
        ksp : PETSc.KSP
        b, x : PETSc.Vec
            Its right-hand side and its result.
        kind : str
            What messages call the solve.
        transposed : bool

        Returns
        -------
        bool
            Whether there was something to be seen.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the result is no solution, or where not two of its digits are determined; where
            they are few, a RuntimeWarning says so, once.
        """
        if not has_factorisation(ksp) or not math.isfinite(x.norm()):
            return False
        A, _ = ksp.getOperators()
        multiply = A.multTranspose if transposed else A.mult
        product, right = self._vectors(A)
        multiply(x, product)
        b.copy(right)
        # PETSc solves with what is left of b without it.
        space = null_space(A, transposed=transposed)
        left = null_space(A, transposed=not transposed)
        if left is not None:
            left.remove(right)
        size = right.norm()
        right.axpy(-1.0, product)
        residual = right.norm()
        if residual > FEW * size and is_direct(ksp) and space is not None and left is None:
            # A right-hand side without a solution, of which no trace is left in x.
            raise self._error(
                ksp, kind, f"its residual is {residual / size:.1e} times the right-hand side"
            )
        if not self._is_determined or residual > SUSPICIOUS * size:
            self._solve_again(ksp, product, x, kind, transposed)
        if residual > FEW * size and is_direct(ksp) and residual > _rounding(A, x):
            # Null pivots that are looked for are left out, with what the right-hand side has there.
            raise self._error(
                ksp, kind, f"its residual is {residual / size:.1e} times the right-hand side"
            )
        return True

    def look_at_step(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Note what is suspicious of a step that a SNES makes; collective. It costs a product."""
        if self._is_determined and has_factorisation(ksp):
            A, _ = ksp.getOperators()
            product, _ = self._vectors(A)
            A.mult(x, product)
            product.axpy(-1.0, b)
            # Not again here, which is inside the KSP's solve.
            self._is_determined = not product.norm() > SUSPICIOUS * b.norm()

    def look_at_state(self, ksp: PETSc.KSP, x: PETSc.Vec) -> None:
        """Look, where nobody has yet, at the steps of a SNES, with its state; collective."""
        if not self._is_determined and has_factorisation(ksp) and math.isfinite(x.norm()):
            A, _ = ksp.getOperators()
            product, projected = self._vectors(A)
            x.copy(projected)
            space = null_space(A)
            if space is not None:
                space.remove(projected)
            A.mult(projected, product)
            self._solve_again(ksp, product, projected, "nonlinear", False)

    def _vectors(self, A: PETSc.Mat) -> tuple[PETSc.Vec, PETSc.Vec]:
        if self._work is None:
            self._work = A.createVecLeft(), A.createVecLeft()
        return self._work

    def _solve_again(
        self, ksp: PETSc.KSP, product: PETSc.Vec, x: PETSc.Vec, kind: str, transposed: bool
    ) -> None:
        """Compare x with the solution for A x, which is a product that is not needed any more."""
        size = x.norm()
        if size == 0:
            return  # which tells nothing
        again = x.duplicate()
        if is_direct(ksp):
            (ksp.solveTranspose if transposed else ksp.solve)(product, again)
        else:
            self._apply(ksp, product, again, transposed)
        again.axpy(-1.0, x)
        difference = again.norm()
        if not difference <= _WORST * size:
            if not is_direct(ksp) and "diagonally scaled" in described(ksp):
                return  # and so is what was factorised
            raise self._error(
                ksp, kind, f"solved again, it is another one by {difference / size:.1e} of its size"
            )
        self._is_determined = True
        if difference > FEW * size:
            self._warning.give(self._few_digits(ksp, kind, difference / size), ksp.comm)

    def _apply(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec, transposed: bool) -> None:
        """What an iteration would do first, whatever it is told."""
        A, _ = ksp.getOperators()
        pc = ksp.getPC()
        (pc.applyTranspose if transposed else pc.apply)(b, x)
        space = null_space(A, transposed=transposed)
        if space is not None:
            space.remove(x)

    def _few_digits(self, ksp: PETSc.KSP, kind: str, difference: float) -> str:
        return (
            f"the {kind} solve for '{self._name}' with pc_type {ksp.getPC().getType()} determines "
            f"no more than {int(-math.log10(difference))} digits (solved again, the solution is "
            f"another one by {difference:.1e} of its size): the operator is nearly singular, or "
            "has numbers of too many sizes, as with a large penalty"
        )

    def _error(self, ksp: PETSc.KSP, kind: str, finding: str) -> ConvergenceError:
        return ConvergenceError(
            f"the {kind} solve for '{self._name}' with pc_type {ksp.getPC().getType()} gave no "
            f"solution that is determined: {finding}, so that the operator is singular, or nearly "
            "so: give nullspace= and transpose_nullspace= where solutions are determined up to "
            "something, such as a constant pressure, or a condition that fixes it"
        )


def _rounding(A: PETSc.Mat, x: PETSc.Vec) -> float:
    """What rounding errors may leave of a residual, whatever the right-hand side."""
    probe = Probe(A)
    A.mult(probe.x, probe.Ax)
    return _MANY * _EPSILON * probe.Ax.norm() / probe.x.norm() * x.norm()
