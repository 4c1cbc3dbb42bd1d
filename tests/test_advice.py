"""Advice is measured right, follows from its own table, and leaves the user's solver as it was."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from cases import Burgers, Darcy
from firedrake import *
from firedrake.adjoint import continue_annotation, get_working_tape, pause_annotation
from firedrake.petsc import PETSc
from problems import CG, GMRES, AdvectionDiffusion, HeatStep, smooth, whole

import prdp_fem
from prdp_fem.advice.candidates import factorisations, iterations, predicted_seconds
from prdp_fem.advice.measurement import Measurement, relative_error
from prdp_fem.advice.rule import DIGITS, LEAST, MOST, NOISE, SIMPLER, best, choose
from prdp_fem.advice.subject import Subject
from prdp_fem.torch import SolverLayer, to_torch

SECONDS = 1.0


def insulated():
    """A singular operator with its null space."""
    mesh = UnitSquareMesh(8, 8)
    V = FunctionSpace(mesh, "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    f = smooth(V, 3)
    f.assign(f - assemble(f * dx))
    constants = VectorSpaceBasis(constant=True, comm=mesh.comm)
    return prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(inner(grad(w), grad(v)) * dx, f * v * dx, Function(V, name="u")),
        nullspace=constants,
        transpose_nullspace=constants,
        solver_parameters=CG,
    )


def heat(**options):
    return prdp_fem.LinearVariationalSolver(
        HeatStep(8).problem, **{"solver_parameters": CG, **options}
    )


def transport():
    return prdp_fem.LinearVariationalSolver(AdvectionDiffusion(8).problem, solver_parameters=GMRES)


def by_default():
    return prdp_fem.LinearVariationalSolver(HeatStep(8).problem)


def initial_layer():
    step = HeatStep(8)
    solver = prdp_fem.LinearVariationalSolver(step.problem, solver_parameters=CG)
    x = to_torch(step.u0)
    return SolverLayer(solver, [step.u0]), torch.stack([x, x**2 + 1])


def diffusivity_layer():
    step = HeatStep(8, boundary=Constant(0.3))
    solver = prdp_fem.LinearVariationalSolver(step.problem, solver_parameters=CG)
    x = to_torch(step.kappa)
    return SolverLayer(solver, [step.kappa, step.u0]), torch.stack([x, 2 * x]), to_torch(step.u0)


def burgers():
    return Burgers().solver(GMRES)


# On several ranks those of each kind.
SUBJECTS = [
    pytest.param(subject, marks=[] if is_everywhere else [pytest.mark.ranks(1)])
    for subject, is_everywhere in [
        (heat, False),
        (transport, True),
        (by_default, False),
        (insulated, True),
        (initial_layer, False),
        (diffusivity_layer, True),
        (burgers, True),
    ]
]


def asked(subject):
    made = subject()
    return made if isinstance(made, tuple) else (made,)


@cache
def advised(subject):
    """What was asked, and the advice, made once for all tests."""
    made = asked(subject)
    return made, prdp_fem.advise(*made, budget=SECONDS)


def solver_of(thing):
    return thing.solver if isinstance(thing, SolverLayer) else thing


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_errors_are_those_against_a_direct_solve(subject):
    """Each row is solved again, by a solver that was made by hand of what the row says."""
    (thing, *samples), advice = advised(subject)
    solver = solver_of(thing)
    is_linear = isinstance(solver, prdp_fem.LinearVariationalSolver)
    make = prdp_fem.LinearVariationalSolver if is_linear else prdp_fem.NonlinearVariationalSolver
    bases = {
        name: basis
        for name, basis in solver.arguments.items()
        if name in ("nullspace", "transpose_nullspace") and basis is not None
    }

    def solutions(parameters, setting):
        made = make(solver.problem, solver_parameters=parameters, **bases)
        made.refinement = None if setting is None else prdp_fem.FixedRefinement(setting)
        if samples:
            rows = [row.double() for row in samples]
            return SolverLayer(made, thing.controls)(*rows).numpy()
        with made.problem.u.dat.vec_ro as vector:
            before = vector.copy()
        found = made.solve(annotate=False).dat.data_ro.copy().reshape(1, -1)
        with made.problem.u.dat.vec_wo as vector:
            before.copy(vector)
        return found

    newton = {name: value for name, value in solver.parameters.items() if "snes" in name}
    direct = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}
    exact = solutions({**newton, **direct}, None)
    rows = [row for row in advice.table if not row.failure]
    # One of each method: the last, whose setting is the finest, and the one with least digits.
    for name in {row.method: None for row in rows}:
        of_method = [row for row in rows if row.method == name]
        for row in (of_method[-1], min(of_method, key=lambda row: row.digits)):
            found = solutions({**newton, **row.solver_parameters}, row.setting)
            error = relative_error(COMM_WORLD, [found], [exact])
            assert error == pytest.approx(row.error, rel=0.05, abs=1e-7), (name, row.asked)


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_advice_follows_from_its_table(subject):
    (thing, *samples), advice = advised(subject)
    chosen = advice.choice.chosen
    assert chosen in advice.table and chosen.digits >= DIGITS
    good = [row for row in advice.table if row.digits >= DIGITS]
    # A factorisation may cost more than iterations by noise, and so may what is simpler.
    assert chosen.cost <= (1 + NOISE) * (1 + SIMPLER) * min(row.cost for row in good)
    assert dict(chosen.solver_parameters).items() <= advice.solver_parameters.items()
    if chosen.factorises and isinstance(solver_of(thing), prdp_fem.LinearVariationalSolver):
        assert advice.ladder is None
    if not chosen.factorises:
        refinement = prdp_fem.ProgressiveRefinement(advice.ladder)
        assert refinement.setting.budget
    assert choose(advice.table) == advice.choice


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("subject", [heat, diffusivity_layer, burgers])
def test_all_ranks_are_advised_alike(subject):
    _, advice = advised(subject)
    everywhere = COMM_WORLD.allgather((str(advice), repr(advice.table)))
    assert len(set(everywhere)) == 1


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_what_is_said_can_be_used(subject):
    (thing, *samples), advice = advised(subject)
    solver = solver_of(thing)
    make = (
        prdp_fem.LinearVariationalSolver
        if isinstance(solver, prdp_fem.LinearVariationalSolver)
        else prdp_fem.NonlinearVariationalSolver
    )
    refinement = None
    if advice.ladder is not None:
        refinement = prdp_fem.ProgressiveRefinement(advice.ladder)
    made = make(solver.problem, solver_parameters=advice.solver_parameters, refinement=refinement)
    assert made.refinement is refinement
    text = str(advice)
    assert solver.problem.u.name() in text and repr(advice.solver_parameters) in text
    assert (repr(advice.ladder) in text) == (advice.ladder is not None)
    for row in advice.table:
        assert row.method in text and row.failure in text


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_of_the_users_changes(subject):
    """Bits, settings, counts, options, values and the tape stay as they were."""
    thing, *samples = asked(subject)
    if subject is not by_default:
        solver_of(thing).refinement = prdp_fem.FixedRefinement(prdp_fem.Iterations(3))

    def solutions(thing):
        if samples:
            inputs = [sample.clone().requires_grad_() for sample in samples]
            found = thing(*inputs)
            found.sum().backward()
            return [found.detach().numpy(), *(one.grad.numpy() for one in inputs)]
        with thing.problem.u.dat.vec_ro as vector:
            before = vector.copy()
        found = thing.solve().dat.data_ro.copy()
        with thing.problem.u.dat.vec_wo as vector:
            before.copy(vector)
        return [found]

    def state(thing):
        solver = solver_of(thing)
        ksp = solver.snes.getKSP()
        values = [np.array(entry.present_values()) for entry in solver.system.inputs]
        return (
            repr(solver.statistics).partition("forward_seconds")[0],
            repr(solver.refinement),
            ksp.getTolerances(),
            ksp.getType(),
            ksp.getPC().getType(),
            PETSc.Options().getAll(),
            [value.tobytes() for value in [*values, solver.problem.u.dat.data_ro]],
        )

    first = solutions(thing)
    before, blocks = state(thing), len(get_working_tape().get_blocks())
    continue_annotation()
    try:
        prdp_fem.advise(thing, *samples, budget=0.5)
    finally:
        pause_annotation()
    assert state(thing) == before
    assert len(get_working_tape().get_blocks()) == blocks
    for found, earlier in zip(solutions(thing), first):
        assert np.array_equal(whole(found.ravel()), whole(earlier.ravel()))


@pytest.mark.parallel([1, 2])
def test_both_digits_and_tolerances_are_measured():
    _, advice = advised(heat)
    mine = [row for row in advice.table if row.is_at_hand and not row.failure]
    names = [row.asked for row in mine]
    assert "as it is" in names and {"rtol 1e-02", "rtol 1e-04", "rtol 1e-06"} <= {*names}
    digits = [row for row in mine if "digit" in row.asked]
    for row in digits:
        assert row.digits >= int(row.asked.split()[0])
    counts = [row.setting.iterations for row in digits]
    assert counts == sorted(set(counts)) and len(counts) >= 4
    assert all(row.iterations[0] == row.setting.iterations for row in digits)
    # The levels of the ladder that is advised for these are between the first and the last.
    direct = [row for row in advice.table if row.factorises and not row.failure]
    assert direct and all(row.digits > 10 for row in direct)


@pytest.mark.parametrize("rows, assemblies", [(1, 1), (2, 4)])
def test_an_operator_that_varies_is_made_as_often_as_in_a_training(rows, assemblies):
    """In a batch forward and backward; alone once, as the way back finds it still there."""
    layer, diffusivities, initial = diffusivity_layer()
    subject = Subject(layer, [diffusivities[:rows], initial])
    trips = subject.trips(subject.at_hand)
    assert subject.varies
    for _ in range(2):
        trips.go(None, None)
        assert trips.solver.statistics.assemblies == assemblies


def test_symmetry_is_found():
    assert "operator symmetric and kept" in str(advised(heat)[1])
    assert "operator unsymmetric and kept" in str(advised(transport)[1])
    assert "symmetric and made anew for each sample" in str(advised(diffusivity_layer)[1])
    methods = {row.method for row in advised(transport)[1].table}
    assert not any(name.startswith(("cg", "Cholesky")) for name in methods)


def test_failures_are_rows():
    """PETSc's own factorisation meets a zero pivot, and conjugate gradients an indefinite one."""
    _, advice = advised(insulated)
    failed = {row.method: row.failure for row in advice.table if row.failure}
    assert "LU (petsc)" in failed and "PCSETUP_FAILED" in failed["LU (petsc)"]
    advice = prdp_fem.advise(Darcy().solver({"ksp_type": "minres", "pc_type": "none"}))
    failed = {row.method: row.failure for row in advice.table if row.failure}
    assert "INDEFINITE" in failed["cg + jacobi"]
    assert any(row.method == "gmres + ilu" and not row.failure for row in advice.table)
    assert advice.choice is not None


