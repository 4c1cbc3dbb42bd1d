"""A corrector for coarse Navier-Stokes solves in a periodic box, trained through the finite element
solver.

A coarse mesh smears out eddies that a mesh twice as fine resolves. A network learns to make up for
that: after each time step on the coarse mesh it adds a correction to the velocities, and the
corrected ones go into the next step,

    u0 --solver--> --network--> u1 --solver--> --network--> u2,

and the loss compares u1 and u2 with a reference from the fine mesh. The gradient goes back through
the second solve, so each training sample needs two forward and two adjoint solves, and that is
where the time goes. The setting is that of the PRDP paper (Bhatia, Koehler, Thuerey, ICLR 2025): a
unit box, random eddies of velocity 1, viscosity 1e-4, implicit Euler steps of 0.1 with one Picard
iteration, GMRES restarted after 8 iterations. The script trains the same network several times,
from the same weights and with the same batches:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP): each is given 32 iterations at first, and 16 more
  whenever the validation error stops improving, until more iterations no longer help;
* with constant numbers of iterations, where asked for.

It prints what they have reached and what they cost, and draws it:

    python periodic_box.py                            three minutes
    python periodic_box.py --quick                    a quarter of a minute; or QUICK=1
    python periodic_box.py --schedules converged prdp 40 48 56 --seed 1 2 3
    mpiexec -n 2 python periodic_box.py --output out  two ranks share the meshes
    mpiexec -n 2 python periodic_box.py --ensemble 2  two ranks share the samples

Options with a single dash are PETSc's: -log_view, or -physics_pc_type and whatever else configures
the solver with prefix physics_.
"""

import os
from functools import lru_cache

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure

from prdp_fem import IterationLadder, LinearVariationalSolver
from prdp_fem.studies import (
    CONVERGED,
    Study,
    command_line,
    draw_training,
    save_figure,
    solver_parameters,
)
from prdp_fem.torch import Gathering, ResNet, SolverLayer, deal, total, train

# The paper's GMRES has no preconditioner. Here it has the cheapest there is for such a matrix, the
# inverses of the 3 x 3 blocks on its diagonal, which are the same on any number of ranks; or an
# incomplete factorisation, of each rank's part.

SOLVERS = {
    "gmres": {"ksp_type": "gmres", "ksp_gmres_restart": 8, "pc_type": "pbjacobi"},
    "gmres+ilu": {"ksp_type": "gmres", "ksp_gmres_restart": 60, "pc_type": "bjacobi"},
}
arguments = command_line(
    __file__,
    __doc__,
    configure=lambda parser: parser.add_argument(
        "--solver", choices=SOLVERS, default="gmres", help="(default: %(default)s)"
    ),
)
# its members have whole meshes each, on ranks of their own (comm), and deal the samples out
ensemble = arguments.ensemble
comm = ensemble.comm
torch.set_num_threads(1)

# in each direction; the reference has twice as many
CELLS = {"quick": 12, "default": 32, "full": 48}[arguments.size]
TRAINING, VALIDATION = {"quick": (8, 8), "default": (40, 50), "full": (200, 50)}[arguments.size]
EPOCHS = arguments.epochs or {"quick": 12, "default": 40, "full": 100}[arguments.size]
WIDTH, BLOCKS = {"quick": (8, 1), "default": (16, 1), "full": (64, 3)}[arguments.size]
BATCH, LEARNING_RATE = 2, 5e-3 if arguments.size != "full" else 1e-3
LADDER = (
    IterationLadder(start=16, step=8)
    if arguments.size == "quick"
    else IterationLadder(start=32, step=16)
)

# The flow
# --------
# An implicit Euler step from the velocity u_old to u_old + w, advected by the old velocity: that is
# one Picard iteration, and linear in w and the new pressure p. All three components are piecewise
# linear and belong to the same nodes, so that the matrix consists of blocks of 3 x 3. What such
# elements need is added in proportion to the residual of the momentum equation: along the flow
# (SUPG) because there is hardly any viscosity, and along pressure gradients (PSPG) because the
# pressure would oscillate; and a penalty on the divergence. The iteration starts at w = 0 and p =
# 0, which is the old velocity.
#
# The pressure is determined up to a constant, in the solution as well as in the equations.

VISCOSITY, TIME_STEP = 1e-4, 0.1


