"""What importing the package brings along, and what it says where something is missing."""

import importlib
import subprocess
import sys

import pytest


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )


def test_the_bridge_without_torch_says_what_to_install():
    result = run("import sys; sys.modules['torch'] = None\nimport prdp_fem.torch")
    assert result.returncode != 0
    assert (
        result.stderr.strip().splitlines()[-1]
        == 'ImportError: prdp_fem.torch needs PyTorch: pip install "prdp-fem[torch]"'
    )


@pytest.mark.parametrize("module", ["prdp_fem", "prdp_fem.bridge.evaluations", "prdp_fem.studies"])
def test_nothing_but_the_bridge_to_torch_needs_torch(module):
    result = run(f"import sys; sys.modules['torch'] = None\nimport {module}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "prdp_fem",
        "prdp_fem.history",
        "prdp_fem.ladders",
        "prdp_fem.refinement",
        "prdp_fem.refinement.options",
        "prdp_fem.solvers",
        "prdp_fem.studies",
        "prdp_fem.torch",
    ],
)
def test_what_is_promised_is_there(module):
    imported = __import__(module, fromlist=["__all__"])
    assert all(hasattr(imported, name) for name in imported.__all__)


def test_the_package_exports_what_refinement_does():
    """A ladder or a rule that is added is named in both places."""
    package = importlib.import_module("prdp_fem")
    refinement = importlib.import_module("prdp_fem.refinement")
    missing = set(refinement.__all__).difference(package.__all__)
    assert not missing, f"_public.py does not export {sorted(missing)}"


STAR_IMPORTS = """
import importlib, pkgutil
from firedrake import *
from firedrake.adjoint import *
from torch import *
before = dict(globals())
import prdp_fem
found = pkgutil.walk_packages(prdp_fem.__path__, "prdp_fem.")
modules = ["prdp_fem", *(module.name for module in found)]
for module in modules:
    exec(f"from {module} import *")
    changed = [name for name, value in before.items()
               if globals()[name] is not value and name != "before"]
    assert not changed, (module, changed)
    assert not set(dir(__builtins__)) & set(importlib.import_module(module).__all__), module
assert ProgressiveRefinement is prdp_fem.ProgressiveRefinement
assert SolverLayer is prdp_fem.torch.SolverLayer
assert issubclass(prdp_fem.LinearVariationalSolver, LinearVariationalSolver)
assert prdp_fem.LinearVariationalSolver is not LinearVariationalSolver
print(len(modules))
"""


def test_star_imports_take_no_name_away():
    """Of any module of the package, below those of Firedrake and torch."""
    result = run(STAR_IMPORTS)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) > 50


@pytest.mark.parametrize("name", ["LinearVariationalSolver", "NonlinearVariationalSolver"])
def test_solvers_are_imported_by_their_names(name):
    result = run(
        f"from firedrake import *\nfrom prdp_fem import *\nfrom prdp_fem import {name}\n"
        f"import prdp_fem, prdp_fem.solvers\nassert {name} is prdp_fem.{name} is "
        f"prdp_fem.solvers.{name}"
    )
    assert result.returncode == 0, result.stderr
