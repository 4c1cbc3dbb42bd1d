"""The KSP that follows the refinement inside a preconditioner, and the problems whose solvers are
made so.
"""

import pytest
import torch
from firedrake import *
from firedrake.adjoint import *
from firedrake.exceptions import ConvergenceError
from jobs import run_ranks
from problems import CG, CONVERGED, HeatStep, equality, smooth

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps, Tolerance
from prdp_fem.torch import SolverLayer, to_torch

torch.set_num_threads(1)
pytestmark = pytest.mark.parallel([1, 2, 3])

LU = {"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}


def nested(outer, **options):
    """Options with one prefix in front of all."""
    return {f"{outer}_{name}": value for name, value in options.items()}


INNER_KSP = {
    "ksp_type": "preonly",
    "pc_type": "ksp",
    **nested("ksp", ksp_type="cg", pc_type="jacobi"),
}
SCHUR = {
    "ksp_type": "fgmres",
    "ksp_gmres_restart": 100,
    "ksp_rtol": 1e-11,
    "ksp_atol": 1e-50,
    "pc_type": "fieldsplit",
    "pc_fieldsplit_type": "schur",
    "pc_fieldsplit_schur_fact_type": "full",
    **nested("fieldsplit_0", **LU),
    **nested("fieldsplit_1", ksp_type="gmres", pc_type="none", ksp_rtol=1e-10),
}


class Stokes:
    """Taylor-Hood elements, in a cavity; the pressure is determined up to a constant."""

    def __init__(self, cells=4):
        mesh = UnitSquareMesh(cells, cells)
        V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
        W = self.W = V * Q
        (w, p), (v, q) = TrialFunctions(W), TestFunctions(W)
        self.u = Function(W, name="flow")
        self.f = smooth(V, 1, "force")
        self.nu = Constant(0.7, name="viscosity")
        a = (self.nu * inner(grad(w), grad(v)) - p * div(v) - q * div(w)) * dx
        bcs = [DirichletBC(W.sub(0), 0, (1, 2, 3)), DirichletBC(W.sub(0), Constant((1.0, 0.0)), 4)]
        self.problem = LinearVariationalProblem(a, inner(self.f, v) * dx, self.u, bcs=bcs)
        self.nullspace = MixedVectorSpaceBasis(
            W, [W.sub(0), VectorSpaceBasis(constant=True, comm=mesh.comm)]
        )
        self.nullspaces = {"nullspace": self.nullspace, "transpose_nullspace": self.nullspace}


# Where it is found


@pytest.mark.parametrize(
    "parameters, prefix",
    [
        (INNER_KSP, None),
        (INNER_KSP, "ksp_"),
        (
            {
                "ksp_type": "preonly",
                "pc_type": "python",
                "pc_python_type": "firedrake.AssembledPC",
                **nested("assembled", pc_type="ksp", **nested("ksp", **CG)),
            },
            None,
        ),
        (
            {
                "mat_type": "matfree",
                "ksp_type": "preonly",
                "pc_type": "python",
                "pc_python_type": "firedrake.AssembledPC",
                **nested("assembled", pc_type="ksp", **nested("ksp", **CG)),
            },
            "assembled_ksp_",
        ),
        (
            {
                "ksp_type": "preonly",
                "pc_type": "composite",
                "pc_composite_pcs": "ksp",
                **nested("sub_0", pc_type="ksp", **nested("ksp", **CG)),
            },
            None,
        ),
    ],
)
def test_a_nested_ksp_follows_the_setting(parameters, prefix):
    problem, errors = HeatStep(10), []
    with stop_annotating():
        problem.dt.assign(10.0)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=parameters, ksp_prefix=prefix
    )
    direct = prdp_fem.LinearVariationalSolver(problem.problem, solver_parameters=LU)
    with stop_annotating():
        expected = direct.solve().copy(deepcopy=True)
    for count in (1, 4, 16):
        solver.refinement = FixedRefinement(Iterations(count))
        solver.statistics.reset()
        solver.solve()
        assert solver.statistics.forward_iterations == count
        errors.append(errornorm(expected, problem.u))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_nested_ksp_computes_what_it_would_as_the_outermost():
    problem = HeatStep()
    results = []
    for parameters in (INNER_KSP, CG):
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem, solver_parameters=parameters, refinement=FixedRefinement(Iterations(4))
        )
        layer = SolverLayer(solver, [problem.kappa, problem.u0])
        tensors = [to_torch(control, copy=True).requires_grad_() for control in layer.controls]
        out = layer(*tensors)
        (out**2).sum().backward()
        results.append([out.detach(), *(tensor.grad for tensor in tensors)])
        assert (solver.statistics.forward_iterations, solver.statistics.adjoint_iterations) == (
            4,
            4,
        )
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_a_schur_complement_is_refined_inside_an_outer_iteration():
    stokes, errors = Stokes(), []
    with stop_annotating():
        direct = prdp_fem.LinearVariationalSolver(
            stokes.problem,
            solver_parameters={**SCHUR, **nested("fieldsplit_1", ksp_rtol=1e-13)},
            **stokes.nullspaces,
        )
        expected = direct.solve().copy(deepcopy=True)
        parameters = {**SCHUR, "ksp_max_it": 1, "ksp_convergence_test": "skip"}
        for count in (1, 4, 16):
            solver = prdp_fem.LinearVariationalSolver(
                stokes.problem,
                solver_parameters=parameters,
                ksp_prefix="fieldsplit_1_",
                refinement=FixedRefinement(Iterations(count)),
                **stokes.nullspaces,
            )
            solver.solve()
            assert solver.statistics.forward_iterations == count
            errors.append(errornorm(expected.sub(0), stokes.u.sub(0)))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_a_smoother_can_be_named():
    problem = HeatStep(8)
    multigrid = {
        "ksp_type": "cg",
        "pc_type": "gamg",
        **nested("mg_levels", ksp_type="richardson", pc_type="jacobi"),
    }
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=multigrid, refinement=FixedRefinement(Iterations(3))
    )
    solver.solve()
    # smoothers are part of a cycle: the outermost is the only candidate
    assert solver.snes.ksp.getIterationNumber() == 3
    geometric = MeshHierarchy(UnitSquareMesh(4, 4), 1)
    problem = HeatStep(mesh=geometric[-1])
    smoothed = {
        "ksp_type": "cg",
        "ksp_rtol": 1e-8,
        "pc_type": "mg",
        **nested("mg_levels", ksp_type="richardson", pc_type="jacobi"),
        **nested("mg_coarse", **LU),
    }
    counts = {}
    for count in (1, 8):
        solver = prdp_fem.LinearVariationalSolver(
            problem.problem,
            solver_parameters=smoothed,
            ksp_prefix="mg_levels_1_",
            refinement=FixedRefinement(Iterations(count, rtol_floor=0)),
        )
        solver.solve()
        counts[count] = solver.snes.ksp.getIterationNumber()
        assert solver.statistics.forward_iterations >= count * counts[count]
    assert counts[8] < counts[1]


