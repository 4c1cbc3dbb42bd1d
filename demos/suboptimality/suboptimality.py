"""How wrong a truncated solve is, and how wrong its derivatives are.

A linear system A(θ) u = b(θ) is solved by K iterations from zero, and the result is differentiated
by the parameters θ. Three things can be compared with what they are once the iteration has
converged:

* the solution u_K itself;
* the implicit Jacobian, by the equations that u solves: taken at u_K, with its own linear systems
  solved by K iterations, too;
* the unrolled Jacobian, by the iterations: the exact derivative of u_K.

The implicit one is not the derivative of what was computed, the unrolled one not of what was meant.
This script measures how far off each of them is, for four methods (Jacobi, steepest descent,
conjugate gradients, GMRES) and three problems:

* a heated rod, by the heat source in each of its cells: parameters on the right-hand side;
* a heated rod, by the conductivity of each of its cells: parameters in the operator;
* a heated plate with holes, on an unstructured mesh, by the conductivity of each of its 2344 cells.

It prints how many iterations each error takes to fall below 1e-2 and 1e-6, and draws all errors:

    python suboptimality.py                            about a minute
    python suboptimality.py --quick                    a quarter of a minute; or QUICK=1
    mpiexec -n 2 python suboptimality.py --output out  two ranks share the meshes
    mpiexec -n 2 python suboptimality.py --ensemble 2  two ranks share the rows of the Jacobians

The figure follows those on "Jacobian suboptimality" in Bhatia, Koehler and Thuerey, PRDP (ICLR
2025, arXiv 2502.19611). Options with a single dash are PETSc's, such as -log_view.
"""

import json
import math
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
from matplotlib.figure import Figure
from tqdm import tqdm

from prdp_fem import FixedRefinement, Iterations, LinearVariationalSolver
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.studies import save_figure, triangle_mesh
from prdp_fem.studies.command_line import Parser, count
from prdp_fem.studies.files import put_aside, write
from prdp_fem.torch import SolverLayer, deal, to_torch

# The command line
# ----------------

HERE = Path(__file__).resolve().parent
PLATE = HERE.parent / "heat_emulator" / "plate.msh"  # made by Gmsh from plate.geo
RIM = 2  # its physical group "rim"

parser = Parser(description=__doc__.partition("\n")[0])
parser.add_argument(
    "--seed",
    type=count,
    default=1,
    help="of sources, conductivities and functionals (default: %(default)s)",
)
parser.add_argument(
    "--iterations",
    type=count,
    metavar="K",
    help=(
        "the largest K (default: 4000, and 250 with --quick); a method that converges ends earlier"
    ),
)
parser.add_argument(
    "--quick",
    action="store_true",
    default=os.environ.get("QUICK", "") not in ("", "0"),
    help=(
        "a rod of fewer cells, and fewer and smaller K, too small for Jacobi and steepest descent"
        " to converge on the plate; also switched on by QUICK=1 in the environment"
    ),
)
parser.add_argument(
    "--output",
    type=Path,
    default=HERE / "output",
    metavar="DIR",
    help="where results and figure are put (default: output beside this script)",
)
parser.add_ensemble("rows of Jacobians")
arguments, _ = parser.parse()
ensemble = parser.make_ensemble(arguments.ensemble)
if arguments.iterations is None:
    arguments.iterations = 250 if arguments.quick else 4000
if arguments.iterations < 2:
    parser.error("there must be at least two iterations to draw a line")
parser.make_folder(arguments.output)

# The numbers of iterations that are looked at, from the largest one down: ever fewer where they are
# many, and cost most.

counts = [arguments.iterations]
while counts[0] > 1:
    share = 0.25 if counts[0] > (10 if arguments.quick else 300) else 0.08
    counts.insert(0, counts[0] - max(1, round(share * counts[0])))

