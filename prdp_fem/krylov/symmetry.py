"""Whether a KSP's operator, preconditioner and method are symmetric, or have a transpose."""
from __future__ import annotations

from firedrake.petsc import PETSc

from prdp_fem.krylov import nested
from prdp_fem.krylov.ksp import RefinedKSP
from prdp_fem.krylov.petsc_types import ksp_facts
from prdp_fem.krylov.probe import Probe, has_python_blocks

__all__ = ["Symmetry"]


class Symmetry:
    """What is known of the symmetry of a KSP's system, found out when it is first asked for.

    All methods that tell something are collective.

    Parameters
    ----------
    refined : RefinedKSP
        The KSP has its operators and options.
    """

    def __init__(self, refined: RefinedKSP):
        self._refined = refined
        self._ksp = refined.ksp
        self.forget()

    def forget(self) -> None:
        """To be called where operators are other matrices from now on."""
        self._probe: Probe | None = None
        self._transposable: bool | None = None
        self._symmetric: bool | None = None
        self._symmetric_after: set[frozenset] = set()
        self._has_symmetric_operator: bool | None = None
        self._has_symmetric_parts: bool | None = None
        self._changed: frozenset = frozenset()

    def operator_changed(self, inputs: frozenset) -> None:
        """Forget what was known of the operator's values.

        Parameters
        ----------
        inputs : frozenset
            What it depends on that has changed. Where it was symmetric after a change of the same,
            it is taken for symmetric again.
        """
        if not (self._symmetric and inputs in self._symmetric_after):
            self._changed = inputs if self._symmetric is not None else self._changed | inputs
            self._symmetric = None
        self._has_symmetric_operator = None
        self._has_symmetric_parts = None

    def is_symmetric(self) -> bool:
        """Whether the method asks for a symmetric system, and the operator is symmetric."""
        if self._symmetric is None:
            self._symmetric = (ksp_facts(self._ksp.getType()).asks_for_symmetry
                               and self.has_symmetric_operator())
            if self._symmetric:
                self._symmetric_after.add(self._changed)
        return self._symmetric

    def has_symmetric_operator(self) -> bool:
        """Whether the operator is symmetric as it is now."""
        if self._has_symmetric_operator is None:
            A, _ = self._ksp.getOperators()
            self._has_symmetric_operator = self._vectors().finds_symmetric(A.mult)
        return self._has_symmetric_operator

    def has_symmetric_parts(self) -> bool:
        """Whether operator and preconditioner are symmetric, as they are now."""
        if self._has_symmetric_parts is None:
            pc = self._ksp.getPC()
            self._has_symmetric_parts = (self.has_symmetric_operator()
                                         and self._vectors().finds_symmetric(pc.apply))
        return self._has_symmetric_parts

    def is_transposable(self) -> bool:
        """Whether method and preconditioner have a transpose."""
        if self._transposable is None:
            self._transposable = not self._is_refused() and self._is_found_by_trying()
        return self._transposable

    def _is_refused(self) -> bool:
        """Whether it has none for certain, or is not to be tried."""
        A, _ = self._ksp.getOperators()
        # With a coarse setting the transpose of what is inside may be none, whatever it is with the
        # setting of the moment.
        return (not ksp_facts(self._ksp.getType()).is_transposable
                or nested.has_truncated_inside(self._ksp)
                or nested.has_untransposable_inside(self._ksp)
                or has_python_blocks(A))

    def _is_found_by_trying(self) -> bool:
        """Whether it is there: of a preconditioner PETSc does not tell otherwise."""
        A, P = self._ksp.getOperators()
        pc = self._ksp.getPC()
        probe = self._vectors()
        try:
            # A Python matrix may have no transposed product, or one that is none of its transpose.
            is_there = probe.finds_transposed_operator(A) and probe.finds_transposed(pc)
        except (PETSc.Error, AttributeError, NotImplementedError):
            is_there = False
            probe.keep_for_ever()
            self._probe = None
        if not is_there:
            # A failed try leaves its mark on the preconditioners inside.
            pc.reset()
            self._ksp.setOperators(A, P)
            self._ksp.setUp()
            self._refined.set_up()
        return is_there

    def _vectors(self) -> Probe:
        if self._probe is None:
            A, _ = self._ksp.getOperators()
            self._probe = Probe(A)
        return self._probe
