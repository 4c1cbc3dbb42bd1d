"""An emulator of viscous Burgers flow in one or two dimensions, trained through a Newton-Krylov
solver.

The emulator is a convolutional network that maps a velocity u0 to the velocity u1 one time step
later. It learns to do so through a solver: the network takes the first step, the solver takes the
second one,

    u0 --network--> u1 --solver--> u2,

and the loss compares u2 with a reference two steps on. A step of the solver is implicit and
nonlinear: it is made of Newton steps, each of them a linear system for GMRES, and its derivative
takes one system more. Converged physics needs four Newton steps of 110 iterations, in two
dimensions of 30. Under progressive refinement (PRDP) it is a single step of four or five iterations
at first.

    python burgers_emulator.py                                          in one dimension; a minute
    python burgers_emulator.py --dimension 2                            in two; two minutes
    python burgers_emulator.py --quick                                  some seconds; or QUICK=1
    mpiexec -n 2 python burgers_emulator.py --dimension 2 --output out  two ranks share the mesh
    mpiexec -n 2 python burgers_emulator.py --ensemble 2                two ranks share the samples
    python burgers_emulator.py --schedules converged prdp 5 10 20 --seed 1 2 3 --resume

A schedule that is a number is so many GMRES iterations throughout, in each of two Newton steps.
Options with a single dash are PETSc's: -physics_pc_type ilu changes the solver, -log_view says
where time goes.
"""

import os
from functools import lru_cache

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure

from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    NewtonLadder,
    NewtonSteps,
    NonlinearVariationalSolver,
    Tolerance,
)
from prdp_fem.studies import (
    Study,
    command_line,
    draw_training,
    incomplete,
    save_figure,
    solver_parameters,
)
from prdp_fem.torch import Gathering, ResNet, SolverLayer, deal, total, train

SOLVERS = {
    "gmres": {"ksp_type": "gmres", "pc_type": "jacobi"},
    "gmres+ilu": {"ksp_type": "gmres"},
    "bcgs+ilu": {"ksp_type": "bcgs"},
}


def configure(parser):
    parser.add_argument(
        "--dimension",
        type=int,
        choices=(1, 2),
        default=1,
        help="of the domain (default: %(default)s)",
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        default="gmres",
        help=(
            "gmres with Jacobi's preconditioner, the others with an incomplete factorisation, of"
            " each rank's part (default: %(default)s)"
        ),
    )


arguments = command_line(__file__, __doc__, configure=configure)
dimension = arguments.dimension
# its members have the whole mesh each, on ranks of their own (comm), and deal the samples out
ensemble = arguments.ensemble
comm = ensemble.comm
for name in ("gmres+ilu", "bcgs+ilu"):
    SOLVERS[name] |= incomplete("ilu", comm)

# The flow
# --------
# du/dt + (u . grad) u = viscosity*laplace(u) on a periodic domain of unit size, with velocities of
# up to one. The viscosity is such that linear elements resolve the fronts that form: cell Peclet
# numbers are at most 1. The time step is one that an implicit method is chosen for: in one
# dimension fluid crosses up to 13 cells in it, in two dimensions three.

CELLS = {
    1: {"quick": 48, "default": 256, "full": 1024},
    2: {"quick": 12, "default": 28, "full": 96},
}
cells = CELLS[dimension][arguments.size]
viscosity, time_step, modes = (1.28 / cells, 0.05, 5) if dimension == 1 else (0.5 / cells, 0.1, 3)

if dimension == 1:
    mesh = PeriodicUnitIntervalMesh(cells, comm=comm)
    V = FunctionSpace(mesh, "CG", 1)
else:
    mesh = PeriodicUnitSquareMesh(cells, cells, quadrilateral=True, comm=comm)
    V = VectorFunctionSpace(mesh, "CG", 1)

# A step of implicit Euler from u_old to u = u_old + w. It is the increment w that is solved for:
# Newton's method and GMRES both start from w = 0, which is the old velocity, so that a single
# iteration is a rough step already, and all others improve on it.

u_old = Function(V, name="u_old")
w = Function(V, name="increment")
v = TestFunction(V)
u = u_old + w
transport = u * u.dx(0) if dimension == 1 else dot(grad(u), u)
residual = (
    inner(w, v) + time_step * (inner(transport, v) + viscosity * inner(grad(u), grad(v)))
) * dx(degree=3)
problem = NonlinearVariationalProblem(residual, w)


class Step(torch.nn.Module):
    """The step as a layer of a network, from the old velocity to the new one."""

    def __init__(self, refinement, *, solver_parameters, newton_tolerance, **options):
        super().__init__()
        self.solver = NonlinearVariationalSolver(
            problem,
            refinement=refinement,
            warm_start=False,
            solver_parameters={"snes_rtol": newton_tolerance, **solver_parameters},
            **options,
        )
        self.increment = SolverLayer(self.solver, controls=[u_old])

    def forward(self, u):
        return u + self.increment(u)


