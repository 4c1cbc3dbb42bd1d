"""A corrector for coarse solves of a vortex street behind a cylinder, trained through the finite
element solver.

The channel of the DFG benchmark 2D-2 on an unstructured mesh: flow past a cylinder at Reynolds
number 100 sheds vortices, and what is asked for is how drag and lift oscillate, and how fast.
Linear elements with large time steps get all of it wrong. A graph network on the mesh learns to
make up for that: after each time step it adds a correction to velocities and pressure, and the
corrected ones go into the next step,

    u0 --solver--> --network--> u1 --solver--> --network--> u2,

and the loss compares u1 and u2 with a reference by quadratic elements and smaller steps. The
network is trained at Reynolds numbers 80 and 120; it is validated at that of the benchmark, which
it has never seen. The gradient goes back through the second solve, whose operator depends on u1,
and that is where the time goes. The script trains the same network several times, from the same
weights and with the same batches:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP): each is given 4 iterations at first, and 2 more
  whenever the validation error stops improving, until more iterations no longer help;
* with constant numbers of iterations, where asked for.

Then the corrected solver goes alone for five periods. The script prints what drag, lift and
frequency have become, and draws them:

    python cylinder.py                            four minutes, and two more the first time
    python cylinder.py --quick                    half a minute, without vortices yet; or QUICK=1
    python cylinder.py --schedules converged prdp 4 8 16 --seed 1 2 3 --resume
    mpiexec -n 2 python cylinder.py --output out  two ranks share the mesh
    mpiexec -n 2 python cylinder.py --ensemble 2  two ranks share the samples

Where ranks share a mesh, the incomplete factorisation is one of each rank's part, so that
iterations, and what truncated solves give, depend on their number; -physics_pc_type pbjacobi does
not, and takes more of them.

Options with a single dash are PETSc's: -log_view, or -physics_pc_type and whatever else configures
the solver with prefix physics_.

M. Schaefer, S. Turek, Benchmark computations of laminar flow around a cylinder, in: Flow Simulation
with High-Performance Computers II, Notes on Numerical Fluid Mechanics 52, Vieweg 1996, pages 547 to
566: test case 2D-2.
"""

import io
import os
from functools import cached_property
from pathlib import Path
from zipfile import BadZipFile

import firedrake
import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure

from prdp_fem import FixedRefinement, IterationLadder, LinearVariationalSolver, Tolerance
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.ranks.job import Refused
from prdp_fem.studies import (
    CONVERGED,
    PRDP,
    Study,
    command_line,
    draw_training,
    save_figure,
    solver_parameters,
    triangle_mesh,
)
from prdp_fem.studies.files import write
from prdp_fem.torch import (
    Gathering,
    GraphNetwork,
    SolverLayer,
    deal,
    from_torch,
    to_torch,
    total,
    train,
)

HERE = Path(__file__).resolve().parent
# GMRES, restarted after 30 iterations, and an incomplete factorisation of each rank's part, without
# fill-in: what PETSc does if it is told nothing; or with some.
SOLVERS = {
    "gmres": {"ksp_type": "gmres", "pc_type": "bjacobi", "sub_pc_type": "ilu"},
    "gmres+ilu1": {
        "ksp_type": "gmres",
        "pc_type": "bjacobi",
        "sub_pc_type": "ilu",
        "sub_pc_factor_levels": 1,
    },
}


def configure(parser):
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FILE.npz",
        help="where the reference flow is kept (default: the folder output beside this script)",
    )
    parser.add_argument("--solver", choices=SOLVERS, default="gmres", help="(default: %(default)s)")


arguments = command_line(
    __file__,
    __doc__,
    configure=configure,
    check=lambda arguments: (
        f"--reference {arguments.reference} is not called FILE.npz"
        if arguments.reference and arguments.reference.suffix != ".npz"
        else None
    ),
)
# its members have the whole mesh each, on ranks of their own (comm), and deal the samples out
ensemble = arguments.ensemble
comm = ensemble.comm
torch.set_num_threads(1)
quick = arguments.size == "quick"

