"""Ladders are sequences of settings: what each level means, and Python's sequence protocol.

Levels obey that protocol throughout: a negative level counts from the end, a slice is a sequence of
settings, and a level beyond the end is an IndexError.
"""

import copy
import dataclasses
import math
import pickle
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prdp_fem.arguments import COUNT
from prdp_fem.ladders import (
    GeometricLadder,
    IterationLadder,
    Iterations,
    Setting,
    Tolerance,
    ToleranceLadder,
)

# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, rtol, max_it, budget, text",
    [
        (Iterations(1), 1e-12, 1, True, "1 iteration"),
        (Iterations(20), 1e-12, 20, True, "20 iterations"),
        (Iterations(20, rtol_floor=0), 0, 20, True, "20 iterations"),
        (Iterations(np.int64(3), np.float64(1e-8)), 1e-8, 3, True, "3 iterations"),
        (Tolerance(1e-6), 1e-6, 10_000, False, "relative tolerance 1e-06"),
        (Tolerance(0.25, max_it=7), 0.25, 7, False, "relative tolerance 0.25"),
    ],
)
def test_setting(setting, rtol, max_it, budget, text):
    assert isinstance(setting, Setting)
    assert (setting.rtol, setting.max_it, setting.budget, str(setting)) == (
        rtol,
        max_it,
        budget,
        text,
    )
    assert pickle.loads(pickle.dumps(setting)) == setting
    assert hash(copy.copy(setting)) == hash(setting)


@pytest.mark.parametrize(
    "setting, field", [(Iterations(3), "iterations"), (Tolerance(0.5), "rtol")]
)
def test_setting_is_frozen(setting, field):
    before = repr(setting)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(setting, field, 1)
    assert repr(setting) == before


def test_settings_are_compared_by_value():
    assert Iterations(3) == Iterations(3) != Iterations(4)
    assert Iterations(3) != Iterations(3, rtol_floor=1e-6)
    assert Tolerance(0.5) == Tolerance(0.5) != Tolerance(0.5, max_it=3)
    assert Iterations(3) != Tolerance(0.5)


@pytest.mark.parametrize(
    "lacking",
    [{"rtol": 0.1, "max_it": 1}, {"rtol": 0.1, "budget": True}, {"max_it": 1, "budget": True}],
)
def test_anything_with_the_three_attributes_is_a_setting(lacking):
    assert isinstance(SimpleNamespace(rtol=0.1, max_it=1, budget=True), Setting)
    assert not isinstance(SimpleNamespace(**lacking), Setting)


@pytest.mark.parametrize(
    "make, name, expected",
    [
        (lambda value: Iterations(value), "iterations", "an integer of at least 1"),
        (lambda value: Tolerance(0.1, max_it=value), "max_it", "an integer of at least 1"),
        (lambda value: IterationLadder(start=value), "start", "an integer of at least 1"),
        (lambda value: IterationLadder(step=value), "step", "an integer of at least 1"),
        (lambda value: IterationLadder(stop=value), "stop", "an integer of at least 1"),
        (lambda value: ToleranceLadder(max_it=value), "max_it", "an integer of at least 1"),
        (lambda value: GeometricLadder(start=value), "start", "an integer of at least 1"),
    ],
)
@pytest.mark.parametrize(
    "value", [0, -1, 1.0, 2.5, True, False, "3", math.nan, math.inf, [1], np.float64(1)]
)
def test_counts_are_refused(make, name, expected, value):
    with pytest.raises(ValueError) as error:
        make(value)
    assert str(error.value) == f"{name} must be {expected}, found {value!r}"


@pytest.mark.parametrize(
    "make, name, interval",
    [
        (lambda value: Tolerance(value), "rtol", "(0, 1)"),
        (lambda value: ToleranceLadder(start=value), "start", "(0, 1)"),
        (lambda value: ToleranceLadder(factor=value), "factor", "(0, 1)"),
        (lambda value: ToleranceLadder(stop=value), "stop", "(0, 1)"),
        (lambda value: Iterations(1, rtol_floor=value), "rtol_floor", "[0, 1)"),
        (lambda value: IterationLadder(rtol_floor=value), "rtol_floor", "[0, 1)"),
        (lambda value: GeometricLadder(rtol_floor=value), "rtol_floor", "[0, 1)"),
    ],
)
@pytest.mark.parametrize(
    "value, expected",
    [
        (-0.5, "lie in {}"),
        (1, "lie in {}"),
        (1.0, "lie in {}"),
        (2, "lie in {}"),
        (math.nan, "lie in {}"),
        (math.inf, "lie in {}"),
        (-math.inf, "lie in {}"),
        (True, "be a number"),
        ("0.5", "be a number"),
        (None, "be a number"),
        (0.5j, "be a number"),
    ],
)
def test_fractions_are_refused(make, name, interval, value, expected):
    with pytest.raises(ValueError) as error:
        make(value)
    assert str(error.value) == f"{name} must {expected.format(interval)}, found {value!r}"


