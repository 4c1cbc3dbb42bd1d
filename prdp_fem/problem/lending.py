"""A user's own code inside a solver, such as a preconditioner, finds what a solve is made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext

from firedrake import Function

from prdp_fem.problem.firedrake_internals import call_before_jacobian
from prdp_fem.problem.forms import Forms
from prdp_fem.problem.inputs import Input, local_values, set_local_values

__all__ = ["Lending"]


class Lending:
    """Lends a user's coefficients, for the time of a solve, the values that this is made with.

    Parameters
    ----------
    forms : Forms

    Attributes
    ----------
    serves : bool
        Whether there is code of a user's; what else it reads, nobody knows.
    lends : bool
        Whether there is something to lend.
    """

    def __init__(self, forms: Forms):
        self._forms = forms
        self._solvers: list = []
        self._lent: list[Input] = []
        self._solution: Function | None = None
        self.serves = self.lends = False

    def serve(self, named: Sequence, solution: Function) -> None:
        """Have code of a user's find what a solve is made with.

        Parameters
        ----------
        named : sequence
            The user's objects that the code finds by itself.
        solution : Function
            The user's.
        """
        self.serves = True
        self._lent = [
            entry for entry in self._forms.inputs if any(entry.original is other for other in named)
        ]
        if self._forms.operator_depends_on_solution and any(solution is other for other in named):
            self._solution = solution
            for solver in self._solvers:
                self._have_state_followed(solver)
        self.lends = bool(self._lent) or self._solution is not None

    def to(self, solver) -> None:
        """Lend to what is inside a solver of Firedrake's."""
        self._solvers.append(solver)
        if self._solution is not None:
            self._have_state_followed(solver)

    def _have_state_followed(self, solver) -> None:
        """Have the user's solution be the state wherever operators are assembled."""
        call_before_jacobian(
            solver,
            lambda state: set_local_values(self._solution, local_values(self._forms.solution)),
        )

    @contextmanager
    def inside(self, context: Callable | None):
        """Inside, a user's objects have the values that a solve is made with."""
        users = None if self._solution is None else local_values(self._solution)
        for entry in self._lent:
            entry.lend()
        try:
            with nullcontext() if context is None else context():
                yield
        finally:
            for entry in self._lent:
                entry.take_back()
            if users is not None:
                set_local_values(self._solution, users)
