"""What is said and done about an installation: imports that fail, releases, kernels that are
damaged or too old.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from jobs import run_ranks

from prdp_fem import doctor
from prdp_fem_installation import imports, openblas

ROOT = Path(__file__).parents[1]
COMMAND = "import sys; from prdp_fem_installation.command import main; main(['doctor'])"


def run(script: str, *path: Path, **variables: str) -> subprocess.CompletedProcess:
    places = os.pathsep.join([*map(str, path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": places, **variables}
    return subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )


def module(folder: Path, name: str, source: str) -> Path:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(source)
    return folder


# Imports

BROKEN = {
    "raises_import_error": (
        "raise ImportError('libmpi.so.40: cannot open\\nsecond line')",
        "ImportError: libmpi.so.40: cannot open",
    ),
    "raises_os_error": ("raise OSError('libcudart.so.13')", "OSError: libcudart.so.13"),
    "divides": ("1/0", "ZeroDivisionError: division by zero"),
    "is_no_python": ("def f(:", "SyntaxError: invalid syntax"),
    "imports_another": ("import no_such_module", "No module named 'no_such_module'"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "says_nothing": ("raise RuntimeError", "RuntimeError"),
    "ends_the_process": ("import os; os._exit(7)", "it ends the process (exit status 7)"),
    "aborts": (
        "import os, sys; print('no PMI', file=sys.stderr, flush=True); os.abort()",
        "it ends the process (signal 6): no PMI",
    ),
    "prints": ("print('@done 0 nonsense')", ""),
}


def test_each_import_that_fails_is_said_whatever_it_does(tmp_path, monkeypatch):
    for name, (source, _) in BROKEN.items():
        module(tmp_path, name, source)
    monkeypatch.syspath_prepend(tmp_path)
    names = {name: name for name in ["json", *BROKEN, "not_there", "string"]}
    monkeypatch.setattr(imports, "_MODULES", names)
    found = {one.module: one for one in imports.look_apart()}
    assert list(found) == list(names)
    assert found["json"].error == found["string"].error == ""
    assert found["not_there"].is_absent and found["not_there"].mark == "-"
    for name, (_, message) in BROKEN.items():
        assert message in found[name].error and not found[name].is_absent, name
        assert bool(found[name].error) == bool(message)
        assert found[name].mark == ("FAILED" if message else "ok")


@pytest.mark.parametrize(
    "name, source, is_needed",
    [
        ("torch", "raise OSError('libcudart.so.13: cannot open shared object file')", False),
        ("firedrake", "def f(:", True),
    ],
)
def test_the_doctor_survives_a_broken_import_and_says_which(tmp_path, name, source, is_needed):
    result = run(COMMAND, module(tmp_path, name, source))
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.split()[:2] == ["FAILED", name]]
    assert (
        "cannot be imported: " + ("SyntaxError" if is_needed else "OSError: libcudart.so.13")
        in line
    )
    # What can be looked at all the same, is.
    assert ("solves on the host" in result.stdout) == (not is_needed)
    assert ("ok      h5py" in result.stdout) == is_needed


def test_an_installation_without_torch_is_fine():
    script = (
        "import sys; sys.modules['torch'] = None\nfrom prdp_fem import doctor\n"
        "doctor._solve = lambda device: 'not tried'\nprint(doctor.examine())"
    )
    result = run(script)
    assert "  -       torch is not installed\n" in result.stdout
    assert result.stdout.strip().endswith("True"), result.stdout


def test_ranks_end_where_one_cannot_import(tmp_path):
    folder = module(
        tmp_path,
        "firedrake",
        "import os\nif os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n    1/0\nimport time\n"
        "time.sleep(600)",
    )
    script = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]; {COMMAND}"
    job = run_ranks(2, script, timeout=120)
    assert job.status != 0
    assert "FAILED  firedrake" in job.output and "ZeroDivisionError" in job.output


# Releases


def of_release(folder: Path, release: str) -> Path:
    """A folder whose metadata say so of Firedrake."""
    information = folder / f"firedrake-{release}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: firedrake\nVersion: {release}\n"
    )
    return folder


RELEASES = pytest.mark.parametrize(
    "release, how", [("2025.4.2", "older"), ("2027.4.0.dev0+g1", "newer")]
)


@RELEASES
def test_another_release_that_has_all_that_is_needed_is_warned_of(tmp_path, release, how):
    result = run("import prdp_fem", of_release(tmp_path, release))
    assert result.returncode == 0, result.stderr
    assert (
        f"prdp_fem is tested with Firedrake 2026.10, and this is Firedrake {release}, which is"
        f" {how}" in result.stderr
    )


@RELEASES
def test_another_release_that_lacks_something_is_refused(tmp_path, release, how):
    lacking = (
        "import firedrake, sys; del sys.modules['firedrake.assemble'].OneFormAssembler; import"
        " prdp_fem"
    )
    result = run(lacking, of_release(tmp_path, release))
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(
        f"ImportError: prdp_fem works with Firedrake 2026.10, and this is Firedrake {release},"
        f" which is {how}"
    )
    assert "OneFormAssembler" in last and last.endswith("install firedrake==2026.10.*")
    assert result.stderr.count("Traceback") == 1


def test_the_release_that_is_tested_is_the_one_that_is_installed_and_nothing_is_said():
    from prdp_fem.release import TESTED

    assert f"firedrake=={TESTED}." in (ROOT / "constraints.txt").read_text()
    result = run("import prdp_fem")
    assert (result.returncode, result.stderr) == (0, "")


def test_no_firedrake_and_a_broken_one_are_told_apart(tmp_path):
    absent = run("import sys\nsys.modules['firedrake'] = None\nimport prdp_fem")
    message = absent.stderr.strip().splitlines()[-1]
    assert message.startswith(
        "ImportError: prdp_fem needs Firedrake 2026.10, and there is none in "
    )
    broken = run(
        "import prdp_fem; prdp_fem.control",
        module(tmp_path, "firedrake", "raise OSError('libpetsc.so.3.26: cannot open')"),
    )
    message = broken.stderr.strip().splitlines()[-1]
    assert (
        message == "ImportError: prdp_fem needs Firedrake, which cannot be imported here (OSError:"
        " libpetsc.so.3.26: cannot open): 'prdp-fem doctor' says what works"
    )


# Compiled kernels


@pytest.fixture
def caches(tmp_path, monkeypatch):
    pyop2, tsfc = tmp_path / "pyop2", tmp_path / "tsfc"
    monkeypatch.setitem(doctor.configuration, "cache_dir", str(pyop2))
    monkeypatch.setenv("FIREDRAKE_TSFC_KERNEL_CACHE_DIR", str(tsfc))
    library = Path(sysconfig.get_path("platlib")).rglob("*.so")
    for folder, name, content in (
        (pyop2, "kernel.so", next(library).read_bytes()),
        (tsfc, "kernel.pickle", __import__("pickle").dumps({"a": [1, 2]})),
    ):
        (folder / "ab").mkdir(parents=True)
        (folder / "ab" / name).write_bytes(content)
    return pyop2 / "ab" / "kernel.so", tsfc / "ab" / "kernel.pickle"


def test_whole_kernels_are_fine(caches):
    assert doctor._damaged_kernels() == []


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_kernels_that_end_too_early_are_damaged(caches, which, share):
    path = caches[which]
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert doctor._damaged_kernels() == [str(path)]


def test_kernels_of_zeros_are_damaged(caches):
    for path in caches:
        path.write_bytes(bytes(path.stat().st_size))
    assert doctor._damaged_kernels() == sorted(map(str, caches))


def test_the_doctor_names_a_damaged_kernel_and_the_remedy(tmp_path):
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "cdef.so").touch()
    script = "from prdp_fem import doctor\nprint(doctor.examine())"
    result = run(
        script, PYOP2_CACHE_DIR=str(tmp_path), FIREDRAKE_TSFC_KERNEL_CACHE_DIR=str(tmp_path)
    )
    (line,) = [
        line for line in result.stdout.splitlines() if "FAILED" in line and "damaged" in line
    ]
    assert f"such as {tmp_path}/ab/cdef.so: remove them" in line
    assert "solves on the host" not in result.stdout
    assert result.stdout.strip().endswith("False")


# Kernels of OpenBLAS

OLD = "sse sse2 ssse3 sse4_1 sse4_2"
AVX2 = f"{OLD} avx f16c fma avx2"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl avx512cd"


@pytest.mark.parametrize(
    "core, vendor, flags, expected",
    [
        ("Prescott", "GenuineIntel", AVX512 + " avx512_fp16", "SkylakeX"),
        ("Prescott", "GenuineIntel", AVX2 + " avx_vnni", "Haswell"),
        ("Prescott", "GenuineIntel", OLD + " avx", "Sandybridge"),
        ("Prescott", "GenuineIntel", OLD, "Nehalem"),
        ("Prescott", "GenuineIntel", "sse sse2", None),
        ("Prescott", "AuthenticAMD", AVX2, "Zen"),
        ("Prescott", "HygonGenuine", AVX2, "Zen"),
        ("Barcelona", "AuthenticAMD", AVX512, "SkylakeX"),
        ("Barcelona", "AuthenticAMD", AVX2, "Zen"),
        ("Nano", "CentaurHauls", AVX2, "Haswell"),
        ("Nehalem", "GenuineIntel", AVX2, "Haswell"),
        ("Nehalem", "GenuineIntel", OLD, None),
        ("Sandybridge", "GenuineIntel", OLD + " avx", None),
        ("Sandybridge", "GenuineIntel", AVX2, "Haswell"),
        # Found by OpenBLAS itself, for reasons of its own.
        ("Haswell", "GenuineIntel", AVX512, None),
        ("Zen", "AuthenticAMD", AVX512, None),
        ("SkylakeX", "GenuineIntel", AVX512, None),
        ("Cooperlake", "GenuineIntel", AVX512, None),
        ("Sapphirerapids", "GenuineIntel", AVX512, None),
        ("armv8", "", "", None),
    ],
)
def test_a_core_is_chosen_only_where_the_detected_one_is_behind(core, vendor, flags, expected):
    assert next(iter(openblas.candidates(core, vendor, set(flags.split()))), None) == expected


@pytest.fixture
def old_library(tmp_path, monkeypatch):
    """An OpenBLAS that takes each processor for a Prescott, and has no kernels for SkylakeX."""
    source = tmp_path / "openblas.c"
    source.write_text("""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
