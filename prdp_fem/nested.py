"""The KSPs inside a KSP: in the preconditioner, in what that is made of, and so on."""
from __future__ import annotations

from collections.abc import Iterator

from firedrake.petsc import PETSc

__all__ = ["find_iterative", "needs_set_up"]

# Inside these there may be an iteration, which is known only once they are set up.
_NESTING = frozenset({"fieldsplit", "ksp", "composite", "python", "asm", "bjacobi"})
_MULTIGRID = frozenset({"mg", "gamg", "hmg"})


def _is_direct(ksp: PETSc.KSP) -> bool:
    """Whether a KSP only applies its preconditioner."""
    return ksp.getType() in (PETSc.KSP.Type.PREONLY, PETSc.KSP.Type.NONE)


def needs_set_up(ksp: PETSc.KSP, prefix: str | None = None) -> bool:
    """Whether :func:`find_iterative` can only tell once the preconditioner is set up."""
    kind = ksp.getPC().getType()
    return prefix is not None or kind in _NESTING or (_is_direct(ksp) and kind in _MULTIGRID)


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
    iterative = [(nested, smooths) for nested, smooths in found if not _is_direct(nested)]
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
    return candidates[0]


def _shortened(ksp: PETSc.KSP, outer: str) -> str:
    return (ksp.getOptionsPrefix() or "").removeprefix(outer)


def _walk(ksp: PETSc.KSP, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    """A KSP and all inside it, each with whether it is part of a multigrid cycle."""
    yield ksp, smooths
    yield from _walk_preconditioner(ksp.getPC(), smooths)


def _walk_preconditioner(pc: PETSc.PC, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    match pc.getType():
        case "ksp":
            inside = [pc.getKSP()]
        case "fieldsplit":
            # The blocks of a Schur complement are shared with the outer splits: each is listed once.
            inside = _unique([*pc.getFieldSplitSubKSP(), *_schur_blocks(pc)])
        case "asm":
            inside = pc.getASMSubKSP()
        case "bjacobi":
            inside = pc.getBJacobiSubKSP()
        case kind if kind in _MULTIGRID:
            # Before it is set up there are no levels, and asking for a smoother would crash.
            inside, smooths = [pc.getMGSmoother(level) for level in range(max(pc.getMGLevels(), 0))], True
        case "composite":
            yield from _walk_composite(pc, smooths)
            return
        case "python":
            # Firedrake's preconditioners keep theirs as attributes.
            for attribute in vars(pc.getPythonContext()).values():
                if isinstance(attribute, PETSc.KSP):
                    yield from _walk(attribute, smooths)
                elif isinstance(attribute, PETSc.PC):
                    yield from _walk_preconditioner(attribute, smooths)
            return
        case _:
            return
    for nested in inside:
        yield from _walk(nested, smooths)


def _schur_blocks(pc: PETSc.PC) -> list[PETSc.KSP]:
    try:
        return pc.getFieldSplitSchurGetSubKSP()
    except PETSc.Error:  # another kind of split
        return []


def _unique(ksps: list[PETSc.KSP]) -> list[PETSc.KSP]:
    return list({ksp.handle: ksp for ksp in ksps}.values())


def _walk_composite(pc: PETSc.PC, smooths: bool) -> Iterator[tuple[PETSc.KSP, bool]]:
    index = 0
    while True:
        try:
            part = pc.getCompositePC(index)
        except PETSc.Error:
            return
        yield from _walk_preconditioner(part, smooths)
        index += 1