class Flow:
    """The problem of a step on a mesh, and the order in which networks see its unknowns."""

    def __init__(self, cells):
        self.mesh = PeriodicUnitSquareMesh(cells, cells, comm=comm)
        V = VectorFunctionSpace(self.mesh, "CG", 1, dim=2)
        W = VectorFunctionSpace(self.mesh, "CG", 1, dim=3)
        trial, test = TrialFunction(W), TestFunction(W)
        w, p = as_vector([trial[0], trial[1]]), trial[2]
        v, q = as_vector([test[0], test[1]]), test[2]
        self.u_old, solution = Function(V, name="u_old"), Function(W, name="increment and pressure")
        u, h = self.u_old, 1 / cells

        def advected(f):
            return dot(u, nabla_grad(f))

        def weak(residual, f):
            """The momentum equation's residual, viscosity aside, and what of f enters the rest."""
            tau = 1 / sqrt(
                (2 / TIME_STEP) ** 2 + 4 * dot(u, u) / h**2 + (4 * VISCOSITY / h**2) ** 2
            )
            return (
                dot(residual, v)
                + 0.5 * div(u) * dot(f, v)
                + VISCOSITY * inner(grad(f), grad(v))
                + div(f) * q
                + tau * dot(residual, advected(v) + grad(q))
                + h * div(f) * div(v)
            ) * dx(degree=2)

        a = weak(w / TIME_STEP + advected(w) + grad(p), w)
        L = -weak(advected(u), u)
        self.problem = LinearVariationalProblem(a, L, solution)
        constant_pressure = Function(W)
        constant_pressure.sub(2).assign(1)
        self.nullspace = VectorSpaceBasis([constant_pressure])
        self.nullspace.orthonormalize()
        self.velocity, self.unknowns = Gathering(V, period=(1, 1)), Gathering(W, period=(1, 1))


class Step(torch.nn.Module):
    """The step as a layer of a network: from old velocities, shape (..., 2, n), to new ones and the
    pressure, (..., 3, n).
    """

    def __init__(self, flow, **options):
        super().__init__()
        self.flow = flow
        self.solver = LinearVariationalSolver(
            flow.problem, nullspace=flow.nullspace, transpose_nullspace=flow.nullspace, **options
        )
        self.layer = SolverLayer(self.solver, controls=[flow.u_old])

    def forward(self, u):
        solution = self.flow.unknowns.gather(self.layer(self.flow.velocity.scatter(u)))
        return solution + torch.nn.functional.pad(u, (0, 0, 0, 1))


# References, and what is measured with converged physics.

ACCURATE = {**SOLVERS["gmres+ilu"], "ksp_rtol": 1e-8}
coarse, fine = Flow(CELLS), Flow(2 * CELLS)
coarse_step = Step(coarse, solver_parameters=ACCURATE)
fine_step = Step(fine, solver_parameters=ACCURATE)
grid, n = coarse.velocity.grid, len(coarse.velocity)

# The data
# --------
# Initial velocities are smoothed white noise without divergence: the curl of a random stream
# function, scaled to components of mean square 1. Training takes two steps, validation five. All
# ranks have all of the data, on the coarse mesh's nodes, which are every other one of the fine
# mesh's.

STEPS = 5
# diffusivity times time: what is left of the noise is a few cells across
MODES, SMOOTHING = CELLS // 2, 0.8 / CELLS**2


def initial_velocities(seed, samples):
    k = np.arange(-MODES, MODES + 1)
    size = np.hypot(*np.meshgrid(k, k))
    size[MODES, MODES] = np.inf  # there is no mean flow
    parts = np.random.default_rng(seed).standard_normal((2, samples, *size.shape))
    stream = (parts[0] + 1j * parts[1]) * np.exp(-SMOOTHING * (2 * np.pi * size) ** 2) / size
    # the derivatives by y and x, which is numbered by rows
    modes = np.stack([1j * k * stream, -1j * k[:, None] * stream], axis=1)
    waves = np.exp(2j * np.pi * np.outer(k, np.arange(2 * CELLS) / (2 * CELLS)))
    u = np.einsum("sckl,ki,lj->scij", modes, waves, waves, optimize=True).real.reshape(
        samples, 2, -1
    )
    return torch.from_numpy(u / np.sqrt((u**2).mean(axis=(1, 2), keepdims=True)))