# How far to solve
# ----------------
# Converged: Newton's method to a residual of 1e-10, and each linear system, too. Progressive
# refinement goes from one Newton step to two, and from two to two with more iterations. Two steps
# leave an error of 0.01 %, far below what the network learns: if it were otherwise, the ladder
# would have to go on to three. Constant numbers of iterations, and constant tolerances, are those
# of two steps as well. A direct solver makes as many steps as converged physics.

NEWTON_TOLERANCE = 1e-10
LEVEL = {1: 5, 2: 4}[dimension]  # iterations, at first and more at each level
ladder = NewtonLadder(start=1, stop=2, linear=IterationLadder(start=LEVEL, step=LEVEL))


def constant(iterations):
    return NewtonSteps(2, Iterations(iterations))


def tolerance(rtol):
    return NewtonSteps(2, Tolerance(rtol))


def make_step(refinement):
    """The step that is trained through; an option with prefix physics_ changes its solver, and not
    that of the reference.
    """
    return Step(
        refinement,
        newton_tolerance=NEWTON_TOLERANCE,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement, SOLVERS[arguments.solver], factorisation="lu", comm=comm
        ),
    )


# The network
# -----------
# It says what to add to the velocity, at first nothing. It computes in single precision, as
# networks do, and the solver in double; the layer between them takes both. The network sees all of
# a velocity on the grid, shape (..., components, n), in an order that does not depend on ranks,
# whereas a rank's solver has only its part of the unknowns.

field = Gathering(V, period=[1] * dimension)


class Emulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        blocks, kernel = (2, 7) if dimension == 1 else (1, 5)
        self.increment = ResNet(
            dimension,
            dimension,
            field.grid,
            width=8,
            blocks=blocks,
            kernel=kernel,
            periodic=True,
            activation=torch.nn.GELU,
        )

    def forward(self, u):
        return u + self.increment(u)


def local(velocity):
    """This rank's part of a whole velocity, in the solver's order."""
    return field.scatter(velocity.squeeze(-2) if dimension == 1 else velocity)


# The data
# --------
# Initial velocities are random Fourier series, scaled to a largest speed of one. All ranks make all
# of them, but each keeps only its part of the reference velocities, which are converged to 1e-12.
# Errors are mean squares, relative to the reference's: on a uniform mesh all nodes weigh the same.

TRAINING, VALIDATION = (20, 10) if arguments.size == "quick" else (100, 50)
torch.set_num_threads(1)
reference_step = Step(
    FixedRefinement(Tolerance(1e-12)),
    newton_tolerance=1e-12,
    solver_parameters=SOLVERS["gmres"],
)
validation = deal(torch.arange(TRAINING, TRAINING + VALIDATION), ensemble)


def initial_velocities(seed):
    """Shape (samples, components, n)."""
    random = np.random.default_rng(seed)
    wavenumbers = np.stack(
        np.meshgrid(*[np.arange(-modes, modes + 1)] * dimension, indexing="ij"), axis=-1
    ).reshape(-1, dimension)
    wavenumbers = wavenumbers[
        len(wavenumbers) // 2 + 1 :
    ]  # one of each pair k and -k, without k = 0
    size = TRAINING + VALIDATION, dimension, len(wavenumbers)
    amplitudes, phases = random.uniform(-1, 1, size), random.uniform(0, 2 * np.pi, size)
    angles = 2 * np.pi * wavenumbers @ field.coordinates.T
    velocities = (amplitudes * np.cos(phases)) @ np.cos(angles) - (
        amplitudes * np.sin(phases)
    ) @ np.sin(angles)
    speeds = np.linalg.norm(velocities, axis=1)
    return torch.from_numpy(velocities / speeds.max(axis=-1)[:, None, None])


class Data:
    """Initial velocities, whole, and reference velocities one and two steps later, of which a rank
    has its part.
    """

    def __init__(self, seed):
        u0 = initial_velocities(seed)
        with torch.no_grad():
            u1 = reference_step(local(u0))
            u2 = reference_step(u1)
        self.u0 = u0.float()
        self.u1 = u1.float()
        self.u2 = u2.float()
        self.norm1, self.norm2 = (
            field.total((reference**2).sum(dim=-1)) for reference in (self.u1, self.u2)
        )

    def squared_errors(self, u2, samples):
        """This rank's part of the relative squared errors."""
        return ((u2 - self.u2[samples]) ** 2).sum(dim=-1) / self.norm2[samples]


data_of = lru_cache(1)(Data)  # by seed: schedules share them


def mean_error(squared_errors):
    """Over all validation samples, from this rank's part of those of its member."""
    return total(squared_errors.sum(), ensemble.global_comm) / VALIDATION


# Training
# --------
# Adam, at a constant learning rate for most of the time, so that networks still learn when physics
# has become finer; in the end it goes down to zero.

EPOCHS = arguments.epochs or {"quick": 25, "default": 60, "full": 120}[arguments.size]
BATCH = 5
# COOLING: the share of epochs in which it goes down
LEARNING_RATE, COOLING = {1: (5e-3, 0.4), 2: (3e-3, 0.3)}[dimension]
AT_ONE_STEP = "error at one step, of the network alone"
CONVERGED_PHYSICS = "error with converged physics"
shown = {}  # a validation sample of each run, for the picture


