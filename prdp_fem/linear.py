"""A linear variational problem as a function of its inputs: solve, adjoint and tangent, at PETSc's level.

The system A u = b of a problem a(u, v) = L(v) with Dirichlet rows folded out: with g the boundary values, continued by
zero, u = g + w and A w = L - a(g, ·), where the rows and columns of A at boundary dofs are those of the identity. A solve
starts from w = 0 (or from a guess), and so is a function of the inputs, whatever was solved before.

What is constant is assembled once: the operator unless it depends on an input whose value changed, and for each input m
that the right-hand side is affine in, the matrix B of b = B m + c. A solve then is B.mult, KSPSolve; its derivative is
KSPSolveTranspose, B.multTranspose. The rest goes through assemblers built once.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
import ufl
from firedrake import (
    Cofunction,
    DirichletBC,
    Function,
    LinearVariationalProblem,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    action,
    adjoint,
    assemble,
    derivative,
)
from firedrake.assemble import get_assembler
from firedrake.matrix import MatrixBase
from firedrake.petsc import PETSc
from firedrake.slate.slate import TensorBase
from firedrake.ufl_expr import extract_domains
from mpi4py import MPI
from pyadjoint.tape import stop_annotating
from ufl import classes
from ufl.algorithms import expand_derivatives, extract_coefficients
from ufl.corealg.traversal import unique_pre_traversal

from prdp_fem import firedrake_internals
from prdp_fem.firedrake_internals import boundary_expression, pin_quadrature
from prdp_fem.inputs import Input, coefficients_of, is_real, local_values, name_of, set_local_values, vector_like
from prdp_fem.krylov import Krylov, Statistics
from prdp_fem.ladders import Setting

__all__ = ["LinearForms", "LinearSystem", "Point"]


@dataclass
class Point:
    """Where a solve is made, and where it is linearised.

    Attributes
    ----------
    values : sequence of numpy.ndarray
        Rank-local values of the inputs, in their order.
    boundary : numpy.ndarray or None
        Rank-local boundary values, zero elsewhere; None where all are zero on all ranks.
    guess : numpy.ndarray or None
        Where to start from; None for zero.
    """

    values: Sequence[np.ndarray]
    boundary: np.ndarray | None = None
    guess: np.ndarray | None = None

    def at(self, varying: Mapping[int, np.ndarray], row: int) -> Point:
        """This point with one row of the varying inputs put in."""
        if not varying:
            return self
        return Point([varying[index][row] if index in varying else values for index, values in enumerate(self.values)],
                     self.boundary, self.guess)


class LinearForms:
    """The forms of a linear problem taken apart, over copies of its coefficients.

    Parameters
    ----------
    problem : LinearVariationalProblem
        The user's.

    Attributes
    ----------
    inputs : list of Input
        All that the solution depends on, boundary values and the mesh apart.
    problem : NonlinearVariationalProblem
        The same problem over the copies, for Firedrake's solver.
    a, L : ufl.Form
        The two sides over the copies; ``L`` is None where it is empty. Neither contains the solution.
    cofunctions : dict of Input to float
        The Cofunctions in the right-hand side, with their weights.
    """

    def __init__(self, problem: LinearVariationalProblem):
        if not problem.is_linear:
            raise TypeError("LinearVariationalSolver solves a LinearVariationalProblem (a == L), found a nonlinear one (F == 0): "
                            "state it as LinearVariationalProblem(a, L, u, bcs)")
        if isinstance(problem.J, (TensorBase, MatrixBase)) or not isinstance(problem.J, ufl.Form):
            raise TypeError(f"the bilinear form must be a UFL form, found a {type(problem.J).__name__}: prdp_fem differentiates "
                            "forms, and cannot look into assembled matrices or Slate tensors")
        if problem.restrict:
            raise ValueError("restrict=True is not needed here, and not supported: boundary rows are folded out of the system "
                             "already; leave it away")
        for condition in problem.bcs:
            if not isinstance(condition, DirichletBC):
                raise TypeError(f"boundary conditions must be DirichletBCs, found a {type(condition).__name__}: "
                                "put other conditions into the forms")
        self.problem_conditions = list(problem.bcs)
        form, cofunctions = _split_residual(problem.F)
        right = _right_hand_side(form, problem)
        mesh = problem.u.function_space().mesh().unique()
        operator = coefficients_of(problem.J, problem.Jp)
        if problem.u in operator:
            raise TypeError(f"the bilinear form depends on the solution '{problem.u.name()}', so the problem is not linear: keep a lagged "
                            "value in a Function of its own, or state a NonlinearVariationalProblem")
        originals = coefficients_of(right, problem.J, problem.Jp)
        originals += [cofunction for cofunction, _ in cofunctions if cofunction not in originals]
        self.inputs = [Input(original, mesh) for original in originals]
        mapping = {entry.original: entry.copy for entry in self.inputs}
        for entry in self.inputs:
            entry.in_operator = entry.original in operator
        with stop_annotating():
            self.solution = Function(problem.u.function_space(), name=problem.u.name())
            self.problem = problem.rediscretise(u=self.solution, coefficient_mapping=mapping)
            parameters = problem.form_compiler_parameters
            self.a = pin_quadrature(self.problem.J, parameters)
            self.L = None if right is None else pin_quadrature(ufl.replace(right, mapping), parameters)
        self.cofunctions = {self.inputs[originals.index(cofunction)]: sum(weight for other, weight in cofunctions if other is cofunction)
                            for cofunction, _ in cofunctions}

    def find(self, original) -> int:
        """The place of a user's coefficient among the inputs.

        Raises
        ------
        ValueError
            Where the problem does not depend on it, or depends on it by boundary values.
        """
        name = name_of(original)
        if any(original in coefficients_of(boundary_expression(condition)) for condition in self.problem_conditions):
            raise ValueError(f"{type(original).__name__} '{name}' gives boundary values, which cannot be controls of a layer: "
                             "differentiate by them on pyadjoint's tape")
        for index, entry in enumerate(self.inputs):
            if entry.original is original:
                return index
        known = ", ".join(f"{type(entry.original).__name__} '{entry.name}'" for entry in self.inputs) or "no coefficient at all"
        raise ValueError(f"the problem does not depend on {type(original).__name__} '{name}'; it depends on {known}")

    def copy_of(self, value):
        """The copy that stands for a user's coefficient; any other object is its own."""
        for entry in self.inputs:
            if entry.original is value:
                return entry.copy
        return value


