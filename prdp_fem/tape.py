"""The block by which a solve stands on pyadjoint's tape."""
from __future__ import annotations

import firedrake
import numpy as np
from firedrake import Cofunction, Constant, DirichletBC, Function
from pyadjoint import Block, get_working_tape
from ufl.formatting.ufl2unicode import ufl2unicode

from prdp_fem.firedrake_internals import extract_subfunction, maybe_disk_checkpoint
from prdp_fem.inputs import local_values, set_local_values
from prdp_fem.linear import LinearSystem
from prdp_fem.point import Point

__all__ = ["LinearSolveBlock"]


class LinearSolveBlock(Block):
    """One solve of a linear variational problem.

    Its dependencies are the inputs of the system, the boundary conditions, the meshes and, where the solve starts from
    one, the guess. Replay, adjoint and tangent use the system's KSP with the setting of the last evaluation.

    Parameters
    ----------
    system : LinearSystem
    problem : LinearVariationalProblem
        The user's.
    refinement : Refinement or None
        Asked for the setting at each evaluation of the functional.
    warm_start : bool
        Whether the solve starts from the values that the solution has.
    ad_block_tag : str or None
    """

    def __init__(self, system: LinearSystem, problem, refinement, *, warm_start: bool = False, ad_block_tag: str | None = None):
        super().__init__(ad_block_tag=ad_block_tag)
        self._system, self._problem, self._refinement, self._warm_start = system, problem, refinement, warm_start
        self._setting = None if refinement is None else refinement.setting
        self._tape = get_working_tape()
        self._evaluation = self._tape.recompute_count
        for entry in system.inputs:
            self.add_dependency(entry.original, no_duplicates=True)
        for condition in problem.bcs:
            self.add_dependency(condition, no_duplicates=True)
        for mesh in system.forms.meshes:
            self.add_dependency(mesh, no_duplicates=True)
        if warm_start:
            self.add_dependency(problem.u, no_duplicates=True)

    def __str__(self) -> str:
        return f"solve({ufl2unicode(self._problem.F)} = 0)"

    def _saved(self, original):
        for variable in self.get_dependencies():
            if variable.output is original:
                return variable.saved_output
        raise KeyError(original)

    def _point(self) -> Point:
        """Where this block is evaluated, from what the tape saved."""
        return Point(
            [local_values(self._saved(entry.original)) for entry in self._system.inputs],
            self._system.boundary_values([self._saved(condition) for condition in self._problem.bcs]),
            local_values(self._saved(self._problem.u)) if self._warm_start else None,
        )

    def _solution(self) -> np.ndarray:
        return local_values(self.get_outputs()[0].saved_output)

    # Replay

    def recompute_component(self, inputs, block_variable, idx, prepared):
        # A checkpointing schedule solves again within the same evaluation of the functional: with the same setting.
        count = self._tape.recompute_count
        if count != self._evaluation:
            self._evaluation = count
            self._setting = None if self._refinement is None else self._refinement.setting
        solution = Function(self._problem.u.function_space())
        values = local_values(solution)
        self._system.solve(self._point(), self._setting, values[None])
        return maybe_disk_checkpoint(_with_values(solution, values))

    # Adjoint

    def prepare_evaluate_adj(self, inputs, adj_inputs, relevant_dependencies):
        relevant = [variable.output for _, variable in relevant_dependencies]
        cotangent = local_values(adj_inputs[0])
        gradients = {index: np.empty((1, entry.size)) for index, entry in enumerate(self._system.inputs)
                     if any(entry.original is original for original in relevant)}
        boundary = np.empty((1, cotangent.size)) if any(isinstance(original, DirichletBC) for original in relevant) else None
        by_mesh = self._system.solve_adjoint(
            self._point(), self._setting, cotangent[None], self._solution()[None], gradients, boundary=boundary,
            meshes=[original for original in relevant if isinstance(original, firedrake.MeshGeometry)])
        return gradients, boundary, by_mesh

    def evaluate_adj_component(self, inputs, adj_inputs, block_variable, idx, prepared=None):
        gradients, boundary, by_mesh = prepared
        original = block_variable.output
        if isinstance(original, DirichletBC):
            return [self._boundary_cotangent(original, boundary[0])]
        if isinstance(original, firedrake.MeshGeometry):
            return by_mesh[original]
        for index, gradient in gradients.items():
            if self._system.inputs[index].original is original:
                return _with_values(_dual_zero(original), gradient[0])
        return None  # the guess: the solution of an implicit derivative does not depend on it

    def _boundary_cotangent(self, condition: DirichletBC, values: np.ndarray) -> DirichletBC:
        cotangent = _with_values(Function(self._problem.u.function_space()), values)
        for later in self._problem.bcs[self._problem.bcs.index(condition) + 1:]:
            later.zero(cotangent)  # where conditions overlap, the last one has given the value
        return condition.reconstruct(g=extract_subfunction(cotangent, condition.function_space()))

    # Tangent linear

    def evaluate_tlm_component(self, inputs, tlm_inputs, block_variable, idx, prepared=None):
        system, tangents, meshes, conditions = self._system, {}, {}, []
        for variable in self.get_dependencies():
            original, tangent = variable.output, variable.tlm_value
            if isinstance(original, DirichletBC):
                conditions.append(original.reconstruct(g=0) if tangent is None else tangent)
            elif tangent is None:
                continue
            elif isinstance(original, firedrake.MeshGeometry):
                meshes[original] = tangent
            else:
                tangents.update((index, local_values(tangent)) for index, entry in enumerate(system.inputs) if entry.original is original)
        boundary = system.boundary_values(conditions)
        out = Function(self._problem.u.function_space())
        values = local_values(out)
        system.solve_tangent(self._point(), self._setting, self._solution(), tangents, meshes, boundary, values)
        return _with_values(out, values)


def _with_values(coefficient, values: np.ndarray):
    set_local_values(coefficient, values)
    return coefficient


def _dual_zero(original):
    """Zero of the type that a derivative by a coefficient has."""
    if isinstance(original, Constant):
        return Constant(np.zeros(original.ufl_shape))
    if isinstance(original, Cofunction):
        return Function(original.function_space().dual())
    return Cofunction(original.function_space().dual())
