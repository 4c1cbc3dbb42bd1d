"""An emulator of viscous Burgers flow in one or two dimensions, trained through a Newton-Krylov solver.

The emulator is a convolutional network that maps a velocity u0 to the velocity u1 one time step later. It learns to do so
through a solver: the network takes the first step, the solver takes the second one,

    u0 --network--> u1 --solver--> u2,

and the loss compares u2 with a reference two steps on. The solver's step is implicit and nonlinear: it consists of Newton steps, each
of them with a linear system for GMRES, and its derivative takes one system more. Under progressive refinement (PRDP) all this is
coarse at first.

    python burgers_emulator.py                         in one dimension
    python burgers_emulator.py --dimension 2           in two
    python burgers_emulator.py --quick                 some seconds; or QUICK=1 in the environment
    mpiexec -n 2 python burgers_emulator.py --dimension 2 --output out
    python burgers_emulator.py --schedules converged prdp 1 2 4 8 --seed 1 2 3 --resume

A schedule that is a number is so many GMRES iterations throughout, in each of two Newton steps. Options with a single dash are PETSc's:
-physics_pc_type ilu changes the solver, -log_view says where time goes.
"""
import os

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure

from prdp_fem import FixedRefinement, IterationLadder, Iterations, NewtonLadder, NewtonSteps, NonlinearVariationalSolver, Tolerance
from prdp_fem.studies import Schedule, Study, command_line, draw_training
from prdp_fem.torch import Gathering, ResNet, SolverLayer, train

arguments = command_line(__file__, __doc__, configure=lambda parser: parser.add_argument(
    "--dimension", type=int, choices=(1, 2), default=1, help="of the domain (default: %(default)s)"))
DIMENSION = arguments.dimension

# The flow
# --------
# du/dt + (u . grad) u = viscosity*laplace(u) on a periodic domain of unit size, in linear finite elements. The viscosity is such that
# they resolve the steepest fronts of velocities up to one (a cell Peclet number of 1). The time steps are those that an implicit
# method is chosen for: fluid crosses CFL = 13 (in 2-D 6) cells in one.

SIZES = {  # cells in each direction, viscosity, time step, Fourier modes of the initial states
    1: {"quick": (64, 1/50, 0.05, 5), "default": (256, 1/200, 0.05, 5), "full": (1024, 1/1000, 0.05, 5)},
    2: {"quick": (12, 1/24, 0.2, 3), "default": (32, 1/64, 0.2, 3), "full": (96, 1/192, 0.1, 3)},
}
CELLS, VISCOSITY, TIME_STEP, MODES = SIZES[DIMENSION][arguments.size]

if DIMENSION == 1:
    mesh = PeriodicUnitIntervalMesh(CELLS)
    V = FunctionSpace(mesh, "CG", 1)
else:
    mesh = PeriodicUnitSquareMesh(CELLS, CELLS, quadrilateral=True)
    V = VectorFunctionSpace(mesh, "CG", 1)
comm = mesh.comm

# A step of implicit Euler from u_old to u = u_old + w. It is the increment w that is solved for: Newton's method and GMRES both start
# at w = 0, which is the old velocity, so a single iteration is a rough step already, and all others improve on it.

u_old, w, v = Function(V, name="u_old"), Function(V, name="increment"), TestFunction(V)
u = u_old + w
transport = u*u.dx(0) if DIMENSION == 1 else dot(grad(u), u)
residual = (inner(w, v) + TIME_STEP*(inner(transport, v) + VISCOSITY*inner(grad(u), grad(v))))*dx(degree=3)
problem = NonlinearVariationalProblem(residual, w)

# The network sees velocities on the grid, (..., components, n) in an order that does not depend on ranks; the solver has a rank's
# part of them.

gathering = Gathering(V, period=[1]*DIMENSION)


def local(velocity):
    """This rank's part of a whole velocity, in the solver's order."""
    return gathering.scatter(velocity.squeeze(-2) if DIMENSION == 1 else velocity)


def whole(part):
    velocity = gathering.gather(part)
    return velocity.unsqueeze(-2) if DIMENSION == 1 else velocity


class Step(torch.nn.Module):
    """The step as a layer of a network, from the old velocity to the new one."""

    def __init__(self, refinement, **options):
        super().__init__()
        self.solver = NonlinearVariationalSolver(problem, refinement=refinement, warm_start=False, options_prefix="physics_",
                                                 solver_parameters={"ksp_type": "gmres", "pc_type": "jacobi", **options})
        self.increment = SolverLayer(self.solver, controls=[u_old])

    def forward(self, u):
        return u + self.increment(u)


# How far to solve
# ----------------
# Converged: all linear systems to 1e-10, and Newton's method to a residual of 1e-10. Progressive refinement starts with one Newton
# step of START iterations, and goes up to two steps of more and more: those two leave a nonlinear error of 0.01 %, far
# below what the network can learn, so that a third one would be work for nothing.