__attribute__((constructor)) static void start(void) {
    const char *core = getenv("OPENBLAS_CORETYPE");
    if (core && strcmp(core, "Haswell") && strcmp(core, "Zen")) {
        fprintf(stderr, "Core not found: %s\\n", core);
        core = NULL;
    }
    fprintf(stderr, "Core: %s\\n", core ? core : "Prescott");
}
""")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-o", tmp_path / "libopenblas.so.0", source], check=True
    )
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)


@pytest.mark.parametrize(
    "vendor, flags, expected",
    [
        ("GenuineIntel", AVX2, "Haswell"),
        ("AuthenticAMD", AVX2, "Zen"),
        ("GenuineIntel", AVX512, "Haswell"),
        ("GenuineIntel", OLD, None),
        ("", "", None),
    ],
)
def test_what_the_library_has_is_chosen_for_a_processor_that_it_does_not_know(
    old_library, monkeypatch, vendor, flags, expected
):
    monkeypatch.setattr(openblas, "processor", lambda: (vendor, set(flags.split())))
    openblas.choose()
    assert os.environ.get("OPENBLAS_CORETYPE") == expected


def test_a_core_that_the_user_names_stays(old_library, monkeypatch):
    monkeypatch.setattr(openblas, "processor", lambda: ("GenuineIntel", set(AVX2.split())))
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    openblas.choose()
    assert os.environ["OPENBLAS_CORETYPE"] == "Nehalem"
    monkeypatch.setenv("OPENBLAS_CORETYPE", "")
    openblas.choose()
    assert os.environ["OPENBLAS_CORETYPE"] == "Haswell"


def test_without_an_openblas_nothing_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(openblas, "_LIBRARY", "libnothing.so.0")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    openblas.choose()
    assert "OPENBLAS_CORETYPE" not in os.environ


def test_the_processor_is_read_as_linux_writes_it(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text(
        "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: A: B\nflags\t\t: fpu avx2 fma\n\n"
        "processor\t: 1\nvendor_id\t: Other\nflags\t\t: fpu\n"
    )
    assert openblas.processor(str(path)) == ("AuthenticAMD", {"fpu", "avx2", "fma"})
    assert openblas.processor(str(tmp_path / "none")) == ("", set())


ENVIRONMENT = Path(sys.prefix)
CHOOSES = Path(sysconfig.get_path("purelib"), "prdp_fem_openblas.pth").exists()


@pytest.mark.skipif(not CHOOSES, reason="this environment was not made by install.sh")
def test_the_environment_chooses_where_it_is_activated_and_where_it_is_not(old_library):
    expected = next(
        (
            core
            for core in openblas.candidates("Prescott", *openblas.processor())
            if core in ("Haswell", "Zen")
        ),
        "",
    )
    asks = [
        str(ENVIRONMENT / "bin" / "python"),
        "-c",
        "import os; print(os.environ.get('OPENBLAS_CORETYPE', ''))",
    ]
    assert subprocess.run(asks, capture_output=True, text=True).stdout.strip() == expected
    activated = subprocess.run(
        ["bash", "-euc", f". '{ENVIRONMENT}/bin/activate'; echo \"${{OPENBLAS_CORETYPE:-}}\""],
        capture_output=True,
        text=True,
    )
    assert activated.stdout.strip() == expected, activated.stderr


def is_openblas() -> bool:
    import ctypes

    from petsc4py import PETSc

    return doctor._corename(ctypes.CDLL(PETSc.__spec__.origin)) is not None and bool(
        openblas.processor()[1]
    )


@pytest.mark.skipif(not is_openblas(), reason="PETSc is not linked with an OpenBLAS for x86")
@pytest.mark.parametrize("core", ["Prescott", "Nehalem", "Haswell"])
def test_the_doctor_says_which_kernels_are_in_use(core):
    script = "import json\nfrom prdp_fem import doctor\nprint(json.dumps(list(doctor._of_blas())))"
    findings = json.loads(run(script, OPENBLAS_CORETYPE=core).stdout.strip().splitlines()[-1])
    mark, text = findings[-1]
    assert mark == "ok" and f"OpenBLAS with kernels for {core}" in text and "aligned to " in text
    # Prescott's sum otherwise from the first number that is not at a multiple of 16 bytes.
    assert ("sums depend on where" in text) == (core == "Prescott")
    better = openblas.candidates(core, *openblas.processor())
    assert [mark for mark, _ in findings[:-1]] == ["warning"] * bool(better)
    if better:
        assert (
            f"takes this processor for a {core}" in findings[0][1]
            and f"OPENBLAS_CORETYPE={better[0]}" in findings[0][1]
        )


# By hand


def test_it_installs_without_a_network_into_an_environment_that_has_firedrake(tmp_path):
    checkout, environment = tmp_path / "checkout", tmp_path / "environment"
    for name in ("prdp_fem", "prdp_fem_installation"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, checkout)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    # What is in this one, Firedrake among it.
    (site,) = environment.glob("lib/python*/site-packages")
    site.joinpath("this.pth").write_text(
        "\n".join(path for path in sys.path if path.endswith("site-packages"))
    )
    nowhere = {
        **{
            name: value
            for name, value in os.environ.items()
            if not name.startswith("PIP_") and name != "PYTHONPATH"
        },
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }
    (command,) = [
        line
        for line in (ROOT / "README.md").read_text().splitlines()
        if "--no-build-isolation --no-deps -e ." in line
    ]
    words = command.strip().strip("`").split()
    subprocess.run(
        [environment / "bin" / "python", "-m", *words], cwd=checkout, env=nowhere, check=True
    )
    where = subprocess.run(
        [environment / "bin" / "python", "-c", "import prdp_fem; print(prdp_fem.__file__)"],
        cwd=tmp_path,
        env=nowhere,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert Path(where.strip()) == checkout / "prdp_fem" / "__init__.py"
    said = subprocess.run(
        [environment / "bin" / "prdp-fem", "--help"],
        cwd=tmp_path,
        env=nowhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "doctor" in said.stdout
