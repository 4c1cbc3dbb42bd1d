"""Boundary values that are made from other things: derivatives and replays, against Firedrake's own
solver.
"""

import firedrake
import numpy as np
import pytest
import torch
from checkpoint_schedules import SingleMemoryStorageSchedule
from firedrake import *
from firedrake.adjoint import *
from problems import CG, CONVERGED, GMRES, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.torch import SolverLayer

pytestmark = pytest.mark.parallel([1, 2])


def field(space, seed: int, name: str = "field"):
    """A Function that is smooth, and not zero on the boundary."""
    return Function(space, name=name).interpolate(
        smooth(space, seed) + cos(SpatialCoordinate(space.mesh())[1])
    )


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
            return ((1 + bend * inner(w, w)) * inner(grad(w), grad(v)) + inner(w, v)) * dx(degree=4)

        load = inner(as_ufl(self.source), v[v.ufl_shape[0] - 1] if v.ufl_shape else v) * dx
        if linear:
            self.problem = LinearVariationalProblem(
                residual(TrialFunction(space), 0), load, self.u, bcs=bcs
            )
        else:
            self.problem = NonlinearVariationalProblem(
                residual(self.u, 0.05) - load, self.u, bcs=bcs
            )

    def functional(self):
        return assemble((inner(self.u, self.u) ** 2 + inner(grad(self.u), grad(self.u))) * dx)

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


EXPRESSIONS = {
    "field": lambda self, V: (V, [(whole_space, self.g, 1)], 1),
    "Constant": lambda self, V: (V, [(whole_space, self.t, 1)], 1),
    "multiple": lambda self, V: (V, [(whole_space, 2 * self.g, 1)], 1),
    "square": lambda self, V: (V, [(whole_space, self.g**2, 1)], 1),
    "product": lambda self, V: (V, [(whole_space, self.g * self.h, 1)], 1),
    "in time": lambda self, V: (
        V,
        [(whole_space, sin(self.t) * (1 + SpatialCoordinate(self.mesh)[1]), 1)],
        1,
    ),
    "all": lambda self, V: (
        V,
        [(whole_space, exp(self.t * self.g) + self.c[1] * self.h, (1, 3))],
        1,
    ),
    "parts that overlap": lambda self, V: (
        V,
        [
            (whole_space, self.t * self.g, 1),
            (whole_space, 2.0, 2),
            (whole_space, self.h**2, "on_boundary"),
            (whole_space, self.c[0] * self.t, 3),
        ],
        1,
    ),
    "source, too": lambda self, V: (V, [(whole_space, self.g**2 * self.t, 1)], self.g * self.t),
    "vector": lambda self, V: (
        VectorFunctionSpace(self.mesh, "CG", 2),
        [(whole_space, as_vector((self.t * self.g, self.h)), 1), (whole_space, self.c, 2)],
        1,
    ),
    "tuple": lambda self, V: (
        VectorFunctionSpace(self.mesh, "CG", 1),
        [(whole_space, (sin(self.t), self.c[0] * self.t), 1), (whole_space, 0, 2)],
        1,
    ),
    "component": lambda self, V: (
        VectorFunctionSpace(self.mesh, "CG", 1),
        [(first_component, self.t * self.h, 1), (whole_space, self.c * self.g, 2)],
        1,
    ),
}


def perturbations(controls):
    return [
        (
            Constant(np.full(control.ufl_shape, 0.3))
            if isinstance(control, Constant)
            else field(control.function_space(), 11 + place)
        )
        for place, control in enumerate(controls)
    ]


def moved(controls, directions, h):
    return [
        (
            Constant(control.values() + h * direction.values())
            if isinstance(control, Constant) and control.ufl_shape
            else (
                Constant(float(control) + h * float(direction))
                if isinstance(control, Constant)
                else Function(control.function_space()).assign(control + h * direction)
            )
        )
        for control, direction in zip(controls, directions)
    ]


def of_firedrake(conditions, controls, values):
    """The functional where Firedrake solves with other values of the controls."""
    before = [control._ad_copy() for control in controls]
    solver = getattr(firedrake, type(conditions.problem).__name__.replace("Problem", "Solver"))
    try:
        for control, value in zip(controls, values):
            control.assign(value)
        conditions.u.assign(0)
        solver(
            conditions.problem,
            solver_parameters={
                "ksp_type": "preonly",
                "pc_type": "lu",
                "snes_rtol": 1e-13,
                "snes_stol": 0,
                "snes_atol": 1e-12,
            },
        ).solve()
        return conditions.functional()
    finally:
        for control, value in zip(controls, before):
            control.assign(value)


