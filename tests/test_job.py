"""A job ends when a rank raises, with one message that says which; every job here is a real one.

That it ends at all is what is tested: ranks that nobody ends would wait, or sleep, for longer than
a job is waited for. Nothing here depends on how fast the machine is.
"""

import subprocess

import pytest
from jobs import run_ranks

import prdp_fem.ranks.job

# Without Firedrake, whose import takes most of the time of a job as short as these.
ALONE = f"""
import importlib.util, os, signal, sys, threading, time
from mpi4py import MPI

specification = importlib.util.spec_from_file_location("job", {prdp_fem.ranks.job.__file__!r})
job = importlib.util.module_from_spec(specification)
specification.loader.exec_module(job)
job.end_together()
comm = MPI.COMM_WORLD
"""
IMPATIENT = f"{ALONE}\njob._GRACE = 0.5\n"
# Where all ranks raise nobody waits so long, however late the last one is.
PATIENT = f"{ALONE}\njob._GRACE = job._LOWER_RANK_GRACE = job._FINALISATION = 300\n"

SOLVER = """
import sys
from firedrake import *
import prdp_fem.ranks.job
from prdp_fem import IterationLadder, LinearVariationalSolver, ProgressiveRefinement

mesh = UnitSquareMesh(8, 8)
V = FunctionSpace(mesh, "CG", 1)
w, v = TrialFunction(V), TestFunction(V)
u = Function(V)
bcs = DirichletBC(V, 0, "on_boundary")
problem = LinearVariationalProblem(inner(grad(w), grad(v))*dx, v*dx, u, bcs=bcs)
options = {"refinement": ProgressiveRefinement(IterationLadder()),
           "solver_parameters": {"ksp_type": "cg", "pc_type": "jacobi"}}
"""

# As PATIENT above.
ALL_RAISE = """
job = prdp_fem.ranks.job
job._GRACE = job._LOWER_RANK_GRACE = job._FINALISATION = 300
"""
MINE = "sys.excepthook = mine = lambda kind, value, trace: sys.stdout.write(f'mine: {value}\\n')"
TRACEBACK = "Traceback (most recent call last):\n"


def tracebacks(output: str) -> int:
    return output.count("Traceback")


@pytest.mark.parametrize(
    "others",
    ["comm.barrier()", "if comm.rank: time.sleep(1000)"],
    ids=["waiting", "finished_and_computing"],
)
def test_a_rank_that_raises_ends_the_job_for_those_that_go_on(others):
    job = run_ranks(
        3, f"{IMPATIENT}\nif comm.rank == 1:\n    raise ValueError('cell 7 is inverted')\n{others}"
    )
    assert f"rank 1 of 3 raised, and ends the job:\n{TRACEBACK}" in job.output
    assert "ValueError: cell 7 is inverted" in job.output
    assert tracebacks(job.output) == 1
    assert job.status == 1


def test_of_several_ranks_that_raise_the_lowest_speaks():
    """Although it raises after the others."""
    job = run_ranks(
        3,
        f"""{ALONE}
job._GRACE = 300 if comm.rank == 2 else 0.5
if comm.rank > 0:
    time.sleep(1 - comm.rank/2)
    raise ValueError('no mesh')
comm.barrier()""",
    )
    assert f"rank 1 of 3 raised, and ends the job:\n{TRACEBACK}" in job.output
    assert tracebacks(job.output) == 1 and job.output.count("no mesh") == 1
    assert job.status == 1


def test_an_exception_on_all_ranks_is_printed_once_and_python_ends_as_always():
    """Communication that is pending does not keep it from its end."""
    job = run_ranks(
        2,
        f"""{PATIENT}
import atexit
atexit.register(lambda: print(f"rank {{comm.rank}} at exit"))
received, sent = bytearray(10**7), bytearray(10**7)
requests = [comm.Irecv(received, 1 - comm.rank, tag=1), comm.Isend(sent, 1 - comm.rank, tag=2)]
print(f"rank {{comm.rank}} before")
time.sleep(0.2*comm.rank)
raise ValueError('start must be at least 1')""",
    )
    assert f"all 2 ranks raised:\n{TRACEBACK}" in job.output
    assert tracebacks(job.output) == 1 and job.output.count("start must be at least 1") == 1
    assert "MPI_ABORT" not in job.output
    for said in ("rank 0 before", "rank 1 before", "rank 0 at exit", "rank 1 at exit"):
        assert said in job.output
    assert job.status == 1


