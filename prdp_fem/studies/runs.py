"""One training run, and its file."""

from __future__ import annotations

import contextlib
import json
import platform
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from firedrake import Ensemble

from prdp_fem.history import History
from prdp_fem.ranks.job import Refused
from prdp_fem.studies.files import write
from prdp_fem.studies.schedules import Schedule

__all__ = ["LAST_EPOCHS", "Run", "Runs", "Spent", "machine"]

# The error of a run is that of its last epochs, which a single one does not decide.
LAST_EPOCHS = 10


@dataclass(frozen=True)
class Spent:
    """What a run has taken so far.

    Attributes
    ----------
    iterations : int
        Of the Krylov method, forward and adjoint.
    solver_seconds, seconds : float
        In the solvers, and in all.
    """

    iterations: int
    solver_seconds: float
    seconds: float


@dataclass
class Run:
    """A training run, and all that is needed to compare it.

    Attributes
    ----------
    study : str
        Name of the study.
    schedule : str
        Name of the schedule, see :class:`~prdp_fem.studies.schedules.Schedule`.
    seed : int
    history : History
    setup : dict
        What was trained and how: runs are compared only where these are equal.
    extras : dict
        What the study wants to keep beside, as plain numbers and lists. Where the refinement is
        told something else than what is judged in the end, ``"errors"`` are the relative errors at
        each outer iteration. ``"labels"`` may say what figures call them (``"errors"``), and what
        an outer iteration is (``"outer"``).
    machine : dict
        Where it ran, and with which versions.
    """

    study: str
    schedule: str
    seed: int
    history: History
    setup: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> np.ndarray:
        """The relative error at each epoch: what the study has kept as such, or the root of the
        metric, which is a relative mean square.
        """
        if "errors" in self.extras:
            return np.asarray(self.extras["errors"])
        return np.sqrt(self.history.metric)

    @property
    def error(self) -> float:
        """The mean of the errors over the last ten epochs, through the physics of the moment."""
        return float(self.errors[-LAST_EPOCHS:].mean())

    @property
    def error_in_use(self) -> float | None:
        """The mean, over the checkpoints of the last ten epochs, of the error in use; None where
        that was not assessed.
        """
        return self._at_last(self.history.in_use)

    @property
    def error_converged(self) -> float | None:
        """The same with converged physics."""
        return self._at_last(self.history.converged)

    def _at_last(self, assessed: list[list]) -> float | None:
        first = len(self.history) - LAST_EPOCHS
        errors = [error for epoch, error in assessed if epoch > first]
        return float(np.mean(errors)) if errors else None

    @property
    def judged(self) -> float:
        """The error that schedules are judged by: in use, where that was assessed."""
        in_use = self.error_in_use
        return self.error if in_use is None else in_use

    @property
    def warnings(self) -> list[str]:
        """What was said of the run."""
        return self.history.warnings

    def until_accurate(self, error: float) -> Spent | None:
        """What was spent until the error in use first was no larger than a value.

        None where it never was, or was not assessed.
        """
        for epoch, found in self.history.in_use:
            if found <= error:
                history = self.history
                return Spent(
                    history.iterations[epoch - 1],
                    history.solver_seconds[epoch - 1],
                    history.seconds[epoch - 1],
                )
        return None

    @property
    def iterations(self) -> int:
        """KSP iterations, forward and adjoint, of training and validation."""
        return self.history.iterations[-1]

    def iterations_until(self, error: float) -> int | None:
        """KSP iterations after which the error stays at or below a value; None if it does not."""
        above = np.flatnonzero(self.errors > error)
        first = above[-1] + 1 if len(above) else 0
        return self.history.iterations[first] if first < len(self.history) else None

    @property
    def solver_seconds(self) -> float:
        """Wall-clock time in the solvers, forward and adjoint, of training and validation."""
        return self.history.solver_seconds[-1]

    @property
    def seconds(self) -> float:
        """Wall-clock time from the first batch to the last validation."""
        return self.history.seconds[-1]

    @staticmethod
    def file_name(study: str, schedule: Schedule, seed: int) -> str:
        """Of the run's file: one for each study, schedule and seed."""
        return f"{study}-{schedule.name.replace(':', '-')}-seed{seed}.json"

    def write(self, path: Path) -> None:
        """Put the run into a file, see :func:`prdp_fem.studies.files.write`.

        Raises
        ------
        Refused
            Where it cannot be written, or has something that JSON does not take.
        """
        try:
            # as they are read again
            plain = {**asdict(self), "warnings": self.warnings}
            entries = json.loads(json.dumps(plain, default=_plain))
        except (TypeError, ValueError, RecursionError) as error:
            raise Refused(
                f"{path} cannot be written: what is to be kept must be plain numbers, "
                f"strings and lists ({error})"
            ) from None
        entries["checksum"] = _checksum(entries)
        write(path, json.dumps(entries, separators=(",", ":")) + "\n")

    @classmethod
    def read(cls, path: Path) -> Run:
        """The run in a file.

        Raises
        ------
        Refused
            Where the file cannot be read, or holds something else.
        """
        try:
            return cls._from_plain(json.loads(path.read_bytes()))
        except OSError as error:
            raise Refused(f"{path} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path} does not hold a run of a study ({error})") from None

    @classmethod
    def _from_plain(cls, entries) -> Run:
        """The run of which ``write`` has made JSON; a ValueError where it was none."""
        kinds = {
            "study": str,
            "schedule": str,
            "seed": int,
            "history": dict,
            "setup": dict,
            "extras": dict,
            "machine": dict,
        }
        # Beside, files have a checksum, and again what the history has of warnings.
        beside = {"checksum", "warnings"}
        if type(entries) is not dict or entries.keys() - beside != kinds.keys():
            raise ValueError(f"a run has {', '.join(kinds)}")
        entries.pop("warnings", None)
        # Files of earlier versions have none.
        if entries.pop("checksum", checksum := _checksum(entries)) != checksum:
            raise ValueError("its history or extras have been changed since it was written")
        if wrong := [name for name, kind in kinds.items() if type(entries[name]) is not kind]:
            raise ValueError(f"{wrong[0]} cannot be {str(entries[wrong[0]])[:40]!r}")
        Schedule.from_text(entries["schedule"])
        run = cls(**{**entries, "history": History.from_plain(entries["history"])})
        errors = run.extras.get("errors", run.history.metric)
        if (
            type(errors) is not list
            or len(errors) != len(run.history)
            or not all(type(error) in (int, float) for error in errors)
        ):
            raise ValueError("errors must be numbers, one for each outer iteration")
        labels = run.extras.get("labels", {})
        if type(labels) is not dict or not all(type(label) is str for label in labels.values()):
            raise ValueError("labels must be texts by name")
        for name, kind in (("processor", str), ("ranks", int), ("members", int)):
            if type(run.machine.get(name, kind())) is not kind:
                raise ValueError(f"{name} of the machine cannot be {str(run.machine[name])[:40]!r}")
        return run


def _plain(value):
    """NumPy's numbers and arrays as those that JSON takes; they are the same on the way back."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _checksum(entries: dict[str, Any]) -> int:
    """Of what a run has found, to which nobody has anything to add."""
    return zlib.crc32(json.dumps([entries["history"], entries["extras"]]).encode())


Runs = Mapping[Schedule, Mapping[int, Run]]  # by schedule and seed


def machine(ensemble: Ensemble) -> dict[str, Any]:
    """Processor, ranks, how many groups share samples out, and versions of what is installed."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.is_file():
        models = [
            line.partition(":")[2].strip()
            for line in information.read_text().splitlines()
            if line.startswith("model name")
        ]
        processor = models[0] if models else processor
    versions = {}
    for name in ("prdp-fem", "firedrake", "petsc4py", "torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):  # torch: inverse problems do without
            versions[name] = version(name)
    return {
        "processor": processor,
        "ranks": ensemble.global_comm.size,
        "members": ensemble.ensemble_size,
        "python": platform.python_version(),
        **versions,
    }
