"""The job scripts, run by a real Slurm: one node, this machine, with daemons, ports and a key of
the test's own.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = ["munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo"]
SECONDS = 900  # until a job that hangs is ended
# Daemons are in /usr/sbin, which is not on everybody's PATH.
PATH = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])

CONFIGURATION = """\
ClusterName=prdp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there is no Slurm to be had; empty where there is."""
    missing = [command for command in COMMANDS if shutil.which(command, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    if os.getuid() != 0:
        return "its daemons are started by root"
    plugins = subprocess.run(
        ["find", "/usr/lib", "/usr/lib64", "-name", "mpi_pmix*.so"], capture_output=True, text=True
    ).stdout
    return "" if plugins else "it has no plugin for PMIx"


WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no Slurm here: {WHY_NOT}")


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """The environment in which its commands find it."""
    # Munge wants folders that only root can write to, all the way up, or to be forced.
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(
        CONFIGURATION.format(host=host, ports=free_ports(2), folder=folder)
    )
    # A job is no part of the one that the tests run in.
    inside = ("OMPI_", "PMIX_", "ORTE_", "SLURM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(inside)}
    environment |= {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
    munge = {
        option: folder / "munge" / option
        for option in ("socket", "pid-file", "log-file", "seed-file")
    }
    commands = [
        [
            "munged",
            "--foreground",
            "--force",
            f"--key-file={key}",
            *(f"--{option}={path}" for option, path in munge.items()),
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    ]
    daemons = []
    try:
        with open(folder / "log", "w") as log:
            for command in commands:
                daemons.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
                if command[0] == "munged":
                    wait_until(munge["socket"].exists, folder)
        wait_until(lambda: "idle" in ask(environment, "sinfo", "--noheader", "--format=%T"), folder)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def ask(environment: dict, *command: str) -> str:
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60
    ).stdout


def wait_until(is_so, folder: Path) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.2)


@pytest.fixture
def submitted_from(tmp_path):
    """A folder as a checkout is one, with an image and an Apptainer that runs what is in it in this
    environment.
    """
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    activate = Path(sys.prefix) / "bin" / "activate"
    # Of an environment that has none, what it is for.
    (tmp_path / ".venv" / "bin" / "activate").write_text(
        (f"source '{activate}'\n" if activate.exists() else "")
        + f"export PATH='{Path(sys.executable).parent}':$PATH\n"
    )
    (tmp_path / "demos").symlink_to(ROOT / "demos")
    (tmp_path / "prdp_fem.sif").touch()
    (tmp_path / "bin").mkdir()
    apptainer = tmp_path / "bin" / "apptainer"
    apptainer.write_text(f"""#!/bin/bash
[ "$1" = exec ] && [ -f "$2" ] || exit 99
shift 2
. '{tmp_path}/.venv/bin/activate'
exec "${{@//\\/opt\\/prdp_fem/{str(ROOT).replace("/", chr(92) + "/")}}}"
""")
    apptainer.chmod(0o755)
    return tmp_path


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.parametrize(
    "script, options",
    [
        ("docs/jobs/mesh.slurm", []),
        ("docs/jobs/samples.slurm", ["--ensemble", "2"]),
        ("docker/jobs/cpu.slurm", []),
    ],
)
def test_a_job_script_runs(slurm, submitted_from, script, options):
    cache = os.environ.get("PYOP2_CACHE_DIR"), os.environ.get("FIREDRAKE_TSFC_KERNEL_CACHE_DIR")
    # The compiled kernels that there are, where the script looks for them.
    home = submitted_from / "home"
    kernels = home / ".cache" / "prdp_fem" / "kernels"
    kernels.mkdir(parents=True)
    for name, folder in zip(("pyop2", "tsfc"), cache):
        if folder is not None and Path(folder).is_dir():
            (kernels / name).symlink_to(folder)
    command = [
        "sbatch",
        "--wait",
        "--parsable",
        "--nodes=1",
        "--ntasks-per-node=2",
        "--output=log",
        str(ROOT / script),
        "--quick",
        "--epochs",
        "1",
        "--schedules",
        "prdp",
        *options,
    ]
    environment = {
        **slurm,
        "HOME": str(home),
        "PATH": f"{submitted_from / 'bin'}{os.pathsep}{slurm['PATH']}",
        "TMPDIR": str(submitted_from),
    }
    done = subprocess.run(
        command,
        env=environment,
        cwd=submitted_from,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    log = submitted_from / "log"
    assert done.returncode == 0, done.stderr + (log.read_text() if log.exists() else "")
    number = done.stdout.split(";")[0].strip().splitlines()[0]
    results = submitted_from / "results" / number
    runs = list(results.glob("*.json"))
    assert runs, sorted(results.iterdir())
    # Two ranks that know of each other, as they say themselves: none of them has trained alone.
    layouts = [json.loads(run.read_text()) for run in runs]
    members = int(options[-1]) if options else 1
    assert all(
        (run["machine"]["ranks"], run["machine"]["members"]) == (2, members) for run in layouts
    )
    if script.startswith("docker"):
        assert "Everything needed works." in log.read_text()
