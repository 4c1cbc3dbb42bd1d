"""Solves that are differentiated as the iterations that they are."""

import numpy as np
import pytest
import torch
from cases import (
    Burgers,
    Darcy,
    Elasticity,
    Heat,
    Load,
    Moving,
    NonlinearDiffusion,
    Reaction,
    Transport,
    direction_of,
    on_fewer,
)
from firedrake import *
from firedrake.adjoint import *
from problems import CG, GMRES, RICHARDSON, HeatStep, smooth

import prdp_fem
from prdp_fem import (
    FixedRefinement,
    Iterations,
    NewtonSteps,
    ScheduledRefinement,
    Tolerance,
    Unrolled,
)
from prdp_fem.torch import SolverLayer

KSPS = {
    "cg+jacobi": CG,
    "cg+sor": {"ksp_type": "cg", "pc_type": "sor"},
    "gmres+jacobi": GMRES,
    "gmres+sor": {"ksp_type": "gmres", "pc_type": "sor", "ksp_gmres_restart": 3},
    "fgmres+none": {"ksp_type": "fgmres", "pc_type": "none", "ksp_gmres_restart": 3},
    "bcgs+pbjacobi": {"ksp_type": "bcgs", "pc_type": "pbjacobi"},
    "richardson+jacobi": RICHARDSON,
    "chebyshev+jacobi": {
        "ksp_type": "chebyshev",
        "pc_type": "jacobi",
        "ksp_chebyshev_eigenvalues": "0.05,2.1",
    },
    "steepest descent": {
        "ksp_type": "python",
        "ksp_python_type": "prdp_fem.SteepestDescent",
        "pc_type": "jacobi",
    },
}
BASIC = {"snes_linesearch_type": "basic"}


def fixed(iterations: int, steps: int | None = None) -> FixedRefinement:
    setting = Iterations(iterations)
    return FixedRefinement(setting if steps is None else NewtonSteps(steps, setting))


def remainder_rate(reduced, control, direction) -> float:
    """The rate at which first remainders fall between the two smallest of four steps: few
    iterations bend much, and rounding is near.
    """
    with stop_annotating():
        m = control._ad_copy()
        value, derivative = reduced(m), dot(reduced.derivative(), direction)
        steps = [4e-3 / 2**k for k in range(4)]
        remainders = [
            abs(reduced(m._ad_add(direction._ad_mul(step))) - value - step * derivative)
            for step in steps
        ]
    return float(np.log2(remainders[-2] / remainders[-1]))


def sizes_of(layer: SolverLayer) -> list[int]:
    """The rank-local number of values of each control."""
    return [control.dat.data_ro.size for control in layer.controls]


def dot(gradient, direction) -> float:
    """A derivative in a direction from the gradient by dofs."""
    own = float(gradient.dat.data_ro.reshape(-1) @ direction.dat.data_ro.reshape(-1))
    shared = (
        isinstance(direction, Constant)
        or direction.function_space().ufl_element().family() == "Real"
    )
    return own if shared else COMM_WORLD.allreduce(own)


GRID = [
    (case, control, ksp)
    for case, controls, ksps in (
        (Heat, ("initial", "diffusivity", "time step", "boundary"), tuple(KSPS)),
        (Transport, ("source", "wind"), ("gmres+jacobi", "gmres+sor")),
        (Reaction, ("real rate", "log source"), ("cg+jacobi", "gmres+sor")),
        (Elasticity, ("modulus", "load"), ("cg+jacobi", "cg+sor", "bcgs+pbjacobi")),
        (Darcy, ("source",), ("fgmres+none",)),
        (Load, ("through a cofunction",), ("cg+jacobi",)),
        (Moving, ("mesh",), ("cg+jacobi", "richardson+jacobi")),
        (NonlinearDiffusion, ("source", "constant", "boundary"), ("gmres+jacobi", "gmres+sor")),
        (Burgers, ("initial", "viscosity"), ("gmres+jacobi", "bcgs+pbjacobi")),
    )
    for control in controls
    for ksp in ksps
]


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "case, control, ksp",
    on_fewer(
        GRID,
        lambda case, control, ksp: (case, control),
        lambda case, control, ksp: ksp,
        all_on=(1, 2),
    ),
)
def test_remainders_at_every_number_of_iterations(case, control, ksp, taylor_table):
    problem = case()
    nonlinear = not isinstance(problem.problem, LinearVariationalProblem)
    ladder = [fixed(iterations, 2 if nonlinear else None).setting for iterations in (1, 2, 4, 8)]
    refinement = ScheduledRefinement(ladder, {1: 1, 2: 2, 3: 3})
    problem.solver(
        {**KSPS[ksp], **(BASIC if nonlinear else {})},
        differentiation="unrolled",
        refinement=refinement,
    ).solve()
    m, direction = problem.controls[control], direction_of(problem.controls[control])
    reduced = ReducedFunctional(problem.functional(), Control(m))
    with stop_annotating():
        for _ in ladder:
            rate = remainder_rate(reduced, m, direction)
            taylor_table(
                (case.__name__, control, f"{ksp}, {refinement.setting}", rate, float("nan"))
            )
            assert rate > 1.9, (
                f"remainders by {control} with {ksp} after {refinement.setting} fall at rate {rate}"
            )
            reduced(m)
            adjoint, tangent = dot(reduced.derivative(), direction), float(reduced.tlm(direction))
            assert tangent == pytest.approx(adjoint, rel=1e-9), (
                f"tangent and adjoint after {refinement.setting}"
            )
            refinement.step(1.0)


