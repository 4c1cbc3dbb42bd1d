"""What install.sh does where it is interrupted, runs twice, or finds things there: with an
interpreter that only pretends.

It makes environments and wheels of nothing, writes down what it was asked for, and can be slow or
fail.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = [
    "install.sh",
    "constraints.txt",
    "setup.cfg",
    "pyproject.toml",
    "README.md",
    "prdp_fem_installation/openblas.py",
]
WHEELS = ["petsc", "petsc4py", "libsupermesh", "h5py", "firedrake"]
SECONDS = 120  # until a script that hangs is ended

PRETENDER = f"""#!{sys._base_executable}
import json, os, subprocess, sys, time, zipfile
from pathlib import Path

REAL, this, arguments = {sys._base_executable!r}, sys.argv[0], sys.argv[1:]
state = Path(os.environ["PRETENDER"])
site = Path(this).parents[1]/"lib"/"python3.11"/"site-packages"

def note(what):
    with open(state/"log", "a") as log:
        log.write(json.dumps([what, arguments, {{name: os.environ.get(name) for name in (
            "PETSC_DIR", "PETSC_CONFIGURE_OPTIONS", "HDF5_DIR", "PIP_CONSTRAINT")}}]) + "\\n")
    if (state/"slow").exists() and (state/"slow").read_text() == what:
        (state/"slow").unlink()
        child = subprocess.Popen(["sleep", "600"])
        (state/"started").write_text(f"{{os.getpid()}} {{child.pid}}")
        while not (state/"go").exists():
            time.sleep(0.05)
        child.kill()

def install(name):
    folder = site/f"{{name}}-1.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"RECORD").write_text("files")

if arguments[:2] == ["-m", "venv"]:
    target = Path(arguments[-1])
    (target/"bin").mkdir(parents=True, exist_ok=True)
    note("venv")
    (target/"pyvenv.cfg").write_text("home = /usr/bin")
    (target/"bin"/"activate").write_text("# activate\\n")
    (target/"bin"/"python").write_text(Path(this).read_text())
    (target/"bin"/"python").chmod(0o755)
    site = target/"lib"/"python3.11"/"site-packages"
    install("pip")
    (site/"pip").mkdir()
elif arguments[:2] == ["-m", "pip"]:
    if not (site/"pip").exists():
        sys.exit("No module named pip")
    what = arguments[2]
    if what == "wheel":
        name, _, number = arguments[-1].partition("==")
        note(f"wheel {{name}}")
        if (state/"fail").exists() and (state/"fail").read_text() == name:
            sys.exit(0)  # and nothing is there
        folder = Path(arguments[arguments.index("-w") + 1])
        with zipfile.ZipFile(folder/f"{{name}}-{{number}}-py3-none-any.whl", "w") as wheel:
            wheel.writestr("nothing", "")
    elif what == "install":
        kinds = {{"--upgrade": "upgrade", "--index-url": "index", "--no-index": "put", "-e": "all"}}
        kind = next((kinds[word] for word in kinds if word in arguments), "tools")
        print("Installing collected packages: something", flush=True)
        note(kind)
        if (state/"fail").exists() and (state/"fail").read_text() == kind:
            sys.exit(1)
        install("something")
    elif what != "--version":
        note(what)
elif arguments[:2] == ["-m", "wheel"]:
    # Nothing in it to make relative.
    verb, source, target = arguments[2], arguments[3], arguments[5]
    if verb == "unpack":
        (Path(target)/"tree").mkdir()
    else:
        with zipfile.ZipFile(Path(target)/"packed.whl", "w") as wheel:
            wheel.writestr("nothing", "")
elif arguments[:2] == ["-m", "petsc"]:
    print(site/"petsc")
elif arguments[0] == "-c" and "_base_executable" in arguments[1]:
    print(state/"python")
elif arguments[0] == "-c" and "get_path(\\"purelib\\")" in arguments[1]:
    print(site)
else:
    os.execv(REAL, [REAL, *arguments])
