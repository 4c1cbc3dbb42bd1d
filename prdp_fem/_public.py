"""What users name in the package itself, all at once: importing this module imports Firedrake."""
# ruff: noqa: E402
from prdp_fem.release import require_firedrake

# First, as it says what is wrong with Firedrake.
require_firedrake()

from prdp_fem.refinement import *  # noqa: F403
from prdp_fem.refinement import __all__ as _of_refinement
from prdp_fem.refinement.options import refinement_from_options
from prdp_fem.solution.differentiation import Implicit, Unrolled
from prdp_fem.solvers import LinearVariationalSolver as LinearVariationalSolver
from prdp_fem.solvers import NonlinearVariationalSolver as NonlinearVariationalSolver
from prdp_fem.solvers import control
from prdp_fem.unrolled import SteepestDescent

# Without LinearVariationalSolver and NonlinearVariationalSolver: a star import leaves a script's
# names from Firedrake and torch alone.
__all__ = [
    *_of_refinement,
    "Implicit",
    "SteepestDescent",
    "Unrolled",
    "control",
    "refinement_from_options",
]
