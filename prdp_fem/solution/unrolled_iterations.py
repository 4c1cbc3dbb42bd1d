"""The derivatives of a KSP's iterations, by right-hand side, guess and what operators depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from firedrake.logging import warning
from firedrake.petsc import PETSc

from prdp_fem.assembly.operator_derivative import SOLUTION, OperatorDerivative
from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.petsc_types import pc_facts
from prdp_fem.memory.place import Place
from prdp_fem.problem.firedrake_internals import operators, pin_quadrature
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.point import Direction
from prdp_fem.solution.differentiation import Unrolled
from prdp_fem.unrolled import UnrolledKSP

__all__ = ["Iterate", "UnrolledIterations"]


@dataclass(frozen=True)
class Iterate:
    """What a KSP was asked for, and how far it has come.

    Attributes
    ----------
    b : PETSc.Vec
    start : PETSc.Vec or None
        None for zero.
    iterations : int
    """

    b: PETSc.Vec
    start: PETSc.Vec | None
    iterations: int


class UnrolledIterations:
    """The iterations of a solver's KSP, and their derivatives.

    Parameters
    ----------
    forms : Forms
    solver : firedrake.NonlinearVariationalSolver
        Made for ``forms.problem``.
    refined : RefinedKSP
        Its KSP, with the one that settings are put on.
    place : Place
    differentiation : Unrolled

    Raises
    ------
    ValueError
        For a method that cannot be unrolled.

    Attributes
    ----------
    of_ksp : Kept
        The derivative of the KSP; how that is set is looked at once for operators of a type.
    operators : list of OperatorDerivative
        Of the operator, and of the matrix that the preconditioner is made from where that is
        another one.
    """

    def __init__(
        self, forms: Forms, solver, refined: RefinedKSP, place: Place, differentiation: Unrolled
    ):
        ksp, name = solver.snes.getKSP(), forms.solution.name()
        self.of_ksp = place.kept(
            lambda: UnrolledKSP(
                ksp, checkpoints=differentiation.checkpoints, options=solver.parameters, name=name
            )
        )
        self.of_ksp.ensure()  # which refuses what cannot be unrolled
        self._refined, self._statistics = refined, place.statistics
        self._is_checked = self._has_warned = False
        problem, (A, P) = forms.problem, operators(solver)
        assembled = [(problem.J, A)]
        if P.handle != A.handle:
            assembled.append((problem.Jp, P))
        parameters = problem.form_compiler_parameters
        self.operators = [
            OperatorDerivative(forms, pin_quadrature(form, parameters), matrix)
            for form, matrix in assembled
        ]

    # What can be unrolled

    def check_setting(self) -> None:
        """Refuse a refinement of a KSP inside the preconditioner."""
        if self._refined.is_nested:
            raise ValueError(
                "differentiation='unrolled' is that of the outermost KSP, and the "
                "refinement follows one inside the preconditioner: use implicit "
                'differentiation, or refine the outermost KSP with ksp_prefix=""'
            )

    def check_method(self, symmetric: Callable[[], bool]) -> None:
        """Refuse, after the first solve, what PETSc tells of a KSP that is set up only."""
        if not self._is_checked:
            self.check_setting()
            self.of_ksp.value.prepare(symmetric())
            self._refined.keep_types()
            self._is_checked = True

    def check(self, index: int) -> None:
        """Raise a ValueError where an operator depends on an input, and has no entries at hand."""
        for operator in self.operators:
            if index in operator.inputs:
                operator.check_type()

    def warn_of_no_iterations(self) -> None:
        """Warn, once, where a solve had no iterations to make."""
        if not self._has_warned:
            self._has_warned = True
            if self.of_ksp.value.ksp.comm.rank == 0:
                warning(
                    "a solve that is differentiated as its iterations had none to make, since "
                    "its residual was zero or below the tolerance at the start: its unrolled "
                    "derivative by right-hand side and operator is zero; implicit is not"
                )

    # Reverse

    def pull(
        self,
        iterate: Iterate,
        cotangent: PETSc.Vec,
        *,
        b_cotangent: PETSc.Vec,
        guess_cotangent: PETSc.Vec | None = None,
        of_operators: Iterable[OperatorDerivative] = (),
        symmetric: bool = False,
    ) -> None:
        """Write the cotangents of b, of the guess, and of the operators that are wanted."""
        wanted, unrolled = list(of_operators), self.of_ksp.value
        kind = unrolled.ksp.getPC().getType()
        if wanted and pc_facts(kind).inverts:
            raise ValueError(
                f"pc_type {kind} solves the system by itself, and counts as constant "
                "when iterations are unrolled: nothing would be left of the "
                "derivative by what the operator depends on; use implicit "
                "differentiation, or another pc_type"
            )
        for one in wanted:
            one.cotangent.zero()
        operator, preconditioner = (
            one.cotangent if one in wanted else None for one in self._pair()
        )
        unrolled.adjoint(
            iterate.b,
            iterate.start,
            iterate.iterations,
            cotangent,
            b_cotangent=b_cotangent,
            guess_cotangent=guess_cotangent,
            operator_cotangent=operator,
            preconditioner_cotangent=preconditioner,
            symmetric=symmetric,
        )
        self._statistics.adjoint_iterations += iterate.iterations

    def _pair(self) -> tuple[OperatorDerivative, OperatorDerivative | None]:
        """The operator, and what the preconditioner is made from: None for the same."""
        operator, *others = self.operators
        return operator, others[0] if others else None

    @staticmethod
    def add_by_operators(
        of_operators: Iterable[OperatorDerivative], gradients: Mapping, by_mesh: dict
    ) -> None:
        """Add what operators' cotangents give to gradients by inputs, SOLUTION, and meshes."""
        for operator in of_operators:
            # In an order that is the same on all ranks, which assemble together.
            what = [m for m in gradients if m == SOLUTION or m in operator.inputs]
            values, cofunctions = operator.gradients(what, by_mesh)
            for m, value in values.items():
                gradients[m][:] += value
            for mesh, cofunction in cofunctions.items():
                by_mesh[mesh] += cofunction

    # Forward

    def push(
        self,
        iterate: Iterate,
        out: PETSc.Vec,
        direction: Direction,
        *,
        b_tangent: PETSc.Vec,
        guess_tangent: PETSc.Vec | None = None,
        solution=None,
    ) -> None:
        """Write the tangent of the iterate; ``solution`` is that of the state of operators."""
        operator, preconditioner = self._pair()
        of_preconditioner = None
        if preconditioner is not None:
            of_preconditioner = preconditioner.tangent(direction, solution)
        self.of_ksp.value.tangent(
            iterate.b,
            iterate.start,
            iterate.iterations,
            out,
            b_tangent=b_tangent,
            guess_tangent=guess_tangent,
            operator_tangent=operator.tangent(direction, solution),
            preconditioner_tangent=of_preconditioner,
        )
        self._statistics.tangent_iterations += iterate.iterations
