"""Progressively refined differentiable physics for Firedrake and PETSc."""
# First, as it says what is wrong with Firedrake.
import prdp_fem.release  # noqa: F401  # isort: split
from prdp_fem.differentiation import Implicit, Unrolled
from prdp_fem.job import end_together
from prdp_fem.ladders import IterationLadder, Iterations, NewtonLadder, NewtonSteps, Setting, Tolerance, ToleranceLadder
from prdp_fem.refinement import FixedRefinement, ProgressiveRefinement, Record, Refinement, ScheduledRefinement
from prdp_fem.solvers import LinearVariationalSolver as LinearVariationalSolver
from prdp_fem.solvers import NonlinearVariationalSolver as NonlinearVariationalSolver
from prdp_fem.solvers import control, refinement_from_options
from prdp_fem.unrolled import SteepestDescent

# Without LinearVariationalSolver and NonlinearVariationalSolver: a star import leaves a script's
# names from Firedrake and torch alone.
__all__ = ["FixedRefinement", "Implicit", "IterationLadder", "Iterations", "NewtonLadder",
           "NewtonSteps", "ProgressiveRefinement",
           "Record", "Refinement", "ScheduledRefinement", "Setting", "SteepestDescent", "Tolerance",
           "ToleranceLadder", "Unrolled",
           "control", "refinement_from_options"]

end_together()
