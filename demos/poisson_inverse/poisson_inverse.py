"""Inverse problems under progressive refinement: the unknown sources of heated rods, and the
unknown diffusivity of a plate.

A temperature is measured, with an error of 1 %, and what has caused it is sought: the parameters
with which the solution of -div(diffusivity grad u) = source comes closest to the measurements. Each
step of the optimiser takes a forward solve and an adjoint one, by an iterative method. The script
looks for the same parameters several times:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP): few iterations at first, and more whenever the
  optimiser gets no further, until more iterations no longer help;
* with constant numbers of iterations, where asked for.

It needs no torch: the solves stand on pyadjoint's tape, and pyadjoint's own tools differentiate and
minimise. The problems:

    python poisson_inverse.py                                  one amplitude; Jacobi
    python poisson_inverse.py --problem three --solver steepest_descent
    python poisson_inverse.py --problem one --optimiser lbfgs  pyadjoint's minimize
    python poisson_inverse.py --problem field                  a diffusivity field; CG
    python poisson_inverse.py --quick                          some seconds; or QUICK=1
    python poisson_inverse.py --schedules converged prdp 200 400 --seed 1 2 3 --resume
    mpiexec -n 2 python poisson_inverse.py --output out        two ranks share the mesh
    mpiexec -n 2 python poisson_inverse.py --ensemble 2        two ranks share the rods

The rods follow the PRDP paper's (Bhatia, Koehler and Thuerey, ICLR 2025, arXiv 2502.19611). Options
with a single dash are PETSc's: -log_view, or -physics_ksp_monitor and whatever else configures the
solver with prefix physics_.
"""

import functools
import math
import os
from pathlib import Path

import numpy as np
from firedrake import *
from firedrake.adjoint import *
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from pyadjoint.optimization.optimization import SciPyConvergenceError
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy
from tqdm import tqdm

from prdp_fem import IterationLadder, LinearVariationalSolver, Tolerance
from prdp_fem.history import Account, History, assessed_at
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
from prdp_fem.studies.schedules import Factorised

# made by Gmsh from plate.geo
PLATE = Path(__file__).resolve().parent.parent / "heat_emulator" / "plate.msh"
# its physical group "rim"
RIM = 2

SOLVERS = {
    "jacobi": {"ksp_type": "richardson", "pc_type": "jacobi"},
    "steepest_descent": {
        "ksp_type": "python",
        "ksp_python_type": "prdp_fem.SteepestDescent",
        "pc_type": "jacobi",
    },
    "cg": {"ksp_type": "cg", "pc_type": "jacobi"},
    # what converges fastest, where nothing is refined and no factorisation is kept
    "cg+icc": {"ksp_type": "cg"},
}


def configure(parser):
    parser.add_argument(
        "--problem",
        choices=("one", "three", "field"),
        default="one",
        help=(
            "one or three unknown amplitudes of a rod's source, or the diffusivity field of a plate"
            " (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        help=(
            "with Jacobi's preconditioner, but for cg+icc, which has an incomplete factorisation,"
            " of each rank's part (default: jacobi for rods, cg for the field)"
        ),
    )
    parser.add_argument(
        "--optimiser",
        choices=("gradient_descent", "lbfgs"),
        help="(default: gradient_descent for rods, lbfgs for the field)",
    )
    parser.add_argument(
        "--differentiation",
        choices=("implicit", "unrolled"),
        default="implicit",
        help="of truncated solves (default: %(default)s)",
    )


# How many rods there are, or ways to heat the plate.
MEASURED = {
    "one": {"quick": 3, "default": 10, "full": 50},
    "three": {"quick": 3, "default": 3, "full": 50},
    "field": {"quick": 2, "default": 2, "full": 2},
}


