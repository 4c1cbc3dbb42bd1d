"""Progressively refined differentiable physics for Firedrake and PETSc."""
# First, as it says what is wrong with Firedrake.
import prdp_fem.release  # noqa: F401  # isort: split
from prdp_fem.differentiation import Implicit, Unrolled
from prdp_fem.job import end_together
from prdp_fem.ladders import IterationLadder, Iterations, NewtonLadder, NewtonSteps, Setting, Tolerance, ToleranceLadder
from prdp_fem.refinement import FixedRefinement, ProgressiveRefinement, Record, Refinement, ScheduledRefinement
from prdp_fem.solvers import LinearVariationalSolver, NonlinearVariationalSolver, control, refinement_from_options
from prdp_fem.unrolled import SteepestDescent

__all__ = ["FixedRefinement", "Implicit", "IterationLadder", "Iterations", "LinearVariationalSolver", "NewtonLadder", "NewtonSteps",
           "NonlinearVariationalSolver", "ProgressiveRefinement", "Record", "Refinement", "ScheduledRefinement", "Setting",
           "SteepestDescent", "Tolerance", "ToleranceLadder", "Unrolled", "control", "refinement_from_options"]

end_together()
