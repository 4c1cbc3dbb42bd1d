"""What ``prdp-fem doctor`` looks at: whether an installation works, and what it has."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import firedrake
import mpi4py.MPI
import numpy as np
import petsctools
from firedrake.adjoint import (
    Control,
    ReducedFunctional,
    Tape,
    continue_annotation,
    pause_annotation,
    set_working_tape,
)
from firedrake.petsc import PETSc
from pyop2.configuration import configuration

from prdp_fem.memory.devices import DEVICES, HOST, failure, is_built_for
from prdp_fem.ranks.agreement import from_first_rank
from prdp_fem.solvers import LinearVariationalSolver
from prdp_fem_installation.imports import Import, look
from prdp_fem_installation.openblas import candidates, processor

__all__ = ["examine"]

# How far derivatives may be from differences, relative: those of a quadratic functional are exact
# to rounding.
_AGREEMENT = 1e-6
# Bytes: a cache line and the largest registers; what PETSc aligns to unasked; a number, at whose
# multiples the rows of an array begin.
_CACHE_LINE = 64
_USUAL_ALIGNMENT = 16
_NUMBER = 8
_WANTED = {
    "OMP_NUM_THREADS": "PETSc and Firedrake run slower with more than 1",
    "SCOTCH_PTHREAD_NUMBER": "with more than 1, meshes are partitioned otherwise at each run",
}


def examine(failed: Sequence[Import] | None = None) -> bool:
    """Print what there is, and whether it works. Collective.

    Parameters
    ----------
    failed : sequence of Import, optional
        Modules that could not be imported on this rank, none of them needed here, which are not
        tried again. By default all are tried.

    Returns
    -------
    bool
        Whether nothing has failed.
    """
    comm = firedrake.COMM_WORLD
    if failed is None:
        failed = [found for found in look() if found.error]
    PETSc.Sys.Print(
        f"prdp_fem {version('prdp-fem')} with Python {platform.python_version()} on {comm.size}"
        " rank(s)"
    )
    fine = True
    for mark, text in _findings(comm, failed):
        PETSc.Sys.Print(f"  {mark:8s}{text}")
        fine = fine and mark != "FAILED"
    PETSc.Sys.Print(
        "Everything needed works." if fine else "Something does not work: see FAILED above."
    )
    return fine


def _findings(comm, failed: Sequence[Import]) -> Iterator[tuple[str, str]]:
    """Marks, and what they are of."""
    yield from _of_packages(comm, failed)
    yield from _said_once(comm, list(_of_blas()))
    yield from _of_settings()
    damaged = from_first_rank(comm, _damaged_kernels)
    if not damaged:
        yield from _of_solves()
        return
    yield (
        "FAILED",
        f"{len(damaged)} compiled kernels are damaged, such as {damaged[0]}: remove them, or all by"
        " firedrake-clean, and they are compiled again",
    )
    yield "-", "nothing is solved, as a damaged kernel can end the process"


def _of_packages(comm, failed: Sequence[Import]) -> Iterator[tuple[str, str]]:
    """Versions of what the package stands on, and what of it cannot be imported."""
    petsc = ".".join(map(str, PETSc.Sys.getVersion()))
    yield (
        "ok",
        f"Firedrake {version('firedrake')}, petsc4py {version('petsc4py')}, PETSc {petsc}",
    )
    vendor, number = mpi4py.MPI.get_vendor()
    yield "ok", f"{vendor} {'.'.join(map(str, number))}"
    unusable = _said_once(comm, [(found.mark, str(found)) for found in failed])
    yield from unusable
    if any("torch" in text.split()[0] for _, text in unusable):
        return
    torch = importlib.import_module("torch")
    device = ", with a CUDA or HIP device" if torch.cuda.is_available() else ""
    yield "ok", f"torch {torch.__version__}{device}"


def _of_settings() -> Iterator[tuple[str, str]]:
    """What is around the process: where kernels are kept, and variables that are wanted."""
    folder = configuration["cache_dir"]
    if os.access(folder if os.path.isdir(folder) else os.path.dirname(folder), os.W_OK):
        yield "ok", f"compiled kernels are kept in {folder}"
    else:
        yield (
            "warning",
            f"compiled kernels cannot be kept in {folder}: set PYOP2_CACHE_DIR to a folder that you"
            " may write to",
        )
    for name, why in _WANTED.items():
        if os.environ.get(name) != "1":
            yield "warning", f"{name} is not 1: {why}"


def _of_solves() -> Iterator[tuple[str, str]]:
    """Whether solves work, on the host and on each kind of device that PETSc was built for."""
    yield _tried("solves on the host, and their derivatives", lambda: _solve(HOST))
    for device in filter(is_built_for, DEVICES.values()):
        # What is missing on one rank is used by none, as solves are collective.
        missing = next(filter(None, firedrake.COMM_WORLD.allgather(failure(device))), None)
        if missing is None:
            yield _tried(
                f"solves on {device.name}, and their derivatives", partial(_solve, device.name)
            )
        else:
            yield "-", f"no {device.name}: {missing}"
    others = [device.name for device in DEVICES.values() if not is_built_for(device)]
    if others:
        yield (
            "-",
            f"no {', '.join(others)}: this PETSc was built without; docs/gpu.md says how to build"
            " one",
        )


def _said_once(comm, findings: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """What ranks have found: all that rank 0 has, and what others have that it has not."""
    everywhere = comm.allgather(findings)
    said = list(everywhere[0])
    for rank, others in enumerate(everywhere[1:], start=1):
        said += [
            (mark, f"{text} (on rank {rank})")
            for mark, text in others
            if (mark, text) not in everywhere[0]
        ]
    return said


def _of_blas() -> Iterator[tuple[str, str]]:
    """Which kernels the BLAS of PETSc has, and what they mean for the bits of sums."""
    core = _corename(ctypes.CDLL(PETSc.__spec__.origin))
    name = f"OpenBLAS with kernels for {core}" if core else "a BLAS other than OpenBLAS"
    better = candidates(core, *processor()) if core else []
    if better:
        yield (
            "warning",
            f"OpenBLAS takes this processor for a {core}, and does without much of what it has: "
            f"activate the environment that install.sh makes, or set OPENBLAS_CORETYPE={better[0]}",
        )
    alignment = int(petsctools.get_petscconf_h().get("MEMALIGN", _USUAL_ALIGNMENT))
    memory = f"PETSc's memory is aligned to {alignment} bytes"
    if not _sums_differ(_NUMBER):
        yield "ok", f"{name}, whose sums do not depend on where an array lies in memory; {memory}"
        return
    finding = f"{name}, whose sums depend on where an array lies in memory; {memory}"
    if not _sums_differ(alignment):
        yield "ok", f"{finding}, where they are the same each time"
    else:
        yield (
            "warning",
            f"{finding}, which is too little: equal inputs can give results that differ in the "
            f"last bits; set OPENBLAS_CORETYPE, or build PETSc --with-memalign={_CACHE_LINE}",
        )


def _corename(library: ctypes.CDLL) -> str | None:
    """What the OpenBLAS that a library is linked with calls its kernels; None for another BLAS."""
    for suffix in ("", "64_", "_64"):
        try:
            function = getattr(library, f"openblas_get_corename{suffix}")
        except AttributeError:
            continue
        function.restype = ctypes.c_char_p
        return function().decode()
    return None


def _sums_differ(step: int) -> bool:
    """Whether PETSc's sums of the same numbers differ with their place, in steps of some bytes."""
    generator = np.random.default_rng(1)
    for size in (100, 1001):
        x, y = generator.standard_normal((2, size))
        found = set()
        for offset in range(0, _CACHE_LINE, step):
            with _placed(x, offset) as first, _placed(y, 0) as second, _placed(y, offset) as third:
                found |= {(first.dot(other), first.norm()) for other in (second, third)}
        if len(found) > 1:
            return True
    return False


