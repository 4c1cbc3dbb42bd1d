"""An emulator of heat conduction in a plate with holes, trained through a finite element solver.

The emulator is a network that maps a temperature u0 to the temperature u1 one time step later. It learns to do so through
a solver: the network takes the first step, the solver takes the second one,

    u0 --network--> u1 --solver--> u2,

and the loss compares u2 with a reference two steps on. Each training sample needs a forward and an adjoint solve, and that is
where the time goes. The script trains the same network twice, from the same seed:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP): each is given one iteration at first, and one more whenever the validation error
  stops improving, until more iterations no longer help.

It prints what the two have reached and what they cost, and draws it:

    python heat_emulator.py                                           about a minute
    python heat_emulator.py --quick                                   half a minute; or QUICK=1 in the environment
    mpiexec -n 2 python heat_emulator.py --mesh my.msh --output out   in parallel, on another mesh

Options with a single dash are PETSc's: -log_view, or -physics_ksp_type and whatever else configures the solver with prefix physics_.
"""
import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from mpi4py import MPI
from tqdm import tqdm

from prdp_fem import FixedRefinement, IterationLadder, LinearVariationalSolver, ProgressiveRefinement, Tolerance
from prdp_fem.torch import SolverLayer

# The command line
# ----------------
# Whatever is wrong with it is said before any work is done, and once: not by every rank. PETSc reads it too, and is told
# not to complain of options that it does not know.

PETSc.Options().setValue("options_left", False)
HERE = Path(__file__).resolve().parent
PLATE = HERE/"plate.msh"  # made from plate.geo
RIM = 2                   # its physical group "rim"


class Parser(argparse.ArgumentParser):
    def _print_message(self, message, file=None):
        if COMM_WORLD.rank == 0:
            super()._print_message(message, file)


def mesh_file(text):
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    with path.open("rb") as file:
        if path.suffix != ".msh" or not file.readline().startswith(b"$MeshFormat"):
            raise argparse.ArgumentTypeError(f"{text} is not a mesh of Gmsh; make one from a geometry with: gmsh -2 my.geo -o my.msh")
    return path.resolve()


def count(text):
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, found {text}")
    return int(text)


parser = Parser(description=__doc__.partition("\n")[0], epilog="Options with a single dash are PETSc's, for example -log_view.")
parser.add_argument("--mesh", type=mesh_file, default=PLATE, metavar="FILE.msh",
                    help="a mesh of triangles; it is scaled to unit size, and all its boundary is insulated (default: plate.msh beside "
                         "this script, whose holes are insulated and whose rim is kept cold)")
parser.add_argument("--seed", type=count, default=1, help="of data, initial weights and order of samples (default: %(default)s)")
parser.add_argument("--epochs", type=count, help="default: 150, and 60 with --quick")
parser.add_argument("--quick", action="store_true", default=os.environ.get("QUICK", "") not in ("", "0"),
                    help="a short run, which ends while PRDP is still refining; also switched on by QUICK=1 in the environment")
parser.add_argument("--output", type=Path, default=HERE/"output", metavar="DIR",
                    help="where results and figures are put (default: output beside this script)")
parser.add_argument("--tau-step", type=float, default=0.98,
                    help="training counts as stalled where the validation error falls to no less than this ratio (default: %(default)s)")
parser.add_argument("--tau-stop", type=float, default=0.9,
                    help="refining goes on where it has brought the error below this ratio (default: %(default)s)")
arguments, others = parser.parse_known_args()

try:
    prdp = ProgressiveRefinement(IterationLadder(start=1, step=1), tau_step=arguments.tau_step, tau_stop=arguments.tau_stop,
                                 comm=COMM_WORLD)
    arguments.output.mkdir(parents=True, exist_ok=True)
except ValueError as error:
    parser.error(str(error))
except OSError as error:
    parser.error(f"cannot put results into {arguments.output}: {error.strerror}")
if unknown := [option for option in others if option.startswith("--") or not others[0].startswith("-")]:
    parser.error(f"cannot make anything of {' '.join(unknown)}")
if arguments.epochs is None:
    arguments.epochs = 60 if arguments.quick else 150
if arguments.epochs == 0:
    parser.error("there must be at least one epoch")

# The plate
# ---------
# Diffusivity times time step is 1e-3 on a domain of unit size. Boundary markers of other meshes mean what their authors
# wanted, so these are insulated everywhere; only of our own plate do we know the rim.

try:
    mesh = Mesh(str(arguments.mesh))
