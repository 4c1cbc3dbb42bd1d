"""A network that tells a conductivity from measurements at the skin, trained through the solver
that would explain them: data and a mesh of one's own, and defaults everywhere.

Currents are sent through a body in four patterns, one after the other: they enter and leave through
its skin, and an electrode inside is grounded. The potentials at the skin are measured, with an
error of 1 %, and what conducts how well inside is asked for. The network is given what was
measured, and answers with a conductivity; the solver says what would be measured then,

    measured potentials --network--> conductivity --solver--> potentials, in each pattern,

and the loss compares the two. No conductivity needs to be known for that: what there is to learn
from comes through the solver alone, with a forward and an adjoint solve for each sample and
pattern, whose operator is another one each time. The script trains the same network several times,
from the same weights and with the same batches:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP), under the ladder and the thresholds that the package
  has where it is told nothing;
* otherwise, where asked for.

It prints what they have reached and what they cost, and draws it:

    python conductivity_network.py                             three minutes
    python conductivity_network.py --quick                     a quarter of a minute; or QUICK=1
    python conductivity_network.py --mesh my.msh               another mesh, see below
    python conductivity_network.py --schedules converged direct prdp rtol:1e-2 32 --seed 1 2 3
    mpiexec -n 2 python conductivity_network.py --output out   two ranks share the mesh
    mpiexec -n 2 python conductivity_network.py --ensemble 2   two ranks share the samples

Options with a single dash are PETSc's: -log_view, or -physics_pc_type and whatever else configures
the solver with prefix physics_.
"""

import os
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure

from prdp_fem import LinearVariationalSolver
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.studies import (
    CONVERGED,
    PRDP,
    Study,
    command_line,
    draw_training,
    factorised,
    incomplete,
    save_figure,
    solver_parameters,
    triangle_mesh,
)
from prdp_fem.torch import MLP, Gathering, SolverLayer, deal, shared, to_torch, total, train

# The command line
# ----------------

BODY = Path(__file__).resolve().with_name("body.msh")  # made from body.geo
SKIN, ELECTRODE = 1, 2  # its physical groups, and those that another mesh is to have
SOLVERS = {
    "cg": {"ksp_type": "cg", "pc_type": "jacobi"},
    # what converges fastest, where nothing is refined and nothing factorised
    "cg+icc": {"ksp_type": "cg"},
}


def configure(parser):
    parser.add_argument(
        "--mesh",
        type=Path,
        default=BODY,
        metavar="FILE.msh",
        help="of triangles, by Gmsh, with the skin as physical group 1 and an electrode as 2",
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        default="cg",
        help=(
            "with Jacobi's preconditioner, or an incomplete factorisation of each rank's part"
            " (default: %(default)s)"
        ),
    )


arguments = command_line(__file__, __doc__, configure=configure)
# its members have the whole mesh each, on ranks of their own (comm), and deal the samples out
ensemble = arguments.ensemble
comm = ensemble.comm
SOLVERS["cg+icc"] |= incomplete("icc", comm)

# The body
# --------
# -div(exp(m) grad u) = 0 with u = 0 at the electrode, and a current exp(m) du/dn through the skin:
# in pattern k the cosine or sine of the angle around the body's middle, or of twice the angle. A
# pattern is a control as the conductivity is: four numbers, of which one is 1.

mesh = triangle_mesh(arguments.mesh, comm, marks=[SKIN, ELECTRODE])
V = FunctionSpace(mesh, "CG", 1)
field = Gathering(V)
x, n = torch.from_numpy(field.coordinates), len(field)
middle = (x.max(dim=0).values + x.min(dim=0).values) / 2
size = (x.max(dim=0).values - x.min(dim=0).values).max().item()
PATTERNS = 4

trial, v = TrialFunction(V), TestFunction(V)
m, potential = Function(V, name="log conductivity"), Function(V, name="potential")
pattern = Constant([1.0] + [0.0] * (PATTERNS - 1), name="pattern")
X, Y = SpatialCoordinate(mesh)
angle = atan2(Y - middle[1].item(), X - middle[0].item())
currents = as_vector([cos(angle), sin(angle), cos(2 * angle), sin(2 * angle)])
problem = LinearVariationalProblem(
    exp(m) * inner(grad(trial), grad(v)) * dx,
    dot(pattern, currents) * v * ds(SKIN),
    potential,
    bcs=DirichletBC(V, 0, ELECTRODE),
)
patterns = shared(torch.eye(PATTERNS, dtype=torch.float64), comm)