def test_a_solver_that_has_solved_is_looked_at_from_zero():
    solver = burgers()
    solver.solve(annotate=False)
    solution = solver.problem.u.dat.data_ro.copy()
    advice = prdp_fem.advise(solver, budget=0.5)
    assert "from zero" in str(advice).splitlines()[0]
    assert all(row.newton_steps > 0 for row in advice.table if not row.failure)
    assert np.array_equal(solver.problem.u.dat.data_ro, solution)


def test_what_was_set_by_hand_is_at_hand():
    solver = heat()
    solver.snes.getKSP().getPC().setType("sor")
    advice = prdp_fem.advise(solver, budget=0.5)
    assert advice.table[0].method == "yours: cg + sor"


def test_a_solver_under_control_is_advised():
    step = HeatStep(8)
    stock = firedrake_solver = LinearVariationalSolver(step.problem, solver_parameters=CG)
    prdp_fem.control(stock, prdp_fem.FixedRefinement(prdp_fem.Iterations(2)))
    advice = prdp_fem.advise(firedrake_solver, budget=0.5)
    assert advice.table[0].method == "yours: cg + jacobi"
    assert advice.choice is not None


def test_without_time_the_users_own_method_and_a_reference_are_there():
    advice = prdp_fem.advise(heat(), budget=1e-6)
    said = [row.failure for row in advice.table if row.failure]
    assert said and all("not tried" in failure for failure in said)
    # It was its own reference, and is all that is known.
    assert advice.table[0].is_at_hand and not advice.table[0].failure
    assert advice.solver_parameters["pc_type"] == "jacobi"


