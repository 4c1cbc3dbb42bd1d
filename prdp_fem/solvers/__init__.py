"""Drop-in variational solvers whose KSP follows a refinement."""

from prdp_fem.ranks.job import end_together
from prdp_fem.refinement.options import refinement_from_options
from prdp_fem.solvers.refined import RefinedSolver
from prdp_fem.solvers.under_control import control
from prdp_fem.solvers.variational import LinearVariationalSolver as LinearVariationalSolver
from prdp_fem.solvers.variational import NonlinearVariationalSolver as NonlinearVariationalSolver

__all__ = ["RefinedSolver", "control", "refinement_from_options"]  # as that of the package

# Importing Firedrake is collective, too.
end_together()
