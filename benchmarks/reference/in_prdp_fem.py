"""The heat step by finite elements, with this package, as a layer of a torch network."""

from collections.abc import Callable

import numpy as np
import torch
from firedrake import (
    DirichletBC,
    Function,
    FunctionSpace,
    LinearVariationalProblem,
    TestFunction,
    TrialFunction,
    UnitSquareMesh,
    assemble,
    dx,
    grad,
    inner,
)
from firedrake.petsc import PETSc
from heat_step import (
    BATCH,
    BETAS,
    DIFFUSION,
    EPSILON,
    ITERATIONS,
    LEARNING_RATE,
    LEVELS,
    NODES,
    SPACING,
    UNKNOWNS,
    WIDTH,
    batches,
    initial_weights,
    matrix,
    processor_time,
    training_data,
)

from prdp_fem import (
    FixedRefinement,
    IterationLadder,
    Iterations,
    LinearVariationalSolver,
    ScheduledRefinement,
)
from prdp_fem.refinement import Refinement
from prdp_fem.torch import SolverLayer

torch.set_num_threads(1)
# PETSc reads the command line too, and need not complain of what it does not know
PETSc.Options().setValue("options_left", False)

JACOBI = {"ksp_type": "richardson", "pc_type": "jacobi"}
# How to differentiate, and options beside Jacobi's: by default PETSc computes the residual's norm
# in each iteration, and JAX does not.
VARIANTS = {
    "implicit": ("implicit", {}),
    "unrolled": ("unrolled", {}),
    "implicit, no norms": ("implicit", {"ksp_norm_type": "none"}),
}


class HeatStep(torch.nn.Module):
    """From a batch of fields on the interior nodes, row by row of the grid, to that after a step.

    Linear finite elements on a square cut into right triangles have the stiffness of the five-point
    stencil; integrating the mass by its values at the vertices makes it diagonal: together h² times
    the operator of finite differences.
    """

    def __init__(self, refinement: Refinement, variant: str):
        super().__init__()
        V = FunctionSpace(UnitSquareMesh(NODES + 1, NODES + 1), "CG", 1)
        w, v = TrialFunction(V), TestFunction(V)
        u0, u = Function(V, name="u0"), Function(V, name="u")
        vertices = dx(scheme="KMV", degree=1)
        self.a = w * v * vertices + DIFFUSION * inner(grad(w), grad(v)) * dx
        self.bcs = DirichletBC(V, 0, "on_boundary")
        self.size = V.dim()
        differentiation, options = VARIANTS[variant]
        problem = LinearVariationalProblem(self.a, u0 * v * vertices, u, bcs=self.bcs)
        solver = LinearVariationalSolver(
            problem,
            refinement=refinement,
            differentiation=differentiation,
            solver_parameters=JACOBI | options,
        )
        self.physics = SolverLayer(solver, controls=[u0])
        x, y = np.rint(V.mesh().coordinates.dat.data_ro / SPACING).astype(int).T
        order = np.lexsort((y, x))
        interior = ((x > 0) & (x <= NODES) & (y > 0) & (y <= NODES))[order]
        self.interior = torch.from_numpy(order[interior])

    def matrix(self) -> np.ndarray:
        """The assembled operator between interior nodes, dense."""
        rows = self.interior.numpy().astype(PETSc.IntType)
        return assemble(self.a, bcs=self.bcs).petscmat.getValues(rows, rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        everywhere = x.new_zeros(x.shape[0], self.size).index_copy(1, self.interior, x)
        return self.physics(everywhere).index_select(1, self.interior)


def check_matrix() -> float:
    """How far the assembled operator is from that of finite differences, relative to its largest
    entry.
    """
    expected = SPACING**2 * matrix()
    return (
        np.abs(HeatStep(FixedRefinement(Iterations(1)), "implicit").matrix() - expected).max()
        / expected.max()
    )


def contestant(variant: str, samples, precision: str) -> Callable:
    """A function that takes a batch, by its number, forward and backward."""
    step = HeatStep(FixedRefinement(Iterations(ITERATIONS)), variant)
    samples = torch.from_numpy(samples.astype(precision))

    def forward_and_backward(batch):
        x = samples[batch].requires_grad_()
        u = step(x)
        u.backward(u.detach())
        return u.detach(), x.grad

    return forward_and_backward


def train(variant: str, precision: str, epochs_per_level: int) -> dict:
    """A training run, with the time that it takes to set up the solver and have everything compiled
    that is not in a cache.
    """
    epochs = LEVELS * epochs_per_level
    initial, target = (torch.from_numpy(array) for array in training_data(precision))

    start = processor_time()
    schedule = {epoch: epoch // epochs_per_level for epoch in range(0, epochs, epochs_per_level)}
    refinement = ScheduledRefinement(IterationLadder(start=1, step=1, stop=LEVELS), schedule)
    step = HeatStep(refinement, variant)
    step(torch.ones(BATCH, UNKNOWNS, dtype=initial.dtype, requires_grad=True)).sum().backward()
    setting_up = processor_time() - start

    network = torch.nn.Sequential(
        torch.nn.Linear(UNKNOWNS, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, UNKNOWNS)
    ).to(initial.dtype)
    with torch.no_grad():
        for parameter, array in zip(network.parameters(), initial_weights(precision)):
            parameter.copy_(torch.from_numpy(array.T))
    optimiser = torch.optim.Adam(network.parameters(), LEARNING_RATE, BETAS, EPSILON)
    order, losses = batches(epochs), []
    start = processor_time()
    for rows_of_batches in order:
        values = []
        for rows in rows_of_batches:
            optimiser.zero_grad()
            loss = torch.mean((step(network(initial[rows])) - target[rows]) ** 2)
            loss.backward()
            optimiser.step()
            values.append(loss.item())
        losses.append(sum(values) / len(values))
        refinement.step(losses[-1])
    return {"compiling": setting_up, "training": processor_time() - start, "losses": losses}
