"""What ``prdp-fem doctor`` looks at: whether an installation works, and what it has."""
from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable, Iterator
from importlib.metadata import version

import firedrake
import mpi4py.MPI
import numpy as np
from firedrake.adjoint import Control, ReducedFunctional, Tape, continue_annotation, pause_annotation, set_working_tape
from firedrake.petsc import PETSc
from pyop2.configuration import configuration

from prdp_fem.device import DEVICES, HOST, failure, is_built_for
from prdp_fem.solvers import LinearVariationalSolver

__all__ = ["examine"]

# How far derivatives may be from differences, relative: those of a quadratic functional are exact to rounding.
_AGREEMENT = 1e-6
_WANTED = {"OMP_NUM_THREADS": "PETSc and Firedrake run slower with more than 1",
           "SCOTCH_PTHREAD_NUMBER": "with more than 1, meshes are partitioned otherwise at each run"}


def examine() -> bool:
    """Print what there is, and whether it works. Collective.

    Returns
    -------
    bool
        Whether nothing has failed.
    """
    comm = firedrake.COMM_WORLD
    PETSc.Sys.Print(f"prdp_fem {version('prdp-fem')} with Python {platform.python_version()} on {comm.size} rank(s)")
    fine = True
    for mark, text in _findings():
        PETSc.Sys.Print(f"  {mark:8s}{text}")
        fine = fine and mark != "FAILED"
    PETSc.Sys.Print("Everything needed works." if fine else "Something does not work: see FAILED above.")
    return fine


def _findings() -> Iterator[tuple[str, str]]:
    """Marks, and what they are of."""
    yield "ok", f"Firedrake {version('firedrake')}, petsc4py {version('petsc4py')}, PETSc {'.'.join(map(str, PETSc.Sys.getVersion()))}"
    vendor, number = mpi4py.MPI.get_vendor()
    yield "ok", f"{vendor} {'.'.join(map(str, number))}"
    try:
        torch = importlib.import_module("torch")
        importlib.import_module("prdp_fem.torch")
        yield "ok", f"torch {torch.__version__}" + (", with a CUDA or HIP device" if torch.cuda.is_available() else "")
    except ImportError as error:
        yield "-", f"no SolverLayer: {error}"
    folder = configuration["cache_dir"]
    writable = os.access(folder if os.path.isdir(folder) else os.path.dirname(folder), os.W_OK)
    yield ("ok", f"compiled kernels are kept in {folder}") if writable else (
        "warning", f"compiled kernels cannot be kept in {folder}: set PYOP2_CACHE_DIR to a folder that you may write to")
    for name, why in _WANTED.items():
        if os.environ.get(name) != "1":
            yield "warning", f"{name} is not 1: {why}"
    yield _tried("solves on the host, and their derivatives", lambda: _solve(HOST))
    for device in filter(is_built_for, DEVICES.values()):
        # What is missing on one rank is used by none, as solves are collective.
        why = next(filter(None, firedrake.COMM_WORLD.allgather(failure(device))), None)
        if why is None:
            yield _tried(f"solves on {device.name}, and their derivatives", lambda device=device: _solve(device.name))
        else:
            yield "-", f"no {device.name}: {why}"
    others = [device.name for device in DEVICES.values() if not is_built_for(device)]
    if others:
        yield "-", f"no {', '.join(others)}: this PETSc was built without; docs/gpu.md says how to build one"


def _tried(what: str, check: Callable[[], str]) -> tuple[str, str]:
    try:
        return "ok", f"{what}: {check()}"
    except Exception as error:  # whatever it is, it is what the user wants to know
        if firedrake.COMM_WORLD.size > 1:
            raise  # which ends the job; other ranks would wait for this one
        return "FAILED", f"{what}: {type(error).__name__}: {error}"


def _solve(device: str) -> str:
    """A small problem, compared with what it states, and its derivative with differences."""
    tape = Tape()
    continue_annotation()
    try:
        with set_working_tape(tape):
            mesh = firedrake.UnitSquareMesh(8, 8)
            space = firedrake.FunctionSpace(mesh, "CG", 1)
            u, v = firedrake.TrialFunction(space), firedrake.TestFunction(space)
            x, y = firedrake.SpatialCoordinate(mesh)
            source, solution = firedrake.Function(space).interpolate(x + y**2), firedrake.Function(space)
            form = (firedrake.inner(firedrake.grad(u), firedrake.grad(v)) + u*v)*firedrake.dx
            problem = firedrake.LinearVariationalProblem(form, source*v*firedrake.dx, solution)
            solver = LinearVariationalSolver(problem, device=device, solver_parameters={"ksp_type": "cg", "pc_type": "jacobi",
                                                                                      "ksp_rtol": 1e-12})
            solver.solve()
            reduced = ReducedFunctional(firedrake.assemble(solution**2*firedrake.dx), Control(source))
            gradient = reduced.derivative(apply_riesz=False)
            residual = firedrake.assemble(firedrake.action(form, solution) - source*v*firedrake.dx)
            error = residual.dat.norm/firedrake.assemble(source*v*firedrake.dx).dat.norm
            direction = firedrake.Function(space).interpolate(firedrake.cos(3*x))
            with firedrake.adjoint.stop_annotating():
                steps = [reduced(firedrake.Function(space).assign(source + sign*direction)) for sign in (1, -1)]
            difference, derivative = (steps[0] - steps[1])/2, firedrake.assemble(firedrake.action(gradient, direction))
    finally:
        pause_annotation()
    if not error < _AGREEMENT:
        raise ArithmeticError(f"a solution has a relative residual of {error:.1e}")
    if not np.isclose(derivative, difference, rtol=_AGREEMENT, atol=0):
        raise ArithmeticError(f"a derivative is {derivative:.12g}, and differences give {difference:.12g}")
    return f"{solver.statistics.forward_iterations} iterations, {solver.statistics.adjoint_iterations} of adjoint solves"
