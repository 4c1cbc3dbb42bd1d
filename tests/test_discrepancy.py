"""Refine while a finer setting would tell another metric: against metrics worked out by hand."""

import json
import math

import pytest
from mpi4py import MPI

from prdp_fem.refinement import (
    DiscrepancyRefinement,
    FixedRefinement,
    GeometricLadder,
    IterationLadder,
    Iterations,
    NewtonLadder,
    NewtonSteps,
    ProgressiveRefinement,
    Tolerance,
    ToleranceLadder,
)


def metrics_of(refinement, errors, seen=None):
    """A validation: what an error is at so many iterations."""

    def validate():
        iterations = refinement.setting.iterations
        if seen is not None:
            seen.append(iterations)
        return errors(iterations) if callable(errors) else errors[iterations]

    return validate


def test_it_refines_while_the_two_differ():
    refinement = DiscrepancyRefinement([1, 2, 4, 8], gap=0.25)
    seen = []
    # relative to the finer one: 1/2, 1/4, none, none
    validate = metrics_of(refinement, {1: 12.0, 2: 8.0, 4: 6.4, 8: 6.4}, seen)
    assert [refinement.step(validate) for _ in range(3)] == [True, False, False]
    assert seen == [1, 2, 2, 4, 2, 4]
    assert [record.metric for record in refinement.history] == [12.0, 8.0, 8.0]
    assert [record.level for record in refinement.history] == [0, 1, 1]
    # also where the finer one is the worse
    validate = metrics_of(refinement, {2: 3.0, 4: 6.0, 8: 6.4})
    assert [refinement.step(validate) for _ in range(2)] == [True, False]


def test_nothing_is_finer_than_the_last_level():
    refinement, seen = DiscrepancyRefinement([3, 7]), []
    refinement.level = 1
    assert refinement.finer_level == 1
    assert refinement.step(metrics_of(refinement, {7: 1.0}, seen)) is False and seen == [7]


@pytest.mark.parametrize(
    "ladder, level, finer",
    [
        (GeometricLadder(), 0, Iterations(2)),
        (GeometricLadder(), 3, Iterations(8)),  # of 4
        (GeometricLadder(), 9, Iterations(66)),  # of 33
        (IterationLadder(), 9, Iterations(20)),  # of 10, on a ladder without an end
        (IterationLadder(stop=12), 9, Iterations(12)),
        ([5, 40, 80], 0, Iterations(40)),  # the next one at least
        (ToleranceLadder(), 2, Tolerance(0.1 * 0.1**3)),  # of unknown work
        ([Iterations(5), Tolerance(1e-3), Tolerance(1e-6)], 0, Tolerance(1e-3)),
        (NewtonLadder(stop=9), 2, NewtonSteps(6)),
        (
            NewtonLadder(stop=3, linear=[4, 6, 10, 20]),
            0,
            NewtonSteps(2, Iterations(6)),
        ),
        (NewtonLadder(stop=1, linear=[4, 6, 8, 10]), 0, NewtonSteps(1, Iterations(8))),
    ],
)
def test_finer_is_what_has_up_to_twice_the_work(ladder, level, finer):
    refinement = DiscrepancyRefinement(ladder)
    refinement.level = level
    assert refinement.ladder[refinement.finer_level] == finer


def test_a_plateau_is_no_reason():
    """PRDP goes up where a metric stands still, and this rule where it is wrong."""
    rule, prdp = DiscrepancyRefinement(), ProgressiveRefinement()
    for _ in range(50):
        assert rule.step(metrics_of(rule, lambda iterations: 3.0)) is False
        prdp.step(3.0)
    assert (rule.level, prdp.level) == (0, 1)
    # solves that end at the floor of their rounding are the same with a larger budget
    assert not rule.step(metrics_of(rule, lambda iterations: 2.0 + 1e-9 * min(iterations, 5)))


