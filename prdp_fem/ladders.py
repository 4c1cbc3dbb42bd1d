"""What the levels of a refinement mean: ladders of :mod:`prdp_fem.refinement` by another name."""

from prdp_fem.refinement import ladders
from prdp_fem.refinement.geometric import GeometricLadder as GeometricLadder
from prdp_fem.refinement.ladders import *  # noqa: F403

__all__ = [*ladders.__all__, "GeometricLadder"]
