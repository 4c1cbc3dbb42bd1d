"""An emulator of heat conduction, trained through a finite element solver: in a plate with holes,
in one, two and three dimensions.

The emulator is a network that maps a temperature u0 to the temperature u1 one time step later. It
learns to do so through a solver: the network takes the first step, the solver takes the second one,

    u0 --network--> u1 --solver--> u2,

and the loss compares u2 with a reference two steps on. Each training sample needs a forward and an
adjoint solve, and that is where the time goes. The script trains the same network several times,
from the same weights and with the same batches:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP): each is given one iteration at first, two in three
  dimensions, and more whenever the validation error stops improving, until more iterations no
  longer help;
* with constant numbers of iterations or tolerances, or a direct solver, where asked for.

It prints what they have reached and what they cost, and draws it:

    python heat_emulator.py                                          a plate with holes; a minute
    python heat_emulator.py --quick                                  half a minute; or QUICK=1
    python heat_emulator.py --domain square --solver jacobi --schedules converged prdp 5 10 20
    mpiexec -n 2 python heat_emulator.py --mesh my.msh --output out  two ranks share another mesh
    mpiexec -n 2 python heat_emulator.py --ensemble 2                two ranks share the samples

Options with a single dash are PETSc's: -log_view, or -physics_ksp_type and whatever else configures
the solver with prefix physics_.
"""

import os
import zlib
from pathlib import Path

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure

from prdp_fem import IterationLadder, LinearVariationalSolver
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.studies import (
    Study,
    command_line,
    draw_training,
    incomplete,
    save_figure,
    solver_parameters,
    triangle_mesh,
)
from prdp_fem.torch import (
    MLP,
    Gathering,
    GraphNetwork,
    Partition,
    ResNet,
    SolverLayer,
    deal,
    to_torch,
    total,
    train,
)

# The command line
# ----------------
# Whatever is wrong with it is said before any work is done, and once: not by every rank.

HERE = Path(__file__).resolve().parent
PLATE = HERE / "plate.msh"  # made from plate.geo
RIM = 2  # its physical group "rim"

SOLVERS = {
    "cg": {"ksp_type": "cg", "pc_type": "jacobi"},
    "jacobi": {"ksp_type": "richardson", "pc_type": "jacobi"},
    "steepest_descent": {
        "ksp_type": "python",
        "ksp_python_type": "prdp_fem.SteepestDescent",
        "pc_type": "none",
    },
    # what converges fastest, where nothing is refined and no factorisation is kept
    "cg+icc": {"ksp_type": "cg", "pc_type": "icc"},
}