"""


class Checkout:
    """A checkout with the script and an interpreter that pretends."""

    def __init__(self, folder: Path):
        self.folder = folder / "checkout"
        self.state = folder / "state"
        self.venv = self.folder / ".venv"
        self.state.mkdir()
        for name in NEEDED:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.folder / name)
        python = self.state / "python"
        python.write_text(PRETENDER)
        python.chmod(0o755)
        left_out = (
            "PETSC_",
            "HDF5_DIR",
            "EBROOT",
            "VIRTUAL_ENV",
            "PYTHONPATH",
            "VENV",
            "DEVICE",
            "TORCH_INDEX",
            "EXTRAS",
        )
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(left_out)
        }
        self.environment |= {
            "PRETENDER": str(self.state),
            "PYTHON": str(python),
            "XDG_CACHE_HOME": str(folder / "cache"),
        }

    def start(self, *stages: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.folder / "install.sh", *(stages or ("wheels", "venv"))],
            env={**self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def install(self, *stages: str, status: int = 0, **variables: str) -> str:
        process = self.start(*stages, **variables)
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == status, output
        return output

    @property
    def log(self) -> list:
        """What the interpreter was asked for: kind, arguments, and variables."""
        path = self.state / "log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def asked_for(self) -> list[str]:
        return [what for what, _, _ in self.log]

    def forget(self) -> None:
        (self.state / "log").unlink(missing_ok=True)

    def slow_at(self, what: str) -> None:
        (self.state / "slow").write_text(what)

    def wait_for_slow(self) -> list[int]:
        """The processes that are at work then."""
        path = self.state / "started"
        wait_until(lambda: path.exists() and path.read_text().count(" ") == 1)
        return [int(pid) for pid in path.read_text().split()]


def wait_until(is_so) -> None:
    end = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A cache in which all is built."""
    folder = tmp_path_factory.mktemp("built")
    Checkout(folder).install("wheels")
    return folder / "cache" / "prdp_fem" / "wheels"


@pytest.fixture
def built(checkout, wheels):
    """A checkout where all is built, and no environment."""
    shutil.copytree(wheels, checkout.folder.parent / "cache" / "prdp_fem" / "wheels")
    return checkout


def test_a_second_run_does_nothing(checkout):
    checkout.install()
    assert checkout.asked_for[:2] == ["venv", "upgrade"] and checkout.asked_for[-1] == "all"
    assert [what for what in sorted(checkout.asked_for) if "wheel" in what] == sorted(
        f"wheel {name}" for name in WHEELS
    )
    checkout.forget()
    assert checkout.install() == ""
    assert checkout.asked_for == []


STEPS = ["venv", "upgrade", "tools", "wheel petsc", "wheel h5py", "put", "all"]


