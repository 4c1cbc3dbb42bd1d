"""What the levels of a refinement mean: ladders of :mod:`prdp_fem.refinement` by another name."""

from prdp_fem.refinement.ladders import *  # noqa: F403
from prdp_fem.refinement.ladders import __all__ as __all__
