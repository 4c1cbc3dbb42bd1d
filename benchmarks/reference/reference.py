"""The same heat step in JAX, as the code of the PRDP paper does it and as sparse as JAX can have
it, and with this package.

A batch of 25 samples of 900 unknowns, 20 Jacobi iterations forward and 20 backward, in double and
in single precision:

* JAX, dense: products with the dense matrix, as in the paper's code (restated here, not copied), by
  JAX's derivative of the iterations ("unrolled") or by the implicit one;
* JAX, BCOO: a sparse matrix of jax.experimental.sparse;
* JAX, stencil: the five points of the grid, written by hand;
* prdp_fem: finite elements by Firedrake, PETSc's Richardson iteration with Jacobi's preconditioner,
  as a layer of a torch network.

All of them solve the same system, which is checked, as are solutions and gradients, before anything
is timed. Then they take turns, in one process on one core, with everything compiled.

Times are those of the processor. With nothing to wait for on one core they are those of the clock,
but for what other processes take; the ratio of the two is told, too.

After that, whole training runs, each in a process of its own on the same core: a small network
before the solver, 20 levels from one iteration to twenty, at the same epochs for all. In JAX,
unrolled iterations are compiled again at each level, since their number is a constant of what is
compiled; with an implicit derivative it need not be. prdp_fem also runs with empty caches of
kernels.

    python reference.py                about four minutes
    python reference.py --quick        under a minute: few repetitions, two training runs
    python reference.py --no-training  the batch alone, under a minute
    python reference.py --docs         also puts tables and figure into docs/reference.md

It needs JAX, from the extra "benchmarks": EXTRAS=torch,demos,test,benchmarks ./install.sh
"""

import argparse
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from heat_step import (
    BATCH,
    ITERATIONS,
    LEVELS,
    NODES,
    PRECISIONS,
    SAMPLES,
    TOLERANCE,
    UNKNOWNS,
    WIDTH,
    fields,
    jacobi,
    pin,
    processor_time,
)

import numpy as np  # isort: skip

OURS = "prdp_fem, implicit"
PAPER = "JAX: dense, unrolled"
BY_HAND = "JAX: stencil, implicit"
SPARSE_MATRIX = "JAX: BCOO, implicit"

# One batch
# ---------

SHORTEST = 0.05  # seconds that one measurement takes


def make_contestants(precisions: tuple[str, ...]) -> dict[tuple[str, str], Callable]:
    """By name and precision, functions that take one of two batches forward and backward and return
    solutions and gradients.
    """
    import in_jax  # each loads what the training runs of the other must not wait for
    import in_prdp_fem

    samples = fields(2 * BATCH).reshape(2, BATCH, UNKNOWNS)
    difference = in_prdp_fem.check_matrix()
    if not difference < 1e-14:
        raise RuntimeError(
            f"the operator of finite elements is not that of finite differences: {difference:.1e}"
            " apart, relative"
        )
    contestants = {}
    for precision in precisions:
        for name in in_jax.SOLVERS:
            contestants[f"JAX: {name}", precision] = in_jax.contestant(name, samples, precision)
        for name in in_prdp_fem.VARIANTS:
            contestants[f"prdp_fem, {name}", precision] = in_prdp_fem.contestant(
                name, samples, precision
            )
    solutions = [jacobi(sample) for sample in samples]
    gradients = [jacobi(u) for u in solutions]  # those of |u|²/2
    for (name, precision), run in contestants.items():
        for batch in range(2):
            for what, found, expected in zip(
                ("solutions", "gradients"), run(batch), (solutions[batch], gradients[batch])
            ):
                agree(f"{what} of {name} in {precision}", found, expected, TOLERANCE[precision])
    return contestants


def agree(what: str, found, expected, tolerance: float) -> None:
    """Raise unless an array is what is expected, up to a relative tolerance."""
    difference = np.linalg.norm(np.asarray(found, "float64") - expected) / np.linalg.norm(expected)
    if not difference <= tolerance:
        raise RuntimeError(
            f"{what} are {difference:.1e} from the reference, relative, where {tolerance:.0e} is"
            " allowed: what is not the same cannot be compared by its time"
        )


