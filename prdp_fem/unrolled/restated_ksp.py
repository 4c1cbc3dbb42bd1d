"""A KSP as it is set, stated again: its method, and the system that this works on."""

from __future__ import annotations

from collections.abc import Mapping

from firedrake.petsc import PETSc

from prdp_fem.krylov.nested import krylov_method_inside
from prdp_fem.krylov.petsc_types import KSP_TYPES, listed, pc_facts, types_with
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem
from prdp_fem.unrolled.registry import Entry, KSPAsSet, unrolled_methods
from prdp_fem.unrolled.values import Vector, VectorPool

__all__ = ["RestatedKSP", "entry_of"]


class RestatedKSP:
    """What states a KSP again.

    Parameters
    ----------
    ksp : PETSc.KSP
        It has its operators, and is set up if it is not.
    options : mapping or None
        Options of the KSP, without prefix, that PETSc's own may have lost.

    Attributes
    ----------
    entry : Entry
        That of its type.
    method : Iteration
    system : PreconditionedSystem
    pool : VectorPool
        Vectors of the layout of the iterates.

    Raises
    ------
    ValueError
        For what cannot be unrolled.
    """

    def __init__(self, ksp: PETSc.KSP, options: Mapping | None):
        ksp.setUp()
        self.entry = entry_of(ksp)
        self.method = _method_of(self.entry, KSPAsSet(ksp, options))
        A, _ = ksp.getOperators()
        self.pool = VectorPool(A.createVecRight)
        self.system = PreconditionedSystem(ksp, options)

    def refresh(self, symmetric: bool | None) -> None:
        """To be called before each use; see :meth:`UnrolledKSP.prepare`."""
        self.system.refresh(bool(symmetric))
        if symmetric is False:
            self.system.preconditioner.require_transpose()

    def right_hand_side(self, b: PETSc.Vec) -> Vector:
        """What the method is given for a right-hand side, or for a tangent of one."""
        if not self.system.has_left_null_space:
            return Vector(b)
        projected = self.pool.take()
        b.copy(projected.vec)
        self.system.project_right_hand_side(projected.vec)
        return projected

    def zero(self) -> Vector:
        """A vector of zeros."""
        zero = self.pool.take()
        zero.vec.zeroEntries()
        return zero


def entry_of(ksp: PETSc.KSP) -> Entry:
    """What states a KSP again."""
    entry = unrolled_methods.find(ksp)
    if entry is None:
        known = ", ".join(entry.name for entry in unrolled_methods)
        raise ValueError(
            f"ksp_type {ksp.getType()} has no unrolled derivative: use one of "
            f"{known}, or implicit differentiation"
        )
    return entry


def _method_of(entry: Entry, found: KSPAsSet):
    """The method of a KSP that is set up, as it is set."""
    ksp = found.ksp
    if ksp.getInitialGuessKnoll():
        raise ValueError(
            "ksp_knoll makes a guess of the right-hand side: unrolled differentiation needs to be "
            "given the guess"
        )
    if "diagonally scaled" in found.text:
        raise ValueError(
            "ksp_diagonal_scale changes the operator for the time of a solve, which is not "
            "unrolled: use pc_type jacobi"
        )
    kind = ksp.getPC().getType()
    if pc_facts(kind).changes_system:
        raise ValueError(
            f"pc_type {kind} changes the system for the time of a solve, which is not unrolled: "
            "use pc_type sor"
        )
    inner = krylov_method_inside(ksp)
    if inner is not None:
        raise ValueError(
            f"there is a {inner} inside the preconditioner, which is not linear then, and cannot "
            "be unrolled: use implicit differentiation, or "
            f"{listed(types_with(KSP_TYPES, 'is_linear'))} there"
        )
    return entry.restated.of(found)