TRAINING, VALIDATION = {"quick": (4, 6), "default": (40, 50), "full": (160, 50)}[arguments.size]
EPOCHS = arguments.epochs or {"quick": 8, "default": 30, "full": 60}[arguments.size]
# of solver and network in a training sample
STEPS = {"quick": 2, "default": 2, "full": 4}[arguments.size]
WIDTH = 16
LAYERS = 3
BATCH = 2
LEARNING_RATE = 1e-2
LADDER = IterationLadder(start=4, step=2)

# The channel
# -----------
# It is 2.2 long and 0.41 high, and the cylinder has a diameter of 0.1. What comes in is a parabola,
# of mean speed 1 in the benchmark. Drag and lift are given in units of 1/2 density speed^2
# diameter, the frequency as Strouhal number, in units of speed/diameter.

INFLOW = 1
OUTFLOW = 2
WALLS = 3
CYLINDER = 4
VISCOSITY = 1e-3
DIAMETER = 0.1
BENCHMARK = 1.0
TRAINING_SPEEDS = 0.8, 1.2

# Made from cylinder.geo.
mesh = triangle_mesh(HERE / "cylinder.msh", comm, marks=[INFLOW, OUTFLOW, WALLS, CYLINDER])
x, y = SpatialCoordinate(mesh)
parabola = 6 * y * (0.41 - y) / 0.41**2


def advection(wind, u):
    return dot(wind, nabla_grad(u))


def tractions(space, residual):
    """The force on the cylinder, as two forms: the residual of the momentum equation for test
    functions that are one on it.

    This is the volume form of drag and lift; it is more accurate than an integral of stresses over
    the surface.
    """
    forces = []
    for direction in np.eye(2):
        test = Function(space)
        DirichletBC(space, Constant(direction), CYLINDER).apply(test)
        forces.append(-residual(test))
    return forces


def coefficients(forces, speed):
    """Drag and lift from the two forms."""
    return [assemble(force) / (0.5 * speed**2 * DIAMETER) for force in forces]


# The coarse solver
# -----------------
# From u_old and p_old to u_old + w and p_old + r, by the trapezoidal rule with one Newton step from
# the old velocity, so that the equations are linear and their operator depends on u_old. GMRES
# starts at w = r = 0, which is the old state. All three components are piecewise linear and belong
# to the same nodes. What such elements need is added in proportion to the residual of the momentum
# equation: along the flow (SUPG), and along pressure gradients (PSPG) because the pressure would
# oscillate; and a penalty on the divergence. There are 15 to 20 steps in a period.

TIME_STEP = 0.02
W = VectorFunctionSpace(mesh, "CG", 1, dim=3)
trial = TrialFunction(W)
test = TestFunction(W)
old = Function(W, name="old state")
(w, r), (v, q), (u_old, p_old) = ((as_vector([f[0], f[1]]), f[2]) for f in (trial, test, old))
h = 2 * sqrt(CellVolume(mesh) / pi)
tau = 1 / sqrt((2 / TIME_STEP) ** 2 + (2 * BENCHMARK / h) ** 2 + (12 * VISCOSITY / h**2) ** 2)
tau_divergence = BENCHMARK * h / 2


def weak(inertia, viscous, p, u):
    """The weak form of inertia - viscosity*laplace(viscous) + grad(p) and of the divergence of u,
    with what stabilises them.
    """
    return (
        dot(inertia, v)
        + VISCOSITY * inner(grad(viscous), grad(v))
        - p * div(v)
        + q * div(u)
        + tau * dot(inertia + grad(p), advection(u_old, v) + grad(q))
        + tau_divergence * div(u) * div(v)
    ) * dx


