"""Progressively refined differentiable physics for Firedrake and PETSc.

The first use of a name imports Firedrake, so that what needs none, as ``prdp_fem.refinement``, is
light to import. Where Firedrake is there already, that is now. Either is collective on
``COMM_WORLD``; on several ranks it puts a ``sys.excepthook`` in the place of PyOP2's, by which a
rank that raises ends the job (see :mod:`prdp_fem.ranks.job`).
"""

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from prdp_fem.release import look_at_release

look_at_release()
if TYPE_CHECKING or "firedrake" in sys.modules:
    from prdp_fem._public import *  # noqa: F403
    from prdp_fem._public import LinearVariationalSolver as LinearVariationalSolver
    from prdp_fem._public import NonlinearVariationalSolver as NonlinearVariationalSolver
    from prdp_fem._public import __all__ as __all__
else:

    def __getattr__(name: str):
        """A module of the package, or what the package exports."""
        if not name.startswith("__") and importlib.util.find_spec(f"{__name__}.{name}"):
            return importlib.import_module(f"{__name__}.{name}")
        public = importlib.import_module("prdp_fem._public")
        if not hasattr(public, name):
            message = f"module '{__name__}' has no attribute '{name}'"
            raise AttributeError(message, name=name)
        return getattr(public, name)