def elapsed(function: Callable, calls: int) -> np.ndarray:
    """Seconds per call, by the processor and by the clock."""
    start = np.array([time.process_time(), time.perf_counter()])
    for call in range(calls):
        function(call % 2)
    return (np.array([time.process_time(), time.perf_counter()]) - start) / calls


def measure(
    contestants: dict[tuple[str, str], Callable], repetitions: int
) -> dict[tuple[str, str], list[np.ndarray]]:
    """Seconds per batch of each, by the processor and by the clock, in each repetition; they take
    turns.
    """
    calls = {key: math.ceil(SHORTEST / elapsed(run, 2)[0]) for key, run in contestants.items()}
    seconds = {key: [] for key in contestants}
    gc.collect()
    gc.freeze()
    for _ in range(repetitions):
        for key, run in contestants.items():
            gc.collect()
            gc.disable()
            seconds[key].append(elapsed(run, calls[key]))
            gc.enable()
    gc.unfreeze()
    return seconds


def batch_rows(seconds: dict[tuple[str, str], list[np.ndarray]]) -> list[dict]:
    """Medians in milliseconds, and what they are relative to prdp_fem's in the same precision."""
    medians = {key: np.median(measured, axis=0) for key, measured in seconds.items()}
    rows = []
    for name in dict.fromkeys(name for name, _ in seconds):
        row = {"name": name, "processor_seconds": {}, "clock_seconds": {}}
        for precision in dict.fromkeys(precision for _, precision in seconds):
            by_processor, by_clock = medians[name, precision]
            row |= {
                f"{precision}_ms": 1e3 * by_processor,
                f"{precision}_over_ours": by_processor / medians[OURS, precision][0],
                f"{precision}_ms_by_the_clock": 1e3 * by_clock,
            }
            row["processor_seconds"][precision], row["clock_seconds"][precision] = np.transpose(
                seconds[name, precision]
            ).tolist()
        rows.append(row)
    return rows


# Training
# --------

COLD = "prdp_fem, implicit, empty caches"
RUNS = (
    PAPER,
    "JAX: dense, implicit",
    "JAX: stencil, unrolled",
    BY_HAND,
    OURS,
    "prdp_fem, unrolled",
    COLD,
)
# What the losses of all runs may differ by at the end. In single precision, rounding errors grow to
# a percent in some hundred steps.
LOSS_TOLERANCE = {"float64": 1e-6, "float32": 5e-2}


def train(name: str, precision: str, epochs_per_level: int) -> dict:
    """A training run in this process, where nothing is imported yet; to be called once."""
    start = processor_time()
    if name.startswith("JAX"):
        import in_jax as way
    else:
        import in_prdp_fem as way
    importing = processor_time() - start
    variant = name.removeprefix("JAX: ").removeprefix("prdp_fem, ").removesuffix(", empty caches")
    result = way.train(variant, precision, epochs_per_level)
    return {"name": name, "precision": precision, "importing": importing, **result}


def train_elsewhere(name: str, precision: str, epochs_per_level: int) -> dict:
    """A training run in a process of its own."""
    command = [sys.executable, __file__, "--train", name, precision, str(epochs_per_level)]
    with tempfile.TemporaryDirectory() as folder:
        caches = (
            ("PYOP2_CACHE_DIR", "FIREDRAKE_TSFC_KERNEL_CACHE_DIR", "XDG_CACHE_HOME")
            if name == COLD
            else ()
        )
        result = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {cache: folder for cache in caches},
        )
    if result.returncode:
        sys.exit(f"the training run failed: {name} in {precision}")
    return json.loads(result.stdout.splitlines()[-1])


