"""The KSPs inside a KSP: in the preconditioner, in what that is made of, and so on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
from firedrake.petsc import PETSc

from prdp_fem.krylov.petsc_types import ksp_facts, pc_facts
from prdp_fem.krylov.view import described

__all__ = [
    "all_inside",
    "all_preconditioners",
    "applies_factorisation",
    "find_iterative",
    "has_factorisation",
    "has_failed_inside",
    "has_memory_inside",
    "has_truncated_inside",
    "has_untransposable_inside",
    "is_direct",
    "is_self_contained",
    "krylov_method_inside",
    "needs_set_up",
    "parts",
    "set_up_inside",
    "solves_directly",
]

_LIBRARY = ctypes.CDLL(PETSc.__file__)


def is_direct(ksp: PETSc.KSP) -> bool:
    """Whether a KSP only applies its preconditioner."""
    return ksp_facts(ksp.getType()).only_applies_preconditioner


def is_self_contained(ksp: PETSc.KSP) -> bool:
    """Whether the preconditioner of a KSP is made from a matrix alone, with nothing inside."""
    return pc_facts(ksp.getPC().getType()).is_self_contained


def needs_set_up(ksp: PETSc.KSP, prefix: str | None = None) -> bool:
    """Whether :func:`find_iterative` can only tell once the preconditioner is set up."""
    if prefix == "" and not is_direct(ksp):
        return False  # the KSP itself
    facts = pc_facts(ksp.getPC().getType())
    return prefix is not None or facts.nests or (is_direct(ksp) and facts.is_multigrid)


def find_iterative(ksp: PETSc.KSP, prefix: str | None = None) -> PETSc.KSP:
    """The KSP, of this one and all inside it, that iterates.

    Parameters
    ----------
    ksp : PETSc.KSP
        It is set up, where :func:`needs_set_up` says so.
    prefix : str or None
        The options prefix of the KSP wanted, all of it or what follows the prefix of ``ksp`` ("" is
        ``ksp`` itself). None where there is only one; then smoothers, whose iterations are part of
        a multigrid cycle, do not count.

    Raises
    ------
    ValueError
        Where there is none, or more than one.
    """
    outer = ksp.getOptionsPrefix() or ""
    iterative = [
        (nested, smooths) for nested, smooths in _walk(ksp, False) if not is_direct(nested)
    ]
    listing = ", ".join(
        f"'{_shortened(nested, outer)}' (ksp_type {nested.getType()})" for nested, _ in iterative
    )
    if prefix is not None:
        return _named(prefix, outer, [nested for nested, _ in iterative], listing)
    candidates = [nested for nested, smooths in iterative if not smooths]
    if len(candidates) > 1:
        raise ValueError(
            "more than one KSP iterates, so say which of them follows the refinement: "
            f"ksp_prefix=… is one of {listing}"
        )
    if not candidates:
        raise ValueError(_no_iterations(ksp, listing))
    (found,) = candidates
    if ksp_facts(found.getType()).remembers_solves:
        raise ValueError(
            f"ksp_type {found.getType()} keeps vectors of earlier solves, so that a truncated "
            "solve would not be a function of its inputs: use gmres, fgmres or bcgs"
        )
    return found


def _named(prefix: str, outer: str, iterative: list[PETSc.KSP], listing: str) -> PETSc.KSP:
    """The KSP with an options prefix."""
    for ksp in iterative:
        if (ksp.getOptionsPrefix() or "") in (prefix, outer + prefix):
            return ksp
    known = f"; there are {listing}" if listing else ""
    raise ValueError(f"there is no iterative KSP with the options prefix '{prefix}'{known}")


def _no_iterations(ksp: PETSc.KSP, smoothers: str) -> str:
    """What to say of a solver that makes no iterations, and is to be refined."""
    others = f"; smoothers can be refined by ksp_prefix=…: {smoothers}" if smoothers else ""
    return (
        f"the solver only applies its preconditioner (ksp_type {ksp.getType()} with pc_type "
        f"{ksp.getPC().getType()}), so there are no iterations to refine: choose an iterative "
        'method, for example solver_parameters={"ksp_type": "cg", "pc_type": "jacobi"} for a '
        'symmetric problem or {"ksp_type": "gmres", "pc_type": "jacobi"} for any other, or '
        f"leave refinement away{others}"
    )


def solves_directly(ksp: PETSc.KSP) -> bool:
    """Whether a KSP applies the inverse of its operator, and has nothing that could be refined."""
    pc = ksp.getPC()
    return is_direct(ksp) and (pc_facts(pc.getType()).inverts or _is_factorisation(pc))


def applies_factorisation(ksp: PETSc.KSP) -> bool:
    """Whether all that a KSP does is to apply a factorisation of its operator."""
    return is_direct(ksp) and has_factorisation(ksp)


def has_factorisation(ksp: PETSc.KSP) -> bool:
    """Whether the preconditioner of a KSP is a factorisation of its operator."""
    A, P = ksp.getOperators()
    return A.handle == P.handle and _is_factorisation(ksp.getPC())


def _is_factorisation(pc: PETSc.PC) -> bool:
    kind = pc.getType()
    if pc_facts(kind).factorises:
        return True
    if kind not in (PETSc.PC.Type.KSP, PETSc.PC.Type.PYTHON):
        return False
    # Such as Firedrake's AssembledPC, that assembles the operator and has one of it inside.
    inside = parts(pc)
    if len(inside) != 1:
        return False
    (part,) = inside
    return _is_factorisation(part) if isinstance(part, PETSc.PC) else applies_factorisation(part)


def has_truncated_inside(ksp: PETSc.KSP) -> bool:
    """Whether an iteration in the preconditioner makes it another one with each setting."""
    return any(
        not smooths and not is_direct(nested)
        for nested, smooths in _walk_preconditioner(ksp.getPC(), False)
    )


def krylov_method_inside(ksp: PETSc.KSP) -> str | None:
    """The method in the preconditioner that makes it another map of each vector, or None.

    Collective: whether Richardson's iteration scales itself, PETSc tells only in its view.
    """
    for nested, _ in _walk_preconditioner(ksp.getPC(), False):
        kind = nested.getType()
        if not ksp_facts(kind).is_linear:
            return kind
        if kind == PETSc.KSP.Type.RICHARDSON and "self-scale" in described(nested):
            return f"self-scaled {kind}"
    return None


def has_memory_inside(ksp: PETSc.KSP) -> bool:
    """Whether a preconditioner in a KSP keeps something of the values it was first set up with."""
    return any(pc_facts(pc.getType()).remembers_values for pc in all_preconditioners(ksp))


def has_untransposable_inside(ksp: PETSc.KSP) -> bool:
    """Whether there is a preconditioner in a KSP that PETSc refuses to apply transposed."""
    return any(
        pc_facts(pc.getType()).needs_symmetry_to_transpose
        and pc.getOperators()[1].isSymmetricKnown() != (True, True)
        for pc in all_preconditioners(ksp)
    )


def has_failed_inside(ksp: PETSc.KSP) -> bool:
    """Whether a preconditioner in a KSP has noted, on this rank, that it cannot be set up."""
    return any(pc.getFailedReason() != 0 for pc in all_preconditioners(ksp))


def all_inside(ksp: PETSc.KSP) -> list[PETSc.KSP]:
    """A KSP and all inside it."""
    return [inside for inside, _ in _walk(ksp, False)]


def all_preconditioners(ksp: PETSc.KSP) -> Iterator[PETSc.PC]:
    """The preconditioner of a KSP and all inside it."""
    return _preconditioners(ksp.getPC())


def set_up_inside(pc: PETSc.PC) -> bool:
    """Have set up what objects of Python have inside a preconditioner that is set up. Collective.

    PETSc knows nothing of it, and most of it is set up when it is used first, in a context that
    only the object knows: until then nobody can tell what is inside that.

    Returns
    -------
    bool
        Whether there is such an object.
    """
    kinds = (inside.getType() for inside in _preconditioners(pc))
    is_wanted = PETSc.PC.Type.PYTHON in kinds
    if is_wanted:
        zero, product = pc.getOperators()[1].createVecs()
        pc.apply(zero, product)
    return is_wanted


def _shortened(ksp: PETSc.KSP, outer: str) -> str:
    return (ksp.getOptionsPrefix() or "").removeprefix(outer)


def _walk(ksp: PETSc.KSP, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    """A KSP and all inside it, each with whether it is part of a multigrid cycle."""
    yield ksp, smooths
    yield from _walk_preconditioner(ksp.getPC(), smooths)


def _walk_preconditioner(pc: PETSc.PC, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    smooths = smooths or pc_facts(pc.getType()).is_multigrid
    for inside in parts(pc):
        walk = _walk if isinstance(inside, PETSc.KSP) else _walk_preconditioner
        yield from walk(inside, smooths)


def _preconditioners(pc: PETSc.PC) -> Iterator[PETSc.PC]:
    """A preconditioner and all inside it."""
    inside = parts(pc)
    yield pc
    for part in inside:
        yield from _preconditioners(part.getPC() if isinstance(part, PETSc.KSP) else part)


def parts(pc: PETSc.PC) -> list[PETSc.KSP | PETSc.PC]:
    """What a preconditioner is made of; nothing before that is made, or where nobody can ask."""
    kind = pc.getType()
    facts = pc_facts(kind)
    if facts.is_multigrid:
        return _smoothers(pc)
    return _PARTS[kind](pc) if facts.nests else []


def _smoothers(pc: PETSc.PC) -> list[PETSc.KSP]:
    # Before it is set up there are no levels, and asking for a smoother would crash.
    return [pc.getMGSmoother(level) for level in range(max(pc.getMGLevels(), 0))]


def _splits(pc: PETSc.PC) -> list[PETSc.KSP]:
    found = [*_asked(pc.getFieldSplitSubKSP), *_asked(pc.getFieldSplitSchurGetSubKSP)]
    # The blocks of a Schur complement are shared with the outer splits: each is listed once.
    return list({ksp.handle: ksp for ksp in found}.values())


def _attributes(pc: PETSc.PC) -> list[PETSc.KSP | PETSc.PC]:
    """What an object of Python has; Firedrake's preconditioners keep theirs as attributes."""
    context = pc.getPythonContext()
    if context is None:
        return []
    return [part for part in vars(context).values() if isinstance(part, (PETSc.KSP, PETSc.PC))]


def _asked(getter: Callable) -> list[PETSc.KSP]:
    try:
        return list(getter())
    except PETSc.Error:  # not set up yet, or another kind of split
        return []


def _summands(pc: PETSc.PC) -> list[PETSc.PC]:
    # petsc4py does not ask how many there are, and PETSc crashes where one is asked for and there
    # is none.
    count = np.zeros(1, dtype=PETSc.IntType)
    _LIBRARY.PCCompositeGetNumberPC(ctypes.c_void_p(pc.handle), ctypes.c_void_p(count.ctypes.data))
    return [pc.getCompositePC(place) for place in range(count[0])]


# How the types that nest are asked for what is inside.
_PARTS: dict[str, Callable[[PETSc.PC], list]] = {
    "ksp": lambda pc: [pc.getKSP()],
    "fieldsplit": _splits,
    "asm": lambda pc: _asked(pc.getASMSubKSP),
    "bjacobi": lambda pc: _asked(pc.getBJacobiSubKSP),
    "composite": _summands,
    "python": _attributes,
}
