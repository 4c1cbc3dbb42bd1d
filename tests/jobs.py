"""Scripts run on several ranks by a test that runs on one: with real MPI, to the end of the job
however it comes, and never in a hang.
"""

import os
import subprocess
import sys
from dataclasses import dataclass

# What a job that the tests themselves run in has set; what the machine's owner has set for Open MPI
# stays.
_OF_ANOTHER_JOB = (
    "OMPI_APP_",
    "OMPI_COMM_",
    "OMPI_MCA_ess",
    "OMPI_MCA_orte",
    "OMPI_MCA_pmix",
    "ORTE_",
    "PMIX_",
)
# Seconds after which a job counts as one that hangs: far more than it takes on a machine that has
# ten other things to do, and less than pytest waits for a test.
_PATIENCE = 600
_GRACE = 10  # seconds that mpiexec has to end its ranks: it takes one


@dataclass
class Job:
    """How a job ended.

    Attributes
    ----------
    status : int
        The exit status of mpiexec.
    output : str
        What all ranks and mpiexec printed, on stdout and stderr.
    """

    status: int
    output: str


def run_ranks(ranks: int, script: str, *arguments: str, timeout: float = _PATIENCE) -> Job:
    """Run Python code on this many ranks, and wait for its end.

    Raises
    ------
    subprocess.TimeoutExpired
        Where the job is still there after ``timeout`` seconds. It is ended then, and what it has
        printed is in the error's ``output``.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(_OF_ANOTHER_JOB)
    }
    command = [
        "mpiexec",
        "--oversubscribe",
        "-n",
        str(ranks),
        sys.executable,
        "-c",
        script,
        *arguments,
    ]
    with subprocess.Popen(
        command,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            # Not killed: mpiexec takes its ranks along when it is asked to end.
            process.terminate()
            try:
                output, _ = process.communicate(timeout=_GRACE)
            except subprocess.TimeoutExpired:
                # On a busy machine Open MPI's mpiexec now and then ends its ranks, and waits for
                # ever.
                process.kill()
                output, _ = process.communicate()
            raise subprocess.TimeoutExpired(command, timeout, output) from None
    return Job(process.returncode, output)
