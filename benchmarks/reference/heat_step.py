"""The heat step that everybody here solves, and what a network is trained on: in plain NumPy, with
a reference solution.

One step of implicit Euler on the unit square, u = 0 at its boundary, on 30 x 30 interior nodes,
diffusivity times time step 1e-3:

    (1 + 4 c) u[i,j] - c (u[i-1,j] + u[i+1,j] + u[i,j-1] + u[i,j+1]) = u0[i,j],
    c = 1e-3/h²,    h = 1/31,

by Jacobi iterations from zero, in batches of 25. These sizes are those of the two-dimensional heat
problem of the PRDP paper.
"""

import os
import time

# One thread, before anything is imported that starts more: which is why this module comes first.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_ENABLE_X64": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}

import numpy as np

NODES = 30
BATCH = 25
ITERATIONS = 20
DIFFUSION = 1e-3
UNKNOWNS = NODES**2
SPACING = 1 / (NODES + 1)
COUPLING = DIFFUSION / SPACING**2
DIAGONAL = 1 + 4 * COUPLING
PRECISIONS = ("float64", "float32")
# up to which solutions and gradients must agree, relative
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


def matrix() -> np.ndarray:
    """The operator, dense."""
    one, between = np.eye(NODES), 2 * np.eye(NODES) - np.eye(NODES, k=1) - np.eye(NODES, k=-1)
    return np.eye(UNKNOWNS) + COUPLING * (np.kron(between, one) + np.kron(one, between))


def jacobi(b: np.ndarray, iterations: int = ITERATIONS) -> np.ndarray:
    """Jacobi iterations from zero, for each row."""
    neighbours = DIAGONAL * np.eye(UNKNOWNS) - matrix()
    u = np.zeros_like(b)
    for _ in range(iterations):
        u = (b + u @ neighbours) / DIAGONAL
    return u


# Training
# --------
# A network makes the first step of two, the solver the second one. From one level to the next the
# solver does one iteration more; when, is laid down beforehand, so that all do the same work.

LEVELS = ITERATIONS
SAMPLES = 200
WIDTH = 128
LEARNING_RATE = 1e-3
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


def fields(count: int, modes: int = 5) -> np.ndarray:
    """Random smooth fields that are zero at the boundary."""
    x = np.linspace(0, 1, NODES + 2)[1:-1]
    sines = np.sin(np.pi * np.outer(np.arange(1, modes + 1), x))
    amplitudes = np.random.default_rng(1).uniform(-1, 1, (count, modes, modes))
    return np.einsum("kab,ai,bj->kij", amplitudes, sines, sines).reshape(count, UNKNOWNS)


def training_data(precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Initial temperatures, and those after two steps without any error of a solver."""
    initial = fields(SAMPLES)
    step = np.linalg.inv(matrix())
    return initial.astype(precision), (initial @ step @ step).astype(precision)


def initial_weights(precision: str) -> list[np.ndarray]:
    """Matrices (inputs by outputs) and biases of a network with one hidden layer."""
    generator = np.random.default_rng(2)
    sizes = [(UNKNOWNS, WIDTH), (WIDTH, UNKNOWNS)]
    weights = [
        array
        for shape in sizes
        for array in (generator.standard_normal(shape) / np.sqrt(shape[0]), np.zeros(shape[1]))
    ]
    return [array.astype(precision) for array in weights]


def batches(epochs: int) -> list[np.ndarray]:
    """Numbers of the samples of each batch, epoch by epoch."""
    generator = np.random.default_rng(3)
    return [generator.permutation(SAMPLES).reshape(-1, BATCH) for _ in range(epochs)]


# One core
# --------


def pin(core: int | None = None) -> int | None:
    """Keep this process and those that it starts to one core, by default the last one allowed;
    before JAX is imported, which counts them.

    Returns the core, or None where the system cannot do so.
    """
    if not hasattr(os, "sched_setaffinity"):
        return None
    core = max(os.sched_getaffinity(0)) if core is None else core
    os.sched_setaffinity(0, {core})
    return core


def processor_time() -> float:
    """Seconds that a core has worked for this process, compilers it has called included.

    On one core and with nothing to wait for, that is the time by the clock, less what other
    processes take.
    """
    times = os.times()
    return time.process_time() + times.children_user + times.children_system
