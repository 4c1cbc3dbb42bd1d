"""What users name in the package itself, all at once: importing this module imports Firedrake."""

# ruff: noqa: E402
from prdp_fem.release import require_firedrake

# First, as it says what is wrong with Firedrake.
require_firedrake()

# Name by name, as a type checker, which meets these modules in a circle, loses those of a star.
from prdp_fem.advice import Advice, advise
from prdp_fem.refinement import (
    Assessment,
    CoarsePhysicsWarning,
    DiscrepancyRefinement,
    FixedRefinement,
    GeometricLadder,
    IterationLadder,
    Iterations,
    NewtonLadder,
    NewtonSteps,
    ProgressiveRefinement,
    Record,
    Refinement,
    ScheduledRefinement,
    Setting,
    Tolerance,
    ToleranceLadder,
)
from prdp_fem.refinement.options import refinement_from_options
from prdp_fem.solution.differentiation import Implicit, Unrolled
from prdp_fem.solvers import LinearVariationalSolver as LinearVariationalSolver
from prdp_fem.solvers import NonlinearVariationalSolver as NonlinearVariationalSolver
from prdp_fem.solvers import control
from prdp_fem.unrolled import SteepestDescent

# Without LinearVariationalSolver and NonlinearVariationalSolver: a star import leaves a script's
# names from Firedrake and torch alone.
__all__ = [
    "Advice",
    "Assessment",
    "CoarsePhysicsWarning",
    "DiscrepancyRefinement",
    "FixedRefinement",
    "GeometricLadder",
    "Implicit",
    "IterationLadder",
    "Iterations",
    "NewtonLadder",
    "NewtonSteps",
    "ProgressiveRefinement",
    "Record",
    "Refinement",
    "ScheduledRefinement",
    "Setting",
    "SteepestDescent",
    "Tolerance",
    "ToleranceLadder",
    "Unrolled",
    "advise",
    "control",
    "refinement_from_options",
]
