"""What somebody would use who refines nothing: direct solvers, and good preconditioners."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpi4py import MPI
from petsc4py import PETSc

from prdp_fem.refinement.rules import Refinement
from prdp_fem.studies.schedules import Factorised

__all__ = ["factorised", "incomplete", "solver_parameters"]

# PETSc's own factorisations are of one rank's matrix; its Cholesky is slower than CHOLMOD there.
_MUMPS = "mumps", "mumps"
_ON_ONE = {"cholesky": ("cholmod", "suitesparse")}


def factorised(
    factorisation: str, comm: MPI.Comm = MPI.COMM_SELF, *, is_singular: bool = False
) -> dict[str, Any]:
    """Solver parameters of a direct solver, whose factorisation is kept while the operator stays.

    Parameters
    ----------
    factorisation : str
        ``"cholesky"`` where the operator is symmetric and positive definite, or ``"lu"``.
    comm : mpi4py.MPI.Comm
        The ranks that share the unknowns: several take MUMPS, one CHOLMOD, where PETSc has it.
    is_singular : bool
        Whether the operator has a null space, whose pivots MUMPS finds.
    """
    parameters = {"ksp_type": "preonly", "pc_type": factorisation}
    found = _MUMPS if comm.size > 1 or is_singular else _ON_ONE.get(factorisation)
    if found is not None and PETSc.Sys.hasExternalPackage(found[1]):
        parameters["pc_factor_mat_solver_type"] = found[0]
    return parameters


def incomplete(kind: str, comm: MPI.Comm = MPI.COMM_SELF) -> dict[str, Any]:
    """Solver parameters of an incomplete factorisation: of a rank's block, where there are several.

    Parameters
    ----------
    kind : str
        ``"icc"`` or ``"ilu"``.
    comm : mpi4py.MPI.Comm
        The ranks that share the unknowns.
    """
    if comm.size == 1:
        return {"pc_type": kind}
    return {"pc_type": "bjacobi", "sub_pc_type": kind}


def solver_parameters(
    refinement: Refinement,
    iterative: Mapping[str, Any],
    *,
    factorisation: str,
    comm: MPI.Comm = MPI.COMM_SELF,
    is_singular: bool = False,
) -> dict[str, Any]:
    """Those of a study's solver: of a direct one under the schedule ``direct``.

    Parameters
    ----------
    refinement : Refinement
        Of the schedule.
    iterative : Mapping of str to anything
        Solver parameters under all other schedules.
    factorisation, comm, is_singular
        See :func:`factorised`. Of ``iterative``, what concerns neither KSP nor PC stays.
    """
    if not isinstance(refinement.setting, Factorised):
        return dict(iterative)
    others = {
        name: value
        for name, value in iterative.items()
        if not name.startswith(("ksp_", "pc_", "sub_"))
    }
    return {**others, **factorised(factorisation, comm, is_singular=is_singular)}
