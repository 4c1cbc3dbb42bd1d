"""What prdp_fem.advise says for the problems of the demos, and what it goes by.

Each problem is stated as its demo states it, with samples such as the demo trains with. Advice is
asked for with a budget that lets all methods be tried; results are kept in docs/choosing, one file
a problem, and the table of docs/choosing.md is made of what is there.

    python choosing.py                        all that is not there yet; one to three minutes
    python choosing.py --again                all, anew
    python choosing.py --problems rods plate  some
    python choosing.py --quick --output out   small sizes, half a minute; no table

It runs on one core and one MPI process.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything is imported that starts threads

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from firedrake import (
    COMM_WORLD,
    Constant,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    NonlinearVariationalProblem,
    PeriodicUnitIntervalMesh,
    PeriodicUnitSquareMesh,
    SpatialCoordinate,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
    UnitIntervalMesh,
    UnitSquareMesh,
    VectorFunctionSpace,
    as_vector,
    dot,
    dx,
    exp,
    grad,
    inner,
    pi,
    sin,
)

import prdp_fem
from prdp_fem import LinearVariationalSolver, NonlinearVariationalSolver
from prdp_fem.advice.rule import DIGITS, best
from prdp_fem.studies import triangle_mesh
from prdp_fem.torch import SolverLayer, to_torch

torch.set_num_threads(1)
HERE = Path(__file__).resolve().parent
DOCS = HERE.parent / "docs"
PLATE, RIM = HERE.parent / "demos" / "heat_emulator" / "plate.msh", 2
CG = {"ksp_type": "cg", "pc_type": "jacobi"}
GMRES = {"ksp_type": "gmres", "pc_type": "jacobi", "snes_rtol": 1e-10}
SAMPLES = 4


def random_fields(space, modes):
    """Random Fourier series of sine modes with a largest value of one, shape (samples, n)."""
    x = SpatialCoordinate(space.mesh())
    random = np.random.default_rng(1)
    fields = []
    for _ in range(SAMPLES):
        expression = 0
        for _ in range(modes):
            wave = random.uniform(-1, 1)
            for coordinate in x:
                wave = wave * sin(int(random.integers(1, modes + 1)) * pi * coordinate)
            expression += wave
        shape = space.value_shape
        value = as_vector([expression] * shape[0]) if shape else expression
        field = to_torch(Function(space).interpolate(value), copy=True)
        fields.append(field / abs(field).max())
    return torch.stack(fields)


def heat(mesh, modes, cold):
    """An implicit step, as of heat_emulator.py; the operator is constant."""
    diffusion = 2e-3 if mesh.geometric_dimension == 3 else 1e-3
    V = FunctionSpace(mesh, "CG", 1)
    w, v = TrialFunction(V), TestFunction(V)
    u_old, increment = Function(V, name="u_old"), Function(V, name="increment")
    a = w * v * dx(scheme="KMV", degree=1) + diffusion * inner(grad(w), grad(v)) * dx
    L = -diffusion * inner(grad(u_old), grad(v)) * dx
    problem = LinearVariationalProblem(a, L, increment, bcs=DirichletBC(V, 0, cold))
    solver = LinearVariationalSolver(problem, solver_parameters=CG)
    return SolverLayer(solver, [u_old]), random_fields(V, modes)


def plate_mesh():
    mesh = triangle_mesh(PLATE, COMM_WORLD, marks=[RIM])
    corners = mesh.coordinates.dat.data_ro
    size = np.ptp(corners, axis=0).max()
    mesh.coordinates.assign((mesh.coordinates - Constant(corners.min(axis=0))) / size)
    return mesh


def rods(rods):
    """Ten of them, each with a random source, as of poisson_inverse.py but of three sines."""
    V = VectorFunctionSpace(UnitIntervalMesh(31), "CG", 1, dim=rods)
    u, v = TrialFunction(V), TestFunction(V)
    f = Function(V, name="source")
    problem = LinearVariationalProblem(
        inner(grad(u), grad(v)) * dx,
        inner(f, v) * dx,
        Function(V, name="temperature"),
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    jacobi = {"ksp_type": "richardson", "pc_type": "jacobi"}
    solver = LinearVariationalSolver(problem, solver_parameters=jacobi)
    (x,) = SpatialCoordinate(V.mesh())
    random = np.random.default_rng(1)
    sources = [
        as_vector(
            [
                sum(random.uniform(1, 3) * sin(2 * k * pi * x) for k in (1, 2, 3))
                for _ in range(rods)
            ]
        )
        for _ in range(SAMPLES)
    ]
    fields = [to_torch(Function(V).interpolate(source), copy=True) for source in sources]
    return SolverLayer(solver, [f]), torch.stack(fields)


def diffusivity():
    """The plate's logarithmic diffusivity: another operator for each sample."""
    mesh = plate_mesh()
    V, Q = VectorFunctionSpace(mesh, "CG", 1, dim=2), FunctionSpace(mesh, "CG", 1)
    u, v, m = TrialFunction(V), TestFunction(V), Function(Q, name="m")
    x, _ = SpatialCoordinate(mesh)
    problem = LinearVariationalProblem(
        exp(m) * inner(grad(u), grad(v)) * dx,
        inner(as_vector([1, sin(2 * pi * x)]), v) * dx,
        Function(V, name="temperature"),
        bcs=DirichletBC(V, 0, RIM),
    )
    solver = LinearVariationalSolver(problem, solver_parameters=CG)
    # L-BFGS asks for one field at a time, forward and backward.
    return SolverLayer(solver, [m]), random_fields(Q, 3)[0]