a = weak(w / TIME_STEP + (advection(u_old, w) + advection(w, u_old)) / 2, w / 2, r, w)
L = -weak(advection(u_old, u_old), u_old, p_old, u_old)
at_rest = [DirichletBC(W.sub(component), 0, (INFLOW, WALLS, CYLINDER)) for component in (0, 1)]
problem = LinearVariationalProblem(a, L, Function(W, name="increment"), bcs=at_rest)

# Networks see the whole flow, (..., 3, n) in an order that does not depend on ranks; the solver has
# a rank's part of it.

field = Gathering(W)
n = len(field)


class Step(torch.nn.Module):
    """What a step adds to states, shape (..., 3, n)."""

    def __init__(self, refinement, *, solver_parameters=SOLVERS["gmres"], **options):
        super().__init__()
        self.solver = LinearVariationalSolver(
            problem, refinement=refinement, solver_parameters=solver_parameters, **options
        )
        self.layer = SolverLayer(self.solver, controls=[old])

    def forward(self, state):
        return field.gather(self.layer(field.scatter(state)))


# Drag and lift of a state need the rate of change, too, for which a state one step before is given.

state, earlier = Function(W), Function(W)
(u, p), (u_earlier, _) = ((as_vector([f[0], f[1]]), f[2]) for f in (state, earlier))
forces = tractions(
    VectorFunctionSpace(mesh, "CG", 1),
    lambda v: (
        (
            dot((u - u_earlier) / TIME_STEP + advection(u, u), v)
            + VISCOSITY * inner(grad(u), grad(v))
            - p * div(v)
        )
        * dx
    ),
)


def drag_and_lift(states, speed=BENCHMARK):
    """Of all but the first of states one step apart: shape (steps, 2)."""
    found = []
    for before, after in zip(states, states[1:]):
        from_torch(field.scatter(before), earlier)
        from_torch(field.scatter(after), state)
        found.append(coefficients(forces, speed))
    return np.array(found)


def rollout(step, correct, state, steps):
    """States, shape (steps + 1, 3, n)."""
    states = [state]
    with torch.no_grad():
        for _ in range(steps):
            states.append(correct(*advanced(step, states[-1][None]))[0])
    return torch.stack(states)


def advanced(step, states):
    """The states after a step, and what it has changed."""
    increments = step(states)
    return states + increments, increments


def uncorrected(states, increments):
    return states


# The reference
# -------------
# Quadratic velocities and linear pressures (Taylor-Hood) on the same mesh; backward differences of
# second order, with the advecting velocity extrapolated, in half the time step. A factorisation
# serves as preconditioner of GMRES for several steps.