def training_rows(runs: list[dict]) -> list[dict]:
    """Medians over the rounds. Raises where losses at the end differ."""
    rows = []
    for precision in dict.fromkeys(run["precision"] for run in runs):
        here = [run for run in runs if run["precision"] == precision]
        expected = here[0]["losses"][-1]
        for run in here:
            loss = run["losses"][-1]
            if not abs(loss / expected - 1) < LOSS_TOLERANCE[precision]:
                raise RuntimeError(
                    f"the last loss in {precision} of {run['name']} is {loss}, that of"
                    f" {here[0]['name']} {expected}: what is not the same cannot be compared by its"
                    " time"
                )
        for name in dict.fromkeys(run["name"] for run in here):
            row = {
                "name": name,
                "precision": precision,
                "loss": next(run["losses"][-1] for run in here if run["name"] == name),
            }
            for part in ("importing", "compiling", "training"):
                row[part] = statistics.median(run[part] for run in here if run["name"] == name)
            row["all"] = row["compiling"] + row["training"]
            rows.append(row)
    return rows


# Showing
# -------


def table(head: list[str], lines: list[list[str]], names: int) -> str:
    """A Markdown table; the first columns hold names."""
    widths = [max(map(len, column)) for column in zip(head, *lines)]
    align = [str.ljust] * names + [str.rjust] * (len(head) - names)
    texts = [
        "| " + " | ".join(pad(cell, width) for pad, cell, width in zip(align, line, widths)) + " |"
        for line in [head, *lines]
    ]
    rule = (
        "| "
        + " | ".join(
            "-" * (width - (pad is str.rjust)) + ":" * (pad is str.rjust)
            for pad, width in zip(align, widths)
        )
        + " |"
    )
    return "\n".join([texts[0], rule, *texts[1:]])


def batch_table(rows: list[dict], precisions: tuple[str, ...]) -> str:
    head = ["one batch, forward and backward"]
    for precision in precisions:
        head += [f"{precision} ms", "of prdp_fem's"]
    lines = [
        [row["name"]]
        + [
            text
            for precision in precisions
            for text in (f"{row[f'{precision}_ms']:.2f}", f"{row[f'{precision}_over_ours']:.2f}")
        ]
        for row in rows
    ]
    return table(head, lines, 1)


def training_table(rows: list[dict]) -> str:
    head = [
        "training run",
        "precision",
        "compiling s",
        "training s",
        "both s",
        "imports s",
        "last loss",
    ]
    parts = ("compiling", "training", "all", "importing")
    lines = [
        [
            row["name"],
            row["precision"],
            *(f"{row[part]:.1f}" for part in parts),
            f"{row['loss']:.5f}",
        ]
        for row in rows
    ]
    return table(head, lines, 2)


def batch_words(rows: list[dict], precisions: tuple[str, ...]) -> str:
    """What the table says, in sentences."""
    by_name = {row["name"]: row for row in rows}
    sentences = []
    for precision in precisions:
        ours, paper, matrix, stencil = (
            by_name[name][f"{precision}_ms"] for name in (OURS, PAPER, SPARSE_MATRIX, BY_HAND)
        )
        sentences.append(
            f"In {WORDS[precision]} precision a batch takes prdp_fem {ours:.1f} ms, and the paper's"
            f" dense way in JAX {paper:.1f} ms, {compared(paper, ours)}; JAX with a sparse matrix"
            f" (BCOO, implicit) takes {matrix:.1f} ms, {compared(matrix, ours)}, and with the"
            f" stencil by hand (implicit) {stencil:.2f} ms, {compared(stencil, ours)}."
        )
    return " ".join(sentences)


def training_words(rows: list[dict]) -> str:
    sentences = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        by_name = {row["name"]: row for row in rows if row["precision"] == precision}
        ours, paper = by_name[OURS], by_name[PAPER]
        sentences.append(
            f"Imports aside, a training run in {WORDS[precision]} precision takes prdp_fem"
            f" {ours['all']:.1f} s and the paper's way {paper['all']:.1f} s,"
            f" {compared(paper['all'], ours['all'])}; {paper['compiling']:.1f} s of that is"
            " compiling."
        )
        if BY_HAND in by_name:
            stencil = by_name[BY_HAND]["all"]
            sentences.append(
                f"The stencil by hand, with an implicit derivative, takes {stencil:.1f} s,"
                f" {compared(stencil, ours['all'])}."
            )
    return " ".join(sentences)


