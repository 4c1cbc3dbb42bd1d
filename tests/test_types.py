"""What type checkers see of the package: mypy finds no error in it (make lint), and users' scripts
have its types.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import prdp_fem
from prdp_fem import IterationLadder, LinearVariationalSolver, ProgressiveRefinement
from prdp_fem.torch import SolverLayer
refinement = ProgressiveRefinement(IterationLadder(stop=9))
reveal_type(refinement.step(1.0))
reveal_type(refinement.level)
reveal_type(prdp_fem.refinement_from_options())
reveal_type(LinearVariationalSolver(None).statistics)
reveal_type(SolverLayer)
ProgressiveRefinement(IterationLadder(), tau=3)
"""


@pytest.mark.slow
def test_users_have_types(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "script.py").write_text(SCRIPT)
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            ROOT / "setup.cfg",
            "--cache-dir",
            tmp_path / "cache",
            tmp_path / "script.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = [
        line.partition("script.py:")[2]
        for line in found.stdout.splitlines()
        if "script.py:" in line
    ]
    assert [
        line.partition("Revealed type is ")[2].strip('"').split(" -> ")[-1] for line in said[:5]
    ] == [
        "bool",
        "int",
        "prdp_fem.refinement.rules.Refinement",
        "prdp_fem.statistics.Statistics",
        "prdp_fem.torch.layer.SolverLayer",
    ]
    errors = [line for line in said if " error: " in line]
    assert len(errors) == 1 and 'Unexpected keyword argument "tau"' in errors[0]
