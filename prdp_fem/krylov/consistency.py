"""Whether what a KSP has claimed to be a solution is one, of the system that is differentiated.

The derivative of a solution u = A⁻¹ b by A is -A⁻¹ dA u. Some KSPs end, as they are told to, at
what is no solution, and has another derivative: those with the null space of an operator, but not
that of its transpose, take what is in the former out of the residual that they look at; methods of
least squares look at Aᵀ (b - A u).
"""

from __future__ import annotations

from firedrake.exceptions import ConvergenceError
from firedrake.petsc import PETSc

from prdp_fem.krylov.factorisation import FEW, SUSPICIOUS
from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.null_spaces import null_space
from prdp_fem.krylov.petsc_types import ksp_facts, pc_facts
from prdp_fem.krylov.probe import Probe
from prdp_fem.ranks.warning import OneWarning

__all__ = ["ConsistencyCheck", "solves_least_squares"]

# What a KSP looks at is small beside what it does not look at: of a truncated solve for a
# right-hand side that has a solution they are about as large.
_HIDDEN = 100
# Where a preconditioner enlarges what is in a null space, as multigrid does that is exact on a
# coarse mesh, it does so with rounding errors: those are that much smaller than the same of any
# other vector.
_ROUNDING = 1e-6
# Of a residual that can be solved for, a second solve leaves less.
_REDUCED = 0.5


def solves_least_squares(ksp: PETSc.KSP) -> bool:
    """Whether a KSP minimises the residual of a system that has no solution."""
    return (
        ksp_facts(ksp.getType()).solves_least_squares
        or pc_facts(ksp.getPC().getType()).is_pseudo_inverse
    )


class ConsistencyCheck:
    """Looks at what is to be differentiated by what the operator depends on.

    Parameters
    ----------
    name : str
        Of what is solved for, for messages.
    """

    def __init__(self, name: str):
        self._name = name
        self._warning = OneWarning()

    def look(self, refined: RefinedKSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Look at what a solve has given; collective.

        It costs a product, and where that is suspicious a few more or a solve.

        Parameters
        ----------
        refined : RefinedKSP
            With the setting of the solve.
        b, x : PETSc.Vec
            Its right-hand side and its result.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the residual is one that the KSP does not look at, and large; where it is small, a
            RuntimeWarning says so, once.
        """
        A, _ = refined.ksp.getOperators()
        residual = b.duplicate()
        b.copy(residual)
        left = null_space(A, transposed=True)
        if left is not None:
            left.remove(residual)  # PETSc solves for what is left
        size, product = residual.norm(), b.duplicate()
        A.mult(x, product)
        residual.axpy(-1.0, product)
        share = residual.norm() / size if size > 0 else 0.0
        if share > SUSPICIOUS and (finding := self._finding(refined, residual, product)):
            message = (
                f"the solve for '{self._name}' is to be differentiated by what its operator "
                f"depends on, and gave no solution: its residual is {share:.1e} times the "
                f"right-hand side, and {finding}, or a right-hand side that has a solution"
            )
            if share > FEW:
                raise ConvergenceError(message)
            self._warning.give(message, refined.ksp.comm)

    def _finding(self, refined: RefinedKSP, residual: PETSc.Vec, work: PETSc.Vec) -> str | None:
        """What hides a residual from the KSP, and what to do; None where it sees it."""
        ksp = refined.ksp
        A, _ = ksp.getOperators()
        space, left = null_space(A), null_space(A, transposed=True)
        if solves_least_squares(ksp):
            if self._is_least(refined, residual, work):
                return (
                    f"the least that ksp_type {ksp.getType()} with pc_type {ksp.getPC().getType()} "
                    "can make of it: give nullspace= and transpose_nullspace="
                )
        elif space is not None and left is None and ksp.getPCSide() == PETSc.PC.Side.LEFT:
            if _is_hidden(ksp.getPC(), space, residual, work):
                return (
                    "nullspace= has the KSP look at less of it: give the solver "
                    "transpose_nullspace=, too"
                )
        return None

    @staticmethod
    def _is_least(refined: RefinedKSP, residual: PETSc.Vec, work: PETSc.Vec) -> bool:
        """Whether nothing of a residual can be solved for."""
        ksp, correction = refined.ksp, work.duplicate()
        if pc_facts(ksp.getPC().getType()).is_pseudo_inverse:
            ksp.getPC().apply(residual, correction)
        elif refined.is_budget:
            return False  # a budget leaves something of any residual
        else:
            ksp.solve(residual, correction)
        before = residual.norm()
        ksp.getOperators()[0].mult(correction, work)
        work.axpy(-1.0, residual)
        return work.norm() > _REDUCED * before


def _is_hidden(pc: PETSc.PC, space: PETSc.NullSpace, residual: PETSc.Vec, work: PETSc.Vec) -> bool:
    """Whether a null space holds nearly all of a preconditioned residual."""
    hidden, visible = _parts(pc, space, residual, work)
    if not hidden > _HIDDEN * visible:
        return False
    other = Probe(pc.getOperators()[0]).y
    of_other, _ = _parts(pc, space, other, work)
    return hidden / residual.norm() > _ROUNDING * of_other / other.norm()


def _parts(
    pc: PETSc.PC, space: PETSc.NullSpace, vector: PETSc.Vec, work: PETSc.Vec
) -> tuple[float, float]:
    """The sizes of the parts of a preconditioned vector in a null space, and orthogonal to it."""
    pc.apply(vector, work)
    outside = work.duplicate()
    work.copy(outside)
    space.remove(outside)
    work.axpy(-1.0, outside)
    return work.norm(), outside.norm()
