"""What linear and nonlinear systems that are differentiated as their iterations have in common."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from firedrake.logging import warning
from firedrake.petsc import PETSc

from prdp_fem.assembly.operator_derivative import SOLUTION, OperatorDerivative
from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.petsc_types import pc_facts
from prdp_fem.problem.firedrake_internals import operators, pin_quadrature
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.point import Direction
from prdp_fem.solution.differentiation import Unrolled
from prdp_fem.statistics import Statistics
from prdp_fem.unrolled import UnrolledKSP

__all__ = ["UnrolledSystem"]


class UnrolledSystem:
    """The derivatives of the iterations of a KSP, by its operators, too; in front of a System among the bases of a class."""

    statistics: Statistics

    def _unroll(self, forms: Forms, solver, differentiation: Unrolled) -> None:
        """Take the KSP of a solver.

        Parameters
        ----------
        forms : Forms
        solver : firedrake.NonlinearVariationalSolver
            Made for ``forms.problem``.
        differentiation : Unrolled

        Raises
        ------
        ValueError
            For a method that cannot be unrolled.
        """
        self._unrolled = UnrolledKSP(
            solver.snes.getKSP(), checkpoints=differentiation.checkpoints,
            options=solver.parameters, name=forms.solution.name())
        self._is_checked = self._has_warned = False
        problem, (A, P) = forms.problem, operators(solver)
        self._operator = OperatorDerivative(forms, pin_quadrature(problem.J, problem.form_compiler_parameters), A)
        # Of the matrix that the preconditioner is made from, where that is another one.
        self._preconditioner = None
        if P.handle != A.handle:
            self._preconditioner = OperatorDerivative(forms, pin_quadrature(problem.Jp, problem.form_compiler_parameters), P)

    def _check_method(self, refined: RefinedKSP, symmetric: Callable[[], bool]) -> None:
        """Refuse, after the first solve, what PETSc tells of a KSP that is set up only."""
        if not self._is_checked:
            self._check_refined(refined)
            self._unrolled.prepare(symmetric())
            refined.keep_types()
            self._is_checked = True

    def _warn_of_no_iterations(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            if self._unrolled.ksp.comm.rank == 0:
                warning("a solve that is differentiated as its iterations had none to make, since its residual was zero or below the "
                        "tolerance at the start: its unrolled derivative by right-hand side and operator is zero; implicit is not")

    @staticmethod
    def _check_refined(refined: RefinedKSP) -> None:
        if refined.is_nested:
            raise ValueError("differentiation='unrolled' is that of the outermost KSP, and the refinement follows one inside the "
                             "preconditioner: use implicit differentiation, or refine the outermost KSP with ksp_prefix=\"\"")

    def check_derivative(self, index: int) -> None:
        super().check_derivative(index)
        for operator in self._operators:
            if index in operator.inputs:
                operator.check_type()

    # The right-hand side is computed again from all of them.
    unread_inputs = ()

    needs_boundary = True

    def values_read(self, inputs: Iterable[int], meshes: Sequence = (), *,
                    is_second: bool = False) -> set[int]:
        return set(range(len(self.inputs)))

    @property
    def _operators(self) -> list[OperatorDerivative]:
        return [self._operator] if self._preconditioner is None else [self._operator, self._preconditioner]

    def _pull_iterations(self, b: PETSc.Vec, start: PETSc.Vec | None, iterations: int, cotangent: PETSc.Vec, *, b_cotangent: PETSc.Vec,
                         guess_cotangent: PETSc.Vec | None = None, of_operators: Iterable[OperatorDerivative] = (),
                         symmetric: bool = False) -> None:
        """Write the cotangents of b and of the guess, and those of the operators that are wanted."""
        wanted = list(of_operators)
        kind = self._unrolled.ksp.getPC().getType()
        if wanted and pc_facts(kind).inverts:
            raise ValueError(f"pc_type {kind} solves the system by itself, and counts as constant when iterations are unrolled: nothing "
                             "would be left of the derivative by what the operator depends on; use implicit differentiation, or another "
                             "pc_type")
        for one in wanted:
            one.cotangent.zero()
        operator, preconditioner = (one.cotangent if one in wanted else None for one in (self._operator, self._preconditioner))
        self._unrolled.adjoint(b, start, iterations, cotangent, b_cotangent=b_cotangent, guess_cotangent=guess_cotangent,
                               operator_cotangent=operator, preconditioner_cotangent=preconditioner, symmetric=symmetric)
        self.statistics.adjoint_iterations += iterations

    @staticmethod
    def _add_by_operators(of_operators: Iterable[OperatorDerivative], gradients: Mapping, by_mesh: dict) -> None:
        """Add what the cotangents of operators give to gradients by inputs and SOLUTION, and to those by meshes."""
        for operator in of_operators:
            # In an order that is the same on all ranks, which assemble together.
            what = [m for m in gradients if m == SOLUTION or m in operator.inputs]
            values, cofunctions = operator.gradients(what, by_mesh)
            for m, value in values.items():
                gradients[m][:] += value
            for mesh, cofunction in cofunctions.items():
                by_mesh[mesh] += cofunction

    def _push_iterations(self, b: PETSc.Vec, start: PETSc.Vec | None, iterations: int, out: PETSc.Vec, direction: Direction, *,
                         b_tangent: PETSc.Vec, guess_tangent: PETSc.Vec | None = None, solution=None) -> None:
        """Write the tangent of the iterate; ``solution`` is the direction of the state that operators depend on."""
        preconditioner = None if self._preconditioner is None else self._preconditioner.tangent(direction, solution)
        self._unrolled.tangent(b, start, iterations, out, b_tangent=b_tangent, guess_tangent=guess_tangent,
                               operator_tangent=self._operator.tangent(direction, solution), preconditioner_tangent=preconditioner)
        self.statistics.tangent_iterations += iterations

    def solve_second_adjoint(self, *arguments, **keywords) -> dict:
        raise NotImplementedError("unrolled iterations have no second derivatives here: use differentiation='implicit' for Hessians")