def _split_residual(F) -> tuple[ufl.Form | None, list[tuple[Cofunction, float]]]:
    """A residual as one form and the Cofunctions, with weights, that were subtracted from it."""
    if isinstance(F, ufl.Form):
        return F, []
    form, cofunctions = None, []
    components = zip(F.components(), F.weights()) if isinstance(F, ufl.FormSum) else [(F, 1)]
    for component, weight in components:
        if isinstance(component, ufl.Form):
            component = component if weight == 1 else weight*component
            form = component if form is None else form + component
        elif isinstance(component, Cofunction):
            if not isinstance(weight, Real):
                raise TypeError(f"the weight of Cofunction '{component.name()}' in the right-hand side must be a number, found {weight!r}: "
                                "put it into the form that the Cofunction is assembled from")
            cofunctions.append((component, -float(weight)))
        else:
            raise TypeError(f"the right-hand side must be made of UFL forms and Cofunctions, found a {type(component).__name__}: "
                            "assemble it into a Cofunction first")
    return form, cofunctions


def _right_hand_side(residual: ufl.Form | None, problem) -> ufl.Form | None:
    """L of the residual a(u, ·) - L: what is left when the integrals of the action of a are taken away."""
    remaining = [] if residual is None else list(residual.integrals())
    identities = [_identity(integral) for integral in remaining]
    for integral in action(problem.J, problem.u).integrals():
        try:
            place = identities.index(_identity(integral))
        except ValueError:
            raise TypeError("the residual of the problem is not a(u, v) - L(v) with its bilinear form a: state the problem as "
                            "LinearVariationalProblem(a, L, u, bcs)") from None
        del identities[place], remaining[place]
    return -1*ufl.Form(remaining) if remaining else None