NEWTON = {"snes_rtol": 1e-10}
START, STEP = 3, 3
ladder = NewtonLadder(start=1, stop=2, linear=IterationLadder(start=START, step=STEP))


def constant(iterations):
    return NewtonSteps(2, Iterations(iterations))


# The data
# --------
# Initial velocities are random Fourier series, scaled to a largest value of one. All ranks make all of them, and keep their
# part of the references.

TRAINING, VALIDATION = (20, 50) if arguments.size == "quick" else (100, 50)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


def initial_velocities(seed):
    """Shape (samples, components, n)."""
    random = np.random.default_rng(seed)
    modes = np.stack(np.meshgrid(*[np.arange(-MODES, MODES + 1)]*DIMENSION, indexing="ij"), axis=-1).reshape(-1, DIMENSION)
    modes = modes[len(modes)//2 + 1:]  # of a mode and its negative, one; not the constant one
    size = TRAINING + VALIDATION, DIMENSION, len(modes)
    amplitudes, phases = random.uniform(-1, 1, size), random.uniform(0, 2*np.pi, size)
    angles = 2*np.pi*modes @ gathering.coordinates.T
    velocity = (amplitudes*np.cos(phases)) @ np.cos(angles) - (amplitudes*np.sin(phases)) @ np.sin(angles)
    return torch.from_numpy(velocity/np.linalg.norm(velocity, axis=1, keepdims=True).max(axis=-1, keepdims=True))


# Training
# --------
# The network says what to add to the velocity, and nothing at first. Errors are mean squares relative to the
# reference's; on a uniform grid all nodes have the same weight.

WIDTH, BLOCKS, KERNEL, BATCH, LEARNING_RATE = 16, 2, 5, 5, 1e-3
EPOCHS = arguments.epochs or {"quick": 8, "default": 60, "full": 100}[arguments.size]


class Emulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.increment = ResNet(DIMENSION, DIMENSION, gathering.grid, width=WIDTH, blocks=BLOCKS, kernel=KERNEL, periodic=True)

    def forward(self, u):
        return u + self.increment(u)


def train_one(seed, refinement, label):
    """Train a network under a refinement."""
    u0 = initial_velocities(seed)
    reference_step = Step(FixedRefinement(Tolerance(1e-12)), snes_rtol=1e-12)
    with torch.no_grad():
        reference1 = reference_step(local(u0))
        reference2 = reference_step(reference1)
    norm1, norm2 = (gathering.total((reference**2).sum(dim=-1)) for reference in (reference1, reference2))
    validation = torch.arange(TRAINING, TRAINING + VALIDATION)

    torch.manual_seed(seed)
    network = Emulator()
    step = Step(refinement, **NEWTON)

    def squared_errors(samples, step=step):
        """This rank's part of the relative squared errors."""
        return ((step(local(network(u0[samples]))) - reference2[samples])**2).sum(dim=-1)/norm2[samples]

    history = train(network, loss=lambda samples: squared_errors(samples).mean(),
                    validate=lambda: gathering.total(squared_errors(validation)).mean().item(),
                    optimiser=torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True), refinement=refinement,
                    solvers=[step.solver], samples=TRAINING, batch_size=BATCH, epochs=EPOCHS, seed=seed, comm=comm, label=label)

    # What the network is worth with converged physics, and without any: coarse physics may have taught it to make up
    # for the solver's errors. And what it makes of a validation sample, for the figure.
    with torch.no_grad():
        converged = gathering.total(squared_errors(validation, reference_step)).sqrt().mean().item()
        u1 = local(network(u0[validation]))
        alone = gathering.total(((u1 - reference1[validation])**2).sum(dim=-1)/norm1[validation]).sqrt().mean().item()
        sample = {"u0": u0[TRAINING], "reference": whole(reference2[TRAINING]), "prediction": whole(step(u1[0]))}
    return history, {"error with converged physics": converged, "error of the network alone, after one step": alone,
                     "sample": {name: np.round(velocity.numpy(), 5).tolist() for name, velocity in sample.items()}}


setup = {"cells": CELLS, "viscosity": VISCOSITY, "time step": TIME_STEP, "training samples": TRAINING, "validation samples": VALIDATION,
         "epochs": EPOCHS, "batch": BATCH, "learning rate": LEARNING_RATE, "width": WIDTH, "blocks": BLOCKS, "kernel": KERNEL}
PETSc.Sys.Print(f"Burgers in {DIMENSION}-D: {V.dim()} unknowns on {comm.size} rank{'s' if comm.size > 1 else ''}; "
                f"{TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs")
study = Study(f"burgers_{DIMENSION}d", arguments, ladder=ladder, constant=constant, setup=setup)
runs = study.run(train_one)
study.print_table(runs)
for schedule, by_seed in runs.items():
    for seed, run in by_seed.items():
        print(schedule, seed, {k: v for k,v in run.extras.items() if k != "sample"}, run.history.setting[::5], run.history.setting[-1])