def test_newton_steps_with_a_nested_ksp():
    problem = HeatStep()
    u = Function(problem.V)
    v = TestFunction(problem.V)
    f = smooth(problem.V, 1)
    nonlinear = NonlinearVariationalProblem(
        ((1 + u**2) * inner(grad(u), grad(v)) + u * v - f * v) * dx, u
    )
    solver = prdp_fem.NonlinearVariationalSolver(
        nonlinear,
        solver_parameters={**INNER_KSP, "ksp_ksp_type": "gmres"},
        refinement=FixedRefinement(NewtonSteps(2, Iterations(3))),
    )
    layer = SolverLayer(solver, [f])
    x = to_torch(f, copy=True).requires_grad_()
    layer(x).sum().backward()
    assert (
        solver.statistics.newton_steps,
        solver.statistics.forward_iterations,
        solver.statistics.adjoint_iterations,
    ) == (2, 6, 3)


def test_newton_steps_with_a_fieldsplit():
    V = VectorFunctionSpace(UnitSquareMesh(4, 4), "CG", 1)
    W = V * V
    u, v = Function(W), TestFunction(W)
    F = (
        inner(grad(u), grad(v))
        + inner(u, v) * (1 + inner(u, u))
        - inner(as_vector([1, 1, 1, 1]), v)
    ) * dx
    solver = prdp_fem.NonlinearVariationalSolver(
        NonlinearVariationalProblem(F, u),
        refinement=FixedRefinement(NewtonSteps(2, Iterations(3, rtol_floor=0))),
        ksp_prefix="fieldsplit_1_",
        solver_parameters={
            "ksp_type": "fgmres",
            "pc_type": "fieldsplit",
            "fieldsplit_ksp_type": "cg",
            "fieldsplit_pc_type": "jacobi",
        },
    )
    for _ in range(2):
        solver.statistics.reset()
        u.assign(0)
        solver.solve()
        assert solver.statistics.newton_steps == 2 and solver.statistics.forward_iterations >= 6


def test_offloaded_preconditioners_are_looked_into():
    problem = HeatStep()
    parameters = {
        "ksp_type": "preonly",
        "pc_type": "python",
        "pc_python_type": "firedrake.OffloadPC",
        **nested("offload", pc_type="ksp", **nested("ksp", **CG)),
    }
    # Without a device Firedrake warns, and offloads to the host.
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, solver_parameters=parameters, refinement=FixedRefinement(Iterations(3))
    )
    solver.solve()
    assert solver.statistics.forward_iterations == 3


