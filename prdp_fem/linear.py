"""A linear variational problem as a function of its inputs: solve, adjoint and tangent, at PETSc's level.

The system A u = b of a problem a(u, v) = L(v) with Dirichlet rows folded out: with g the boundary values, continued by
zero, u = g + w and A w = L - a(g, ·), where the rows and columns of A at boundary dofs are those of the identity. A solve
starts from w = 0 (or from a guess), and so is a function of the inputs, whatever was solved before.

What is constant is assembled once: the operator unless it depends on an input whose value changed, and what the right-hand
side is affine in as a matrix B. A solve then is B.mult, KSPSolve; its derivative is KSPSolveTranspose, B.multTranspose.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import ufl
from firedrake import Function
from firedrake.petsc import PETSc
from mpi4py import MPI
from pyadjoint.tape import stop_annotating

from prdp_fem import firedrake_internals
from prdp_fem.forms import LinearForms
from prdp_fem.inputs import local_values, vector_like
from prdp_fem.krylov import Krylov, Statistics
from prdp_fem.ladders import Setting
from prdp_fem.point import Point
from prdp_fem.residual import ResidualDerivatives
from prdp_fem.right_hand_side import RightHandSide

__all__ = ["LinearSystem"]


class LinearSystem:
    """The solve of a linear problem, and its derivatives, as functions of the inputs.

    Parameters
    ----------
    forms : LinearForms
    solver : firedrake.NonlinearVariationalSolver
        Made for ``forms.problem``: its KSP, options, nullspaces and operators are used.
    make_adjoint_solver : callable
        Makes such a solver, of the same options, for the adjoint of the problem.

    Attributes
    ----------
    forms : LinearForms
    inputs : list of Input
    size : int
        Rank-local number of dofs of the solution.
    statistics : Statistics
    """

    def __init__(self, forms: LinearForms, solver, make_adjoint_solver: Callable):
        self.forms = forms
        self.inputs = forms.inputs
        self.size = local_values(forms.solution).size
        self.statistics = Statistics()
        self._solver = solver
        self._make_adjoint_solver = make_adjoint_solver
        self._comm = forms.solution.function_space().mesh().comm
        ksp = solver.snes.getKSP()
        ksp.setOperators(*firedrake_internals.operators(solver))
        self._krylov = Krylov(ksp, self._transposed_ksp)
        self._operator_is_current = self._adjoint_is_current = False
        self._mesh_versions: tuple[int, ...] | None = None
        with stop_annotating():
            self._lifting = Function(forms.solution.function_space())
            self._right_hand_side = RightHandSide(forms)
            self._derivatives = ResidualDerivatives(forms)
        self._placed, self._solved, self._adjoint, self._zero = (vector_like(forms.solution) for _ in range(4))
        self._has_fields_to_assemble = any(not entry.is_real and index not in self._right_hand_side.terms
                                           for index, entry in enumerate(self.inputs))

    @cached_property
    def _adjoint_solver(self):
        """Firedrake's solver of the adjoint problem, for preconditioners that cannot be transposed."""
        return self._make_adjoint_solver(self.forms.adjoint_problem())

    @contextmanager
    def _transposed_ksp(self):
        solver = self._adjoint_solver
        with firedrake_internals.solver_context(solver):
            if not self._adjoint_is_current:
                self._set_up(solver)
                self._adjoint_is_current = True
            yield solver.snes.getKSP()

    def _set_up(self, solver) -> None:
        """Assemble the operators of a solver, and set its KSP up; inside its context."""
        # The operator does not depend on the solution: any state serves.
        firedrake_internals.assemble_operators(solver, self._zero)
        ksp = solver.snes.getKSP()
        if ksp.getPC().getType() in _PRECONDITIONERS_WITH_MEMORY:
            ksp.getPC().reset()
        ksp.setOperators(*firedrake_internals.operators(solver))
        ksp.setUp()

    # What is done at each solve

    @contextmanager
    def _work_on(self, kind: str):
        """Time and log what is inside, and keep its assemblies off pyadjoint's tape."""
        # Preconditioners may ask for forms and options at their first use, inside KSPSolve.
        with stop_annotating(), self.statistics.timed(kind), _EVENTS[kind], firedrake_internals.solver_context(self._solver):
            yield

    def values(self, without: Sequence[int] = ()) -> list[np.ndarray]:
        """Rank-local values of the user's coefficients as they are now; empty for those left out."""
        return [_NO_VALUES if index in without else local_values(entry.original) for index, entry in enumerate(self.inputs)]

    def boundary_values(self, conditions) -> np.ndarray | None:
        """Rank-local values of boundary conditions, zero elsewhere; None where they are zero on all ranks."""
        if all(isinstance(condition.function_arg, ufl.classes.Zero) for condition in conditions):
            return None
        with stop_annotating():
            self._lifting.assign(0)
            for condition in conditions:
                condition.apply(self._lifting)
        with self._lifting.dat.vec_ro as vector:
            if vector.norm(PETSc.NormType.NORM_INFINITY) == 0:
                return None
        return local_values(self._lifting)

    def _move_to(self, point: Point) -> None:
        """Bring all that is assembled up to date with the inputs of a point."""
        terms = self._right_hand_side.terms
        changed = np.array([index not in terms and entry.differs(values)
                            for index, (entry, values) in enumerate(zip(self.inputs, point.values))], dtype=np.intc)
        if self._comm.size > 1 and self._has_fields_to_assemble:
            # A field may have changed on some ranks only, but halo exchanges and assembly are collective.
            self._comm.Allreduce(MPI.IN_PLACE, changed, MPI.MAX)
        changed = set(np.flatnonzero(changed))
        for index in changed:
            self.inputs[index].write(point.values[index])
        versions = self.mesh_versions()
        moved = versions != self._mesh_versions
        if moved or any(self.inputs[index].in_operator for index in changed):
            self._operator_is_current = False
        self._right_hand_side.forget(changed, moved)
        self._mesh_versions = versions
        if not self._operator_is_current:
            self._set_up(self._solver)
            self._krylov.operator_changed()
            self.statistics.assemblies += 1
            self._operator_is_current, self._adjoint_is_current = True, False

    def mesh_versions(self) -> tuple[int, ...]:
        """Numbers that change when a mesh moves."""
        return tuple(mesh.coordinates.dat.dat_version for mesh in self.forms.meshes)

    def invalidate(self) -> None:
        """Have everything assembled again at the next solve."""
        self._mesh_versions = None

    def solve(self, point: Point, setting: Setting | None, solutions: np.ndarray, varying: Mapping[int, np.ndarray] | None = None) -> None:
        """Solve at a point, or at a batch of them.

        Parameters
        ----------
        point : Point
        setting : Setting or None
            How far the KSP goes; None for what its options say.
        solutions : numpy.ndarray
            Shape (batch, n), written to: rank-local dofs.
        varying : Mapping of int to numpy.ndarray
            Inputs that differ from row to row, shape (batch, size), instead of their values in the point.

        Raises
        ------
        firedrake.exceptions.ConvergenceError
            Where the KSP fails.
        """
        varying = {} if varying is None else varying
        dofs, has_guess = self.forms.boundary_dofs, point.guess is not None
        with self._work_on("forward"):
            for row, solution in enumerate(solutions):
                if row == 0 or not self._only_enters_terms(varying):
                    self._move_to(point.at(varying, row))
                    self._right_hand_side.prepare(point, varying)
                b = self._right_hand_side.row(varying, row)
                if has_guess:
                    solution[:] = point.guess
                    solution[dofs] = 0.0
                self._placed.placeArray(solution)
                try:
                    iterations = self._krylov.solve(b, self._placed, setting, guess=has_guess)
                finally:
                    self._placed.resetArray()
                self.statistics.solves += 1
                self.statistics.forward_iterations += iterations
            solutions[:, dofs] = 0.0  # for preconditioners that do not keep the boundary rows apart to the bit
            if point.boundary is not None:
                solutions += point.boundary

    def solve_adjoint(self, point: Point, setting: Setting | None, cotangents: np.ndarray, solutions: np.ndarray,
                      gradients: Mapping[int, np.ndarray], *, varying: Mapping[int, np.ndarray] | None = None,
                      boundary: np.ndarray | None = None, meshes: Iterable = ()) -> dict:
        """Solve Aᵀ λ = ∂J/∂u at a point, or at a batch of them, and take the derivatives of J by what u depends on.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        cotangents : numpy.ndarray
            Shape (batch, n): rank-local ∂J/∂u. Boundary entries are left out of the system: a truncated iteration would see
            them.
        solutions : numpy.ndarray
            Shape (batch, n): what :meth:`solve` gave.
        gradients : Mapping of int to numpy.ndarray
            By inputs, shape (batch, size), written to: -(∂F/∂m)ᵀ λ, by dofs (no mass matrix in between). For a Constant or a
            Real space the sum over all ranks, on every rank.
        varying : Mapping of int to numpy.ndarray
            As in :meth:`solve`.
        boundary : numpy.ndarray or None
            Shape (batch, n), written to where given: the derivative by the boundary values, zero at other dofs.
        meshes : iterable of MeshGeometry
            Meshes whose coordinates to differentiate by.

        Returns
        -------
        dict of MeshGeometry to Cofunction
            The derivatives by coordinates, of the last row.
        """
        varying = {} if varying is None else varying
        terms, dofs, by_mesh = self._right_hand_side.terms, self.forms.boundary_dofs, {}
        by_form = boundary is not None or bool(meshes) or not gradients.keys() <= terms.keys()
        inner = cotangents.copy()
        inner[:, dofs] = 0.0
        with self._work_on("adjoint"):
            for row, cotangent in enumerate(inner):
                at = point.at(varying, row) if row == 0 or by_form or not self._only_enters_terms(varying) else None
                if at is not None:
                    self._move_to(at)
                self._placed.placeArray(cotangent)
                try:
                    iterations = self._krylov.solve_transposed(self._placed, self._adjoint, setting)
                finally:
                    self._placed.resetArray()
                self.statistics.adjoint_solves += 1
                self.statistics.adjoint_iterations += iterations
                if by_form:
                    self._derivatives.at(at, solutions[row], self._adjoint.array_r)
                for index, gradient in gradients.items():
                    if index in terms:
                        terms[index].transposed_product(self._adjoint, gradient[row])
                    else:
                        gradient[row] = self._derivatives.by_input(index)
                if boundary is not None:
                    boundary[row] = 0.0
                    boundary[row, dofs] = cotangents[row, dofs] + self._derivatives.by_boundary()[dofs]
                by_mesh = {mesh: self._derivatives.by_mesh(mesh) for mesh in meshes}
        return by_mesh

    def solve_tangent(self, point: Point, setting: Setting | None, solution: np.ndarray, tangents: Mapping[int, np.ndarray],
                      meshes: Mapping, boundary: np.ndarray | None, out: np.ndarray) -> None:
        """The tangent linear solve: the derivative of the solution in a direction of what it depends on.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        solution : numpy.ndarray
            What :meth:`solve` gave at the point.
        tangents : Mapping of int to numpy.ndarray
            Rank-local directions by inputs.
        meshes : Mapping of MeshGeometry to Function
            Directions of mesh coordinates.
        boundary : numpy.ndarray or None
            The direction of the boundary values, zero elsewhere.
        out : numpy.ndarray
            Rank-local, written to.
        """
        terms, dofs, b = self._right_hand_side.terms, self.forms.boundary_dofs, self._adjoint
        with self._work_on("tangent"):
            self._move_to(point)
            self._derivatives.at(point, solution)
            b.set(0.0)
            for index, tangent in tangents.items():
                if index in terms:
                    terms[index].product(tangent, self._solved)
                    b.axpy(1.0, self._solved)
                else:
                    b.array_w[:] += self._derivatives.in_direction(index, tangent)
            for mesh, tangent in meshes.items():
                b.array_w[:] += self._derivatives.in_mesh_direction(mesh, tangent)
            b.array_w[dofs] = 0.0
            if boundary is not None:
                self._right_hand_side.lift(boundary, b)
            iterations = self._krylov.solve(b, self._solved, setting)
            out[:] = self._solved.array_r
            out[dofs] = 0.0
            if boundary is not None:
                out += boundary
        self.statistics.tangent_solves += 1
        self.statistics.tangent_iterations += iterations

    def _only_enters_terms(self, varying: Mapping[int, np.ndarray]) -> bool:
        """Whether what varies enters the right-hand side alone, by a matrix: then nothing is assembled between rows."""
        return varying.keys() <= self._right_hand_side.terms.keys()


# These keep something of the values they were first set up with, such as the interpolation of algebraic multigrid.
_PRECONDITIONERS_WITH_MEMORY = frozenset({"gamg", "hypre", "ml", "hmg", "bddc"})
_NO_VALUES = np.empty(0)
_EVENTS = {kind: PETSc.Log.Event(f"PRDP{kind.capitalize()}") for kind in ("forward", "adjoint", "tangent")}
