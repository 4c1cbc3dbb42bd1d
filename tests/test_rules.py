"""When to refine: the rule against histories worked out by hand, against a second statement of it,
and against bad input.
"""

import io
import json
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from prdp_fem.refinement import (
    LADDERS,
    RULES,
    FixedRefinement,
    GeometricLadder,
    IterationLadder,
    Iterations,
    NewtonLadder,
    NewtonSteps,
    ProgressiveRefinement,
    Record,
    Refinement,
    ScheduledRefinement,
    Tolerance,
    ToleranceLadder,
    registry,
)
from prdp_fem.refinement.settings import NewtonSetting

# Averages are the metrics themselves, and thresholds are exact in binary, so that a case can be
# worked out in the head.
EXACT = {"tau_step": 3 / 4, "tau_stop": 1 / 2, "ema_window": 1, "error_window": 2}


def run(refinement, metrics):
    """Levels after each step; that `step` says whether they went up is checked on the way."""
    levels = []
    for metric in metrics:
        before = refinement.level
        assert refinement.step(metric) is (refinement.level > before)
        levels.append(refinement.level)
    return levels


def state_of(refinement):
    """Everything that a call may change."""
    return refinement.state_dict(), list(refinement.history), refinement.setting


@pytest.fixture
def comm():
    duplicate = MPI.COMM_SELF.Dup()
    yield duplicate
    duplicate.Free()


# --- the rule, by hand ----------------------------------------------------------------------------
# Below, q is e[-1]/e[-error_window] (plateau when q > tau_step = 3/4), and r is e[-1]/checkpoint
# (refine when r < tau_stop = 1/2 or r > 1).


@pytest.mark.parametrize(
    "changes, metrics, levels, checkpoint",
    [
        # Constant metrics would plateau at once, but nothing happens while no more than
        # error_window are recorded. Step 3: q = 1, r = 8/inf.
        pytest.param({}, [8, 8, 8], [0, 0, 1], 8, id="first plateau"),
        pytest.param(
            {"error_window": 3}, [8, 8, 8, 8], [0, 0, 0, 1], 8, id="nothing for three metrics"
        ),
        pytest.param(
            {"error_window": 5},
            [8, 9, 8, 9, 8],
            [0, 0, 0, 0, 0],
            math.inf,
            id="nothing for five metrics",
        ),
        # q = 1/2 at every step.
        pytest.param({}, [16, 8, 4, 2, 1], [0, 0, 0, 0, 0], math.inf, id="still improving"),
        # Step 3: q = 6/8 = 3/4, not above tau_step: improving.
        pytest.param({}, [8, 8, 6], [0, 0, 0], math.inf, id="tau_step exactly"),
        # Step 3: q = 6.25/8 = 0.78.
        pytest.param({}, [8, 8, 6.25], [0, 0, 1], 6.25, id="just above tau_step"),
        # Step 4: q = 7/8, r = 7/8: stay. Step 5: q = 6/7 = 0.86, r = 6/8: stay.
        pytest.param({}, [8, 8, 8, 7, 6], [0, 0, 1, 1, 1], 8, id="second plateau without gain"),
        # Steps 4 to 8: q = 7/8, 6/7, 5/6, 4/5, 3.75/4, all above 3/4; r = 7/8, 6/8, 5/8, 4/8: stay,
        # and r = 3.75/8 = 0.47: refine. Had the checkpoint moved to any of the metrics at which the
        # level stayed, the last r would be at least 3.75/7 = 0.54.
        pytest.param(
            {},
            [8, 8, 8, 7, 6, 5, 4, 3.75],
            [0, 0, 1, 1, 1, 1, 1, 2],
            3.75,
            id="staying keeps the checkpoint",
        ),
        # Step 4: q = 5/8: improving. Step 5: q = 4/5, r = 4/8 = tau_stop, not below: stay.
        pytest.param({}, [8, 8, 8, 5, 4], [0, 0, 1, 1, 1], 8, id="tau_stop exactly"),
        # Step 4: q = 4/8: improving. Step 5: q = 3.5/4 = 0.88, r = 3.5/8 = 0.44: refine.
        pytest.param({}, [8, 8, 8, 4, 3.5], [0, 0, 1, 1, 2], 3.5, id="second plateau with gain"),
        # Step 4: q = 1, r = 1, not above 1: stay.
        pytest.param({}, [8, 8, 8, 8, 8], [0, 0, 1, 1, 1], 8, id="unchanged exactly"),
        # Step 4: q = 9/8, r = 9/8 > 1: refine, checkpoint 9. Step 5: r = 9/9: stay. Step 6: q = 8/9
        # = 0.89, r = 8/9: stay.
        pytest.param({}, [8, 8, 8, 9, 9, 8], [0, 0, 1, 2, 2, 2], 9, id="got worse"),
        # q = r = 9/8, 10/9, 11/10: worse at every step, up a level at every step.
        pytest.param(
            {}, [8, 8, 8, 9, 10, 11], [0, 0, 1, 2, 3, 4], 11, id="got worse again and again"
        ),
        # Step 4: q = 9/9 (metrics 4 and 2), r = 9/inf. Step 5: q = 6/8 (metrics 5 and 3):
        # improving. Step 6: q = 8.5/9 (metrics 6 and 4), r = 8.5/9: stay.
        pytest.param(
            {"error_window": 3},
            [16, 9, 8, 9, 6, 8.5],
            [0, 0, 0, 1, 1, 1],
            9,
            id="three metrics looked back over",
        ),
        # Step 4: q = 9/12 = 3/4 (metrics 4 and 2): improving, though 9/10 (metrics 4 and 3) is not.
        # Step 5: q = 8/10 (metrics 5 and 3): plateau, though 8/12 (metrics 5 and 2) is not.
        pytest.param(
            {"error_window": 3},
            [16, 12, 10, 9, 8],
            [0, 0, 0, 0, 1],
            8,
            id="looking back neither less nor more",
        ),
        # q = e[-1]/e[-1] = 1 always, from the second metric on. Step 2: r = 4/inf. Step 3: r = 2/4:
        # stay. Step 4: r = 1/4: refine.
        pytest.param({"error_window": 1}, [8, 4, 2, 1], [0, 1, 1, 2], 1, id="error_window 1"),
        # q = 1 is not above tau_step = 1: improving for ever …
        pytest.param(
            {"tau_step": 1, "error_window": 1},
            [8, 9, 8, 9],
            [0, 0, 0, 0],
            math.inf,
            id="tau_step 1, error_window 1",
        ),
        # … step 4: q = 9/8, r = 9/inf.
        pytest.param({"tau_step": 1}, [8, 8, 8, 9], [0, 0, 0, 1], 9, id="tau_step 1"),
        # Step 3: r = 8/inf. Step 4: q = 7/8, r = 7/8 < 1: refine. Step 5: r = 7/7, neither below
        # nor above 1: stay.
        pytest.param({"tau_stop": 1}, [8, 8, 8, 7, 7], [0, 0, 1, 2, 2], 7, id="tau_stop 1"),
        # Step 3: q = 1, r = 8/8: stay. Step 4: q = 7/8, r = 7/8: stay. Step 5: q = 8.5/7, r = 8.5/8
        # > 1: refine.
        pytest.param(
            {"checkpoint": 8}, [8, 8, 8, 7, 8.5], [0, 0, 0, 0, 1], 8.5, id="checkpoint given"
        ),
        # Zero after zero is unchanged: q = 1. Step 3: r = 0/inf: refine. Step 4: r = 0/0 is
        # unchanged, too: stay. Step 5: worse than zero.
        pytest.param({}, [0, 0, 0, 0, 1], [0, 0, 1, 1, 2], 1, id="zeros"),
        # Step 4: q = 0/8: improving. Step 5: q = 0/0: plateau, r = 0/8: refine, checkpoint 0. Step
        # 6: r = 0/0: stay.
        pytest.param({}, [8, 8, 8, 0, 0, 0], [0, 0, 1, 1, 2, 2], 0, id="down to zero"),
    ],
)
def test_rule(changes, metrics, levels, checkpoint):
    refinement = ProgressiveRefinement(IterationLadder(stop=6), **{**EXACT, **changes})
    assert run(refinement, metrics) == levels
    assert refinement.checkpoint == checkpoint
    assert [record.smoothed for record in refinement.history] == metrics