def solved(conditions, **kwargs):
    linear = isinstance(conditions.problem, LinearVariationalProblem)
    solver = prdp_fem.LinearVariationalSolver if linear else prdp_fem.NonlinearVariationalSolver
    parameters = {**(CG if linear else GMRES), **CONVERGED}
    if not linear:
        parameters |= {
            "snes_linesearch_type": "basic",
            "snes_rtol": 1e-13,
            "snes_stol": 0,
            "snes_atol": 1e-12,
            "ksp_rtol": 1e-12,
        }
    solver(conditions.problem, warm_start=False, solver_parameters=parameters, **kwargs).solve()


@pytest.mark.parametrize(
    "kind, linear", [*((kind, True) for kind in EXPRESSIONS), ("all", False), ("component", False)]
)
def test_derivatives_and_replays_by_what_boundary_values_are_made_from(kind, linear):
    conditions = Conditions(kind, linear=linear)
    solved(conditions)
    controls = conditions.used()
    reduced = ReducedFunctional(conditions.functional(), [Control(control) for control in controls])
    with stop_annotating():
        directions = perturbations(controls)
        ahead, behind = (moved(controls, directions, h) for h in (1e-4, -1e-4))
        expected = (
            of_firedrake(conditions, controls, ahead) - of_firedrake(conditions, controls, behind)
        ) / 2e-4
        far = moved(controls, directions, 0.2)
        assert reduced(far) == pytest.approx(of_firedrake(conditions, controls, far), rel=1e-8)
        reduced(moved(controls, directions, 0))
        slope = sum(
            direction._ad_dot(part) for direction, part in zip(directions, reduced.derivative())
        )
        assert abs(slope - expected) < 1e-6 * abs(expected)
        assert reduced.tlm(directions) == pytest.approx(slope, rel=1e-8)


@pytest.mark.parametrize(
    "kind, linear",
    [("field", True), ("source, too", True), ("component", True), ("parts that overlap", False)],
)
def test_hessians_by_what_boundary_values_are_made_from(kind, linear):
    conditions = Conditions(kind, linear=linear)
    solved(conditions)
    controls = conditions.used()
    reduced = ReducedFunctional(conditions.functional(), [Control(control) for control in controls])
    with stop_annotating():
        directions = perturbations(controls)

        def slope(h):
            reduced(moved(controls, directions, h))
            return sum(
                direction._ad_dot(part) for direction, part in zip(directions, reduced.derivative())
            )

        expected = (slope(1e-4) - slope(-1e-4)) / 2e-4
        reduced(moved(controls, directions, 0))
        reduced.derivative()
        curvature = sum(
            direction._ad_dot(part)
            for direction, part in zip(directions, reduced.hessian(directions))
        )
    assert abs(curvature - expected) < 1e-6 * abs(expected)


# Truncated and unrolled


@pytest.mark.parametrize(
    "kind, linear", [("all", True), ("component", True), ("source, too", False)]
)
def test_unrolled_derivatives_by_what_boundary_values_are_made_from(kind, linear):
    conditions = Conditions(kind, linear=linear)
    solved(
        conditions,
        refinement=FixedRefinement(Iterations(3) if linear else NewtonSteps(2, Iterations(3))),
        differentiation="unrolled",
    )
    controls = conditions.used()
    reduced = ReducedFunctional(conditions.functional(), [Control(control) for control in controls])
    with stop_annotating():
        directions = perturbations(controls)
        here = moved(controls, directions, 0)
        assert taylor_test(reduced, here, directions) > 1.95
        reduced(here)
        slope = sum(
            direction._ad_dot(part) for direction, part in zip(directions, reduced.derivative())
        )
        assert reduced.tlm(directions) == pytest.approx(slope, rel=1e-10)


# The mesh