def check(arguments):
    if arguments.problem == "field" and arguments.optimiser == "gradient_descent":
        return (
            "--problem field has no step length that gradient descent could go by: leave"
            " --optimiser away"
        )
    count = MEASURED[arguments.problem][arguments.size]
    if arguments.ensemble > count:
        return (
            f"--ensemble {arguments.ensemble}: there are {count}"
            f" {'heatings' if arguments.problem == 'field' else 'rods'} to share"
        )


arguments = command_line(__file__, __doc__, configure=configure, check=check)
SOLVER = arguments.solver or ("cg" if arguments.problem == "field" else "jacobi")
OPTIMISER = arguments.optimiser or ("lbfgs" if arguments.problem == "field" else "gradient_descent")
NOISE = 0.01

# Members of an ensemble
# ----------------------
# There are no batches of samples here that an ensemble could share, but there are several rods, and
# two ways to heat the plate. So each member computes the temperatures of its share of them, on the
# whole mesh, with ranks of its own (comm). All members have all parameters; functional and
# derivative are sums over the members, and so is what the refinement is told.
#
# CG and steepest descent choose step lengths by all that they solve for at once. A member chooses
# by its own share, so what truncated solves give depends on the number of members. With Jacobi's
# method it does not.

COUNT = MEASURED[arguments.problem][arguments.size]
ensemble = arguments.ensemble
comm = ensemble.comm
SOLVERS["cg+icc"] |= incomplete("icc", comm)
mine = np.array_split(range(COUNT), ensemble.ensemble_size)[ensemble.ensemble_rank]


def norm_over_members(part):
    """From the norm of what this member has."""
    return math.hypot(*ensemble.ensemble_comm.allgather(part))


def put(values, function):
    """Values of each node, shape (nodes, components), into a function; where there is a single
    component, it has no axis for it.
    """
    function.dat.data_wo[:] = values.reshape(function.dat.data_ro.shape)


# Rods
# ----
# The paper's rod: -u'' = sum of theta_k sin(2 k pi x) for k = 1, or for k = 1, 2, 3, with u = 0 at
# its ends and 30 nodes between. The temperature is measured at all nodes. By how much an error of 1
# % there changes a single amplitude is a matter of luck (by 0.15 % in the mean), and the error of a
# truncated solve may even make up for it. So we look at ten rods at once, or three of those with
# three amplitudes, each with amplitudes and errors of its own: u is a vector with a component for
# each of this member's rods.
#
# The sines are eigenvectors of the discrete Laplacian. What K iterations of Jacobi's method make of
# one, from zero, is the solution times 1 - cos(2 k pi/31)^K. For k = 1, the slowest of them, 110
# iterations leave an error of 10 %, and each 110 more a tenth of it. (Steepest descent hits an
# eigenvector at the first attempt: for a single amplitude, its forward solves are exact.)


