"""One thread at a time: PETSc, Firedrake and what solvers keep know nothing of others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps

from mpi4py import MPI

__all__ = ["by_one_thread", "one_thread"]

_LOCK = threading.RLock()


class _Alone:
    """A context manager that other threads must not want to enter at the same time."""

    def __enter__(self) -> None:
        if not _LOCK.acquire(blocking=False):
            raise RuntimeError(
                "two threads have come to solvers at the same time, on several ranks, which threads"
                " may reach in different orders: have one thread make all calls"
            )

    def __exit__(self, *_) -> None:
        _LOCK.release()


_ALONE = _Alone()


def one_thread(comm: MPI.Comm) -> AbstractContextManager:
    """A context manager in which other threads wait; on several ranks they are refused.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks that do together what is inside.
    """
    return _LOCK if comm.size == 1 else _ALONE


def by_one_thread(name: str) -> Callable:
    """A decorator of methods that one thread at a time comes to, see :func:`one_thread`.

    Parameters
    ----------
    name : str
        Of the attribute that is the solution map, whose ranks call the method together.
    """

    def decorate(method: Callable) -> Callable:
        @wraps(method)
        def alone(self, *args, **kwargs):
            with one_thread(getattr(self, name).comm):
                return method(self, *args, **kwargs)

        return alone

    return decorate