def test_a_metric_that_converges_is_followed_until_it_has():
    refinement = DiscrepancyRefinement(gap=0.01)
    while refinement.step(metrics_of(refinement, lambda iterations: 1 + 0.5**iterations)):
        pass
    # 1 + 2**-6 is 1.6 % off 1 + 2**-11, and 1 + 2**-8 0.4 % off 1 + 2**-16
    assert refinement.setting == Iterations(8)


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("bad", [RuntimeError("no file"), math.nan, -1.0, "bad"])
def test_errors_leave_all_as_it_was(fails_at, bad):
    refinement = DiscrepancyRefinement(GeometricLadder(stop=100))
    refinement.step(metrics_of(refinement, lambda iterations: 1 / iterations))
    before, calls = refinement.state_dict(), []

    def validate():
        calls.append(refinement.setting)
        if len(calls) == fails_at:
            if isinstance(bad, Exception):
                raise bad
            return bad
        return 1 / len(calls)

    with pytest.raises((RuntimeError, ValueError), match="no file|a metric must"):
        refinement.step(validate)
    assert refinement.state_dict() == before and len(calls) == fails_at
    assert refinement.setting == refinement.ladder[refinement.level] == Iterations(2)
    assert refinement.step(metrics_of(refinement, lambda iterations: 1 / iterations)) is True


def test_states_continue():
    validate_of = lambda refinement: metrics_of(refinement, lambda iterations: 1 + 1 / iterations)  # noqa: E731
    straight, source = (DiscrepancyRefinement(gap=0.05) for _ in "ab")
    for _ in range(3):
        straight.step(validate_of(straight))
        source.step(validate_of(source))
    other = DiscrepancyRefinement(gap=0.05)
    other.load_state_dict(json.loads(json.dumps(source.state_dict(), allow_nan=False)))
    for _ in range(5):
        assert straight.step(validate_of(straight)) == other.step(validate_of(other))
    assert straight.state_dict() == other.state_dict() and straight.level > 3
    with pytest.raises(ValueError, match="saved with gap 0.05, and this refinement has 0.1"):
        DiscrepancyRefinement().load_state_dict(source.state_dict())


def test_monitors_see_each_record():
    refinement, seen = DiscrepancyRefinement([1, 2, 4]), []
    refinement.monitors.append(seen.append)
    refinement.step(metrics_of(refinement, lambda iterations: 1 / iterations))
    assert seen == refinement.history and seen[0].refined and seen[0].setting == Iterations(1)


def test_wrong_arguments():
    refinement = DiscrepancyRefinement()
    assert repr(refinement) == f"DiscrepancyRefinement({GeometricLadder()!r}, gap=0.1)"
    with pytest.raises(TypeError, match=r"give step\(\) the function that validates"):
        refinement.step(0.5)
    for gap in (0, -0.1, math.nan, math.inf, None, "0.1", True):
        with pytest.raises(ValueError, match="gap must be a positive number"):
            DiscrepancyRefinement(gap=gap)
    assert refinement.history == []


def test_what_a_loop_tells_it():
    """Other rules are told the metric, and this one what it compares."""
    refinement, seen = DiscrepancyRefinement([1, 2]), []
    told = refinement.told(1.0, metrics_of(refinement, {2: 0.5}, seen))
    assert seen == [2] and refinement.history == []
    assert refinement.step(told) is True and refinement.history[0].metric == 1.0
    assert FixedRefinement(Iterations(1)).told(1.0, lambda: 2.0) == 1.0


def test_what_converged_physics_say_is_heeded_once():
    """The level goes up to the finer one at once, though the two say the same."""
    refinement = DiscrepancyRefinement([3, 4, 6, 7, 12], gap=0.1)
    same = metrics_of(refinement, lambda iterations: 1.0)
    refinement.heed(0.1)  # not above it
    assert refinement.step(same) is False
    refinement.heed(0.5)
    assert refinement.step(same) is True and refinement.setting == Iterations(6)
    assert refinement.step(same) is False
    refinement.heed(math.inf)
    assert refinement.step(same) is True and refinement.setting == Iterations(12)
    refinement.heed(math.inf)
    assert refinement.step(same) is False  # at the last level


@pytest.mark.parallel([2, 3])
def test_ranks_decide_alike():
    comm = MPI.COMM_WORLD
    refinement = DiscrepancyRefinement(gap=0.25, comm=comm)
    # on rank 0 1/4 off, which is not more than it
    errors = {1: 12.0, 2: 8.0, 4: 6.4 if comm.rank == 0 else 1.0}
    validate = metrics_of(refinement, lambda iterations: errors.get(iterations, 6.4))
    levels = [(refinement.step(validate), refinement.level)[1] for _ in range(4)]
    assert comm.allgather(levels) == [levels] * comm.size
    bad = metrics_of(refinement, lambda iterations: math.nan if comm.rank == 0 else 1.0)
    with pytest.raises(ValueError, match="a metric must be finite"):
        refinement.step(bad)
