"""Files of results.

Each is whole or not there, none is replaced without a word, and one process at a time writes those
of a study.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from matplotlib.figure import Figure
from petsc4py import PETSc

from prdp_fem.ranks.job import Refused

__all__ = ["alone", "put_aside", "save_figure", "say", "stamp", "write"]


def say(message: str) -> None:
    """Print something, on the rank that has to do with files."""
    PETSc.Sys.Print(message, comm=PETSc.COMM_SELF)


def write(path: Path, content: str | bytes) -> None:
    """Put something into a file, whole or not at all. A folder that has gone is made again.

    Raises
    ------
    Refused
        Where it cannot be written; what was there before is still there then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(handle)  # some file systems find out here that there is no space
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        is_file = path.parent.exists() and not path.parent.is_dir()
        problem = f"{path.parent} is not a folder" if is_file else error.strerror
        raise Refused(f"{path} cannot be written: {problem}") from None


def save_figure(figure: Figure, path: Path, *, dpi: float = 110) -> None:
    """Draw a figure into a PNG file, see :func:`write`.

    Where it takes the place of another one, this says so.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=dpi)
    is_other = path.is_file() and path.read_bytes() != picture.getvalue()
    write(path, picture.getvalue())
    if is_other:
        say(f"{path} was there already, and is replaced")


def put_aside(path: Path) -> None:
    """Give what is in the place of a file a name with the first number that is free, and say so."""
    kept = next(
        kept
        for number in itertools.count(1)
        if not os.path.lexists(kept := path.with_name(f"{path.name}.{number}"))
    )
    try:
        path.rename(kept)
    except OSError as error:
        raise Refused(f"{path} is there, and cannot be renamed: {error.strerror}") from None
    say(f"{path} was there already, and is kept as {kept.name}")


def stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from another one in its place, and from itself before it was written to.

    None where there is none.
    """
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Hold a lock: a file, which is there meanwhile.

    The operating system gives back the lock of a process that dies. Where the file system has no
    locks, this says so and goes on.

    Raises
    ------
    Refused
        Where another process holds it, or where the file cannot be written.
    """
    try:
        file = _locked(path)
    except Refused:
        raise
    except OSError as error:
        raise Refused(f"{path} cannot be written: {error.strerror}") from None
    with file:
        try:
            yield
        finally:
            if _is_at(file, path):
                # A file that no process locks is in nobody's way.
                with contextlib.suppress(OSError):
                    path.unlink()


def _locked(path: Path) -> IO[str]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise Refused(
                f"another run ({file.read()}) puts the same results into {path.parent}: "
                "wait for its end, or choose another --output"
            ) from None
        except OSError as error:
            say(
                f"{path.parent} has no locks ({error.strerror}): no other run must put the same "
                "results into it"
            )
        if _is_at(file, path):
            break
        file.close()  # who had it before has just removed it
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
