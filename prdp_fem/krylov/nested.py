"""The KSPs inside a KSP: in the preconditioner, in what that is made of, and so on."""
from __future__ import annotations

import ctypes
from collections.abc import Iterator

import numpy as np
from firedrake.petsc import PETSc

__all__ = ["SELF_CONTAINED", "all_inside", "applies_factorisation", "find_iterative",
           "has_factorisation", "has_failed_inside", "has_memory_inside", "has_truncated_inside",
           "has_untransposable_inside", "is_direct", "krylov_method_inside", "needs_set_up",
           "all_preconditioners", "parts"]

# Preconditioners that are made from a matrix alone, and have all they need once they are set up.
SELF_CONTAINED = frozenset({"none", "jacobi", "pbjacobi", "vpbjacobi", "sor", "eisenstat", "ilu", "icc", "lu", "cholesky"})
# Inside these there may be an iteration, which is known only once they are set up.
_NESTING = frozenset({"fieldsplit", "ksp", "composite", "python", "asm", "bjacobi"})
_MULTIGRID = frozenset({"mg", "gamg", "hmg"})
# These keep something of the values they were first set up with, such as the interpolation of algebraic multigrid.
_WITH_MEMORY = frozenset({"gamg", "hypre", "ml", "hmg", "bddc"})
# These are transposed where their matrix is known to be symmetric.
_TRANSPOSABLE_IF_SYMMETRIC = frozenset({"sor", "eisenstat"})
# What these do to a vector is linear in it.
_LINEAR = frozenset({"preonly", "none", "richardson", "chebyshev"})
# These keep something of earlier solves: vectors that enlarge the next Krylov space, or what is still in their work vectors.
_REMEMBERING_METHODS = frozenset({"lgmres", "dgmres", "qmrcgs"})
_LIBRARY = ctypes.CDLL(PETSc.__file__)


def is_direct(ksp: PETSc.KSP) -> bool:
    """Whether a KSP only applies its preconditioner."""
    return ksp.getType() in (PETSc.KSP.Type.PREONLY, PETSc.KSP.Type.NONE)


def needs_set_up(ksp: PETSc.KSP, prefix: str | None = None) -> bool:
    """Whether :func:`find_iterative` can only tell once the preconditioner is set up."""
    kind = ksp.getPC().getType()
    if prefix == "" and not is_direct(ksp):
        return False  # the KSP itself
    return prefix is not None or kind in _NESTING or (is_direct(ksp) and kind in _MULTIGRID)


def find_iterative(ksp: PETSc.KSP, prefix: str | None = None) -> PETSc.KSP:
    """The KSP, of this one and all inside it, that iterates.

    Parameters
    ----------
    ksp : PETSc.KSP
        Set up, where :func:`needs_set_up` says so.
    prefix : str or None
        The options prefix of the KSP wanted, all of it or what follows the prefix of ``ksp`` ("" is ``ksp`` itself). None
        where there is only one; then smoothers, whose iterations are part of a multigrid cycle, do not count.

    Raises
    ------
    ValueError
        Where there is none, or more than one.
    """
    outer = ksp.getOptionsPrefix() or ""
    found = list(_walk(ksp, False))
    iterative = [(nested, smooths) for nested, smooths in found if not is_direct(nested)]
    listing = ", ".join(f"'{_shortened(nested, outer)}' (ksp_type {nested.getType()})" for nested, _ in iterative)
    if prefix is not None:
        named = [nested for nested, _ in iterative if (nested.getOptionsPrefix() or "") in (prefix, outer + prefix)]
        if not named:
            known = f"; there are {listing}" if listing else ""
            raise ValueError(f"there is no iterative KSP with the options prefix '{prefix}'{known}")
        return named[0]
    candidates = [nested for nested, smooths in iterative if not smooths]
    if len(candidates) > 1:
        raise ValueError(f"more than one KSP iterates, so say which of them follows the refinement: ksp_prefix=… is one of {listing}")
    if not candidates:
        raise ValueError(
            f"the solver is direct (ksp_type {ksp.getType()} with pc_type {ksp.getPC().getType()}), so there are no iterations to refine: "
            'choose an iterative method, for example solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"} for a symmetric problem '
            'or {"ksp_type": "gmres", "pc_type": "jacobi"} for any other, or leave refinement away'
            + (f"; smoothers can be refined by ksp_prefix=…: {listing}" if listing else ""))
    if candidates[0].getType() in _REMEMBERING_METHODS:
        raise ValueError(f"ksp_type {candidates[0].getType()} keeps vectors of earlier solves, so that a truncated solve would not be a "
                         "function of its inputs: use gmres, fgmres or bcgs")
    return candidates[0]


def applies_factorisation(ksp: PETSc.KSP) -> bool:
    """Whether all that a KSP does is to apply a factorisation of its operator."""
    return is_direct(ksp) and has_factorisation(ksp)


def has_factorisation(ksp: PETSc.KSP) -> bool:
    """Whether the preconditioner of a KSP is a factorisation of its operator."""
    A, P = ksp.getOperators()
    return A.handle == P.handle and _is_factorisation(ksp.getPC())


