"""How a job of several ranks ends when a rank raises: with one message that names the rank, and
never in a hang.

Where one rank raises, the others wait for it in the next collective call for ever. PyOP2 therefore
puts a ``sys.excepthook`` in place that calls ``MPI_Abort`` on each rank that raises, at once: when
all raise the same error, as for bad input, every rank's traceback appears, interleaved, and when
one raises nothing says which it was. The hook here first lets ranks find out who else raises. They
tell each other by messages on a communicator of their own, so that no receive of the program can
take them, and wait for a short grace:

* Where all ranks raise, rank 0 prints its traceback, and Python ends on all as it does without MPI,
  with exit status 1. Of an error that says all in its message, a :class:`Refused`, it prints that
  and no traceback.
* Where some raise, the lowest of them prints its traceback and ends the job by ``MPI_Abort``.

The first import of prdp_fem's solvers puts the hook in PyOP2's place, on several ranks only. A
``sys.excepthook`` of the program's own is left alone. ``sys.exit`` reaches no hook in Python: on
one rank only it lets the job hang, and an exception is to be raised there instead. A rank that is
killed cannot say so; ``mpiexec`` does, and ends the others.
"""

from __future__ import annotations

import functools
import signal
import sys
import time
import traceback
from collections.abc import Callable

from mpi4py import MPI

__all__ = ["Refused", "end_together", "say_refusals"]

# Seconds from a rank's exception until it ends the job, or leaves that to a lower rank which has
# raised later.
_GRACE = 2.0
_LOWER_RANK_GRACE = 5 * _GRACE
# Seconds that the program's atexit functions, PETSc and MPI may take together where all ranks have
# raised.
_FINALISATION = 10
# Short messages are sent whether or not they are received: a rank that waits in a collective call
# receives none.
_MESSAGE_LENGTH = 500


class Refused(OSError, ValueError):
    """What is said, in one sentence, to who runs a program: what is wrong and what to do."""


def say_refusals() -> None:
    """Have a run end without a traceback where it refuses, or a serial one is interrupted.

    Collective on ``COMM_WORLD``.
    """
    if MPI.COMM_WORLD.size == 1:
        sys.excepthook = functools.partial(_say, sys.excepthook)
    else:
        end_together()


def _say(show: Callable, kind, value, trace) -> None:
    if issubclass(kind, Refused):
        print(value, file=sys.stderr)
    elif issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        show(kind, value, trace)


def end_together() -> None:
    """Let a rank's exception end the job, with one message: put a ``sys.excepthook`` in the place
    of PyOP2's or of Python's own.

    Collective on ``COMM_WORLD``, as importing Firedrake is. Nothing is done in a serial run, and
    where Firedrake runs on a part of ``COMM_WORLD`` only: the ranks of another program take no part
    in this.
    """
    # Not above: Firedrake initialises PETSc with the options on the command line, where nobody has
    # done so before.
    from petsc4py import PETSc

    if not 1 < PETSc.COMM_WORLD.size == MPI.COMM_WORLD.size:
        return
    # Before the look at the hook, which can be a different one on each rank.
    comm = MPI.COMM_WORLD.Dup()
    comm.Set_name("prdp_fem.job")
    pyop2 = sys.modules.get("pyop2.mpi")
    if pyop2 is not None and sys.excepthook is getattr(pyop2, "mpi_excepthook", None):
        show = pyop2.except_hook
    elif sys.excepthook is sys.__excepthook__:
        show = sys.__excepthook__
    else:
        return
    sys.excepthook = functools.partial(_end, comm, show)


def _end(comm: MPI.Comm, show: Callable, kind, value, trace) -> None:
    """End the job because of this rank's exception, which ``show`` prints."""
    if MPI.Is_finalized():
        show(kind, value, trace)
        return
    all_raised = False
    try:
        # What the program has printed comes before the message.
        sys.stdout.flush()
        # One line: PETSc's errors go on with lines that begin with the rank, and are the same error
        # all the same.
        message = (
            "".join(traceback.format_exception_only(kind, value))
            .strip()
            .splitlines()[0][:_MESSAGE_LENGTH]
        )
        messages = _messages_of_raising_ranks(comm, message)
        all_raised = len(messages) == comm.size
        if comm.rank == min(messages):
            if not all_raised:
                print(f"rank {comm.rank} of {comm.size} raised, and ends the job:", file=sys.stderr)
            elif not issubclass(kind, Refused):
                print(f"all {comm.size} ranks raised:", file=sys.stderr)
            if all_raised or issubclass(kind, Refused):
                _say(show, kind, value, trace)
            else:
                show(kind, value, trace)
            said = {message}
            for rank, other in sorted(messages.items()):
                if other not in said:
                    said.add(other)
                    print(f"rank {rank}: {other}", file=sys.stderr)
        sys.stderr.flush()
    except BaseException:
        # Such as Ctrl-C during the grace, or a failure of ``show``.
        sys.__excepthook__(kind, value, trace)
    finally:
        # Whatever has happened above: where this rank alone came to its end, the others would wait
        # for it.
        if all_raised:
            _limit_finalisation()
        else:
            MPI.COMM_WORLD.Abort(1)


def _messages_of_raising_ranks(comm: MPI.Comm, message: str) -> dict[int, str]:
    """What the ranks that have raised say, this one too, after the grace or once all have."""
    messages = {comm.rank: message}
    sends = [comm.isend(message, dest=rank) for rank in range(comm.size) if rank != comm.rank]
    status = MPI.Status()
    start = time.monotonic()
    while True:
        while comm.iprobe():
            messages[status.source] = comm.recv(status=status)
        # A message that is on its way when its sender ends may be lost.
        if len(messages) == comm.size and MPI.Request.testall(sends)[0]:
            return messages
        if time.monotonic() - start > (_GRACE if comm.rank == min(messages) else _LOWER_RANK_GRACE):
            return messages
        time.sleep(0.01)


def _limit_finalisation() -> None:
    """Let the operating system end this rank where its end takes long.

    PETSc and PyOP2 free objects collectively at exit, and ranks that have raised in different
    places can have different objects. By then no Python code runs that could call ``MPI_Abort``.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_FINALISATION)
