"""An emulator that goes alone for several steps, trained with a solver that supervises each of
them: transport in a lake.

The emulator is a graph network on an unstructured mesh. It maps the concentration of a substance in
a lake with two islands to that one time step later, and then goes on from what it has made itself.
The solver takes one step from each of these states, and the loss compares what the two make of
them,

    u0 --network--> u1 --network--> u2 --network--> u3 --network--> u4
      \\               \\               \\               \\
       solver--> u1'    solver--> u2'    solver--> u3'    solver--> u4'

    loss: |u1 - u1'|^2 + ... + |u4 - u4'|^2,

a "diverted chain" (Koehler, Niedermayr, Westermann and Thuerey, APEBench, NeurIPS 2024, arXiv
2411.00180). No reference trajectories are needed for that: the network is told what would have been
right where it went. Gradients go through the solver as well, for a state depends on what the
network made of those before. Under progressive refinement (PRDP) the solver is coarse at first.

    python autoregressive_emulator.py                            two minutes
    python autoregressive_emulator.py --quick                    some seconds; or QUICK=1
    python autoregressive_emulator.py --network mlp              another network
    mpiexec -n 2 python autoregressive_emulator.py --output out  two ranks share the mesh
    mpiexec -n 2 python autoregressive_emulator.py --ensemble 2  two ranks share the samples
    python autoregressive_emulator.py --schedules converged prdp 1 2 3 5 8 --seed 1 2 3 --resume

A schedule that is a number is so many GMRES iterations throughout. Options with a single dash are
PETSc's: -physics_pc_type ilu changes the solver, -log_view says where time goes.
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prdp_fem import FixedRefinement, IterationLadder, LinearVariationalSolver, Tolerance
from prdp_fem.studies import (
    Study,
    command_line,
    draw_training,
    incomplete,
    save_figure,
    solver_parameters,
    triangle_mesh,
)
from prdp_fem.torch import MLP, Gathering, GraphNetwork, SolverLayer, deal, to_torch, total, train

SOLVERS = {
    "gmres": {"ksp_type": "gmres", "ksp_gmres_restart": 100, "pc_type": "jacobi"},
    "gmres+ilu": {"ksp_type": "gmres", "ksp_gmres_restart": 100},
}


def configure(parser):
    parser.add_argument(
        "--network", choices=("graph", "mlp"), default="graph", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        default="gmres",
        help=(
            "with Jacobi's preconditioner, or with an incomplete factorisation, of each rank's part"
            " (default: %(default)s)"
        ),
    )


arguments = command_line(__file__, __doc__, configure=configure)
# its members have the whole mesh each, on ranks of their own (comm), and deal the samples out
ensemble = arguments.ensemble
comm = ensemble.comm
SOLVERS["gmres+ilu"] |= incomplete("ilu", comm)

# The lake
# --------
# Water goes round in it, in a flow without divergence that does not cross shores: its stream
# function is that of a constant vorticity, and zero on all of them. In one time step the fastest
# water crosses 1.5 edges of the mesh, and the substance diffuses over one: a network that sees a
# few edges far can learn the step, and the solver needs tens of iterations for it. On a finer mesh
# speed and diffusivity are smaller, so that this stays so.

FINER = 2 if arguments.size == "full" else 0  # times that each triangle is divided into four
SPEED = 0.06 / 2**FINER  # of the fastest water, times the time step
# diffusivity, times the time step; both in lengths of the lake
DIFFUSION = 1.6e-3 / 4**FINER
mesh = triangle_mesh(Path(__file__).resolve().with_name("lake.msh"), comm)  # made from lake.geo
mesh = MeshHierarchy(mesh, FINER)[-1]
V = FunctionSpace(mesh, "CG", 1)
w, v = TrialFunction(V), TestFunction(V)
stream = Function(V)
solve(inner(grad(w), grad(v)) * dx == v * dx, stream, bcs=DirichletBC(V, 0, "on_boundary"))
flow = perp(grad(stream))
speeds = Function(FunctionSpace(mesh, "DG", 0)).interpolate(sqrt(inner(flow, flow)))
stream.assign(stream * (SPEED / comm.allreduce(speeds.dat.data_ro.max(), MPI.MAX)))

# A step of implicit Euler, from u_old to u. GMRES starts from u_old, so a single iteration is a
# rough step already, and all others improve on it.

u_old, u = Function(V, name="u_old"), Function(V, name="u")
a = w * v * dx + dot(flow, grad(w)) * v * dx + DIFFUSION * inner(grad(w), grad(v)) * dx
problem = LinearVariationalProblem(a, u_old * v * dx, u, constant_jacobian=True)


class Step(torch.nn.Module):
    """The step as a layer of a network, from the old concentration to the new one, of this rank's
    part of the lake.
    """

    def __init__(self, refinement, **options):
        super().__init__()
        self.solver = LinearVariationalSolver(
            problem, refinement=refinement, warm_start=True, **options
        )
        self.solution = SolverLayer(self.solver, controls=[u, u_old])

    def forward(self, u_old):
        return self.solution(u_old, u_old)  # a guess, and where the step starts


def make_step(refinement):
    """The step that supervises: under the schedule "direct" by a factorisation, kept for good,
    since the operator is constant.
    """
    return Step(
        refinement,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement, SOLVERS[arguments.solver], factorisation="lu", comm=comm
        ),
    )


reference_step = Step(FixedRefinement(Tolerance(1e-12)), solver_parameters=SOLVERS["gmres"])

# Networks see the whole lake, (..., n) in an order that does not depend on ranks; the solver has a
# rank's part of it.

field = Gathering(V)
n = len(field)
mass = assemble(v * dx)
local_mass = to_torch(mass, copy=True)
mass = field.gather(local_mass)

# The data
# --------
# Initial concentrations are sums of random Gaussian bells, above and below the average, scaled to a
# largest value of one. Reference trajectories, converged to 1e-12, are for validation only.

TRAINING, VALIDATION = (20, 50) if arguments.size == "quick" else (60, 50)
BELLS, STEPS = 8, 4
torch.set_num_threads(1)


def initial_concentrations(seed):
    """Shape (samples, n)."""
    random = np.random.default_rng(seed)
    size = TRAINING + VALIDATION, BELLS
    centres = random.uniform(0, 1, (*size, 2))
    radii = random.uniform(0.06, 0.15, size)
    heights = random.uniform(-1, 1, size)
    squares = ((field.coordinates[:, None, None] - centres) ** 2).sum(axis=-1)
    u = (heights * np.exp(-squares / (2 * radii**2))).sum(axis=-1).T
    return torch.from_numpy(u / abs(u).max(axis=1, keepdims=True))


def square_norm(u):
    """In the L2 norm with a lumped mass matrix."""
    return u**2 @ mass


# The networks
# ------------
# They say what to add to a concentration, and nothing at first. The graph network knows the flow,
# and where the shores are; the equation is linear, and so is the network. An MLP knows nothing. The
# substance is conserved, and so it is by both: of what they add the mean is taken away.

shore = Function(V)
DirichletBC(V, 1, "on_boundary").apply(shore)
features = torch.stack(
    [
        field.gather(to_torch(assemble(component * v * dx), copy=True)) / mass / SPEED
        for component in flow
    ]
    + [field.gather(to_torch(shore, copy=True))]
)
share = mass / mass.sum()


class Emulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.is_graph = arguments.network == "graph"
        self.increment = (
            GraphNetwork(
                1,
                1,
                field.edges,
                field.coordinates,
                features=features,
                width=8,
                steps=3,
                activation=None,
            )
            if self.is_graph
            else MLP(n, n, width=128, depth=1)
        )

    def forward(self, u):
        increment = self.increment(u[:, None]).squeeze(1) if self.is_graph else self.increment(u)
        return u + increment - (increment @ share.to(u))[:, None]


LEARNING_RATE = {"graph": 5e-3, "mlp": 1e-3}[arguments.network]


def rollout(network, u, steps):
    """The states that the network makes of an initial one, shape (steps, batch, n)."""
    states = []
    for _ in range(steps):
        u = network(u)
        states.append(u)
    return torch.stack(states)


# Training
# --------
# In single precision, as is usual for networks; the solver's is double. What is validated is a
# moving average of the weights over about twenty steps of the optimiser: it is better than the last
# weights, and its error does not jump up and down with every batch, which would hide from a
# refinement whether training still improves.

BATCH, AVERAGE = 5, 0.95
EPOCHS = arguments.epochs or {"quick": 8, "default": 100, "full": 120}[arguments.size]


def train_one(seed, refinement, label):
    """Train a network under a refinement."""
    u0 = initial_concentrations(seed)
    norm = square_norm(u0)
    validation = deal(torch.arange(TRAINING, TRAINING + VALIDATION), ensemble)
    with torch.no_grad():
        reference = field.gather(rollout(reference_step, field.scatter(u0[validation]), 2 * STEPS))
    reference_norm = square_norm(reference)
    u0 = u0.float()

    torch.manual_seed(seed)
    network, step = Emulator(), make_step(refinement)
    averaged = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE))
    optimiser = torch.optim.Adam(
        network.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True
    )
    optimiser.register_step_post_hook(lambda *_: averaged.update_parameters(network))

    def loss(samples):
        """This rank's part: the difference between network and solver from each state of the
        network's own trajectory.
        """
        u, error = u0[samples], 0.0
        for _ in range(STEPS):
            u_next = network(u)
            difference = field.scatter(u_next) - step(field.scatter(u))
            error = error + (difference**2 @ local_mass.to(u) / norm[samples]).mean() / STEPS
            u = u_next
        return error

    def errors(steps):
        """The mean squares, relative to the reference's, after each step of the network alone; no
        solver is needed.

        Each rank has whole samples here, so that the sum is one over members.
        """
        states = rollout(averaged, u0[validation], steps)
        squared_errors = square_norm(states.double() - reference[:steps]) / reference_norm[:steps]
        return total(squared_errors.sum(dim=1), ensemble.ensemble_comm) / VALIDATION

    # The network goes alone in the end, and is validated so. What a converged solver would make of
    # its states is measured now and then, and not counted as training.

    def against_converged_physics():
        states = torch.cat([u0[validation][None], rollout(averaged, u0[validation], STEPS)])
        right = field.gather(reference_step(field.scatter(states[:-1].double())))
        squares = square_norm(states[1:] - right) / norm[validation]
        return total(squares.sum(), ensemble.ensemble_comm).div(STEPS * VALIDATION).sqrt().item()

    history = train(
        network,
        loss,
        validate=lambda: errors(STEPS)[-1].item(),
        assess={
            "in_use": lambda: errors(STEPS)[-1].sqrt().item(),
            "converged": against_converged_physics,
        },
        optimiser=optimiser,
        refinement=refinement,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS),
        solvers=[step.solver],
        samples=TRAINING,
        batch_size=BATCH,
        epochs=EPOCHS,
        seed=seed,
        ensemble=ensemble,
        label=label,
    )

    # How the error grows, also where it was not trained to go, and a trajectory for the figures:
    # that of the member's first sample.
    with torch.no_grad():
        growth = errors(2 * STEPS).sqrt()
        states = rollout(averaged, u0[validation][:1], 2 * STEPS)[:, 0]
    return history, {
        "error after each step": growth.tolist(),
        "labels": {"in use": f"Error of the network alone, after {STEPS} steps"},
        "u0": rounded(u0[validation][0]),
        "network": [rounded(states[step - 1]) for step in SHOWN],
        "reference": [rounded(reference[step - 1, 0]) for step in SHOWN],
    }


SHOWN = 1, STEPS, 2 * STEPS


def rounded(state):
    return np.round(state.double().numpy(), 4).tolist()


setup = {
    "solver": arguments.solver,
    "network": arguments.network,
    "unknowns": n,
    "speed": SPEED,
    "diffusion": DIFFUSION,
    "steps": STEPS,
    "training samples": TRAINING,
    "validation samples": VALIDATION,
    "epochs": EPOCHS,
    "batch": BATCH,
    "learning rate": LEARNING_RATE,
    "average": AVERAGE,
}
times = f", {ensemble.ensemble_size} times" if ensemble.ensemble_size > 1 else ""
PETSc.Sys.Print(
    f"A lake of {n} nodes on {comm.size}"
    f" rank{'s' if comm.size > 1 else ''}{times};"
    f" {STEPS} steps, {TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs"
)
study = Study(
    f"autoregressive_{arguments.network}"
    + (f"_{arguments.solver}" if arguments.solver != "gmres" else ""),
    arguments,
    ladder=IterationLadder(start=2, step=3),
    setup=setup,
)
runs = study.run(
    train_one,
    trial=lambda refinement: make_step(refinement)(
        field.scatter(initial_concentrations(1)[:1].float())
    ),
)

# The result
# ----------
# Iterations and seconds are those of training and validation together; the latter takes no
# iterations here.

study.print_table(runs)
PETSc.Sys.Print(
    "\nrelative error after steps" + "".join(f"{step:8}" for step in range(1, 2 * STEPS + 1))
)
for schedule, by_seed in runs.items():
    growth = np.mean([run.extras["error after each step"] for run in by_seed.values()], axis=0)
    PETSc.Sys.Print(f"{schedule.title:26}" + "".join(f"{error:8.2%}" for error in growth))


def draw_growth(path):
    """The error of the network alone, step by step."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    steps = np.arange(1, 2 * STEPS + 1)
    for schedule, by_seed in runs.items():
        axes.plot(
            steps,
            np.mean([run.extras["error after each step"] for run in by_seed.values()], axis=0),
            "o-",
            markersize=4,
            label=schedule.title,
            color=schedule.colour,
            zorder=1 if schedule.is_constant else 2,
        )
    axes.axvspan(STEPS, 2 * STEPS, color="0.92", zorder=0)
    axes.text(
        STEPS + 0.1, 0.02, "not trained for", transform=axes.get_xaxis_transform(), color="0.4"
    )
    axes.set(xlabel="time step", ylabel="relative error of the network alone", ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(alpha=0.25)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def draw_lake(path, run, title, stream):
    """A validation trajectory: by the network, by the solver, and the difference."""
    figure = Figure(figsize=(13, 8.6), layout="constrained")
    panels = figure.subplots(3, len(SHOWN) + 1)
    fields = dict(zip(SHOWN, zip(run.extras["network"], run.extras["reference"])))

    def draw(axes, values, limit, title=""):
        axes.set_title(title)
        return axes.tripcolor(
            *field.coordinates.T,
            cells,
            values,
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            shading="gouraud",
        )

    panels[0, 0].triplot(*field.coordinates.T, cells, color="black", linewidth=0.4)
    panels[0, 0].set_title(f"{n} nodes, {len(cells)} triangles")
    panels[1, 0].tricontour(
        *field.coordinates.T,
        cells,
        stream,
        levels=8,
        colors="black",
        linewidths=0.7,
        linestyles="solid",
    )
    panels[1, 0].set_title("stream lines")
    draw(panels[2, 0], run.extras["u0"], 1, "$u_0$, a validation sample")
    wrong = max(np.abs(np.subtract(*pair)).max() for pair in fields.values())
    for column, (step, (network, reference)) in enumerate(fields.items(), start=1):
        limit = np.abs(reference).max()
        colours = [
            draw(
                panels[0, column], network, limit, f"$u_{{{step}}}$ by the network alone ({title})"
            ),
            draw(panels[1, column], reference, limit, f"$u_{{{step}}}$ by the solver, converged"),
            draw(panels[2, column], np.subtract(network, reference), wrong, "difference"),
        ]
        figure.colorbar(colours[0], ax=panels[:2, column], shrink=0.7, location="bottom")
    figure.colorbar(colours[2], ax=panels[2, 1:], shrink=0.9)
    for axes in panels.flat:
        axes.set(aspect="equal", xticks=[], yticks=[])
        axes.set_frame_on(False)
    save_figure(figure, path)


cells, stream = field.cells, field.gather(to_torch(stream, copy=True)).numpy()  # collective
schedule, run = study.representative(runs)


def draw():
    draw_training(runs, study.path("training"))
    draw_growth(study.path("growth"))
    draw_lake(study.path("lake"), run, schedule.title, stream)


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