class Reference:
    def __init__(self, time_step):
        V, Q = VectorFunctionSpace(mesh, "CG", 2), FunctionSpace(mesh, "CG", 1)
        self.space = V * Q
        self.time_step = time_step
        self.speed = Constant(BENCHMARK)
        self.before, self.old, self.new = (Function(self.space) for _ in range(3))
        u_before, u_old = split(self.before)[0], split(self.old)[0]

        def weak(u, p, v, q=0):
            inertia = (3 * u - 4 * u_old + u_before) / (2 * time_step) + advection(
                2 * u_old - u_before, u
            )
            return (
                dot(inertia, v) + VISCOSITY * inner(grad(u), grad(v)) - p * div(v) - q * div(u)
            ) * dx

        equations = weak(*TrialFunctions(self.space), *TestFunctions(self.space))
        self.conditions = [
            DirichletBC(self.space.sub(0), as_vector([self.speed * parabola, 0]), INFLOW),
            DirichletBC(self.space.sub(0), 0, (WALLS, CYLINDER)),
        ]
        self.solver = firedrake.LinearVariationalSolver(
            firedrake.LinearVariationalProblem(
                lhs(equations), rhs(equations), self.new, bcs=self.conditions
            ),
            solver_parameters={
                "mat_type": "aij",
                "ksp_type": "gmres",
                "ksp_pc_side": "right",
                "ksp_rtol": 1e-6,
                "pc_type": "lu",
                "pc_factor_mat_solver_type": "mumps",
                "snes_lag_preconditioner": 8,
                "snes_lag_preconditioner_persists": True,
            },
        )
        self.forces = tractions(V, lambda v: weak(*split(self.new), v))

    def start(self, u, p):
        """From a velocity and a pressure, expressions, at rest for a moment."""
        self.old.sub(0).interpolate(u)
        self.old.sub(1).interpolate(p)
        for condition in self.conditions:
            condition.apply(self.old)
        self.before.assign(self.old)

    def step(self):
        self.solver.solve()
        self.before.assign(self.old)
        self.old.assign(self.new)

    def change_speed(self, speed):
        """To another inflow, in a moment: the flow is scaled, and settles within the time that it
        takes to cross the channel.
        """
        factor = speed / float(self.speed)
        for function in (self.before, self.old):
            function.sub(0).assign(function.sub(0) * factor)
            function.sub(1).assign(function.sub(1) * factor**2)
        self.speed.assign(speed)

    def drag_and_lift(self):
        return coefficients(self.forces, float(self.speed))

    # On the linear elements' nodes a velocity of quadratic elements is not quite without
    # divergence, as these elements see it, and the solver would answer by a large pressure. So what
    # is learned from is the nearest velocity that is, by the same stabilisation.

    @cached_property
    def _restriction(self):
        solution = Function(W)
        u, _ = split(self.old)
        a = (
            dot(w, v)
            - r * div(v)
            + q * div(w)
            + tau / TIME_STEP * dot(w + grad(r), grad(q))
            + TIME_STEP * tau_divergence * div(w) * div(v)
        ) * dx
        L = (dot(u, v) + tau / TIME_STEP * dot(u, grad(q))) * dx
        conditions = [
            DirichletBC(W.sub(0), self.speed * parabola, INFLOW),
            DirichletBC(W.sub(1), 0, INFLOW),
            *(DirichletBC(W.sub(component), 0, (WALLS, CYLINDER)) for component in (0, 1)),
        ]
        problem = firedrake.LinearVariationalProblem(
            a, L, solution, bcs=conditions, constant_jacobian=True
        )
        return solution, firedrake.LinearVariationalSolver(
            problem,
            solver_parameters={
                "ksp_type": "preonly",
                "pc_type": "lu",
                "pc_factor_mat_solver_type": "mumps",
            },
        )

    def state(self):
        """The flow as a state of the coarse solver."""
        solution, solver = self._restriction
        solver.solve()
        state.interpolate(as_vector([solution[0], solution[1], self.old.sub(1)]))
        return field.gather(to_torch(state, copy=True))


# A vortex street takes a while to develop. The coarse solver does the first part of that, as it is
# the faster one; then the reference goes on, at one speed after the other.

REFERENCE_STEP, PERIOD = TIME_STEP / 2, 0.33
DEVELOPING, SETTLING, RECORDED = (0.2, 0.05, 0.2) if quick else (4.5, 1.0, 1.0)