# The problems
# ------------
# All are heat conduction, -∇·(conductivity ∇u) = source, with u = 0 on a part of the boundary, and
# the rest insulated. The temperature is continuous and piecewise linear; source and conductivity
# have a value in each cell. One of these two fields is the control θ.
#
# The Jacobian J = ∂u/∂θ is looked at row by row, since this is how training needs it: for any
# weights w, one adjoint solve gives wᵀJ, the gradient of wᵀu by all of θ. On the rod the weights
# are those of the identity, which makes the whole of J. On the plate that would take a solve for
# each of 1277 nodes, and we are content with the gradients of three functionals, ∫ f u dx with
# random smooth f.
#
# Rows are independent of each other. So the members of an ensemble deal them out: each has the
# whole mesh, on ranks of its own, makes the forward solve, and those adjoint solves that its rows
# take.

comm = ensemble.comm
rng = np.random.default_rng(arguments.seed)
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)


def total(value, comm=comm):
    """The sum over the ranks that share a mesh, or others."""
    return comm.allreduce(float(value))


@dataclass
class Problem:
    name: str
    equation: str
    variational: LinearVariationalProblem
    control: Function
    # one w in each row that this member has been dealt; its columns are the nodes that this rank
    # owns
    weights: torch.Tensor
    nodes: torch.Tensor  # the size of what belongs to each node: the lumped mass matrix
    cells: torch.Tensor  # the size of each cell

    def norm(self, u):
        """The L2 norm of a temperature."""
        return total(self.nodes @ u**2) ** 0.5

    def norm_of_rows(self, J):
        """Of rows of a Jacobian, each a gradient in L2: on the rod, whose cells are of one size, a
        multiple of the Frobenius norm.
        """
        return total((J**2 / self.cells).sum(), ensemble.global_comm) ** 0.5


def random_field(space):
    """A smooth field between -1 and 1, the mean of eight waves. All ranks draw the same ones."""
    mesh = space.mesh()
    wave_vectors = rng.normal(0, 5, (8, mesh.geometric_dimension))
    phases = rng.uniform(0, 2 * np.pi, 8)
    points = (
        Function(VectorFunctionSpace(mesh, space.ufl_element()))
        .interpolate(SpatialCoordinate(mesh))
        .dat.data_ro
    )
    field = Function(space)
    field.dat.data_wo[:] = np.sin(
        points.reshape(-1, mesh.geometric_dimension) @ wave_vectors.T + phases
    ).mean(axis=1)
    return field


def conduction(name, equation, source, conductivity, control, cold, functionals=None):
    mesh = control.function_space().mesh()
    V, Q = FunctionSpace(mesh, "CG", 1), FunctionSpace(mesh, "DG", 0)
    w = TrialFunction(V)
    v = TestFunction(V)
    q = TestFunction(Q)
    problem = LinearVariationalProblem(
        conductivity * inner(grad(w), grad(v)) * dx,
        source * v * dx,
        Function(V, name="temperature"),
        bcs=DirichletBC(V, 0, cold),
    )
    if functionals is None:
        first, last = V.dof_dset.layout_vec.getOwnershipRange()
        weights = torch.eye(V.dim())[:, first:last]
    else:
        weights = torch.stack(
            [to_torch(assemble(random_field(V) * v * dx), copy=True) for _ in range(functionals)]
        )
    return Problem(
        name,
        equation,
        problem,
        control,
        deal(weights, ensemble),
        nodes=to_torch(assemble(v * dx), copy=True),
        cells=to_torch(assemble(q * dx), copy=True),
    )


# The paper's rod has 30 unknowns and a load of one sine mode, or of three. Sines are eigenvectors
# of its operator, so that conjugate gradients would be done after one iteration, or three; our
# source differs from cell to cell. And 11 unknowns will do, with which Jacobi's method needs a
# seventh of the iterations.

Q = FunctionSpace(UnitIntervalMesh(8 if arguments.quick else 12, comm=comm), "DG", 0)
source = Function(Q, name="source").interpolate(1 + 2 * random_field(Q))
conductivity = Function(Q, name="conductivity").interpolate(exp(2 * random_field(Q)))
Q = FunctionSpace(triangle_mesh(PLATE, comm, marks=[RIM]), "DG", 0)
plate_conductivity = Function(Q, name="conductivity").interpolate(exp(2 * random_field(Q)))

