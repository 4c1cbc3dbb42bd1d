"""Progressively refined differentiable physics for Firedrake and PETSc."""
from prdp_fem.ladders import IterationLadder, Iterations, Setting, Tolerance, ToleranceLadder
from prdp_fem.refinement import FixedRefinement, ProgressiveRefinement, Record, Refinement, ScheduledRefinement
from prdp_fem.solvers import LinearVariationalSolver, refinement_from_options

__all__ = ["FixedRefinement", "IterationLadder", "Iterations", "LinearVariationalSolver", "ProgressiveRefinement", "Record", "Refinement",
           "ScheduledRefinement", "Setting", "Tolerance", "ToleranceLadder", "refinement_from_options"]
