"""Whether what the package stands on can be imported, one by one, whatever happens to it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass

__all__ = ["NEEDED", "Import", "has_launcher", "look", "look_apart"]

# Modules, and the distributions that have them; each needs none but those before it.
_MODULES = {
    "numpy": "numpy",
    "mpi4py.MPI": "mpi4py",
    "petsc4py.PETSc": "petsc4py",
    "h5py": "h5py",
    "firedrake": "firedrake",
    "prdp_fem": "prdp-fem",
    "torch": "torch",
    "prdp_fem.torch": "prdp-fem",
    "matplotlib.pyplot": "matplotlib",
}
NEEDED = frozenset({"numpy", "mpi4py.MPI", "petsc4py.PETSc", "h5py", "firedrake", "prdp_fem"})
_LAUNCHERS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "PMI_SIZE")
_SECONDS = 300  # after which an import is said to hang
_SCRIPT = """
import json
from dataclasses import asdict
from prdp_fem_installation.imports import _attempt
for module in {modules}:
    result = json.dumps(asdict(_attempt(module)))
    with open({results!r}, "a") as file:
        print(result, file=file)
"""


@dataclass(frozen=True)
class Import:
    """What came of importing a module.

    Attributes
    ----------
    module : str
    error : str
        What went wrong; empty where nothing did.
    is_absent : bool
        Whether it is not installed at all.
    """

    module: str
    error: str = ""
    is_absent: bool = False

    @property
    def mark(self) -> str:
        if not self.error:
            return "ok"
        return "-" if self.is_absent and self.module not in NEEDED else "FAILED"

    def __str__(self) -> str:
        name = _MODULES[self.module]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "of unknown version"
        if self.is_absent:
            return f"{self.module} is not installed"
        failure = f" cannot be imported: {self.error}" if self.error else ""
        return f"{self.module} ({name} {version}){failure}"


def has_launcher() -> bool:
    """Whether this process is one of the ranks that mpiexec or srun has started."""
    return any(name in os.environ for name in _LAUNCHERS)


def _attempt(module: str) -> Import:
    try:
        importlib.import_module(module)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit
        message = next((line for line in str(error).splitlines() if line.strip()), "")
        # Of a broken package some other module can be missing.
        own = (module, module.partition(".")[0])
        absent = isinstance(error, ModuleNotFoundError) and error.name in own
        return Import(module, f"{type(error).__name__}: {message}".rstrip(": "), absent)
    return Import(module)


def look() -> list[Import]:
    """Import all here, and say what came of it. What kills the process can't be said."""
    return _causes([_attempt(module) for module in _MODULES])


def look_apart() -> list[Import]:
    """Import all in another process, and say what came of it, also where that process has died."""
    found, left = [], list(_MODULES)
    # As this process has it, where the folder of its script stands for the current one.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    while left:
        with tempfile.NamedTemporaryFile("r") as results:
            # Not on its stdout, where modules may write what they like.
            script = _SCRIPT.format(modules=left, results=results.name)
            try:
                ended = subprocess.run(
                    [sys.executable, "-P", "-c", script],
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    timeout=_SECONDS,
                )
                status, said = ended.returncode, ended.stderr
                how = f"exit status {status}" if status >= 0 else f"signal {-status}"
            except subprocess.TimeoutExpired as error:
                how, said = f"no end within {_SECONDS} s", error.stderr or b""
            done = [Import(**json.loads(line)) for line in results]
        found += done
        left = left[len(done) :]
        if left:
            lines = [line.strip() for line in said.decode(errors="replace").splitlines()]
            last = next((line for line in reversed(lines) if line.strip("-* ")), "it said nothing")
            found.append(Import(left.pop(0), f"it ends the process ({how}): {last}"))
    return _causes(found)


def _causes(found: list[Import]) -> list[Import]:
    """Without the bridge to torch, where torch is what is missing."""
    failed = {one.module for one in found if one.error}
    return [one for one in found if one.module != "prdp_fem.torch" or "torch" not in failed]
