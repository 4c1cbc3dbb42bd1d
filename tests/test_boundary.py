"""Boundary values that are made from other things: derivatives and replays, against Firedrake's own solver."""
import firedrake
import numpy as np
import pytest
from checkpoint_schedules import SingleMemoryStorageSchedule
from firedrake import *
from firedrake.adjoint import *
from problems import CG, CONVERGED, GMRES, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps

pytestmark = pytest.mark.parallel([1, 2, 3])


def field(space, seed: int, name: str = "field"):
    """A Function that is smooth, and not zero on the boundary."""
    return Function(space, name=name).interpolate(smooth(space, seed) + cos(SpatialCoordinate(space.mesh())[1]))


class Conditions:
    """A problem, and the controls that its boundary values are made from.

    Parameters
    ----------
    kind : str
        A key of EXPRESSIONS.
    linear : bool
    """

    def __init__(self, kind: str, *, linear: bool = True):
        mesh = self.mesh = UnitSquareMesh(4, 4)
        V = FunctionSpace(mesh, "CG", 1)
        self.g, self.h = field(V, 1, "g"), field(FunctionSpace(mesh, "CG", 2), 2, "h")
        self.t, self.c = Constant(0.7, name="t"), Constant((0.4, 1.1), name="c")
        self.controls = [self.g, self.h, self.t, self.c]
        space, values, self.source = EXPRESSIONS[kind](self, V)
        self.space = space
        bcs = [DirichletBC(part(space), value, where) for part, value, where in values]
        self.u = Function(space, name="solution")
        v = TestFunction(space)

        def residual(w, bend):
            return ((1 + bend*inner(w, w))*inner(grad(w), grad(v)) + inner(w, v))*dx(degree=4)
        load = inner(as_ufl(self.source), v[v.ufl_shape[0] - 1] if v.ufl_shape else v)*dx
        if linear:
            self.problem = LinearVariationalProblem(residual(TrialFunction(space), 0), load, self.u, bcs=bcs)
        else:
            self.problem = NonlinearVariationalProblem(residual(self.u, 0.05) - load, self.u, bcs=bcs)

    def functional(self):
        return assemble((inner(self.u, self.u)**2 + inner(grad(self.u), grad(self.u)))*dx)

    def used(self):
        """The controls that something depends on."""
        found = {*sum((list(ufl_coefficients(bc)) for bc in self.problem.bcs), [])}
        return [control for control in self.controls if control in found]


def ufl_coefficients(condition):
    """Functions and Constants in what a condition was given."""
    from ufl.algorithms.analysis import extract_coefficients, extract_type
    given = condition._original_arg
    given = as_vector(given) if isinstance(given, tuple) else as_ufl(given)
    return {*extract_coefficients(given), *extract_type(given, Constant)}


def whole_space(space):
    return space


def first_component(space):
    return space.sub(0)


def two_fields(space):
    return space


EXPRESSIONS = {
    "field": lambda self, V: (V, [(whole_space, self.g, 1)], 1),
    "Constant": lambda self, V: (V, [(whole_space, self.t, 1)], 1),
    "multiple": lambda self, V: (V, [(whole_space, 2*self.g, 1)], 1),
    "square": lambda self, V: (V, [(whole_space, self.g**2, 1)], 1),
    "product": lambda self, V: (V, [(whole_space, self.g*self.h, 1)], 1),
    "in time": lambda self, V: (V, [(whole_space, sin(self.t)*(1 + SpatialCoordinate(self.mesh)[1]), 1)], 1),
    "all": lambda self, V: (V, [(whole_space, exp(self.t*self.g) + self.c[1]*self.h, (1, 3))], 1),
    "parts that overlap": lambda self, V: (V, [(whole_space, self.t*self.g, 1), (whole_space, 2.0, 2),
                                               (whole_space, self.h**2, "on_boundary"),
                                               (whole_space, self.c[0]*self.t, 3)], 1),
    "source, too": lambda self, V: (V, [(whole_space, self.g**2*self.t, 1)], self.g*self.t),
    "vector": lambda self, V: (VectorFunctionSpace(self.mesh, "CG", 2),
                               [(whole_space, as_vector((self.t*self.g, self.h)), 1), (whole_space, self.c, 2)], 1),
    "tuple": lambda self, V: (VectorFunctionSpace(self.mesh, "CG", 1),
                              [(whole_space, (sin(self.t), self.c[0]*self.t), 1), (whole_space, 0, 2)], 1),
    "component": lambda self, V: (VectorFunctionSpace(self.mesh, "CG", 1),
                                  [(first_component, self.t*self.h, 1), (whole_space, self.c*self.g, 2)], 1),
}