# The forward pass


@pytest.mark.parametrize("ksp", KSPS)
def test_the_forward_pass_is_the_same_to_the_bit(ksp):
    values = []
    for differentiation in ("implicit", "unrolled"):
        heat = Heat()
        heat.solver(KSPS[ksp], differentiation=differentiation, refinement=fixed(3)).solve()
        values.append(heat.u.dat.data_ro.copy())
    np.testing.assert_array_equal(*values)


# Against implicit differentiation


@pytest.mark.parametrize("iterations", [1, 2, 4, 8])
def test_richardson_from_zero_is_its_own_adjoint(iterations):
    gradients = []
    for differentiation in ("implicit", "unrolled"):
        problem = HeatStep(4)
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            solver_parameters=RICHARDSON,
            differentiation=differentiation,
            refinement=fixed(iterations),
        )
        layer = SolverLayer(solver, [problem.u0])
        x = torch.ones(2, problem.V.dim(), dtype=torch.float64, requires_grad=True)
        (layer(x) ** 2).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("control", ["diffusivity", "initial", "boundary", "time step"])
def test_converged_solves_have_the_implicit_derivative(control):
    gradients = []
    for differentiation in ("implicit", "unrolled"):
        heat = Heat()
        with set_working_tape(Tape()):
            heat.solver(
                {**CG, "ksp_rtol": 1e-13, "ksp_atol": 1e-50}, differentiation=differentiation
            ).solve()
            gradient = ReducedFunctional(
                heat.functional(), Control(heat.controls[control])
            ).derivative()
        gradients.append(gradient.dat.data_ro.copy())
    np.testing.assert_allclose(*gradients, rtol=1e-8, atol=1e-12)


# Guesses


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("ksp", ["cg+jacobi", "gmres+sor", "steepest descent"])
def test_guesses_matter(ksp):
    problem = HeatStep(5)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        solver_parameters=KSPS[ksp],
        differentiation="unrolled",
        warm_start=True,
        refinement=fixed(2),
    )
    guess = smooth(problem.V, 7)
    problem.u.assign(guess)
    for _ in range(3):  # each from the last
        solver.solve()
    reduced = ReducedFunctional(assemble(problem.u**4 * dx), Control(guess))
    direction = smooth(problem.V, 9)
    with stop_annotating():
        # a remainder of second order may vanish here, by how the mesh is cut into parts
        ahead, behind = (reduced(guess._ad_add(direction._ad_mul(step))) for step in (1e-5, -1e-5))
        reduced(guess)
    assert dot(reduced.derivative(), direction) == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)
    assert float(reduced.tlm(direction)) == pytest.approx(
        dot(reduced.derivative(), direction), rel=1e-9
    )


@pytest.mark.parametrize("steps, depends", [("all", True), ("last", False)])
def test_nonlinear_guesses_matter_unless_only_the_last_step_is_unrolled(steps, depends):
    problem = NonlinearDiffusion()
    solver = problem.solver(
        {**GMRES, **BASIC}, differentiation=Unrolled(steps=steps), refinement=fixed(3, 1)
    )
    guess = smooth(problem.u.function_space(), 3)
    problem.u.assign(guess)
    solver.solve()
    gradient = ReducedFunctional(problem.functional(), Control(guess)).derivative()
    assert (norm(gradient.riesz_representation("l2")) > 1e-8) == depends