class Rods:
    CELLS = 31

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        modes = {"one": 1, "three": 3}[arguments.problem]
        mesh = UnitIntervalMesh(self.CELLS, comm=comm)
        (x,) = SpatialCoordinate(mesh)
        V = VectorFunctionSpace(mesh, "CG", 1, dim=len(mine))
        u, v = TrialFunction(V), TestFunction(V)
        self.truth = rng.uniform(1, 3, (COUNT, modes))
        R = FunctionSpace(mesh, "R", 0)  # of numbers
        amplitudes = [[Function(R).assign(amplitude) for amplitude in row] for row in self.truth]
        self.controls = self.sought = sum(amplitudes, [])
        source = as_vector(
            [
                sum(
                    amplitude * sin(2 * k * pi * x)
                    for k, amplitude in enumerate(amplitudes[rod], start=1)
                )
                for rod in mine
            ]
        )
        self.load = inner(source, v) * dx
        self.problem = LinearVariationalProblem(
            inner(grad(u), grad(v)) * dx,
            self.load,
            Function(V, name="temperature"),
            bcs=DirichletBC(V, 0, "on_boundary"),
            constant_jacobian=True,
        )
        # The measurements are those of a direct solve on the same mesh, as in the paper, with
        # errors added. All ranks draw all errors; nodes are told apart by where they are.
        # Firedrake's default is a direct method
        self.measured = LinearVariationalSolver(self.problem).solve().copy(deepcopy=True)
        nodes = np.rint(self.CELLS * mesh.coordinates.dat.data_ro).astype(int)
        errors = (
            NOISE
            * norm_over_members(norm(self.measured))
            / np.sqrt(COUNT)
            * rng.normal(size=(self.CELLS + 1, COUNT))
        )
        errors[[0, -1]] = 0
        put(
            self.measured.dat.data_ro.reshape(-1, len(mine)) + errors[nodes][:, mine], self.measured
        )
        self.size = norm_over_members(norm(self.measured)) ** 2
        for control in self.controls:
            control.assign(5)  # the first guess, as in the paper

        # Second derivative of the functional below by an amplitude of k = 1, the largest of them.
        self.curvature = 0.5 / (2 * np.pi) ** 4 / self.size

    def apply_control(self):
        """What is to be done with the control before the solve."""

    def misfit(self):
        """This member's part of the mean square of what is measured but not explained, relative to
        what is measured.
        """
        difference = self.problem.u - self.measured
        return assemble(inner(difference, difference) * dx) / self.size

    def penalty(self):
        return 0.0

    def error(self):
        """Of the parameters, relative to the true ones."""
        values = np.reshape([float(amplitude) for amplitude in self.sought], self.truth.shape)
        return float(np.linalg.norm(values - self.truth) / np.linalg.norm(self.truth))


# A plate
# -------
# -div(exp(m) grad u) = source on a plate with three holes, insulated there and cold (u = 0) at the
# rim. It is heated in two ways, one after the other; again u has a component for each that is this
# member's. From the temperatures at 200 sensors the field m is sought, in linear finite elements:
# 1277 unknowns, many more than such measurements can tell. What they leave open, a penalty decides.
#
# Which fields are penalised, and which inner product the optimiser goes by, is one question.
# SciPy's L-BFGS sees vectors of numbers, and its inner product is theirs. Were these numbers the
# nodal values of m, a finer mesh would mean more iterations. So the control is a field z that m is
# made from, by a solve that smooths:
#
#     m - LENGTH^2 laplace(m) = q,    q = z/sqrt(lumped mass).
#
# The sum of squares of z is that of q in L2, which is an H2 norm of m; and this is what we
# penalise. In these numbers the second derivative of the functional is PENALTY times the identity
# plus something compact, on any mesh. (What the optimiser needs, then, is the derivative by these
# numbers as it is. Control's default Riesz map, L2, would multiply it by the inverse of the mass
# matrix: hence riesz_map="l2" below.) The operator that smooths is constant, and factorised once.
# PENALTY is such that the misfit ends at the errors of measurement.


@functools.cache
def plate_meshes():
    """Ours, and a finer one."""
    return MeshHierarchy(triangle_mesh(PLATE, comm, marks=[RIM]), Plate.REFINED + 1)[-2:]


