"""How iterations are played backwards, from checkpoints."""

from __future__ import annotations

import math

from prdp_fem.unrolled.operator_cotangent import OperatorCotangent
from prdp_fem.unrolled.preconditioned_system import PreconditionedSystem
from prdp_fem.unrolled.trace import Trace, TracedScalar, TracedVector
from prdp_fem.unrolled.values import Values, Vector, VectorPool

__all__ = ["Backwards", "advance"]


class Backwards:
    """From the cotangent of an iterate those of right-hand side, guess and matrices.

    The iterations are made again, in stretches: the states where stretches begin are kept, and of
    the stretch that is played backwards all that this reads.

    Parameters
    ----------
    method : object
        One of :mod:`prdp_fem.unrolled.methods`.
    system : PreconditionedSystem
    pool : VectorPool
    checkpoints : int or None
        How many states are kept; None keeps all.
    """

    def __init__(
        self, method, system: PreconditionedSystem, pool: VectorPool, checkpoints: int | None
    ):
        self._method = method
        self._system = system
        self._pool = pool
        self._checkpoints = checkpoints

    def cotangents(
        self,
        right: Vector,
        start: Vector | None,
        iterations: int,
        cotangent: Vector,
        of_operator: OperatorCotangent | None,
        of_preconditioner: OperatorCotangent | None,
    ) -> list:
        """The cotangents of right-hand side and guess, each as a factor and a vector.

        Parameters
        ----------
        right : Vector
            The right-hand side.
        start : Vector or None
            The guess; None for zero, without a cotangent.
        iterations : int
        cotangent : Vector
            That of the iterate.
        of_operator, of_preconditioner : OperatorCotangent or None
            What the cotangents of the matrices are added to.
        """
        pool = self._pool
        method = self._method
        # What is linear in b and the guess keeps no vectors for their cotangents, so that
        # checkpoints would spare none.
        is_linear = method.is_linear and of_operator is None and of_preconditioner is None
        stretches, states = self._stretches(
            right, start, iterations, None if is_linear else self._checkpoints
        )
        # The cotangents of the state at the end of a stretch, from the stretch that follows it.
        bars: list = []
        lifted: tuple
        for number in reversed(range(len(stretches))):
            on = Trace(self._system, pool, of_operator, of_preconditioner, is_linear)
            if number == 0:
                lifted = on.lifted(right), None if start is None else on.lifted(start)
                state = method.initial(on, *lifted)
            else:
                lifted = tuple(None if part is None else on.lifted(part) for part in states.pop())
                state = lifted
            state = advance(on, method, state, stretches[number])
            if number == len(stretches) - 1:
                solution = method.solution(on, state)
                if solution is not None:
                    solution.cotangent.add(1.0, cotangent, pool)
                del solution
            _add_cotangents(state, bars, pool)
            # What nobody holds any more is let go of on the way back.
            del state
            on.play_backwards()
            bars = [_cotangent(part, pool) for part in lifted]
        return bars

    def _stretches(
        self, b: Vector, guess: Vector | None, iterations: int, checkpoints: int | None
    ) -> tuple[list[list[int]], list[tuple]]:
        """The steps between checkpoints, and the states where each stretch but the first begins."""
        method = self._method
        steps = method.steps(iterations)
        if checkpoints is None or len(steps) <= 1:
            return [steps], []
        length = math.ceil(len(steps) / (checkpoints + 1))
        stretches = [steps[i : i + length] for i in range(0, len(steps), length)]
        on = Values(self._system, self._pool)
        state = method.initial(on, b, guess)
        states = []
        for stretch in stretches[:-1]:
            state = advance(on, method, state, stretch)
            states.append(state)
        return stretches, states


def advance(on, method, state: tuple, steps: list[int]) -> tuple:
    """The state after steps of a method, or where that ends with what it has."""
    for iterations in steps:
        following = method.advance(on, state, iterations)
        if following is state:
            break
        state = following
    return state


def _add_cotangents(state: tuple, bars: list, pool: VectorPool) -> None:
    """Add to the cotangents of a state those from the stretch that follows."""
    for part, bar in zip(state, bars):
        if isinstance(part, TracedVector):
            if bar[1] is not None:
                part.cotangent.add(bar[0], bar[1], pool)
        elif isinstance(part, TracedScalar):
            part.cotangent = part.cotangent + bar


def _cotangent(part: TracedVector | TracedScalar | None, pool: VectorPool):
    """Of a part of a state: a factor and a vector, or a number."""
    if part is None:
        return None
    return part.cotangent.total(pool) if isinstance(part, TracedVector) else part.cotangent
