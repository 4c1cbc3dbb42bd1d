"""What it costs to differentiate a solve as its iterations ("unrolled"), next to differentiating it
as a solution ("implicit").

An implicit heat step of some iterations, as a layer of a torch network, forward and backward, with
the initial temperature (in the right-hand side) or the diffusivity (in the operator) as the
control. For each method: the time of the backward pass as a multiple of the forward pass. Then the
memory that a backward pass through many iterations takes, with and without checkpoints, each
measured in a process of its own, on Linux.

    python unrolled_cost.py                             about five minutes
    python unrolled_cost.py --quick                     a small mesh, half a minute
    python unrolled_cost.py --cells 256 --iterations 40

It runs on one core and one MPI process.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything is imported that starts threads

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from firedrake import (
    COMM_WORLD,
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    TestFunction,
    TrialFunction,
    UnitSquareMesh,
    dx,
    grad,
    inner,
)
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from tqdm import tqdm

from prdp_fem import FixedRefinement, Iterations, LinearVariationalSolver, Unrolled
from prdp_fem.torch import SolverLayer

torch.set_num_threads(1)
# PETSc reads the command line too, and need not complain of what it does not know
PETSc.Options().setValue("options_left", False)

METHODS = {
    "Richardson": {"ksp_type": "richardson", "ksp_richardson_scale": 0.7},
    "Chebyshev": {"ksp_type": "chebyshev", "ksp_chebyshev_eigenvalues": "0.4,2.1"},
    "steepest descent": {"ksp_type": "python", "ksp_python_type": "prdp_fem.SteepestDescent"},
    "CG": {"ksp_type": "cg"},
    "BiCGStab": {"ksp_type": "bcgs"},
    "GMRES": {"ksp_type": "gmres"},
    "FGMRES": {"ksp_type": "fgmres"},
}
CONTROLS = {"initial temperature": "right-hand side", "diffusivity": "operator"}


def layer_of(
    cells: int, method: str, control: str, differentiation, iterations: int
) -> SolverLayer:
    """A heat step with Jacobi's preconditioner."""
    V = FunctionSpace(UnitSquareMesh(cells, cells), "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u = Function(V, name="u")
    controls = {
        "initial temperature": Function(V, name="u0").assign(1),
        "diffusivity": Function(V, name="kappa").assign(1),
    }
    a = (w * v + 1e-3 * controls["diffusivity"] * inner(grad(w), grad(v))) * dx
    problem = LinearVariationalProblem(
        a, controls["initial temperature"] * v * dx, u, bcs=DirichletBC(V, 0, "on_boundary")
    )
    solver = LinearVariationalSolver(
        problem,
        refinement=FixedRefinement(Iterations(iterations, rtol_floor=0.0)),
        differentiation=differentiation,
        solver_parameters={**METHODS[method], "pc_type": "jacobi"},
    )
    return SolverLayer(solver, [controls[control]])


# Time
# ----


def measure(layers: dict, repetitions: int) -> dict:
    """Median seconds of the forward and the backward pass of each layer; they take turns."""
    samples = {}
    for name, layer in layers.items():
        size = layer.solver.problem.u.function_space().dim()
        samples[name] = [0.5 + torch.rand(size, dtype=torch.float64) for _ in range(2)]
    times = {name: ([], []) for name in layers}
    for repetition in range(repetitions + 1):
        for name, layer in layers.items():
            x = samples[name][repetition % 2].clone().requires_grad_()
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            u = layer(x)
            between = time.perf_counter()
            u.backward(u.detach())
            end = time.perf_counter()
            gc.enable()
            if repetition:  # the first one assembles, compiles and takes memory
                times[name][0].append(between - start)
                times[name][1].append(end - between)
    return {name: tuple(map(statistics.median, pair)) for name, pair in times.items()}


def time_rows(cells: int, iterations: int, repetitions: int) -> list[dict]:
    rows = []
    for method in tqdm(METHODS, unit="method", desc="time"):
        for control in CONTROLS:
            layers = {
                name: layer_of(cells, method, control, name, iterations)
                for name in ("implicit", "unrolled")
            }
            row = {"method": method, "control": CONTROLS[control]}
            for name, (forward, backward) in measure(layers, repetitions).items():
                row |= {
                    f"{name}_forward_ms": 1e3 * forward,
                    f"{name}_backward_ms": 1e3 * backward,
                    f"{name}_ratio": backward / forward,
                }
            rows.append(row)
    return rows


# Memory
# ------


def peak_of_backward_pass(cells: int, iterations: int, checkpoints: int | None) -> float:
    """Megabytes by which this process's memory rises at most during a backward pass, after one of
    few iterations.
    """
    layer = layer_of(cells, "CG", "initial temperature", Unrolled(checkpoints=checkpoints), 2)
    x = torch.ones(
        layer.solver.problem.u.function_space().dim(), dtype=torch.float64, requires_grad=True
    )
    layer(x).sum().backward()
    layer.solver.refinement = FixedRefinement(Iterations(iterations, rtol_floor=0.0))
    value = layer(x).sum()
    Path("/proc/self/clear_refs").write_text("5")  # has the peak counted from here on
    before = resident_megabytes("VmRSS")
    value.backward()
    return resident_megabytes("VmHWM") - before


def resident_megabytes(field: str) -> float:
    """What Linux tells of this process's memory: now (VmRSS), or at its peak (VmHWM)."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return float(line.split()[1]) / 1024


def memory_rows(cells: int, counts: tuple[int, ...]) -> list[dict]:
    rows = []
    for iterations in tqdm(counts, unit="count", desc="memory"):
        for checkpoints in (None, max(1, round(iterations**0.5))):
            command = [
                sys.executable,
                __file__,
                "--peak",
                str(cells),
                str(iterations),
                str(checkpoints or 0),
            ]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(
                {
                    "iterations": iterations,
                    "checkpoints": checkpoints,
                    "megabytes": float(result.stdout.split()[-1]),
                    "vector_megabytes": (cells + 1) ** 2 * 8 / 2**20,
                }
            )
    return rows


# Showing
# -------


def time_table(rows: list[dict]) -> str:
    lines = [
        (
            "| method | control in the | forward ms | implicit: backward/forward | unrolled:"
            " backward/forward |"
        ),
        "| --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['method']} | {row['control']} | {row['unrolled_forward_ms']:.2f} |"
        f" {row['implicit_ratio']:.2f} | {row['unrolled_ratio']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def memory_table(rows: list[dict]) -> str:
    lines = ["| iterations | checkpoints | MB | vectors |", "| ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['iterations']} | {row['checkpoints'] or 'all'} | {row['megabytes']:.0f} | "
        f"{row['megabytes'] / row['vector_megabytes']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


COLOURS = {"implicit": "#999999", "right-hand side": "#56B4E9", "operator": "#0072B2"}


def draw(times: list[dict], memory: list[dict], iterations: int, path: Path) -> None:
    """Backward passes as multiples of forward ones, and memory against iterations."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    methods = list(METHODS)
    for offset, (label, control, key) in enumerate(
        [
            ("implicit", "right-hand side", "implicit_ratio"),
            ("right-hand side", "right-hand side", "unrolled_ratio"),
            ("operator", "operator", "unrolled_ratio"),
        ]
    ):
        heights = [
            next(row[key] for row in times if row["method"] == method and row["control"] == control)
            for method in methods
        ]
        name = label if label == "implicit" else f"unrolled, control in the {label}"
        left.bar(
            [k + 0.27 * (offset - 1) for k in range(len(methods))],
            heights,
            0.25,
            color=COLOURS[label],
            label=name,
        )
    left.set_xticks(range(len(methods)), methods, rotation=25, ha="right")
    left.set(ylabel="backward pass / forward pass", title=f"Time, {iterations} iterations")
    left.set_ylim(0, 1.35 * left.get_ylim()[1])  # room for the legend
    left.legend(frameon=False, fontsize=9, loc="upper left")
    left.spines[["top", "right"]].set_visible(False)
    for has_checkpoints, style in (
        (False, {"marker": "o"}),
        (True, {"marker": "s", "linestyle": "--"}),
    ):
        points = [
            (row["iterations"], row["megabytes"])
            for row in memory
            if (row["checkpoints"] is not None) == has_checkpoints
        ]
        label = "with √K checkpoints" if has_checkpoints else "all states kept"
        right.plot(
            *zip(*points), color="#D55E00" if has_checkpoints else "black", label=label, **style
        )
    right.set(
        xlabel="iterations K of CG",
        ylabel="MB more than before the backward pass",
        title="Memory",
        ylim=(0, None),
    )
    right.legend(frameon=False, fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "--peak":  # one measurement of memory_rows
        cells, iterations, checkpoints = map(int, sys.argv[2:])
        print(peak_of_backward_pass(cells, iterations, checkpoints or None))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cells",
        type=int,
        default=128,
        metavar="N",
        help="cells along a side of the square (default: 128)",
    )
    parser.add_argument(
        "--iterations",
        type=int,
        default=20,
        metavar="K",
        help="iterations whose time is measured (default: 20)",
    )
    parser.add_argument(
        "--repetitions",
        type=int,
        default=15,
        metavar="N",
        help="how often each is measured (default: 15)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="16 cells along a side, and few repetitions"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "output",
        metavar="DIR",
        help="where results and the figure are put (default: output beside this script)",
    )
    arguments = parser.parse_args()
    if COMM_WORLD.size > 1:
        parser.error("this measures one core: run it without mpiexec")
    if min(arguments.cells, arguments.iterations, arguments.repetitions) < 1:
        parser.error("--cells, --iterations and --repetitions must be at least 1")
    cells = arguments.cells
    repetitions = arguments.repetitions
    counts = (50, 100, 200, 400)
    if arguments.quick:
        cells = 16
        repetitions = 3
        counts = (50, 100)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(1)
    times, memory = time_rows(cells, arguments.iterations, repetitions), memory_rows(cells, counts)
    print(
        f"\n{(cells + 1) ** 2:,} dofs, {arguments.iterations} iterations, medians of"
        f" {repetitions}\n\n{time_table(times)}\n\n{memory_table(memory)}\n"
    )
    (arguments.output / "unrolled_cost.json").write_text(
        json.dumps({"times": times, "memory": memory}, indent=1) + "\n"
    )
    draw(times, memory, arguments.iterations, arguments.output / "unrolled_cost.png")
    print(f"unrolled_cost.json and unrolled_cost.png are in {os.path.relpath(arguments.output)}")


if __name__ == "__main__":
    main()