# Central differences of the forward solve


def assert_central_differences_agree(problem, solver, control, *, tolerance=1e-6):
    """A layer's gradient, and the tangent on the tape, against the solves that they are the
    derivatives of.
    """
    layer, generator = SolverLayer(solver, [control]), torch.Generator().manual_seed(1)
    x = torch.tensor(np.array(control.dat.data_ro).reshape(-1), requires_grad=True)
    direction = torch.rand(len(x), dtype=torch.float64, generator=generator)
    weights = torch.rand(problem.V.dim(), dtype=torch.float64, generator=generator)
    (gradient,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    with torch.no_grad():
        difference = (
            (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) * weights
        ).sum() / 2e-6
    assert float(gradient @ direction) == pytest.approx(float(difference), rel=tolerance, abs=1e-12)


class Plain:
    """Diffusion with reaction and wind."""

    def __init__(self, *, neumann=False, wind=False):
        mesh = UnitSquareMesh(4, 4)
        V = self.V = FunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        self.u = Function(V, name="u")
        self.kappa = smooth(V, 1, "kappa")
        self.f = smooth(V, 2, "f")
        self.c = Constant(float(wind), name="c")
        with stop_annotating():
            self.kappa.assign(2 + 0.5 * self.kappa)
        x, y = SpatialCoordinate(mesh)
        a = (
            self.kappa * inner(grad(w), grad(v))
            + 10 * self.c * w.dx(0) * v
            + (0 if neumann else 1) * w * v
        )
        L = (self.f - assemble(self.f * dx) if neumann else self.f) * v
        self.problem = LinearVariationalProblem(
            a * dx, L * dx, self.u, bcs=None if neumann else DirichletBC(V, 0, 1)
        )

    def solver(self, parameters, **options):
        return prdp_fem.LinearVariationalSolver(
            self.problem,
            solver_parameters=parameters,
            differentiation="unrolled",
            refinement=fixed(4),
            **options,
        )


@pytest.mark.parametrize("control", ["f", "kappa"])
@pytest.mark.parametrize(
    "parameters",
    [
        {"ksp_type": "cg", "pc_type": "sor", "pc_sor_forward": None},
        {"ksp_type": "cg", "pc_type": "sor", "pc_sor_backward": None},
        {"ksp_type": "richardson", "pc_type": "sor", "pc_sor_forward": None},
    ],
    ids=["cg+forward", "cg+backward", "richardson+forward"],
)
def test_unsymmetric_preconditioners_of_symmetric_operators(parameters, control):
    problem = Plain()
    assert_central_differences_agree(problem, problem.solver(parameters), getattr(problem, control))


@pytest.mark.parametrize(
    "parameters",
    [
        {"ksp_type": "gmres", "pc_type": "asm", "pc_asm_blocks": 4, "pc_asm_type": "basic"},
        {"ksp_type": "cg", "pc_type": "ilu"},
        {"ksp_type": "fgmres", "pc_type": "gamg"},
        {"ksp_type": "bcgs", "pc_type": "bjacobi"},
    ],
)
def test_constant_preconditioners_are_exact_by_right_hand_sides(parameters):
    problem = Plain(wind=True)
    assert_central_differences_agree(problem, problem.solver(parameters), problem.f)


@pytest.mark.parametrize("control", ["f", "kappa"])
@pytest.mark.parametrize(
    "ksp", ["cg+jacobi", "cg+sor", "gmres+sor", "richardson+jacobi", "bcgs+pbjacobi", "fgmres+none"]
)
def test_null_spaces(ksp, control):
    problem = Plain(neumann=True)
    constants = VectorSpaceBasis(constant=True, comm=COMM_WORLD)
    solver = problem.solver(KSPS[ksp], nullspace=constants, transpose_nullspace=constants)
    assert_central_differences_agree(problem, solver, getattr(problem, control))


@pytest.mark.parametrize("ksp", ["gmres+jacobi", "richardson+jacobi", "bcgs+pbjacobi"])
def test_operators_that_become_symmetric_and_cease_to_be(ksp):
    problem = Plain(wind=True)
    layer = SolverLayer(problem.solver(KSPS[ksp]), [problem.c])
    gradients = []
    for value in (1.0, 0.0, 1.0, 0.0):
        x = torch.tensor([value], dtype=torch.float64, requires_grad=True)
        layer(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[2:], gradients[:2], rtol=0, atol=0)
    assert_central_differences_agree(problem, layer.solver, problem.c)


@pytest.mark.parametrize("ksp", ["richardson+jacobi", "chebyshev+jacobi"])
def test_linear_methods_have_a_derivative_where_there_is_nothing_to_do(ksp):
    problem = Plain()
    problem.f.assign(0)
    assert_central_differences_agree(problem, problem.solver(KSPS[ksp]), problem.f)


def test_others_warn_where_there_is_nothing_to_do(caplog):
    problem = Plain()
    problem.f.assign(0)
    solver = problem.solver(CG)
    for _ in range(2):
        solver.solve()
    assert sum("none to make" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("steps", ["all", "last"])
def test_converged_guesses_make_no_steps(steps):
    problem = NonlinearDiffusion()
    problem.solve(GMRES)
    with set_working_tape(Tape()):
        solver = problem.solver(
            {**GMRES, **BASIC, "snes_atol": 1e-6}, differentiation=Unrolled(steps=steps)
        )
        solver.solve()
        reduced = ReducedFunctional(problem.functional(), Control(problem.controls["source"]))
        assert solver.statistics.newton_steps == 0
        assert not reduced.derivative().dat.data_ro.any()
        assert float(reduced.tlm(problem.controls["source"])) == 0


def test_boundary_values_of_a_batch_that_need_no_gradient():
    heat = Heat()
    solver = heat.solver(CG, differentiation="unrolled", refinement=fixed(3))
    layer = SolverLayer(solver, [heat.controls["initial"], heat.controls["boundary"]])
    x, g = (
        torch.rand(2, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for size in sizes_of(layer)
    )
    x.requires_grad_()
    expected = [torch.autograd.grad(layer(x[k], g[k]).sum(), x)[0][k] for k in range(2)]
    (gradient,) = torch.autograd.grad(layer(x, g).sum(), x)
    torch.testing.assert_close(gradient, torch.stack(expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"ksp_type": "cg", "pc_type": "eisenstat"}, "eisenstat"),
        (
            {"ksp_type": "fgmres", "pc_type": "bjacobi", "sub_ksp_type": "gmres"},
            "a gmres inside the preconditioner",
        ),
        # restricted: PETSc's transpose is not
        (
            {"ksp_type": "gmres", "pc_type": "asm", "pc_asm_blocks": 4},
            "asm, as it is set, has none",
        ),
        ({"ksp_type": "gmres", "pc_type": "sor", "pc_sor_its": 2}, "sor, as it is set, has none"),
        ({"ksp_type": "chebyshev", "pc_type": "jacobi"}, "ksp_chebyshev_eigenvalues"),
        ({"ksp_type": "bcgs", "ksp_pc_side": "right"}, "ksp_pc_side"),
    ],
)
def test_what_cannot_be_unrolled_is_refused_at_the_first_solve(parameters, message):
    problem = Plain(wind=True)
    solver = problem.solver(parameters, ksp_prefix="")
    before = problem.u.dat.data_ro.copy()
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            solver.solve()
    np.testing.assert_array_equal(problem.u.dat.data_ro, before)


def test_cancelled_monitors_are_noticed():
    problem = NonlinearDiffusion()
    solver = problem.solver({**GMRES, **BASIC}, differentiation="unrolled", refinement=fixed(3, 1))
    solver.solve()
    (
        solver.snes.cancelMonitor()
        if hasattr(solver.snes, "cancelMonitor")
        else solver.snes.monitorCancel()
    )
    with pytest.raises(RuntimeError, match="monitor"):
        solver.solve()


def test_step_lengths_of_a_line_search_are_warned_of(caplog):
    V = FunctionSpace(UnitSquareMesh(2, 2), "CG", 1)
    # where full Newton steps for atan(u) = 0 lead away
    u, v = Function(V).assign(3.0), TestFunction(V)
    problem = NonlinearVariationalProblem((atan(u) * v + 1e-3 * inner(grad(u), grad(v))) * dx, u)
    solver = prdp_fem.NonlinearVariationalSolver(
        problem,
        solver_parameters={**GMRES, "snes_linesearch_type": "bt"},
        differentiation="unrolled",
        refinement=fixed(8, 2),
    )
    solver.solve()
    assert sum("counts as constant" in record.getMessage() for record in caplog.records) == 1


def test_guesses_from_earlier_solves_are_refused():
    with pytest.raises(ValueError, match="ksp_guess_type fischer"):
        prdp_fem.LinearVariationalSolver(
            HeatStep(2).problem, solver_parameters={**CG, "ksp_guess_type": "fischer"}
        )


# The bridge to torch


@pytest.mark.parametrize("ksp", ["cg+jacobi", "gmres+sor", "bcgs+pbjacobi", "chebyshev+jacobi"])
def test_batches_of_all_controls_at_once(ksp):
    heat = Heat()
    solver = heat.solver(
        KSPS[ksp], differentiation="unrolled", warm_start=True, refinement=fixed(3)
    )
    controls = [*heat.controls.values(), heat.u]
    layer = SolverLayer(solver, controls)
    generator = torch.Generator().manual_seed(1)
    batches = [(2,), (2,), (), (), (2,)]
    inputs = [
        (
            0.8 + 0.4 * torch.rand(*batch, size, dtype=torch.float64, generator=generator)
        ).requires_grad_()
        for batch, size in zip(batches, sizes_of(layer))
    ]
    assert torch.autograd.gradcheck(layer, inputs, eps=1e-6, atol=1e-7, rtol=1e-6)


def test_a_batch_is_what_its_samples_are():
    heat = Heat()
    solver = heat.solver(CG, differentiation="unrolled", refinement=fixed(3))
    layer = SolverLayer(solver, [heat.controls["initial"], heat.controls["diffusivity"]])
    generator = torch.Generator().manual_seed(2)
    x = [
        (1 + 0.1 * torch.rand(3, size, dtype=torch.float64, generator=generator)).requires_grad_()
        for size in sizes_of(layer)
    ]
    together = torch.autograd.grad((layer(*x) ** 2).sum(), x)
    for k in range(3):
        alone = [part[k].detach().requires_grad_() for part in x]
        for one, row in zip(torch.autograd.grad((layer(*alone) ** 2).sum(), alone), together):
            torch.testing.assert_close(one, row[k], rtol=0, atol=0)


def test_a_backward_pass_uses_the_iterations_of_its_forward_pass():
    problem = HeatStep(4)
    refinement = ScheduledRefinement([Iterations(2), Iterations(5)], {1: 1})
    layer = SolverLayer(
        prdp_fem.LinearVariationalSolver(
            problem.problem, solver_parameters=CG, differentiation="unrolled", refinement=refinement
        ),
        [problem.kappa],
    )
    x = torch.ones(problem.V.dim(), dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    value = layer(x).sum()
    refinement.step(1.0)
    layer(x)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected, rtol=0, atol=0)


def test_a_tolerance_unrolls_the_iterations_that_it_took():
    problem = HeatStep(5)
    gradients = []
    setting = Tolerance(1e-3)
    for _ in range(2):
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            solver_parameters=CG,
            differentiation="unrolled",
            refinement=FixedRefinement(setting),
        )
        x = torch.ones(problem.V.dim(), dtype=torch.float64, requires_grad=True)
        SolverLayer(solver, [problem.kappa])(x).sum().backward()
        gradients.append(x.grad)
        assert solver.statistics.adjoint_iterations == solver.statistics.forward_iterations > 2
        setting = Iterations(solver.statistics.forward_iterations)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-16)