def on_moving_mesh(values, *, linear=True, element=("CG", 2), **kwargs):
    """A reduced functional of the displacement of a mesh, on which boundary values are expressions
    of the position.
    """
    with stop_annotating():
        mesh = UnitSquareMesh(3, 3)
        V = FunctionSpace(mesh, *element)
        g = field(FunctionSpace(mesh, "CG", 1), 1)
    shift, t = Function(mesh.coordinates.function_space()), Constant(0.7)
    mesh.coordinates.assign(mesh.coordinates + shift)
    u, v = Function(V, name="solution"), TestFunction(V)
    bcs = [DirichletBC(V, values(*SpatialCoordinate(mesh), t, g), 1), DirichletBC(V, 0, 2)]
    kind = {
        "ksp_type": "gmres",
        "pc_type": "jacobi",
        **CONVERGED,
        "ksp_rtol": 1e-12,
        "snes_linesearch_type": "basic",
        "snes_rtol": 1e-12,
        "snes_stol": 0,
        "snes_atol": 1e-12,
    }
    if linear:
        w = TrialFunction(V)
        problem = LinearVariationalProblem(
            (w * v + inner(grad(w), grad(v))) * dx, v * dx, u, bcs=bcs
        )
        solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters=kind, **kwargs)
    else:
        problem = NonlinearVariationalProblem(
            (u * v + (1 + 0.05 * u**2) * inner(grad(u), grad(v)) - v) * dx(degree=6), u, bcs=bcs
        )
        solver = prdp_fem.NonlinearVariationalSolver(
            problem, solver_parameters=kind, warm_start=False, **kwargs
        )
    solver.solve()
    reduced = ReducedFunctional(
        assemble((u**2 + inner(grad(u), grad(u))) * dx), [Control(shift), Control(t)]
    )
    with stop_annotating():
        start = [Function(shift.function_space()), Constant(0.7)]
        direction = [smooth(shift.function_space(), 18), Constant(0.3)]
        direction[0].assign(0.05 * direction[0])
    return reduced, start, direction


@pytest.mark.parametrize(
    "values, differentiation, linear",
    [
        (lambda x, y, t, g: sin(t) * (1 + y), "implicit", True),
        (lambda x, y, t, g: g * exp(t * x * y) + y**2, "implicit", False),
        (lambda x, y, t, g: g * exp(t * x * y) + y**2, "unrolled", True),
        (lambda x, y, t, g: g * exp(t * x * y) + y**2, "unrolled", False),
    ],
)
def test_boundary_values_that_are_expressions_of_a_position_that_moves(
    values, differentiation, linear
):
    options = (
        {}
        if differentiation == "implicit"
        else {
            "differentiation": "unrolled",
            "refinement": FixedRefinement(
                Iterations(4) if linear else NewtonSteps(2, Iterations(4))
            ),
        }
    )
    reduced, start, direction = on_moving_mesh(values, linear=linear, **options)
    with stop_annotating():
        assert taylor_test(reduced, start, direction) > 1.95
        reduced(start)
        slope = sum(way._ad_dot(part) for way, part in zip(direction, reduced.derivative()))
        assert reduced.tlm(direction) == pytest.approx(slope, rel=1e-8)
        if differentiation == "unrolled":
            return

        def moved_slope(h):
            reduced([Function(start[0]).assign(h * direction[0]), Constant(0.7 + 0.3 * h)])
            return sum(way._ad_dot(part) for way, part in zip(direction, reduced.derivative()))

        expected = (moved_slope(1e-4) - moved_slope(-1e-4)) / 2e-4
        moved_slope(0), reduced.tlm(direction)
        curvature = sum(
            way._ad_dot(part) for way, part in zip(direction, reduced.hessian(direction))
        )
        assert curvature == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "values, element, what",
    [
        (lambda x, y, t, g: t * g.dx(0), ("CG", 2), "Grad"),
        (lambda x, y, t, g: as_vector((t, 1.0)), ("RT", 1), "the map from the reference cell"),
    ],
)
def test_boundary_values_that_depend_on_a_mesh_by_more_than_its_position_are_no_silent_zero(
    values, element, what
):
    with stop_annotating():
        mesh = UnitSquareMesh(3, 3)
        V, g = FunctionSpace(mesh, *element), field(FunctionSpace(mesh, "CG", 1), 1)
    shift, t = Function(mesh.coordinates.function_space()), Constant(0.7)
    mesh.coordinates.assign(mesh.coordinates + shift)
    u = Function(V)
    v = TestFunction(V)
    w = TrialFunction(V)
    problem = LinearVariationalProblem(
        inner(w, v) * dx,
        inner(Constant(np.ones(v.ufl_shape)) if v.ufl_shape else 1, v) * dx,
        u,
        bcs=DirichletBC(V, values(*SpatialCoordinate(mesh), t, g), 1),
    )
    prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}).solve()
    J = assemble(inner(u, u) * dx)
    with pytest.raises(
        ValueError, match=f"cannot be differentiated by the coordinates of the mesh.*{what}"
    ):
        ReducedFunctional(J, Control(shift)).derivative()
    reduced = ReducedFunctional(J, Control(t))
    with stop_annotating():
        assert taylor_test(reduced, Constant(0.7), Constant(0.3)) > 1.95