def test_what_objects_of_python_have_inside_is_there_to_be_named():
    """It is set up at its first use only."""
    stokes = Stokes()
    split = {name: value for name, value in SCHUR.items() if name.startswith(("pc", "fieldsplit"))}
    solver = prdp_fem.LinearVariationalSolver(
        stokes.problem,
        **stokes.nullspaces,
        refinement=FixedRefinement(Iterations(3)),
        ksp_prefix="assembled_fieldsplit_1_",
        solver_parameters={
            "mat_type": "matfree",
            "ksp_type": "preonly",
            "pc_type": "python",
            "pc_python_type": "firedrake.AssembledPC",
            "assembled_mat_type": "nest",
            **nested("assembled", **split),
        },
    )
    solver.solve()
    assert solver.statistics.forward_iterations == 3


# Derivatives through them


@pytest.mark.parametrize("name", ["f", "nu"])
def test_stokes_with_a_schur_fieldsplit_and_a_nullspace_passes_a_taylor_test(name):
    stokes = Stokes()
    prdp_fem.LinearVariationalSolver(
        stokes.problem, solver_parameters=SCHUR, **stokes.nullspaces
    ).solve()
    velocity, _ = split(stokes.u)
    control = getattr(stokes, name)
    reduced = ReducedFunctional(assemble(inner(velocity, velocity) ** 2 * dx), Control(control))
    direction = Constant(0.3) if name == "nu" else smooth(control.function_space(), 4)
    with stop_annotating():
        results = taylor_to_dict(reduced, control._ad_copy(), direction)
    assert min(results["R1"]["Rate"]) > 1.95 and min(results["R2"]["Rate"]) > 2.9


def test_gradients_do_not_depend_on_history():
    stokes = Stokes()
    solver = prdp_fem.LinearVariationalSolver(
        stokes.problem,
        solver_parameters={**SCHUR, "ksp_max_it": 2, "ksp_convergence_test": "skip"},
        ksp_prefix="fieldsplit_1_",
        refinement=FixedRefinement(Iterations(3)),
        **stokes.nullspaces,
    )
    layer = SolverLayer(solver, [stokes.f, stokes.nu])

    def evaluate():
        tensors = [to_torch(control, copy=True).requires_grad_() for control in layer.controls]
        out = layer(*tensors)
        (out**2).sum().backward()
        return [out.detach(), *(tensor.grad for tensor in tensors)]

    first = evaluate()
    with torch.no_grad():
        layer(
            torch.rand(stokes.f.dat.data_ro.size, dtype=torch.float64),
            torch.tensor([2.0], dtype=torch.float64),
        )
    for one, again in zip(first, evaluate()):
        assert equality(LU)(one, again)


# Errors


def test_several_candidates_are_listed():
    stokes = Stokes()
    with pytest.raises(
        ValueError,
        match=(
            "more than one KSP iterates.*'' \\(ksp_type fgmres\\), 'fieldsplit_1_' \\(ksp_type"
            " gmres\\)"
        ),
    ):
        prdp_fem.LinearVariationalSolver(
            stokes.problem,
            solver_parameters=SCHUR,
            refinement=FixedRefinement(Iterations(3)),
            **stokes.nullspaces,
        )
    with pytest.raises(
        ValueError,
        match=(
            "no iterative KSP with the options prefix 'fieldsplit_7_'; there are ''"
            " .*'fieldsplit_1_'"
        ),
    ):
        prdp_fem.LinearVariationalSolver(
            stokes.problem,
            solver_parameters=SCHUR,
            refinement=FixedRefinement(Iterations(3)),
            ksp_prefix="fieldsplit_7_",
            **stokes.nullspaces,
        )
    with pytest.raises(ValueError, match="the solver only applies its preconditioner"):
        prdp_fem.LinearVariationalSolver(
            stokes.problem,
            solver_parameters={"ksp_type": "preonly", "pc_type": "fieldsplit"},
            refinement=FixedRefinement(Iterations(3)),
        )
    with pytest.raises(
        ValueError, match="only applies its preconditioner.*smoothers can be refined.*mg_levels_1_"
    ):
        prdp_fem.LinearVariationalSolver(
            HeatStep(10).problem,
            solver_parameters={
                "ksp_type": "preonly",
                "pc_type": "gamg",
                "pc_gamg_coarse_eq_limit": 10,
            },
            refinement=FixedRefinement(Iterations(3)),
        )


def test_a_nested_tolerance_that_is_not_reached_is_an_error():
    problem = HeatStep()
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem,
        solver_parameters=INNER_KSP,
        refinement=FixedRefinement(Tolerance(1e-12, max_it=2)),
    )
    with pytest.raises(ConvergenceError, match="DIVERGED_MAX_IT after 2 iterations"):
        solver.solve()