except (ValueError, PETSc.Error) as error:
    raise ValueError(f"{arguments.mesh.name} cannot be read as a plane mesh of straight triangles") from error
comm = mesh.comm
if mesh.ufl_cell().cellname != "triangle" or mesh.geometric_dimension != 2 or mesh.coordinates.function_space().ufl_element().degree() != 1:
    parser.error(f"{arguments.mesh.name} must be a plane mesh of straight triangles")
corners = np.concatenate(comm.allgather(mesh.coordinates.dat.data_ro))
size = np.ptp(corners, axis=0).max()
mesh.coordinates.assign((mesh.coordinates - Constant(corners.min(axis=0)))/size)

# An implicit Euler step from u_old to u_old + w. It is the increment w that is solved for: the iteration starts at w = 0,
# which is the old temperature, so a single iteration is a rough step already, and all others improve on it.

DIFFUSION = 1e-3
V = FunctionSpace(mesh, "CG", 1)
w, v = TrialFunction(V), TestFunction(V)
u_old, increment = Function(V, name="u_old"), Function(V, name="increment")
a = w*v*dx + DIFFUSION*inner(grad(w), grad(v))*dx
L = -DIFFUSION*inner(grad(u_old), grad(v))*dx
rim = [DirichletBC(V, 0, RIM)] if arguments.mesh == PLATE else []
problem = LinearVariationalProblem(a, L, increment, bcs=rim, constant_jacobian=True)


class Step(torch.nn.Module):
    """The step as a layer of a network, from the old temperature to the new one. Its solver comes from prdp_fem."""

    def __init__(self, **options):
        super().__init__()
        self.solver = LinearVariationalSolver(problem, **options)
        self.increment = SolverLayer(self.solver, controls=[u_old])

    def forward(self, u):
        return u + self.increment(u)


# The order of the unknowns
# -------------------------
# The network sees the whole plate, whereas a rank has only its part of the solver's unknowns. So that any number of ranks
# trains the same network, it sees them in an order that does not depend on ranks: sorted by coordinates.

first, last = V.dof_dset.layout_vec.getOwnershipRange()
order = np.lexsort(np.concatenate(comm.allgather(mesh.coordinates.dat.data_ro)).T[::-1])
place = np.argsort(order)
mine = torch.from_numpy(place[first:last])  # where this rank's unknowns stand in the sorted order


def whole(values):
    """Values on the whole plate, sorted, from those of each rank along the last axis."""
    return np.concatenate(comm.allgather(values), axis=-1)[..., order]


x = whole(mesh.coordinates.dat.data_ro.T)
n = x.shape[1]

# The data
# --------
# Initial temperatures are random Fourier series of five sine modes in each direction, scaled to a largest value of one.
# All ranks make all of them, but each keeps only its part of the reference temperatures, which are converged to 1e-12.

MODES, TRAINING, VALIDATION = 5, 200, 50
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)

amplitudes = np.random.default_rng(arguments.seed).uniform(-1, 1, (TRAINING + VALIDATION, MODES, MODES))
sine_x, sine_y = np.sin(np.pi*np.arange(1, MODES + 1)[:, None]*x[:, None])
u0 = np.einsum("skl,kn,ln->sn", amplitudes, sine_x, sine_y)
u0 = torch.from_numpy(u0/abs(u0).max(axis=1, keepdims=True))

reference_step = Step(solver_parameters={"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": 1e-12})
with torch.no_grad():
    u1_reference = reference_step(u0[:, mine])
    u2_reference = reference_step(u1_reference)

# Errors are measured relative to the reference, in the L2 norm with a lumped mass matrix.

mass = torch.from_numpy(assemble(v*dx).dat.data_ro.copy())


def total(values):
    """The sum over the ranks, of a tensor without gradients."""
    return torch.from_numpy(comm.allreduce(values.numpy()))


norm1, norm2 = (total(reference**2 @ mass) for reference in (u1_reference, u2_reference))
validation = torch.arange(TRAINING, TRAINING + VALIDATION)


def squared_errors(u2, samples):
    """This rank's part of the squared relative errors."""
    return (u2 - u2_reference[samples])**2 @ mass/norm2[samples]


# The network
# -----------
# It adds to the temperature what one hidden layer says, and leaves a cold rim cold. It starts as the identity.

WIDTH, BATCH, LEARNING_RATE = 128, 20, 2e-4
warm = Function(V).assign(1)
for condition in rim:
    condition.zero(warm)
warm = torch.from_numpy(whole(warm.dat.data_ro))


class Emulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.decode = torch.nn.Linear(n, WIDTH), torch.nn.Linear(WIDTH, n)
        torch.nn.init.zeros_(self.decode.weight)
        torch.nn.init.zeros_(self.decode.bias)

    def forward(self, u):
        return u + warm*self.decode(torch.tanh(self.encode(u)))


# Training
# --------
# A refinement makes the whole difference between the two runs: it is handed to the solver, and told the validation error
# after each epoch. The rest is the same: conjugate gradients with Jacobi's preconditioner, Adam, the order of the samples.
#
# Each rank has the whole network; through its part of the loss comes its part of the gradient, and one
# reduction adds the parts up.

def train(name, refinement):
    torch.manual_seed(arguments.seed)
    network = Emulator()
    step = Step(refinement=refinement, options_prefix="physics_", solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"})
    statistics = step.solver.statistics
    parameters = list(network.parameters())
    optimiser = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    gradient = torch.zeros(sum(parameter.numel() for parameter in parameters))  # one array for all, to be reduced at once
    for parameter, part in zip(parameters, gradient.split([parameter.numel() for parameter in parameters])):
        parameter.grad = part.view_as(parameter)

    record = {"error": [], "level": [], "setting": [], "solves": [], "adjoint_solves": [], "forward_iterations": [],
              "adjoint_iterations": [], "solver_seconds": [], "seconds": []}  # all but the first three add up over the epochs
    statistics.reset()
    start = time.perf_counter()
    bar = tqdm(range(arguments.epochs), desc=f"{name:>9}", unit="epoch", mininterval=0.5, disable=comm.rank > 0)
    for _ in bar:
        for samples in torch.randperm(TRAINING).split(BATCH):
            gradient.zero_()
            u2 = step(network(u0[samples])[:, mine])
            squared_errors(u2, samples).mean().backward()
            comm.Allreduce(MPI.IN_PLACE, gradient.numpy())
            optimiser.step()

        with torch.no_grad():
            u2 = step(network(u0[validation])[:, mine])
            error = total(squared_errors(u2, validation)).sqrt().mean().item()
        record["level"].append(refinement.level)
        record["setting"].append(str(refinement.setting))
        refinement.step(error)

        record["error"].append(error)
        for quantity in ("solves", "adjoint_solves", "forward_iterations", "adjoint_iterations"):
            record[quantity].append(getattr(statistics, quantity))
        record["solver_seconds"].append(comm.allreduce(statistics.seconds, MPI.MAX))
        record["seconds"].append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
        bar.set_postfix(error=f"{error:.4f}", level=refinement.level, physics=refinement.setting, refresh=False)

    # What the last network is worth with converged physics, and without any: coarse physics may have taught it to make up
    # for the solver's errors. This is not counted as training.
    with torch.no_grad():
        u1 = network(u0[validation])[:, mine]
        u2 = reference_step(u1)
        record["one_step_error"] = total((u1 - u1_reference[validation])**2 @ mass/norm1[validation]).sqrt().mean().item()
        record["converged_error"] = total(squared_errors(u2, validation)).sqrt().mean().item()
        record["validation_error"] = float(np.mean(record["error"][-10:]))
    return record, u2


PETSc.Sys.Print(f"{arguments.mesh.name}: {n} nodes on {comm.size} rank{'s' if comm.size > 1 else ''}; "
                f"{TRAINING} training and {VALIDATION} validation samples, seed {arguments.seed}, {arguments.epochs} epochs")
versions = {name: version(name) for name in ("prdp-fem", "firedrake", "petsc4py", "torch", "numpy")} | {"python": platform.python_version()}
runs = {}
runs["PRDP"], u2 = train("PRDP", prdp)
runs["converged"], _ = train("converged", FixedRefinement(Tolerance(1e-10), comm=comm))

# The result
# ----------
# Iterations and seconds are those of training and validation together.

rows = {
    "validation error (mean of last 10 epochs)": ("validation_error", "{:.5f}"),
    "  the last network with converged physics": ("converged_error", "{:.5f}"),
    "  the last network alone, at one step": ("one_step_error", "{:.5f}"),
    "forward iterations": ("forward_iterations", "{:,}"),
    "adjoint iterations": ("adjoint_iterations", "{:,}"),
    "all iterations": ("iterations", "{:,}"),
    "seconds in the solver": ("solver_seconds", "{:.1f}"),
    "seconds in all": ("seconds", "{:.1f}"),
}
totals = {}
for name, run in runs.items():
    run["iterations"] = [forward + adjoint for forward, adjoint in zip(run["forward_iterations"], run["adjoint_iterations"])]
    totals[name] = {key: run[key][-1] if isinstance(run[key], list) else run[key] for key, _ in rows.values()}
saving = {key: 1 - totals["PRDP"][key]/totals["converged"][key] for key, _ in rows.values()}

PETSc.Sys.Print(f"\n{'':44}{'converged':>12}{'PRDP':>12}{'saved':>10}")
for title, (key, form) in rows.items():
    PETSc.Sys.Print(f"{title:44}{form.format(totals['converged'][key]):>12}{form.format(totals['PRDP'][key]):>12}{100*saving[key]:>8.1f} %")

# The figures
# -----------
# The first one follows Figure 2 of the PRDP paper: what training achieves, and what it takes.

BLUE, RED = "#0072B2", "#D55E00"  # told apart by the colour-blind as well


def draw_training(path):
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = np.arange(1, arguments.epochs + 1)
    per_solve = {}
    for name, colour in (("converged", RED), ("PRDP", BLUE)):
        run = runs[name]
        solves = np.add(run["solves"], run["adjoint_solves"])
        per_solve[name] = np.diff(run["iterations"], prepend=0)/np.diff(solves, prepend=0)
        left.semilogy(epochs, run["error"], color=colour, label=name)
        right.plot(epochs, per_solve[name], color=colour, drawstyle="steps-mid")
    refined = np.flatnonzero(np.diff(runs["PRDP"]["level"]))
    left.plot(epochs[refined], np.array(runs["PRDP"]["error"])[refined], "^", color=BLUE, label="refined after this epoch")
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
    left.yaxis.set_major_formatter(lambda error, _: f"{100*error:g} %")
    left.yaxis.set_minor_locator(NullLocator())
    left.set(xlabel="epoch", ylabel="relative error of $u_2$", title="Validation error")
    left.legend()
    right.fill_between(epochs, per_solve["PRDP"], per_solve["converged"], step="mid", color=BLUE, alpha=0.15, linewidth=0)
    right.text(0.5, 0.55, f"{100*saving['iterations']:.0f} % of iterations saved", transform=right.transAxes, ha="center", fontsize=13)
    right.text(epochs[-1], per_solve["converged"][-1] - 0.6, "converged", color=RED, ha="right", va="top")
    right.text(epochs[-1], per_solve["PRDP"][-1] + 0.6, "PRDP", color=BLUE, ha="right", va="bottom")
    right.set(xlabel="epoch", ylabel="iterations per solve", title="Forward and adjoint solves", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=150)


def draw_plate(path, triangles, u0, u2, reference):
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    panels = figure.subplots(1, 4)
    panels[0].triplot(*x, triangles, color="black", linewidth=0.4)
    panels[0].set_title(f"{n} nodes, {len(triangles)} triangles")
    fields = {"$u_0$, a validation sample": u0, "$u_2$ by network (PRDP) and solver": u2, "$u_2$ minus the reference": u2 - reference}
    limits = abs(u0).max(), abs(u0).max(), abs(u2 - reference).max()
    for axes, title, limit in zip(panels[1:], fields, limits):
        colours = axes.tripcolor(*x, triangles, fields[title], cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud")
        axes.set(title=title, facecolor="0.8")
        if axes is not panels[1]:  # u0 and u2 share theirs
            figure.colorbar(colours, ax=axes, shrink=0.9)
    for axes in panels:
        axes.set(aspect="equal", xticks=[], yticks=[])
    figure.savefig(path, dpi=150)


cells = V.dof_dset.lgmap.apply(V.cell_node_map().values.ravel().astype(PETSc.IntType)).reshape(-1, 3)
triangles = place[np.concatenate(comm.allgather(cells))]
u2, reference = whole(u2[0].numpy()), whole(u2_reference[TRAINING].numpy())

if comm.rank == 0:
    draw_training(arguments.output/"training.png")
    draw_plate(arguments.output/"plate.png", triangles, u0[TRAINING].numpy(), u2, reference)
    results = {
        "arguments": {**vars(arguments), "mesh": arguments.mesh.name, "output": arguments.output.name},
        "nodes": n,
        "triangles": len(triangles),
        "ranks": comm.size,
        "versions": versions,
        "totals": totals,
        "saving": saving,
        "runs": runs,
    }
    (arguments.output/"results.json").write_text(json.dumps(results, indent=1) + "\n")
PETSc.Sys.Print(f"\nresults.json, training.png and plate.png are in {os.path.relpath(arguments.output)}")