def describe(results: dict) -> str:
    """Tables, and what is in them."""
    rows = results["batch"]
    trainings = results["training"]
    precisions = results["precisions"]
    versions = results["versions"]
    slowdown = max(
        row[f"{precision}_ms_by_the_clock"] / row[f"{precision}_ms"]
        for row in rows
        for precision in precisions
    )
    libraries = {
        "JAX": "jax",
        "PETSc": "petsc4py",
        "Firedrake": "firedrake",
        "PyTorch": "torch",
        "Python": "python",
    }
    paragraphs = [
        f"One core of {results['processor']}, medians of {results['repetitions']} repetitions in"
        f" which all take turns, in processor time; by the clock they are up to {slowdown:.2f}"
        " times that. "
        + ", ".join(f"{name} {versions[key]}" for name, key in libraries.items())
        + ".",
        batch_table(rows, precisions),
        batch_words(rows, precisions),
    ]
    if trainings:
        epochs, rounds = results["epochs_per_level"], results["rounds"]
        updates = LEVELS * epochs * SAMPLES // BATCH
        paragraphs += [
            (
                f"Training a network of {UNKNOWNS}, {WIDTH} and {UNKNOWNS} nodes: {updates} updates"
                f" by Adam, {LEVELS} levels of {epochs} epoch{'s' if epochs > 1 else ''}, in"
                f" seconds of processor time{f', medians of {rounds} runs' if rounds > 1 else ''}:"
            ),
            training_table(trainings),
            training_words(trainings),
        ]
    return "\n\n".join(paragraphs)


WORDS = {"float64": "double", "float32": "single"}


def compared(time: float, ours: float) -> str:
    return (
        f"{time / ours:.1f} times as long"
        if time >= ours
        else f"{ours / time:.1f} times faster than prdp_fem"
    )


COLOURS = {"float64": "#0072B2", "float32": "#56B4E9"}


def draw(batch: list[dict], training: list[dict], precisions: tuple[str, ...], path: Path) -> None:
    """Milliseconds per batch, and seconds per training run."""
    from matplotlib.figure import Figure

    names = [row["name"] for row in batch]
    runs = list(dict.fromkeys(row["name"] for row in training))
    figure = Figure(figsize=(12 if runs else 6.5, 0.4 * len(names) + 1.4), layout="constrained")
    panels = figure.subplots(1, 2 if runs else 1, squeeze=False)[0]
    for precision in precisions:
        panels[0].semilogx(
            [row[f"{precision}_ms"] for row in batch],
            range(len(names)),
            "o",
            color=COLOURS[precision],
            label=precision,
        )
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set(
        xlabel="milliseconds",
        title=f"One batch: {ITERATIONS} iterations forward, {ITERATIONS} backward",
    )
    panels[0].grid(alpha=0.25)
    panels[0].legend(frameon=False, loc="lower right")
    if runs:
        present = list(dict.fromkeys(row["precision"] for row in training))
        for place, precision in enumerate(present):
            rows = [row for row in training if row["precision"] == precision]
            heights = [k + 0.4 * (place - (len(present) - 1) / 2) for k in range(len(rows))]
            working = [row["training"] for row in rows]
            compiling = [row["compiling"] for row in rows]
            panels[1].barh(heights, working, 0.36, color=COLOURS[precision], label=precision)
            panels[1].barh(
                heights,
                compiling,
                0.36,
                left=working,
                color="white",
                edgecolor=COLOURS[precision],
                hatch="////",
                label=f"{precision}, compiling",
            )
        panels[1].set_yticks(range(len(runs)), runs)
        panels[1].set(xlabel="seconds", title=f"A training run through {LEVELS} levels")
        panels[1].legend(frameon=False, loc="lower right")
    for axes in panels:
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


DOCS = Path(__file__).resolve().parents[2] / "docs"
BEGIN, END = "<!-- begin: written by benchmarks/reference/reference.py --docs -->", "<!-- end -->"


def put_into_docs(text: str) -> None:
    page = DOCS / "reference.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{page} has no lines '{BEGIN}' and '{END}' to write between")
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


# The command line
# ----------------


def count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, found {text}")
    return int(text)