@pytest.mark.parallel([2, 3])
def test_a_block_that_fails_on_one_rank_is_an_error_on_all():
    problem = HeatStep()
    problem.kappa.dat.data_wo[:] = 1e-8 if COMM_WORLD.rank == 0 else 10.0

    def solver(max_it):
        return prdp_fem.LinearVariationalSolver(
            problem.problem,
            refinement=FixedRefinement(Tolerance(1e-10, max_it=max_it)),
            ksp_prefix="sub_",
            solver_parameters={
                "ksp_type": "preonly",
                "pc_type": "bjacobi",
                "sub_ksp_type": "cg",
                "sub_pc_type": "jacobi",
            },
        )

    enough = solver(1000)
    enough.solve()
    needed = COMM_WORLD.allgather(enough.statistics.forward_iterations)
    assert min(needed) < max(needed)
    failing = (
        "DIVERGED_MAX_IT" if needed[COMM_WORLD.rank] == max(needed) else "failed on another rank"
    )
    with pytest.raises(ConvergenceError, match=failing):
        solver(max(needed) - 1).solve()


# Spaces and cells

MESHES = {
    "quadrilateral": lambda: UnitSquareMesh(4, 4, quadrilateral=True),
    "extruded": lambda: ExtrudedMesh(UnitSquareMesh(3, 3), 3),
    "DG on quadrilaterals": lambda: UnitSquareMesh(4, 4, quadrilateral=True),
    "hexahedra": lambda: UnitCubeMesh(2, 2, 2, hexahedral=True),
    "interval": lambda: UnitIntervalMesh(20),
    "vector DG": lambda: UnitSquareMesh(4, 4),
}


@pytest.mark.parametrize("kind", MESHES)
def test_taylor_remainders_on_other_cells_and_spaces(kind):
    mesh = MESHES[kind]()
    x = SpatialCoordinate(mesh)
    field = sin(pi * x[0]) + (x[1] ** 2 if mesh.geometric_dimension > 1 else 1)
    discontinuous = "DG" in kind
    V = (
        VectorFunctionSpace(mesh, "DG", 1)
        if kind == "vector DG"
        else FunctionSpace(mesh, "DQ", 1)
        if discontinuous
        else FunctionSpace(mesh, "CG", 1)
    )
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V)
    kappa = Function(FunctionSpace(mesh, "DG", 0), name="kappa").interpolate(1 + 0.3 * field**2)
    f = Function(V, name="f").interpolate(as_vector([field, 2 * field]) if V.value_shape else field)
    a = inner(w, v) * dx + kappa * inner(grad(w), grad(v)) * dx
    if discontinuous:
        a += 10 * inner(jump(w), jump(v)) * avg(kappa) * dS
    bcs = (
        []
        if discontinuous
        else [DirichletBC(V, 0.5, 1)] + ([DirichletBC(V, 0, "top")] if kind == "extruded" else [])
    )
    prdp_fem.LinearVariationalSolver(
        LinearVariationalProblem(a, inner(f, v) * dx, u, bcs=bcs),
        solver_parameters={**CG, **CONVERGED},
    ).solve()
    J = assemble(inner(u, u) ** 2 * dx)
    for control in (kappa, f):
        direction = Function(control.function_space()).assign(0.3 * control)
        with stop_annotating():
            assert (
                taylor_test(
                    ReducedFunctional(J, Control(control)), control.copy(deepcopy=True), direction
                )
                > 1.95
            )


HYBRID = """
from firedrake import *
import prdp_fem
from prdp_fem import FixedRefinement, Iterations

mesh = UnitSquareMesh(4, 4)
V = FunctionSpace(mesh, "DG", 0)
W = FunctionSpace(mesh, "RT", 1)*V
(s, u), (t, v) = TrialFunctions(W), TestFunctions(W)
resistance, flow = Function(V), Function(W)
a = (resistance*inner(s, t) - u*div(t) + div(s)*v)*dx
problem = LinearVariationalProblem(a, v*dx, flow)
parameters = {"mat_type": "matfree", "ksp_type": "preonly", "pc_type": "python",
              "pc_python_type": "firedrake.HybridizationPC",
              "hybridization": {"ksp_type": "cg", "pc_type": "jacobi"}}
solver = prdp_fem.LinearVariationalSolver(problem, solver_parameters=parameters,
                                          refinement=FixedRefinement(Iterations(3)))
resistance.assign(2)
solver.solve()
print("iterations:", solver.statistics.forward_iterations)
"""


@pytest.mark.parallel([1])
def test_coefficients_without_values_yet_do_not_end_the_process():
    """Slate's code does where the matrix of a cell is singular: nothing is set up for a look."""
    job = run_ranks(1, HYBRID)
    assert "iterations: 3" in job.output and job.status == 0
