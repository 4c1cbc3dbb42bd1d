"""A functional of the solution and of coefficients, and its derivatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import ufl
from firedrake import Cofunction, Function
from firedrake.assemble import get_assembler
from pyadjoint.tape import stop_annotating

from prdp_fem.problem.firedrake_internals import pin_quadrature
from prdp_fem.problem.forms import assembled_values, derivative_of, integration_meshes
from prdp_fem.problem.inputs import Input, coefficients_of, local_values, set_local_values

__all__ = ["Functional"]


class Functional:
    """A number for each solution.

    Parameters
    ----------
    form : ufl.Form
        Without arguments, over the user's solution and coefficients.
    solution : Function
        The user's.

    Attributes
    ----------
    inputs : list of Input
        The coefficients, the solution apart.
    comm : mpi4py.MPI.Comm

    Raises
    ------
    ValueError
        For a form with arguments.
    TypeError
        Where UFL cannot differentiate it by the solution.
    """

    def __init__(self, form: ufl.Form, solution: Function):
        if form.arguments():
            raise ValueError(
                "a functional must be a form without test or trial functions, found one with"
                f" {len(form.arguments())}"
            )
        with stop_annotating():
            self.comm = solution.function_space().mesh().comm
            self._solution = Function(solution.function_space(), name=solution.name())
            self.inputs = [
                Input(original, integration_meshes(form))
                for original in coefficients_of(form)
                if original is not solution
            ]
            copies = {entry.original: entry.copy for entry in self.inputs}
            form = pin_quadrature(ufl.replace(form, {**copies, solution: self._solution}), None)
            for entry in self.inputs:
                form = entry.in_variables(form)
            self._form = form
            self._assembler = get_assembler(form)
            self._assemblers: dict[int | None, list[tuple]] = {
                None: [self._derivative_assembler(self._solution)]
            }

    @property
    def name(self) -> str:
        """What messages call it."""
        return f"a functional of '{self._solution.name()}'"

    def find(self, original) -> int | None:
        """The place of a user's coefficient among the inputs; None where it is none."""
        return next(
            (index for index, entry in enumerate(self.inputs) if entry.original is original), None
        )

    def others(self, places: Sequence[int]) -> dict[int, np.ndarray]:
        """The present values of the inputs, to be read only, apart from those at some places."""
        return {
            index: entry.present_values()
            for index, entry in enumerate(self.inputs)
            if index not in places
        }

    def _derivative_assembler(self, variable: Function) -> tuple:
        form = derivative_of(self._form, variable, what="functional")
        return None if form.empty() else get_assembler(form), Cofunction(
            variable.function_space().dual()
        )

    def _at(self, solution: np.ndarray, values: Mapping[int, np.ndarray]) -> None:
        for index, entry in enumerate(self.inputs):
            entry.write(values[index] if index in values else local_values(entry.original))
        set_local_values(self._solution, solution)

    def value(self, solution: np.ndarray, values: Mapping[int, np.ndarray]) -> float:
        """The functional; the same on all ranks.

        Parameters
        ----------
        solution : numpy.ndarray
            Rank-local dofs.
        values : Mapping of int to numpy.ndarray
            Rank-local values of inputs, where they are not the user's.
        """
        with stop_annotating():
            self._at(solution, values)
            return float(self._assembler.assemble())

    def gradients(
        self, solution: np.ndarray, values: Mapping[int, np.ndarray], by: list
    ) -> list[np.ndarray]:
        """Its derivatives, rank-local, by inputs (their places) and by the solution (None)."""
        with stop_annotating():
            self._at(solution, values)
            return [self._gradient(index) for index in by]

    def _gradient(self, index: int | None) -> np.ndarray:
        values = assembled_values(self._assemblers_by(index))
        return values if index is None else self.inputs[index].summed(values)

    def _assemblers_by(self, index: int | None) -> list[tuple]:
        if index is not None and index not in self._assemblers:
            self._assemblers[index] = [
                self._derivative_assembler(variable) for variable in self.inputs[index].variables
            ]
        return self._assemblers[index]