def on_coarse_nodes(u):
    return u.unflatten(-1, fine.velocity.grid)[..., ::2, ::2].flatten(-2)


@lru_cache(1)
def reference(seed):
    """Velocities, shape (samples, 1 + STEPS, 2, n), and their squared norms; zero behind the second
    step for training.
    """
    u = initial_velocities(seed, TRAINING + VALIDATION)
    velocities = torch.zeros(len(u), 1 + STEPS, 2, n, dtype=torch.float64)
    with torch.no_grad():
        velocities[:, 0] = on_coarse_nodes(u)
        for step in range(1, 1 + STEPS):
            u = fine_step(u if step <= 2 else u[-VALIDATION:])[:, :2]
            velocities[-len(u) :, step] = on_coarse_nodes(u)
    return velocities, (velocities**2).sum(dim=(2, 3))


validation = deal(torch.arange(TRAINING, TRAINING + VALIDATION), ensemble)

# The network
# -----------
# Convolutions with residual blocks see the velocities and the pressure of a step and give a
# correction of the velocities, which is zero at first. They compute in single precision.


class Corrector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = ResNet(
            3, 2, grid, width=WIDTH, blocks=BLOCKS, periodic=True, activation=torch.nn.GELU
        )

    def forward(self, solution):
        return solution[..., :2, :] + self.layers(solution.float()).double()


# Training
# --------
# A refinement makes the whole difference between the runs: it is handed to the solver, and told the
# validation error of the second step after each epoch. That error is the relative mean square, as
# in the paper; tables and figures show its root.

shown = {}  # vorticities after the last step of a validation sample, for the picture


def without(solution):
    """No correction."""
    return solution[..., :2, :]


def make_step(refinement):
    """The step that is trained through; its operator is singular, for the pressure has no level."""
    return Step(
        coarse,
        refinement=refinement,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement,
            SOLVERS[arguments.solver],
            factorisation="lu",
            comm=comm,
            is_singular=True,
        ),
    )


def train_one(seed, refinement, label):
    velocities, norms = reference(seed)
    torch.manual_seed(seed)
    corrector = Corrector()
    step = make_step(refinement)

    def squared_errors(u, samples, number):
        """This rank's part of the squared errors after so many steps, relative to the reference."""
        return (
            coarse.velocity.scatter(u - velocities[samples, number]).square().sum(dim=-1)
            / norms[samples, number]
        )

    def loss(samples):
        u1 = corrector(step(velocities[samples, 0]))
        u2 = corrector(step(u1))
        return (squared_errors(u1, samples, 1) + squared_errors(u2, samples, 2)).mean()

    def validate(steps=2, step=step, corrector=corrector):
        """The relative mean square of all samples after each step, and the velocity of this
        member's first one after the last.
        """
        u, errors = velocities[validation, 0], []
        for number in range(1, steps + 1):
            u = corrector(step(u))
            mean = (
                total(squared_errors(u, validation, number).sum(), ensemble.global_comm)
                / VALIDATION
            )
            errors.append(mean.item())
        return errors, u[0]

    # A corrector goes on with the physics that it was trained through in the end. What it is worth
    # with converged ones is measured now and then, and not counted as training.
    validated = []

    def validate_two_steps():
        validated.append(validate()[0][-1])
        return validated[-1]

    loss(torch.arange(BATCH)).backward()  # kernels are compiled before the clock starts
    optimiser = torch.optim.Adam(corrector.parameters(), lr=LEARNING_RATE, fused=True)
    history = train(
        corrector,
        loss,
        validate_two_steps,
        optimiser=optimiser,
        refinement=refinement,
        assess={
            "in_use": lambda: validated[-1] ** 0.5,
            "converged": lambda: validate(2, coarse_step)[0][-1] ** 0.5,
        },
        solvers=[step.solver],
        samples=TRAINING,
        batch_size=BATCH,
        epochs=EPOCHS,
        seed=seed,
        ensemble=ensemble,
        label=label,
    )

    # What the last corrector is worth for more steps than it was trained for, and with converged
    # physics: coarse physics may have taught it to make up for the solver's errors. This is not
    # counted as training.
    with torch.no_grad():
        found = {
            "corrected": validate(STEPS, step),
            "corrected, converged physics": validate(STEPS, coarse_step),
            "coarse": validate(STEPS, coarse_step, without),
        }
    shown[label] = {"reference": velocities[TRAINING, STEPS]} | {
        name: found[name][1] for name in ("coarse", "corrected")
    }
    return history, {
        f"relative errors after each step, {name}": np.sqrt(errors).tolist()
        for name, (errors, _) in found.items()
    } | {"labels": {"in use": "Validation error, with the physics of the moment"}}