def configure(parser):
    parser.add_argument(
        "--domain",
        choices=("plate", "interval", "square", "cube"),
        default="plate",
        help=(
            "a plate with insulated holes and a cold rim, on an unstructured mesh; or a domain in"
            " one, two or three dimensions with a cold boundary, on a structured one (default:"
            " %(default)s)"
        ),
    )
    parser.add_argument(
        "--mesh",
        type=Path,
        metavar="FILE.msh",
        help=(
            "instead: a mesh of triangles by Gmsh; it is scaled to unit size, and "
            "all its boundary is insulated"
        ),
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        default="cg",
        help=(
            "cg and jacobi with Jacobi's preconditioner, cg+icc with an incomplete factorisation,"
            " of each rank's part (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--network",
        choices=("mlp", "resnet", "graph"),
        default="mlp",
        help=(
            "dense layers, convolutions on a structured mesh, or messages along the edges (default:"
            " %(default)s)"
        ),
    )


def check(arguments):
    if arguments.network == "resnet" and (arguments.mesh or arguments.domain == "plate"):
        return (
            "--network resnet needs a structured mesh: add --domain interval, square or cube, or"
            " use --network graph"
        )


arguments = command_line(__file__, __doc__, configure=configure, check=check)
# its members have the whole mesh each, on ranks of their own (comm), and deal the samples out
ensemble = arguments.ensemble
comm = ensemble.comm
SOLVERS["cg+icc"] |= incomplete("icc", comm)

# The domain
# ----------
# Boundary markers of other meshes mean what their authors wanted, so these are insulated
# everywhere; only of our own plate do we know the rim.

domain = arguments.mesh.name if arguments.mesh else arguments.domain
CELLS = {
    "interval": {"quick": 31, "default": 31, "full": 200},
    "square": {"quick": 31, "default": 31, "full": 63},
    "cube": {"quick": 9, "default": 25, "full": 49},
}

if domain in CELLS and not arguments.mesh:
    cells = CELLS[domain][arguments.size]
    make_mesh = {"interval": UnitIntervalMesh, "square": UnitSquareMesh, "cube": UnitCubeMesh}[
        domain
    ]
    mesh = make_mesh(*[cells] * (list(CELLS).index(domain) + 1), comm=comm)
    cold = "on_boundary"
else:
    # A file that holds no such mesh ends the script here, with a sentence.
    mesh = triangle_mesh(arguments.mesh or PLATE, comm, marks=[] if arguments.mesh else [RIM])
    corners = np.concatenate(comm.allgather(mesh.coordinates.dat.data_ro))
    size = np.ptp(corners, axis=0).max()
    mesh.coordinates.assign((mesh.coordinates - Constant(corners.min(axis=0))) / size)
    cold = None if arguments.mesh else RIM

# The solver
# ----------
# An implicit Euler step from u_old to u_old + w, with a lumped mass matrix. It is the increment
# w that is solved for: the iteration starts at w = 0, which is the old temperature, so a single
# iteration is a rough step already, and all others improve on it. A level of the refinement adds as
# many iterations as halve the solver's error, or so.

DIFFUSION = 2e-3 if mesh.geometric_dimension == 3 else 1e-3  # diffusivity times time step
LEVELS = {
    "cg": 2 if mesh.geometric_dimension == 3 else 1,
    "cg+icc": 1,
    "jacobi": 3,
    "steepest_descent": 3,
}
LEVEL = LEVELS[arguments.solver]
lumped = dx(scheme="KMV", degree=1)
V = FunctionSpace(mesh, "CG", 1)
w, v = TrialFunction(V), TestFunction(V)
u_old, increment = Function(V, name="u_old"), Function(V, name="increment")
a = w * v * lumped + DIFFUSION * inner(grad(w), grad(v)) * dx
L = -DIFFUSION * inner(grad(u_old), grad(v)) * dx
conditions = [] if cold is None else [DirichletBC(V, 0, cold)]
problem = LinearVariationalProblem(a, L, increment, bcs=conditions, constant_jacobian=True)


class Step(torch.nn.Module):
    """The step as a layer of a network, from the old temperature to the new one. Its solver comes
    from prdp_fem.
    """

    def __init__(self, **options):
        super().__init__()
        self.solver = LinearVariationalSolver(problem, **options)
        self.increment = SolverLayer(self.solver, controls=[u_old])

    def forward(self, u):
        return u + self.increment(u)


# The order of the unknowns
# -------------------------
# The network sees the whole domain, whereas a rank has only its part of the solver's unknowns. So
# that any number of ranks trains the same network, it sees them in an order that does not depend on
# ranks: sorted by coordinates.

field = Gathering(V)
x = field.coordinates.T
dimension, n = x.shape

# The data
# --------
# Initial temperatures are random Fourier series of sine modes in each direction, scaled to a
# largest value of one. All ranks make all of them, but each keeps only its part of the reference
# temperatures, which are converged to 1e-12.

MODES = {1: 15, 2: 5, 3: 3}[dimension]
TRAINING, VALIDATION = 100 if dimension == 3 else 200, 50
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
sines = np.sin(np.pi * np.arange(1, MODES + 1)[:, None] * x[:, None])  # by direction, mode and node
reference_step = Step(solver_parameters={"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": 1e-12})
mass = to_torch(assemble(v * dx), copy=True)


class Data:
    """Initial temperatures, whole, and reference temperatures one and two steps later, of which a
    rank has its part.
    """

    def __init__(self, seed):
        fields = np.random.default_rng(seed).uniform(
            -1, 1, (TRAINING + VALIDATION, *[MODES] * dimension)
        )
        fields = np.einsum("s...k,kn->s...n", fields, sines[-1])
        for modes in sines[-2::-1]:
            fields = np.einsum("s...kn,kn->s...n", fields, modes)
        self.u0 = torch.from_numpy(fields / abs(fields).max(axis=1, keepdims=True))
        with torch.no_grad():
            self.u1 = reference_step(field.scatter(self.u0))
            self.u2 = reference_step(self.u1)
        self.norm1, self.norm2 = (
            field.total(reference**2 @ mass) for reference in (self.u1, self.u2)
        )

    def squared_errors(self, u2, samples):
        """This rank's part of the squared errors, relative to the reference, in the L2 norm with
        the lumped mass matrix.
        """
        return (u2 - self.u2[samples]) ** 2 @ mass / self.norm2[samples]


validation = deal(torch.arange(TRAINING, TRAINING + VALIDATION), ensemble)


def mean_error(squared_errors):
    """Over all validation samples, from this rank's part of those of its member."""
    return total(squared_errors.sum(), ensemble.global_comm).item() / VALIDATION


# The network
# -----------
# It adds to the temperature what its layers say, and leaves a cold boundary cold. It starts as the
# identity. It is given whole temperatures, and each rank has its part of the new one. Dense layers
# and convolutions need the whole to compute any part. A graph network looks from a node to its
# neighbours: each rank computes its own nodes, and has its neighbours' values from their ranks.
#
# In three dimensions the two million weights of dense layers are numbers of single precision:
# moving them through memory is what they cost.

PRECISION = torch.float32 if dimension == 3 else torch.float64
WIDTH = {"mlp": 128 if dimension < 3 else 64, "resnet": 8, "graph": 16}[arguments.network]

warm = Function(V).assign(1)
for condition in conditions:
    condition.zero(warm)
warm = to_torch(warm, copy=True)


class Emulator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        if arguments.network == "mlp":
            self.layers = MLP(n, n, width=WIDTH, depth=1)
        elif arguments.network == "resnet":
            self.layers = ResNet(1, 1, field.grid, width=WIDTH, blocks=1)
        else:
            own = Partition(V)
            self.layers = GraphNetwork(
                1, 1, own.edges, own.coordinates, halo=own.halo, width=WIDTH, steps=3
            )
        self.to(PRECISION)

    def forward(self, whole):
        u = field.scatter(whole)
        if arguments.network == "mlp":
            change = field.scatter(self.layers(whole.to(PRECISION)))
        elif arguments.network == "resnet":
            change = field.scatter(self.layers(whole.to(PRECISION)[..., None, :])[..., 0, :])
        else:
            change = self.layers(u.to(PRECISION)[..., None, :])[..., 0, :]
        return u + warm * change


# Training
# --------
# A refinement makes the whole difference between the runs: it is handed to the solver, and told the
# validation error after each epoch. That error is the relative mean square, as in the paper; tables
# and figures show its root. The rest is the same: the method, Adam, the weights at the start, the
# order of the samples.

EPOCHS = (
    arguments.epochs
    or {
        "quick": 60 if domain == "plate" else 15,
        "default": 60 if dimension == 3 else 150,
        "full": 300,
    }[arguments.size]
)
BATCH = 10 if dimension == 3 else 20
LEARNING_RATE = 2e-3 if arguments.network != "mlp" else 6e-4 if dimension == 3 else 2e-4
AT_ONE_STEP = "error at one step, of the network alone"
CONVERGED_PHYSICS = "error with converged physics"
shown = {}  # a validation sample of each run, for the picture


def adam(network):
    if arguments.network != "mlp":
        return torch.optim.Adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    # The first layer has a weight for each node. Adam moves all of them at once, and the sum over
    # the nodes moves by as much: the more nodes, the slower they must be.
    first, *others = network.layers.layers
    return torch.optim.Adam(
        [
            {"params": list(first.parameters()), "lr": LEARNING_RATE * min(1, 1000 / n)},
            {"params": [parameter for layer in others for parameter in layer.parameters()]},
        ],
        lr=LEARNING_RATE,
        fused=True,
    )


def make_step(refinement):
    """The step that is trained through: under the schedule "direct" by a factorisation, kept for
    good, since the operator is constant.
    """
    return Step(
        refinement=refinement,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement, SOLVERS[arguments.solver], factorisation="cholesky", comm=comm
        ),
    )