class Measurement(torch.nn.Module):
    """From log conductivities, shape (batch, n), to potentials in all patterns, (batch, PATTERNS,
    n), of this rank's part of the body.
    """

    def __init__(self, **options):
        super().__init__()
        self.solver = LinearVariationalSolver(problem, **options)
        self.potential = SolverLayer(self.solver, controls=[m, pattern])

    def forward(self, conductivity):
        each = conductivity[:, None].expand(-1, PATTERNS, -1)
        return self.potential(each, patterns.expand(len(conductivity), -1, -1))


def make_measurement(refinement):
    """What is trained through; under the schedule "direct" each operator is factorised."""
    return Measurement(
        refinement=refinement,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement, SOLVERS[arguments.solver], factorisation="cholesky", comm=comm
        ),
    )


exact = Measurement(solver_parameters=factorised("cholesky", comm))

# The data
# --------
# In a body some spots conduct better than the rest, and some worse: log conductivities are sums of
# bells. What was measured is made up here, with an exact solver and errors of 1 %; it would be
# read from files otherwise. The network sees the potentials at so many places on the skin; the
# loss compares them all along it, each by the length that belongs to it.

TRAINING, VALIDATION = {"quick": (4, 3), "default": (24, 16), "full": (200, 50)}[arguments.size]
SPOTS, PLACES, NOISE = 3, 24, 0.01
torch.set_num_threads(1)
lengths = to_torch(assemble(v * ds(SKIN)), copy=True)
skin = field.gather(lengths).nonzero().squeeze(1)
order = torch.atan2(*(x[skin] - middle).T.flip(0)).argsort()
places = skin[order[torch.linspace(0, len(skin), PLACES + 1)[:-1].long()]]


def bells(centres, widths):
    """Shape (..., n), for centres of shape (..., 2), in units of the body."""
    squares = ((x - centres[..., None, :]) ** 2).sum(dim=-1)
    return torch.exp(-squares / (2 * (widths[..., None] * size) ** 2))


class Data:
    """Log conductivities, whole, and what was measured of them: this rank's part, and at the places
    that the network sees.
    """

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        count = TRAINING + VALIDATION, SPOTS
        inside = x[torch.from_numpy(random.integers(n, size=count))]
        widths = torch.from_numpy(random.uniform(0.08, 0.16, count))
        heights = torch.from_numpy(random.choice([-1, 1], count) * random.uniform(0.6, 1.4, count))
        self.truth = torch.stack(
            [(h[:, None] * bells(c, w)).sum(dim=0) for c, w, h in zip(inside, widths, heights)]
        )
        with torch.no_grad():
            self.measured = exact(field.scatter(self.truth))
        errors = torch.from_numpy(random.normal(size=(*count[:1], PATTERNS, n)))
        whole = field.gather(self.measured)
        whole = whole + NOISE * whole[..., skin].square().mean(dim=-1).sqrt()[..., None] * errors
        self.measured = field.scatter(whole)
        self.norm = field.total(self.measured.square() @ lengths).sum(dim=-1)
        seen = whole[..., places].flatten(1)
        average, spread = seen[:TRAINING].mean(dim=0), seen[:TRAINING].std(dim=0)
        self.seen = (seen - average) / spread

    def squared_errors(self, potentials, samples):
        """This rank's part, relative to what was measured."""
        differences = (potentials - self.measured[samples]).square() @ lengths
        return differences.sum(dim=-1) / self.norm[samples]


data_of = lru_cache(1)(Data)  # by seed: schedules share them
validation = deal(torch.arange(TRAINING, TRAINING + VALIDATION), ensemble)

# The network
# -----------
# It says how high the bells on a lattice are, at first zero: a body that conducts equally
# everywhere. All ranks compute all of it, since it is small.

LATTICE, WIDTH = 7, 64
axis = (torch.arange(LATTICE) + 0.5) / LATTICE - 0.5
lattice = middle + size * torch.cartesian_prod(axis, axis)
inside = torch.cdist(lattice, x).min(dim=1).values < 0.5 * size / LATTICE
basis = bells(lattice[inside], torch.full((int(inside.sum()),), 0.6 / LATTICE))