@pytest.mark.parametrize(
    "arguments",
    [{"start": 0}, {"factor": 0}, {"stop": 0}, {"start": 0.0}, {"factor": 0.0}, {"stop": 0.0}],
)
def test_tolerances_of_zero_are_refused(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=rf"^{name} must lie in \(0, 1\), found {value!r}$"):
        ToleranceLadder(**arguments)


# --- iterations -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, counts",
    [
        ({"stop": 5}, [1, 2, 3, 4, 5]),
        ({"start": 1, "step": 2, "stop": 8}, [1, 3, 5, 7]),
        ({"start": 1, "step": 2, "stop": 9}, [1, 3, 5, 7, 9]),
        ({"start": 4, "step": 3, "stop": 4}, [4]),
        ({"start": 4, "step": 30, "stop": 20}, [4]),
        ({"start": 1, "step": 1, "stop": 1}, [1]),
        ({"start": np.int64(10), "step": np.int32(20), "stop": np.int64(70)}, [10, 30, 50, 70]),
    ],
)
def test_iteration_ladder(arguments, counts):
    ladder = IterationLadder(**arguments)
    assert isinstance(ladder, Sequence)
    assert list(ladder) == [Iterations(count) for count in counts]
    assert len(ladder) == len(counts)
    assert [ladder[level] for level in range(len(counts))] == list(ladder)
    assert (
        [ladder[-1 - level] for level in range(len(counts))]
        == list(reversed(ladder))
        == list(ladder)[::-1]
    )


def test_iteration_ladder_hands_its_floor_to_every_level():
    assert list(IterationLadder(stop=2, rtol_floor=1e-6)) == [
        Iterations(1, 1e-6),
        Iterations(2, 1e-6),
    ]
    assert list(IterationLadder(stop=2, rtol_floor=0)[0:2]) == [
        Iterations(1, 0.0),
        Iterations(2, 0.0),
    ]


def test_iteration_ladder_without_an_end():
    ladder = IterationLadder()
    assert len(ladder) > 10**18
    assert ladder[0] == Iterations(1)
    assert ladder[10**6] == Iterations(10**6 + 1)
    assert IterationLadder(start=5, step=3)[10**6] == Iterations(3 * 10**6 + 5)
    assert list(ladder[:3]) == [Iterations(1), Iterations(2), Iterations(3)]
    assert list(ladder[10:20:4]) == [Iterations(11), Iterations(15), Iterations(19)]
    assert ladder.index(Iterations(5)) == 4


def test_membership():
    assert Iterations(5) in IterationLadder(step=2, stop=9)
    assert Iterations(4) not in IterationLadder(step=2, stop=9)
    assert Iterations(5, rtol_floor=1e-3) not in IterationLadder(stop=9)
    assert Iterations(5) in IterationLadder()
    assert Tolerance(0.1) in ToleranceLadder()
    assert Tolerance(0.3) not in ToleranceLadder()
    assert 0.1 not in ToleranceLadder()


@pytest.mark.parametrize(
    "ladder, setting",
    [
        (IterationLadder(start=2), Iterations(1)),
        (IterationLadder(step=2), Iterations(2)),
        (IterationLadder(), Iterations(3, rtol_floor=1e-6)),
        (IterationLadder(), Tolerance(1e-3)),
        (IterationLadder(), 3),
    ],
)
def test_what_is_not_on_a_ladder_without_an_end(ladder, setting):
    """A search level by level would not end."""
    assert setting not in ladder


@pytest.mark.parametrize("start, stop", [(3, 2), (60, 1)])
def test_iteration_ladder_that_would_be_empty(start, stop):
    with pytest.raises(
        ValueError, match=f"start must not exceed stop, found start={start} and stop={stop}"
    ):
        IterationLadder(start=start, stop=stop)