# Settings of the differentiation


@pytest.mark.parametrize("checkpoints", [1, 3])
@pytest.mark.parametrize("ksp", ["cg+jacobi", "gmres+sor"])
def test_checkpoints_change_nothing(ksp, checkpoints):
    gradients = []
    for differentiation in ("unrolled", Unrolled(checkpoints=checkpoints)):
        heat = Heat()
        with set_working_tape(Tape()):
            heat.solver(KSPS[ksp], differentiation=differentiation, refinement=fixed(8)).solve()
            gradients.append(
                ReducedFunctional(heat.functional(), Control(heat.controls["diffusivity"]))
                .derivative()
                .dat.data_ro.copy()
            )
    np.testing.assert_allclose(*gradients, rtol=1e-9, atol=1e-13)


def test_one_newton_step_is_the_last():
    gradients = []
    for steps in ("all", "last"):
        problem = NonlinearDiffusion()
        with set_working_tape(Tape()):
            problem.solver(
                {**GMRES, **BASIC}, differentiation=Unrolled(steps=steps), refinement=fixed(4, 1)
            ).solve()
            gradients.append(
                ReducedFunctional(problem.functional(), Control(problem.controls["source"]))
                .derivative()
                .dat.data_ro.copy()
            )
    np.testing.assert_array_equal(*gradients)