@pytest.mark.parametrize(
    "stop, levels, checkpoint",
    [
        # Step 3: r = 8/inf. Steps 4 to 6: q = r = 9/8, 10/9, 11/10, which would refine were there
        # levels left.
        (1, [0, 0, 0, 0, 0, 0], math.inf),
        (2, [0, 0, 1, 1, 1, 1], 8),
        (3, [0, 0, 1, 2, 2, 2], 9),
        (None, [0, 0, 1, 2, 3, 4], 11),
    ],
)
def test_last_level(stop, levels, checkpoint):
    refinement = ProgressiveRefinement(IterationLadder(stop=stop), **EXACT)
    assert run(refinement, [8, 8, 8, 9, 10, 11]) == levels
    assert refinement.checkpoint == checkpoint
    assert refinement.setting == refinement.ladder[levels[-1]]


def test_rule_with_smoothing():
    """With ema_window = 3 the weight is 2/(3 + 1) = 1/2: each average is halfway between the last
    one and the metric.
    """
    refinement = ProgressiveRefinement(IterationLadder(stop=6), **{**EXACT, "ema_window": 3})
    steps = [  # metric, average, level after it
        (16, Fraction(16), 0),
        (0, Fraction(8), 0),  # (0 + 16)/2; two metrics: nothing
        (4, Fraction(6), 0),  # (4 + 8)/2; q = 6/8 = 3/4: improving
        (5, Fraction(11, 2), 1),  # (5 + 6)/2; q = 11/12, r = (11/2)/inf: refine, checkpoint 11/2
        (5, Fraction(21, 4), 1),  # (5 + 11/2)/2; q = 21/22, r = 21/22: stay
        (1, Fraction(25, 8), 1),  # (1 + 21/4)/2; q = 25/42 = 0.60: improving
        # (2 + 25/8)/2; q = 41/50 = 0.82, r = 41/88 = 0.47: refine, checkpoint 41/16
        (2, Fraction(41, 16), 2),
        (3, Fraction(89, 32), 3),  # (3 + 41/16)/2; q = r = 89/82 > 1: refine, checkpoint 89/32
    ]
    assert run(refinement, [metric for metric, _, _ in steps]) == [level for _, _, level in steps]
    assert [record.smoothed for record in refinement.history] == [
        average for _, average, _ in steps
    ]
    assert refinement.checkpoint == Fraction(89, 32)


@pytest.mark.parametrize(
    "ema_window, metrics, averages",
    [
        (1, [3, 6, 1], [3, 6, 1]),
        (2, [3, 6, 2], [3, 5, 3]),  # weight 2/3: 2/3·6 + 1/3·3 = 5, 2/3·2 + 1/3·5 = 3
        (5, [3, 6, 1], [3, 4, 3]),  # weight 1/3: 1/3·6 + 2/3·3 = 4, 1/3·1 + 2/3·4 = 3
        (6, [7, 0, 7], [7, 5, 39 / 7]),  # weight 2/7: 5/7·7 = 5, 2/7·7 + 5/7·5 = 39/7
    ],
)
def test_moving_average(ema_window, metrics, averages):
    refinement = ProgressiveRefinement(IterationLadder(), ema_window=ema_window)
    run(refinement, metrics)
    assert [record.smoothed for record in refinement.history] == pytest.approx(
        averages, rel=1e-15, abs=0
    )


@pytest.mark.parametrize("ema_window", [1, 2, 3, 6, 9, 12, 100])
@pytest.mark.parametrize("metric", [0.0, 1.0, 0.11, 0.3, 1 / 3, 1e-300, 1.7976931348623157e308])
def test_constant_metric_refines_once(metric, ema_window):
    """The average of a constant is that constant, so r is exactly 1 after the first plateau:
    rounding must not lift it above.
    """
    refinement = ProgressiveRefinement(IterationLadder(stop=6), ema_window=ema_window)
    assert run(refinement, [metric] * 50) == [0, 0, 0] + [1] * 47
    assert {record.smoothed for record in refinement.history} == {metric}


def test_defaults_are_those_of_the_paper():
    refinement = ProgressiveRefinement(IterationLadder())
    assert (
        refinement.tau_step,
        refinement.tau_stop,
        refinement.ema_window,
        refinement.error_window,
    ) == (0.98, 0.9, 6, 3)
    assert refinement.checkpoint == math.inf
    assert (refinement.level, refinement.history, refinement.setting) == (0, [], Iterations(1))
    assert (
        repr(refinement)
        == "ProgressiveRefinement(IterationLadder(start=1, step=1, stop=None), tau_step=0.98,"
        " tau_stop=0.9, ema_window=6, error_window=3)"
    )


@pytest.mark.parametrize(
    "ladder",
    [
        [Iterations(2), Iterations(8)],
        (Iterations(2), Tolerance(1e-6)),
        ToleranceLadder(),
        [SimpleNamespace(rtol=0.1, max_it=1, budget=True), Tolerance(0.1)],
        [NewtonSteps(2, Iterations(3)), NewtonSteps(1, Iterations(30))],
        # of which none is the coarser one
    ],
)
def test_any_sequence_of_settings_is_a_ladder(ladder):
    refinement = ProgressiveRefinement(ladder, **EXACT)
    assert refinement.setting is ladder[0] or refinement.setting == ladder[0]
    run(refinement, [8, 8, 8])
    assert refinement.setting == ladder[1]


def test_the_ladder_where_none_is_given():
    refinement = ProgressiveRefinement(**EXACT)
    assert refinement.ladder == GeometricLadder()
    assert run(refinement, [8, 8, 8, 9, 10]) == [0, 0, 1, 2, 3]
    other = ProgressiveRefinement(**EXACT)
    other.load_state_dict(json.loads(json.dumps(refinement.state_dict())))
    assert state_of(other) == state_of(refinement) and other.setting == Iterations(4)


@pytest.mark.parametrize(
    "ladder", [[5, 10, 20], (5, 10, 20), [Iterations(5), 10, np.int64(20)], range(5, 21, 5)]
)
def test_integers_mean_iterations(ladder):
    refinement = ProgressiveRefinement(ladder, **EXACT)
    assert refinement.setting == Iterations(5)
    run(refinement, [8, 8, 8])
    assert refinement.setting == Iterations(10)
    assert refinement.ladder[-1] == Iterations(20)
    assert ScheduledRefinement(ladder, {0: 1}).setting == Iterations(10)
    assert NewtonLadder(stop=1, linear=ladder)[1] == NewtonSteps(1, Iterations(10))


class Endless(Sequence):
    """A ladder of a user's own class, which is too long to be read through, and wrong from some
    level on.
    """

    def __init__(self, wrong, entry):
        self.wrong, self.entry = wrong, entry

    def __len__(self):
        return 10**12

    def __getitem__(self, level):
        return self.entry if level >= self.wrong else 1 + level


def test_a_ladder_of_ones_own_is_looked_at_as_far_as_can_be():
    for wrong in (0, 1, 999):
        with pytest.raises(
            ValueError,
            match=(
                f"level {wrong} of a ladder: iterations must be an integer of at least 1, found -1"
            ),
        ):
            ProgressiveRefinement(Endless(wrong, -1))
    refinement = ProgressiveRefinement(Endless(2000, -1), **EXACT)
    assert refinement.setting == Iterations(1)
    refinement.level = 1999
    assert refinement.setting == Iterations(2000)
    run(refinement, [8, 8])
    before = state_of(refinement)
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1, found -1"):
        refinement.step(8)
    assert state_of(refinement) == before
    with pytest.raises(ValueError, match="iterations must be an integer of at least 1, found -1"):
        refinement.level = 2000
    assert state_of(refinement) == before


