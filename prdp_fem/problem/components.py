"""The components of a solution: of a mixed space, of vectors, and of vectors in a mixed space."""

from __future__ import annotations

from firedrake import Function

from prdp_fem.problem.inputs import is_real_space

__all__ = ["components_of"]


def components_of(solution: Function) -> list[slice]:
    """The rank-local places of the dofs of each component, in the order of the PETSc vector.

    Components in a Real space are left out.
    """
    components = []
    start = 0
    rank = solution.function_space().mesh().comm.rank
    for part in solution.subfunctions:
        space = part.function_space()
        if is_real_space(space):
            start += part.dat.data_ro.size if rank == 0 else 0  # the first rank has them
            continue
        end = start + part.dat.data_ro.size
        block_size = space.block_size
        components += [slice(start + first, end, block_size) for first in range(block_size)]
        start = end
    return components
