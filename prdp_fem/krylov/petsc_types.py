"""What this package knows of PETSc's types of KSP, PC and SNES, a row for each.

Everything that depends on a type is decided by what stands here: how a transposed solve is made,
what is refused, what is set up anew, and what messages recommend. Types are in the order of PETSc's
headers. Most facts can be tried, and tests/test_petsc_types.py tries them on small systems, for all
types that the PETSc installed can make.

A type that has no row, as one registered by a user or that a newer PETSc has, is dealt with
cautiously: see :func:`ksp_facts`, :func:`pc_facts` and :func:`snes_facts`.

This module is pure Python: it knows names of types, and none of PETSc's objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "KSP_TYPES",
    "PC_TYPES",
    "SNES_TYPES",
    "KSPFacts",
    "PCFacts",
    "SNESFacts",
    "ksp_facts",
    "listed",
    "pc_facts",
    "snes_facts",
    "types_with",
]


@dataclass(frozen=True, kw_only=True)
class KSPFacts:
    """What is known of a type of KSP.

    Attributes
    ----------
    only_applies_preconditioner : bool
        Whether a solve is one application of the preconditioner, and no iteration.
    asks_for_symmetry : bool
        Whether the method is defined for symmetric operators and preconditioners only. For such a
        system a transposed solve is a solve.
    is_transposable : bool
        Whether ``KSPSolveTranspose`` makes the same iterations with the transposes of operator and
        preconditioner. Others refuse to, or multiply by the operator where they should by its
        transpose.
    is_linear : bool
        Whether the result of a number of iterations is linear in the right-hand side, as long as no
        option makes it otherwise.
    solves_least_squares : bool
        Whether it goes on to the least residual where a singular system has no solution, whatever
        the operator.
    remembers_solves : bool
        Whether a solve depends on earlier ones, by vectors that enlarge the next Krylov space, or
        by what is still in work vectors.
    has_thresholds : bool
        Whether it stops below sizes that are not relative to the right-hand side, whatever
        tolerances say.
    has_free_natural_norm : bool
        Whether the natural norm takes no product of vectors that the iteration has not made anyway,
        and changes no bit of it.
    """

    only_applies_preconditioner: bool = False
    asks_for_symmetry: bool = False
    is_transposable: bool = True
    is_linear: bool = False
    solves_least_squares: bool = False
    remembers_solves: bool = False
    has_thresholds: bool = False
    has_free_natural_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class PCFacts:
    """What is known of a type of preconditioner.

    Attributes
    ----------
    is_self_contained : bool
        Whether it is made from a matrix alone, has no KSP or preconditioner inside, and has all it
        needs once it is set up.
    nests : bool
        Whether this package can look for the KSPs and preconditioners inside, of which some may
        iterate; they are there once it is set up.
    is_multigrid : bool
        Whether it is made of levels, whose smoothers are part of a cycle.
    factorises : bool
        Whether it applies the inverse of its operator by a factorisation, which is anything where
        the operator is singular.
    is_pseudo_inverse : bool
        Whether it applies the inverse of its operator, and where that is singular makes the least
        residual.
    needs_symmetry_to_transpose : bool
        Whether PETSc applies it transposed only where its matrix is known to be symmetric.
    remembers_values : bool
        Whether it keeps something of the values that it was first set up with when its matrix gets
        others, such as the interpolation of algebraic multigrid.
    remembers_solves : bool
        Whether a solve with it may depend on earlier ones.
    works_on_host : bool
        Whether it has vectors go through Firedrake, for matrices of its own or to get from mesh to
        mesh.
    does_own_richardson : bool
        Whether it may make Richardson's iterations with a scale of 1 itself, by sweeps or cycles
        that start from the iterate.
    changes_system : bool
        Whether it has a KSP iterate on another system than its operator and right-hand side.
    """

    is_self_contained: bool = False
    nests: bool = False
    is_multigrid: bool = False
    factorises: bool = False
    is_pseudo_inverse: bool = False
    needs_symmetry_to_transpose: bool = False
    remembers_values: bool = False
    remembers_solves: bool = False
    works_on_host: bool = False
    does_own_richardson: bool = False
    changes_system: bool = False

    @property
    def inverts(self) -> bool:
        """Whether it solves by itself, so that a KSP has nothing to iterate for."""
        return self.factorises or self.is_pseudo_inverse


@dataclass(frozen=True, kw_only=True)
class SNESFacts:
    """What is known of a type of SNES.

    Attributes
    ----------
    solves_linear_systems : bool
        Whether it makes its steps by solves of its KSP; others leave the options of that unread.
    steps_along_solution : bool
        Whether a step is a multiple, by the line search, of what its KSP gives for the Jacobian and
        the residual at the state, and of nothing else. Such steps can be unrolled.
    remembers_solves : bool
        Whether a solve depends on earlier ones, unless it is reset.
    works_on_host : bool
        Whether it calls Firedrake beside residual and Jacobian, to get from mesh to mesh or for
        patches.
    is_for_inequalities : bool
        Whether it solves variational inequalities.
    has_levels : bool
        Whether it has solvers on coarser meshes inside, which know no other problem than the one
        that they were first set up for.
    """

    solves_linear_systems: bool = False
    steps_along_solution: bool = False
    remembers_solves: bool = False
    works_on_host: bool = False
    is_for_inequalities: bool = False
    has_levels: bool = False


_ORDINARY_KSP = KSPFacts()
_FOR_SYMMETRIC = KSPFacts(asks_for_symmetry=True)

KSP_TYPES: Mapping[str, KSPFacts] = {
    "richardson": KSPFacts(is_linear=True),
    "chebyshev": KSPFacts(is_linear=True),
    "cg": KSPFacts(asks_for_symmetry=True, has_free_natural_norm=True),
    "groppcg": _FOR_SYMMETRIC,
    "pipecg": _FOR_SYMMETRIC,
    "pipecgrr": _FOR_SYMMETRIC,
    # Its next solve starts from what is left in its work vectors.
    "pipelcg": KSPFacts(asks_for_symmetry=True, remembers_solves=True),
    "pipeprcg": _FOR_SYMMETRIC,
    "pipecg2": _FOR_SYMMETRIC,
    "cgne": KSPFacts(solves_least_squares=True),
    "nash": _FOR_SYMMETRIC,
    "stcg": _FOR_SYMMETRIC,
    "gltr": _FOR_SYMMETRIC,
    "fcg": _FOR_SYMMETRIC,
    "pipefcg": _FOR_SYMMETRIC,
    "gmres": _ORDINARY_KSP,
    "pipefgmres": _ORDINARY_KSP,
    "fgmres": _ORDINARY_KSP,
    "lgmres": KSPFacts(remembers_solves=True),
    # It takes small numbers for zero when it deflates.
    "dgmres": KSPFacts(remembers_solves=True, has_thresholds=True),
    "pgmres": _ORDINARY_KSP,
    "tcqmr": _ORDINARY_KSP,
    "bcgs": _ORDINARY_KSP,
    "ibcgs": _ORDINARY_KSP,
    "qmrcgs": KSPFacts(remembers_solves=True),
    "fbcgs": _ORDINARY_KSP,
    "fbcgsr": _ORDINARY_KSP,
    "bcgsl": _ORDINARY_KSP,
    "pipebcgs": _ORDINARY_KSP,
    "cgs": _ORDINARY_KSP,
    "tfqmr": _ORDINARY_KSP,
    "cr": _FOR_SYMMETRIC,
    "pipecr": _FOR_SYMMETRIC,
    "lsqr": KSPFacts(solves_least_squares=True),
    "preonly": KSPFacts(only_applies_preconditioner=True, is_linear=True),
    "none": KSPFacts(only_applies_preconditioner=True, is_linear=True),
    "qcg": KSPFacts(asks_for_symmetry=True, is_transposable=False),
    "bicg": _ORDINARY_KSP,
    "minres": KSPFacts(asks_for_symmetry=True, has_thresholds=True),
    "symmlq": KSPFacts(asks_for_symmetry=True, has_thresholds=True),
    "lcd": _ORDINARY_KSP,
    # Whoever wrote it has it start anew, and transpose; but may have it look at sizes.
    "python": KSPFacts(has_thresholds=True),
    "gcr": _ORDINARY_KSP,
    "pipegcr": _ORDINARY_KSP,
    "tsirm": KSPFacts(is_transposable=False, has_thresholds=True),
    # It multiplies by the operator where it should by the transpose, and the other way round in
    # part.
    "cgls": KSPFacts(is_transposable=False, solves_least_squares=True),
    "fetidp": KSPFacts(is_transposable=False, has_thresholds=True),
    "hpddm": KSPFacts(is_transposable=False, has_thresholds=True),
    "idr": _ORDINARY_KSP,
    "eksm": KSPFacts(is_transposable=False, has_thresholds=True),
}

_ORDINARY_PC = PCFacts()
_SELF_CONTAINED = PCFacts(is_self_contained=True)
_FACTORISATION = PCFacts(is_self_contained=True, factorises=True)
_PSEUDO_INVERSE = PCFacts(is_self_contained=True, is_pseudo_inverse=True)
_NESTING = PCFacts(nests=True)
_ALGEBRAIC_MULTIGRID = PCFacts(is_multigrid=True, remembers_values=True, does_own_richardson=True)
_OF_HYPRE = PCFacts(remembers_values=True, does_own_richardson=True)

PC_TYPES: Mapping[str, PCFacts] = {
    "none": _SELF_CONTAINED,
    "jacobi": _SELF_CONTAINED,
    "sor": PCFacts(
        is_self_contained=True, needs_symmetry_to_transpose=True, does_own_richardson=True
    ),
    "lu": _FACTORISATION,
    "qr": _PSEUDO_INVERSE,
    "shell": PCFacts(works_on_host=True, does_own_richardson=True),
    "amgx": PCFacts(remembers_values=True),
    "bjacobi": _NESTING,
    "vpbjacobi": _SELF_CONTAINED,
    "mg": PCFacts(is_multigrid=True, works_on_host=True, does_own_richardson=True),
    # It preconditions from both sides for the time of a solve (Eisenstat, 1981).
    "eisenstat": PCFacts(
        is_self_contained=True, needs_symmetry_to_transpose=True, changes_system=True
    ),
    "ilu": _SELF_CONTAINED,
    "icc": _SELF_CONTAINED,
    "asm": _NESTING,
    "gasm": _ORDINARY_PC,
    "ksp": _NESTING,
    "bjkokkos": _ORDINARY_PC,
    "composite": _NESTING,
    "redundant": _ORDINARY_PC,
    "spai": _ORDINARY_PC,
    "nn": _ORDINARY_PC,
    "cholesky": _FACTORISATION,
    "pbjacobi": _SELF_CONTAINED,
    "mat": _ORDINARY_PC,
    "hypre": _OF_HYPRE,
    "parms": _ORDINARY_PC,
    "fieldsplit": _NESTING,
    "tfs": _ORDINARY_PC,
    "ml": _ALGEBRAIC_MULTIGRID,
    "galerkin": _ORDINARY_PC,
    "exotic": _ALGEBRAIC_MULTIGRID,
    "cp": _ORDINARY_PC,
    "lsc": _ORDINARY_PC,
    "python": PCFacts(nests=True, works_on_host=True),
    "pfmg": _OF_HYPRE,
    "syspfmg": _OF_HYPRE,
    "smg": _OF_HYPRE,
    "redistribute": PCFacts(needs_symmetry_to_transpose=True),
    "svd": _PSEUDO_INVERSE,
    "gamg": _ALGEBRAIC_MULTIGRID,
    "chowiluviennacl": _ORDINARY_PC,
    "rowscalingviennacl": _ORDINARY_PC,
    "saviennacl": _ORDINARY_PC,
    # It has the KSP iterate on what is left when inner unknowns are eliminated.
    "bddc": PCFacts(remembers_values=True, changes_system=True),
    "kaczmarz": _ORDINARY_PC,
    "telescope": PCFacts(does_own_richardson=True),
    "patch": PCFacts(works_on_host=True),
    "lmvm": PCFacts(remembers_solves=True),
    "hmg": _ALGEBRAIC_MULTIGRID,
    # It tells the KSP for good to start from what is in the solution vector.
    "deflation": PCFacts(remembers_values=True, remembers_solves=True, changes_system=True),
    "hpddm": PCFacts(remembers_values=True),
    "h2opus": _ORDINARY_PC,
    "mpi": _ORDINARY_PC,
}

_ORDINARY_SNES = SNESFacts()
_WITH_LINEAR_SOLVES = SNESFacts(solves_linear_systems=True)
_FOR_INEQUALITIES = SNESFacts(solves_linear_systems=True, is_for_inequalities=True)
_OF_FIREDRAKE = SNESFacts(works_on_host=True)

SNES_TYPES: Mapping[str, SNESFacts] = {
    "newtonls": SNESFacts(solves_linear_systems=True, steps_along_solution=True),
    "newtontr": _WITH_LINEAR_SOLVES,
    "newtontrdc": _WITH_LINEAR_SOLVES,
    "newtonal": _WITH_LINEAR_SOLVES,
    "python": _OF_FIREDRAKE,
    "nrichardson": _ORDINARY_SNES,
    "ksponly": SNESFacts(solves_linear_systems=True, steps_along_solution=True),
    "ksptransposeonly": _WITH_LINEAR_SOLVES,
    "vinewtonrsls": _FOR_INEQUALITIES,
    "vinewtonssls": _FOR_INEQUALITIES,
    "ngmres": _ORDINARY_SNES,
    "qn": SNESFacts(remembers_solves=True),
    "shell": _OF_FIREDRAKE,
    "ngs": _ORDINARY_SNES,
    "ncg": _ORDINARY_SNES,
    "fas": SNESFacts(works_on_host=True, has_levels=True),
    "ms": _ORDINARY_SNES,
    "nasm": _OF_FIREDRAKE,
    "anderson": _ORDINARY_SNES,
    "aspin": _OF_FIREDRAKE,
    "composite": _ORDINARY_SNES,
    "patch": _OF_FIREDRAKE,
}

_UNKNOWN_KSP = KSPFacts(is_transposable=False, has_thresholds=True)
_UNKNOWN_PC = PCFacts(
    needs_symmetry_to_transpose=True,
    remembers_values=True,
    works_on_host=True,
    does_own_richardson=True,
)
_UNKNOWN_SNES = SNESFacts(remembers_solves=True, works_on_host=True)


def ksp_facts(name: str | None) -> KSPFacts:
    """The facts of a type of KSP, as ``ksp.getType()`` gives it: None before it is chosen.

    One without a row iterates, is not linear, has thresholds, and is given the transposed operator
    where a transposed solve is asked for. It counts as one that remembers nothing, since to refuse
    it would leave nobody a way to use it: that a solve starts anew is for its author to see to.
    """
    return _ORDINARY_KSP if name is None else KSP_TYPES.get(name, _UNKNOWN_KSP)


def pc_facts(name: str | None) -> PCFacts:
    """The facts of a type of PC, as ``pc.getType()`` gives it: None before it is chosen.

    One without a row may hold what this package cannot ask for. It is made anew for other values of
    its operator, is transposed only where its matrix is known to be symmetric, stays on the host,
    and may make Richardson's iterations itself.
    """
    return _ORDINARY_PC if name is None else PC_TYPES.get(name, _UNKNOWN_PC)


def snes_facts(name: str | None) -> SNESFacts:
    """The facts of a type of SNES, as ``snes.getType()`` gives it: None before it is chosen.

    One without a row is reset before each solve, stays on the host, and has no linear solves to be
    refined.
    """
    return _ORDINARY_SNES if name is None else SNES_TYPES.get(name, _UNKNOWN_SNES)


def types_with(table: Mapping[str, object], fact: str) -> tuple[str, ...]:
    """The types of a table that have a fact, in its order."""
    return tuple(name for name, facts in table.items() if getattr(facts, fact))


def listed(names) -> str:
    """Names as a message lists them: with commas, and an "or" before the last."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