@pytest.mark.parametrize(
    "name, value, message",
    [
        *[
            (
                "level",
                level,
                (
                    "level must be one of 0 to 2, which are on the ladder "
                    "IterationLadder(start=1, step=1, stop=3), found"
                ),
            )
            for level in (-1, 3, 2.5, 1.0, "2", None, True, 10**30, math.nan)
        ],
        ("ladder", "x", "a ladder must be a sequence of settings"),
        ("ladder", [5], "level 1 is not on the ladder"),
        ("ladder", [5, "x"], "level 1 of a ladder"),
        ("comm", "world", "comm must be a communicator"),
        *[
            (name, value, f"{name} must lie in (0, 1]")
            for name in ("tau_step", "tau_stop")
            for value in (0, 1.5, "0.5", None, math.nan)
        ],
        *[
            (name, value, f"{name} must be an integer of at least 1")
            for name in ("ema_window", "error_window")
            for value in (0, 2.5, "3")
        ],
    ],
)
def test_attributes_are_checked_when_they_are_set(name, value, message):
    refinement = ProgressiveRefinement(IterationLadder(stop=3), **EXACT)
    run(refinement, [8, 8, 8])
    before = state_of(refinement), refinement.ladder, refinement.comm
    with pytest.raises((ValueError, TypeError)) as error:
        setattr(refinement, name, value)
    assert message in str(error.value)
    assert (state_of(refinement), refinement.ladder, refinement.comm) == before


def test_attributes_that_are_set_count():
    refinement = ProgressiveRefinement(IterationLadder(stop=3), **EXACT)
    refinement.level = np.int64(2)
    assert type(refinement.level) is int and refinement.setting == Iterations(3)
    refinement.ladder = [5, 10, 20]
    assert refinement.setting == Iterations(20)
    refinement.ema_window = 3
    run(refinement, [8, 4])
    assert refinement.history[-1].smoothed == 6


# --- the rule, stated a second time ---------------------------------------------------------------


def levels_by_weights(metrics, *, levels, tau_step, tau_stop, ema_window, error_window):
    """Levels after each metric, from the whole history at once, in exact rational arithmetic.

    The averages are a matrix of weights times the metrics, and plateaus are found for all outer
    iterations before any level is given out. Also returned: for each outer iteration, how far
    (relatively) the decision is from going the other way.
    """
    count = len(metrics)
    weight = Fraction(2, ema_window + 1)
    age = np.subtract.outer(np.arange(count), np.arange(count))
    weights = np.array(
        [
            [
                (
                    (weight if column > 0 else 1) * (1 - weight) ** int(age[row, column])
                    if column <= row
                    else 0
                )
                for column in range(count)
            ]
            for row in range(count)
        ],
        dtype=object,
    )
    averages = weights @ np.array([Fraction(metric) for metric in metrics], dtype=object)
    ratios = {n: averages[n] / averages[n - error_window + 1] for n in range(error_window, count)}
    margins = [
        abs(ratios[n] - Fraction(tau_step)) if n in ratios else math.inf for n in range(count)
    ]
    plateaus = [n for n, ratio in ratios.items() if ratio > Fraction(tau_step)]
    refined_at = []
    for n in plateaus:
        if len(refined_at) == levels - 1:
            break
        if refined_at:
            gain = averages[n] / averages[refined_at[-1]]
            margins[n] = min(margins[n], abs(gain - Fraction(tau_stop)), abs(gain - 1))
            if Fraction(tau_stop) <= gain <= 1:
                continue
        refined_at.append(n)
    return [int(np.searchsorted(refined_at, n, side="right")) for n in range(count)], margins


thresholds = st.integers(1, 16).map(lambda sixteenths: sixteenths / 16)
# Few values, so that ratios often meet thresholds exactly.
small_integers = st.lists(
    st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9, 12, 16]), min_size=1, max_size=20
)
# Histories that look like training: each metric is a factor of the last one, from a leap down to a
# little worse.
training_histories = st.lists(
    st.one_of(st.floats(0.95, 1.03), st.floats(0.3, 1.5)), min_size=1, max_size=30
).map(lambda factors: np.cumprod(factors).tolist())


@settings(deadline=None, max_examples=500)
@given(
    metrics=small_integers,
    tau_step=thresholds,
    tau_stop=thresholds,
    ema_window=st.sampled_from([1, 3]),
    error_window=st.integers(1, 5),
    levels=st.integers(1, 6),
)
def test_rule_against_exact_arithmetic(metrics, levels, **arguments):
    """With weights 1 and 1/2, and thresholds of sixteenths, floating point is exact, also where a
    ratio equals its threshold.
    """
    refinement = ProgressiveRefinement(IterationLadder(stop=levels), **arguments)
    expected, _ = levels_by_weights(metrics, levels=levels, **arguments)
    assert run(refinement, metrics) == expected


@settings(deadline=None, max_examples=300)
@given(
    metrics=training_histories,
    tau_step=st.floats(0.5, 1),
    tau_stop=st.floats(0.5, 1),
    ema_window=st.integers(1, 20),
    error_window=st.integers(1, 8),
    levels=st.integers(1, 6),
)
def test_rule_against_exact_arithmetic_of_any_window(metrics, levels, **arguments):
    refinement = ProgressiveRefinement(IterationLadder(stop=levels), **arguments)
    expected, margins = levels_by_weights(metrics, levels=levels, **arguments)
    found = run(refinement, metrics)
    # Where rounding may decide, the histories may part: compare up to there.
    decided = next((n for n, margin in enumerate(margins) if margin < 1e-9), len(metrics))
    assert found[:decided] == expected[:decided]


# --- properties -----------------------------------------------------------------------------------

# No subnormal numbers: kernels that Firedrake compiles with -ffast-math turn them off in the whole
# process.
metric_values = st.floats(0, 1e300, allow_subnormal=False)
any_metrics = st.lists(st.one_of(metric_values, st.sampled_from([0.0, 1.0, 2.0, 3])), max_size=40)
any_rule = st.fixed_dictionaries(
    {
        "tau_step": st.floats(0.01, 1),
        "tau_stop": st.floats(0.01, 1),
        "ema_window": st.integers(1, 10),
        "error_window": st.integers(1, 5),
    }
)


@settings(deadline=None)
@given(metrics=any_metrics, rule=any_rule, stop=st.one_of(st.none(), st.integers(1, 5)))
def test_levels_climb_one_by_one_and_stay_on_the_ladder(metrics, rule, stop):
    ladder = IterationLadder(stop=stop)
    refinement = ProgressiveRefinement(ladder, **rule)
    levels = [0, *run(refinement, metrics)]
    assert set(np.diff(levels).tolist()) <= {0, 1}
    assert 0 <= levels[-1] < len(ladder)
    assert [record.level for record in refinement.history] == levels[:-1]


@settings(deadline=None)
@given(metrics=training_histories, exponent=st.integers(-100, 100), rule=any_rule)
def test_units_of_the_metric_do_not_matter(metrics, exponent, rule):
    """The rule knows ratios only; powers of two, so that rounding is the same."""
    one, other = (ProgressiveRefinement(IterationLadder(stop=5), **rule) for _ in range(2))
    assert run(one, metrics) == run(other, [metric * 2.0**exponent for metric in metrics])


def through_torch(state):
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


CARRIERS = {
    "as it is": lambda state: state,
    "json": lambda state: json.loads(json.dumps(state)),
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),
}