# Mixed spaces, and time


def test_mixed_spaces_with_expressions_on_parts_and_components():
    with stop_annotating():
        mesh = UnitSquareMesh(3, 3)
        V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
        W, g = V * Q, field(Q, 3)
    x, y = SpatialCoordinate(mesh)
    t = Constant(0.6)
    c = Constant((0.3, 0.8))
    u = Function(W)
    bcs = [
        DirichletBC(W.sub(0), as_vector((sin(t) * y * (1 - y) + 0.1 * g**2, c[1] * t)), 1),
        DirichletBC(W.sub(0).sub(0), t * g, 3),
        DirichletBC(W.sub(0), c, 2),
        DirichletBC(W.sub(1), c[0] * g**2, 4),
    ]
    (w, p), (v, q) = TrialFunctions(W), TestFunctions(W)
    a = (inner(grad(w), grad(v)) - p * div(v) - q * div(w) - 0.1 * p * q) * dx
    problem = LinearVariationalProblem(a, inner(Constant((1.0, 0.0)), v) * dx, u, bcs=bcs)
    prdp_fem.LinearVariationalSolver(
        problem,
        solver_parameters={
            "ksp_type": "gmres",
            "pc_type": "none",
            "ksp_gmres_restart": 300,
            **CONVERGED,
            "ksp_rtol": 1e-12,
        },
    ).solve()
    velocity, pressure = split(u)

    def functional():
        return assemble((inner(velocity, velocity) ** 2 + pressure**3) * dx)

    controls = [t, c, g]
    reduced = ReducedFunctional(functional(), [Control(control) for control in controls])
    with stop_annotating():
        directions = [Constant(0.3), Constant((0.2, -0.4)), field(Q, 5)]
        ahead, behind = (moved(controls, directions, h) for h in (1e-4, -1e-4))

        def of_values(values):
            before = [control._ad_copy() for control in controls]
            for control, value in zip(controls, values):
                control.assign(value)
            LinearVariationalSolver(
                problem,
                solver_parameters={
                    "mat_type": "aij",
                    "ksp_type": "preonly",
                    "pc_type": "lu",
                    "pc_factor_mat_solver_type": "mumps",
                },
            ).solve()
            for control, value in zip(controls, before):
                control.assign(value)
            return functional()

        expected = (of_values(ahead) - of_values(behind)) / 2e-4
        assert reduced(ahead) == pytest.approx(of_values(ahead), rel=1e-8)
        reduced(moved(controls, directions, 0))
        slope = sum(way._ad_dot(part) for way, part in zip(directions, reduced.derivative()))
        assert slope == pytest.approx(expected, rel=1e-6)
        assert reduced.tlm(directions) == pytest.approx(slope, rel=1e-8)


def channel(solvers, viscosity, inflow, schedule=None):
    """Chorin's projection method with an inflow that changes in time, as an expression of a
    Constant and of a Function.
    """
    with stop_annotating():
        mesh = UnitSquareMesh(4, 4)
        V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
        x, y = SpatialCoordinate(mesh)
        nu = Function(FunctionSpace(mesh, "R", 0)).assign(viscosity)
        profile = Function(V).interpolate(as_vector((inflow * 4 * y * (1 - y), 0)))
    tape = get_working_tape()
    if schedule is not None:
        tape.enable_checkpointing(schedule)
    u0 = Function(V)
    u1 = Function(V)
    p = Function(Q)
    t = Constant(0.0)
    dt = 0.1
    u = TrialFunction(V)
    v = TestFunction(V)
    r = TrialFunction(Q)
    q = TestFunction(Q)
    walls = DirichletBC(V, 0, (3, 4))
    bcs = [DirichletBC(V, sin(pi * t) * profile, 1), walls]
    step = [
        (
            LinearVariationalProblem(
                (inner(u, v) / dt + nu * inner(grad(u), grad(v)) + inner(dot(u0, nabla_grad(u)), v))
                * dx,
                inner(u0, v) / dt * dx,
                u1,
                bcs=bcs,
            )
        ),
        (
            LinearVariationalProblem(
                inner(grad(r), grad(q)) * dx, -div(u1) * q / dt * dx, p, bcs=DirichletBC(Q, 0, 2)
            )
        ),
        (LinearVariationalProblem(inner(u, v) * dx, inner(u1 - dt * grad(p), v) * dx, u0, bcs=bcs)),
    ]
    solvers = [
        solvers(
            problem,
            solver_parameters={
                "ksp_type": "gmres",
                "pc_type": "jacobi",
                **CONVERGED,
                "ksp_rtol": 1e-12,
            },
        )
        for problem in step
    ]
    for number in tape.timestepper(iter(range(3))):
        t.assign((number + 1) * dt)
        for solver in solvers:
            solver.solve()
    return nu, profile, assemble((inner(u0, u0) + p**2) * dx)


