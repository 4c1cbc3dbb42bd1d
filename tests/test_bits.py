"""Equal inputs give equal bits wherever in memory they lie, with all kernels that OpenBLAS has.

Some of its kernels add up in an order that depends on where an array starts. Which kernels are used
depends on the processor, and on whether OpenBLAS knows it: each test runs with those of several.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from firedrake import *
from firedrake.petsc import PETSc
from jobs import run_ranks
from problems import HeatStep

from prdp_fem.memory.batch import Batch, Batches

HERE = Path(__file__).parent
# What a processor must have for them.
KERNELS = {
    "Prescott": "pni",
    "Nehalem": "sse4_2",
    "Haswell": "avx2",
    "Zen": "avx2",
    "SkylakeX": "avx512vl",
}

# PETSc's OpenBLAS, of those that are loaded, says which kernels it has taken; the arrays are placed
# at each multiple of 8 bytes in turn.
SOLVES = """
import ctypes, os, re, sys
import numpy as np
import torch
from firedrake import *
from firedrake.petsc import PETSc
sys.path.insert(0, {here!r})
from problems import HeatStep
import prdp_fem
from prdp_fem import FixedRefinement, Iterations
from prdp_fem.torch import SolverLayer

torch.set_num_threads(1)
with open("/proc/self/maps") as maps:
    path, = set(re.findall(r"/\\S*/libopenblas\\S*", maps.read()))
library = ctypes.CDLL(path)
library.openblas_get_corename.restype = ctypes.c_char_p
assert library.openblas_get_corename().decode() == {kernels!r}, library.openblas_get_corename()

kept = []


def placed(rows, offset):
    # A copy of rows that starts at another place, among other things that come and go.
    others = torch.empty(17 + 3*offset), np.empty(5 + 7*offset)
    kept[:] = [*others, PETSc.Vec().createSeq(3 + offset)]
    memory = torch.empty(rows.numel() + offset + 1, dtype=rows.dtype)
    copy = memory[offset:offset + rows.numel()].view(rows.shape)
    return copy.copy_(rows).requires_grad_()


def values_and_gradients(layer, rows, cotangents, offset):
    inputs = placed(rows, offset)
    values = layer(inputs)
    gradients, = torch.autograd.grad(values, inputs, placed(cotangents, 7 - offset).detach())
    return torch.cat([values.detach(), gradients], -1)


for solver_parameters, differentiation in {methods!r}:
    problem = HeatStep(10)
    solver = prdp_fem.LinearVariationalSolver(
        problem.problem, differentiation=differentiation, solver_parameters=solver_parameters)
    if "lu" not in solver_parameters.values():
        solver.refinement = FixedRefinement(Iterations(12))
    layer = SolverLayer(solver, [problem.u0])
    # Ranks have rows of other lengths, but take them in the same order.
    numbers, orders = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    rows, cotangents = torch.randn(2, 9, problem.V.dof_dset.size, generator=numbers,
                                   dtype=torch.float64)
    expected = values_and_gradients(layer, rows, cotangents, 0)
    assert expected.isfinite().all() and expected.abs().max() > 0
    for offset in range(8):
        order = torch.randperm(9, generator=orders)
        found = values_and_gradients(layer, rows[order], cotangents[order], offset)
        assert torch.equal(found, expected[order]), (solver_parameters, "shuffled", offset)
        for size in (1, 2, 3):
            some = order[:size]
            found = values_and_gradients(layer, rows[some], cotangents[some], offset)
            assert torch.equal(found, expected[some]), (solver_parameters, size, offset)