@pytest.mark.parametrize("carry", [*CARRIERS.values(), through_torch], ids=[*CARRIERS, "torch"])
@settings(deadline=None, max_examples=50)
@given(metrics=any_metrics, rule=any_rule, data=st.data())
def test_a_run_that_was_interrupted_continues_as_if_it_was_not(carry, metrics, rule, data):
    cut = data.draw(st.integers(0, len(metrics)))
    whole, first, second = (
        ProgressiveRefinement(IterationLadder(stop=5), **rule) for _ in range(3)
    )
    levels = run(whole, metrics)
    run(first, metrics[:cut])
    second.load_state_dict(carry(first.state_dict()))
    assert state_of(second) == state_of(first)
    assert run(second, metrics[cut:]) == levels[cut:]
    assert state_of(second) == state_of(whole)


def test_infinity_survives_json():
    """Before the first plateau the checkpoint is infinite, of which strict JSON knows nothing."""
    refinement = ProgressiveRefinement(IterationLadder(), **EXACT)
    other = ProgressiveRefinement(IterationLadder(), checkpoint=1.0, **EXACT)
    other.load_state_dict(json.loads(json.dumps(refinement.state_dict(), allow_nan=False)))
    assert other.checkpoint == math.inf


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProgressiveRefinement(IterationLadder(), **EXACT),
        lambda: ProgressiveRefinement(
            [5, 10, 20], ema_window=np.int64(3), tau_stop=np.float32(0.5)
        ),
        lambda: ProgressiveRefinement(
            [SimpleNamespace(rtol=np.float32(0.5), max_it=np.int64(3), budget=np.True_)]
        ),
        lambda: ProgressiveRefinement(NewtonLadder(linear=Tolerance(0.1)), **EXACT),
        lambda: ProgressiveRefinement(GeometricLadder(ratio=3), **EXACT),
        lambda: ScheduledRefinement(ToleranceLadder(), {np.int64(1): np.int64(2)}),
        lambda: FixedRefinement(NewtonSteps(2)),
    ],
)
def test_states_are_strict_json_at_any_moment(make):
    source = make()
    for metric in (8, 8, 8, 9, np.float32(10), 0, 0, 0, 0):
        other = make()
        other.load_state_dict(json.loads(json.dumps(source.state_dict(), allow_nan=False)))
        assert state_of(other) == state_of(source)
        source.step(metric)


DIFFERENT = {
    "ladder": ProgressiveRefinement(IterationLadder(start=100, step=50, stop=2050), **EXACT),
    "step of the ladder": ProgressiveRefinement(IterationLadder(start=1, step=2, stop=79), **EXACT),
    "length of the ladder": ProgressiveRefinement(IterationLadder(stop=41), **EXACT),
    "end of the ladder": ProgressiveRefinement(IterationLadder(), **EXACT),
    "floor": ProgressiveRefinement(IterationLadder(stop=40, rtol_floor=0), **EXACT),
    "tolerances": ProgressiveRefinement(ToleranceLadder(), **EXACT),
    "Newton steps": ProgressiveRefinement(
        NewtonLadder(stop=1, linear=IterationLadder(stop=40)), **EXACT
    ),
    "geometric": ProgressiveRefinement(GeometricLadder(stop=40), **EXACT),
    "a list": ProgressiveRefinement([*range(1, 39), 41, 42], **EXACT),
    **{
        name: ProgressiveRefinement(IterationLadder(stop=40), **{**EXACT, name: value})
        for name, value in (
            ("tau_step", 0.8),
            ("tau_stop", 0.4),
            ("ema_window", 2),
            ("error_window", 3),
        )
    },
    "rule": FixedRefinement(Iterations(1)),
    "schedule": ScheduledRefinement(IterationLadder(stop=40), {1: 1}),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_states_of_other_refinements_are_refused(name):
    """Level 3 of one ladder is not level 3 of another, and an average of one rule is none of
    another.
    """
    source, refinement = ProgressiveRefinement(IterationLadder(stop=40), **EXACT), DIFFERENT[name]
    before = state_of(refinement)
    for metric in (8, 8, 8, 9, 10):
        with pytest.raises(ValueError):
            refinement.load_state_dict(source.state_dict())
        with pytest.raises(ValueError):
            source.load_state_dict(refinement.state_dict())
        assert state_of(refinement) == before
        source.step(metric)


def test_levels_may_be_stated_in_another_way():
    """A ladder is what its levels mean."""
    source = ProgressiveRefinement(IterationLadder(start=5, step=5, stop=18), **EXACT)
    run(source, [8, 8, 8])
    for ladder in (
        [5, 10, 15],
        IterationLadder(5, 5, 15),
        [Iterations(5), Iterations(10), Iterations(15)],
    ):
        other = ProgressiveRefinement(ladder, **EXACT)
        other.load_state_dict(source.state_dict())
        assert state_of(other) == state_of(source)


def test_what_differs_is_said():
    source = ProgressiveRefinement(IterationLadder(stop=40), tau_step=0.5)
    with pytest.raises(
        ValueError,
        match=r"^the state was saved with tau_step 0\.5, and this "
        r"refinement has 0\.98: load it into one",
    ):
        ProgressiveRefinement(IterationLadder(stop=40)).load_state_dict(source.state_dict())
    with pytest.raises(
        ValueError,
        match=r"of level, rtol, max_it, budget and Newton steps it has "
        r"\[1, 1e-12, 2, True\], and this one "
        r"\[1, 1e-12, 3, True\]: load it into a refinement with "
        r"the ladder it was saved with$",
    ):
        ProgressiveRefinement(IterationLadder(step=2, stop=79), tau_step=0.5).load_state_dict(
            source.state_dict()
        )
    with pytest.raises(
        ValueError,
        match=(
            "saved with refinement 'ProgressiveRefinement', and this "
            "refinement has 'FixedRefinement'"
        ),
    ):
        refinement = FixedRefinement(Iterations(1))
        state = {**refinement.state_dict(), "refinement": "ProgressiveRefinement"}
        refinement.load_state_dict(state)


def test_state_is_a_copy():
    refinement = ProgressiveRefinement(IterationLadder(), **EXACT)
    run(refinement, [8, 8])
    state = refinement.state_dict()
    text = json.dumps(state)
    run(refinement, [8, 9])
    assert json.dumps(state) == text
    other = ProgressiveRefinement(IterationLadder(), **EXACT)
    other.load_state_dict(state)
    run(other, [8, 9])
    assert json.dumps(state) == text
    assert state_of(other) == state_of(refinement)


INVALID = [math.nan, math.inf, -math.inf, -1e-300, -3, None, "bad", [1.0], 1j, {}, 10**400]


@settings(deadline=None)
@given(metrics=st.lists(st.one_of(metric_values, st.sampled_from(INVALID))))
def test_refused_metrics_leave_no_trace(metrics):
    """A run in which bad metrics were refused goes on as one that never saw them."""
    refinement, reference = (
        ProgressiveRefinement(IterationLadder(stop=4), **EXACT) for _ in range(2)
    )
    for metric in metrics:
        if isinstance(metric, float) and 0 <= metric < math.inf:
            assert refinement.step(metric) is reference.step(metric)
        else:
            with pytest.raises(ValueError, match="a metric must"):
                refinement.step(metric)
        assert state_of(refinement) == state_of(reference)


# --- long histories -------------------------------------------------------------------------------


def test_a_hundred_thousand_outer_iterations_are_as_exact_as_ten():
    count = 100_000
    metrics = [2 + math.sin(n) + 1e6 * math.exp(-n / 5000) for n in range(count)]
    refinement = ProgressiveRefinement(IterationLadder())
    for metric in metrics:
        refinement.step(metric)
    averages = [record.smoothed for record in refinement.history]
    weight = 2 / 7
    for last in (9, 999, count - 1):
        # the definition, with an exact sum; weights before the last 2000 metrics underflow
        terms = [
            weight * (1 - weight) ** (last - n) * metrics[n]
            for n in range(max(1, last - 2000), last + 1)
        ]
        assert averages[last] == pytest.approx(
            math.fsum([*terms, (1 - weight) ** last * metrics[0]]), rel=1e-12, abs=0
        )
    with localcontext() as context:  # every average, with fifty digits
        context.prec = 50
        weight, exact = Decimal(2) / Decimal(7), Decimal(metrics[0])
        for metric, average in zip(metrics, averages, strict=True):
            exact += weight * (Decimal(metric) - exact)
            assert abs(Decimal(average) - exact) <= Decimal("1e-12") * exact


class CountedList(list):
    """Counts the entries that are read."""

    read = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        for entry in super().__iter__():
            self.read += 1
            yield entry


def test_a_step_reads_no_more_of_a_long_history_than_of_a_short_one():
    refinement = ProgressiveRefinement(IterationLadder(), ema_window=50, error_window=40)
    refinement.history = CountedList()
    read = []
    for n in range(1000):
        before = refinement.history.read
        refinement.step(1 + 1 / (n + 1))
        read.append(refinement.history.read - before)
    assert 0 < max(read[500:]) <= max(read[50:100])


# --- records and monitors -------------------------------------------------------------------------


def test_records():
    """The level and setting of a record are those that held during the outer iteration, before its
    step refined.
    """
    refinement = ProgressiveRefinement(
        IterationLadder(start=5, step=10, stop=15), **{**EXACT, "ema_window": 3}
    )
    run(refinement, [8, 8, 8, 24])
    assert refinement.history == [
        Record(8.0, 8.0, 0, Iterations(5), False),
        Record(8.0, 8.0, 0, Iterations(5), False),
        Record(8.0, 8.0, 0, Iterations(5), True),
        Record(24.0, 16.0, 1, Iterations(15), False),
    ]
    assert (refinement.level, refinement.setting) == (1, Iterations(15))
    assert isinstance(refinement.history, Sequence)


@pytest.mark.parametrize(
    "metric, value",
    [
        (3, 3.0),
        (0, 0.0),
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(3), 3.0),
        (np.array(0.5), 0.5),
        (Fraction(1, 4), 0.25),
    ],
)
def test_numbers_of_any_kind_are_metrics(metric, value, comm):
    for refinement in (
        ProgressiveRefinement(IterationLadder()),
        ProgressiveRefinement(IterationLadder(), comm=comm),
    ):
        refinement.step(metric)
        (record,) = refinement.history
        assert (record.metric, record.smoothed) == (value, value)
        # nothing that keeps an array, or a graph, alive
        assert type(record.metric) is type(record.smoothed) is float
        json.dumps(refinement.state_dict())


