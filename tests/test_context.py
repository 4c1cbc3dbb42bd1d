"""What preconditioners depend on beside the forms: equal inputs give equal bits, whatever was
solved before.
"""

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from problems import HeatStep, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.torch import SolverLayer, to_torch

pytestmark = pytest.mark.parallel([1, 2])

Told = namedtuple("Told", ["kappa", "number"])


class ByName:
    """Coefficients that preconditioners below find by a name."""


def mass_and_stiffness(trial, test, kappa):
    return (trial * test + kappa * inner(grad(trial), grad(test))) * dx


class FromContext(AuxiliaryOperatorPC):
    """Told by the application context where its coefficient is."""

    def form(self, pc, test, trial):
        return (
            mass_and_stiffness(trial, test, self.get_appctx(pc)["find"](self.get_appctx(pc))),
            None,
        )


class FromScript(AuxiliaryOperatorPC):
    """Finds its coefficient by a name of the script's."""

    def form(self, pc, test, trial):
        return mass_and_stiffness(trial, test, script_kappa()), None


class FromState(AuxiliaryOperatorPC):
    """Made at the state that the operator is made at."""

    def form(self, pc, test, trial):
        return mass_and_stiffness(trial, test, 1 + self.get_appctx(pc)["state"] ** 2), None


class FromSolution(AuxiliaryOperatorPC):
    """Made of the solution, which it finds by name."""

    def form(self, pc, test, trial):
        return mass_and_stiffness(trial, test, 1 + ByName.u**2), None


def script_kappa():
    return ByName.kappa


def parameters(kind):
    return {
        "ksp_type": "gmres",
        "pc_type": "python",
        "pc_python_type": f"{__name__}.{kind.__name__}",
        "aux_pc_type": "ilu" if COMM_WORLD.size == 1 else "bjacobi",
        "mat_type": "aij",
    }


PLACES = {
    "at the top": (lambda kappa: kappa, lambda told: told["kappa"]),
    "expression": (lambda kappa: 2 * kappa, lambda told: told["kappa"] / 2),
    "dict": (
        lambda kappa: {"inner": {"kappa": kappa}},
        lambda told: told["kappa"]["inner"]["kappa"],
    ),
    "list": (lambda kappa: [1.0, [kappa]], lambda told: told["kappa"][1][0]),
    "tuple": (lambda kappa: (kappa, "name"), lambda told: told["kappa"][0]),
    "named tuple": (lambda kappa: Told(kappa, 3), lambda told: told["kappa"].kappa),
    "namespace": (lambda kappa: SimpleNamespace(a=[kappa]), lambda told: told["kappa"].a[0]),
    "function": (lambda kappa: lambda: kappa, lambda told: told["kappa"]()),
}


def solutions(problem, solver, kappa, values):
    """Of solves with one value of a coefficient after the other."""
    found = []
    for value in values:
        kappa.assign(value)
        problem.u.assign(0)
        solver.solve()
        found.append(problem.u.dat.data_ro.copy())
    return found


def heat(owner):
    """A heat step whose preconditioner has the diffusivity, or a coefficient that is in no form."""
    problem = HeatStep(boundary=1.0)
    kappa = (
        problem.kappa
        if owner == "operator"
        else Function(problem.V, name="of the preconditioner").assign(1.0)
    )
    keep = Function(problem.V).assign(kappa)
    other = Function(problem.V).interpolate(1 + 50 * SpatialCoordinate(problem.mesh)[1])
    return problem, kappa, keep, other


def solver_of(problem, kind, appctx=None, **kwargs):
    return prdp_fem.LinearVariationalSolver(
        problem.problem,
        refinement=FixedRefinement(Iterations(3)),
        solver_parameters=parameters(kind),
        appctx=appctx,
        **kwargs,
    )


@pytest.mark.parametrize("owner", ["operator", "preconditioner"])
@pytest.mark.parametrize("place", [*PLACES, "script"])
def test_coefficients_of_a_preconditioner_are_those_of_the_solve(place, owner):
    with stop_annotating():
        problem, kappa, keep, other = heat(owner)
        ByName.kappa = kappa

        def make():
            if place == "script":
                return solver_of(problem, FromScript)
            put, find = PLACES[place]
            return solver_of(problem, FromContext, {"kappa": put(kappa), "find": find})

        used = solutions(problem, make(), kappa, [keep, other, keep, other])
        fresh = [solutions(problem, make(), kappa, [value])[0] for value in (keep, other)]
    assert np.array_equal(used[0], fresh[0]) and np.array_equal(used[2], fresh[0])
    assert np.array_equal(used[1], fresh[1]) and np.array_equal(used[3], fresh[1])
    assert COMM_WORLD.allreduce(not np.array_equal(*fresh))


