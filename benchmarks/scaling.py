"""How forward and backward solves and whole training steps scale with ranks that share a mesh, and
with ranks that share samples.

An implicit heat step in a cube (CG with Jacobi's preconditioner, a fixed number of iterations) as
the last layer of a graph network, which is trained by Adam. Each of these is measured on 1, 2, 4,
... ranks, up to as many as the script is started on:

* mesh, strong: the ranks share one mesh;
* mesh, weak: the mesh has as many unknowns for each rank;
* samples, strong: each rank has the whole mesh, and they share the samples of a batch;
* samples, weak: each rank has a batch.

They take turns, step by step, so that all see the same machine; ranks that take no part sleep. The
time of a training step is split by PETSc's log events, which -log_view shows as well, into the
solver's own work, halo exchanges of solver and network, dot products of the solver (their
reductions included), the reduction of gradients, what ranks compare before they go on, and the
rest, which is the network and its optimiser.

    mpiexec -n 2 python scaling.py                     about five minutes
    mpiexec -n 2 python scaling.py --quick             a small mesh, half a minute
    mpiexec -n 8 python scaling.py --cells 99 --iterations 20 --batch 16

Then a model, with constants measured here and those of a network that one names, predicts larger
runs.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything is imported that starts threads
os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # torch asks for large pages

import ctypes
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from firedrake import (
    DirichletBC,
    Ensemble,
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
from mpi4py import MPI
from tqdm import tqdm

from prdp_fem import FixedRefinement, Iterations, LinearVariationalSolver
from prdp_fem.studies.command_line import Parser, count
from prdp_fem.torch import GradientReduction, GraphNetwork, Partition, SolverLayer, deal

# The network's tensors are large, and new in each step. glibc keeps their memory, where it would
# give it back to the kernel, which clears every page again: as MALLOC_MMAP_MAX_=0
# MALLOC_TRIM_THRESHOLD_=2147483647 in the environment.
if hasattr(ctypes.CDLL(None), "mallopt"):
    ctypes.CDLL(None).mallopt(-4, 0), ctypes.CDLL(None).mallopt(-1, 2**31 - 1)

torch.set_num_threads(1)
COMM = MPI.COMM_WORLD
DIFFUSION = 2e-3  # diffusivity times time step
KINDS = ("mesh, strong", "mesh, weak", "samples, strong", "samples, weak")
PARTS = ("solver", "halos", "dot products", "gradients", "agreement", "rest")
HIDDEN, STEPS = 8, 2  # of the network
SAMPLES = 64  # of a batch, in predictions


# The training step
# -----------------


class Training:
    """An emulator of heat conduction on the ranks of an ensemble, with samples that are made up."""

    def __init__(self, ensemble: Ensemble, cells: int, iterations: int, batch: int):
        self.ensemble = ensemble  # when nobody holds it any more, its communicators are gone
        mesh = UnitCubeMesh(cells, cells, cells, comm=ensemble.comm)
        V = FunctionSpace(mesh, "CG", 1)
        w = TrialFunction(V)
        v = TestFunction(V)
        u0 = Function(V, name="u0")
        increment = Function(V)
        a = w * v * dx(scheme="KMV", degree=1) + DIFFUSION * inner(grad(w), grad(v)) * dx
        L = -DIFFUSION * inner(grad(u0), grad(v)) * dx
        problem = LinearVariationalProblem(
            a, L, increment, bcs=DirichletBC(V, 0, "on_boundary"), constant_jacobian=True
        )
        self.solver = LinearVariationalSolver(
            problem,
            refinement=FixedRefinement(Iterations(iterations, rtol_floor=0.0)),
            solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"},
        )
        self.physics = SolverLayer(self.solver, [u0])
        self.dofs = V.dim()
        own = Partition(V)
        torch.manual_seed(1)
        self.network = GraphNetwork(
            1, 1, own.edges, own.coordinates, halo=own.halo, width=HIDDEN, steps=STEPS
        )
        self.optimiser = torch.optim.Adam(self.network.parameters(), 1e-3, fused=True)
        self.gradients = GradientReduction(self.network, ensemble.global_comm)
        self.share = len(deal(torch.arange(batch), ensemble)) / batch
        x = torch.as_tensor(own.coordinates[: len(own)])
        waves = torch.arange(1, round(self.share * batch) + 1)[:, None, None]
        self.u0 = torch.sin(torch.pi * waves * x).prod(-1)
        self.target = 0.9 * self.u0

    def step(self) -> None:
        self.gradients.zero()
        u1 = self.u0 + self.network(self.u0.float()[:, None])[:, 0]
        loss = ((u1 + self.physics(u1) - self.target) ** 2).sum(-1).mean()
        (self.share * loss).backward()
        self.gradients.finish()
        self.optimiser.step()


# Measuring
# ---------


@dataclass
class Layout:
    """What is measured on some ranks.

    Attributes
    ----------
    kind : str
        One of ``KINDS``.
    ranks : int
    dofs : int
        Of a sample.
    samples : int
        Of a batch, on all ranks together.
    forward, backward, step : float
        Median milliseconds, of the slowest rank: the solves of a batch, their adjoints, and a whole
        training step.
    parts : dict of str to float
        Mean milliseconds of a training step by ``PARTS``, mean of the ranks.
    speed_up : dict of str to float
        Of ``forward``, ``backward`` and ``step``: medians over repetitions of the time on one rank
        over that on these, times how much more work they have done.
    """

    kind: str
    ranks: int
    dofs: int
    samples: int
    forward: float = 0.0
    backward: float = 0.0
    step: float = 0.0
    parts: dict[str, float] | None = None
    speed_up: dict[str, float] | None = None

    @property
    def work(self) -> int:
        return self.dofs * self.samples


class Measurement:
    """One layout, on the ranks of a communicator; None on the others."""

    def __init__(self, layout: Layout, training: Training, comm: MPI.Comm):
        self.layout = layout
        self.training = training
        self.comm = comm
        self.stage = PETSc.Log.Stage(f"{layout.kind}, {layout.ranks}")
        self.times: list[tuple[float, ...]] = []  # of the slowest rank
        self.own: list[float] = []  # steps of this rank

    def warm_up(self) -> None:
        self.training.step()

    def run(self) -> None:
        spent = self.training.solver.statistics
        spent.reset()
        self.comm.barrier()
        self.stage.push()
        start = time.perf_counter()
        self.training.step()
        seconds = time.perf_counter() - start
        self.stage.pop()
        self.own.append(1e3 * seconds)
        mine = spent.forward_seconds, spent.adjoint_seconds, seconds
        self.times.append(tuple(self.comm.allreduce(1e3 * value, MPI.MAX) for value in mine))

    def finish(self, alone: Measurement) -> None:
        """Have the layout know what was found; ``alone`` is the same on one rank, where this is
        rank 0.
        """
        layout = self.layout
        layout.forward, layout.backward, layout.step = map(statistics.median, zip(*self.times))
        layout.parts = {
            name: self.comm.allreduce(value) / self.comm.size
            for name, value in self._parts().items()
        }
        if alone is not None:
            work = layout.work / alone.layout.work
            layout.speed_up = {
                name: (
                    work
                    * statistics.median(
                        one[k] / many[k] for one, many in zip(alone.times, self.times)
                    )
                )
                for k, name in enumerate(("forward", "backward", "step"))
            }

    def _parts(self) -> dict[str, float]:
        """Of a step of this rank, by PETSc's log."""

        def milliseconds(*events):
            return sum(
                1e3 * PETSc.Log.Event(event).getPerfInfo(self.stage.id)["time"] for event in events
            ) / len(self.times)

        solves = milliseconds("PRDPForward", "PRDPAdjoint")
        halos_of_network = milliseconds("PRDPExchange")
        halos = milliseconds("VecScatterBegin", "VecScatterEnd")  # of the network, too
        dots = milliseconds("VecTDot", "VecNorm")
        gradients = milliseconds("PRDPReduce")
        agreement = milliseconds("PRDPAgree")
        of_solver = halos - halos_of_network
        rest = statistics.fmean(self.own) - solves - halos_of_network - gradients - agreement
        return dict(
            zip(PARTS, (solves - of_solver - dots, halos, dots, gradients, agreement, rest))
        )


