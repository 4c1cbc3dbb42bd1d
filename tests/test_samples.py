"""Batches of samples are solved and pulled back on arrays of NumPy, without any framework."""

import numpy as np
import pytest
from firedrake import *
from firedrake.exceptions import ConvergenceError
from problems import CG, CONVERGED, HeatStep, boundary_dofs, dense, whole

import prdp_fem
from prdp_fem.bridge.controls import Controls
from prdp_fem.bridge.samples import Given


class Heat:
    """A heat step with its controls, solved to convergence."""

    def __init__(self, *names: str, **options):
        self.step = HeatStep()
        self.solver = prdp_fem.LinearVariationalSolver(
            self.step.problem, solver_parameters={**CG, **CONVERGED}, **options
        )
        controls = [getattr(self.step, name) for name in names]
        self.controls = Controls(self.solver, controls, [None])
        self.samples = self.controls.samples

    def rows(self, count: int, seed: int = 0) -> np.ndarray:
        """So many rows, each of which is a part of a whole that is the same on any ranks."""
        comm, size = self.step.mesh.comm, self.controls.sizes[0]
        start = comm.exscan(size) or 0
        numbers = np.random.default_rng(seed).uniform(0.5, 1.5, (count, comm.allreduce(size)))
        return numbers[:, start : start + size].copy()

    def matrices(self) -> tuple[np.ndarray, np.ndarray]:
        """A, and what the initial values are multiplied by, for an oracle."""
        B = dense(TrialFunction(self.step.V) * TestFunction(self.step.V) * dx)
        B[boundary_dofs(self.step.bcs[0])] = 0.0
        return dense(self.step.a, self.step.bcs), B


def solve_rows(heat: Heat, *values, batch: tuple[int, ...]):
    """Solutions, and what pulls cotangents of them back."""
    given = Given(batch, [None, None, *values])
    solutions, solved, saved = heat.samples.solve(given, None)
    wanted = [False, False, *[True] * len(values)]
    return solutions, lambda cotangents: heat.samples.pull_back(
        solved, given, saved, cotangents, wanted
    )


@pytest.mark.parallel([1, 2])
@pytest.mark.parametrize("differentiation", ["implicit", "unrolled"])
def test_rows_are_solved_and_pulled_back_as_by_dense_matrices(differentiation):
    heat = Heat("u0", differentiation=differentiation)
    A, B = heat.matrices()
    initial, cotangents = heat.rows(3), heat.rows(3, seed=1)
    solutions, pull_back = solve_rows(heat, initial, batch=(3,))
    zero, _ = solve_rows(heat, 0 * initial, batch=(3,))
    by_boundary, by_guess, gradient = pull_back(cotangents)
    assert by_boundary is None and by_guess is None
    inside = np.ones(len(A))
    inside[boundary_dofs(heat.step.bcs[0])] = 0.0
    for row in range(3):
        expected = np.linalg.solve(A, B @ whole(initial[row]))
        np.testing.assert_allclose(whole(solutions[row] - zero[row]), expected, atol=1e-11)
        adjoint = np.linalg.solve(A.T, inside * whole(cotangents[row]))
        np.testing.assert_allclose(whole(gradient[row]), B.T @ adjoint, atol=1e-11)


@pytest.mark.parallel([1, 2])
def test_what_all_samples_have_alike_gives_the_bits_of_rows_that_are_equal():
    heat = Heat("u0", "kappa")
    initial, kappa = heat.rows(2), heat.rows(1, seed=1)
    cotangents = heat.rows(2, seed=2)
    shared, by_shared = solve_rows(heat, initial, kappa[0], batch=(2,))
    repeated, by_repeated = solve_rows(heat, initial, np.repeat(kappa, 2, axis=0), batch=(2,))
    assert np.array_equal(shared, repeated)
    for one, other in zip(by_shared(cotangents), by_repeated(cotangents)):
        assert one is other is None or np.array_equal(one, other)


@pytest.mark.parallel([1, 2])
def test_errors_name_the_sample_by_its_batch_axes():
    heat = Heat("u0")
    initial = heat.rows(4)
    initial[2] = np.nan
    with pytest.raises(ConvergenceError, match=r"^sample \(1, 0\): "):
        solve_rows(heat, initial, batch=(2, 2))
    _, pull_back = solve_rows(heat, heat.rows(4), batch=(2, 2))
    with pytest.raises(ConvergenceError, match=r"^sample \(1, 1\): the cotangent of 'solution'"):
        pull_back(np.where(np.arange(4) == 3, np.inf, 1.0)[:, None] * heat.rows(4))


@pytest.mark.parallel([1, 2])
def test_a_solve_is_pulled_back_with_the_values_that_it_was_made_with():
    heat = Heat("kappa")
    cotangents = heat.rows(1)
    expected = [pull(cotangents)[-1] for _, pull in [solve_rows(heat, heat.rows(1), batch=())]]
    _, pull_back = solve_rows(heat, heat.rows(1), batch=())
    heat.step.u0.assign(7.0)
    heat.step.dt.assign(0.5)
    assert np.array_equal(pull_back(cotangents)[-1], expected[0])
    heat.step.mesh.coordinates.dat.data_wo[...] *= 2.0
    with pytest.raises(RuntimeError, match="a mesh of the problem has moved between"):
        pull_back(cotangents)