# --- geometric ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, counts",
    [
        # each is the last times the ratio, rounded, but at least one more
        ({"stop": 100}, [1, 2, 3, 4, 6, 8, 11, 16, 23, 33, 47, 66, 93]),
        ({"ratio": 2, "stop": 64}, [1, 2, 4, 8, 16, 32, 64]),
        ({"start": 10, "ratio": 1.5, "stop": 100}, [10, 15, 22, 33, 50, 75]),
        ({"ratio": 1.01, "stop": 6}, [1, 2, 3, 4, 5, 6]),
        ({"start": 7, "stop": 7}, [7]),
        ({"start": np.int64(3), "ratio": np.float64(3), "stop": np.int64(30)}, [3, 9, 27]),
        ({"ratio": 1e300, "stop": 30}, [1]),
    ],
)
def test_geometric_ladder(arguments, counts):
    ladder = GeometricLadder(**arguments)
    assert isinstance(ladder, Sequence)
    assert list(ladder) == [Iterations(count) for count in counts]
    assert len(ladder) == len(counts)
    assert list(ladder[1:]) == list(ladder)[1:] and list(reversed(ladder)) == list(ladder)[::-1]
    assert all(setting in ladder for setting in ladder)


@settings(deadline=None)
@given(start=st.integers(1, 1000), ratio=st.floats(1.01, 50))
def test_geometric_ladder_grows_by_its_ratio_and_by_one_at_least(start, ratio):
    counts = [setting.iterations for setting in GeometricLadder(start, ratio)]
    assert counts[0] == start and counts[-1] <= COUNT < (counts[-1] + 1) * ratio + 1
    for coarser, finer in zip(counts, counts[1:]):
        assert finer == coarser + 1 or abs(finer - ratio * coarser) <= 0.5
        assert finer > coarser and finer >= ratio * coarser - 0.5


def test_geometric_ladder_without_an_end_doubles_every_other_level():
    ladder = GeometricLadder()
    assert len(ladder) == 61 and ladder[:3] == [Iterations(1), Iterations(2), Iterations(3)]
    for level in range(6, 58):
        assert ladder[level + 2].iterations == pytest.approx(2 * ladder[level].iterations, rel=0.08)
    assert list(GeometricLadder(stop=2, rtol_floor=1e-6)) == [
        Iterations(1, 1e-6),
        Iterations(2, 1e-6),
    ]
    assert Iterations(5) not in ladder and Iterations(4, 1e-3) not in ladder and 4 not in ladder


def test_geometric_ladders_that_would_be_empty_or_endless():
    with pytest.raises(ValueError, match="start must not exceed stop, found start=3 and stop=2"):
        GeometricLadder(start=3, stop=2)
    for ratio in (1, 0.5, 1.005, math.nan, math.inf, True, "2", None):
        with pytest.raises(ValueError, match="ratio must be a number of at least 1.01"):
            GeometricLadder(ratio=ratio)


# --- tolerances -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, tolerances",
    [
        ({}, [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10]),
        ({"start": 0.5, "factor": 0.5, "stop": 0.0625}, [0.5, 0.25, 0.125, 0.0625]),
        (
            {"start": 0.5, "factor": 0.5, "stop": 0.1},
            [0.5, 0.25, 0.125],
        ),  # 0.0625 would be below stop
        ({"start": 0.5, "factor": 0.5, "stop": 0.0624}, [0.5, 0.25, 0.125, 0.0625]),
        ({"start": 0.5, "factor": 0.5, "stop": 0.5}, [0.5]),
        ({"start": 0.5, "factor": 0.1, "stop": 0.4}, [0.5]),
        ({"start": 0.1, "factor": 0.01, "stop": 1e-9}, [1e-1, 1e-3, 1e-5, 1e-7, 1e-9]),
        # 0.9⁴ = 0.6561, up to rounding
        ({"start": 0.9, "factor": 0.9, "stop": 0.6561}, [0.9, 0.81, 0.729, 0.6561]),
        # The last power is stop in decimals, and off it by rounding: it counts.
        ({"start": 0.1, "factor": 0.3, "stop": 0.00081}, [0.1, 0.03, 0.009, 0.0027, 0.00081]),
        ({"start": 0.1, "factor": 0.3, "stop": 0.0027}, [0.1, 0.03, 0.009, 0.0027]),
    ],
)
def test_tolerance_ladder(arguments, tolerances):
    ladder = ToleranceLadder(**arguments)
    assert isinstance(ladder, Sequence)
    assert [setting.rtol for setting in ladder] == pytest.approx(tolerances, rel=1e-14, abs=0)
    assert len(ladder) == len(tolerances)
    assert ladder[0].rtol == ladder.start
    assert list(ladder[1:]) == list(ladder)[1:]
    assert (
        [ladder[-1 - level] for level in range(len(ladder))]
        == list(reversed(ladder))
        == list(ladder)[::-1]
    )