@contextmanager
def _placed(values: np.ndarray, offset: int) -> Iterator[PETSc.Vec]:
    """A vector of these values, so many bytes after the beginning of a cache line."""
    room = np.zeros(values.nbytes + 2 * _CACHE_LINE, dtype=np.uint8)
    start = -room.ctypes.data % _CACHE_LINE + offset
    array = room[start : start + values.nbytes].view(values.dtype)
    array[:] = values
    vector = PETSc.Vec().createWithArray(array, comm=PETSc.COMM_SELF)
    try:
        yield vector
    finally:
        vector.destroy()


def _damaged_kernels() -> list[str]:
    """Compiled kernels in the caches that are empty or end too early, as on a full disk."""
    caches = {configuration["cache_dir"]}
    if "FIREDRAKE_TSFC_KERNEL_CACHE_DIR" in os.environ:
        caches.add(os.environ["FIREDRAKE_TSFC_KERNEL_CACHE_DIR"])
    damaged = []
    for cache in sorted(caches):
        for path in Path(cache).glob("??/*"):
            try:
                is_whole = _WHOLE.get(path.suffix)
                if is_whole is not None and not is_whole(path):
                    damaged.append(str(path))
            except FileNotFoundError:
                pass  # removed meanwhile
    return sorted(damaged)


