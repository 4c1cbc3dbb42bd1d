"""What each solve is done inside: its time, its place in PETSc's log, what becomes of errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from firedrake.petsc import PETSc
from pyadjoint.tape import stop_annotating

from prdp_fem.freshness import Kept
from prdp_fem.krylov.ksp import in_a_sentence
from prdp_fem.statistics import Statistics

__all__ = ["Work"]


class Work:
    """A context manager of what each solve enters: assemblies inside stay off pyadjoint's tape.

    It is plain, since a small solve takes no longer than a few generators.

    Parameters
    ----------
    kind : str
        ``"forward"``, ``"adjoint"`` or ``"tangent"``.
    name : str
        Of what is solved for, for messages.
    statistics : Statistics
        Where the seconds are counted.
    spoil : callable
        Told of each error, which may have left something half-way.
    around : Kept
        Makes a context manager that is entered, too; its value is None for nothing.
    """

    def __init__(
        self,
        kind: str,
        name: str,
        statistics: Statistics,
        spoil: Callable[[BaseException], None],
        around: Kept[Callable[[], AbstractContextManager] | None],
    ):
        self._kind = kind
        self._name = name
        self._event = _EVENTS[kind]
        self._statistics = statistics
        self._spoil = spoil
        self._around = around
        self._entered: AbstractContextManager | None = None

    def __enter__(self) -> None:
        self._start = time.perf_counter()
        _ANNOTATION.__enter__()
        self._event.begin()
        self._entered = None
        try:
            around = self._around.value
            if around is not None:
                entered = around()
                entered.__enter__()
                self._entered = entered
        except BaseException as error:  # an interrupt, too, leaves PETSc's objects half-way
            self._leave()
            self._spoil(error)
            raise

    def __exit__(self, kind: type | None, error: BaseException | None, traceback) -> None:
        try:
            if self._entered is not None:
                self._entered.__exit__(kind, error, traceback)
        finally:
            self._leave()
            if error is not None:
                self._spoil(error)
        if isinstance(error, PETSc.Error):
            said = in_a_sentence(error, f"the {self._kind} solve for '{self._name}' came to no end")
            raise said from said.__cause__

    def _leave(self) -> None:
        self._event.end()
        _ANNOTATION.__exit__()
        vars(self._statistics)[_SECONDS[self._kind]] += time.perf_counter() - self._start


_ANNOTATION = stop_annotating()
_KINDS = ("forward", "adjoint", "tangent")
_EVENTS = {kind: PETSc.Log.Event(f"PRDP{kind.capitalize()}") for kind in _KINDS}
_SECONDS = {kind: f"{kind}_seconds" for kind in _KINDS}
