"""An emulator that goes alone for several steps, trained with a solver that supervises each of them: transport in a lake.

The emulator is a graph network on an unstructured mesh. It maps the concentration of a substance in a lake with two islands to that
one time step later, and then goes on from what it has made itself. The solver takes one step from each of these states, and the
loss compares what the two make of them,

    u0 --network--> u1 --network--> u2 --network--> u3 --network--> u4
      \\               \\               \\               \\
       solver--> u1'    solver--> u2'    solver--> u3'    solver--> u4'       loss: |u1 - u1'|^2 + ... + |u4 - u4'|^2,

a "diverted chain" (Koehler, Niedermayr, Westermann and Thuerey, APEBench, NeurIPS 2024, arXiv 2411.00180). No reference trajectories
are needed for that: the network is told what would have been right where it went. Gradients go through the solver as well, for a
state depends on what the network made of those before. Under progressive refinement (PRDP) the solver is coarse at first.

    python autoregressive_emulator.py                         two minutes
    python autoregressive_emulator.py --quick                 some seconds; or QUICK=1 in the environment
    python autoregressive_emulator.py --network mlp           another network
    mpiexec -n 2 python autoregressive_emulator.py --output out
    python autoregressive_emulator.py --schedules converged prdp 1 2 3 5 8 --seed 1 2 3 --resume

A schedule that is a number is so many GMRES iterations throughout. Options with a single dash are PETSc's: -physics_pc_type ilu
changes the solver, -log_view says where time goes.
"""
import os
from pathlib import Path

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from mpi4py import MPI

from prdp_fem import FixedRefinement, IterationLadder, LinearVariationalSolver, Tolerance
from prdp_fem.studies import Schedule, Study, command_line, draw_training
from prdp_fem.torch import MLP, Gathering, GraphNetwork, SolverLayer, to_torch, train

arguments = command_line(__file__, __doc__, configure=lambda parser: parser.add_argument(
    "--network", choices=("graph", "mlp"), default="graph", help="(default: %(default)s)"))

# The lake
# --------
# Water goes round in it, in a flow without divergence that does not cross shores: its stream function is that of a constant vorticity,
# and zero on all of them. In one time step the fastest water crosses 1.5 edges of the mesh, and the substance diffuses over one:
# a network that sees a few edges far can learn the step, and the solver needs tens of iterations for it.

SPEED, DIFFUSION = 0.06, 1.6e-3  # of the fastest water, and diffusivity: both times the time step, in lengths of the lake
mesh = Mesh(str(Path(__file__).resolve().with_name("lake.msh")))  # made from lake.geo
mesh = mesh if arguments.size != "full" else MeshHierarchy(mesh, 2)[-1]
comm = mesh.comm
V = FunctionSpace(mesh, "CG", 1)
w, v = TrialFunction(V), TestFunction(V)
stream = Function(V)
solve(inner(grad(w), grad(v))*dx == v*dx, stream, bcs=DirichletBC(V, 0, "on_boundary"))
flow = perp(grad(stream))
speeds = Function(FunctionSpace(mesh, "DG", 0)).interpolate(sqrt(inner(flow, flow)))
stream.assign(stream*(SPEED/comm.allreduce(speeds.dat.data_ro.max(), MPI.MAX)))

# An implicit Euler step from u_old to u_old + w. It is the increment w that is solved for: GMRES starts at w = 0, which is
# the old concentration, so a single iteration is a rough step already, and all others improve on it.


def transport(u):
    return dot(flow, grad(u))*v*dx + DIFFUSION*inner(grad(u), grad(v))*dx


u_old, increment = Function(V, name="u_old"), Function(V, name="increment")
problem = LinearVariationalProblem(w*v*dx + transport(w), -transport(u_old), increment, constant_jacobian=True)


class Step(torch.nn.Module):
    """The step as a layer of a network, from the old concentration to the new one, of this rank's part of the lake."""

    def __init__(self, refinement):
        super().__init__()
        self.solver = LinearVariationalSolver(problem, refinement=refinement, options_prefix="physics_",
                                              solver_parameters={"ksp_type": "gmres", "ksp_gmres_restart": 100, "pc_type": "jacobi"})
        self.increment = SolverLayer(self.solver, controls=[u_old])

    def forward(self, u):
        return u + self.increment(u)


# Networks see the whole lake, (..., n) in an order that does not depend on ranks; the solver has a rank's part of it.

gathering = Gathering(V)
n = len(gathering)
mass = assemble(v*dx)
local_mass = to_torch(mass, copy=True)
mass = gathering.gather(local_mass)

# The data
# --------
# Initial concentrations are sums of random Gaussian bells, above and below the average, scaled to a largest value of one. Reference
# trajectories, converged to 1e-12, are for validation only.

TRAINING, VALIDATION = (20, 50) if arguments.size == "quick" else (100, 50)
BELLS, STEPS = 8, 4
torch.set_num_threads(1)