def make_reference():
    """For each inflow speed snapshots, shape (times, 3, n), and drag and lift, (times, 2); and the
    coarse solver from the first one on.
    """
    coarse = Step(FixedRefinement(Tolerance(1e-8)))
    kick = 0.5 * exp(-((x - 0.35) ** 2 + (y - 0.2) ** 2) / 0.05**2)
    state.interpolate(as_vector([parabola, kick, 0]))
    for component in (0, 1):
        DirichletBC(W.sub(component), 0, (WALLS, CYLINDER)).apply(state)
    developed = rollout(
        coarse, uncorrected, field.gather(to_torch(state, copy=True)), round(DEVELOPING / TIME_STEP)
    )[-1]
    from_torch(field.scatter(developed), state)
    flow = Reference(REFERENCE_STEP)
    flow.start(u, p)
    found = {}
    for speed in (BENCHMARK, *TRAINING_SPEEDS):
        flow.change_speed(speed)
        longer = 1 if speed in TRAINING_SPEEDS else 2
        for _ in range(round(SETTLING / REFERENCE_STEP)):
            flow.step()
        snapshots, forces = [], []
        for _ in range(round(longer * RECORDED / REFERENCE_STEP)):
            flow.step()
            snapshots.append(flow.state())
            forces.append(flow.drag_and_lift())
        found[f"states {speed}"] = torch.stack(snapshots).numpy()
        found[f"forces {speed}"] = np.array(forces)
    first = torch.from_numpy(found[f"states {BENCHMARK}"][1])
    found["made with"] = MADE_WITH
    found["coarse"] = rollout(coarse, uncorrected, first, ALONE).numpy()
    return found


# It is made once, and kept in a file, with what it depends on. The first member of the ensemble
# makes it, and one rank reads and writes it.

# steps that solver and network go alone in the end
ALONE = 8 if quick else round(5 * PERIOD / TIME_STEP)
MADE_WITH = np.array(
    [
        n,
        VISCOSITY,
        TIME_STEP,
        BENCHMARK,
        *TRAINING_SPEEDS,
        REFERENCE_STEP,
        DEVELOPING,
        SETTLING,
        RECORDED,
        ALONE,
    ]
)
path = arguments.reference or HERE / "output" / f"cylinder-{'quick' if quick else 'developed'}.npz"


def read_reference() -> dict | None:
    """The flow in the file, where there is one."""
    if not path.is_file():
        return None
    try:
        with np.load(path) as file:
            return dict(file)
    except (OSError, EOFError, ValueError, BadZipFile) as error:
        raise Refused(
            f"{path} does not hold a flow ({error}): remove it, or name another --reference"
        ) from None


def write_reference(reference):
    """Whole or not at all; returns it."""
    file = io.BytesIO()
    np.savez(file, **reference)
    write(path, file.getvalue())
    return reference


reference = from_first_rank(ensemble.global_comm, read_reference)
if reference is None:
    PETSc.Sys.Print(f"making the reference flow, to be kept in {os.path.relpath(path)}")
    if ensemble.ensemble_rank == 0:
        reference = make_reference()
    reference = from_first_rank(ensemble.global_comm, lambda: write_reference(reference))
expected = {"made with", "coarse"} | {
    f"{what} {speed}" for what in ("states", "forces") for speed in (BENCHMARK, *TRAINING_SPEEDS)
}
if reference.keys() != expected or not np.array_equal(reference["made with"], MADE_WITH):
    raise Refused(
        f"{path} holds a flow on another mesh, or with other parameters than this script "
        "has: remove it, or name another --reference"
    )

# The data
# --------
# A sample is a window of STEPS steps. Errors are mean squares in the L2 norm with a lumped mass
# matrix, of velocities and of pressures, relative to the reference's at the same time. The
# validation error is that of velocities after the last step. In training the pressure weighs
# little: it answers any divergence of a correction, and the more so the smaller the time step.

STRIDE = round(TIME_STEP / REFERENCE_STEP)
PRESSURE_WEIGHT, NOISE = 0.002, 0.01
recordings = [
    torch.from_numpy(reference[f"states {speed}"]) for speed in (*TRAINING_SPEEDS, BENCHMARK)
]
snapshots = torch.cat(recordings)
firsts = np.cumsum([0] + [len(recording) for recording in recordings])
windows = [
    torch.arange(first, first + len(recording) - STEPS * STRIDE)
    for first, recording in zip(firsts, recordings)
]
validation = deal(windows[-1][torch.linspace(0, len(windows[-1]) - 1, VALIDATION).long()], ensemble)

