"""Steepest descent as a PETSc KSP."""

from __future__ import annotations

import math

from firedrake.petsc import PETSc

__all__ = ["SteepestDescent"]


class SteepestDescent:
    """Steepest descent with exact line search, for symmetric positive definite operators.

    Each iteration goes along z = B (b - A x) to the least ‖x - A⁻¹b‖ in the norm of A. Asked for by
    ``-ksp_type python -ksp_python_type prdp_fem.unrolled.SteepestDescent``. Tolerances, the limit
    of iterations, the norm (preconditioned or unpreconditioned), the convergence test, monitors,
    the residual history, a nonzero guess and transposed solves are as PETSc's own methods have
    them.
    """

    def setUp(self, ksp: PETSc.KSP) -> None:
        A, _ = ksp.getOperators()
        self._r = A.createVecLeft()
        self._z, self._w = A.createVecs()

    def solve(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Called by ``KSPSolve``."""
        A, pc = ksp.getOperators()[0], ksp.getPC()
        self._iterate(ksp, b, x, A.mult, pc.apply, A.getNullSpace())

    def solveTranspose(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Called by ``KSPSolveTranspose``."""
        A, pc = ksp.getOperators()[0], ksp.getPC()
        self._iterate(ksp, b, x, A.multTranspose, pc.applyTranspose, A.getTransposeNullSpace())

    def _iterate(self, ksp, b, x, multiply, precondition, null_space) -> None:
        r = self._r
        z = self._z
        w = self._w
        if ksp.getInitialGuessNonzero():
            multiply(x, r)
            r.aypx(-1.0, b)
        else:
            x.zeroEntries()
            b.copy(r)
        # PETSc has no other norms for methods in Python.
        is_unpreconditioned = ksp.getNormType() == PETSc.KSP.NormType.UNPRECONDITIONED
        max_it = ksp.getTolerances()[3]
        for iteration in range(max_it + 1):
            precondition(r, z)
            if null_space is not None and null_space.handle:
                null_space.remove(z)
            slope = z.dot(r)
            norm = (r if is_unpreconditioned else z).norm()
            ksp.setIterationNumber(iteration)
            # PETSc takes NaN for a mistake of the caller's here, and for divergence in its test.
            if not math.isnan(norm):
                ksp.setResidualNorm(norm)
            ksp.logConvergenceHistory(norm)
            ksp.monitor(iteration, norm)
            reason = ksp.callConvergenceTest(iteration, norm)
            if not reason and iteration == max_it:
                reason = PETSc.KSP.ConvergedReason.DIVERGED_MAX_IT
            if not reason:
                multiply(z, w)
                curvature = z.dot(w)
                if slope == 0:
                    reason = PETSc.KSP.ConvergedReason.CONVERGED_ATOL
                elif not curvature > 0:
                    reason = PETSc.KSP.ConvergedReason.DIVERGED_INDEFINITE_MAT
            if reason:
                ksp.setConvergedReason(reason)
                return
            x.axpy(slope / curvature, z)
            r.axpy(-slope / curvature, w)