def test_a_factorisation_that_would_take_too_long_is_not_tried():
    assert predicted_seconds(3, 10**6) > 1000 > 10 > predicted_seconds(2, 256**2)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_candidates_suit_the_operator_and_the_ranks(symmetric, ranks):
    direct = factorisations(symmetric=symmetric, ranks=ranks)
    kinds = {one.parameters["pc_type"] for one in direct}
    assert kinds == ({"lu", "cholesky"} if symmetric else {"lu"})
    if ranks > 1:
        assert {one.parameters["pc_factor_mat_solver_type"] for one in direct} == {"mumps"}
    others = iterations(symmetric=symmetric, ranks=ranks)
    assert {one.parameters["ksp_type"] for one in others} == (
        {"cg"} if symmetric else {"gmres", "bcgs"}
    )
    serial = {"icc", "ilu", "eisenstat"}
    assert ranks == 1 or not serial & {one.parameters["pc_type"] for one in others}
    assert len({one.name for one in [*direct, *others]}) == len(direct) + len(others)


def test_the_zero_solution_is_an_error():
    step = HeatStep(4)
    step.u0.assign(0)
    step.source.assign(0)
    solver = prdp_fem.LinearVariationalSolver(step.problem, solver_parameters=CG)
    with pytest.raises(ValueError, match="solution 'solution' is zero"):
        prdp_fem.advise(solver)