def main() -> None:
    if len(sys.argv) == 5 and sys.argv[1] == "--train":
        # one run of train_elsewhere, which has pinned it
        print("\n" + json.dumps(train(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="default: both",
    )
    parser.add_argument(
        "--repetitions",
        type=count,
        metavar="N",
        help="how often each takes the batch (default: 15; 3 with --quick)",
    )
    parser.add_argument(
        "--epochs-per-level",
        type=count,
        metavar="N",
        help="epochs of training at each level (default: 3; 1 with --quick)",
    )
    parser.add_argument(
        "--rounds",
        type=count,
        default=1,
        metavar="N",
        help="how often each training run is made (default: 1)",
    )
    parser.add_argument(
        "--no-training", action="store_true", help="only one batch, forward and backward"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=(
            "few repetitions; and of training runs only the paper's way and prdp_fem, in double"
            " precision"
        ),
    )
    parser.add_argument(
        "--core",
        type=int,
        metavar="N",
        help="the processor's core to run on (default: the last one)",
    )
    parser.add_argument(
        "--docs", action="store_true", help=f"put tables and figure into {os.path.relpath(DOCS)}"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "output",
        metavar="DIR",
        help="where results and the figure are put (default: benchmarks/output)",
    )
    arguments = parser.parse_args()
    if arguments.docs and (
        arguments.quick or arguments.no_training or set(arguments.precisions) != set(PRECISIONS)
    ):
        parser.error("--docs is for whole runs, in both precisions")
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot put results into {arguments.output}: {error.strerror}")
    load = os.getloadavg()[0]
    try:
        core = pin(arguments.core)
    except OSError:
        parser.error(f"there is no core {arguments.core} for this process")
    precisions = tuple(dict.fromkeys(arguments.precisions))
    repetitions = arguments.repetitions or (3 if arguments.quick else 15)
    epochs_per_level = arguments.epochs_per_level or (1 if arguments.quick else 3)

    from tqdm import tqdm

    start = time.perf_counter()
    try:
        contestants = make_contestants(precisions)
    except ModuleNotFoundError as error:
        sys.exit(
            f"{error}: install the extra 'benchmarks', by EXTRAS=torch,demos,test,benchmarks"
            " ./install.sh"
        )
    rows = batch_rows(measure(contestants, repetitions))
    works = (
        []
        if arguments.no_training
        else [(name, precision) for precision in precisions for name in RUNS]
    )
    if arguments.quick:
        works = [
            (name, precision)
            for name, precision in works
            if name in (PAPER, OURS) and precision == precisions[0]
        ]
    bar, runs = tqdm(works * arguments.rounds, unit="run", disable=not works), []
    for name, precision in bar:
        bar.set_description(f"{name}, {precision}")
        runs.append(train_elsewhere(name, precision, epochs_per_level))
    trainings = training_rows(runs)

    results = {
        "processor": processor(),
        "core": core,
        "load_before": load,
        "versions": (
            {
                name: version(name)
                for name in ("prdp-fem", "firedrake", "petsc4py", "torch", "jax", "jaxlib", "numpy")
            }
            | {"python": platform.python_version()}
        ),
        "precisions": precisions,
        "repetitions": repetitions,
        "batch": rows,
        "epochs_per_level": epochs_per_level,
        "rounds": arguments.rounds,
        "training": trainings,
        "runs": runs,
    }
    text = describe(results)
    print(
        f"\n{NODES} x {NODES} unknowns, batch of {BATCH}, {ITERATIONS} Jacobi iterations.\n{text}\n"
    )
    (arguments.output / "reference.md").write_text(text + "\n")
    (arguments.output / "reference.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(rows, trainings, precisions, arguments.output / "reference.png")
    print(
        "reference.md, reference.json and reference.png are in"
        f" {os.path.relpath(arguments.output)}; it took {time.perf_counter() - start:.0f} s"
    )
    if load > 0.5:
        print(
            f"Other processes were running when it began (load {load:.1f}): measure again when the"
            " machine is quiet."
        )
    if arguments.docs:
        put_into_docs(text)
        draw(rows, trainings, precisions, DOCS / "reference.png")


if __name__ == "__main__":
    main()