class Plate:
    SENSORS = 200
    SPOTS = 6
    LENGTH = 0.1
    PENALTY = 1e-4
    REFINED = 1 if arguments.size == "full" else 0  # times

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        mesh, fine = plate_meshes()
        Q = FunctionSpace(mesh, "CG", 1)
        q = Function(Q, name="q")
        m = Function(Q, name="m")
        v = TestFunction(Q)
        self.problem, self.load = self.conduction(mesh, m)

        # The true field has six spots, three of them conductive and three insulating. The
        # measurements come from a finer mesh, so that no field on ours explains them exactly.
        spots = [
            (
                Constant(rng.uniform(0.1, 0.9, 2)),
                rng.uniform(0.08, 0.2),
                sign * rng.uniform(0.8, 1.5),
            )
            for sign in (1, -1) * (self.SPOTS // 2)
        ]

        def true_field(mesh):
            x = SpatialCoordinate(mesh)
            return sum(
                height * exp(-inner(x - centre, x - centre) / (2 * width**2))
                for centre, width, height in spots
            )

        self.truth = Function(Q).interpolate(true_field(mesh))
        exact, _ = self.conduction(fine, true_field(fine))
        LinearVariationalSolver(exact).solve()
        sensors = self.random_places(mesh, rng)
        readings = PointEvaluator(fine, sensors).evaluate(exact.u).reshape(-1, len(mine))
        readings += (
            NOISE
            * np.sqrt(np.mean(readings**2, axis=0))
            * rng.normal(size=(len(sensors), COUNT))[:, mine]
        )

        # Functions on a mesh of nothing but vertices: readings at the sensors, on the rank that has
        # the place.
        places = VertexOnlyMesh(mesh, sensors)
        in_order = Function(VectorFunctionSpace(places.input_ordering, "DG", 0, dim=len(mine)))
        put(readings[: len(in_order.dat.data_ro)], in_order)  # all on rank 0, none on others
        self.at_sensors = VectorFunctionSpace(places, "DG", 0, dim=len(mine))
        self.measured = Function(self.at_sensors).interpolate(in_order)
        self.size = ensemble.ensemble_comm.allreduce(
            assemble(inner(self.measured, self.measured) * dx)
        )

        self.controls = [Function(Q, name="z")]
        self.q = q
        self.sought = [m]
        self.scale = Function(Q)
        self.scale.dat.data_wo[:] = 1 / np.sqrt(assemble(v * dx).dat.data_ro)
        w = TrialFunction(Q)
        smoothing = LinearVariationalProblem(
            (w * v + self.LENGTH**2 * inner(grad(w), grad(v))) * dx,
            q * v * dx,
            m,
            constant_jacobian=True,
        )
        self.smoother = LinearVariationalSolver(
            smoothing, solver_parameters={"ksp_type": "preonly", "pc_type": "lu"}
        )

    @staticmethod
    def conduction(mesh, m):
        V = VectorFunctionSpace(mesh, "CG", 1, dim=len(mine))
        u, v = TrialFunction(V), TestFunction(V)
        x, y = SpatialCoordinate(mesh)
        heatings = 1, sin(2 * pi * x)
        load = inner(as_vector([heatings[heating] for heating in mine]), v) * dx
        return (
            LinearVariationalProblem(
                exp(m) * inner(grad(u), grad(v)) * dx,
                load,
                Function(V, name="temperature"),
                bcs=DirichletBC(V, 0, RIM),
            ),
            load,
        )

    def random_places(self, mesh, rng):
        """Centres of random triangles, the same on any number of ranks."""
        centres = (
            Function(VectorFunctionSpace(mesh, "DG", 0))
            .interpolate(SpatialCoordinate(mesh))
            .dat.data_ro
        )
        centres = np.concatenate(comm.allgather(centres)).round(12)
        return rng.permutation(centres[np.lexsort(centres.T)])[: self.SENSORS]

    def apply_control(self):
        self.q.interpolate(self.scale * self.controls[0])
        self.smoother.solve()

    def misfit(self):
        difference = assemble(interpolate(self.problem.u, self.at_sensors)) - self.measured
        return assemble(inner(difference, difference) * dx) / self.size

    def penalty(self):
        """This member's part: an equal one, since all have the whole field."""
        return (
            self.PENALTY / ensemble.ensemble_size * assemble(self.q**2 * dx(scheme="KMV", degree=1))
        )

    def error(self):
        return norm(self.sought[0] - self.truth) / norm(self.truth)


# What is minimised, and what the refinement is told
# --------------------------------------------------
# The functional is half of misfit and penalty. All that follows the control is put on a tape, once,
# and a ReducedFunctional plays it again for other values, forwards and backwards; each time the
# solver takes the setting of its refinement.
#
# A refinement must be told something that gets better with the parameters *and* with the physics,
# and that one has: the true parameters are unknown. The misfit alone will not do. An optimiser that
# is given coarse physics finds parameters that make up for it: with K iterations each sine is too
# small by the same factor, and an amplitude which is too large by its inverse explains the
# measurements just as well, at every K. But then the equation is not satisfied. So the metric is
#
#     misfit + residual,    the residual being |b - A u|^2/|b|^2,
#
# and both are relative mean squares. At a coarse level the residual dominates, which only refining
# brings down; once it is small beside the misfit, which the errors of measurement keep from
# vanishing, refining no longer helps. The residual takes one product with A in an outer iteration,
# as much as one of hundreds of inner iterations, and is not counted among these. (The paper's
# refinement is told the error of the parameters, which shows what is possible where the truth is
# known. Here that error is only what the runs are judged by.)


class SumOverMembers(ReducedFunctionalNumPy):
    """A functional of an array of numbers, the same for all members, and its derivative.

    (Firedrake's EnsembleReducedFunctional is the same for functions, but pyadjoint's minimize does
    not take it.)
    """

    def __call__(self, values):
        return ensemble.ensemble_comm.allreduce(float(super().__call__(values)))

    def derivative(self, **options):
        return ensemble.ensemble_comm.allreduce(super().derivative(**options))


def make_solver(problem, refinement):
    """The solver of a run; a direct one has no iterations to be unrolled."""
    is_direct = isinstance(refinement.setting, Factorised)
    return LinearVariationalSolver(
        problem,
        refinement=refinement,
        differentiation="implicit" if is_direct else arguments.differentiation,
        options_prefix="physics_",
        solver_parameters=solver_parameters(
            refinement, SOLVERS[SOLVER], factorisation="cholesky", comm=comm
        ),
    )


class Inverse:
    """The functional of a run."""

    def __init__(self, physics, refinement):
        self.physics, problem = physics, physics.problem
        self.solver = make_solver(problem, refinement)
        # A direct solver writes what converged physics make of the same parameters.
        self._exact = LinearVariationalSolver(
            problem, solver_parameters=factorised("cholesky", comm)
        )
        self._residual, self._load = (
            get_assembler(form, bcs=problem.bcs, zero_bc_nodes=True)
            for form in (problem.F, physics.load)
        )
        with set_working_tape():
            continue_annotation()
            physics.apply_control()
            self._sought = [Control(sought) for sought in physics.sought]
            self.solver.solve()
            self._u = Control(problem.u)
            misfit = physics.misfit()
            self._misfit = Control(misfit)
            functional = ReducedFunctional(
                0.5 * (misfit + physics.penalty()),
                [Control(control, riesz_map="l2") for control in physics.controls],
            )
            pause_annotation()
        self.functional = SumOverMembers(functional)

    def look(self):
        """Misfit and residual where the functional was evaluated last; the parameters and the
        solution are in their functions then.
        """
        for sought, control in zip(self.physics.sought, self._sought):
            sought.assign(control.tape_value())
        self.physics.problem.u.assign(self._u.tape_value())
        with self._residual.assemble().dat.vec_ro as r, self._load.assemble().dat.vec_ro as b:
            residual = (norm_over_members(r.norm()) / norm_over_members(b.norm())) ** 2
        return ensemble.ensemble_comm.allreduce(float(self._misfit.tape_value())), residual

    def exact_misfit(self):
        """With converged physics, for the parameters that are in their functions."""
        with stop_annotating():
            self._exact.solve()
            return ensemble.ensemble_comm.allreduce(float(self.physics.misfit()))


class Notebook:
    """What is noted after each outer iteration; it tells the refinement, too."""

    def __init__(self, inverse, refinement, label):
        self.inverse, self.refinement = inverse, refinement
        self.history = History()
        self.account = Account([inverse.solver], ensemble.global_comm, ensemble.ensemble_comm)
        self.misfits = []
        self.residuals = []
        self.errors = []
        self.bar = tqdm(
            total=ITERATIONS,
            desc=label,
            unit="iteration",
            mininterval=0.5,
            disable=ensemble.global_comm.rank > 0,
        )

    @property
    def is_full(self):
        return len(self.history) >= ITERATIONS

    def note(self):
        """Returns whether the physics have been refined."""
        for values, value in zip((self.misfits, self.residuals), self.inverse.look()):
            values.append(value)
        metric = self.misfits[-1] + self.residuals[-1]
        self.history.record(metric, self.refinement, self.account)
        with self.account.paused():
            self.errors.append(self.inverse.physics.error())
        if assessed_at(len(self.history), ITERATIONS):
            self.history.assess(
                {
                    "in_use": lambda: self.errors[-1],
                    "converged": lambda: self.inverse.exact_misfit() ** 0.5,
                },
                self.account,
            )
        self.bar.set_postfix(
            error=f"{self.errors[-1]:.3%}", physics=self.refinement.setting, refresh=False
        )
        self.bar.update()
        if self.is_full:
            self.bar.close()
        # A rule may ask for the metric once more, with finer physics.
        return self.refinement.step(self.refinement.told(metric, self.metric_again))

    def metric_again(self):
        functional = self.inverse.functional
        functional(functional.get_controls())
        return sum(self.inverse.look())


# Gradient descent
# ----------------
# The functional is quadratic in the amplitudes, and its largest second derivative is known: that by
# an amplitude of the slowest sine. Steps of up to twice its inverse are stable. A step of the
# inverse would find a single amplitude at once, with converged physics; the paper takes a tenth, as
# someone might who does not know it. Three amplitudes, whose second derivatives have a ratio of 81,
# take hundreds of steps, however long.


def gradient_descent(inverse, notebook):
    step = {"one": 0.1, "three": 1.5}[arguments.problem] / inverse.physics.curvature
    values = inverse.functional.get_controls()
    while not notebook.is_full:
        inverse.functional(values)
        values = values - step * inverse.functional.derivative()
        notebook.note()


# L-BFGS
# ------
# minimize hands the functional to SciPy, which calls back after each of its iterations. When the
# level goes up in between, the functional becomes another one, and what L-BFGS remembers is about
# the old one: the value that its line search has to get below, and the differences of gradients
# that it takes for second derivatives. So a call of minimize ends when the level goes up, and the
# next one starts from there with an empty memory. Within a call the functional is the same.
#
# L-BFGS may find nothing lower at a level: because it has converged, or because an implicit
# derivative of truncated solves is not quite that of the functional. Then nothing changes until the
# refinement has seen enough of it. These outer iterations cost no solves. (Where a line search
# gives up on inexact derivatives, rounding has a say. Steepest descent amplifies that: the one
# combination, with L-BFGS, where two ranks may come to take another path than one.)


class Enough(Exception):
    """Raised to leave minimize."""


def lbfgs(inverse, notebook):
    values = inverse.functional.get_controls()

    def callback(accepted):
        nonlocal values
        values = accepted.copy()
        if notebook.note() or notebook.is_full:
            raise Enough

    while not notebook.is_full:
        try:
            minimize(
                inverse.functional,
                "L-BFGS-B",
                callback=callback,
                options={"ftol": 1e-10, "gtol": 1e-10, "maxcor": 30, "maxls": 10},
            )
        except Enough:
            continue
        except SciPyConvergenceError:
            inverse.functional(values)  # back from the last attempt, which was rejected
        while not notebook.is_full and not notebook.note():
            pass


# The runs
# --------
# Schedules of a seed share the true parameters and the errors of measurement. A level adds about as
# many iterations as bring the solver's error down by a decimal digit. Shorter steps would end too
# early: refining stops when the solver's errors are a third of those of measurement, and a level
# later at the best, and a few parameters that come from many measurements are found much more
# exactly than these are. CG on the plate needs 40 iterations to come across the mesh, and makes
# little progress before.

problem = "plate" if arguments.problem == "field" else "rods"
if problem == "plate":
    plate_meshes()  # what is wrong with the file is said before the work
LADDERS = {
    ("rods", "jacobi"): IterationLadder(start=110, step=110),
    ("rods", "steepest_descent"): IterationLadder(start=50, step=50),
    ("rods", "cg"): IterationLadder(start=1, step=1),
    ("rods", "cg+icc"): IterationLadder(start=1, step=1),
    ("plate", "jacobi"): IterationLadder(start=600, step=400),
    ("plate", "steepest_descent"): IterationLadder(start=600, step=400),
    ("plate", "cg+icc"): IterationLadder(start=10 * 2**Plate.REFINED, step=4 * 2**Plate.REFINED),
    ("plate", "cg"): IterationLadder(start=40 * 2**Plate.REFINED, step=15 * 2**Plate.REFINED),
}
ITERATIONS = (
    arguments.epochs
    or {
        ("one", "gradient_descent"): {"quick": 40, "default": 150, "full": 150},
        ("three", "gradient_descent"): {"quick": 40, "default": 400, "full": 400},
        ("one", "lbfgs"): {"quick": 40, "default": 100, "full": 100},
        ("three", "lbfgs"): {"quick": 40, "default": 100, "full": 100},
        ("field", "lbfgs"): {"quick": 10, "default": 120, "full": 200},
    }[arguments.problem, OPTIMISER][arguments.size]
)
fields = {}  # true and found on the plate in each run, for the picture


def find(seed, refinement, label):
    physics = Plate(seed) if problem == "plate" else Rods(seed)
    inverse = Inverse(physics, refinement)
    notebook = Notebook(inverse, refinement, label)
    {"gradient_descent": gradient_descent, "lbfgs": lbfgs}[OPTIMISER](inverse, notebook)
    if problem == "plate":
        fields[label] = physics.truth, physics.sought[0]
    return notebook.history, {
        "errors": notebook.errors,
        "misfits": notebook.misfits,
        "residuals": notebook.residuals,
        "labels": {
            "outer": "outer iteration",
            "errors": "Error of the parameters",
            "in use": "Error of the parameters",
        },
    }


name = {"one": "1", "three": "3", "field": "field"}[arguments.problem]
study = Study(
    f"poisson_{name}_{SOLVER}"
    + ("_lbfgs" if OPTIMISER == "lbfgs" and problem == "rods" else "")
    + ("_unrolled" if arguments.differentiation == "unrolled" else ""),
    arguments,
    ladder=LADDERS[problem, SOLVER],
    converged=Tolerance(1e-10, max_it=1_000_000),
    tolerance=lambda rtol: Tolerance(rtol, max_it=1_000_000),
    setup={
        "problem": arguments.problem,
        "solver": SOLVER,
        "optimiser": OPTIMISER,
        "differentiation": arguments.differentiation,
        "error of measurement": NOISE,
        "outer iterations": ITERATIONS,
        **(
            {"rods": COUNT}
            if problem == "rods"
            else {"sensors": Plate.SENSORS, "penalty": Plate.PENALTY}
        ),
    },
)


def try_solver(refinement):
    physics = Plate(1) if problem == "plate" else Rods(1)
    make_solver(physics.problem, refinement).solve(annotate=False)


runs = study.run(find, trial=try_solver)

# The result
# ----------
# The error is that of the parameters, in the mean over the last ten outer iterations. It is an end
# result, and a schedule may have been as good long before; so we also count the iterations until
# the error has come to within 2 % of what converged physics reaches in the end, to stay there.

study.print_table(runs)
converged = runs.get(CONVERGED, {})
if converged:
    PETSc.Sys.Print(
        "\ninner iterations until the error stays within 2 % of what converged physics reaches in"
        " the end:"
    )
for schedule, by_seed in runs.items():
    spent = [
        run.iterations_until(1.02 * converged[seed].error)
        for seed, run in by_seed.items()
        if seed in converged
    ]
    if spent:
        reached = [iterations for iterations in spent if iterations is not None]
        PETSc.Sys.Print(
            f"    {schedule.title:>10}: {len(reached)} of {len(spent)} runs"
            + (f", in the median of these after {np.median(reached):,.0f}" if reached else "")
        )


def draw_costs(path):
    """What is reached against what has been spent, for the first seed."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for shade, (schedule, by_seed) in zip(np.linspace(0.75, 0.35, len(runs)), runs.items()):
        run = next(iter(by_seed.values()))
        style = (
            {"color": schedule.colour}
            if schedule in (CONVERGED, PRDP)
            else {"color": str(shade), "linewidth": 1}
        )
        left.loglog(run.history.iterations, run.errors, label=schedule.title, **style)
        right.loglog(run.history.iterations, np.sqrt(run.extras["misfits"]), **style)
        right.loglog(run.history.iterations, np.sqrt(run.extras["residuals"]), ":", **style)
    right.plot([], [], "k", label="misfit")
    right.plot([], [], "k:", label="residual")
    right.axhline(NOISE, color="k", linewidth=0.5, linestyle="--", label="error of measurement")
    right.set_ylim(bottom=1e-6)
    low, high = left.get_ylim()
    if high / low < 30:
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    left.set(title="Error of the parameters")
    right.set(title="Roots of misfit and residual")
    for axes in (left, right):
        axes.set(xlabel="inner iterations so far")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.legend(fontsize="small")
        axes.grid(alpha=0.25)
    save_figure(figure, path)


def gathered(fields):
    """Nodes, triangles and values of fields; each rank of a member has its part of the mesh."""
    space = fields["true"].function_space()
    points = space.mesh().coordinates.dat.data_ro_with_halos
    values = [field.dat.data_ro_with_halos for field in fields.values()]
    return comm.gather((points, space.cell_node_map().values, values))


def draw_fields(path, chosen, parts):
    """The true field, what was found, and how it differs."""
    first = np.cumsum([0] + [len(points) for points, _, _ in parts])
    x, y = np.concatenate([points for points, _, _ in parts]).T
    triangles = np.concatenate([start + cells for start, (_, cells, _) in zip(first, parts)])
    values = dict(zip(chosen, np.concatenate([values for _, _, values in parts], axis=1)))
    panels = {
        f"{name} log diffusivity" if name == "true" else f"found, {name}": values[name]
        for name in chosen
    }
    if len(chosen) == 3:
        panels["PRDP minus converged"] = values["PRDP"] - values["converged"]
    figure = Figure(figsize=(4 * len(panels), 3.6), layout="constrained")
    for axes, (title, field) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items()
    ):
        limit = abs(field if "minus" in title else values["true"]).max()
        colours = axes.tripcolor(
            x, y, triangles, field, cmap="RdBu_r", vmin=-limit, vmax=limit, shading="gouraud"
        )
        figure.colorbar(colours, ax=axes, shrink=0.9)
        axes.set(title=title, aspect="equal", xticks=[], yticks=[], facecolor="0.8")
    save_figure(figure, path)


found = {}
for schedule in (CONVERGED, PRDP):
    if (pair := fields.get(study.label(schedule, arguments.seeds[0]))) is not None:
        # not where the run comes from a file
        found["true"], found[schedule.title] = pair
parts = gathered(found) if found else None


def draw():
    draw_training(runs, study.path("training"))
    draw_costs(study.path("costs"))
    if found:
        draw_fields(study.path("fields"), list(found), parts)


study.draw(draw)
PETSc.Sys.Print(f"\nruns and figures are in {os.path.relpath(arguments.output)}")