def test_wrong_arguments():
    layer, inputs = initial_layer()
    with pytest.raises(TypeError, match="found a builtins.int: put a solver of Firedrake's under"):
        prdp_fem.advise(3)
    with pytest.raises(TypeError, match="a solver takes no samples"):
        prdp_fem.advise(layer.solver, inputs)
    with pytest.raises(TypeError, match=r"the layer has 1 control\(s\).*; found 2"):
        prdp_fem.advise(layer, inputs, inputs)
    with pytest.raises(TypeError, match="samples must be tensors, found a list"):
        prdp_fem.advise(layer, [1.0])
    with pytest.raises(ValueError, match="expected a last axis of"):
        prdp_fem.advise(layer, inputs[:, 1:])
    with pytest.raises(ValueError, match="budget must be a number of seconds above 0, found 0"):
        prdp_fem.advise(layer, inputs, budget=0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="torch keeps none at the moment"):
        prdp_fem.advise(layer, inputs)


# --- the rule -------------------------------------------------------------------------------------


def row(method, milliseconds, digits=16.0, failure=""):
    return Measurement(
        method,
        {},
        factorises=method.startswith("LU"),
        seconds=(milliseconds / 2000, milliseconds / 2000),
        error=10.0**-digits,
        gradient_error=10.0**-digits,
        failure=failure,
    )


def iterative(*milliseconds, method="cg"):
    """Rows for one digit, two and three."""
    return [row(method, cost, digits + 0.5) for digits, cost in enumerate(milliseconds, start=1)]


@pytest.mark.parametrize(
    "table, chosen, is_sure",
    [
        ([row("LU", 10), *iterative(1, 2, 3)], "cg", True),
        ([row("LU", 10), *iterative(1, 5, 12)], "cg", False),
        ([row("LU", 10), *iterative(5, 12, 20)], "LU", False),
        ([row("LU", 10), *iterative(12, 20, 30)], "LU", True),
        ([row("LU", 10), *iterative(5, 8.5, 20)], "LU", False),  # simpler
        ([row("LU", 10), *iterative(9, 9.5, 9.8)], "LU", False),
        ([row("LU", 10), *iterative(1)], "LU", False),  # two digits were not reached
        ([row("LU", 1, failure="a zero pivot"), *iterative(5, 9, 20)], "cg", True),
        (iterative(1), "cg", False),
        ([row("LU", 1, failure="a zero pivot"), *iterative(5, method="gmres")], "gmres", False),
    ],
)
def test_the_cheapest_for_two_digits_is_chosen(table, chosen, is_sure):
    choice = choose(table)
    assert choice.chosen.method == chosen and choice.is_sure is is_sure


def test_within_noise_the_first_method_is_taken():
    table = [*iterative(1, 2.1, 3, method="mine"), *iterative(1, 2, 3, method="other")]
    assert best(table, DIGITS, factorises=False).method == "mine"
    table = [*iterative(1, 3, 4, method="mine"), *iterative(1, 2, 3, method="other")]
    assert best(table, DIGITS, factorises=False).method == "other"
    assert best(table, DIGITS, factorises=True) is None


def test_nothing_is_chosen_where_nothing_works():
    assert choose([row("LU", 1, failure="no"), row("cg", 1, digits=0.2)]) is None
    assert choose([]) is None


def test_costs_and_digits_of_failures():
    failed = row("cg", 1, failure="no")
    assert failed.cost == math.inf and failed.digits == -math.inf
    assert row("cg", 4, digits=2).cost == pytest.approx(4e-3)
    assert row("cg", 4, digits=2).digits == pytest.approx(2)
    assert LEAST < DIGITS < MOST