class Estimator(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = MLP(PATTERNS * PLACES, len(basis), width=WIDTH, depth=2).double()

    def forward(self, seen):
        return self.layers(seen) @ basis


# Training
# --------
# The refinement is told the mean square of what the potentials at the skin differ by, of samples
# that were not trained on. That is all that somebody has who does not know any conductivity. Here
# the error of the conductivities is known, and is what runs are judged by.

EPOCHS = arguments.epochs or {"quick": 8, "default": 30, "full": 200}[arguments.size]
BATCH, LEARNING_RATE = 2, 2e-3
mass = field.gather(to_torch(assemble(v * dx), copy=True))
shown = {}  # true and found, of a validation sample of each run, for the picture


def train_one(seed, refinement, label):
    data = data_of(seed)
    torch.manual_seed(seed)
    estimator, measurement = Estimator(), make_measurement(refinement)

    def loss(samples):
        potentials = measurement(field.scatter(estimator(data.seen[samples])))
        return data.squared_errors(potentials, samples).mean()

    def mean_error(measurement):
        potentials = measurement(field.scatter(estimator(data.seen[validation])))
        squares = data.squared_errors(potentials, validation)
        return total(squares.sum(), ensemble.global_comm).item() / VALIDATION

    def of_conductivity():
        """Each rank has whole samples here, so that the sum is one over members."""
        truth = data.truth[validation]
        squares = (estimator(data.seen[validation]) - truth).square() @ mass
        ratios = squares / (truth.square() @ mass)
        return (total(ratios.sum(), ensemble.ensemble_comm).item() / VALIDATION) ** 0.5

    history = train(
        estimator,
        loss,
        lambda: mean_error(measurement),
        optimiser=torch.optim.Adam(estimator.parameters(), lr=LEARNING_RATE),
        refinement=refinement,
        assess={"in_use": of_conductivity, "converged": lambda: mean_error(exact) ** 0.5},
        solvers=[measurement.solver],
        samples=TRAINING,
        batch_size=BATCH,
        epochs=EPOCHS,
        seed=seed,
        ensemble=ensemble,
        label=label,
    )
    with torch.no_grad():
        shown[label] = data.truth[TRAINING], estimator(data.seen[TRAINING : TRAINING + 1])[0]
    return history, {
        "labels": {"errors": "Potentials at the skin", "in use": "Error of the log conductivity"}
    }


PETSc.Sys.Print(
    f"{arguments.mesh.name}: {n} nodes on {comm.size} rank{'s' if comm.size > 1 else ''}"
    f"{f', {ensemble.ensemble_size} times' if ensemble.ensemble_size > 1 else ''}; "
    f"{TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs"
)
described = {}
if arguments.mesh != BODY:
    described["mesh"] = from_first_rank(comm, lambda: zlib.crc32(arguments.mesh.read_bytes()))
study = Study(
    f"conductivity_{arguments.mesh.stem}_{arguments.solver}",
    arguments,
    setup={
        "nodes": n,
        "solver": arguments.solver,
        "patterns": PATTERNS,
        "error of measurement": NOISE,
        "training samples": TRAINING,
        "validation samples": VALIDATION,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
        "width": WIDTH,
        **described,
    },
)
runs = study.run(
    train_one,
    trial=lambda refinement: make_measurement(refinement)(torch.zeros(1, V.dof_dset.size)),
)

# The result
# ----------
# Iterations and seconds are those of training and validation together. "Error" is that of the
# potentials through the physics of the moment, which is what the refinement is told, and "in use"
# that of the log conductivities.

study.print_table(runs)


def draw_conductivities(path, fields):
    figure = Figure(figsize=(4.2 * len(fields), 3.6), layout="constrained")
    limit = abs(fields["true"]).max().item()
    for axes, (title, values) in zip(figure.subplots(1, len(fields)), fields.items()):
        colours = axes.tripcolor(
            *x.T, cells, values, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud"
        )
        axes.plot(*x[places].T, "k.", markersize=4)
        axes.set(title=f"log conductivity, {title}", aspect="equal", xticks=[], yticks=[])
    figure.colorbar(colours, ax=axes, shrink=0.9)
    save_figure(figure, path)


cells = field.cells  # collective at first
found = {}
for schedule in (CONVERGED, PRDP):
    if (pair := shown.get(study.label(schedule, arguments.seeds[0]))) is not None:
        # not where the run comes from a file
        found["true"], found[schedule.title] = pair


def draw():
    draw_training(runs, study.path("training"))
    if found:
        draw_conductivities(study.path("fields"), found)


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