def burgers(dimension, cells):
    """A step of burgers_emulator.py: a Newton-Krylov method."""
    if dimension == 1:
        mesh, viscosity, step, modes = PeriodicUnitIntervalMesh(cells), 1.28 / cells, 0.05, 5
        V = FunctionSpace(mesh, "CG", 1)
    else:
        mesh = PeriodicUnitSquareMesh(cells, cells, quadrilateral=True)
        viscosity, step, modes = 0.5 / cells, 0.1, 3
        V = VectorFunctionSpace(mesh, "CG", 1)
    u_old, w, v = Function(V, name="u_old"), Function(V, name="increment"), TestFunction(V)
    u = u_old + w
    transport = u * u.dx(0) if dimension == 1 else dot(grad(u), u)
    residual = inner(w, v) + step * (inner(transport, v) + viscosity * inner(grad(u), grad(v)))
    solver = NonlinearVariationalSolver(
        NonlinearVariationalProblem(residual * dx(degree=3), w),
        warm_start=False,
        solver_parameters=GMRES,
    )
    return SolverLayer(solver, [u_old]), random_fields(V, 2 * modes)


def cases(quick):
    """By name: what the problem is called, and a function that states it."""
    square, cube, line, plane = (15, 7, 64, 8) if quick else (31, 25, 256, 28)
    return {
        "plate": ("heat, plate with holes", lambda: heat(plate_mesh(), 5, RIM)),
        "square": (
            f"heat, square {square + 1}²",
            lambda: heat(UnitSquareMesh(square, square), 5, "on_boundary"),
        ),
        "cube": (
            f"heat, cube {cube + 1}³",
            lambda: heat(UnitCubeMesh(cube, cube, cube), 3, "on_boundary"),
        ),
        "rods": ("rods", lambda: rods(10)),
        "diffusivity": ("diffusivity field of the plate", diffusivity),
        "burgers_1d": (f"Burgers, 1-D, {line} cells", lambda: burgers(1, line)),
        "burgers_2d": (f"Burgers, 2-D, {plane}² cells", lambda: burgers(2, plane)),
    }


def described(row):
    """A row of an advice's table, in numbers."""
    if row is None:
        return None
    return {
        "method": row.method.removeprefix("yours: "),
        "milliseconds": 1e3 * row.cost,
        "iterations": row.iterations,
        "newton steps": row.newton_steps,
        "set-up": 1e3 * row.set_up,
    }


def ask(title, state, budget):
    """Advice on a problem, as numbers and text."""
    layer, samples = state()
    advice = prdp_fem.advise(layer, samples, budget=budget)
    print(f"\n{advice}", flush=True)
    return {
        "title": title,
        "unknowns": layer.solver.problem.u.function_space().dim(),
        "problem": advice.problem,
        "direct": described(best(advice.table, DIGITS, factorises=True)),
        "iterative": described(best(advice.table, DIGITS, factorises=False)),
        "own": described(best([r for r in advice.table if r.is_at_hand], DIGITS, factorises=False)),
        "ratios": advice.choice.ratios,
        "advice": advice.choice.chosen.method.removeprefix("yours: "),
        "ladder": None if advice.ladder is None else repr(advice.ladder),
        "is_sure": advice.is_sure,
        "text": str(advice),
    }


# The page
# --------


def cost(entry):
    if entry is None:
        return "-"
    steps = f"{entry['newton steps']} × " if entry["newton steps"] else ""
    forward, backward = entry["iterations"]
    spent = "" if (forward, backward) == (1, 1) else f", {forward} + {backward}"
    return f"{entry['method']}{spent or (', ' + steps.strip(' ×') + ' steps' if steps else '')}"


def table(results):
    """The results as a table of the page."""
    lines = [
        "| problem | unknowns | best factorisation | ms | best iterations for two digits | ms |"
        " iterations / factorisation at 1, 2, 3 digits | the demo's own, for two digits | advice |",
        "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | --- |",
    ]
    for result in results:
        direct, iterative, own = (result[kind] for kind in ("direct", "iterative", "own"))
        milliseconds = [f"{one['milliseconds']:.2f}" if one else "-" for one in (direct, iterative)]
        ratios = ", ".join(f"{ratio:.2g}" for ratio in result["ratios"].values())
        mine = f"{own['milliseconds']:.2f} ms" if own else "not reached"
        word = "" if result["is_sure"] else ", close"
        refined = f"{result['advice']}, refined" if result["ladder"] else result["advice"]
        lines.append(
            f"| {result['title']} | {result['unknowns']} | {cost(direct)} | {milliseconds[0]} |"
            f" {cost(iterative)} | {milliseconds[1]} | {ratios} | {mine} | {refined}{word} |"
        )
    return "\n".join(lines)


def write_page(results):
    """Put the table where the page has one."""
    page = DOCS / "choosing.md"
    before, marker, rest = page.read_text().partition("<!-- advice -->\n")
    _, end, after = rest.partition("<!-- end -->")
    page.write_text(f"{before}{marker}{table(results)}\n{end}{after}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=cases(False), help="(default: all)")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--budget", type=float, default=10, help="seconds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=DOCS / "choosing", help="a folder")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    known = cases(arguments.quick)
    for name in arguments.problems or known:
        path = arguments.output / f"{name}.json"
        if arguments.again or not path.exists():
            result = ask(*known[name], arguments.budget)
            path.write_text(json.dumps(result, indent=1) + "\n")
    paths = [arguments.output / f"{name}.json" for name in known]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    print(f"\n{table(results)}")
    if arguments.output == DOCS / "choosing":
        write_page(results)


if __name__ == "__main__":
    main()
