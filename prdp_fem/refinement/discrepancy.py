"""Refine while a finer setting would tell another metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prdp_fem.arguments import is_real, shown
from prdp_fem.refinement.assessment import relative_gap
from prdp_fem.refinement.geometric import GeometricLadder
from prdp_fem.refinement.registry import rule
from prdp_fem.refinement.rules import Checked, Refinement
from prdp_fem.refinement.settings import Setting, newton_steps, setting_of

__all__ = ["Comparison", "DiscrepancyRefinement"]