def test_tensors_are_metrics(comm):
    torch = pytest.importorskip("torch")
    for tensor in (
        torch.tensor(0.5),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor(0.5, requires_grad=True).detach(),
    ):
        refinement = FixedRefinement(Iterations(1), comm=comm)
        refinement.step(tensor)
        assert type(refinement.history[0].metric) is float
        assert refinement.history[0].metric == 0.5


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProgressiveRefinement(IterationLadder(), **EXACT),
        lambda: FixedRefinement(Iterations(3)),
        lambda: ScheduledRefinement(IterationLadder(), {2: 1}),
    ],
)
def test_monitors_see_each_record_once(make):
    refinement = make()
    seen, lengths = [], []
    refinement.monitors.append(seen.append)
    refinement.monitors.append(
        lambda record: lengths.append((len(refinement.history), refinement.level))
    )
    with pytest.raises(ValueError, match="a metric must"):
        refinement.step(math.nan)
    levels = run(refinement, [8, 8, 8])
    assert seen == refinement.history and len(seen) == 3
    assert lengths == list(zip([1, 2, 3], levels, strict=True))  # called when all is in place


# --- the other refinements ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting", [Iterations(20), Tolerance(1e-6), SimpleNamespace(rtol=0.1, max_it=3, budget=False)]
)
def test_fixed(setting):
    refinement = FixedRefinement(setting)
    assert refinement.setting is setting
    # Averages with the default window of 6, weight 2/7: 5/7·7 = 5, 2/7·19 + 5/7·5 = 63/7.
    assert run(refinement, [7, 0, 19]) == [0, 0, 0]
    assert refinement.setting is setting
    assert [record.metric for record in refinement.history] == [7, 0, 19]
    assert [record.smoothed for record in refinement.history] == pytest.approx([7, 5, 9], rel=1e-15)
    assert all(
        (record.level, record.setting, record.refined) == (0, setting, False)
        for record in refinement.history
    )
    other = FixedRefinement(setting)
    other.load_state_dict(json.loads(json.dumps(refinement.state_dict())))
    assert state_of(other) == state_of(refinement)
    assert repr(refinement) == f"FixedRefinement({setting!r})"