def _is_whole_library(path: Path) -> bool:
    """Whether a shared library has its last part, which in ELF is the table of sections."""
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:4] != b"\x7fELF":
            # Of another format, as other systems have: nothing is known but that it is not empty.
            return bool(head.strip(b"\0"))
        if len(head) < 64 or head[4] != 2:
            return len(head) == 64
        order = "<" if head[5] == 1 else ">"
        (offset,) = struct.unpack_from(f"{order}Q", head, 40)
        size, count = struct.unpack_from(f"{order}HH", head, 58)
        return os.fstat(file.fileno()).st_size >= offset + size * count


def _is_whole_pickle(path: Path) -> bool:
    """Whether a pickle has its end: a full stop."""
    with open(path, "rb") as file:
        if file.read(1) != b"\x80":
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"."


_WHOLE = {".so": _is_whole_library, ".pickle": _is_whole_pickle}


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
            source = firedrake.Function(space).interpolate(x + y**2)
            solution = firedrake.Function(space)
            form = (firedrake.inner(firedrake.grad(u), firedrake.grad(v)) + u * v) * firedrake.dx
            problem = firedrake.LinearVariationalProblem(form, source * v * firedrake.dx, solution)
            solver = LinearVariationalSolver(
                problem,
                device=device,
                solver_parameters={"ksp_type": "cg", "pc_type": "jacobi", "ksp_rtol": 1e-12},
            )
            solver.solve()
            reduced = ReducedFunctional(
                firedrake.assemble(solution**2 * firedrake.dx), Control(source)
            )
            gradient = reduced.derivative(apply_riesz=False)
            residual = firedrake.assemble(
                firedrake.action(form, solution) - source * v * firedrake.dx
            )
            error = residual.dat.norm / firedrake.assemble(source * v * firedrake.dx).dat.norm
            direction = firedrake.Function(space).interpolate(firedrake.cos(3 * x))
            with firedrake.adjoint.stop_annotating():
                steps = [
                    reduced(firedrake.Function(space).assign(source + sign * direction))
                    for sign in (1, -1)
                ]
            difference = (steps[0] - steps[1]) / 2
            derivative = firedrake.assemble(firedrake.action(gradient, direction))
    finally:
        pause_annotation()
    if not error < _AGREEMENT:
        raise ArithmeticError(f"a solution has a relative residual of {error:.1e}")
    if not np.isclose(derivative, difference, rtol=_AGREEMENT, atol=0):
        raise ArithmeticError(
            f"a derivative is {derivative:.12g}, and differences give {difference:.12g}"
        )
    return (
        f"{solver.statistics.forward_iterations} iterations, {solver.statistics.adjoint_iterations}"
        " of adjoint solves"
    )
