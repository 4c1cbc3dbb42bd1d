"""What to use, decided by a table of measurements: pure arithmetic, the same on all ranks.

What decides between a factorisation and truncated iterations is what a sample costs, forward and
backward, at the accuracy that a training needs. That is not known beforehand, but where it has been
measured, trainings ended with errors of the solver between 1 and 0.1 % (two to three digits), and
under a refinement most of the way there is gone with less. Iterations for d digits are about
proportional to d: a refinement that climbs evenly to three digits spends 1.5 digits a solve in the
mean, one that climbs at once 3, one that climbs to two digits between 1 and 2. So *two digits* is
what is planned for, and the least (one digit) and the most (three) say how sure that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prdp_fem.advice.measurement import Measurement

__all__ = ["DIGITS", "LEAST", "MOST", "NOISE", "SIMPLER", "Choice", "best", "choose", "simplest"]

# The digits that are planned for, and the least and the most that a training may need.
DIGITS, LEAST, MOST = 2, 1, 3
# Ratios of times within one run are good to this.
NOISE = 0.15
# What a factorisation may cost more than iterations, which leave an error, for it to be preferred.
SIMPLER = 0.2


@dataclass(frozen=True)
class Choice:
    """What to use.

    Attributes
    ----------
    chosen : Measurement
    other : Measurement or None
        The best of the other kind: with iterations where the chosen one factorises, and the other
        way round.
    is_sure : bool
        Whether it is the same for one digit as for three, and no matter of what is simpler.
    ratios : dict of int to float
        By digits, the cost of iterations over that of a factorisation.
    """

    chosen: Measurement
    other: Measurement | None
    is_sure: bool
    ratios: dict[int, float]


def best(table: Sequence[Measurement], digits: float, *, factorises: bool) -> Measurement | None:
    """What gives so many digits for the least; within noise the first in the table.

    Returns
    -------
    Measurement or None
        None where nothing of this kind does.
    """
    return simplest([row for row in table if row.factorises is factorises and row.digits >= digits])


def simplest(rows: Sequence[Measurement]) -> Measurement | None:
    """The cheapest row of the first method that costs no more than the cheapest, up to noise."""
    least: dict[str, Measurement] = {}
    for row in rows:
        if row.method not in least or row.cost < least[row.method].cost:
            least[row.method] = row
    if not least:
        return None
    bound = (1 + NOISE) * min(row.cost for row in least.values())
    return next(row for row in least.values() if row.cost <= bound)


def choose(table: Sequence[Measurement]) -> Choice | None:
    """The choice between all rows; None where nothing gives a digit.

    A factorisation is the simpler one: it has nothing to refine, and no error that a network could
    learn to make up for. It is chosen unless it costs a fifth more than iterations.
    """
    ratios = {}
    for digits in (LEAST, DIGITS, MOST):
        direct = best(table, digits, factorises=True)
        iterative = best(table, digits, factorises=False)
        if direct is not None:
            ratios[digits] = float("inf") if iterative is None else iterative.cost / direct.cost
    direct, iterative = (best(table, DIGITS, factorises=kind) for kind in (True, False))
    if direct is None and iterative is None:
        rows = [row for row in table if row.digits >= LEAST]
        found = simplest(rows)
        return None if found is None else Choice(found, None, False, ratios)
    if direct is None:
        assert iterative is not None
        return Choice(iterative, None, True, ratios)
    if ratios[DIGITS] * (1 + SIMPLER) < 1:
        assert iterative is not None
        return Choice(iterative, direct, ratios.get(MOST, 0.0) * (1 + SIMPLER) < 1, ratios)
    return Choice(direct, iterative, ratios[LEAST] >= 1, ratios)
