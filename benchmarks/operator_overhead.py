"""What stands between a user and PETSc: the cost of differentiating through a solve, against the
bare work.

Four cases, each of them a solve and its adjoint:

* heat: an implicit heat step, ten CG iterations, as a layer of a torch network; the control is the
  old temperature, so the operator is constant. In two and three dimensions, one sample at a time
  and in batches of 25;
* diffusivity: the same step, but the control is the diffusivity: the operator is assembled again
  for each sample;
* burgers: a nonlinear step, by Newton and GMRES; the control is the old velocity;
* loop: a hundred heat steps on pyadjoint's tape; the control is the initial temperature.

Each is done by three contestants, one sample at a time or a batch of them:

* stock: Firedrake's own solver, and its own bridge to torch;
* ours: prdp_fem's solver and bridge in their place;
* bare: what somebody would write by hand who needs this one problem and no other: a loop over calls
  of PETSc, and kept assemblers where something has to be assembled. Whatever is slower than this is
  overhead.

Before anything is timed, the three are held against each other: they must have the same solutions
and gradients. They take turns within each repetition, so that whatever else the machine does hits
all of them alike; ratios are those of medians. Each has a mesh of its own: a replay on the tape
writes to the coordinates, after which others may have to assemble again.

    python operator_overhead.py          about ten minutes
    python operator_overhead.py --quick  smallest sizes, under a minute
    python operator_overhead.py --cases heat burgers --cells 16 32

It runs on one core and one MPI process. Options for PETSc, such as -log_view, go into the
environment variable PETSC_OPTIONS.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything is imported that starts threads

import argparse
import gc
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import firedrake
import numpy as np
import torch
from firedrake import (
    Cofunction,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    NonlinearVariationalProblem,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
    UnitSquareMesh,
    VectorFunctionSpace,
    action,
    adjoint,
    as_vector,
    assemble,
    derivative,
    dot,
    dx,
    grad,
    inner,
    nabla_grad,
    pi,
    sin,
)
from firedrake.adjoint import (
    Control,
    ReducedFunctional,
    Tape,
    continue_annotation,
    pause_annotation,
    set_working_tape,
)
from firedrake.assemble import get_assembler
from firedrake.ml.pytorch import fem_operator
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from tqdm import tqdm

import prdp_fem
from prdp_fem import FixedRefinement, Iterations, NewtonSteps
from prdp_fem.studies.runs import machine
from prdp_fem.torch import SolverLayer

torch.set_num_threads(1)
# PETSc reads the command line too, and need not complain of what it does not know
PETSc.Options().setValue("options_left", False)

# The solvers
# -----------
# All contestants do the same iterations. Firedrake takes a used-up number of iterations for a
# failure, unless no test of convergence is made at all; the others have a floor that ten iterations
# do not reach.

ITERATIONS, FLOOR = 10, 1e-12
CG = {"ksp_type": "cg", "pc_type": "jacobi"}
NEWTON = {
    "snes_type": "newtonls",
    "snes_rtol": 1e-8,
    "ksp_type": "gmres",
    "ksp_rtol": 1e-8,
    "pc_type": "bjacobi",
}
# One step of as many iterations as the linear solves have, as at a coarse level of a refinement.
# Jacobi is its own transpose, so that truncated adjoint solves are the same whether the operator is
# transposed or the solve is.
ONE_STEP = {"snes_type": "newtonls", "ksp_type": "gmres", "pc_type": "jacobi"}
BY_OPTIONS = {
    "snes_max_it": 1,
    "snes_convergence_test": "skip",
    "ksp_max_it": ITERATIONS,
    "ksp_convergence_test": "skip",
}


def stock_cg(problem: LinearVariationalProblem) -> firedrake.LinearVariationalSolver:
    parameters = {**CG, "ksp_max_it": ITERATIONS, "ksp_convergence_test": "skip"}
    return firedrake.LinearVariationalSolver(problem, solver_parameters=parameters)


def our_cg(problem: LinearVariationalProblem) -> prdp_fem.LinearVariationalSolver:
    return prdp_fem.LinearVariationalSolver(
        problem, refinement=FixedRefinement(Iterations(ITERATIONS, FLOOR)), solver_parameters=CG
    )


def krylov(A: PETSc.Mat, parameters: dict, **tolerances) -> PETSc.KSP:
    """A bare KSP."""
    ksp = PETSc.KSP().create(A.comm)
    ksp.setOperators(A)
    ksp.setType(parameters["ksp_type"])
    ksp.pc.setType(parameters["pc_type"])
    ksp.setTolerances(**tolerances)
    ksp.setUp()
    return ksp


# The contestants
# ---------------
# A contestant is a function of a slice of the samples: it takes them forward and backward, and
# returns the solution and the gradient of the last one. The functional is J = |u|²/2, whose
# derivative by the solution is the solution.

Contestant = Callable[[slice], tuple]


@dataclass
class Contest:
    """One problem of one size, and those who solve it: stock, ours, bare, and where a gradient is
    assembled, bare with gradient.

    There are twice as many samples as the largest batch has. Calls take turns between one half and
    the other: for the sample of the call before, nothing would have to be assembled again.
    """

    case: str
    dofs: int
    batches: tuple[int, ...]
    contestants: dict[str, Contestant]

    def slices(self, count: int) -> Iterator[slice]:
        """The samples of call after call, so many a call."""
        return cycle([slice(start, start + count) for start in (0, max(self.batches))])


def smooth(V) -> Function:
    """A field that is zero at the boundary of the square."""
    x, y = SpatialCoordinate(V.mesh())
    return Function(V, name="smooth").interpolate(sin(pi * x) * sin(2 * pi * y))


def through_torch(operator: Callable, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and backward through an operator: solutions and gradients."""
    x = samples.detach().requires_grad_()
    u = operator(x)
    u.backward(u.detach())
    return u.detach(), x.grad


