"""Schedules: the refinements that a study compares, by name."""

import pytest

from prdp_fem import (
    DiscrepancyRefinement,
    IterationLadder,
    Iterations,
    NewtonSteps,
    ProgressiveRefinement,
    Refinement,
    Tolerance,
)
from prdp_fem.refinement import RULES, registry
from prdp_fem.studies import CONVERGED, DIRECT, PRDP, Schedule


@pytest.mark.parametrize(
    "text",
    [
        "prdp:0.9000001:0.9",
        "converged",
        "direct",
        "rtol:1e-2",
        "rtol:2.5e-7",
        "prdp",
        "prdp:0.9:0.8",
        "1",
        "25",
        "discrepancy",
        "discrepancy:0.2",
    ],
)
def test_schedules_have_names_that_are_read_again(text):
    schedule = Schedule.from_text(text)
    assert schedule.name == text and Schedule.from_text(schedule.name) == schedule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "found 'fast'"),
        ("0", "found '0'"),
        ("-3", "found '-3'"),
        ("prdp:0.9", "found"),
        ("rtol", "found 'rtol'"),
        ("rtol:2", "rtol must lie in"),
        ("rtol:x", "could not convert"),
        ("direct:1", "found 'direct:1'"),
        ("prdp:x:1", "could not convert"),
        ("prdp:0.9:1.5", "tau_stop must lie in"),
    ],
)
def test_other_schedules_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_text(text)


def test_schedules_make_refinements():
    how = {"ladder": IterationLadder(2, 3), "converged": Tolerance(1e-10)}
    assert Schedule("converged").refinement(**how).setting == Tolerance(1e-10)
    direct = Schedule("direct").refinement(**how)
    assert str(direct.setting) == "factorised" and direct.setting.max_it is None
    tolerance = Schedule.from_text("rtol:0.01")
    assert (tolerance.name, tolerance.title) == ("rtol:1e-2", "to 1e-2")
    assert tolerance.refinement(**how).setting == Tolerance(1e-2)
    assert tolerance.refinement(
        tolerance=lambda rtol: NewtonSteps(2, Tolerance(rtol)), **how
    ).setting == NewtonSteps(2, Tolerance(1e-2))
    assert Schedule.from_text("7").refinement(**how).setting == Iterations(7)
    assert Schedule.from_text("7").refinement(
        constant=lambda k: Tolerance(10.0**-k), **how
    ).setting == Tolerance(1e-7)
    prdp = Schedule.from_text("prdp:0.9:0.8").refinement(**how)
    assert isinstance(prdp, ProgressiveRefinement) and (
        prdp.tau_step,
        prdp.tau_stop,
        prdp.setting,
    ) == (0.9, 0.8, Iterations(2))
    discrepancy = Schedule.from_text("discrepancy:0.2").refinement(**how)
    assert isinstance(discrepancy, DiscrepancyRefinement) and discrepancy.gap == 0.2
    default, ours = ProgressiveRefinement(IterationLadder()), Schedule("prdp").refinement(**how)
    assert (ours.tau_step, ours.tau_stop) == (default.tau_step, default.tau_stop)


class Halving(Refinement):
    """A rule with a number of its own."""

    def __init__(self, ladder, *, ratio=0.5, comm=None):
        super().__init__(ladder, comm=comm)
        self.ratio = ratio


def test_a_rule_that_is_registered_is_a_schedule(monkeypatch):
    with pytest.raises(ValueError, match="direct, rtol:TOLERANCE, prdp, prdp:TAU.*:GAP or a num"):
        Schedule.from_text("halving")
    monkeypatch.setitem(RULES, "halving", None)  # until the end of the test
    registry.rule("halving", title="halving", options={"ratio": float}, varied=("ratio",))(Halving)
    schedule = Schedule.from_text("halving:0.25")
    assert (schedule.name, schedule.title, schedule.is_varied) == (
        "halving:0.25",
        "halving 0.25",
        True,
    )
    made = schedule.refinement(ladder=[3, 5], converged=Tolerance(1e-8))
    assert isinstance(made, Halving) and made.ratio == 0.25 and made.setting == Iterations(3)
    contestants = [DIRECT, Schedule("rtol", rtol=1e-6), Schedule("rtol", rtol=1e-2)]
    rules = [PRDP, Schedule("halving")]
    schedules = [CONVERGED, *contestants, *rules, Schedule("constant", 8), schedule]
    assert [one.is_converged for one in schedules] == [True] * 4 + [False] * 4
    assert sorted(reversed(schedules), key=lambda schedule: schedule.place) == schedules
    assert len({schedule.colour for schedule in schedules}) == 7