@pytest.mark.parametrize("owner", ["operator", "preconditioner"])
@pytest.mark.parametrize("place", ["dict", "function", "script"])
def test_replays_and_layers_have_the_coefficients_of_their_own(place, owner):
    with stop_annotating():
        problem, kappa, keep, other = heat(owner)
    ByName.kappa = kappa
    put, find = PLACES.get(place, (None, None))
    solver = (
        solver_of(problem, FromScript)
        if place == "script"
        else solver_of(problem, FromContext, {"kappa": put(kappa), "find": find})
    )
    with stop_annotating():
        expected = solutions(problem, solver, kappa, [other])[0]
        kappa.assign(keep)
    solver.solve()
    reduced = ReducedFunctional(assemble(problem.u**2 * dx), Control(kappa))
    with stop_annotating():
        reduced(other)
        replayed = get_working_tape().get_blocks()[-2].get_outputs()[0].saved_output
        assert np.array_equal(replayed.dat.data_ro, expected)
        assert np.array_equal(kappa.dat.data_ro, keep.dat.data_ro)
        layer = SolverLayer(solver, [kappa])
        rows = layer(torch.stack([to_torch(keep), to_torch(other)]))
        assert np.array_equal(rows[1].numpy(), expected)
        assert np.array_equal(kappa.dat.data_ro, keep.dat.data_ro)


@pytest.mark.parametrize("kind", [FromState, FromSolution])
@pytest.mark.parametrize("appctx", [None, {"more": 1}])
def test_a_preconditioner_has_the_state_forward_and_backward(kind, appctx, monkeypatch):
    """A Newton step's, and that which the adjoint is solved at; a transposed solve of PETSc's has
    the same preconditioner.
    """
    V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
    u = Function(V, name="solution")
    v = TestFunction(V)
    f = smooth(V, 3)
    ByName.u = u
    seen = []
    apply, transposed = kind.apply, kind.applyTranspose

    def note(of):
        def noted(self, pc, x, y):
            seen.append(self.P.petscmat.norm())
            of(self, pc, x, y)

        return noted

    monkeypatch.setattr(kind, "apply", note(apply))
    monkeypatch.setattr(kind, "applyTranspose", note(transposed))
    problem = NonlinearVariationalProblem(
        ((1 + u**2) * inner(grad(u), grad(v)) + u * v - 10 * f * v) * dx, u
    )
    solver = prdp_fem.NonlinearVariationalSolver(
        problem,
        solver_parameters={**parameters(kind), "ksp_rtol": 1e-10, "snes_rtol": 1e-10},
        appctx=appctx,
    )
    solver.solve()
    forward = seen[-1]
    reduced = ReducedFunctional(assemble(u**2 * dx), Control(f))
    with stop_annotating():
        solution, seen[:] = u.copy(deepcopy=True), []
        u.assign(17.0)
        reduced.derivative()
        w = TrialFunction(V)
        expected = assemble(
            mass_and_stiffness(w, v, 1 + solution**2), mat_type="aij"
        ).petscmat.norm()
        assert seen and all(norm == pytest.approx(expected, rel=1e-9) for norm in seen)
        assert forward == pytest.approx(expected, rel=1e-2) and forward != pytest.approx(
            expected, rel=1e-14
        )
        assert np.all(u.dat.data_ro == 17.0)
        assert taylor_test(reduced, f.copy(deepcopy=True), smooth(V, 4)) > 1.9


def test_steps_of_a_preconditioner_with_a_coefficient_on_the_tape():
    """A time loop in which only the preconditioner's coefficient changes: each step is replayed
    with its own.
    """
    with stop_annotating():
        problem, kappa, keep, other = heat("preconditioner")
    solver = solver_of(
        problem, FromContext, {"kappa": {"now": kappa}, "find": lambda told: told["kappa"]["now"]}
    )
    for value in (keep, other, keep):
        kappa.assign(value)
        solver.solve()
        problem.u0.assign(problem.u)
    J = assemble(problem.u**2 * dx)
    reduced = ReducedFunctional(J, Control(problem.source))
    kappa.assign(other)
    assert reduced(problem.source) == J


def test_newton_steps_with_a_coefficient_of_the_preconditioner_alone():
    with stop_annotating():
        V = FunctionSpace(UnitSquareMesh(5, 5), "CG", 1)
        u = Function(V)
        v = TestFunction(V)
        f = smooth(V, 3)
        kappa = Function(V).assign(1.0)
        problem = NonlinearVariationalProblem(
            ((1 + u**2) * inner(grad(u), grad(v)) + u * v - f * v) * dx, u
        )

        def make():
            return prdp_fem.NonlinearVariationalSolver(
                problem,
                refinement=FixedRefinement(NewtonSteps(2, Iterations(2))),
                warm_start=False,
                solver_parameters={**parameters(FromContext), "snes_linesearch_type": "basic"},
                appctx={"all": [kappa], "find": lambda told: told["all"][0]},
            )

        keep, other = Function(V).assign(1.0), Function(V).assign(30.0)
        holder = SimpleNamespace(u=u)
        used = solutions(holder, make(), kappa, [keep, other, keep])
        fresh = solutions(holder, make(), kappa, [other])[0]
    assert np.array_equal(used[0], used[2]) and np.array_equal(used[1], fresh)
    assert COMM_WORLD.allreduce(not np.array_equal(used[0], used[1]))
