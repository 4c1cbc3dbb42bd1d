"""Small problems that several test modules solve."""

import numpy as np
from firedrake import *

CG = {"ksp_type": "cg", "pc_type": "jacobi"}
RICHARDSON = {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_richardson_scale": 0.6}
GMRES = {"ksp_type": "gmres", "pc_type": "jacobi"}
CONVERGED = {"ksp_rtol": 1e-13, "ksp_atol": 1e-50, "ksp_max_it": 10_000}


def smooth(space, seed: int, name: str = "field"):
    """A smooth Function that is the same on any number of ranks."""
    x, y, *_ = SpatialCoordinate(space.mesh())
    a, b, c = np.random.default_rng(seed).uniform(0.5, 2.0, 3)
    expression = a * sin(pi * x) * cos(b * y) + c * x * y
    if space.value_shape:
        expression = as_vector([(k + 1) * expression for k in range(space.value_shape[0])])
    return Function(space, name=name).interpolate(expression)


def whole(values) -> np.ndarray:
    """An array that each rank has a part of, as the values of a Function or the rows of a matrix,
    whole on each rank.
    """
    return np.concatenate(COMM_WORLD.allgather(np.asarray(values)))


def dense(form, bcs=(), **options) -> np.ndarray:
    """The whole matrix of a form on each rank."""
    return whole(
        assemble(form, bcs=bcs, mat_type="aij", **options)
        .petscmat.convert("dense")
        .getDenseArray()
        .copy()
    )


def boundary_dofs(condition) -> np.ndarray:
    """The dofs of a condition on a scalar space on all ranks, as places in whole arrays; its
    ``nodes`` are a rank's, ghosts included.
    """
    dofs = condition.function_space().dof_dset
    return whole(
        condition.nodes[condition.nodes < dofs.size] + dofs.layout_vec.getOwnershipRange()[0]
    )


def norm_by_dofs(f) -> float:
    """The Euclidean norm of the dofs of a Function or Cofunction on all ranks."""
    with f.dat.vec_ro as dofs:
        return dofs.norm()


def equality(parameters: dict):
    """A function that says whether arrays, of which each rank has a part, are what one solver gives
    twice: equal to the bit.

    Up to rounding on several ranks where MUMPS factorises, and on three or more where gamg is set
    up, as PETSc's do there by themselves, too: they add up what other ranks send in the order of
    arrival.
    """
    added_by_arrival = (
        set() if COMM_WORLD.size == 1 else {"lu"} if COMM_WORLD.size == 2 else {"lu", "gamg"}
    )
    if not added_by_arrival & set(parameters.values()):
        return lambda one, other: np.array_equal(whole(one), whole(other))
    return lambda one, other: (
        np.linalg.norm(whole(one - other)) <= 1e-12 * np.linalg.norm(whole(other))
    )


def same_on_all_ranks(control) -> bool:
    """Whether each rank has all values of a control, not a part of a field."""
    return (
        isinstance(control, Constant) or control.function_space().ufl_element().family() == "Real"
    )


class HeatStep:
    """An implicit heat step with a source, a diffusivity that varies, and boundary values."""

    def __init__(self, cells: int = 6, *, boundary=0, mesh=None):
        self.mesh = UnitSquareMesh(cells, cells) if mesh is None else mesh
        V = self.V = FunctionSpace(self.mesh, "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        self.u0 = smooth(V, 1, "initial")
        self.source = smooth(V, 2, "source")
        self.kappa = Function(V, name="diffusivity").interpolate(
            1 + 0.5 * SpatialCoordinate(self.mesh)[0]
        )
        self.dt = Constant(0.05, name="time step")
        self.u = Function(V, name="solution")
        self.bcs = [] if boundary is None else [DirichletBC(V, boundary, "on_boundary")]
        self.a = (w * v + self.dt * self.kappa * inner(grad(w), grad(v))) * dx
        self.L = (self.u0 * v + self.dt * self.source * v) * dx
        self.problem = LinearVariationalProblem(self.a, self.L, self.u, bcs=self.bcs)


class AdvectionDiffusion:
    """A non-symmetric operator."""

    def __init__(self, cells: int = 6, *, mesh=None):
        self.mesh = UnitSquareMesh(cells, cells) if mesh is None else mesh
        V = self.V = FunctionSpace(self.mesh, "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        self.source = smooth(V, 3, "source")
        self.wind = smooth(VectorFunctionSpace(self.mesh, "CG", 1), 4, "wind")
        self.u = Function(V, name="solution")
        self.bcs = [DirichletBC(V, 0, "on_boundary")]
        self.a = (0.1 * inner(grad(w), grad(v)) + dot(self.wind, grad(w)) * v + w * v) * dx
        self.problem = LinearVariationalProblem(self.a, self.source * v * dx, self.u, bcs=self.bcs)