problems = [
    conduction(
        "rod, by its source",
        r"$A\,u = b(\theta)$",
        source,
        Constant(1),
        control=source,
        cold="on_boundary",
    ),
    conduction(
        "rod, by its conductivity",
        r"$A(\theta)\,u = b$",
        source,
        conductivity,
        control=conductivity,
        cold="on_boundary",
    ),
    conduction(
        "plate, by its conductivity",
        r"$A(\theta)\,u = b$",
        Constant(1),
        plate_conductivity,
        control=plate_conductivity,
        cold=RIM,
        functionals=3,
    ),
]

# The methods
# -----------
# All are preconditioned by the diagonal of the operator; the derivative of that is part of an
# unrolled derivative. It makes Richardson's iteration that of Jacobi, which converges undamped here
# (with higher elements, or very obtuse triangles, it may not). GMRES starts anew after every 30
# iterations, PETSc's default.

methods = {
    "Jacobi": {"ksp_type": "richardson", "pc_type": "jacobi"},
    "steepest descent": {
        "ksp_type": "python",
        "ksp_python_type": "prdp_fem.SteepestDescent",
        "pc_type": "jacobi",
    },
    "CG": {"ksp_type": "cg", "pc_type": "jacobi"},
    "GMRES(30)": {"ksp_type": "gmres", "pc_type": "jacobi"},
}


def differentiate(physics, problem):
    """The solution that a layer gives, and this member's rows of its Jacobian."""
    theta = to_torch(problem.control, copy=True).requires_grad_()
    u = physics(theta)
    J = torch.zeros(len(problem.weights), len(theta))
    for row, w in zip(J, problem.weights):
        row[:] = torch.autograd.grad(u, theta, w, retain_graph=True)[0]
    return u.detach(), J


# What is exact
# -------------
# A direct solver with implicit differentiation gives solution and Jacobian up to rounding. That
# this is the Jacobian is ascertained by a central difference in a random direction, whose error is
# of second order in the step.


def exact(problem, step=1e-4):
    solver = LinearVariationalSolver(
        problem.variational,
        differentiation="implicit",
        solver_parameters={
            "ksp_type": "preonly",
            "pc_type": "lu",
            "pc_factor_mat_solver_type": "mumps",
        },
    )
    physics = SolverLayer(solver, [problem.control])
    u, J = differentiate(physics, problem)
    theta = to_torch(problem.control)
    direction = to_torch(random_field(problem.control.function_space()))
    with torch.no_grad():
        slope = (physics(theta + step * direction) - physics(theta - step * direction)) / (2 * step)
    by_jacobian, by_difference = (
        np.concatenate(ensemble.ensemble_comm.allgather(comm.allreduce(values.numpy())))
        for values in (J @ direction, problem.weights @ slope)
    )
    check = np.linalg.norm(by_jacobian - by_difference) / np.linalg.norm(by_difference)
    assert check < 1e-6, (
        f"{problem.name}: the Jacobian of the direct solver is off a central difference by"
        f" {check:.1e}"
    )
    return u, J, check


# Errors against K
# ----------------
# Two solvers differ in nothing but how they are differentiated. A refinement that is constant, K
# iterations, is handed to both, and a new one for the next K. All errors are relative. Iterations
# that would follow a relative residual of 1e-12 are not made, since they would only stir rounding
# errors; there the method ends.


