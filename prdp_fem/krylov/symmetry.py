"""Whether a KSP's operator, preconditioner and method are symmetric, or have a transpose."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from firedrake.petsc import PETSc

from prdp_fem.freshness import MEMORY, METHOD, Clock, Kept
from prdp_fem.krylov import nested
from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.petsc_types import ksp_facts
from prdp_fem.krylov.probe import Probe, has_python_blocks

__all__ = ["Symmetry"]


class Symmetry:
    """What is known of the symmetry of a KSP's system, found out when it is first asked for.

    To ask is collective.

    Parameters
    ----------
    refined : RefinedKSP
        The KSP has its operators and options.
    clock : Clock
    operator : sequence of hashable
        The sources of the operator's values, and of the method.

    Attributes
    ----------
    is_symmetric : Kept
        Whether the method asks for a symmetric system, and the operator is symmetric.
    has_symmetric_operator : Kept
        Whether the operator is symmetric as it is now.
    has_symmetric_parts : Kept
        Whether operator and preconditioner are symmetric, as they are now.
    is_transposable : Kept
        Whether method and preconditioner have a transpose, whatever values operators have.
    """

    def __init__(self, refined: RefinedKSP, clock: Clock, operator: Sequence[Hashable]):
        self._refined = refined
        self._ksp = refined.ksp
        self._clock = clock
        self._operator = operator
        self.is_symmetric = Kept(self._find_symmetric, clock, operator)
        self.has_symmetric_operator = Kept(self._find_symmetric_operator, clock, operator)
        self.has_symmetric_parts = Kept(self._find_symmetric_parts, clock, operator)
        self.is_transposable = Kept(self._find_transposable, clock, [MEMORY, METHOD])
        self._probe = Kept(self._make_probe, clock, [MEMORY])
        # When the system was found to be symmetric last; and after which changes it was once.
        self._found_at: int | None = None
        self._symmetric_after: Kept[set[frozenset]] = Kept(set, clock, [MEMORY, METHOD])

    def _make_probe(self) -> Probe:
        A, _ = self._ksp.getOperators()
        return Probe(A)

    def _find_symmetric(self) -> bool:
        # Where it was symmetric after a change of the same sources, it is taken for that again.
        now = self._clock.now
        before = self._found_at
        changed = self._clock.since(0 if before is None else before, self._operator)
        is_taken = before is not None and changed in self._symmetric_after.value
        found = is_taken or (
            ksp_facts(self._ksp.getType()).asks_for_symmetry and self.has_symmetric_operator.value
        )
        if found:
            self._symmetric_after.value.add(changed)
        self._found_at = now if found else None
        return found

    def _find_symmetric_operator(self) -> bool:
        A, _ = self._ksp.getOperators()
        return self._probe.value.finds_symmetric(A.mult)

    def _find_symmetric_parts(self) -> bool:
        pc = self._ksp.getPC()
        return self.has_symmetric_operator.value and self._probe.value.finds_symmetric(pc.apply)

    def _find_transposable(self) -> bool:
        return not self._is_refused() and self._is_found_by_trying()

    def _is_refused(self) -> bool:
        """Whether it has none for certain, or is not to be tried."""
        A, _ = self._ksp.getOperators()
        # With a coarse setting the transpose of what is inside may be none, whatever it is with the
        # setting of the moment.
        return (
            not ksp_facts(self._ksp.getType()).is_transposable
            or nested.has_truncated_inside(self._ksp)
            or nested.has_untransposable_inside(self._ksp)
            or has_python_blocks(A)
        )

    def _is_found_by_trying(self) -> bool:
        """Whether it is there: of a preconditioner PETSc does not tell otherwise."""
        A, P = self._ksp.getOperators()
        pc = self._ksp.getPC()
        probe = self._probe.value
        try:
            # A Python matrix may have no transposed product, or one that is none of its transpose.
            is_there = probe.finds_transposed_operator(A) and probe.finds_transposed(pc)
        except (PETSc.Error, AttributeError, NotImplementedError):
            is_there = False
            probe.keep_for_ever()
            self._probe.drop()
        if not is_there:
            # A failed try leaves its mark on the preconditioners inside.
            pc.reset()
            self._ksp.setOperators(A, P)
            self._ksp.setUp()
            self._refined.set_up()
        return is_there