def wait() -> None:
    """A barrier that leaves processor and memory to the ranks that are at work."""
    request = COMM.Ibarrier()
    while not request.Test():
        time.sleep(2e-4)


def measure(cells: int, iterations: int, batch: int, repetitions: int) -> list[Layout]:
    """All layouts; complete on rank 0."""
    measurements: dict[tuple[str, int], Measurement | None] = {}
    trainings: dict[tuple[int, ...], Training] = {}
    for ranks in (2**k for k in range(COMM.size.bit_length())):
        comm = COMM.Split(COMM.rank >= ranks)
        # As many unknowns a rank as on all ranks.
        fewer = round((cells + 1) * (ranks / COMM.size) ** (1 / 3)) - 1
        for kind, members, n, samples in zip(
            KINDS,
            (1, 1, ranks, ranks),
            (cells, fewer, cells, cells),
            (batch, batch, batch, batch * ranks),
        ):
            measurements[kind, ranks] = None
            if COMM.rank < ranks:
                key = ranks, members, n, samples
                if key not in trainings:
                    trainings[key] = Training(
                        Ensemble(comm, ranks // members), n, iterations, samples
                    )
                measurements[kind, ranks] = Measurement(
                    Layout(kind, ranks, (n + 1) ** 3, samples), trainings[key], comm
                )
    for repetition in tqdm(range(repetitions + 1), unit="repetition", disable=COMM.rank > 0):
        for measurement in measurements.values():
            gc.collect()
            wait()
            if measurement is not None:
                measurement.run() if repetition else measurement.warm_up()
            wait()
    for (kind, _), measurement in measurements.items():
        if measurement is not None:
            measurement.finish(measurements[kind, 1])
    return [measurement.layout for measurement in measurements.values() if measurement is not None]


# The model
# ---------
# A step takes what its unknowns take on a processor of which all cores are busy, and messages. An
# iteration has two reductions, a tree of messages each, and a halo exchange with six neighbours, as
# cubes have; a step of the network has an exchange of wider halos, forward and backward, and before
# it, as before a solve, a reduction by which ranks agree. Nothing overlaps. Work is shared evenly.
#
# Efficiencies are against a rank whose neighbours are as busy: what cores of a processor take from
# each other is in its constants.


@dataclass
class Model:
    """Seconds of a training step.

    Attributes
    ----------
    iteration, network : float
        Seconds of an unknown, in an iteration of the solver and in a network's step forward and
        backward.
    weights : int
        Parameters of the network.
    iterations : int
        Of a solve.
    latency, bandwidth : float
        Of a message between nodes, seconds and bytes a second.
    """

    iteration: float
    network: float
    weights: int
    iterations: int
    latency: float
    bandwidth: float

    def step(self, dofs: int, samples: int, ranks: int, members: int) -> float:
        """On ``ranks`` in all, of which ``ranks/members`` share a mesh."""
        sharing = ranks // members
        mine, batch = dofs / sharing, max(1.0, samples / members)
        tree = np.log2(sharing) * self.latency
        surface = 6 * mine ** (2 / 3) if sharing > 1 else 0.0
        neighbours = 6 * self.latency if sharing > 1 else 0.0
        solve = self.iterations * (
            mine * self.iteration + 2 * tree + neighbours + 8 * surface / self.bandwidth
        )
        exchange = neighbours + 8 * HIDDEN * batch * surface / self.bandwidth
        reduction = (
            2 * (np.log2(ranks) * self.latency + 4 * self.weights / self.bandwidth)
            if ranks > 1
            else 0.0
        )
        agreement = (STEPS + 1) * tree
        return (
            2 * batch * solve
            + batch * mine * self.network
            + 2 * STEPS * exchange
            + agreement
            + reduction
        )

    def efficiency(self, dofs: int, ranks: int, members: int) -> float:
        """Of batches of ``SAMPLES``, against one rank."""
        return self.step(dofs, SAMPLES, 1, 1) / ranks / self.step(dofs, SAMPLES, ranks, members)


def fitted(layouts: list[Layout], iterations: int, latency: float, bandwidth: float) -> Model:
    """With all ranks busy: by the layout in which each has a mesh of its own."""
    layout = next(layout for layout in reversed(layouts) if layout.kind == "samples, weak")
    work = layout.work / layout.ranks
    weights = (
        STEPS * (5 + 1) * 2 * HIDDEN**2
    )  # those inside of the graph network: the others are few
    solver = layout.parts["solver"] + layout.parts["halos"] + layout.parts["dot products"]
    return Model(
        1e-3 * solver / (2 * iterations * work),
        1e-3 * layout.parts["rest"] / work,
        weights,
        iterations,
        latency,
        bandwidth,
    )


# Showing
# -------


def time_table(layouts: list[Layout]) -> str:
    lines = [
        (
            "| ranks share | ranks | dofs | samples | forward ms | backward ms | step ms |"
            " speed-up: forward | backward | step |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {layout.kind} | {layout.ranks} | {layout.dofs:,} | {layout.samples} |"
        f" {layout.forward:.1f} | {layout.backward:.1f} | {layout.step:.1f} |"
        f" {' | '.join(f'{value:.2f}' for value in layout.speed_up.values())} |"
        for layout in layouts
    ]
    return "\n".join(lines)


def part_table(layouts: list[Layout]) -> str:
    """Milliseconds of all ranks together, as percentages of a step of one rank with the same work:
    what is above 100 is lost.

    Means of steps, where the efficiency is a median of ratios.
    """
    lines = [
        f"| ranks share | ranks | {' | '.join(PARTS)} | efficiency |",
        f"| --- | ---: |{' ---: |' * (len(PARTS) + 1)}",
    ]
    for layout in layouts:
        alone = next(other for other in layouts if other.kind == layout.kind)
        whole = sum(alone.parts.values()) * layout.work / alone.work / layout.ranks
        lines.append(
            f"| {layout.kind} | {layout.ranks} |"
            f" {' | '.join(f'{layout.parts[name] / whole:.1%}' for name in PARTS)} |"
            f" {layout.speed_up['step'] / layout.ranks:.0%} |"
        )
    return "\n".join(lines)


def model_table(model: Model) -> str:
    lines = [
        (
            "| dofs | samples | ranks | all share the mesh | members of 64 ranks | members of one"
            " rank |"
        ),
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for dofs in (10**6, 10**7, 10**8):
        for ranks in (64, 256, 1024, 4096):
            cells = [
                f"{model.efficiency(dofs, ranks, members):.0%}"
                for members in (1, ranks // 64, ranks)
            ]
            lines.append(f"| {dofs:,} | {SAMPLES} | {ranks:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = dict(zip(PARTS, ("#0072B2", "#56B4E9", "#009E73", "#D55E00", "#F0E442", "0.75")))


def draw(layouts: list[Layout], model: Model, path: Path) -> None:
    """Speed-ups, what a step is made of, and the model."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    most = max(layout.ranks for layout in layouts)
    left.plot([1, most], [1, most], color="black", linewidth=0.8, label="ideal")
    for kind, style in zip(KINDS, ("o-", "o--", "s-", "s--")):
        points = [
            (layout.ranks, layout.speed_up["step"]) for layout in layouts if layout.kind == kind
        ]
        left.plot(
            *zip(*points),
            style,
            color="#0072B2" if kind.startswith("mesh") else "#D55E00",
            label=kind,
        )
    left.set(
        xlabel="ranks", ylabel="work per time, of one rank's", title="A training step, measured"
    )
    left.set_xticks(sorted({layout.ranks for layout in layouts}))
    left.legend(frameon=False)
    places = {(layout.kind, layout.ranks): place for place, layout in enumerate(layouts)}
    bottom = np.zeros(len(layouts))
    for name in PARTS:
        heights = np.array(
            [layout.parts[name] * layout.ranks / layout.work * 1e3 for layout in layouts]
        )
        middle.bar(range(len(layouts)), heights, 0.8, bottom, color=COLOURS[name], label=name)
        bottom += heights
    middle.set_xticks(
        list(places.values()),
        [f"{kind}, {ranks}" for kind, ranks in places],
        rotation=40,
        ha="right",
        fontsize=8,
    )
    middle.set(
        ylabel="µs of all ranks / unknown and sample",
        title="What it is made of",
        ylim=(0, 1.35 * bottom.max()),
    )
    middle.legend(frameon=False, ncols=2, fontsize=8)
    ranks = 2 ** np.arange(0, 13)
    for name, most, colour in (
        ("a mesh shared by all", 4096, "#0072B2"),
        ("members of 64 ranks", 64, "#009E73"),
    ):
        for dofs, style in ((10**6, "-"), (10**7, "--")):
            values = [model.efficiency(dofs, p, max(1, p // most)) for p in ranks.tolist()]
            right.semilogx(
                ranks, values, style, base=2, color=colour, label=f"{name}, {dofs:,} dofs"
            )
    right.set(
        xlabel="ranks",
        ylabel="parallel efficiency",
        ylim=(0, 1.05),
        title=f"The model, batches of {SAMPLES}",
    )
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--cells",
        type=count,
        default=46,
        metavar="N",
        help="cells along a side of the cube (default: 46, 103,823 dofs)",
    )
    parser.add_argument(
        "--iterations",
        type=count,
        default=20,
        metavar="K",
        help="of a solve, forward or adjoint (default: 20)",
    )
    parser.add_argument("--batch", type=count, default=4, metavar="B", help="samples (default: 4)")
    parser.add_argument(
        "--repetitions",
        type=count,
        default=15,
        metavar="R",
        help="training steps of each layout (default: 15)",
    )
    parser.add_argument(
        "--latency",
        type=float,
        default=2e-6,
        metavar="S",
        help="of the network in the model, seconds (default: 2e-6)",
    )
    parser.add_argument(
        "--bandwidth",
        type=float,
        default=12.5e9,
        metavar="BYTES",
        help="the same, bytes a second (default: 12.5e9)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="11 cells along a side, and 3 repetitions"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parent / "output",
        metavar="DIR",
        help="where results and the figure are put (default: output beside this script)",
    )
    arguments, _ = parser.parse()
    if arguments.quick:
        arguments.cells, arguments.repetitions = 11, 3
    if COMM.size & (COMM.size - 1):
        parser.error(f"the number of ranks must be a power of two, found {COMM.size}")
    if (
        arguments.cells < 4
        or arguments.batch < COMM.size
        or min(arguments.iterations, arguments.repetitions) < 1
    ):
        parser.error(
            "--cells must be at least 4, --batch at least the number of ranks, --iterations and"
            " --repetitions at least 1"
        )
    parser.make_folder(arguments.output)
    PETSc.Log.begin()
    layouts = measure(arguments.cells, arguments.iterations, arguments.batch, arguments.repetitions)
    if COMM.rank == 0:
        layouts.sort(key=lambda layout: (KINDS.index(layout.kind), layout.ranks))
        model = fitted(layouts, arguments.iterations, arguments.latency, arguments.bandwidth)
        print(f"\n{arguments.iterations} iterations, medians of {arguments.repetitions}")
        print(f"\n{time_table(layouts)}\n\n{part_table(layouts)}\n\n{model_table(model)}\n")
        results = {
            "arguments": {**vars(arguments), "output": arguments.output.name},
            "model": asdict(model),
            "layouts": [asdict(layout) for layout in layouts],
        }
        (arguments.output / "scaling.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(layouts, model, arguments.output / "scaling.png")
        print(f"scaling.json and scaling.png are in {os.path.relpath(arguments.output)}")


if __name__ == "__main__":
    main()