def measure(problem, parameters, u_exact, J_exact, bar):
    solvers, layers = {}, {}
    for way in ("implicit", "unrolled"):
        solvers[way] = LinearVariationalSolver(
            problem.variational, differentiation=way, solver_parameters=parameters
        )
        layers[way] = SolverLayer(solvers[way], [problem.control])
    record = {"iterations": [], "solution": [], "implicit": [], "unrolled": [], "difference": []}
    for K in counts:
        J = {}
        for way, solver in solvers.items():
            solver.refinement = FixedRefinement(Iterations(K))
            solver.statistics.reset()
            u, J[way] = differentiate(layers[way], problem)  # forward, both do the same
        bar.update()
        spent = solver.statistics.forward_iterations
        if spent in record["iterations"]:
            break
        record["iterations"].append(spent)
        record["solution"].append(problem.norm(u - u_exact) / problem.norm(u_exact))
        for way in solvers:
            record[way].append(
                problem.norm_of_rows(J[way] - J_exact) / problem.norm_of_rows(J_exact)
            )
        record["difference"].append(
            problem.norm_of_rows(J["implicit"] - J["unrolled"]) / problem.norm_of_rows(J_exact)
        )
        if spent < K:
            break
    bar.update(len(counts) - counts.index(K) - 1)
    return record


start = time.perf_counter()
results, checks = {}, {}
with tqdm(
    total=len(problems) * len(methods) * len(counts),
    unit="K",
    disable=ensemble.global_comm.rank > 0,
) as bar:
    for problem in problems:
        u_exact, J_exact, checks[problem.name] = exact(problem)
        results[problem.name] = {}
        for method, parameters in methods.items():
            bar.set_description(f"{problem.name}, {method}", refresh=False)
            results[problem.name][method] = measure(problem, parameters, u_exact, J_exact, bar)
seconds = time.perf_counter() - start

# One of the results is known beforehand. K iterations of Jacobi's method from zero are a linear
# map, u_K = M_K b, with a symmetric M_K that depends on the operator only. For a parameter on the
# right-hand side both Jacobians then are M_K ∂b/∂θ. With the other methods M_K depends on b:
# unrolling sees that, implicit differentiation does not.

linear = max(results["rod, by its source"]["Jacobi"]["difference"])
assert linear < 1e-10, (
    "implicit and unrolled Jacobians of Jacobi's method by the right-hand side differ by"
    f" {linear:.1e}"
)

# The result
# ----------
# How many iterations it takes until an error is below a tolerance, and stays there; between two K
# that were looked at by interpolation, in which the logarithm of the error is linear.

TOLERANCES = 1e-2, 1e-6
ERRORS = "solution", "implicit", "unrolled"


def needed(record, error, tolerance):
    """The number of iterations; None if there were not enough."""
    iterations, errors = record["iterations"], np.log(record[error])
    # the last K whose error is above
    last = max(np.flatnonzero(errors > np.log(tolerance)), default=-1)
    if last == -1:
        return iterations[0]
    if last == len(errors) - 1:
        return None
    return math.ceil(
        np.interp(
            np.log(tolerance), errors[[last + 1, last]], [iterations[last + 1], iterations[last]]
        )
    )


for records in results.values():
    for record in records.values():
        record["needed"] = {
            f"{tolerance:g}": {error: needed(record, error, tolerance) for error in ERRORS}
            for tolerance in TOLERANCES
        }

PETSc.Sys.Print(
    f"\n{'iterations until the error is below':36}{'1e-2':>20}{'1e-6':>30}{'largest':>22}"
)
PETSc.Sys.Print(f"{'':36}{''.join(f'{error:>10}' for error in 2 * ERRORS)}{'difference':>12}")
for problem in problems:
    PETSc.Sys.Print(
        f"{problem.name}; a central difference confirms the exact Jacobian to"
        f" {checks[problem.name]:.0e}"
    )
    for method, record in results[problem.name].items():
        cells = "".join(
            f"{record['needed'][f'{tolerance:g}'][error] or '-':>10}"
            for tolerance in TOLERANCES
            for error in ERRORS
        )
        PETSc.Sys.Print(f"    {method:32}{cells}{max(record['difference']):>12.0e}")
PETSc.Sys.Print(
    "The difference is that of implicit and unrolled Jacobian. For Jacobi by the source it is"
    " rounding, as theory has it."
)

