"""When a device pays: the time of a training step on the host, measured, next to what a device
would take, by a model.

A step is the forward and the backward pass of one sample through an implicit heat step: CG and
Jacobi's preconditioner, a number of iterations each way. The host is measured, one core of it. A
device is not: its iterations are taken to move each byte once at the bandwidth that its maker
publishes, and to start each kernel after the other; where tensors are on the CPU, two vectors go
there and two come back. What the layer itself takes, wherever it solves, is taken to be the time of
the smallest mesh on the host.

    python device_model.py              about five minutes; writes output/device_model.png
    python device_model.py --quick      small meshes, half a minute
    python device_model.py --latency 3  microseconds to start a kernel

It runs on one core and one MPI process.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything is imported that starts threads

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    TestFunction,
    TrialFunction,
    UnitCubeMesh,
    dx,
    grad,
    inner,
)
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from tqdm import tqdm

from prdp_fem import FixedRefinement, Iterations, LinearVariationalSolver
from prdp_fem.torch import SolverLayer

torch.set_num_threads(1)
# PETSc reads the command line too, and need not complain of what it does not know
PETSc.Options().setValue("options_left", False)

# Kernels of an iteration of CG with Jacobi's preconditioner in PETSc: MatMult, VecPointwiseMult,
# two VecTDot, two VecAXPY, VecAYPX; and how often they read or write a vector, the product apart: 3
# + 2·2 + 2·3 + 3.
KERNELS, VECTORS = 7, 16
# Either dot product has the host wait for a number, which takes as long as to start a kernel.
WAITS = 2
DOUBLE, INTEGER = 8, 4
_FIRST = 10  # calls that are not counted: they set up, and warm caches


@dataclass
class Maker:
    """What the maker of a device publishes.

    Attributes
    ----------
    memory, link : float
        Bandwidth, in bytes a second: of its memory, and to the host in one direction.
    """

    memory: float
    link: float


DEVICES = {"A100 80GB SXM": Maker(2.039e12, 32e9), "H100 SXM": Maker(3.35e12, 64e9)}


def iteration(maker: Maker, rows: int, entries: int, latency: float) -> float:
    """Seconds of an iteration on a device."""
    size = entries * (DOUBLE + INTEGER) + rows * INTEGER + (2 + VECTORS) * rows * DOUBLE
    return size / maker.memory + (KERNELS + WAITS) * latency


def step(
    maker: Maker,
    rows: int,
    entries: int,
    iterations: int,
    latency: float,
    *,
    tensors_on_device: bool,
) -> float:
    """Seconds of a forward and a backward pass: beside the iterations, one's worth for the
    right-hand side, and one for the gradient.
    """
    moved = 0.0 if tensors_on_device else 4 * rows * DOUBLE / maker.link
    return 2 * (iterations + 1) * iteration(maker, rows, entries, latency) + moved


def measure(cells: int, iterations: int, repetitions: int) -> tuple[int, int, float]:
    """Rows, entries, and median seconds of a step on the host."""
    V = FunctionSpace(UnitCubeMesh(cells, cells, cells), "CG", 1)
    w = TrialFunction(V)
    v = TestFunction(V)
    u0 = Function(V)
    u = Function(V)
    problem = LinearVariationalProblem(
        (w * v + 1e-2 * inner(grad(w), grad(v))) * dx,
        u0 * v * dx,
        u,
        bcs=DirichletBC(V, 0, "on_boundary"),
    )
    solver = LinearVariationalSolver(
        problem,
        refinement=FixedRefinement(Iterations(iterations, rtol_floor=0.0)),
        device="cpu",
        solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"},
    )
    layer, seconds = SolverLayer(solver, [u0]), []
    x = torch.rand(V.dim(), dtype=torch.float64, requires_grad=True)
    cotangent = torch.rand(V.dim(), dtype=torch.float64)
    for _ in range(repetitions + _FIRST):
        start = time.perf_counter()
        layer(x).backward(cotangent)
        seconds.append(time.perf_counter() - start)
        x.grad = None
    entries = int(solver.system.linearisation.krylov.ksp.getOperators()[0].getInfo()["nz_used"])
    return V.dim(), entries, statistics.median(seconds[_FIRST:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--iterations", type=int, default=10, help="of each solve (default: %(default)s)"
    )
    parser.add_argument(
        "--latency",
        type=float,
        default=5.0,
        help="microseconds to start a kernel (default: %(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    arguments, _ = parser.parse_known_args()
    cells = [4, 8, 16] if arguments.quick else [4, 7, 12, 20, 32, 50, 64]
    rows = [
        measure(n, arguments.iterations, arguments.repetitions) for n in tqdm(cells, desc="meshes")
    ]
    overhead = rows[0][2]
    titles = [name + where for name in DEVICES for where in ("", ", tensors on CPU")]
    print(
        f"{'dofs':>9s} {'entries':>11s} {'host':>11s}"
        + "".join(f" {title:>28s}" for title in titles)
    )
    curves = {"host, one core, measured": [seconds for *_, seconds in rows]}
    for name, maker in DEVICES.items():
        for on_device in (True, False):
            curves[name + (", model" if on_device else ", tensors on the CPU, model")] = [
                overhead
                + step(
                    maker,
                    n,
                    entries,
                    arguments.iterations,
                    1e-6 * arguments.latency,
                    tensors_on_device=on_device,
                )
                for n, entries, _ in rows
            ]
    for place, (n, entries, _) in enumerate(rows):
        print(
            f"{n:9d} {entries:11d} {curves['host, one core, measured'][place] * 1e3:8.3f} ms"
            + "".join(f" {values[place] * 1e3:25.3f} ms" for values in list(curves.values())[1:])
        )
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {
        "host, one core, measured": ("k", "-", "o"),
        **{
            label: (f"C{place // 2}", "--" if place % 2 else "-", "")
            for place, label in enumerate(list(curves)[1:])
        },
    }
    for label, values in curves.items():
        colour, line, marker = styles[label]
        axes.loglog(
            [n for n, *_ in rows],
            [1e3 * value for value in values],
            color=colour,
            linestyle=line,
            marker=marker,
            label=label,
        )
    axes.set(
        xlabel="unknowns",
        ylabel="milliseconds of a forward and a backward pass",
        title=(
            f"{arguments.iterations} iterations each way; {arguments.latency:g} µs to start a"
            " kernel"
        ),
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    arguments.output.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.output / "device_model.png", dpi=150)
    print(f"drawn: {arguments.output / 'device_model.png'}")


main()
