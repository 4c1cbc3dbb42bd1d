"""The README's examples run as printed."""
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent/"README.md").read_text()


def test_the_training_script_runs_as_printed(capsys):
    script, = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "import" in block)
    variables = {}
    exec(compile(script, "README.md", "exec"), variables)
    refinement = variables["refinement"]
    assert len(refinement.history) == 100 and refinement.level > 0
    assert refinement.history[-1].metric < refinement.history[0].metric
    assert "iterations" in capsys.readouterr().out


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(target):
    assert (Path(__file__).parent.parent/target).exists()