def test_messages_that_differ_follow_the_traceback():
    """Each once, in a line that is not too long."""
    job = run_ranks(
        3,
        f"{PATIENT}\nraise ValueError('part 1: ‖u‖ > ' + 10**6*'9' + '\\nrank 1' if comm.rank else"
        " 'part 0')",
    )
    assert f"all 3 ranks raised:\n{TRACEBACK}" in job.output
    assert "ValueError: part 0\nrank 1: ValueError: part 1: ‖u‖ > 999" in job.output
    assert tracebacks(job.output) == 1 and job.output.count("part 1") == 1
    assert "MPI_ABORT" not in job.output
    assert len(job.output) < 5000
    assert job.status == 1


def test_an_error_in_petsc_on_all_ranks_is_one_error():
    """Although its text names the rank."""
    job = run_ranks(
        2,
        f"{PATIENT}\nfrom petsc4py import"
        " PETSc\nPETSc.KSP().create(PETSc.COMM_WORLD).setType('unknown')",
    )
    assert f"all 2 ranks raised:\n{TRACEBACK}" in job.output
    assert job.output.count("PETSc.Error: error code") == 1
    assert "MPI_ABORT" not in job.output
    assert job.status == 1


def test_an_end_that_hangs_is_ended():
    """PETSc waits at exit for all ranks, in a collective call that is not the one which rank 1 has
    begun.
    """
    job = run_ranks(
        2,
        f"""{PATIENT}
job._FINALISATION = 1
if comm.rank:
    request = comm.Ibarrier()
raise ValueError('in different places')""",
    )
    assert "all 2 ranks raised:" in job.output and tracebacks(job.output) == 1
    assert "Alarm clock" in job.output
    assert job.status != 0


def test_a_rank_that_is_killed_ends_the_job_with_the_message_of_mpi():
    job = run_ranks(
        2, f"{ALONE}\nif comm.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\ncomm.barrier()"
    )
    assert "rank 1" in job.output and "signal 9 (Killed)" in job.output
    assert tracebacks(job.output) == 0
    assert job.status != 0


def test_an_interrupt_of_one_rank_ends_the_job():
    job = run_ranks(
        2,
        f"{IMPATIENT}\nif comm.rank == 1:\n    os.kill(os.getpid(), signal.SIGINT)\n   "
        " time.sleep(1)\ncomm.barrier()",
    )
    assert f"rank 1 of 2 raised, and ends the job:\n{TRACEBACK}" in job.output
    assert "KeyboardInterrupt" in job.output and tracebacks(job.output) == 1
    assert job.status != 0


def test_an_interrupt_during_the_grace_leaves_the_message():
    job = run_ranks(
        2,
        f"""{PATIENT}
def interrupt():
    while True:
        frame = sys._current_frames()[threading.main_thread().ident]
        while frame is not None:
            if frame.f_code is job._messages_of_raising_ranks.__code__:
                os.kill(os.getpid(), signal.SIGINT)
                return
            frame = frame.f_back
        time.sleep(0.01)

if comm.rank == 1:
    threading.Thread(target=interrupt, daemon=True).start()
    raise ValueError('the cause')
comm.barrier()""",
    )
    assert "ValueError: the cause" in job.output and tracebacks(job.output) == 1
    assert job.status != 0


def test_a_job_without_errors_ends_as_always():
    job = run_ranks(2, f"{ALONE}\ntime.sleep(comm.rank/2)\nsys.stdout.write('done\\n')")
    assert (job.status, job.output) == (0, "done\n" * 2)


def test_an_exit_on_all_ranks_keeps_its_status():
    job = run_ranks(
        2, f"{ALONE}\nimport argparse\nargparse.ArgumentParser().parse_args(['--unknown'])"
    )
    assert job.status == 2
    assert "raised" not in job.output