mass = field.gather(to_torch(assemble(sum(test) * dx), copy=True))
norms = (snapshots**2 * mass).sum(dim=-1)
norms = torch.stack([norms[:, :2].sum(dim=-1), norms[:, 2]])  # of velocities and pressures
root_mass = mass.sqrt()


def squared_errors(states, times):
    """This rank's part of the relative squared errors of velocities and of pressures, shape (2,
    batch).
    """
    errors = (
        field.scatter((states - snapshots[times]) * root_mass)
        .unflatten(-1, (-1, 3))
        .square()
        .sum(dim=-2)
    )
    return torch.stack([errors[:, :2].sum(dim=-1), errors[:, 2]]) / norms[:, times]


# The network
# -----------
# It sees a state after a step, and what the step has changed, and adds a correction, at first
# nothing. At walls, cylinder and inflow velocities are as they should be. It knows where it is, for
# what there is to correct depends on the mesh. It computes in single precision.

points = torch.from_numpy(field.coordinates.T)
conditioned = Function(W).assign(1)
for condition in at_rest:
    condition.apply(conditioned)
free = field.gather(to_torch(conditioned, copy=True))
distance = (points - torch.tensor([[0.2], [0.2]])).norm(dim=0) - DIAMETER / 2
features = torch.stack(
    [points[0] / 1.1 - 1, points[1] / 0.205 - 1, torch.exp(-distance / DIAMETER), free[0]]
)
CHANGES, CORRECTIONS = 0.1, 0.05  # how large they are, roughly


class Corrector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = GraphNetwork(
            6, 3, field.edges, field.coordinates, features=features, width=WIDTH, steps=LAYERS
        ).float()

    def forward(self, states, increments):
        seen = torch.cat([states, increments / CHANGES], dim=-2).float()
        return states + CORRECTIONS * free * self.network(seen).double()


# Training
# --------
# A refinement makes the whole difference between the runs: it is handed to the solver, and told the
# validation error after each epoch. A little noise on the first state of a sample teaches the
# network to bring back what has gone astray; without, errors add up when solver and network go
# alone. It is drawn for all samples of a batch, of which a member of the ensemble takes its part.


def make_step(refinement):
    """The step that is trained through."""
    return Step(
        refinement,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement, SOLVERS[arguments.solver], factorisation="lu", comm=comm
        ),
    )


converged_step = Step(FixedRefinement(Tolerance(1e-8)))