def train_one(seed, refinement, label):
    data = Data(seed)
    torch.manual_seed(seed)
    network = Emulator()
    step = make_step(refinement)

    def loss(samples):
        u2 = step(network(data.u0[samples]))
        return data.squared_errors(u2, samples).mean()

    def validate():
        u2 = step(network(data.u0[validation]))
        return mean_error(data.squared_errors(u2, validation))

    # What the network is worth without any physics, which is how it is used in the end, and with
    # converged physics: coarse ones may teach it to make up for the solver's errors. This is
    # measured now and then, and not counted as training.

    def at_one_step():
        u1 = network(data.u0[validation])
        return mean_error((u1 - data.u1[validation]) ** 2 @ mass / data.norm1[validation]) ** 0.5

    def with_converged_physics():
        u2 = reference_step(network(data.u0[validation]))
        return mean_error(data.squared_errors(u2, validation)) ** 0.5

    history = train(
        network,
        loss,
        validate,
        refinement=refinement,
        solvers=[step.solver],
        samples=TRAINING,
        batch_size=BATCH,
        epochs=EPOCHS,
        optimiser=adam(network),
        assess={"in_use": at_one_step, "converged": with_converged_physics},
        seed=seed,
        ensemble=ensemble,
        label=label,
    )

    with torch.no_grad():
        u2 = reference_step(network(data.u0[validation]))
    shown[label] = [field.gather(values) for values in (u2[0], data.u2[TRAINING])] + [
        data.u0[TRAINING]
    ]
    # those of the last network
    return history, {
        AT_ONE_STEP: history.in_use[-1][1],
        CONVERGED_PHYSICS: history.converged[-1][1],
        "labels": {"in use": "Error of the network alone, at one step"},
    }


