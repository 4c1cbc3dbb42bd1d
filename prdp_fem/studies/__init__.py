"""Comparisons of refinements: the same training under several schedules and seeds.

They say what each has reached, and what it took.
"""

try:
    import matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        'prdp_fem.studies draws with Matplotlib: pip install "prdp-fem[demos]"'
    ) from error

from prdp_fem.studies.command_line import command_line
from prdp_fem.studies.contestants import factorised, incomplete, solver_parameters
from prdp_fem.studies.figures import draw_training
from prdp_fem.studies.files import save_figure
from prdp_fem.studies.meshes import triangle_mesh
from prdp_fem.studies.runs import Run
from prdp_fem.studies.schedules import CONVERGED, DIRECT, PRDP, Schedule
from prdp_fem.studies.study import Study

__all__ = [
    "CONVERGED",
    "DIRECT",
    "PRDP",
    "Run",
    "Schedule",
    "Study",
    "command_line",
    "draw_training",
    "factorised",
    "incomplete",
    "save_figure",
    "solver_parameters",
    "triangle_mesh",
]
