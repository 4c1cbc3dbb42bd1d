"""The methods that may suit an operator, each as the options that a user would give a solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from firedrake.petsc import PETSc

__all__ = ["Candidate", "factorisations", "iterations", "predicted_seconds"]

# Packages with factorisations, by their names for PETSc, in the order in which they are tried: it
# begins with those that are quick at small sizes, and not slow where fill is large.
_PACKAGES = ("cholmod", "mumps", "umfpack", "petsc")
_FACTORISE = {"mumps": ("lu", "cholesky"), "cholmod": ("cholesky",), "umfpack": ("lu",)}
_IN_PARALLEL = ("mumps",)

# Operations of a sparse factorisation with nested dissection, by the dimension of the domain: a
# factor, and the power of the number of unknowns (George, 1973); and what a core makes of them in a
# second, at the least.
_OPERATIONS = {1: (100.0, 1.0), 2: (60.0, 1.5), 3: (20.0, 2.0)}
_RATE = 2e9


@dataclass(frozen=True, eq=False)
class Candidate:
    """A method to be measured.

    Attributes
    ----------
    name : str
        As tables call it.
    parameters : Mapping of str
        Options, as ``solver_parameters``.
    factorises : bool
        Whether it solves by a factorisation, so that there are no iterations.
    is_at_hand : bool
        Whether it is the user's own.
    ksp_prefix : str or None
        Options prefix of the KSP that settings are put on.
    """

    name: str
    parameters: Mapping
    factorises: bool = False
    is_at_hand: bool = False
    ksp_prefix: str | None = None

    def without_iterations(self) -> Candidate:
        """The same, which has turned out to have none."""
        return replace(self, factorises=True)


def predicted_seconds(dimension: int, unknowns: int) -> float:
    """About how long a factorisation takes at the most, by the laws of nested dissection.

    Parameters
    ----------
    dimension : int
        Of the domain.
    unknowns : int
        On all ranks.
    """
    factor, power = _OPERATIONS[min(max(dimension, 1), 3)]
    return factor * unknowns**power / _RATE


def factorisations(
    *, symmetric: bool, ranks: int, other_preconditioner: bool = False
) -> list[Candidate]:
    """The factorisations that there are for an operator.

    Parameters
    ----------
    symmetric : bool
        Whether Cholesky's is one of them; LU always is.
    ranks : int
    other_preconditioner : bool
        Whether the preconditioner is made of another matrix, which is not to be factorised.
    """
    found = []
    for package in _PACKAGES:
        if package != "petsc" and not PETSc.Sys.hasExternalPackage(package):
            continue
        if ranks > 1 and package not in _IN_PARALLEL:
            continue
        for kind in _FACTORISE.get(package, ("lu", "cholesky")):
            if kind == "cholesky" and not symmetric:
                continue
            parameters = {
                "ksp_type": "preonly",
                "pc_type": kind,
                "pc_factor_mat_solver_type": package,
            }
            if package == "petsc" and kind == "cholesky":
                # PETSc's own keeps the order of the unknowns, unless it is told not to.
                parameters["pc_factor_mat_ordering_type"] = "nd"
            if other_preconditioner:
                parameters["pc_use_amat"] = "true"
            title = {"lu": "LU", "cholesky": "Cholesky"}[kind]
            found.append(Candidate(f"{title} ({package})", parameters, factorises=True))
    return found


def iterations(*, symmetric: bool, ranks: int) -> list[Candidate]:
    """The iterative methods that suit an operator, the simplest first.

    Parameters
    ----------
    symmetric : bool
        Whether conjugate gradients are tried, or else GMRES and BiCGStab.
    ranks : int
    """
    kinds = _FOR_SYMMETRIC if symmetric else _FOR_OTHERS
    return [
        Candidate(f"{ksp} + {pc}", {"ksp_type": ksp, **_PRECONDITIONERS[pc]})
        for ksp, pc, *where in kinds
        if not where or (ranks == 1) == (where == ["serial"])
    ]


def _block(inside: str, pc: str = "bjacobi") -> dict:
    return {"pc_type": pc, "sub_ksp_type": "preonly", "sub_pc_type": inside}


_PRECONDITIONERS: dict[str, dict] = {
    "jacobi": {"pc_type": "jacobi"},
    "icc": {"pc_type": "icc"},
    "sor": {"pc_type": "sor"},
    "eisenstat": {"pc_type": "eisenstat"},
    "gamg": {"pc_type": "gamg"},
    "ilu": {"pc_type": "ilu"},
    "ilu(1)": {"pc_type": "ilu", "pc_factor_levels": 1},
    "icc in blocks": _block("icc"),
    "ilu in blocks": _block("ilu"),
    "ilu in overlapping blocks": _block("ilu", "asm"),
}
_FOR_SYMMETRIC = (
    ("cg", "jacobi"),
    ("cg", "icc", "serial"),
    ("cg", "icc in blocks", "parallel"),
    ("cg", "sor"),
    ("cg", "eisenstat", "serial"),
    ("cg", "gamg"),
)
_FOR_OTHERS = (
    ("gmres", "jacobi"),
    ("gmres", "ilu", "serial"),
    ("bcgs", "ilu", "serial"),
    ("gmres", "ilu(1)", "serial"),
    ("gmres", "ilu in blocks", "parallel"),
    ("bcgs", "ilu in blocks", "parallel"),
    ("gmres", "ilu in overlapping blocks", "parallel"),
    ("gmres", "gamg"),
)