def _is_factorisation(pc: PETSc.PC) -> bool:
    match pc.getType():
        case "lu" | "cholesky":
            return True
        case "ksp" | "python":
            # Such as Firedrake's AssembledPC, that assembles the operator and has one of it inside.
            inside = parts(pc)
            if len(inside) != 1:
                return False
            part = inside[0]
            return (_is_factorisation(part) if isinstance(part, PETSc.PC)
                    else applies_factorisation(part))
    return False


def has_truncated_inside(ksp: PETSc.KSP) -> bool:
    """Whether there is an iteration in the preconditioner that makes it another one with each setting."""
    return any(not smooths and not is_direct(nested) for nested, smooths in _walk_preconditioner(ksp.getPC(), False))


def krylov_method_inside(ksp: PETSc.KSP) -> str | None:
    """The type of a Krylov method in the preconditioner, which makes that another map of each vector; None where there is none."""
    return next((nested.getType() for nested, _ in _walk_preconditioner(ksp.getPC(), False) if nested.getType() not in _LINEAR), None)


def has_memory_inside(ksp: PETSc.KSP) -> bool:
    """Whether a preconditioner in a KSP keeps something of the values it was first set up with."""
    return any(pc.getType() in _WITH_MEMORY for pc in all_preconditioners(ksp))


def has_untransposable_inside(ksp: PETSc.KSP) -> bool:
    """Whether there is a preconditioner in a KSP that PETSc refuses to apply transposed."""
    return any(pc.getType() in _TRANSPOSABLE_IF_SYMMETRIC and pc.getOperators()[1].isSymmetricKnown() != (True, True)
               for pc in all_preconditioners(ksp))


def has_failed_inside(ksp: PETSc.KSP) -> bool:
    """Whether a preconditioner in a KSP has noted, on this rank, that its operator is none for it, such as a singular one."""
    return any(pc.getFailedReason() != 0 for pc in all_preconditioners(ksp))


def all_inside(ksp: PETSc.KSP) -> list[PETSc.KSP]:
    """A KSP and all inside it."""
    return [inside for inside, _ in _walk(ksp, False)]


def all_preconditioners(ksp: PETSc.KSP) -> Iterator[PETSc.PC]:
    """The preconditioner of a KSP and all inside it."""
    return _preconditioners(ksp.getPC())


def _shortened(ksp: PETSc.KSP, outer: str) -> str:
    return (ksp.getOptionsPrefix() or "").removeprefix(outer)


def _walk(ksp: PETSc.KSP, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    """A KSP and all inside it, each with whether it is part of a multigrid cycle."""
    yield ksp, smooths
    yield from _walk_preconditioner(ksp.getPC(), smooths)


def _walk_preconditioner(pc: PETSc.PC, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    smooths = smooths or pc.getType() in _MULTIGRID
    for inside in parts(pc):
        yield from _walk(inside, smooths) if isinstance(inside, PETSc.KSP) else _walk_preconditioner(inside, smooths)


def _preconditioners(pc: PETSc.PC) -> Iterator[PETSc.PC]:
    """A preconditioner and all inside it."""
    inside = parts(pc)
    yield pc
    for part in inside:
        yield from _preconditioners(part.getPC() if isinstance(part, PETSc.KSP) else part)


def parts(pc: PETSc.PC) -> list:
    """The KSPs and preconditioners that a preconditioner is made of; none before they are made."""
    match pc.getType():
        case "ksp":
            return [pc.getKSP()]
        case "fieldsplit":
            # The blocks of a Schur complement are shared with the outer splits: each is listed once.
            return list({ksp.handle: ksp for ksp in [*_asked(pc.getFieldSplitSubKSP), *_asked(pc.getFieldSplitSchurGetSubKSP)]}.values())
        case "asm":
            return _asked(pc.getASMSubKSP)
        case "bjacobi":
            return _asked(pc.getBJacobiSubKSP)
        case "composite":
            return _of_composite(pc)
        case "python":
            # Firedrake's preconditioners keep theirs as attributes.
            context = pc.getPythonContext()
            return [] if context is None else [part for part in vars(context).values() if isinstance(part, (PETSc.KSP, PETSc.PC))]
        case kind if kind in _MULTIGRID:
            # Before it is set up there are no levels, and asking for a smoother would crash.
            return [pc.getMGSmoother(level) for level in range(max(pc.getMGLevels(), 0))]
    return []


def _asked(getter) -> list[PETSc.KSP]:
    try:
        return list(getter())
    except PETSc.Error:  # not set up yet, or another kind of split
        return []


def _of_composite(pc: PETSc.PC) -> list[PETSc.PC]:
    # petsc4py does not ask how many there are, and PETSc crashes where one is asked for and there is none.
    count = np.zeros(1, dtype=PETSc.IntType)
    _LIBRARY.PCCompositeGetNumberPC(ctypes.c_void_p(pc.handle), ctypes.c_void_p(count.ctypes.data))
    return [pc.getCompositePC(place) for place in range(count[0])]