@pytest.mark.parametrize(
    "step, how",
    [
        *((step, signal.SIGTERM) for step in STEPS),
        *(
            (step, how)
            for step in ("wheel h5py", "all")
            for how in (signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
        ),
    ],
)
def test_an_interrupted_run_leaves_nothing_behind_and_the_next_one_completes(checkout, step, how):
    checkout.slow_at(step)
    process = checkout.start()
    pids = checkout.wait_for_slow()
    assert all(is_running(pid) for pid in pids)
    process.send_signal(how)
    process.communicate(timeout=SECONDS)
    assert process.returncode == (-9 if how == signal.SIGKILL else 128 + how)
    wait_until(lambda: not any(is_running(pid) for pid in pids))
    checkout.forget()
    output = checkout.install()
    assert ("is made anew, as its installation was interrupted" in output) == ("wheel" not in step)
    assert checkout.asked_for[-1] == "all"
    assert not list(checkout.folder.parent.glob("cache/prdp_fem/wheels/*/.build-*"))
    assert not (checkout.venv / ".changing").exists()
    checkout.forget()
    assert checkout.install() == "" and checkout.asked_for == []


def test_a_failure_before_anything_was_changed_keeps_the_environment(built):
    built.install()
    # As where the registry cannot be reached: pip has not begun to install.
    (built.folder / "constraints.txt").open("a").write("# new\n")
    python = built.venv / "bin" / "python"
    whole = python.read_text()
    python.write_text(whole.replace('print("Installing', 'sys.exit(1); print("Installing'))
    assert "failed: Firedrake, torch and prdp_fem" in built.install(status=1)
    python.write_text(whole)
    built.forget()
    assert "anew" not in built.install()
    assert built.asked_for == ["all"]


def test_a_second_installation_waits_and_finds_it_done(built):
    built.slow_at("upgrade")
    first = built.start()
    built.wait_for_slow()
    second = built.start()
    assert "waiting for it" in second.stdout.readline()
    asked = built.asked_for
    assert asked == ["venv", "upgrade"]
    (built.state / "go").touch()
    assert first.wait(timeout=SECONDS) == 0
    first.communicate()
    done = built.asked_for
    output, _ = second.communicate(timeout=SECONDS)
    assert (second.returncode, output) == (0, "")
    assert built.asked_for == done


def without_pip(venv):
    site = venv / "lib" / "python3.11" / "site-packages"
    (site / "pip").rename(site / "~ip")


def without_python(venv):
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/nowhere/python3.11")


def with_a_package_moved_aside(venv):
    (venv / "lib" / "python3.11" / "site-packages" / "~umpy").mkdir()


def with_a_package_without_record(venv):
    (venv / "lib" / "python3.11" / "site-packages" / "something-1.dist-info" / "RECORD").unlink()


def without_configuration(venv):
    (venv / "pyvenv.cfg").unlink()


def of_another_place(venv):
    shutil.copytree(venv, venv.with_name("elsewhere"))
    (venv / ".created").write_text(str(venv.with_name("elsewhere")))


@pytest.mark.parametrize(
    "damage",
    [
        without_pip,
        without_python,
        with_a_package_moved_aside,
        with_a_package_without_record,
        without_configuration,
        of_another_place,
    ],
)
def test_a_broken_environment_is_made_anew(built, damage):
    built.install()
    damage(built.venv)
    (built.venv / ".installed").unlink()
    built.forget()
    assert "is made anew, as" in built.install()
    assert built.asked_for == ["venv", "upgrade", "all"]


@pytest.mark.parametrize("damage", [without_pip, without_python, without_configuration])
def test_an_environment_that_was_broken_before_the_script_knew_it_is_made_anew(built, damage):
    subprocess.run(
        [built.environment["PYTHON"], "-m", "venv", built.venv], env=built.environment, check=True
    )
    damage(built.venv)
    assert "is made anew, as" in built.install()


@pytest.mark.parametrize("content", ["numpy-1.dist-info", "photograph"])
def test_what_others_have_put_into_a_broken_environment_is_not_removed(checkout, content):
    subprocess.run(
        [checkout.environment["PYTHON"], "-m", "venv", checkout.venv],
        env=checkout.environment,
        check=True,
    )
    path = (
        checkout.venv
        / ("lib/python3.11/site-packages" if content.endswith("info") else "")
        / content
    )
    path.mkdir()
    without_pip(checkout.venv)
    assert "what this script has not put there" in checkout.install("venv", status=1)
    assert path.exists()


def test_a_damaged_wheel_is_built_again(built):
    built.install()
    (wheel,) = built.folder.parent.glob("cache/prdp_fem/wheels/*/libsupermesh-*.whl")
    wheel.write_bytes(wheel.read_bytes()[:30])
    built.forget()
    assert f"{wheel} is damaged, and is built again" in built.install("wheels")
    assert [what for what in built.asked_for if "wheel" in what] == ["wheel libsupermesh"]


def test_a_step_that_fails_in_its_middle_fails(checkout):
    (checkout.state / "fail").write_text("libsupermesh")
    assert "failed: libsupermesh 2026.3" in checkout.install("wheels", status=1)
    (checkout.state / "fail").unlink()
    checkout.forget()
    checkout.install("wheels")
    built = [what for what in checkout.asked_for if "wheel" in what]
    assert built == ["wheel libsupermesh", "wheel firedrake"]


def petsc(folder: Path, release: str) -> Path:
    """What a PETSc has that install.sh looks at."""
    major, minor = release.split(".")
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "petscversion.h").write_text(
        f"#define PETSC_VERSION_RELEASE    1\n#define PETSC_VERSION_MAJOR      {major}\n#define"
        f" PETSC_VERSION_MINOR      {minor}\n#define PETSC_VERSION_SUBMINOR   0\n"
    )
    (folder / "lib/petsc/conf").mkdir(parents=True)
    (folder / "lib/petsc/conf/petscvariables").write_text(
        "HDF5_INCLUDE = -I/opt/hdf5/include\nCC = mpicc\n"
    )
    return folder


@pytest.mark.parametrize("name", ["PETSC_DIR", "EBROOTPETSC"])
def test_a_petsc_that_is_named_is_used(checkout, tmp_path, name):
    folder = petsc(tmp_path / "petsc", "3.26")
    output = checkout.install(**{name: str(folder)})
    assert f"PETSc 3.26 of PETSC_DIR={folder} is used, and none is built" in output
    assert "wheel petsc" not in checkout.asked_for
    built = {what: variables for what, _, variables in checkout.log if what.startswith("wheel")}
    assert all(
        built[f"wheel {name}"]["PETSC_DIR"] == str(folder) for name in ("petsc4py", "firedrake")
    )
    assert built["wheel h5py"]["HDF5_DIR"] == "/opt/hdf5"
    # And no wheel that was built for it is taken for another's.
    checkout.forget()
    checkout.install()
    assert "wheel petsc4py" in checkout.asked_for


@pytest.mark.parametrize(
    "release, message",
    [
        (None, "has no PETSc: expected include/petscversion.h in it"),
        ("3.22", "is PETSc 3.22, and Firedrake 2026.10.0 needs 3.26"),
    ],
)
def test_a_petsc_that_cannot_be_used_is_refused_before_any_work(
    checkout, tmp_path, release, message
):
    folder = tmp_path / "petsc"
    if release is not None:
        petsc(folder, release)
    assert message in checkout.install(status=1, PETSC_DIR=str(folder))
    assert checkout.log == [] and not checkout.venv.exists()


