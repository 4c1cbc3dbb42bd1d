"""What importing the package brings along, and what it says where something is missing."""
import subprocess
import sys

import pytest


def run(script: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_the_bridge_without_torch_says_what_to_install():
    result = run("import sys; sys.modules['torch'] = None\nimport prdp_fem.torch")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == 'ImportError: prdp_fem.torch needs PyTorch: pip install "prdp-fem[torch]"'


@pytest.mark.parametrize("module", ["prdp_fem", "prdp_fem.studies"])
def test_nothing_but_the_bridge_needs_torch(module):
    result = run(f"import sys; sys.modules['torch'] = None\nimport {module}")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["prdp_fem", "prdp_fem.history", "prdp_fem.ladders", "prdp_fem.refinement", "prdp_fem.options",
                                    "prdp_fem.solvers", "prdp_fem.studies", "prdp_fem.torch"])
def test_what_is_promised_is_there(module):
    imported = __import__(module, fromlist=["__all__"])
    assert all(hasattr(imported, name) for name in imported.__all__)
