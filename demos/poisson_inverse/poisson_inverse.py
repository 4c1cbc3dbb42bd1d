"""Inverse problems under progressive refinement: the unknown sources of heated rods, and the unknown diffusivity of a plate.

A temperature is measured, with an error of 1 %, and what has caused it is sought: the parameters with which the solution of
-div(diffusivity grad u) = source comes closest to the measurements. Each step of the optimiser takes a forward solve and an adjoint
one, by an iterative method. The script looks for the same parameters several times:

* with converged physics: every linear system is solved to a relative residual of 1e-10;
* with progressively refined physics (PRDP): few iterations at first, and more whenever the optimiser gets no further, until more
  iterations no longer help;
* with constant numbers of iterations, where asked for.

It needs no torch: the solves stand on pyadjoint's tape, and pyadjoint's own tools differentiate and minimise. The problems:

    python poisson_inverse.py                                          one amplitude of a source; Jacobi, gradient descent
    python poisson_inverse.py --problem three --solver steepest_descent
    python poisson_inverse.py --problem one --optimiser lbfgs          pyadjoint's minimize
    python poisson_inverse.py --problem field                          a diffusivity field on an unstructured mesh; CG, L-BFGS
    python poisson_inverse.py --quick                                  some seconds; or QUICK=1 in the environment
    mpiexec -n 2 python poisson_inverse.py --schedules converged prdp 200 400 --seed 1 2 3 --output out

The rods follow the PRDP paper's (Bhatia, Koehler and Thuerey, ICLR 2025, arXiv 2502.19611). Options with a single dash are PETSc's:
-log_view, or -physics_ksp_monitor and whatever else configures the solver with prefix physics_.
"""
import functools
import os
from pathlib import Path

import numpy as np
from firedrake import *
from firedrake.adjoint import *
from firedrake.assemble import get_assembler
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from pyadjoint.optimization.optimization import SciPyConvergenceError
from pyadjoint.reduced_functional_numpy import ReducedFunctionalNumPy
from tqdm import tqdm

from prdp_fem import IterationLadder, LinearVariationalSolver, Tolerance
from prdp_fem.history import Account, History
from prdp_fem.studies import Schedule, Study, command_line, draw_training

PLATE = Path(__file__).resolve().parent.parent/"heat_emulator"/"plate.msh"  # made by Gmsh from plate.geo
RIM = 2                                                                     # its physical group "rim"

SOLVERS = {
    "jacobi": {"ksp_type": "richardson", "pc_type": "jacobi"},
    "steepest_descent": {"ksp_type": "python", "ksp_python_type": "prdp_fem.SteepestDescent", "pc_type": "jacobi"},
    "cg": {"ksp_type": "cg", "pc_type": "jacobi"},
}


def configure(parser):
    parser.add_argument("--problem", choices=("one", "three", "field"), default="one",
                        help="one or three unknown amplitudes of a rod's source, or the diffusivity field of a plate (default: %(default)s)")
    parser.add_argument("--solver", choices=SOLVERS, help="with Jacobi's preconditioner (default: jacobi for rods, cg for the field)")
    parser.add_argument("--optimiser", choices=("gradient_descent", "lbfgs"),
                        help="(default: gradient_descent for rods, lbfgs for the field)")
    parser.add_argument("--differentiation", choices=("implicit", "unrolled"), default="implicit",
                        help="of truncated solves (default: %(default)s)")


def check(arguments):
    if arguments.problem == "field" and arguments.optimiser == "gradient_descent":
        return "--problem field has no step length that gradient descent could go by: leave --optimiser away"


arguments = command_line(__file__, __doc__, configure=configure, check=check)
SOLVER = arguments.solver or ("cg" if arguments.problem == "field" else "jacobi")
OPTIMISER = arguments.optimiser or ("lbfgs" if arguments.problem == "field" else "gradient_descent")
NOISE = 0.01
comm = COMM_WORLD

