"""Schedules: the refinements that a study compares, by name."""

import pytest

from prdp_fem import (
    DiscrepancyRefinement,
    IterationLadder,
    Iterations,
    ProgressiveRefinement,
    Refinement,
    Tolerance,
)
from prdp_fem.refinement import RULES, registry
from prdp_fem.studies import CONVERGED, PRDP, Schedule


@pytest.mark.parametrize(
    "text",
    [
        "prdp:0.9000001:0.9",
        "converged",
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
    with pytest.raises(ValueError, match="TAU_STOP, discrepancy, discrepancy:GAP or a number"):
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
    schedules = [CONVERGED, PRDP, Schedule("halving"), Schedule("constant", 8), schedule]
    assert sorted(reversed(schedules), key=lambda schedule: schedule.place) == schedules
    assert len({schedule.colour for schedule in schedules}) == 4