@contextmanager
def new_tape() -> Iterator[None]:
    """Annotate what is done inside, on a tape that starts empty."""
    set_working_tape(Tape())
    continue_annotation()
    try:
        yield
    finally:
        pause_annotation()


def stock_bridge(solver, control: Function, samples: torch.Tensor) -> Contestant:
    """Firedrake's bridge replays a tape, which remembers one evaluation only: samples go through it
    one by one.
    """
    with new_tape():
        solver.solve()
        operator = fem_operator(
            ReducedFunctional(solver.get_solution().copy(deepcopy=True), Control(control))
        )

    def run(rows):
        for sample in samples[rows].split(1):
            u, gradient = through_torch(operator, sample)
        return u[-1], gradient[-1]

    return run


def our_bridge(solver, control: Function, samples: torch.Tensor) -> Contestant:
    layer = SolverLayer(solver, controls=[control])

    def run(rows):
        u, gradient = through_torch(layer, samples[rows])
        return u[-1], gradient[-1]

    return run


def agree(what: str, first, second, tolerance: float) -> None:
    """Raise unless two arrays are equal up to a relative tolerance."""
    first, second = np.asarray(first), np.asarray(second)
    difference = np.linalg.norm(first - second) / np.linalg.norm(second)
    if not difference <= tolerance:
        raise RuntimeError(
            f"{what} differ by {difference:.1e}, relative, where {tolerance:.0e} is allowed: what"
            " is not the same cannot be compared by its time"
        )


def compare_results(contest: Contest, *, bare: float, stock: float) -> Contest:
    """Hold solutions and gradients against each other up to tolerances, and return the contest.

    It must be the first thing that is done with stock's bridge: later adjoint solves start from the
    solution of the one before, so that after a fixed number of iterations their gradients are
    others.
    """
    by_hand = contest.contestants.get("bare with gradient", contest.contestants["bare"])
    first, all_of_them = slice(0, 1), slice(0, 2 * max(contest.batches))
    for name, contestant, rows, tolerance in [
        ("stock", contest.contestants["stock"], first, stock),
        ("bare", by_hand, all_of_them, bare),
    ]:
        for what, ours, theirs in zip(
            ("solutions", "gradients"), contest.contestants["ours"](rows), contestant(rows)
        ):
            agree(
                f"{contest.case}, {contest.dofs} dofs: {what} of ours and {name}",
                ours,
                theirs,
                tolerance,
            )
    return contest


