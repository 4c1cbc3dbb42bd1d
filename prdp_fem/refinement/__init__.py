"""When to refine, and what levels mean: pure Python, without Firedrake, PETSc or torch.

Ladders and rules are registered as their modules are imported here; what is in ``__all__`` is what
``prdp_fem`` itself exports, too.
"""

from prdp_fem.refinement.assessment import Assessment, CoarsePhysicsWarning
from prdp_fem.refinement.discrepancy import DiscrepancyRefinement
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.ladders import IterationLadder, NewtonLadder, ToleranceLadder
from prdp_fem.refinement.registry import LADDERS as LADDERS
from prdp_fem.refinement.registry import RULES as RULES
from prdp_fem.refinement.rules import (
    FixedRefinement,
    ProgressiveRefinement,
    Record,
    Refinement,
    ScheduledRefinement,
)
from prdp_fem.refinement.settings import Iterations, NewtonSteps, Setting, Tolerance

__all__ = [
    "Assessment",
    "CoarsePhysicsWarning",
    "DiscrepancyRefinement",
    "FixedRefinement",
    "GeometricLadder",
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