def test_the_hook_of_a_program_is_called_instead():
    job = run_ranks(2, f"{ALONE}\n{MINE}\nraise ValueError('bad input')")
    assert job.output.count("mine: bad input\n") == 2
    assert "ranks raised" not in job.output and tracebacks(job.output) == 0


def test_a_hook_that_is_there_already_stays():
    job = run_ranks(
        2,
        f"import sys\n{MINE}\n{ALONE}\nassert sys.excepthook is mine\nraise ValueError('bad"
        " input')",
    )
    assert job.output.count("mine: bad input\n") == 2
    assert "ranks raised" not in job.output


def test_ranks_of_another_program_take_no_part():
    job = run_ranks(
        2,
        f"""
from mpi4py import MPI
import petsc4py
petsc4py.init(comm=MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank))
if MPI.COMM_WORLD.rank == 0:
    {ALONE.strip().replace(chr(10), chr(10) + "    ")}
    assert sys.excepthook is sys.__excepthook__""",
    )
    assert (job.status, job.output) == (0, "")


def test_a_rank_that_raises_while_others_solve():
    job = run_ranks(
        2,
        f"""{SOLVER}
if mesh.comm.rank == 1:
    raise ArithmeticError('no data')
LinearVariationalSolver(problem, **options).solve()""",
    )
    assert f"rank 1 of 2 raised, and ends the job:\n{TRACEBACK}" in job.output
    assert "ArithmeticError: no data" in job.output and tracebacks(job.output) == 1
    assert job.status == 1


def test_bad_input_to_a_solver_on_all_ranks():
    job = run_ranks(
        2,
        f"""{SOLVER}
{ALL_RAISE}
LinearVariationalSolver(problem, **options).solve()
LinearVariationalSolver(problem, **options, differentiation='explicit')""",
    )
    assert f"all 2 ranks raised:\n{TRACEBACK}" in job.output
    assert "found 'explicit'" in job.output and tracebacks(job.output) == 1
    assert "MPI_ABORT" not in job.output and "Alarm clock" not in job.output
    assert job.status == 1


def test_ranks_that_disagree_about_the_size_of_a_batch():
    """All of them raise, and none waits in the solve."""
    job = run_ranks(
        2,
        f"""{SOLVER}
{ALL_RAISE}
import torch
from prdp_fem.torch import SolverLayer
f = Function(V, name="f")
problem = LinearVariationalProblem(inner(grad(w), grad(v))*dx, f*v*dx, u, bcs=bcs)
physics = SolverLayer(LinearVariationalSolver(problem, **options), [f])
physics(torch.ones(3 + mesh.comm.rank, f.dat.data_ro.size))""",
    )
    assert f"all 2 ranks raised:\n{TRACEBACK}" in job.output
    setting = "'rtol 1e-12, max_it 1, budget True'"
    assert (
        f"must be the same on all ranks, found [{setting}, '(3,)'] on rank 0 and [{setting},"
        " '(4,)'] on rank 1" in job.output
    )
    assert tracebacks(job.output) == 1
    assert job.status == 1


def test_a_tensor_that_is_wrong_on_one_rank():
    job = run_ranks(
        2,
        f"""{SOLVER}
{ALL_RAISE}
import torch
from prdp_fem.torch import Gathering
Gathering(V).gather(torch.ones(u.dat.data_ro.size + mesh.comm.rank))""",
    )
    assert (
        "raised:" in job.output
        and "expected a last axis of" in job.output
        and tracebacks(job.output) == 1
    )
    assert "rank 1 of 2 has raised ValueError: expected a last axis of" in job.output
    assert job.status == 1


def test_a_job_that_hangs_is_ended_by_the_test():
    script = """from mpi4py import MPI
print('waits', flush=True)
if MPI.COMM_WORLD.rank:
    MPI.COMM_WORLD.recv()"""
    # A busy machine takes its time to start it.
    for timeout in (2, 8, 32, 128):
        with pytest.raises(subprocess.TimeoutExpired) as ended:
            run_ranks(2, script, timeout=timeout)
        if "waits" in ended.value.output:
            break
    assert "waits" in ended.value.output