@pytest.mark.parametrize(
    "schedule, during",
    [  # level during the outer iterations 0, 1, 2, …
        ({}, [0, 0, 0, 0, 0, 0, 0]),
        ({0: 0, 2: 3, 5: 7}, [0, 0, 3, 3, 3, 7, 7]),
        ({5: 7, 0: 0, 2: 3}, [0, 0, 3, 3, 3, 7, 7]),
        ({3: 2}, [0, 0, 0, 2, 2, 2, 2]),
        ({0: 2}, [2, 2, 2, 2, 2, 2, 2]),
        ({0: 1, 1: 1, 3: 1, 6: 2}, [1, 1, 1, 1, 1, 1, 2]),
        ({1: 1, 2: 2, 3: 3, 1000: 7}, [0, 1, 2, 3, 3, 3, 3]),
        ({np.int64(1): np.int64(2)}, [0, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_scheduled(schedule, during):
    ladder = IterationLadder(stop=8)
    refinement = ScheduledRefinement(ladder, schedule)
    assert refinement.level == during[0]
    run(refinement, [1.0, 9, 0, 1, 1, 1, 1])
    assert [record.level for record in refinement.history] == during
    assert [record.setting for record in refinement.history] == [ladder[level] for level in during]
    assert [record.refined for record in refinement.history[:-1]] == (np.diff(during) > 0).tolist()
    json.dumps(refinement.state_dict())


@settings(deadline=None)
@given(
    schedule=st.dictionaries(st.integers(0, 30), st.integers(0, 9), max_size=8),
    cut=st.integers(0, 30),
)
def test_scheduled_by_definition(schedule, cut):
    """The entry that holds is the last one not in the future, in an interrupted run, too."""
    climbing = dict(zip(sorted(schedule), sorted(schedule.values()), strict=True))
    first, second = (ScheduledRefinement(IterationLadder(stop=10), climbing) for _ in range(2))
    run(first, [1.0] * cut)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    run(second, [1.0] * (30 - cut))
    assert [record.level for record in second.history] == [
        max((climbing[m] for m in climbing if m <= n), default=0) for n in range(30)
    ]


def test_schedule_is_copied():
    schedule = {2: 3}
    refinement = ScheduledRefinement(IterationLadder(), schedule)
    schedule[1] = 7
    assert run(refinement, [1, 1]) == [0, 3]


@pytest.mark.parametrize(
    "schedule, message",
    [
        ({0: 2, 3: 1}, "levels must not decrease, found 1 after 2 at outer iteration 3"),
        ({5: 0, 3: 1}, "levels must not decrease, found 0 after 1 at outer iteration 5"),
        (
            {0: 5},
            (
                "level 5 at outer iteration 0 is not on the ladder IterationLadder(start=1, step=1,"
                " stop=5), which has levels 0 to 4"
            ),
        ),
        ({0: 0, 7: 10**30}, f"level {10**30} at outer iteration 7 is not on the ladder"),
        ({0: -1}, "both integers from 0, found 0: -1"),
        ({-1: 0}, "both integers from 0, found -1: 0"),
        ({0: 1.0}, "both integers from 0, found 0: 1.0"),
        ({1.5: 1}, "both integers from 0, found 1.5: 1"),
        ({0: True}, "both integers from 0, found 0: True"),
        ({False: 1}, "both integers from 0, found False: 1"),
        ({0: None}, "both integers from 0, found 0: None"),
        ({"a": 1}, "both integers from 0, found 'a': 1"),
        ({0: 1, "a": 2}, "both integers from 0, found 'a': 2"),
    ],
)
def test_bad_schedules(schedule, message):
    before = dict(schedule)
    with pytest.raises(ValueError) as error:
        ScheduledRefinement(IterationLadder(stop=5), schedule)
    assert message in str(error.value)
    assert schedule == before


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metric, message",
    [
        (math.nan, "a metric must be finite, found nan"),
        (math.inf, "a metric must be finite, found inf"),
        (-math.inf, "a metric must be finite, found -inf"),
        (np.float32("nan"), "a metric must be finite, found nan"),
        (
            -1e-300,
            "a metric must not be negative (lower is better, zero is perfect), found -1e-300",
        ),
        (-3, "a metric must not be negative (lower is better, zero is perfect), found -3"),
        (None, "a metric must be a number, found None"),
        ("bad", "a metric must be a number, found 'bad'"),
        ("0.5", "a metric must be a number, found '0.5'"),
        ([1.0], "a metric must be a number, found [1.0]"),
        (1 + 1j, "a metric must be a number, found (1+1j)"),
        (np.ones(2), "a metric must be a number, found array([1., 1.])"),
        pytest.param(10**400, "a metric must be", id="integer beyond the largest float"),
        (ProgressiveRefinement, "a metric must be a number, found <class"),
        pytest.param(
            lambda: 0.5,
            "a metric must be a number, found <function",
            id="what cannot be sent to another rank",
        ),
    ],
)
@pytest.mark.parametrize(
    "make",
    [
        lambda comm: ProgressiveRefinement(IterationLadder(), **EXACT, comm=comm),
        lambda comm: FixedRefinement(Iterations(3), comm=comm),
        lambda comm: ScheduledRefinement(IterationLadder(), {2: 1, 3: 2}, comm=comm),
    ],
    ids=["progressive", "fixed", "scheduled"],
)
@pytest.mark.parametrize("collective", [False, True], ids=["", "comm"])
def test_bad_metrics(make, metric, message, collective, comm):
    refinement = make(comm if collective else None)
    run(refinement, [8, 8])
    before = state_of(refinement)
    with pytest.raises(ValueError) as error:
        refinement.step(metric)
    assert message in str(error.value)
    assert state_of(refinement) == before


def test_tensor_of_several_numbers_is_no_metric():
    torch = pytest.importorskip("torch")
    refinement = FixedRefinement(Iterations(3))
    with pytest.raises(ValueError, match="a metric must be a number, found tensor"):
        refinement.step(torch.ones(2))
    assert refinement.history == []


@pytest.mark.parametrize("name", ["tau_step", "tau_stop"])
@pytest.mark.parametrize(
    "value", [0, 0.0, -0.5, 1.0000001, 2, math.nan, math.inf, -math.inf, True, "0.9", None, 0.5j]
)
def test_bad_thresholds(name, value):
    with pytest.raises(ValueError) as error:
        ProgressiveRefinement(IterationLadder(), **{name: value})
    assert str(error.value) == f"{name} must lie in (0, 1], found {value!r}"


@pytest.mark.parametrize("name", ["ema_window", "error_window"])
@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", None, math.inf])
def test_bad_windows(name, value):
    with pytest.raises(ValueError) as error:
        ProgressiveRefinement(IterationLadder(), **{name: value})
    assert str(error.value) == f"{name} must be an integer of at least 1, found {value!r}"


@pytest.mark.parametrize("value", [0, -1, 0.0, -math.inf, math.nan, True, "inf", None])
def test_bad_checkpoints(value):
    with pytest.raises(ValueError) as error:
        ProgressiveRefinement(IterationLadder(), checkpoint=value)
    assert str(error.value) == f"checkpoint must be a positive number or inf, found {value!r}"


@pytest.mark.parametrize(
    "arguments",
    [
        {"tau_step": 1},
        {"tau_stop": 1.0},
        {"ema_window": np.int64(3)},
        {"error_window": np.int32(1)},
        {"tau_step": np.float64(0.5)},
        {"checkpoint": np.float32(2)},
    ],
)
def test_numbers_of_any_kind_are_arguments(arguments):
    refinement = ProgressiveRefinement(IterationLadder(), **arguments)
    ((name, value),) = arguments.items()
    assert getattr(refinement, name) == value
    refinement.step(1)
    json.dumps(refinement.state_dict())


@pytest.mark.parametrize(
    "ladder, error, message",
    [
        ([], ValueError, "a ladder must have at least one level, found an empty one"),
        ((), ValueError, "a ladder must have at least one level, found an empty one"),
        (range(0), ValueError, "a ladder must have at least one level, found an empty one"),
        (
            7,
            TypeError,
            (
                "a ladder must be a sequence of settings, such as IterationLadder(start=1, step=1),"
                " found 7"
            ),
        ),
        (None, TypeError, "a ladder must be a sequence of settings"),
        ("Iterations", TypeError, "a ladder must be a sequence of settings"),
        ({0: Iterations(1)}, TypeError, "a ladder must be a sequence of settings"),
        ({Iterations(1)}, TypeError, "a ladder must be a sequence of settings"),
        (iter([Iterations(1)]), TypeError, "a ladder must be a sequence of settings"),
        (Iterations(1), TypeError, "a ladder must be a sequence of settings"),
        (IterationLadder, TypeError, "a ladder must be a sequence of settings"),
        (
            [1, "2"],
            TypeError,
            (
                "level 1 of a ladder: a setting must have the attributes rtol, max_it and budget,"
                " as Iterations(20) and Tolerance(1e-6) have, found '2'"
            ),
        ),
        ([Iterations(1), 2.5], TypeError, "found 2.5"),
        ([1, True], TypeError, "found True"),
        (
            range(3),
            ValueError,
            "level 0 of a ladder: iterations must be an integer of at least 1, found 0",
        ),
        (
            [5, -1],
            ValueError,
            "level 1 of a ladder: iterations must be an integer of at least 1, found -1",
        ),
        (
            [5, 2**31],
            ValueError,
            (
                "level 1 of a ladder: iterations must be an integer of at most "
                "2147483647, found 2147483648"
            ),
        ),
        (
            [20, 10],
            ValueError,
            (
                "a ladder goes from coarse to fine, found Iterations(iterations=10, "
                "rtol_floor=1e-12) at level 1"
            ),
        ),
        ([Tolerance(0.1), Tolerance(0.5)], ValueError, "a ladder goes from coarse to fine"),
        (
            [NewtonSteps(2, Iterations(3)), NewtonSteps(1, Iterations(3))],
            ValueError,
            "a ladder goes from coarse to fine",
        ),
        (
            [NewtonSteps(2, Iterations(3)), NewtonSteps(2, Iterations(2))],
            ValueError,
            "a ladder goes from coarse to fine",
        ),
        (b"abc", TypeError, "a ladder must be a sequence of settings"),
        (
            [
                SimpleNamespace(rtol=0.1, max_it=3, budget=True),
                SimpleNamespace(rtol=-1, max_it=3, budget=True),
            ],
            ValueError,
            (
                "level 1 of a ladder: rtol must lie in [0, 1), found -1, in the setting"
                " namespace(rtol=-1, max_it=3, budget=True)"
            ),
        ),
        (
            [SimpleNamespace(rtol=0.1, max_it=3)],
            TypeError,
            "a setting must have the attributes rtol, max_it and budget",
        ),
        # the class, for an object of it
        ([Iterations], TypeError, "a setting must have the attributes rtol, max_it and budget"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [ProgressiveRefinement, lambda ladder: ScheduledRefinement(ladder, {})],
    ids=["progressive", "scheduled"],
)
def test_bad_ladders(make, ladder, error, message):
    with pytest.raises(error) as raised:
        make(ladder)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "setting",
    [20, None, "cg", {"rtol": 0.1, "max_it": 3, "budget": True}, Iterations, IterationLadder()],
)
def test_bad_fixed_setting(setting):
    with pytest.raises(
        TypeError, match="a setting must have the attributes rtol, max_it and budget"
    ):
        FixedRefinement(setting)


BAD_LEVEL = "is not on the ladder IterationLadder(start=1, step=1, stop=3), which has levels 0 to 2"


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda state: state.pop("level"),
            (
                "the state of a ProgressiveRefinement lacks ['level']; "
                "found ['checkpoint', 'ema_window', "
            ),
        ),
        (
            lambda state: state.update(epoch=3),
            "the state of a ProgressiveRefinement has no ['epoch']; it has ['checkpoint', ",
        ),
        (lambda state: state.update({3: 3}), "has no ['3']"),
        (
            lambda state: state.pop("history"),
            "the state of a ProgressiveRefinement lacks ['history']",
        ),
        (
            lambda state: state.pop("checkpoint"),
            "the state of a ProgressiveRefinement lacks ['checkpoint']",
        ),
        (
            lambda state: state.clear(),
            "the state of a ProgressiveRefinement lacks ['checkpoint', 'ema_window', ",
        ),
        *[
            (
                lambda state, name=name, value=value: state.update({name: value}),
                f"saved with {name} {value!r}",
            )
            for name, value in (
                ("tau_step", "0.75"),
                ("tau_stop", None),
                ("ema_window", 2),
                ("error_window", [2]),
                ("refinement", "FixedRefinement"),
            )
        ],
        *[
            (
                lambda state, value=value: state.update(history=value),
                "the history of the state must be a list",
            )
            for value in (None, 3, {}, "x")
        ],
        *[
            (lambda state, value=value: state.update(ladder=value), "another ladder")
            for value in (None, 3, {}, [], [[0, 1e-12, 2, True]])
        ],
        (lambda state: state["ladder"].pop(), "another ladder"),
        (lambda state: state["ladder"][1].pop(), "another ladder"),
        *[
            (lambda state, value=value: state.update(levels=value), "saved with a ladder of")
            for value in (None, 4, "3", [3])
        ],
        *[
            (
                lambda state, value=value: state["history"][1].__setitem__(3, value),
                "refined must be True or False",
            )
            for value in (1, None, "x")
        ],
        *[
            (
                lambda state, value=value: state["history"].__setitem__(1, value),
                "a record in the history",
            )
            for value in (None, 3, {}, "abcd")
        ],
        *[
            (
                lambda state, level=level: state.update(level=level),
                f"level {level!r} of the state {BAD_LEVEL}",
            )
            for level in (3, -1, 10**30, 1.0, True, "1", None)
        ],
        *[
            (
                lambda state, level=level: state["history"][1].__setitem__(2, level),
                f"level {level!r} of the state {BAD_LEVEL}",
            )
            for level in (3, -1, 1.0)
        ],
        *[
            (lambda state, value=value: state.update(checkpoint=value), "checkpoint")
            for value in (-1.0, math.nan, "8", True, 10**400)
        ],
        (lambda state: state["history"][1].pop(), "history"),
        *[
            (
                lambda state, value=value, entry=entry: state["history"][1].__setitem__(
                    entry, value
                ),
                "a metric must",
            )
            for value in (math.nan, "8", -1.0)
            for entry in (0, 1)
        ],
    ],
)
def test_bad_states(change, message):
    refinement, source = (ProgressiveRefinement(IterationLadder(stop=3), **EXACT) for _ in range(2))
    run(refinement, [4, 4, 4])
    run(source, [8, 8, 8, 9])
    before = state_of(refinement)
    state = source.state_dict()
    refinement.load_state_dict(state)
    assert state_of(refinement) == state_of(source)  # as it is, the state is fine
    refinement.load_state_dict(before[0])
    change(state)
    with pytest.raises(ValueError) as error:
        refinement.load_state_dict(state)
    assert message in str(error.value)
    assert state_of(refinement) == before
    assert run(refinement, [5]) == [2]  # … and it still runs: q = r = 5/4


@pytest.mark.parametrize(
    "make, entries",
    [
        (
            lambda: ProgressiveRefinement(IterationLadder(), **EXACT),
            ["level", "history", "checkpoint"],
        ),
        (lambda: ProgressiveRefinement(IterationLadder(), **EXACT), ["level", "history"]),
        (lambda: ScheduledRefinement([1, 2], {0: 0, 2: 1}), ["level", "history"]),
    ],
)
def test_states_of_the_first_version_are_told_from_damaged_ones(make, entries):
    """They had nothing of the ladder and the rule."""
    source, refinement = make(), make()
    run(source, [8, 8, 8, 9])
    old = {entry: source.state_dict()[entry] for entry in entries}
    with pytest.raises(ValueError) as error:
        refinement.load_state_dict(old)
    assert "saved by an earlier version of prdp_fem" in str(error.value)
    assert (refinement.level, refinement.history) == (0, [])
    # as the sentence says
    refinement.load_state_dict({**refinement.state_dict(), **old})
    assert (refinement.level, refinement.history) == (source.level, source.history)


def test_state_of_another_ladder():
    source = ProgressiveRefinement(IterationLadder(stop=9), **EXACT)
    run(source, [8, 8, 8, 9, 10])
    refinement = ProgressiveRefinement(IterationLadder(stop=3), **EXACT)
    with pytest.raises(
        ValueError, match="load it into a refinement with the ladder it was saved with"
    ):
        refinement.load_state_dict(source.state_dict())
    assert (refinement.level, refinement.history, refinement.checkpoint) == (0, [], math.inf)


def test_state_of_numpy_integers_is_plain_afterwards():
    """Levels that came out of an array, as where a state was kept in HDF5."""
    refinement = ProgressiveRefinement(IterationLadder(stop=3))
    state = refinement.state_dict()
    loaded = {
        "level": np.int64(1),
        "history": [[1.0, 1.0, np.int64(0), np.True_]],
        "checkpoint": np.float64(1),
        "levels": np.int64(3),
    }
    refinement.load_state_dict({**state, **loaded})
    assert json.loads(json.dumps(refinement.state_dict())) == {
        **state,
        "level": 1,
        "history": [[1.0, 1.0, 0, True]],
        "checkpoint": 1.0,
    }


@pytest.mark.parametrize("state", [None, 3, "level", [], [("level", 1)]])
def test_what_is_no_state(state):
    refinement = ProgressiveRefinement(IterationLadder(stop=3))
    with pytest.raises(TypeError, match="a state must be a dictionary, as state_dict"):
        refinement.load_state_dict(state)


# --- in parallel ----------------------------------------------------------------------------------


def test_communicator_of_one_rank(comm):
    alone = ProgressiveRefinement(IterationLadder(), **EXACT)
    together = ProgressiveRefinement(IterationLadder(), **EXACT, comm=comm)
    metrics = [8, 8, 8, 5, 4, 3, 4, 9]
    assert run(together, metrics) == run(alone, metrics)
    assert state_of(together) == state_of(alone)


# On rank 0, step 3 has q = 6/8 = tau_step: improving; step 4: q = 1, r = 6/inf: refine; step 5: r =
# 3/6 = tau_stop, q = 1/2: improving; step 6: q = 1, r = tau_stop: stay; step 7: q = 7/3: r > 1:
# refine.
RANK_0 = [8, 8, 6, 6, 3, 3, 7]
RANK_0_LEVELS = [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    "others",
    [
        [8, 8, math.nextafter(6, 7), 6, 3, 3, 7],  # the last bit of one metric, and q > tau_step
        [8, 8, 6, 6, 3, math.nextafter(3, 0), 7],  # the last bit of one metric, and r < tau_stop
        [16, 8, 4, 2, 1, 1 / 2, 1 / 4],
        [1e9, 0, 1e9, 0, 1e9, 0, 1e9],
        [math.nan, None, "bad", -1, math.inf, 0, 0],
    ],
    ids=["rounding of q", "rounding of r", "always improving", "wild", "invalid"],
)
@pytest.mark.parametrize(
    "communicator", [MPI.COMM_WORLD.Dup, lambda: MPI.COMM_WORLD], ids=["duplicate", "world"]
)
def test_ranks_agree_whatever_their_metrics(others, communicator):
    comm = communicator()
    refinement = ProgressiveRefinement(IterationLadder(), **EXACT, comm=comm)
    levels = run(refinement, RANK_0 if comm.rank == 0 else others)
    assert comm.allgather(levels) == [RANK_0_LEVELS] * comm.size
    states = comm.allgather(refinement.state_dict())
    assert all(state == states[0] for state in states)
    assert [record.metric for record in refinement.history] == RANK_0
    if comm != MPI.COMM_WORLD:
        comm.Free()


def test_the_ranks_would_not_agree_by_themselves():
    """What makes the test above a test: one bit decides."""
    for metrics in (
        RANK_0,
        [8, 8, math.nextafter(6, 7), 6, 3, 3, 7],
        [8, 8, 6, 6, 3, math.nextafter(3, 0), 7],
    ):
        levels = run(ProgressiveRefinement(IterationLadder(), **EXACT), metrics)
        assert (levels == RANK_0_LEVELS) is (metrics is RANK_0)


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    "bad",
    [math.nan, -1.0, "bad", None, lambda: 1.0],
    ids=["nan", "negative", "string", "None", "cannot be sent"],
)
def test_bad_metric_of_rank_0_is_refused_on_all_ranks(bad):
    comm = MPI.COMM_WORLD
    refinement = ProgressiveRefinement(IterationLadder(), **EXACT, comm=comm)
    run(refinement, [8, 8])
    before = state_of(refinement)
    refused = False
    try:
        refinement.step(bad if comm.rank == 0 else 8.0)
    except ValueError as error:
        refused = "a metric must" in str(error)
    assert comm.allgather(refused) == [True] * comm.size
    assert state_of(refinement) == before
    assert run(refinement, [8 if comm.rank == 0 else 1]) == [1]