# Rods
# ----
# The paper's rod: -u'' = sum of theta_k sin(2 k pi x) for k = 1, or for k = 1, 2, 3, with u = 0 at its ends and 30 nodes
# between. The temperature is measured at all nodes. An error of measurement of 1 % changes a single amplitude by
# much less than 1 %, and by how much is a matter of luck; that of a truncated solve may even make up for it. So we look at ten rods
# at once, each with its own amplitudes and errors: u is a vector with a component for each rod.
#
# The sines are eigenvectors of the discrete Laplacian. K iterations of Jacobi's method make of each sine, instead of the solution, the
# (1 - cos(2 k pi/31)^K)-fold of it: for k = 1, the slowest of them, a hundred iterations leave an error of 13 %, and each hundred more
# an eighth of it. That is what a level of the ladder adds. (Steepest descent hits an eigenvector at the first attempt: there is
# nothing to refine in its forward solves for a single sine.)


class Rods:
    CELLS = 31
    COUNT = {"quick": 3, "default": 10 if arguments.problem == "one" else 3, "full": 50}[arguments.size]

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        modes = {"one": 1, "three": 3}[arguments.problem]
        mesh = UnitIntervalMesh(self.CELLS)
        x, = SpatialCoordinate(mesh)
        V = VectorFunctionSpace(mesh, "CG", 1, dim=self.COUNT)
        u, v = TrialFunction(V), TestFunction(V)
        self.truth = rng.uniform(1, 3, (self.COUNT, modes))
        R = FunctionSpace(mesh, "R", 0)  # of numbers
        amplitudes = [[Function(R).assign(amplitude) for amplitude in row] for row in self.truth]
        self.controls = self.sought = sum(amplitudes, [])
        source = as_vector([sum(amplitude*sin(2*k*pi*x) for k, amplitude in enumerate(row, start=1)) for row in amplitudes])
        self.load = inner(source, v)*dx
        self.problem = LinearVariationalProblem(inner(grad(u), grad(v))*dx, self.load, Function(V, name="temperature"),
                                                bcs=DirichletBC(V, 0, "on_boundary"), constant_jacobian=True)
        # The measurements are those of a direct solve on the same mesh, as in the paper, with errors added. All ranks draw all
        # errors; nodes are told apart by where they are.
        self.measured = LinearVariationalSolver(self.problem).solve().copy(deepcopy=True)  # Firedrake's default is a direct method
        nodes = np.rint(self.CELLS*mesh.coordinates.dat.data_ro).astype(int)
        errors = NOISE*np.sqrt(2/self.COUNT)*norm(self.measured)*rng.normal(size=(self.CELLS + 1, self.COUNT))
        errors[[0, -1]] = 0
        self.measured.dat.data_wo[:] += errors[nodes]
        self.size = norm(self.measured)**2
        for control in self.controls:
            control.assign(5)  # the first guess, as in the paper

        # Second derivative of the functional below by an amplitude of k = 1, the largest of them.
        self.curvature = 0.5/(2*np.pi)**4/self.size

    def apply_control(self):
        """What is to be done with the control before the solve."""

    def misfit(self):
        """Mean square of what is measured but not explained, relative to what is measured."""
        difference = self.problem.u - self.measured
        return assemble(inner(difference, difference)*dx)/self.size

    def penalty(self):
        return 0.0

    def error(self):
        """Of the parameters, relative to the true ones."""
        values = np.reshape([float(amplitude) for amplitude in self.sought], self.truth.shape)
        return float(np.linalg.norm(values - self.truth)/np.linalg.norm(self.truth))


# A plate
# -------
# -div(exp(m) grad u) = source on a plate with three holes, insulated there and cold (u = 0) at the rim. It is heated in two ways,
# one after the other; again u has a component for each. From the temperatures at 200 sensors the field m is sought, in linear finite
# elements: 1277 unknowns, many more than such measurements can tell. What they leave open, a penalty decides.
#
# Which penalty, and what is long and what is short for the optimiser, are one question. SciPy's L-BFGS knows vectors of numbers, and
# measures them by the sum of squares. Were these numbers nodal values of m, a fine mesh would mean many badly
# scaled unknowns, and many iterations. (And Control's default Riesz map, L2, would hand it something that isn't the
# gradient by its numbers: hence riesz_map="l2" below.) So the control is a field z that m is made from, by a solve that smooths:
#
#     m - length^2 laplace(m) = q,    q = z/sqrt(lumped mass).
#
# The sum of the squares of z is the square of q in L2, and that is an H2 norm of m: the penalty. In these numbers the second derivative of
# the functional is PENALTY times the identity and something compact, whatever the mesh.