@pytest.mark.parallel(1)
@pytest.mark.parametrize(
    "differentiation, message",
    [
        ("exact", "one of 'implicit', 'unrolled'"),
        (None, "one of 'implicit', 'unrolled'"),
        ({"checkpoints": 3}, "such as Unrolled"),
    ],
)
def test_unknown_differentiations_are_refused(differentiation, message):
    with pytest.raises(ValueError, match=message):
        prdp_fem.LinearVariationalSolver(HeatStep(2).problem, differentiation=differentiation)


@pytest.mark.parallel(1)
@pytest.mark.parametrize(
    "settings, message",
    [
        ({"checkpoints": 0}, "at least 1"),
        ({"checkpoints": True}, "at least 1"),
        ({"steps": "first"}, "'all' or 'last'"),
    ],
)
def test_meaningless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Unrolled(**settings)


@pytest.mark.parallel(1)
@pytest.mark.parametrize(
    "parameters",
    [{"ksp_type": "minres"}, {"ksp_type": "preonly", "pc_type": "lu"}, {"ksp_type": "tfqmr"}],
)
def test_methods_without_an_unrolled_derivative_are_refused_at_construction(parameters):
    with pytest.raises(
        ValueError, match=r"no unrolled derivative.*bcgs, cg, chebyshev, fgmres, gmres, richardson"
    ):
        prdp_fem.LinearVariationalSolver(
            HeatStep(2).problem, solver_parameters=parameters, differentiation="unrolled"
        )