PETSc.Sys.Print(
    f"periodic box: {n} nodes on {comm.size} rank{'s' if comm.size > 1 else ''}"
    f"{f', {ensemble.ensemble_size} times' if ensemble.ensemble_size > 1 else ''}; "
    f"{TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs"
)
study = Study(
    "navier_stokes_periodic_box" + (f"_{arguments.solver}" if arguments.solver != "gmres" else ""),
    arguments,
    ladder=LADDER,
    setup={
        "solver": arguments.solver,
        "cells": CELLS,
        "viscosity": VISCOSITY,
        "time step": TIME_STEP,
        "smoothing": SMOOTHING,
        "training samples": TRAINING,
        "validation samples": VALIDATION,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
        "width": WIDTH,
        "blocks": BLOCKS,
    },
)
runs = study.run(
    train_one,
    trial=lambda refinement: make_step(refinement)(on_coarse_nodes(initial_velocities(1, 1))),
)

# The result
# ----------
# Iterations and seconds are those of training and validation together. Errors after five steps tell
# whether corrections add up.

study.print_table(runs)


def errors_by_step(schedule, what):
    return np.mean(
        [run.extras[f"relative errors after each step, {what}"] for run in runs[schedule].values()],
        axis=0,
    )


uncorrected = errors_by_step(next(iter(runs)), "coarse")
rows = {"without corrections": uncorrected} | {
    schedule.title: errors_by_step(schedule, "corrected") for schedule in runs
}
rows |= {
    f"{schedule.title}, then converged physics": errors_by_step(
        schedule, "corrected, converged physics"
    )
    for schedule in runs
    if schedule != CONVERGED
}
PETSc.Sys.Print(
    "\nrelative error after step" + " " * 11 + "".join(f"{number:8}" for number in (1, 2, 5))
)
for title, errors in rows.items():
    PETSc.Sys.Print(f"{title:36}" + "".join(f"{errors[number - 1]:8.2%}" for number in (1, 2, 5)))


def vorticity(u):
    """On the nodes, by central differences."""
    along_x, along_y = u.unflatten(-1, grid).numpy()
    return (
        (
            (np.roll(along_y, -1, 0) - np.roll(along_y, 1, 0))
            - (np.roll(along_x, -1, 1) - np.roll(along_x, 1, 1))
        )
        * CELLS
        / 2
    )


def draw_flow(path, velocities):
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    *panels, right = figure.subplots(1, 4)
    fields = {name: vorticity(u) for name, u in velocities.items()}
    limit = abs(fields["reference"]).max()
    for axes, (name, field) in zip(panels, fields.items()):
        colours = axes.imshow(
            field.T,
            origin="lower",
            extent=(0, 1, 0, 1),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            interpolation="bicubic",
        )
        axes.set(title=f"vorticity after {STEPS} steps, {name}", xticks=[], yticks=[])
    figure.colorbar(colours, ax=panels[-1], shrink=0.9)
    right.plot(
        range(STEPS + 1), [0, *uncorrected], ".-", color="black", label="without corrections"
    )
    for schedule in runs:
        right.plot(
            range(STEPS + 1),
            [0, *errors_by_step(schedule, "corrected")],
            ".-",
            color=schedule.colour,
            label=schedule.title,
        )
    right.set(xlabel="step", title="Validation error", ylim=(0, None))
    right.yaxis.set_major_formatter(lambda error, _: f"{100 * error:g} %")
    right.grid(alpha=0.25)
    right.legend(fontsize="small")
    save_figure(figure, path)


schedule, run = study.representative(runs)


def draw():
    draw_training(runs, study.path("training"))
    if (velocities := shown.get(study.label(schedule, run.seed))) is not None:
        # not where the run comes from a file
        draw_flow(study.path("flow"), velocities)


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