def test_options_for_petsc_are_added(checkout):
    output = checkout.install("wheels", PETSC_CONFIGURE_OPTIONS="--with-64-bit-indices")
    assert (
        "PETSC_CONFIGURE_OPTIONS is added to the options that PETSc is built with:"
        " --with-64-bit-indices" in output
    )
    options = {what: variables for what, _, variables in checkout.log}["wheel petsc"][
        "PETSC_CONFIGURE_OPTIONS"
    ]
    assert "--with-mumps" in options and options.index("--with-64-bit-indices") > options.index(
        "--with-mumps"
    )
    checkout.forget()
    checkout.install("wheels")
    assert "wheel petsc" in checkout.asked_for


@pytest.fixture
def elsewhere(tmp_path):
    """A PATH with all commands but Debian's."""
    folder = tmp_path / "commands"
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for command in Path(place).glob("*"):
            link = folder / command.name
            if (
                not command.name.startswith(("apt", "dpkg"))
                and not link.exists()
                and not link.is_symlink()
            ):
                link.symlink_to(command)
    for tool in (
        "mpicc",
        "mpicxx",
        "mpifort",
        "make",
        "cmake",
        "ninja",
        "bison",
        "flex",
        "git",
        "pkg-config",
    ):
        if not (folder / tool).exists():
            (folder / tool).symlink_to("/bin/true")
    return folder


def test_another_system_needs_names(checkout, elsewhere, tmp_path):
    path = {"PATH": str(elsewhere)}
    assert "this is no Debian or Ubuntu: name what to build on by PETSC_DIR" in checkout.install(
        "system", status=1, **path
    )
    assert "mpicc" in checkout.install(
        "system", PETSC_DIR=str(petsc(tmp_path / "petsc", "3.26")), **path
    )
    checkout.install(
        "system",
        "wheels",
        PETSC_CONFIGURE_OPTIONS="--with-hdf5-dir=/opt/hdf5",
        HDF5_DIR="/opt/hdf5",
        **path,
    )
    built = {what: variables for what, _, variables in checkout.log if what.startswith("wheel")}
    assert built["wheel petsc"]["PETSC_CONFIGURE_OPTIONS"].endswith(
        "--with-hdf5-dir=/opt/hdf5 --with-make-np=" + str(os.cpu_count())
    )
    assert "/usr/include/hdf5" not in built["wheel petsc"]["PETSC_CONFIGURE_OPTIONS"]
    assert built["wheel h5py"]["HDF5_DIR"] == "/opt/hdf5"
    (elsewhere / "mpifort").unlink()
    message = checkout.install("system", status=1, PETSC_CONFIGURE_OPTIONS="--with-mumps", **path)
    assert "these commands are missing: mpifort" in message


def test_a_firedrake_that_is_there_is_used(checkout, elsewhere, tmp_path):
    (tmp_path / "modules" / "firedrake").mkdir(parents=True)
    (tmp_path / "modules" / "firedrake" / "__init__.py").touch()
    for name, number in (("NumPy", "1.2.3"), ("setuptools", "4.5")):
        information = tmp_path / "modules" / f"{name.lower()}-{number}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        )
    output = checkout.install(
        "system", "wheels", "venv", PYTHONPATH=str(tmp_path / "modules"), PATH=str(elsewhere)
    )
    assert "is used, and nothing is built" in output
    assert checkout.asked_for == ["venv", "all"]
    site = checkout.venv / "lib/python3.11/site-packages"
    assert str(tmp_path / "modules") in (site / "existing_firedrake.pth").read_text()
    # What that Firedrake runs with stays as it is.
    _, _, variables = checkout.log[-1]
    versions = Path(variables["PIP_CONSTRAINT"]).read_text().splitlines()
    assert "numpy==1.2.3" in versions
    assert not any(version.startswith(("setuptools", "pip=")) for version in versions)


def test_torch_comes_from_an_index_of_its_own(built):
    built.install(TORCH_INDEX_URL="https://somewhere/cpu")
    arguments = {what: arguments for what, arguments, _ in built.log}
    assert (
        arguments["index"][-3:] == ["--index-url", "https://somewhere/cpu", "torch"]
        and "--no-deps" in arguments["index"]
    )
    assert built.asked_for[-2:] == ["index", "all"]


def test_where_that_index_has_no_torch_this_is_said(built):
    (built.state / "fail").write_text("index")
    assert "there is no torch to be had from TORCH_INDEX_URL=https://nowhere" in built.install(
        TORCH_INDEX_URL="https://nowhere"
    )
    assert built.asked_for[-1] == "all"