@pytest.mark.parallel(1)
@pytest.mark.parametrize(
    "parameters, message",
    [
        (
            {"snes_type": "newtontr"},
            "snes_type newtontr has no unrolled derivative.*newtonls, ksponly",
        ),
        ({"snes_lag_jacobian": 2}, "snes_lag_jacobian"),
    ],
)
def test_newton_methods_without_an_unrolled_derivative_are_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        NonlinearDiffusion().solver({**GMRES, **parameters}, differentiation="unrolled")


def test_iterations_inside_a_preconditioner_are_refused():
    parameters = {
        "ksp_type": "fgmres",
        "pc_type": "ksp",
        "ksp_ksp_type": "cg",
        "ksp_pc_type": "jacobi",
    }
    with pytest.raises(ValueError, match="outermost KSP"):
        prdp_fem.LinearVariationalSolver(
            HeatStep(2).problem,
            solver_parameters=parameters,
            differentiation="unrolled",
            refinement=fixed(2),
            ksp_prefix="ksp_",
        )


def test_derivatives_by_the_operator_need_more_than_a_direct_preconditioner():
    parameters, problem = {"ksp_type": "richardson", "pc_type": "lu"}, HeatStep(2)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=parameters, differentiation="unrolled"
    )
    x = torch.ones(problem.V.dim(), dtype=torch.float64, requires_grad=True)
    SolverLayer(solver, [problem.u0])(x).sum().backward()
    with pytest.raises(ValueError, match="pc_type lu solves the system by itself"):
        SolverLayer(solver, [problem.kappa])(x).sum().backward()


def test_derivatives_by_the_operator_need_its_entries():
    problem = HeatStep(2)
    parameters = {"mat_type": "matfree", "ksp_type": "cg", "pc_type": "none"}
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=parameters, differentiation="unrolled"
    )
    SolverLayer(solver, [problem.u0])
    with pytest.raises(ValueError, match="mat_type aij"):
        SolverLayer(solver, [problem.kappa])


def test_second_derivatives_are_refused():
    heat = Heat()
    heat.solver(CG, differentiation="unrolled", refinement=fixed(2)).solve()
    control = heat.controls["initial"]
    reduced = ReducedFunctional(heat.functional(), Control(control))
    reduced.derivative()
    with pytest.raises(NotImplementedError, match="implicit"):
        reduced.hessian(direction_of(control))


def test_a_solver_under_control_can_be_unrolled():
    problem = HeatStep(3)
    solver = LinearVariationalSolver(problem.problem, solver_parameters=CG)
    prdp_fem.control(solver, fixed(2), differentiation="unrolled")
    solver.solve()
    reduced = ReducedFunctional(assemble(problem.u**4 * dx), Control(problem.kappa))
    assert remainder_rate(reduced, problem.kappa, smooth(problem.V, 3)) > 1.9