@pytest.mark.parametrize("schedule", [None, SingleMemoryStorageSchedule])
def test_a_projection_method_whose_inflow_is_an_expression_of_the_time(schedule):
    nu, profile, J = channel(
        prdp_fem.LinearVariationalSolver, 0.1, 1.0, None if schedule is None else schedule()
    )
    reduced = ReducedFunctional(J, [Control(nu), Control(profile)])
    with stop_annotating():

        def of_firedrake(viscosity, inflow):
            with set_working_tape(Tape()):
                return channel(LinearVariationalSolver, viscosity, inflow)[2]

        values = [Function(nu).assign(0.15), Function(profile).assign(1.2 * profile)]
        assert reduced(values) == pytest.approx(of_firedrake(0.15, 1.2), rel=1e-8)
        assert reduced([nu, profile]) == pytest.approx(of_firedrake(0.1, 1.0), rel=1e-8)
        by_nu, by_profile = reduced.derivative()
        expected = (of_firedrake(0.1 + 1e-4, 1.0) - of_firedrake(0.1 - 1e-4, 1.0)) / 2e-4
        assert by_nu.dat.data_ro.item() == pytest.approx(expected, rel=1e-5)
        expected = (of_firedrake(0.1, 1.0 + 1e-4) - of_firedrake(0.1, 1.0 - 1e-4)) / 2e-4
        assert by_profile._ad_dot(profile) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("nonlinear", [False, True])
def test_time_loops_in_which_boundary_values_are_given_anew(nonlinear):
    with stop_annotating():
        mesh = UnitSquareMesh(4, 4)
        V = FunctionSpace(mesh, "CG", 1)
        start = field(V, 2)

    def loop(module):
        g = Function(V)
        t = Constant(0.5)
        u0 = Function(V)
        u = Function(V)
        v = TestFunction(V)
        g.assign(start)
        bcs = [DirichletBC(V, t * g**2, 1)]

        def F(w):
            return (
                (w - u0) * v
                + 0.1 * (1 + (0.05 * u**2 if nonlinear else 0)) * inner(grad(w), grad(v))
            ) * dx(degree=4)

        if nonlinear:
            problem = NonlinearVariationalProblem(F(u), u, bcs=bcs)
            solver = module.NonlinearVariationalSolver(
                problem,
                solver_parameters={
                    **GMRES,
                    **CONVERGED,
                    "ksp_rtol": 1e-12,
                    "snes_rtol": 1e-12,
                    "snes_atol": 1e-13,
                },
            )
        else:
            problem = LinearVariationalProblem(
                lhs(F(TrialFunction(V))), rhs(F(TrialFunction(V))), u, bcs=bcs
            )
            solver = module.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED})
        for number in range(3):
            t.assign(0.5 + 0.2 * number)
            solver.solve()
            u0.assign(u)
            g.interpolate(0.5 * g + 0.3 * u)
        return assemble(u0**2 * dx)

    reduced = ReducedFunctional(loop(prdp_fem), Control(start))
    with stop_annotating():
        here, direction = start.copy(deepcopy=True), field(V, 7)

        def of_firedrake(h):
            start.assign(here + h * direction)
            found = loop(firedrake)
            start.assign(here)
            return found

        assert reduced(Function(V).assign(here + 0.2 * direction)) == pytest.approx(
            of_firedrake(0.2), rel=1e-8
        )
        reduced(here)
        expected = (of_firedrake(1e-4) - of_firedrake(-1e-4)) / 2e-4
        assert direction._ad_dot(reduced.derivative()) == pytest.approx(expected, rel=1e-6)


# What a condition was given