@pytest.mark.parametrize("stop", [0.0027, 0.000243, 7.29e-05, 0.00081])
def test_no_tolerance_is_below_stop_by_rounding(stop):
    """0.1·0.3³, for one, is 0.0026999999999999997."""
    assert ToleranceLadder(start=0.1, factor=0.3, stop=stop)[-1].rtol >= stop


def test_tolerance_ladder_hands_its_cap_to_every_level():
    assert {setting.max_it for setting in ToleranceLadder(max_it=50)} == {50}
    assert {setting.max_it for setting in ToleranceLadder()} == {10_000}
    assert not any(setting.budget for setting in ToleranceLadder())


@settings(deadline=None)
@given(start=st.floats(1e-3, 0.99), factor=st.floats(0.01, 0.9), stop=st.floats(1e-14, 1e-3))
def test_tolerance_ladder_goes_down_to_stop_and_no_further(start, factor, stop):
    tolerances = [setting.rtol for setting in ToleranceLadder(start, factor, stop)]
    assert tolerances[0] == start
    assert all(
        finer < coarser for coarser, finer in zip(tolerances[:-1], tolerances[1:], strict=True)
    )
    assert all(
        finer == pytest.approx(factor * coarser, rel=1e-8)
        for coarser, finer in zip(tolerances[:-1], tolerances[1:], strict=True)
    )
    assert tolerances[-1] >= stop
    assert tolerances[-1] * factor < stop * (1 + 1e-8)  # no level is missing at the end


def test_tolerance_ladder_that_would_be_empty():
    with pytest.raises(
        ValueError, match=r"start must not be below stop, found start=0\.01 and stop=0\.1"
    ):
        ToleranceLadder(start=0.01, stop=0.1)


# --- both: sequences ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ladder, level",
    [
        (IterationLadder(stop=3), 3),
        (IterationLadder(stop=3), -4),
        (IterationLadder(stop=3), 10**30),
        (ToleranceLadder(), 10),
        (ToleranceLadder(), -11),
        (IterationLadder(), 10**30),
        (GeometricLadder(stop=3), 3),
        (GeometricLadder(), 61),
    ],
)
def test_level_beyond_the_ends(ladder, level):
    with pytest.raises(IndexError, match="out of range"):
        ladder[level]


@pytest.mark.parametrize(
    "ladder", [IterationLadder(stop=3), IterationLadder(), ToleranceLadder(), GeometricLadder()]
)
@pytest.mark.parametrize("level", ["0", 1.0, None])
def test_level_that_is_no_integer(ladder, level):
    with pytest.raises(TypeError, match="integers or slices"):
        ladder[level]


@pytest.mark.parametrize(
    "ladder", [IterationLadder(stop=3), IterationLadder(), ToleranceLadder(), GeometricLadder()]
)
def test_level_of_numpy(ladder):
    assert ladder[np.int64(1)] == ladder[1]


LADDERS = [
    IterationLadder(),
    IterationLadder(start=4, step=2),
    IterationLadder(start=1, step=1, stop=60),
    IterationLadder(stop=np.int64(60)),
    IterationLadder(stop=3, rtol_floor=0),
    IterationLadder(stop=3, rtol_floor=1 / 3e7),  # more digits than a short format shows
    ToleranceLadder(),
    ToleranceLadder(start=0.5, factor=0.5, stop=0.1, max_it=20),
    ToleranceLadder(start=1 / 3, factor=1 / 7, stop=1 / 3e5),
    GeometricLadder(),
    GeometricLadder(start=3, ratio=1 + 1 / 3, stop=np.int64(60), rtol_floor=1e-6),
]