def _identity(integral) -> tuple:
    """Equal for integrals that are equal up to the names of their summation indices."""
    form = ufl.Form([integral])
    return form.signature(), form.coefficients(), tuple(coefficients_of(form))


def _is_affine(form: ufl.Form, coefficient: Function) -> bool:
    """Whether a form is affine in a coefficient, by its structure: derivatives do not tell, they vanish for sign(f), too."""
    for integral in form.integrals():
        for node in unique_pre_traversal(integral.integrand()):
            if not isinstance(node, _LINEAR_OPERATORS) and not node._ufl_is_terminal_ and coefficient in extract_coefficients(node):
                return False
    return True


_LINEAR_OPERATORS = (
    classes.Sum, classes.Product, classes.Division, classes.Indexed, classes.IndexSum, classes.ComponentTensor, classes.ListTensor,
    classes.Inner, classes.Dot, classes.Outer, classes.Cross, classes.Perp, classes.Trace, classes.Transposed, classes.Sym, classes.Skew,
    classes.Deviatoric, classes.Derivative, classes.Restricted, classes.CellAvg, classes.FacetAvg, classes.Conj, classes.Real,
    classes.Variable,
)
# These keep something of the values they were first set up with, such as the interpolation of algebraic multigrid.
_PRECONDITIONERS_WITH_MEMORY = frozenset({"gamg", "hypre", "ml", "hmg", "bddc"})