def test_solves_are_replayed_with_what_conditions_had_been_given_then():
    with stop_annotating():
        V = FunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
        f, g = field(V, 1), field(V, 2)
    u0 = Function(V)
    u = Function(V)
    w = TrialFunction(V)
    v = TestFunction(V)
    condition = DirichletBC(V, 2 * g, 1)
    problem = LinearVariationalProblem(
        (w * v + inner(grad(w), grad(v))) * dx, (f + u0) * v * dx, u, bcs=condition
    )
    solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED})
    values = []
    changes = [
        lambda: None,
        lambda: condition.set_value(3.0),
        condition.homogenize,
        condition.restore,
        lambda: condition.set_value(g**2),
    ]
    for change in changes:
        change()
        solver.solve()
        values.append(u.copy(deepcopy=True))
        u0.assign(u)
    J = assemble(u0**2 * dx)
    condition.set_value(17.0)
    reduced = ReducedFunctional(J, Control(g))
    with stop_annotating():
        assert values[0].dat.data_ro_with_halos[condition.nodes] == pytest.approx(
            2 * g.dat.data_ro_with_halos[condition.nodes]
        )
        assert np.all(values[2].dat.data_ro_with_halos[condition.nodes] == 0)
        assert reduced(g) == J
        assert taylor_test(reduced, g.copy(deepcopy=True), field(V, 4)) > 1.95


def test_layers_by_what_lists_of_boundary_values_are_made_from():
    V = VectorFunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    u = Function(V)
    w = TrialFunction(V)
    v = TestFunction(V)
    c = Constant(0.7)
    problem = LinearVariationalProblem(
        inner(grad(w), grad(v)) * dx, v[0] * dx, u, bcs=DirichletBC(V, (sin(c), 0), 1)
    )
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}),
        [c],
        output=inner(u, u) * dx,
    )
    x = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    layer(x).backward()
    with stop_annotating(), torch.no_grad():
        expected = (layer(x + 1e-4) - layer(x - 1e-4)).item() / 2e-4
    assert x.grad.item() == pytest.approx(expected, rel=1e-7)


def test_numbers_from_the_tape_are_no_silent_constants_in_conditions():
    V = FunctionSpace(UnitSquareMesh(3, 3), "CG", 1)
    f = field(V, 1)
    u = Function(V)
    w = TrialFunction(V)
    v = TestFunction(V)
    number = Constant(0.0)

    def solve_with(value):
        problem = LinearVariationalProblem(
            (w * v + inner(grad(w), grad(v))) * dx, v * dx, u, bcs=DirichletBC(V, value, 1)
        )
        prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}).solve()

    with pytest.raises(ValueError, match="assign it to a Constant"):
        solve_with(assemble(f * dx))
    number.assign(assemble(f * dx))
    solve_with(number**2)
    reduced = ReducedFunctional(assemble(u**2 * dx), Control(f))
    with stop_annotating():
        assert taylor_test(reduced, f.copy(deepcopy=True), field(V, 4)) > 1.95


@pytest.mark.parametrize(
    "values, given, target, jumps",
    [
        (lambda g: 2 * g, ("DG", 0), ("CG", 2), True),
        (lambda g: g.dx(0), ("CG", 2), ("CG", 2), True),
        (grad, ("CG", 1), ("N1curl", 1), False),
    ],
)
def test_values_that_jump_where_cells_meet_are_no_silent_average(values, given, target, jumps):
    with stop_annotating():
        mesh = UnitSquareMesh(3, 3)
        V, g = FunctionSpace(mesh, *target), field(FunctionSpace(mesh, *given), 1, "wall")
        direction = field(g.function_space(), 2)
    u = Function(V)
    w = TrialFunction(V)
    v = TestFunction(V)
    right = inner(Constant(np.ones(v.ufl_shape)) if v.ufl_shape else 1, v) * dx
    condition = DirichletBC(V, values(g), "on_boundary")
    problem = LinearVariationalProblem(inner(w, v) * dx, right, u, bcs=condition)
    prdp_fem.LinearVariationalSolver(problem, solver_parameters={**CG, **CONVERGED}).solve()
    reduced = ReducedFunctional(assemble(inner(u, u) * dx), Control(g))
    if jumps:
        with pytest.raises(ValueError, match="made from 'wall' jump where cells meet"):
            reduced.derivative()
    else:
        with stop_annotating():
            assert taylor_test(reduced, g.copy(deepcopy=True), direction) > 1.95