class Plate:
    SENSORS, SPOTS, LENGTH, PENALTY = 200, 6, 0.1, 1e-4

    def __init__(self, seed):
        rng = np.random.default_rng(seed)
        mesh, fine = MeshHierarchy(Mesh(str(PLATE)), 1)
        Q = FunctionSpace(mesh, "CG", 1)
        q, m, v = Function(Q, name="q"), Function(Q, name="m"), TestFunction(Q)
        self.problem, self.load = self.conduction(mesh, m)

        # The true field has six spots, three of them conductive and three insulating. The measurements come from a finer mesh, so that no
        # field on ours explains them exactly.
        spots = [(Constant(rng.uniform(0.1, 0.9, 2)), rng.uniform(0.08, 0.2), sign*rng.uniform(0.8, 1.5))
                 for sign in (1, -1)*(self.SPOTS//2)]

        def true_field(mesh):
            x = SpatialCoordinate(mesh)
            return sum(height*exp(-inner(x - centre, x - centre)/(2*width**2)) for centre, width, height in spots)

        self.truth = Function(Q).interpolate(true_field(mesh))
        exact, _ = self.conduction(fine, true_field(fine))
        LinearVariationalSolver(exact).solve()
        sensors = self.random_places(mesh, rng)
        readings = PointEvaluator(fine, sensors).evaluate(exact.u)
        readings += NOISE*np.sqrt(np.mean(readings**2, axis=0))*rng.normal(size=readings.shape)

        # Functions on a mesh of nothing but vertices: readings at the sensors, on the rank that has the place.
        places = VertexOnlyMesh(mesh, sensors)
        in_order = Function(VectorFunctionSpace(places.input_ordering, "DG", 0, dim=2))
        in_order.dat.data_wo[:] = readings[:len(in_order.dat.data_ro)]  # all on rank 0, none on others
        self.at_sensors = VectorFunctionSpace(places, "DG", 0, dim=2)
        self.measured = Function(self.at_sensors).interpolate(in_order)
        self.size = assemble(inner(self.measured, self.measured)*dx)

        self.controls, self.q, self.sought = [Function(Q, name="z")], q, [m]
        self.scale = Function(Q)
        self.scale.dat.data_wo[:] = 1/np.sqrt(assemble(v*dx).dat.data_ro)
        w = TrialFunction(Q)
        smoothing = LinearVariationalProblem((w*v + self.LENGTH**2*inner(grad(w), grad(v)))*dx, q*v*dx, m, constant_jacobian=True)
        self.smoother = LinearVariationalSolver(smoothing, solver_parameters={"ksp_type": "preonly", "pc_type": "lu"})

    @staticmethod
    def conduction(mesh, m):
        V = VectorFunctionSpace(mesh, "CG", 1, dim=2)
        u, v = TrialFunction(V), TestFunction(V)
        x, y = SpatialCoordinate(mesh)
        load = inner(as_vector([1, sin(2*pi*x)]), v)*dx
        return LinearVariationalProblem(exp(m)*inner(grad(u), grad(v))*dx, load, Function(V, name="temperature"),
                                        bcs=DirichletBC(V, 0, RIM)), load

    def random_places(self, mesh, rng):
        """Centres of random triangles, the same on any number of ranks."""
        centres = Function(VectorFunctionSpace(mesh, "DG", 0)).interpolate(SpatialCoordinate(mesh)).dat.data_ro
        centres = np.concatenate(comm.allgather(centres)).round(12)
        return rng.permutation(centres[np.lexsort(centres.T)])[:self.SENSORS]

    def apply_control(self):
        self.q.interpolate(self.scale*self.controls[0])
        self.smoother.solve()

    def misfit(self):
        difference = assemble(interpolate(self.problem.u, self.at_sensors)) - self.measured
        return assemble(inner(difference, difference)*dx)/self.size

    def penalty(self):
        return self.PENALTY*assemble(self.q**2*dx)

    def error(self):
        return norm(self.sought[0] - self.truth)/norm(self.truth)


# What is minimised, and what the refinement is told
# --------------------------------------------------
# The functional is half of misfit and penalty. All that follows the control is put on a tape, once, and a ReducedFunctional plays it
# again for other values, forwards and backwards; each time the solver takes the setting of its refinement.
#
# A refinement must be told something that gets better with the parameters *and* with the physics, and that one has: the true
# parameters are unknown. The misfit alone will not do. An optimiser that is given coarse physics finds parameters that make up for it:
# with K iterations each sine is too small by the same factor, and an amplitude which is too large by its inverse explains the
# measurements just as well, at every K. But then the equation is not satisfied. So the metric is
#
#     misfit + residual,    the residual being |b - A u|^2/|b|^2,
#
# and both are relative mean squares. At a coarse level the residual dominates, and optimising cannot bring it down, refining can;
# once it is small beside the misfit, which errors of measurement keep from vanishing, refining no longer helps. It takes one product with A in each
# outer iteration, as much work as one of the hundreds of inner iterations; it isn't counted as one. (The paper's refinement is
# told the error of the parameters, which shows what PRDP can do where the truth is known.)


class Inverse:
    """The functional of a run."""

    def __init__(self, physics, refinement):
        self.physics, problem = physics, physics.problem
        self.solver = LinearVariationalSolver(problem, refinement=refinement, differentiation=arguments.differentiation,
                                              options_prefix="physics_", solver_parameters=SOLVERS[SOLVER])
        self._residual, self._load = (get_assembler(form, bcs=problem.bcs, zero_bc_nodes=True) for form in (problem.F, physics.load))
        with set_working_tape():
            continue_annotation()
            physics.apply_control()
            self._sought = [Control(sought) for sought in physics.sought]
            self.solver.solve()
            self._u = Control(problem.u)
            misfit = physics.misfit()
            self._misfit = Control(misfit)
            functional = ReducedFunctional(0.5*(misfit + physics.penalty()),
                                           [Control(control, riesz_map="l2") for control in physics.controls])
            pause_annotation()
        self.functional = ReducedFunctionalNumPy(functional)  # of an array of numbers

    def assess(self):
        """Misfit, residual, and the error of the parameters, where the functional was evaluated last."""
        for sought, control in zip(self.physics.sought, self._sought):
            sought.assign(control.tape_value())
        self.physics.problem.u.assign(self._u.tape_value())
        with self._residual.assemble().dat.vec_ro as r, self._load.assemble().dat.vec_ro as b:
            residual = (r.norm()/b.norm())**2
        return float(self._misfit.tape_value()), residual, self.physics.error()


class Notebook:
    """What is noted after each outer iteration; it tells the refinement, too."""

    def __init__(self, inverse, refinement, iterations, label):
        self.inverse, self.refinement, self.iterations = inverse, refinement, iterations
        self.history, self.account = History(), Account([inverse.solver], comm)
        self.misfits, self.residuals, self.errors = [], [], []
        self.bar = tqdm(total=iterations, desc=label, unit="iteration", mininterval=0.5, disable=comm.rank > 0)

    @property
    def is_full(self):
        return len(self.history) >= self.iterations

    def note(self):
        """Returns whether the physics have been refined."""
        for values, value in zip((self.misfits, self.residuals, self.errors), self.inverse.assess()):
            values.append(value)
        metric = self.misfits[-1] + self.residuals[-1]
        self.history.record(metric, self.refinement, self.account)
        self.bar.set_postfix(error=f"{self.errors[-1]:.3%}", physics=self.refinement.setting, refresh=False)
        self.bar.update()
        return self.refinement.step(metric)


# Gradient descent
# ----------------
# The functional is quadratic in the amplitudes, and its largest curvature known, that by an amplitude of the slowest sine. Steps of
# the inverse of it are stable. They would find a single amplitude at once with converged physics; a tenth of it is what the paper
# takes. Three amplitudes, whose curvatures have a ratio of 81, take hundreds of full steps.


def gradient_descent(inverse, notebook):
    step = {"one": 0.1, "three": 1.5}[arguments.problem]/inverse.physics.curvature
    values = inverse.functional.get_controls()
    while not notebook.is_full:
        inverse.functional(values)
        values = values - step*inverse.functional.derivative()
        notebook.note()


# L-BFGS
# ------
# minimize hands the functional to SciPy, which calls back after each of its iterations. When the level goes up in between, the functional
# becomes another one, and what L-BFGS has stored is about the old one: the value that its line search has to get below, and
# differences of gradients that it takes for second derivatives. So a call of minimize ends when the level goes up, and the next
# one starts with an empty memory from where the last one has ended: within a call the functional is the same.
#
# Where L-BFGS finds nothing lower at a level, because it has converged or because an implicit derivative of truncated solves does not quite
# belong to the functional, there's nothing to be done but to wait until the refinement has seen enough of it. This costs no solves.


class Enough(Exception):
    pass


def lbfgs(inverse, notebook):
    def callback(_):
        if notebook.note() or notebook.is_full:
            raise Enough

    while not notebook.is_full:
        try:
            minimize(inverse.functional, "L-BFGS-B", callback=callback, options={"ftol": 1e-14, "gtol": 1e-10, "maxcor": 30})
        except Enough:
            continue
        except SciPyConvergenceError:
            pass
        while not notebook.is_full and not notebook.note():
            pass


# The runs
# --------

ITERATIONS = arguments.epochs or {
    ("one", "gradient_descent"): {"quick": 40, "default": 150, "full": 150},
    ("three", "gradient_descent"): {"quick": 40, "default": 400, "full": 400},
    ("one", "lbfgs"): {"quick": 40, "default": 100, "full": 100},
    ("three", "lbfgs"): {"quick": 40, "default": 100, "full": 100},
    ("field", "lbfgs"): {"quick": 10, "default": 100, "full": 200},
}[arguments.problem, OPTIMISER][arguments.size]
LADDERS = {
    ("rods", "jacobi"): IterationLadder(start=110, step=110),
    ("rods", "steepest_descent"): IterationLadder(start=20, step=20),
    ("rods", "cg"): IterationLadder(start=1, step=1),
    ("plate", "jacobi"): IterationLadder(start=100, step=100),
    ("plate", "steepest_descent"): IterationLadder(start=100, step=100),
    ("plate", "cg"): IterationLadder(start=40, step=10),
}
found = {}


def train_one(seed, refinement, label):
    physics = Plate(seed) if arguments.problem == "field" else Rods(seed)
    inverse = Inverse(physics, refinement)
    notebook = Notebook(inverse, refinement, ITERATIONS, label)
    {"gradient_descent": gradient_descent, "lbfgs": lbfgs}[OPTIMISER](inverse, notebook)
    return notebook.history, {"errors": notebook.errors, "misfits": notebook.misfits, "residuals": notebook.residuals}


study = Study("poisson_" + {"one": "1", "three": "3"}.get(arguments.problem, arguments.problem) + f"_{SOLVER}"
              + ("_lbfgs" if OPTIMISER == "lbfgs" and arguments.problem != "field" else "")
              + ("_unrolled" if arguments.differentiation == "unrolled" else ""), arguments,
              ladder=LADDERS["plate" if arguments.problem == "field" else "rods", SOLVER], converged=Tolerance(1e-10, max_it=1_000_000),
              setup={"solver": SOLVER, "optimiser": OPTIMISER, "differentiation": arguments.differentiation, "noise": NOISE, "outer iterations": ITERATIONS})
runs = study.run(train_one)
study.print_table(runs)
