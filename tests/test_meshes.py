"""Problems over two meshes: the parts of one, each with its own field, and Constants on both."""

import firedrake
import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from problems import CONVERGED, GMRES

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.torch import SolverLayer

pytestmark = pytest.mark.parallel([1, 2, 3])
EXACT = {
    "ksp_type": "preonly",
    "pc_type": "lu",
    "snes_rtol": 1e-13,
    "snes_stol": 0,
    "snes_atol": 1e-13,
}


class TwoParts:
    """Fields on the halves of a square, with numbers that are on both, and in boundary values."""

    def __init__(self, *, linear: bool = True):
        base = UnitSquareMesh(4, 4)
        x, y = SpatialCoordinate(base)
        D = FunctionSpace(base, "DG", 0)
        halves = [
            Function(D).interpolate(conditional(test, 1, 0)) for test in (lt(x, 0.5), gt(x, 0.5))
        ]
        base = RelabeledMesh(base, halves, [101, 102])
        one, two = Submesh(base, 2, 101), Submesh(base, 2, 102)
        V = FunctionSpace(one, "CG", 1) * FunctionSpace(two, "CG", 1)
        self.u = u = Function(V, name="solution")
        v1, v2 = TestFunctions(V)
        dx1 = Measure("dx", one, metadata={"quadrature_degree": 4})
        dx2 = Measure("dx", two, metadata={"quadrature_degree": 4})
        self.dx1, self.dx2 = dx1, dx2
        self.c, self.k = Constant(2.0, name="c"), Constant((0.5, 1.5), name="k")
        c, k = self.c, self.k
        bcs = [DirichletBC(V.sub(0), c * k[0], 1), DirichletBC(V.sub(1), k[1] * c**2, 2)]

        def residual(u1, u2, bend):
            return (
                c * inner(grad(u1), grad(v1)) * dx1
                + u1 * v1 * dx1
                + (1 + bend * u2**2) * k[0] * inner(grad(u2), grad(v2)) * dx2
                + c * u2 * v2 * dx2
            )

        load = c * v1 * dx1 + k[1] * c * v2 * dx2
        if linear:
            self.problem = LinearVariationalProblem(
                residual(*TrialFunctions(V), 0), load, u, bcs=bcs
            )
        else:
            self.problem = NonlinearVariationalProblem(residual(*split(u), 0.1) - load, u, bcs=bcs)

    def form(self, c=1.0, k=1.0):
        """Of the functional: Firedrake's own blocks on the tape do not depend on Constants."""
        u1, u2 = split(self.u)
        return (c * u1**2 + u1) * self.dx1 + k * u2**3 * self.dx2

    def solver(self, **kwargs):
        name = type(self.problem).__name__.replace("Problem", "Solver")
        parameters = {
            **GMRES,
            **CONVERGED,
            "ksp_rtol": 1e-12,
            "snes_linesearch_type": "basic",
            "snes_rtol": 1e-12,
            "snes_stol": 0,
            "snes_atol": 1e-12,
            **kwargs.pop("parameters", {}),
        }
        return getattr(prdp_fem, name)(
            self.problem, solver_parameters=parameters, warm_start=False, **kwargs
        )

    def value(self, c, k, form):
        """A functional of Firedrake's own solution."""
        before = float(self.c), self.k.values().copy()
        self.c.assign(c), self.k.assign(k)
        self.u.assign(0)
        getattr(firedrake, type(self.problem).__name__.replace("Problem", "Solver"))(
            self.problem, solver_parameters=EXACT
        ).solve()
        found = assemble(form)
        self.c.assign(before[0]), self.k.assign(before[1])
        return found

    def slopes(self, form):
        """Central differences by c and by the two components of k."""
        at, h = np.array([2.0, 0.5, 1.5]), 1e-4
        rows = [
            (self.value(ahead[0], ahead[1:], form), self.value(behind[0], behind[1:], form))
            for step in h * np.eye(3)
            for ahead, behind in [(at + step, at - step)]
        ]
        return np.array([(ahead - behind) / (2 * h) for ahead, behind in rows])


@pytest.mark.slow
@pytest.mark.parametrize("linear", [True, False], ids=["linear", "nonlinear"])
def test_derivatives_by_constants_on_two_meshes(linear):
    parts = TwoParts(linear=linear)
    parts.solver().solve()
    controls = [parts.c, parts.k]
    reduced = ReducedFunctional(assemble(parts.form()), [Control(control) for control in controls])
    with stop_annotating():
        expected = parts.slopes(parts.form())
        by_c, by_k = reduced.derivative()
        np.testing.assert_allclose([float(by_c), *by_k.values()], expected, rtol=1e-6)
        direction = [Constant(0.3), Constant((0.2, -0.4))]
        assert reduced.tlm(direction) == pytest.approx(expected @ [0.3, 0.2, -0.4], rel=1e-6)

        def slope(h):
            reduced([Constant(2.0 + 0.3 * h), Constant((0.5 + 0.2 * h, 1.5 - 0.4 * h))])
            by_c, by_k = reduced.derivative()
            return np.array([float(by_c), *by_k.values()])

        bent = (slope(1e-4) - slope(-1e-4)) / 2e-4
        slope(0), reduced.tlm(direction)
        by_c, by_k = reduced.hessian(direction)
        np.testing.assert_allclose([float(by_c), *by_k.values()], bent, rtol=1e-5)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "nonlinear"])
def test_layers_with_constants_on_two_meshes(linear):
    parts = TwoParts(linear=linear)
    layer = SolverLayer(parts.solver(), [parts.c, parts.k], output=parts.form(parts.c, parts.k[1]))
    c, k = (
        torch.tensor(values, dtype=torch.float64, requires_grad=True)
        for values in ([2.0], [0.5, 1.5])
    )
    with stop_annotating():
        value = layer(c, k)
        assert value.item() == pytest.approx(parts.value(2.0, (0.5, 1.5), layer.output), rel=1e-9)
        value.backward()
        np.testing.assert_allclose([*c.grad, *k.grad], parts.slopes(layer.output), rtol=1e-6)


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "nonlinear"])
def test_unrolled_derivatives_by_constants_on_two_meshes(linear):
    parts = TwoParts(linear=linear)
    setting = Iterations(3) if linear else NewtonSteps(2, Iterations(3))
    parts.solver(refinement=FixedRefinement(setting), differentiation="unrolled").solve()
    reduced = ReducedFunctional(assemble(parts.form()), [Control(parts.c), Control(parts.k)])
    with stop_annotating():
        start = [Constant(2.0), Constant((0.5, 1.5))]
        direction = [
            Constant(0.3),
            Constant((0.2, -0.4)),
        ]
        assert taylor_test(reduced, start, direction) > 1.95
        reduced(start)
        slope = sum(way._ad_dot(part) for way, part in zip(direction, reduced.derivative()))
        assert reduced.tlm(direction) == pytest.approx(slope, rel=1e-10)