def train_one(seed, refinement, label):
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    first = torch.from_numpy(
        np.concatenate(
            [
                random.choice(window, TRAINING // len(TRAINING_SPEEDS), replace=False)
                for window in windows[:-1]
            ]
        )
    )
    corrector = Corrector()
    step = make_step(refinement)
    optimiser = torch.optim.Adam(corrector.parameters(), lr=LEARNING_RATE, fused=True)
    disturbances = torch.Generator().manual_seed(seed)

    def loss(samples):
        times, error = first[samples], 0.0
        noise = deal(
            torch.randn(BATCH, 3, n, generator=disturbances, dtype=torch.float64), ensemble
        )
        states = snapshots[times] + NOISE * free * noise
        for _ in range(STEPS):
            states, times = corrector(*advanced(step, states)), times + STRIDE
            velocity, pressure = squared_errors(states, times)
            error = error + (velocity + PRESSURE_WEIGHT * pressure).mean() / STEPS
        return error

    def validation_error(step):
        states, times = snapshots[validation], validation
        for _ in range(STEPS):
            states, times = corrector(*advanced(step, states)), times + STRIDE
        velocity, _ = squared_errors(states, times)
        return (total(velocity.sum(), ensemble.global_comm) / VALIDATION).item()

    # A corrector goes on with the physics that it was trained through in the end. What it is worth
    # with converged ones is measured now and then, and not counted as training.
    validated = []

    def validate():
        validated.append(validation_error(step))
        return validated[-1]

    if len(samples := deal(torch.arange(BATCH), ensemble)):
        loss(samples).backward()  # kernels are compiled before the clock starts
    history = train(
        corrector,
        loss,
        validate,
        optimiser=optimiser,
        refinement=refinement,
        solvers=[step.solver],
        assess={
            "in_use": lambda: validated[-1] ** 0.5,
            "converged": lambda: validation_error(converged_step) ** 0.5,
        },
        assess_every=2,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(
            optimiser, EPOCHS, eta_min=LEARNING_RATE / 50
        ),
        samples=len(first),
        batch_size=BATCH,
        epochs=EPOCHS,
        seed=seed,
        ensemble=ensemble,
        label=label,
    )

    # Solver and network alone, as they have been trained. This is not counted as training.
    step.solver.refinement = FixedRefinement(refinement.setting)
    states = rollout(step, corrector, first_state, ALONE)
    return history, {
        "drag and lift": np.round(drag_and_lift(states), 5).tolist(),
        "last state": np.round(states[-1], 4).tolist(),
        "labels": {"in use": "Validation error, with the physics of the moment"},
    }


first_state = recordings[-1][1]
PETSc.Sys.Print(
    f"cylinder: {W.dim()} unknowns on {comm.size} rank{'s' if comm.size > 1 else ''}"
    f"{f', {ensemble.ensemble_size} times' if ensemble.ensemble_size > 1 else ''}; "
    f"{TRAINING} training and {VALIDATION} validation samples, {EPOCHS} epochs"
)
study = Study(
    "navier_stokes_cylinder" + (f"_{arguments.solver}" if arguments.solver != "gmres" else ""),
    arguments,
    ladder=LADDER,
    setup={
        "solver": arguments.solver,
        "unknowns": W.dim(),
        "viscosity": VISCOSITY,
        "time step": TIME_STEP,
        "steps": STEPS,
        "training samples": TRAINING,
        "validation samples": VALIDATION,
        "epochs": EPOCHS,
        "batch": BATCH,
        "learning rate": LEARNING_RATE,
        "width": WIDTH,
        "layers": LAYERS,
        "noise": NOISE,
        "pressure weight": PRESSURE_WEIGHT,
    },
)
runs = study.run(train_one, trial=lambda refinement: make_step(refinement)(first_state[None]))

# The result
# ----------
# Iterations and seconds are those of training and validation together. Drag, lift and frequency are
# those of the last three periods.

study.print_table(runs)


def described(forces, time_step):
    """Mean and largest drag, least and largest lift, Strouhal number."""
    drag, lift = forces[-round(3.2 * PERIOD / time_step) :].T
    fluctuation = lift - lift.mean()
    rising = np.flatnonzero((fluctuation[:-1] < 0) & (fluctuation[1:] >= 0))
    crossings = rising + fluctuation[rising] / (fluctuation[rising] - fluctuation[rising + 1])
    strouhal = (
        DIAMETER / BENCHMARK / (np.diff(crossings).mean() * time_step)
        if len(crossings) > 1
        else np.nan
    )
    return drag.mean(), drag.max(), lift.min(), lift.max(), strouhal


exact = reference[f"forces {BENCHMARK}"]
restricted = drag_and_lift(recordings[-1][1::STRIDE])
coarse = drag_and_lift(torch.from_numpy(reference["coarse"]))
corrected = {
    schedule: np.array(next(iter(by_seed.values())).extras["drag and lift"])
    for schedule, by_seed in runs.items()
}
rows = {
    "reference": described(exact, REFERENCE_STEP),
    "  on linear elements": described(restricted, TIME_STEP),
    "coarse solver alone": described(coarse, TIME_STEP),
}
rows |= {
    f"corrected, {schedule.title}": described(forces, TIME_STEP)
    for schedule, forces in corrected.items()
}
PETSc.Sys.Print(
    f"\n{'':28}{'mean drag':>11}{'max. drag':>13}{'min. lift':>11}{'max. lift':>13}"
    f"{'Strouhal':>15}\n{'Schaefer and Turek 1996':28}{'':>11}{'3.22 - 3.24':>13}{'':>11}"
    f"{'0.98 - 1.02':>13}{'0.295 - 0.305':>15}"
)
for title, values in rows.items():
    PETSc.Sys.Print(
        f"{title:28}"
        + "".join(f"{value:{width}.3f}" for value, width in zip(values, (11, 13, 11, 13, 15)))
    )


def labelled(title):
    _, drag, _, lift, strouhal = rows[title]
    return f"{title}: drag up to {drag:.3f}, lift up to {lift:.3f}, Strouhal number {strouhal:.3f}"


def draw_forces(path):
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    times = TIME_STEP * np.arange(1, ALONE + 1)
    exact_times = REFERENCE_STEP * np.arange(-1, len(exact) - 1)
    for component, (axes, name, interval) in enumerate(
        zip(panels, ("drag", "lift"), ((3.22, 3.24), (0.98, 1.02)))
    ):
        axes.axhspan(
            *interval,
            color="0.8",
            label=(
                "Schäfer, Turek 1996: drag up to 3.22 – 3.24, lift up to 0.98 – 1.02, 0.295 – 0.305"
            ),
        )
        axes.plot(exact_times, exact[:, component], color="black", label=labelled("reference"))
        axes.plot(
            times,
            coarse[:, component],
            color="0.5",
            linestyle="--",
            label=labelled("coarse solver alone"),
        )
        for schedule, forces in corrected.items():
            if schedule in (CONVERGED, PRDP):
                axes.plot(
                    times,
                    forces[:, component],
                    color=schedule.colour,
                    label=labelled(f"corrected, {schedule.title}"),
                )
        axes.set(ylabel=f"{name} coefficient", xlim=(0, times[-1]))
        axes.grid(alpha=0.25)
    panels[1].set_xlabel("time")
    figure.legend(
        *panels[1].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=1,
        fontsize="small",
        frameon=False,
    )
    save_figure(figure, path)


def vorticity(whole):
    """On the nodes, by a lumped projection; collective."""
    from_torch(field.scatter(torch.as_tensor(whole, dtype=torch.float64)), state)
    v = TestFunction(W)
    return (
        field.gather(to_torch(assemble((u[1].dx(0) - u[0].dx(1)) * v[2] * dx), copy=True))[2]
        / mass[2]
    ).numpy()


def draw_flow(path, fields):
    figure = Figure(figsize=(11, 2.2 * (len(fields) + 1)), layout="constrained")
    first, *panels = figure.subplots(len(fields) + 1, 1)
    first.triplot(*field.coordinates.T, cells, color="black", linewidth=0.3)
    first.set_title(f"{n} nodes, {len(cells)} triangles", fontsize="medium")
    for axes, (title, values) in zip(panels, fields.items()):
        colours = axes.tripcolor(
            *field.coordinates.T, cells, values, cmap="RdBu_r", vmin=-30, vmax=30, shading="gouraud"
        )
        axes.set_title(title, fontsize="medium")
    figure.colorbar(colours, ax=panels, shrink=0.6, label="vorticity")
    for axes in (first, *panels):
        axes.set(aspect="equal", xticks=[], yticks=[])
    save_figure(figure, path)


schedule, chosen = study.representative(runs)
shown = {
    f"reference, after {ALONE} steps of {TIME_STEP:g}": recordings[-1][1 + ALONE * STRIDE],
    "coarse solver alone": reference["coarse"][-1],
    f"coarse solver and network, {schedule.title}": chosen.extras["last state"],
}
shown = {title: vorticity(values) for title, values in shown.items()}
cells = field.cells  # collective at first


def draw():
    draw_training(runs, study.path("training"))
    draw_forces(study.path("forces"))
    draw_flow(study.path("flow"), shown)


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
