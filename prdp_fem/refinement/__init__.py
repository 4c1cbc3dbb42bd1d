"""When to refine, and what levels mean: pure Python, without Firedrake, PETSc or torch."""
from prdp_fem.refinement.ladders import (
    IterationLadder,
    Iterations,
    NewtonLadder,
    NewtonSteps,
    Setting,
    Tolerance,
    ToleranceLadder,
)
from prdp_fem.refinement.rules import (
    FixedRefinement,
    ProgressiveRefinement,
    Record,
    Refinement,
    ScheduledRefinement,
)

__all__ = [
    "FixedRefinement",
    "IterationLadder",
    "Iterations",
    "NewtonLadder",
    "NewtonSteps",
    "ProgressiveRefinement",
    "Record",
    "Refinement",
    "ScheduledRefinement",
    "Setting",
    "Tolerance",
    "ToleranceLadder",
]