class LinearSystem:
    """The solve of a linear problem, and its derivatives, as functions of the inputs.

    Parameters
    ----------
    forms : LinearForms
    solver : firedrake.NonlinearVariationalSolver
        Made for ``forms.problem``: its KSP, options, nullspaces and operators are used.
    make_adjoint_solver : callable
        Makes such a solver, of the same options, for the adjoint of the problem.
    """

    def __init__(self, forms: LinearForms, solver, make_adjoint_solver: Callable):
        self.forms = forms
        self.inputs = forms.inputs
        self.size = local_values(forms.solution).size
        self.statistics = Statistics()
        self._solver = solver
        self._make_adjoint_solver = make_adjoint_solver
        self._space = forms.solution.function_space()
        self._comm = self._space.mesh().comm
        self._conditions = tuple(forms.problem.bcs)
        self._operator_is_current = False
        self._mesh_versions: tuple[int, ...] | None = None
        self.meshes = list(dict.fromkeys(mesh for form in (forms.a, forms.L) if form is not None for mesh in extract_domains(form)))
        ksp = solver.snes.getKSP()
        ksp.setOperators(*firedrake_internals.operators(solver))
        self.krylov = Krylov(ksp, self._transposed_ksp)
        self._adjoint_is_current = False
        with stop_annotating():
            self._lifting = Function(self._space)
            self._multiplier = Function(self._space)
            self._form_values = Cofunction(self._space.dual())
        self._rhs, self._base, self._product, self._solved, self._adjoint, self._zero = (vector_like(forms.solution) for _ in range(6))
        self._point = Point(())
        self._terms: dict[int, _AffineTerm | _CofunctionTerm] = {}
        self._rest: ufl.Form | None = forms.L
        self._split_off_terms()
        self._rest_assembler = None if self._rest is None else self._assembler(self._rest)
        self._rest_inputs = set() if self._rest is None else self._indices(coefficients_of(self._rest))
        self._rest_values: PETSc.Vec | None = None
        self._has_fields_to_assemble = any(not entry.is_real and index not in self._terms for index, entry in enumerate(self.inputs))
        self._derivative_assemblers: dict[int | str, list[tuple]] = {}
        self._tangent_assemblers: dict[int, tuple] = {}

    # What is asked once

    def _indices(self, copies) -> set[int]:
        return {index for index, entry in enumerate(self.inputs) if any(entry.copy is copy for copy in copies)}

    def _split_off_terms(self) -> None:
        """Find the inputs that b depends on by a matrix, and take their terms out of the form to be assembled."""
        for entry, weight in self.forms.cofunctions.items():
            self._terms[self.inputs.index(entry)] = _CofunctionTerm(weight, self.boundary_dofs)
        if self._rest is None or any(is_real(Function(space)) for space in self._space):
            return
        for index, entry in enumerate(self.inputs):
            copy = entry.copy
            if entry.in_operator or entry.is_real or not isinstance(copy, Function) or not _is_affine(self._rest, copy):
                continue
            part = expand_derivatives(derivative(self._rest, copy, TrialFunction(copy.function_space())))
            if part.empty() or part.coefficients() or len(part.arguments()) != 2:
                continue
            self._terms[index] = _AffineTerm(part, self._indices(coefficients_of(part)), entry, self.boundary_dofs)
            rest = expand_derivatives(ufl.replace(self._rest, {copy: ufl.zero(copy.ufl_shape)}))
            self._rest = None if rest.empty() else rest
            if self._rest is None:
                return

    def _assembler(self, form):
        return get_assembler(form, bcs=[bc.reconstruct(g=0) for bc in self._conditions], zero_bc_nodes=True,
                             form_compiler_parameters=self.forms.problem.form_compiler_parameters)

    @cached_property
    def boundary_dofs(self) -> np.ndarray:
        """Rank-local indices, among the dofs this rank owns, of those with Dirichlet values."""
        with stop_annotating():
            mask = Function(self._space)
            for part in mask.dat:
                part.data_wo[...] = 1.0
            for condition in self._conditions:
                condition.zero(mask)
        return np.flatnonzero(local_values(mask) == 0.0)

    @cached_property
    def _adjoint_solver(self):
        """Firedrake's solver of the adjoint problem, for preconditioners that cannot be transposed."""
        problem = self.forms.problem
        multiplier, right = Function(self._space), Cofunction(self._space.dual())
        adjoint_problem = LinearVariationalProblem(adjoint(problem.J), right, multiplier, bcs=[bc.reconstruct(g=0) for bc in problem.bcs],
                                                   aP=None if problem.Jp is None else adjoint(problem.Jp),
                                                   form_compiler_parameters=problem.form_compiler_parameters)
        return self._make_adjoint_solver(adjoint_problem)

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
        self._point = point
        changed = np.array([index not in self._terms and entry.differs(values)
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
        if moved or self._rest_inputs & changed:
            self._rest_values = None
        for term in self._terms.values():
            if moved or term.parameters & changed:
                term.forget()
        self._mesh_versions = versions
        if not self._operator_is_current:
            self._set_up(self._solver)
            self.krylov.operator_changed()
            self.statistics.assemblies += 1
            self._operator_is_current, self._adjoint_is_current = True, False

    def mesh_versions(self) -> tuple[int, ...]:
        """Numbers that change when a mesh moves."""
        return tuple(mesh.coordinates.dat.dat_version for mesh in self.meshes)

    def invalidate(self) -> None:
        """Have everything assembled again at the next solve."""
        self._mesh_versions = None

    def _base_of_rhs(self, boundary: np.ndarray | None) -> PETSc.Vec | None:
        """What is assembled of the right-hand side; None where nothing is."""
        if self._rest is None and boundary is None:
            return None
        b = self._base
        b.set(0.0)
        if self._rest is not None:
            if self._rest_values is None:
                self._rest_assembler.assemble(tensor=self._form_values)
                self._rest_values = b.duplicate()
                with self._form_values.dat.vec_ro as vector:
                    vector.copy(self._rest_values)
            b.axpy(1.0, self._rest_values)
        if boundary is not None:
            self._lift(boundary, b)
        return b

    def _fixed_products(self, point: Point, varying) -> dict[int, PETSc.Vec]:
        """The terms of the right-hand side whose inputs do not vary within a batch."""
        products = {}
        for index, term in self._terms.items():
            if index not in varying:
                products[index] = self._rhs.duplicate()
                term.product(point.values[index], products[index])
        return products

    def _rhs_of(self, base: PETSc.Vec | None, fixed: Mapping[int, PETSc.Vec], varying: Mapping[int, np.ndarray], row: int) -> PETSc.Vec:
        """The right-hand side of one row. Terms are added in one order, so that no bit depends on which of them vary."""
        b, started = self._rhs, base is not None
        if started:
            base.copy(b)
        for index, term in self._terms.items():
            product = fixed.get(index)
            if product is None:
                product = self._product if started else b
                term.product(varying[index][row], product)
            elif not started:
                product.copy(b)
            if started:
                b.axpy(1.0, product)
            started = True
        if not started:
            b.set(0.0)
        return b

    def _lift(self, boundary: np.ndarray, b: PETSc.Vec) -> None:
        """b -= a(g, ·)."""
        set_local_values(self._lifting, boundary)
        self._lift_assembler.assemble(tensor=self._form_values)
        with self._form_values.dat.vec_ro as vector:
            b.axpy(-1.0, vector)

    @cached_property
    def _lift_assembler(self):
        return self._assembler(action(self.forms.a, self._lifting))

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
        w, dofs = self._solved, self.boundary_dofs
        with self._work_on("forward"):
            for row, solution in enumerate(solutions):
                if row == 0 or not varying.keys() <= self._terms.keys():
                    self._move_to(point.at(varying, row))
                    base, fixed = self._base_of_rhs(point.boundary), self._fixed_products(point, varying)
                b = self._rhs_of(base, fixed, varying, row)
                if point.guess is not None:
                    solution[:] = point.guess
                    solution[dofs] = 0.0
                w.placeArray(solution)
                try:
                    iterations = self.krylov.solve(b, w, setting, guess=point.guess is not None)
                finally:
                    w.resetArray()
                self.statistics.solves += 1
                self.statistics.forward_iterations += iterations
            solutions[:, dofs] = 0.0  # for preconditioners that do not keep the boundary rows apart to the bit
            if point.boundary is not None:
                solutions += point.boundary

    def solve_adjoint(self, point: Point, setting: Setting | None, cotangents: np.ndarray, solutions: np.ndarray,
                      gradients: Mapping[int, np.ndarray], varying: Mapping[int, np.ndarray] | None = None) -> None:
        """Solve Aᵀ λ = ∂J/∂u at a point, or at a batch of them, and take the derivatives of J by inputs.

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
        """
        varying = {} if varying is None else varying
        by_form = any(self._depends_by_form(index) for index in gradients)
        inner = cotangents.copy()
        inner[:, self.boundary_dofs] = 0.0
        with self._work_on("adjoint"):
            for row, cotangent in enumerate(inner):
                if row == 0 or by_form or not varying.keys() <= self._terms.keys():
                    self._move_to(point.at(varying, row))
                self._rhs.placeArray(cotangent)
                try:
                    iterations = self.krylov.solve_transposed(self._rhs, self._adjoint, setting)
                finally:
                    self._rhs.resetArray()
                self.statistics.adjoint_solves += 1
                self.statistics.adjoint_iterations += iterations
                for index, gradient in gradients.items():
                    self._derivative(index, solutions[row], gradient[row])

    def _derivative(self, index: int, solution: np.ndarray, out: np.ndarray) -> None:
        if index in self._terms:
            self._terms[index].transposed_product(self._adjoint, out)
        else:
            out[:] = self._assembled_derivative(index, self.inputs[index].in_variables, self.inputs[index].variables, solution)

    def boundary_derivative(self, solution: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
        """The derivative of J by the boundary values, after :meth:`solve_adjoint`: zero except at boundary dofs."""
        out = np.zeros_like(cotangent)
        dofs = self.boundary_dofs
        with self._work_on("adjoint"):
            lifted = self._assembled_derivative("boundary", lambda form: form, [self.forms.solution], solution)
            out[dofs] = cotangent[dofs] + lifted[dofs]
        return out

    def mesh_derivative(self, mesh, solution: np.ndarray) -> Cofunction:
        """The derivative of J by the coordinates of the mesh, after :meth:`solve_adjoint`."""
        direction = TestFunction(mesh.coordinates.function_space())
        with self._work_on("adjoint"):
            self._set_residual_weights(solution)
            return assemble(derivative(self._weighted_residual, SpatialCoordinate(mesh), direction))

    def solve_tangent(self, point: Point, setting: Setting | None, solution: np.ndarray, tangents: dict[int, np.ndarray],
                      meshes: dict, boundary: np.ndarray | None, out: np.ndarray) -> None:
        """The tangent linear solve: the derivative of the solution in a direction of the inputs.

        Parameters
        ----------
        point : Point
        setting : Setting or None
        solution : numpy.ndarray
            What :meth:`solve` gave at the point.
        tangents : dict of int to numpy.ndarray
            Rank-local directions by inputs.
        meshes : dict of MeshGeometry to Function
            Directions of mesh coordinates.
        boundary : numpy.ndarray or None
            The direction of the boundary values, zero elsewhere.
        out : numpy.ndarray
            Rank-local, written to.
        """
        with self._work_on("tangent"):
            self._move_to(point)
            b = self._rhs
            b.set(0.0)
            for index, tangent in tangents.items():
                if index in self._terms:
                    self._terms[index].product(tangent, self._product)
                    b.axpy(1.0, self._product)
                else:
                    b.array_w[:] += self._assembled_tangent(index, tangent, solution)
            for mesh, tangent in meshes.items():
                self._set_residual_weights(solution)
                assemble(derivative(-1*self._residual, SpatialCoordinate(mesh), tangent), tensor=self._form_values)
                b.array_w[:] += local_values(self._form_values)
            b.array_w[self.boundary_dofs] = 0.0
            if boundary is not None:
                self._lift(boundary, b)
            iterations = self.krylov.solve(b, self._solved, setting)
            out[:] = self._solved.array_r
            out[self.boundary_dofs] = 0.0
            if boundary is not None:
                out += boundary
        self.statistics.tangent_solves += 1
        self.statistics.tangent_iterations += iterations

    # Derivatives that are assembled

    @cached_property
    def _residual(self) -> ufl.Form:
        """F = a(u, ·) - L over the copies, Cofunctions left out."""
        F = action(self.forms.a, self.forms.solution)
        return F if self.forms.L is None else F - self.forms.L

    @cached_property
    def _weighted_residual(self) -> ufl.Form:
        """-F(λ), a number."""
        return -1*action(self._residual, self._multiplier)

    def _depends_by_form(self, index: int) -> bool:
        return any(self.inputs[index].copy is copy for copy in self._residual_coefficients)

    @cached_property
    def _residual_coefficients(self) -> list:
        return coefficients_of(self._residual)

    def _set_residual_weights(self, solution: np.ndarray) -> None:
        for index in self._terms:
            # Solves read these from the point; forms read the copies.
            self.inputs[index].write(self._point.values[index])
        set_local_values(self.forms.solution, solution)
        set_local_values(self._multiplier, self._adjoint.array_r)

    def _assembled_derivative(self, key, restated, variables: list[Function], solution: np.ndarray) -> np.ndarray:
        """Assemble derivatives of the weighted residual, by assemblers that are built at their first use."""
        if key not in self._derivative_assemblers:
            form = restated(self._weighted_residual)
            self._derivative_assemblers[key] = [self._derivative_assembler(form, variable) for variable in variables]
        self._set_residual_weights(solution)
        for assembler, tensor in self._derivative_assemblers[key]:
            if assembler is not None:
                assembler.assemble(tensor=tensor)
        return np.concatenate([local_values(tensor) for _, tensor in self._derivative_assemblers[key]])

    def _derivative_assembler(self, form: ufl.Form, variable: Function) -> tuple:
        form = expand_derivatives(derivative(form, variable))
        tensor = Cofunction(variable.function_space().dual())
        if form.empty():
            return None, tensor
        return get_assembler(form, form_compiler_parameters=self.forms.problem.form_compiler_parameters), tensor

    def _assembled_tangent(self, index: int, tangent: np.ndarray, solution: np.ndarray) -> np.ndarray:
        """Assemble the derivative of the residual, with its sign, in a direction of an input; boundary entries are zero."""
        entry = self.inputs[index]
        if index not in self._tangent_assemblers:
            directions = [Function(variable.function_space()) for variable in entry.variables]
            form = entry.in_variables(-1*self._residual)
            parts = [derivative(form, *pair) for pair in zip(entry.variables, directions)]
            self._tangent_assemblers[index] = self._assembler(expand_derivatives(sum(parts[1:], parts[0]))), directions
        assembler, directions = self._tangent_assemblers[index]
        self._set_residual_weights(solution)
        if len(directions) == 1:
            set_local_values(directions[0], tangent)
        else:
            for direction, value in zip(directions, tangent):
                direction.dat.data_wo[...] = value
        assembler.assemble(tensor=self._form_values)
        return local_values(self._form_values)


class _AffineTerm:
    """B m of the right-hand side, with B assembled when it is first needed and when what it depends on changed.

    Parameters
    ----------
    form : ufl.Form
        The bilinear form of B, without Functions in it.
    parameters : set of int
        The inputs, all of them Constants, that B depends on.
    entry : Input
        m.
    boundary_dofs : numpy.ndarray
        Rank-local rows of B that are zero.
    """

    def __init__(self, form: ufl.Form, parameters: set[int], entry: Input, boundary_dofs: np.ndarray):
        self.parameters = parameters
        self._form, self._boundary_dofs = form, boundary_dofs
        self._vector = vector_like(entry.copy)
        self._matrix: PETSc.Mat | None = None

    def forget(self) -> None:
        """Have B assembled again."""
        self._matrix = None

    def _assembled(self) -> PETSc.Mat:
        if self._matrix is None:
            self._matrix = assemble(self._form, mat_type="aij").petscmat
            rows = self._boundary_dofs + self._matrix.getOwnershipRange()[0]
            self._matrix.zeroRows(rows.astype(PETSc.IntType), diag=0.0)
        return self._matrix

    def product(self, values: np.ndarray, b: PETSc.Vec) -> None:
        """b = B m."""
        matrix = self._assembled()
        self._vector.placeArray(values)
        matrix.mult(self._vector, b)
        self._vector.resetArray()

    def transposed_product(self, multiplier: PETSc.Vec, out: np.ndarray) -> None:
        """out = Bᵀ λ."""
        matrix = self._assembled()
        self._vector.placeArray(out)
        matrix.multTranspose(multiplier, self._vector)
        self._vector.resetArray()


class _CofunctionTerm:
    """A Cofunction in the right-hand side, with its weight."""

    parameters: frozenset[int] = frozenset()

    def __init__(self, weight: float, boundary_dofs: np.ndarray):
        self._weight, self._boundary_dofs = weight, boundary_dofs

    def forget(self) -> None:
        """Nothing is assembled."""

    def product(self, values: np.ndarray, b: PETSc.Vec) -> None:
        """b = weight · m, zero at the boundary."""
        array = b.array_w
        np.multiply(values, self._weight, out=array)
        array[self._boundary_dofs] = 0.0

    def transposed_product(self, multiplier: PETSc.Vec, out: np.ndarray) -> None:
        """out = weight · λ, zero at the boundary."""
        np.multiply(multiplier.array_r, self._weight, out=out)
        out[self._boundary_dofs] = 0.0


_NO_VALUES = np.empty(0)
_EVENTS = {kind: PETSc.Log.Event(f"PRDP{kind.capitalize()}") for kind in ("forward", "adjoint", "tangent")}