@pytest.mark.parallel([2, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda comm: FixedRefinement(Iterations(3), comm=comm),
        lambda comm: ScheduledRefinement(IterationLadder(), {1: 2}, comm=comm),
    ],
    ids=["fixed", "scheduled"],
)
def test_the_record_is_the_same_on_all_ranks(make):
    comm = MPI.COMM_WORLD
    refinement = make(comm)
    run(refinement, [comm.rank + 1.0, comm.rank + 2.0])
    assert (
        comm.allgather([record.metric for record in refinement.history]) == [[1.0, 2.0]] * comm.size
    )


# --- rules, ladders and settings of one's own -----------------------------------------------------


@dataclass(frozen=True)
class Digits:
    """So many digits, in five Newton steps: a setting by its attributes alone."""

    digits: int
    max_it: int = 500
    budget: bool = False
    steps: int = 5

    @property
    def rtol(self):
        return 10.0**-self.digits


class Halving(Refinement):
    """Up when the metric has not halved."""

    def __init__(self, ladder, *, ratio=0.5, comm=None):
        super().__init__(ladder, ema_window=1, comm=comm)
        self.ratio = ratio

    parameters = ("ema_window", "ratio")

    def next_level(self, smoothed):
        is_last = self.level + 1 == len(self.ladder)
        return self.level + (
            not is_last and bool(self.history) and smoothed > self.ratio * self.history[-1].smoothed
        )