def train_one(seed, refinement, label):
    data = data_of(seed)
    torch.manual_seed(seed)
    network = Emulator()
    step = make_step(refinement)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda epoch: min(1, (1 - epoch / EPOCHS) / COOLING)
    )

    def loss(samples):
        return data.squared_errors(step(local(network(data.u0[samples]))), samples).mean()

    def validate():
        return mean_error(
            data.squared_errors(step(local(network(data.u0[validation]))), validation)
        ).item()

    # What the network is worth without any physics, which is how it is used in the end, and with
    # converged physics: coarse ones may teach it to make up for the solver's errors. This is
    # measured now and then, and not counted as training.

    def at_one_step():
        difference = local(network(data.u0[validation])) - data.u1[validation]
        return mean_error((difference**2).sum(dim=-1) / data.norm1[validation]).sqrt().item()

    def with_converged_physics():
        u2 = reference_step(local(network(data.u0[validation])))
        return mean_error(data.squared_errors(u2, validation)).sqrt().item()

    history = train(
        network,
        loss,
        validate,
        optimiser=optimiser,
        scheduler=scheduler,
        assess={"in_use": at_one_step, "converged": with_converged_physics},
        refinement=refinement,
        solvers=[step.solver],
        samples=TRAINING,
        batch_size=BATCH,
        epochs=EPOCHS,
        seed=seed,
        ensemble=ensemble,
        label=label,
    )

    with torch.no_grad():
        u2 = reference_step(local(network(data.u0[validation])))
    shown[label] = (
        data.u0[TRAINING],
        *(field.gather(part).view(dimension, -1) for part in (data.u2[TRAINING], u2[0])),
    )
    # those of the last network
    return history, {
        AT_ONE_STEP: history.in_use[-1][1],
        CONVERGED_PHYSICS: history.converged[-1][1],
        "labels": {"in use": "Error of the network alone, at one step"},
    }


times = f", {ensemble.ensemble_size} times" if ensemble.ensemble_size > 1 else ""
PETSc.Sys.Print(
    f"Burgers in {dimension}-D: {V.dim()} unknowns on {comm.size}"
    f" rank{'s' if comm.size > 1 else ''}{times};"
    f" {TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs"
)
study = Study(
    f"burgers_{dimension}d" + (f"_{arguments.solver}" if arguments.solver != "gmres" else ""),
    arguments,
    ladder=ladder,
    constant=constant,
    tolerance=tolerance,
    setup={
        "solver": arguments.solver,
        "unknowns": V.dim(),
        "viscosity": viscosity,
        "time step": time_step,
        "training samples": TRAINING,
        "validation samples": VALIDATION,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
    },
)
runs = study.run(
    train_one,
    trial=lambda refinement: make_step(refinement)(local(initial_velocities(1)[:1])),
)

# The result
# ----------
# Iterations and seconds are those of training and validation together.

study.print_table(runs)
study.print_extras(runs, AT_ONE_STEP, CONVERGED_PHYSICS)


def draw_fields(path, u0, reference, prediction):
    """A validation sample: velocities in one dimension, speeds in two."""
    error = prediction - reference
    if dimension == 1:
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, sharex=True)
        x = field.coordinates[:, 0]
        left.plot(x, u0[0], color="0.6", label="$u_0$, a validation sample")
        left.plot(
            x, reference[0], color="#D55E00", linewidth=3, alpha=0.6, label="$u_2$, the reference"
        )
        left.plot(x, prediction[0], color="#0072B2", label="$u_2$ by network and solver")
        right.plot(x, error[0], color="#0072B2")
        right.set(title="$u_2$ minus the reference")
        left.set(ylim=(-1.6, 1.1))
        left.legend(loc="lower left", fontsize="small")
        for axes in (left, right):
            axes.set(xlabel="x", xlim=(0, 1))
            axes.grid(alpha=0.25)
    else:
        figure = Figure(figsize=(15, 3.8), layout="constrained")
        velocities = {
            "$|u_0|$, a validation sample": u0,
            "$|u_2|$, the reference": reference,
            "$|u_2|$ by network and solver": prediction,
            "$|u_2$ minus the reference$|$": error,
        }
        for axes, (title, velocity) in zip(figure.subplots(1, 4), velocities.items()):
            speed = np.linalg.norm(velocity, axis=0)
            top = speed.max()
            if velocity is prediction or velocity is reference:  # these two share their colours
                top = max(
                    np.linalg.norm(values, axis=0).max() for values in (prediction, reference)
                )
            colours = axes.imshow(
                speed.reshape(field.grid).T,
                origin="lower",
                extent=(0, 1, 0, 1),
                cmap="viridis",
                vmin=0,
                vmax=top,
            )
            axes.set(title=title, xticks=[], yticks=[])
            figure.colorbar(colours, ax=axes, shrink=0.9)
    save_figure(figure, path)


schedule, run = study.representative(runs)


def draw():
    draw_training(runs, study.path("training"))
    if (velocities := shown.get(study.label(schedule, run.seed))) is not None:
        # not where the run comes from a file
        draw_fields(study.path("fields"), *(velocity.numpy() for velocity in velocities))


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