@pytest.mark.parametrize("ladder", LADDERS, ids=repr)
def test_repr_makes_the_same_ladder_again(ladder):
    assert eval(repr(ladder)) == ladder
    assert hash(eval(repr(ladder))) == hash(ladder)


@pytest.mark.parametrize(
    "ladder, text",
    [
        (IterationLadder(), "IterationLadder(start=1, step=1, stop=None)"),
        (IterationLadder(2, 3, 11), "IterationLadder(start=2, step=3, stop=11)"),
        (
            IterationLadder(rtol_floor=1e-6),
            "IterationLadder(start=1, step=1, stop=None, rtol_floor=1e-06)",
        ),
        (GeometricLadder(), "GeometricLadder(start=1, ratio=2**0.5, stop=None)"),
        (GeometricLadder(2, 1.5, 9), "GeometricLadder(start=2, ratio=1.5, stop=9)"),
        (ToleranceLadder(), "ToleranceLadder(start=0.1, factor=0.1, stop=1e-10, max_it=10000)"),
    ],
)
def test_repr(ladder, text):
    assert repr(ladder) == text


@pytest.mark.parametrize("ladder", LADDERS, ids=repr)
def test_ladders_are_copied_and_pickled(ladder):
    for other in (copy.deepcopy(ladder), pickle.loads(pickle.dumps(ladder))):
        assert other == ladder and len(other) == len(ladder) and other[0] == ladder[0]


def test_ladders_are_compared_by_value():
    assert IterationLadder(stop=5) == IterationLadder(1, 1, 5)
    # the same levels: 1, 3, 5, 7
    assert IterationLadder(step=2, stop=8) == IterationLadder(step=2, stop=7)
    assert hash(IterationLadder(step=2, stop=8)) == hash(IterationLadder(step=2, stop=7))
    assert ToleranceLadder() == ToleranceLadder(0.1, 0.1, 1e-10, 10_000)
    assert (
        len(
            {IterationLadder(stop=5), IterationLadder(stop=5), ToleranceLadder(), ToleranceLadder()}
        )
        == 2
    )


@pytest.mark.parametrize(
    "one, other",
    [
        (IterationLadder(stop=5), IterationLadder(stop=6)),
        (IterationLadder(stop=5), IterationLadder()),
        (IterationLadder(stop=5), IterationLadder(start=2, stop=5)),
        (IterationLadder(stop=5), IterationLadder(step=2, stop=5)),
        (IterationLadder(stop=5), IterationLadder(stop=5, rtol_floor=1e-6)),
        (IterationLadder(stop=5), ToleranceLadder()),
        (IterationLadder(stop=2), [Iterations(1), Iterations(2)]),
        (ToleranceLadder(), ToleranceLadder(start=0.2)),
        (ToleranceLadder(), ToleranceLadder(factor=0.2)),
        (ToleranceLadder(), ToleranceLadder(stop=1e-9)),
        (ToleranceLadder(), ToleranceLadder(max_it=9)),
        (ToleranceLadder(), "ToleranceLadder()"),
        (GeometricLadder(), GeometricLadder(ratio=2)),
        (GeometricLadder(ratio=1.01, stop=5), IterationLadder(stop=5)),
    ],
)
def test_ladders_that_differ(one, other):
    assert one != other and other != one


# --- the module -----------------------------------------------------------------------------------

# In interpreters of their own, and on one rank: a process that mpiexec has not started must not be
# one of its job.


@pytest.mark.parallel(1)
def test_ladders_and_refinements_are_pure_python():
    """They bring nothing heavy along, not even by the package that they are in."""
    script = """
import sys
from prdp_fem.refinement import IterationLadder, ProgressiveRefinement
refinement = ProgressiveRefinement(IterationLadder(), ema_window=1, error_window=1)
assert [refinement.step(8.0), refinement.step(8.0)] == [False, True]
heavy = {"petsc4py", "mpi4py", "firedrake", "torch", "numpy"} & sys.modules.keys()
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parallel(1)
def test_importing_the_package_does_not_import_torch():
    script = """
import sys
import prdp_fem
assert "firedrake" not in sys.modules
prdp_fem.LinearVariationalSolver, prdp_fem.solvers.control
assert "firedrake" in sys.modules
assert "torch" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