def initial_concentrations(seed):
    """Shape (samples, n)."""
    random = np.random.default_rng(seed)
    size = TRAINING + VALIDATION, BELLS
    centres, radii, heights = random.uniform(0, 1, (*size, 2)), random.uniform(0.06, 0.15, size), random.uniform(-1, 1, size)
    squares = ((gathering.coordinates[:, None, None] - centres)**2).sum(axis=-1)
    u = (heights*np.exp(-squares/(2*radii**2))).sum(axis=-1).T
    return torch.from_numpy(u/abs(u).max(axis=1, keepdims=True))


def square_norm(u):
    """In the L2 norm with a lumped mass matrix."""
    return u**2 @ mass


# The networks
# ------------
# They say what to add to a concentration, and nothing at first. The graph network is told the flow, too, and where the shores are. An
# MLP finds out.

shore = Function(V)
DirichletBC(V, 1, "on_boundary").apply(shore)
features = torch.stack([gathering.gather(to_torch(assemble(component*v*dx), copy=True))/mass/SPEED for component in flow]
                       + [gathering.gather(to_torch(shore, copy=True))])


class GraphEmulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.increment = GraphNetwork(4, 1, gathering.edges, gathering.coordinates, width=16, steps=4)

    def forward(self, u):
        return u + self.increment(torch.cat([u[:, None], features.to(u).expand(len(u), -1, -1)], dim=1)).squeeze(1)


class DenseEmulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.increment = MLP(n, n, width=128, depth=1)

    def forward(self, u):
        return u + self.increment(u)


EMULATOR, LEARNING_RATE = {"graph": (GraphEmulator, 1e-2), "mlp": (DenseEmulator, 1e-3)}[arguments.network]


def rollout(network, u, steps):
    """The states that the network makes of an initial one, shape (steps, batch, n)."""
    states = []
    for _ in range(steps):
        u = network(u)
        states.append(u)
    return torch.stack(states)


# Training
# --------
# In single precision, as is usual for networks; the solver's is double.

BATCH = 5
EPOCHS = arguments.epochs or {"quick": 8, "default": 60, "full": 100}[arguments.size]


def train_one(seed, refinement, label):
    """Train a network under a refinement."""
    u0 = initial_concentrations(seed)
    norm = square_norm(u0)
    validation = slice(TRAINING, TRAINING + VALIDATION)
    reference_step = Step(FixedRefinement(Tolerance(1e-12)))
    with torch.no_grad():
        reference = gathering.gather(rollout(reference_step, gathering.scatter(u0[validation]), 2*STEPS))
    reference_norm = square_norm(reference)
    u0 = u0.float()

    torch.manual_seed(seed)
    network, step = EMULATOR(), Step(refinement)
    optimiser = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)

    def loss(samples):
        """This rank's part: the difference between network and solver from each state of the network's own trajectory."""
        u, total = u0[samples], 0.0
        for _ in range(STEPS):
            u_next = network(u)
            difference = gathering.scatter(u_next) - step(gathering.scatter(u))
            total = total + (difference**2 @ local_mass.to(u)/norm[samples]).mean()/STEPS
            u = u_next
        return total

    def errors(steps):
        """The mean squares, relative to the reference's, after each step of the network alone; no solver is needed."""
        states = rollout(network, u0[validation], steps)
        return (square_norm(states.double() - reference[:steps])/reference_norm[:steps]).mean(dim=1)

    history = train(network, loss, validate=lambda: errors(STEPS)[-1].item(), optimiser=optimiser, refinement=refinement,
                    scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS), solvers=[step.solver], samples=TRAINING,
                    batch_size=BATCH, epochs=EPOCHS, seed=seed, comm=comm, label=label)

    # How the error grows, further than was trained for, and a trajectory for the figures.
    with torch.no_grad():
        growth, states = errors(2*STEPS).sqrt(), rollout(network, u0[validation][:1], 2*STEPS)[:, 0]
    return history, {"error after each step": growth.tolist(), "trajectory": np.round(states.tolist(), 4).tolist(),
                     "reference": np.round(reference[:, 0].tolist(), 4).tolist()}


setup = {"network": arguments.network, "unknowns": n, "speed": SPEED, "diffusion": DIFFUSION, "steps": STEPS,
         "training samples": TRAINING, "validation samples": VALIDATION, "epochs": EPOCHS, "batch": BATCH, "learning rate": LEARNING_RATE}
PETSc.Sys.Print(f"A lake of {n} nodes on {comm.size} rank{'s' if comm.size > 1 else ''}; {STEPS} steps, {TRAINING} training and "
                f"{VALIDATION} validation samples, {EPOCHS} epochs")
study = Study(f"autoregressive_{arguments.network}", arguments, ladder=IterationLadder(start=1, step=2), setup=setup)
runs = study.run(train_one)
study.print_table(runs)