# Heat
# ----
# The bare step is two products and two solves: b = B u0, A u = b, A λ = u (A is symmetric), and the
# gradient Bᵀ λ. Rows of B at the boundary are zero, as the values of u are there.

DIFFUSION = 1e-3


class HeatStep:
    def __init__(self, mesh):
        V = self.V = FunctionSpace(mesh, "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        self.u0, self.u = Function(V, name="u0"), Function(V, name="u")
        self.bcs = DirichletBC(V, 0, "on_boundary")
        self.mass = w * v * dx
        self.a = (w * v + DIFFUSION * inner(grad(w), grad(v))) * dx
        # Firedrake is told that the operator is constant; prdp_fem sees it.
        self.problem = LinearVariationalProblem(
            self.a, self.u0 * v * dx, self.u, bcs=self.bcs, constant_jacobian=True
        )

    def matrices(self) -> tuple[PETSc.Mat, PETSc.Mat, PETSc.Mat]:
        """A, B and the transpose of B."""
        A, B = assemble(self.a, bcs=self.bcs).petscmat, assemble(self.mass).petscmat
        B.zeroRows(self.bcs.nodes, diag=0)
        return A, B, B.transpose(PETSc.Mat())


def heat(case: str, make_mesh: Callable) -> Contest:
    stock, ours, bare = (HeatStep(make_mesh()) for _ in range(3))
    samples = torch.randn(50, bare.V.dim(), dtype=torch.float64)

    A, B, BT = bare.matrices()
    ksp = krylov(A, CG, rtol=FLOOR, max_it=ITERATIONS)
    u, b = A.createVecs()
    multiplier = u.duplicate()
    gradient = u.duplicate()
    vectors = []
    for sample in samples.numpy():
        vectors.append(u.duplicate())
        vectors[-1].setArray(sample)

    def by_hand(rows):
        for vector in vectors[rows]:
            B.mult(vector, b)
            ksp.solve(b, u)
            ksp.solve(u, multiplier)
            BT.mult(multiplier, gradient)
        return u.array_r, gradient.array_r

    return compare_results(
        Contest(
            case,
            bare.V.dim(),
            (1, 25),
            {
                "stock": stock_bridge(stock_cg(stock.problem), stock.u0, samples),
                "ours": our_bridge(our_cg(ours.problem), ours.u0, samples),
                "bare": by_hand,
            },
        ),
        bare=1e-12,
        stock=1e-8,
    )


def heat_2d(cells: int) -> Contest:
    return heat("heat, 2-D", lambda: UnitSquareMesh(cells, cells))


def heat_3d(cells: int) -> Contest:
    return heat("heat, 3-D", lambda: UnitCubeMesh(cells, cells, cells))


# Diffusivity
# -----------
# By hand, the operator is assembled, the preconditioner set up, and there are two solves; with the
# gradient, the linear form that it is is assembled as well.


class DiffusivityStep:
    def __init__(self, cells: int):
        V = self.V = FunctionSpace(UnitSquareMesh(cells, cells), "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        self.kappa = Function(V, name="kappa").assign(1)
        self.u = Function(V, name="u")
        self.bcs = DirichletBC(V, 0, "on_boundary")
        self.a = (w * v + DIFFUSION * self.kappa * inner(grad(w), grad(v))) * dx
        self.L = smooth(V) * v * dx
        self.problem = LinearVariationalProblem(self.a, self.L, self.u, bcs=self.bcs)


def diffusivity(cells: int) -> Contest:
    stock, ours, bare = (DiffusivityStep(cells) for _ in range(3))
    samples = 0.5 + torch.rand(2, bare.V.dim(), dtype=torch.float64)

    kappa = bare.kappa
    u = bare.u
    multiplier = Function(bare.V)
    gradient = Cofunction(bare.V.dual())
    assembler = get_assembler(bare.a, bcs=bare.bcs)
    gradient_assembler = get_assembler(derivative(-action(action(bare.a, u), multiplier), kappa))
    operator = assembler.assemble()
    ksp = krylov(operator.petscmat, CG, rtol=FLOOR, max_it=ITERATIONS)
    with assemble(bare.L, bcs=bare.bcs).dat.vec_ro as vector:
        b = vector.copy()

    def by_hand(rows):
        for sample in samples[rows].numpy():
            with kappa.dat.vec_wo as vector:
                vector.setArray(sample)
            assembler.assemble(tensor=operator)
            ksp.setOperators(operator.petscmat)
            ksp.setUp()
            with u.dat.vec_wo as solution, multiplier.dat.vec_wo as adjoint_solution:
                ksp.solve(b, solution)
                ksp.solve(solution, adjoint_solution)

    def by_hand_with_gradient(rows):
        by_hand(rows)
        gradient_assembler.assemble(tensor=gradient)
        return u.dat.data_ro, gradient.dat.data_ro

    return compare_results(
        Contest(
            "diffusivity",
            bare.V.dim(),
            (1,),
            {
                "stock": stock_bridge(stock_cg(stock.problem), stock.kappa, samples),
                "ours": our_bridge(our_cg(ours.problem), ours.kappa, samples),
                "bare": by_hand,
                "bare with gradient": by_hand_with_gradient,
            },
        ),
        bare=1e-12,
        stock=1e-8,
    )


# Burgers
# -------
# Converged, and with one Newton step of ten iterations.
#
# By hand, there are Firedrake's own Newton iteration, off the tape, and one solve with the
# transposed Jacobian, which is assembled for it; with the gradient, its linear form as well.
# Newton's iteration starts from zero.

VISCOSITY, TIME_STEP = 1e-2, 0.05


class BurgersStep:
    def __init__(self, cells: int):
        V = self.V = VectorFunctionSpace(UnitSquareMesh(cells, cells), "CG", 1)
        v = TestFunction(V)
        u0, u = self.u0, self.u = Function(V, name="u0"), Function(V, name="u")
        self.bcs = DirichletBC(V, 0, "on_boundary")
        self.F = (
            inner(u - u0, v)
            + TIME_STEP * (inner(dot(u, nabla_grad(u)), v) + VISCOSITY * inner(grad(u), grad(v)))
        ) * dx
        self.problem = NonlinearVariationalProblem(self.F, u, bcs=self.bcs)


def burgers(cells: int) -> Contest:
    return nonlinear("Burgers", cells, NEWTON, NEWTON, None, rtol=NEWTON["ksp_rtol"])


def burgers_one_step(cells: int) -> Contest:
    return nonlinear(
        "Burgers, one step",
        cells,
        ONE_STEP,
        {**ONE_STEP, **BY_OPTIONS},
        FixedRefinement(NewtonSteps(1, Iterations(ITERATIONS, FLOOR))),
        rtol=FLOOR,
        max_it=ITERATIONS,
    )


def nonlinear(
    case: str, cells: int, parameters: dict, stock_parameters: dict, refinement, **tolerances
) -> Contest:
    stock, ours, bare = (BurgersStep(cells) for _ in range(3))
    x, y = SpatialCoordinate(bare.V.mesh())
    flow = Function(bare.V).interpolate(
        as_vector([sin(pi * x) * sin(2 * pi * y), sin(2 * pi * x) * sin(pi * y)])
    )
    samples = torch.from_numpy(np.stack([flow.dat.data_ro.ravel(), -flow.dat.data_ro.ravel()]))

    u0 = bare.u0
    u = bare.u
    multiplier = Function(bare.V)
    gradient = Cofunction(bare.V.dual())
    newton = firedrake.NonlinearVariationalSolver(bare.problem, solver_parameters=stock_parameters)
    assembler = get_assembler(adjoint(derivative(bare.F, u)), bcs=bare.bcs)
    gradient_assembler = get_assembler(derivative(-action(bare.F, multiplier), u0))
    operator = assembler.assemble()
    ksp = krylov(operator.petscmat, parameters, **tolerances)

    def by_hand(rows):
        for sample in samples[rows].numpy():
            with u0.dat.vec_wo as control, u.dat.vec_wo as guess:
                control.setArray(sample)
                guess.set(0)
            newton.solve()
            assembler.assemble(tensor=operator)
            ksp.setOperators(operator.petscmat)
            ksp.setUp()
            with u.dat.vec_ro as cotangent, multiplier.dat.vec_wo as adjoint_solution:
                ksp.solve(cotangent, adjoint_solution)

    def by_hand_with_gradient(rows):
        by_hand(rows)
        gradient_assembler.assemble(tensor=gradient)
        return u.dat.data_ro.ravel(), gradient.dat.data_ro.ravel()

    stock_solver = firedrake.NonlinearVariationalSolver(
        stock.problem, solver_parameters=stock_parameters
    )
    our_solver = prdp_fem.NonlinearVariationalSolver(
        ours.problem, solver_parameters=parameters, refinement=refinement
    )
    return compare_results(
        Contest(
            case,
            bare.V.dim(),
            (1,),
            {
                "stock": stock_bridge(stock_solver, stock.u0, samples),
                "ours": our_bridge(our_solver, ours.u0, samples),
                "bare": by_hand,
                "bare with gradient": by_hand_with_gradient,
            },
        ),
        bare=1e-6,
        stock=1e-6,
    )


# A time loop
# -----------
# J = ∫u² dx after so many steps. By hand, there are a product and a solve for each step, forward
# and backward. From the first step on u is zero at the boundary, which therefore has no part in the
# mass matrix but in the derivative by the initial value.

STEPS = 100


def on_tape(step: HeatStep, solver) -> Contestant:
    initial = smooth(step.V)
    with new_tape():
        step.u0.assign(initial)
        for _ in range(STEPS):
            solver.solve()
            step.u0.assign(step.u)
        functional = ReducedFunctional(assemble(step.u * step.u * dx), Control(initial))

    def run(_):
        J = functional(initial)
        return J, functional.derivative().dat.data_ro

    return run


def loop(cells: int) -> Contest:
    stock, ours, bare = (HeatStep(UnitSquareMesh(cells, cells)) for _ in range(3))

    A, _, BT = bare.matrices()
    mass = assemble(bare.mass, bcs=bare.bcs, weight=0).petscmat
    ksp = krylov(A, CG, rtol=FLOOR, max_it=ITERATIONS)
    u, b = A.createVecs()
    multiplier = u.duplicate()
    with smooth(bare.V).dat.vec_ro as vector:
        initial = vector.copy()

    def by_hand(_):
        initial.copy(u)
        for _ in range(STEPS):
            mass.mult(u, b)
            ksp.solve(b, u)
        mass.mult(u, b)
        J = u.dot(b)
        b.scale(2)
        for remaining in reversed(range(STEPS)):
            ksp.solve(b, multiplier)
            (mass if remaining else BT).mult(multiplier, b)
        return J, b.array_r

    # Stock's steps start from the temperature before them and its adjoint steps from the adjoint
    # after them, ours and those by hand from zero: after ten iterations they are as near to each
    # other as they are to convergence.
    return compare_results(
        Contest(
            f"{STEPS} heat steps",
            bare.V.dim(),
            (1,),
            {
                "stock": on_tape(stock, stock_cg(stock.problem)),
                "ours": on_tape(ours, our_cg(ours.problem)),
                "bare": by_hand,
            },
        ),
        bare=1e-10,
        stock=1e-2,
    )


# Measuring
# ---------

SHORTEST, LONGEST = 0.05, 1.0  # seconds that one measurement takes


def elapsed(function: Callable, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(contest: Contest, batch: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds per sample of each contestant, in each repetition.

    What is too short for the clock is done several times over. Stock does one sample after the
    other whatever the batch, so where a batch takes it long, a part of the batch tells as much.
    """
    samples = {}
    calls = {}
    slices = {}
    for name, contestant in contest.contestants.items():
        affordable = max(1, int(LONGEST / elapsed(contestant, slice(0, 1))))
        samples[name] = min(batch, affordable) if name == "stock" else batch
        slices[name] = contest.slices(samples[name])
        contestant(next(slices[name]))
        calls[name] = math.ceil(SHORTEST / elapsed(contestant, next(slices[name])))

    def several_times(name):
        for _ in range(calls[name]):
            contest.contestants[name](next(slices[name]))

    seconds = {name: [] for name in contest.contestants}
    for _ in range(repetitions):
        for name, measured in seconds.items():
            # As timeit does: else one contestant pays for the garbage of another.
            gc.collect()
            gc.disable()
            measured.append(elapsed(several_times, name) / (calls[name] * samples[name]))
            gc.enable()
    return seconds


def row(contest: Contest, batch: int, seconds: dict[str, list[float]]) -> dict:
    """One row of the table: medians in milliseconds per sample, and their ratios."""
    median = {name: 1e3 * statistics.median(measured) for name, measured in seconds.items()}
    with_gradient = median.get("bare with gradient")
    return {
        "case": contest.case,
        "dofs": contest.dofs,
        "batch": batch,
        "stock_ms": median["stock"],
        "ours_ms": median["ours"],
        "bare_ms": median["bare"],
        "stock_over_ours": median["stock"] / median["ours"],
        "ours_over_bare": median["ours"] / median["bare"],
        "bare_with_gradient_ms": with_gradient,
        "ours_over_bare_with_gradient": with_gradient and median["ours"] / with_gradient,
        "seconds": seconds,
    }


# Showing
# -------

COLUMNS = {
    "case": ("case", ""),
    "dofs": ("dofs", ","),
    "batch": ("batch", ""),
    "stock ms": ("stock_ms", ".3f"),
    "ours ms": ("ours_ms", ".3f"),
    "bare ms": ("bare_ms", ".3f"),
    "stock/ours": ("stock_over_ours", ".1f"),
    "ours/bare": ("ours_over_bare", ".2f"),
    "bare with gradient ms": ("bare_with_gradient_ms", ".3f"),
    "ours/bare with gradient": ("ours_over_bare_with_gradient", ".2f"),
}


def table(rows: list[dict]) -> str:
    """A Markdown table."""
    cells = [list(COLUMNS)] + [
        ["" if row[key] is None else format(row[key], form) for key, form in COLUMNS.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    align = [str.ljust] + [str.rjust] * (len(widths) - 1)
    lines = [
        "| " + " | ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths)) + " |"
        for line in cells
    ]
    rule = (
        "| "
        + " | ".join(
            "-" * (width - (pad is str.rjust)) + ":" * (pad is str.rjust)
            for pad, width in zip(align, widths)
        )
        + " |"
    )
    return "\n".join([lines[0], rule, *lines[1:]])


# told apart by the colour-blind as well
COLOURS = {"stock": "#D55E00", "ours": "#0072B2", "bare": "black"}
LABELS = {"stock": "Firedrake's bridge", "ours": "prdp_fem", "bare": "bare PETSc"}
BATCHES = {
    1: {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    25: {"linestyle": "-", "marker": "o"},
}


def draw(rows: list[dict], path: Path) -> None:
    """Milliseconds per sample against dofs, of the heat steps."""
    cases = [
        case for case in ("heat, 2-D", "heat, 3-D") if any(row["case"] == case for row in rows)
    ]
    figure = Figure(figsize=(1.8 + 4.6 * len(cases), 4.6), layout="constrained")
    panels = figure.subplots(1, len(cases), sharey=True, squeeze=False)[0]
    for axes, case in zip(panels, cases):
        for name, colour in COLOURS.items():
            for batch, style in BATCHES.items():
                points = sorted(
                    (row["dofs"], row[f"{name}_ms"])
                    for row in rows
                    if row["case"] == case and row["batch"] == batch
                )
                axes.loglog(
                    *zip(*points),
                    color=colour,
                    markersize=5,
                    label=f"{LABELS[name]}, {size(batch)}",
                    **style,
                )
        axes.set(xlabel="dofs", title=case.replace("heat, ", "Heat step, "))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("milliseconds per sample")
    figure.suptitle(f"{ITERATIONS} CG iterations forward and {ITERATIONS} backward, on one core")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)


def size(batch: int) -> str:
    return "one sample" if batch == 1 else f"batch of {batch}"


# The command line
# ----------------


@dataclass
class Series:
    """A case at several sizes, given by the cells along a side; the first is the quick one."""

    make: Callable[[int], Contest]
    cells: tuple[int, ...]


CASES = {
    "heat": [Series(heat_2d, (16, 32, 64, 128, 256, 512)), Series(heat_3d, (8, 16, 32, 48))],
    "diffusivity": [Series(diffusivity, (32, 128, 256))],
    "burgers": [Series(burgers, (16, 70, 140)), Series(burgers_one_step, (16, 70, 140))],
    "loop": [Series(loop, (32,))],
}


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog=(
            "Options for PETSc, such as -log_view, go into the environment variable PETSC_OPTIONS."
        ),
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=list(CASES), help="default: all of them"
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        type=count,
        metavar="N",
        help=(
            "cells along a side of the square, for all cases chosen, instead of each case's own;"
            " without the cube"
        ),
    )
    parser.add_argument(
        "--repetitions",
        type=count,
        metavar="N",
        help="how often each contestant has its turn (default: 20, and 3 with --quick)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the smallest size of each case, and few repetitions",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "output",
        metavar="DIR",
        help="where results and the figure are put (default: output beside this script)",
    )
    arguments = parser.parse_args()
    if firedrake.COMM_WORLD.size > 1:
        parser.error("this compares one core with one core: run it without mpiexec")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot put results into {arguments.output}: {error.strerror}")
    repetitions = arguments.repetitions or (3 if arguments.quick else 20)

    torch.manual_seed(1)
    work = []
    for case in arguments.cases:
        for series in CASES[case]:
            if arguments.cells:
                work += [
                    (series.make, cells) for cells in arguments.cells if series.make is not heat_3d
                ]
            else:
                work += [
                    (series.make, cells) for cells in series.cells[: 1 if arguments.quick else None]
                ]

    rows = []
    bar = tqdm(work, unit="size")
    for make, cells in bar:
        bar.set_description(f"{make.__name__} {cells}")
        contest = make(cells)
        rows += [
            row(contest, batch, measure(contest, batch, repetitions)) for batch in contest.batches
        ]

    processor = machine(1)["processor"]
    print(
        f"\nMilliseconds per sample, forward and backward: medians of {repetitions} repetitions on"
        f" one core of {processor}\n"
    )
    print(table(rows), end="\n\n")
    results = {
        "processor": processor,
        "versions": (
            {
                name: version(name)
                for name in ("prdp-fem", "firedrake", "petsc4py", "torch", "numpy")
            }
            | {
                "petsc": ".".join(map(str, PETSc.Sys.getVersion())),
                "python": platform.python_version(),
            }
        ),
        "repetitions": repetitions,
        "rows": rows,
    }
    (arguments.output / "operator_overhead.md").write_text(table(rows) + "\n")
    (arguments.output / "operator_overhead.json").write_text(json.dumps(results, indent=1) + "\n")
    saved = "operator_overhead.json is"
    if any(row["case"].startswith("heat") for row in rows):
        draw(rows, arguments.output / "operator_overhead.png")
        saved = "operator_overhead.json and operator_overhead.png are"
    print(f"{saved} in {os.path.relpath(arguments.output)}")


if __name__ == "__main__":
    main()