print("equal")
"""
METHODS = [
    ({"ksp_type": "cg", "pc_type": "jacobi"}, "implicit"),
    ({"ksp_type": "cg", "pc_type": "sor"}, "unrolled"),
    ({"ksp_type": "gmres", "pc_type": "ilu"}, "implicit"),
    ({"ksp_type": "gmres", "pc_type": "none"}, "unrolled"),
    ({"ksp_type": "bcgs", "pc_type": "jacobi"}, "unrolled"),
    ({"ksp_type": "minres", "pc_type": "jacobi"}, "implicit"),
    (
        {"ksp_type": "richardson", "pc_type": "jacobi", "ksp_richardson_self_scale": None},
        "implicit",
    ),
    ({"ksp_type": "preonly", "pc_type": "lu"}, "implicit"),
    ({"ksp_type": "preonly", "pc_type": "lu", "pc_factor_mat_solver_type": "mumps"}, "implicit"),
]
# Preconditioners that work on several ranks.
METHODS_IN_PARALLEL = [pair for pair in METHODS if pair[0]["pc_type"] in ("jacobi", "none", "sor")]


def processor_flags():
    try:
        return set(
            re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split()
        )
    except (OSError, TypeError):
        return set()


def needs(kernels):
    if platform.machine() != "x86_64" or "openblas" not in Path("/proc/self/maps").read_text():
        pytest.skip("the kernels are those of OpenBLAS for x86_64")
    if KERNELS[kernels] not in processor_flags():
        pytest.skip(f"the processor has no {KERNELS[kernels]}, which kernels for {kernels} use")


@pytest.mark.parametrize("kernels", KERNELS)
def test_results_do_not_depend_on_places_in_memory_or_in_a_batch(kernels):
    needs(kernels)
    script = SOLVES.format(here=str(HERE), kernels=kernels, methods=METHODS)
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "OPENBLAS_CORETYPE": kernels},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "equal\n", run.stdout + run.stderr


@pytest.mark.parametrize("ranks", [2, 3])
def test_nor_do_they_on_several_ranks(ranks, monkeypatch):
    """With the kernels that are the most sensitive to it."""
    needs("Prescott")
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    run = run_ranks(
        ranks, SOLVES.format(here=str(HERE), kernels="Prescott", methods=METHODS_IN_PARALLEL)
    )
    assert run.status == 0 and run.output.count("equal") == ranks, run.output


def addresses(vectors):
    return np.array([vector.array_r.ctypes.data for vector in vectors])


@pytest.mark.parallel([1, 2, 3])
def test_vectors_are_aligned():
    """Those of PETSc and those of batches, so that kernels see all arrays alike."""
    like = HeatStep(6).V.dof_dset.layout_vec
    between = []
    for size in range(1, 40):
        between.append((np.empty(size), PETSc.Vec().createSeq(size, comm=PETSc.COMM_SELF)))
        vectors = [like.duplicate(), *Batch(size, like).vectors]
        assert not np.any(addresses(vectors) % 64)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 121])
def test_rows_are_columns_of_a_matrix(size):
    """Whatever room there is between them."""
    comm = PETSc.COMM_WORLD
    like = PETSc.Vec().createMPI((size, PETSc.DETERMINE), comm=comm)
    batches = Batches(lambda rows: Batch(rows, like))
    A = PETSc.Mat().createAIJ((like.getSizes(), like.getSizes()), nnz=3, comm=comm)
    start, stop = A.getOwnershipRange()
    for row in range(start, stop):
        A[row, row] = 2.0 + row
        if row > start:
            A[row, row - 1] = 1 / (1 + row)
    A.assemble()
    for rows in (1, 2, 5):
        batch, out = batches[rows], Batch(rows, like)
        values = np.random.default_rng(rows).standard_normal((rows, size))
        batch.fill(values)
        batch.multiply(A, out)
        below = np.concatenate([np.zeros((rows, min(size, 1))), values[:, :-1]], axis=1)
        numbers = np.arange(start, stop)
        expected = (2.0 + numbers) * values + np.where(
            numbers > start, 1 / (1.0 + numbers), 0.0
        ) * below
        np.testing.assert_allclose(out.array, expected, rtol=1e-14)
        read = np.empty((rows, size))
        out.read(read)
        assert np.array_equal(read, out.array)
