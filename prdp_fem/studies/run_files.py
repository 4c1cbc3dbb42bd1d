"""The files of a study's runs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prdp_fem.ranks.job import Refused
from prdp_fem.studies.files import put_aside, say, stamp
from prdp_fem.studies.runs import Run
from prdp_fem.studies.schedules import Schedule

__all__ = ["RunFiles"]


class RunFiles:
    """Which runs are taken from files, which files are replaced, and which are kept aside.

    One rank has to do with them.

    Parameters
    ----------
    folder : Path
    study : str
        Its name.
    setup : dict
        What is trained, and how; runs under another one are not mixed in.
    """

    def __init__(self, folder: Path, study: str, setup: dict[str, Any]):
        self._folder = folder
        self._study = study
        self._setup = setup
        # Files of this study, as they were before and as it has written them.
        self._replaceable: dict[Path, Any] = {}
        self._own: dict[Path, Any] = {}

    def taken(
        self, wanted: Iterable[tuple[Schedule, int]], *, resume: bool
    ) -> dict[tuple[Schedule, int], Run]:
        """Runs that are taken from their files.

        Of others that are there it is said what will become of them.

        Parameters
        ----------
        wanted : iterable of pairs of Schedule and int
            Schedules and seeds.
        resume : bool
            Whether runs of the same set-up are taken, and not made again.

        Raises
        ------
        Refused
            Where a file that is to be resumed from was made with another set-up, or holds no run.
        """
        taken = {}
        for schedule, seed in wanted:
            path = self._path(schedule, seed)
            if not os.path.lexists(path):
                continue
            try:
                run = Run.read(path)
            except Refused as error:
                if resume:
                    raise Refused(
                        f"{error}: remove it, choose another --output, or leave --resume away to "
                        "run again"
                    ) from None
                say(f"{error}, and will be kept under another name")
                continue
            differing = self._differing(run, schedule, seed)
            if resume and differing:
                raise Refused(
                    f"{path} was made with another set-up ({differing}): choose another --output, "
                    "or leave --resume away to run again"
                )
            if resume:
                taken[schedule, seed] = run
            elif differing:
                say(
                    f"{path} is there already, of another set-up ({differing}), and will be kept "
                    "under another name"
                )
            else:
                say(f"{path} is there already, of the same set-up, and will be replaced")
                self._replaceable[path] = stamp(path)
        return taken

    def write(self, trained: Mapping[tuple[Schedule, int], Run]) -> str | None:
        """Put runs into their files, where they are not in them already.

        What somebody else has put there is kept. Returns what has kept a run from being written.
        """
        problem = None
        for (schedule, seed), run in trained.items():
            path = self._path(schedule, seed)
            there = stamp(path)
            if there is not None and there == self._own.get(path):
                continue
            try:
                if os.path.lexists(path) and there != self._replaceable.get(path):
                    put_aside(path)
                run.write(path)
                self._own[path] = stamp(path)
            except Refused as error:
                problem = str(error)
        return problem

    def _path(self, schedule: Schedule, seed: int) -> Path:
        return self._folder / Run.file_name(self._study, schedule, seed)

    def _differing(self, run: Run, schedule: Schedule, seed: int) -> str:
        """What tells a run from the one of this study, empty where nothing does."""
        there = {"study": run.study, "schedule": run.schedule, "seed": run.seed, **run.setup}
        here = {"study": self._study, "schedule": schedule.name, "seed": seed, **self._setup}
        keys = sorted(there.keys() | here.keys())
        return "; ".join(
            f"{key}: {there.get(key)} there, {here.get(key)} here"
            for key in keys
            if there.get(key) != here.get(key)
        )