class Compared(Refinement):
    """Told how to find the metric: up when it is another one a level higher."""

    def step(self, validate):
        level = self.level
        coarse = self.agreed_metric(validate())
        self.level = min(level + 1, len(self.ladder) - 1)
        fine = self.agreed_metric(validate())
        self.level = level
        self.differs = abs(coarse - fine) > 0.1 * fine
        return super().step(coarse)

    def next_level(self, smoothed):
        return self.level + self.differs


def test_a_rule_of_ones_own_is_one_method():
    refinement = Halving([5, 10, 20])
    assert run(refinement, [8.0, 4.0, 3.0, 1.0, 0.9, 0.9]) == [0, 0, 1, 1, 2, 2]
    other = Halving([5, 10, 20])
    other.load_state_dict(json.loads(json.dumps(refinement.state_dict())))
    assert state_of(other) == state_of(refinement)
    with pytest.raises(ValueError, match="saved with ratio 0.5"):
        Halving([5, 10, 20], ratio=0.25).load_state_dict(refinement.state_dict())


def test_a_rule_may_be_told_something_else_than_a_metric():
    refinement = Compared([1, 2, 4])
    errors = {1: 1.0, 2: 0.5, 4: 0.49}
    seen = []

    def validate():
        seen.append(refinement.setting.iterations)
        return errors[seen[-1]]

    assert [refinement.step(validate) for _ in range(2)] == [True, False]
    assert seen == [1, 2, 2, 4] and [record.metric for record in refinement.history] == [1.0, 0.5]


def test_why_a_refinement_has_stopped():
    """As far as a loop can tell; that PRDP is as published is what it is told of a gap."""
    refinement = ProgressiveRefinement(IterationLadder(stop=3), **EXACT)
    found = []
    # as in "second plateau with gain" above: refined after steps 3 and 5, and improving at step 4
    for metric in (8, 8, 8, 4, 3.5, 3.5):
        refinement.heed(math.inf)
        refinement.step(refinement.told(metric, lambda: 0.0))
        found.append(refinement.stopped)
    assert found == ["", "", "", "", "that is the last level", "that is the last level"]
    refinement = ProgressiveRefinement(IterationLadder(), **EXACT)
    # plateaus without gain at steps 4 and 5, as in "second plateau without gain"; step 7 is worse
    found = []
    for metric in (8, 8, 8, 7, 6, 3, 9):
        refinement.step(metric)
        found.append(refinement.stopped)
    assert found == ["", "", "", *["this level gains less than tau_stop asks"] * 3, ""]
    assert FixedRefinement(Iterations(3)).stopped == "it has no other level"
    assert ScheduledRefinement([1, 2], {5: 1}).stopped == ""


def test_a_rule_without_its_method_says_what_to_write():
    with pytest.raises(NotImplementedError, match=r"write its method next_level\(smoothed\)"):
        Refinement([1, 2]).step(1.0)


def test_a_setting_of_ones_own_is_its_attributes():
    setting = Digits(3)
    assert isinstance(setting, NewtonSetting) and not isinstance(Iterations(3), NewtonSetting)
    state = FixedRefinement(setting).state_dict()
    assert state["ladder"] == [[0, 1e-3, 500, False, 5]]
    with pytest.raises(
        ValueError, match="steps must be an integer of at least 1, found 0, in the setting"
    ):
        FixedRefinement(Digits(3, steps=0))
    with pytest.raises(TypeError, match="linear must be the setting of a linear solve"):
        NewtonSteps(2, setting)


@pytest.fixture
def registered():
    """Ladders and rules that are registered in a test are so in it alone."""
    ladders, rules = dict(LADDERS), dict(RULES)
    yield
    for entries, before in ((LADDERS, ladders), (RULES, rules)):
        entries.clear()
        entries.update(before)


def test_a_ladder_that_is_registered_is_one_for_options(registered):
    from prdp_fem.refinement.options import refinement_from_options

    @registry.ladder("doubling", step=("ratio", float))
    class Doubling(list):
        def __init__(self, start=1, ratio=2.0, stop=9):
            super().__init__(
                int(start * ratio**level) for level in range(9) if start * ratio**level <= stop
            )

    made = refinement_from_options(
        ladder="doubling", start=2, step=3.0, stop=20, comm=MPI.COMM_SELF
    )
    assert made.ladder == [2, 6, 18] and made.setting == Iterations(2)