PETSc.Sys.Print(
    f"{domain}: {n} nodes on {comm.size} rank{'s' if comm.size > 1 else ''}"
    f"{f', {ensemble.ensemble_size} times' if ensemble.ensemble_size > 1 else ''}; "
    f"{TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs"
)
name = ("mesh_" if arguments.mesh else "") + f"{Path(domain).stem}_{arguments.solver}"
# Another mesh can have the same name, and as many nodes.
described = {}
if arguments.mesh:
    described["mesh"] = from_first_rank(comm, lambda: zlib.crc32(arguments.mesh.read_bytes()))
study = Study(
    f"heat_{name}" + (f"_{arguments.network}" if arguments.network != "mlp" else ""),
    arguments,
    ladder=IterationLadder(start=2 if dimension == 3 else 1, step=LEVEL),
    setup={
        "domain": domain,
        "nodes": n,
        "solver": arguments.solver,
        "network": arguments.network,
        "training samples": TRAINING,
        "validation samples": VALIDATION,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
        "width": WIDTH,
        "diffusivity times time step": DIFFUSION,
        **described,
    },
)
runs = study.run(
    train_one,
    trial=lambda refinement: make_step(refinement)(torch.zeros(1, V.dof_dset.size)),
)

# The result
# ----------
# Iterations and seconds are those of training and validation together.

study.print_table(runs)
study.print_extras(runs, AT_ONE_STEP, CONVERGED_PHYSICS)


def draw_fields(path, u2, reference, u0):
    """Panels on a plane domain; a line, or the middle plane of a cube, elsewhere."""
    figure = Figure(figsize=(15, 3.8), layout="constrained")
    panels = figure.subplots(1, 4)
    fields = {
        "$u_0$, a validation sample": u0,
        "$u_2$ by network and solver": u2,
        "$u_2$ minus the reference": u2 - reference,
    }
    limits = abs(u0).max(), abs(u0).max(), abs(u2 - reference).max()
    if dimension == 2:
        panels[0].triplot(*x, cells, color="black", linewidth=0.4)
        panels[0].set_title(f"{n} nodes, {len(cells)} triangles")
    else:
        panels[0].set_axis_off()
    for axes, title, limit in zip(panels[1:], fields, limits):
        if dimension == 1:
            axes.plot(x[0], fields[title])
            axes.set(title=title, ylim=(-1.1 * limit, 1.1 * limit))
            continue
        if dimension == 2:
            colours = axes.tripcolor(
                *x, cells, fields[title], cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud"
            )
        else:
            middle = fields[title].reshape(field.grid)[:, :, field.grid[2] // 2]
            colours = axes.imshow(middle.T, origin="lower", cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set(title=title, facecolor="0.8")
        if axes is not panels[1]:  # u0 and u2 share theirs
            figure.colorbar(colours, ax=axes, shrink=0.9)
    if dimension > 1:
        for axes in panels:
            axes.set(aspect="equal", xticks=[], yticks=[])
    save_figure(figure, path)


cells = field.cells  # collective at first
schedule, run = study.representative(runs)


def draw():
    draw_training(runs, study.path("training"))
    if (fields := shown.get(study.label(schedule, run.seed))) is not None:
        # not where the run comes from a file
        draw_fields(study.path("fields"), *(values.numpy() for values in fields))


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