def perturbations(controls):
    return [Constant(np.full(control.ufl_shape, 0.3)) if isinstance(control, Constant)
            else field(control.function_space(), 11 + place) for place, control in enumerate(controls)]


def moved(controls, directions, h):
    return [Constant(control.values() + h*direction.values()) if isinstance(control, Constant)
            and control.ufl_shape else Constant(float(control) + h*float(direction))
            if isinstance(control, Constant) else Function(control.function_space()).assign(control + h*direction)
            for control, direction in zip(controls, directions)]


def of_firedrake(conditions, controls, values):
    """The functional where Firedrake solves with other values of the controls."""
    before = [control._ad_copy() for control in controls]
    solver = getattr(firedrake, type(conditions.problem).__name__.replace("Problem", "Solver"))
    try:
        for control, value in zip(controls, values):
            control.assign(value)
        conditions.u.assign(0)
        solver(conditions.problem, solver_parameters={"ksp_type": "preonly", "pc_type": "lu", "snes_rtol": 1e-13,
                                                      "snes_stol": 0, "snes_atol": 1e-12}).solve()
        return conditions.functional()
    finally:
        for control, value in zip(controls, before):
            control.assign(value)


def solved(conditions, **kwargs):
    linear = isinstance(conditions.problem, LinearVariationalProblem)
    solver = prdp_fem.LinearVariationalSolver if linear else prdp_fem.NonlinearVariationalSolver
    parameters = {**(CG if linear else GMRES), **CONVERGED}
    if not linear:
        parameters |= {"snes_linesearch_type": "basic", "snes_rtol": 1e-13, "snes_stol": 0, "snes_atol": 1e-12, "ksp_rtol": 1e-12}
    solver(conditions.problem, warm_start=False, solver_parameters=parameters, **kwargs).solve()


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("kind", EXPRESSIONS)
def test_derivatives_and_replays_by_what_boundary_values_are_made_from(kind, linear):
    conditions = Conditions(kind, linear=linear)
    solved(conditions)
    controls = conditions.used()
    reduced = ReducedFunctional(conditions.functional(), [Control(control) for control in controls])
    with stop_annotating():
        directions = perturbations(controls)
        ahead, behind = (moved(controls, directions, h) for h in (1e-4, -1e-4))
        expected = (of_firedrake(conditions, controls, ahead) - of_firedrake(conditions, controls, behind))/2e-4
        far = moved(controls, directions, 0.2)
        assert reduced(far) == pytest.approx(of_firedrake(conditions, controls, far), rel=1e-8)
        here = moved(controls, directions, 0)
        assert reduced(here) == pytest.approx(of_firedrake(conditions, controls, here), rel=1e-8)
        gradient = reduced.derivative()
        slope = sum(direction._ad_dot(part) for direction, part in zip(directions, gradient))
        assert abs(slope - expected) < 1e-6*abs(expected)
        assert reduced.tlm(directions) == pytest.approx(slope, rel=1e-8)
        for control, part in zip(controls, gradient):
            assert type(part) is not float and np.linalg.norm(part.dat.data_ro) >= 0


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "nonlinear"])
@pytest.mark.parametrize("kind", EXPRESSIONS)
def test_hessians_by_what_boundary_values_are_made_from(kind, linear):
    conditions = Conditions(kind, linear=linear)
    solved(conditions)
    controls = conditions.used()
    reduced = ReducedFunctional(conditions.functional(), [Control(control) for control in controls])
    with stop_annotating():
        directions = perturbations(controls)

        def slope(h):
            reduced(moved(controls, directions, h))
            return sum(direction._ad_dot(part) for direction, part in zip(directions, reduced.derivative()))
        expected = (slope(1e-4) - slope(-1e-4))/2e-4
        reduced(moved(controls, directions, 0))
        reduced.derivative()
        curvature = sum(direction._ad_dot(part) for direction, part in zip(directions, reduced.hessian(directions)))
    assert abs(curvature - expected) < 1e-6*abs(expected)