# The figure
# ----------
# A row for each method, a column for each problem. Lines are of decreasing width, so that one sees
# the others where they coincide. The numbers in the corners are those of the table. Things to look
# for:
#
# - Jacobi by the source: the two Jacobians are the same, and fall as fast as the solution's error.
# - Jacobi by a conductivity: with ρ the factor by which an iteration reduces the error of the
# solution, that of the implicit Jacobian falls like ρᴷ, too, but that of the unrolled one like K
# ρᴷ, since each iteration adds an error of its own, which those after it have to reduce. (Scieur,
# Gidel, Bertrand and Pedregosa, The curse of unrolling, NeurIPS 2022.)
# - CG and GMRES are done on the rod after as many iterations as there are unknowns. Where they
# search depends on θ, and that is part of an unrolled derivative: it can be the closer one, but at
# first it can also be worse than none, with an error above one.

STYLES = {
    "solution": {"color": "0.75", "linewidth": 8, "label": "solution $u_K$"},
    "implicit": {"color": "#0072B2", "linewidth": 3.6, "label": "implicit Jacobian"},
    "unrolled": {
        "color": "#D55E00",
        "linewidth": 1.2,
        "marker": "o",
        "markersize": 3.5,
        "markevery": 0.055,
        "label": "unrolled Jacobian",
    },
}
# light grey is too light for letters
INK = {"solution": "0.4", "implicit": "#0072B2", "unrolled": "#D55E00"}


def draw(path):
    figure = Figure(figsize=(8, 9.4), layout="constrained")
    panels = figure.subplots(len(methods), len(problems), sharey=True)
    for row, method in zip(panels, methods):
        for axes, problem in zip(row, problems):
            record = results[problem.name][method]
            for error, style in STYLES.items():
                axes.semilogy(record["iterations"], record[error], solid_capstyle="round", **style)
            axes.text(0.04, 0.29, "below $10^{-6}$ after", transform=axes.transAxes)
            for line, error in enumerate(ERRORS):
                iterations = record["needed"]["1e-06"][error] or f">{record['iterations'][-1]}"
                axes.text(
                    0.20,
                    0.205 - 0.085 * line,
                    iterations,
                    color=INK[error],
                    ha="right",
                    transform=axes.transAxes,
                )
                axes.text(
                    0.24, 0.205 - 0.085 * line, error, color=INK[error], transform=axes.transAxes
                )
            axes.set(xlim=(0, None), ylim=(1e-16, 10))
            axes.set_yticks([1e-15, 1e-10, 1e-5, 1])
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.tick_params(labelsize=11)
        row[0].set_ylabel(method, fontsize=13)
    for axes, problem in zip(panels[0], problems):
        axes.set_title(f"{problem.name}\n{problem.equation}", fontsize=12)
    for axes in panels[-1]:
        axes.set_xlabel("iterations $K$", fontsize=12)
    figure.supylabel("relative error", fontsize=12)
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
        fontsize=12,
    )
    save_figure(figure, path, dpi=150)


def write_results(path):
    """What an earlier run has left there is kept."""
    if path.exists():
        put_aside(path)
    versions = {
        name: version(name) for name in ("prdp-fem", "firedrake", "petsc4py", "torch", "numpy")
    }
    everything = {
        "arguments": {**vars(arguments), "output": arguments.output.name},
        "ranks": ensemble.global_comm.size,
        "versions": {**versions, "python": platform.python_version()},
        "seconds": seconds,
        "difference_from_central_difference": checks,
        "results": results,
    }
    write(path, json.dumps(everything, indent=1) + "\n")


def write_all():
    write_results(arguments.output / "results.json")
    draw(arguments.output / "suboptimality.png")


from_first_rank(ensemble.global_comm, write_all)
PETSc.Sys.Print(
    f"\nresults.json and suboptimality.png are in {os.path.relpath(arguments.output)}, after"
    f" {seconds:.0f} seconds"
)
