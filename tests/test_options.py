"""Refinements from PETSc's options, and the documented list of options against the code."""

import re
from types import SimpleNamespace

import firedrake
import pytest
from mpi4py import MPI
from petsc4py import PETSc

import prdp_fem
from prdp_fem.refinement import (
    DiscrepancyRefinement,
    GeometricLadder,
    IterationLadder,
    Iterations,
    NewtonLadder,
    ProgressiveRefinement,
    ToleranceLadder,
)
from prdp_fem.refinement import options as module
from prdp_fem.refinement.options import refinement_from_options


@pytest.fixture
def set_options():
    """Puts options, given as one would on the command line, into PETSc's database, and takes them
    out after the test.
    """
    options = PETSc.Options()
    names = []

    def put(**values):
        for name, value in values.items():
            assert not options.hasName(name)
            options.setValue(name, value)
            names.append(name)

    yield put
    for name in names:
        options.delValue(name)


def printed(capfd):
    """What rank 0 has printed, on all ranks; the others must be silent."""
    first, *others = MPI.COMM_WORLD.allgather(capfd.readouterr().out)
    assert not any(others)
    return first


# --- the documented list --------------------------------------------------------------------------

# What the docstring says: {name: (type, default)}.
DOCUMENTED = {
    name: (kind, default)
    for name, kind, default in re.findall(
        r"^ +-prdp_(\w+)(?: <([^>]*)>)?: [^(\n]*(?:\(([^)\n]*)\))?$",
        refinement_from_options.__doc__,
        re.MULTILINE,
    )
}

# A value other than the default for each option, and what it changes.
CHANGES = {
    "ladder": (
        "tolerances",
        lambda refinement, output: isinstance(refinement.ladder, ToleranceLadder),
    ),
    "start": ("7", lambda refinement, output: refinement.ladder == IterationLadder(start=7)),
    "step": ("7", lambda refinement, output: refinement.ladder == IterationLadder(step=7)),
    "ratio": ("1.5", lambda refinement, output: refinement.ladder == GeometricLadder(ratio=1.5)),
    "stop": ("7", lambda refinement, output: refinement.ladder == IterationLadder(stop=7)),
    "tau_step": ("0.75", lambda refinement, output: refinement.tau_step == 0.75),
    "tau_stop": ("0.75", lambda refinement, output: refinement.tau_stop == 0.75),
    "ema_window": ("7", lambda refinement, output: refinement.ema_window == 7),
    "error_window": ("7", lambda refinement, output: refinement.error_window == 7),
    "rule": (
        "discrepancy",
        lambda refinement, output: isinstance(refinement, DiscrepancyRefinement),
    ),
    "gap": ("0.5", lambda refinement, output: getattr(refinement, "gap", None) == 0.5),
    "monitor": (None, lambda refinement, output: "PRDP metric" in output),
    "view": (None, lambda refinement, output: "ProgressiveRefinement(" in output),
}


def make_and_step(capfd):
    refinement = refinement_from_options()
    refinement.step(refinement.told(1.0, lambda: 1.0))
    return refinement, printed(capfd)


def test_every_option_is_documented_and_nothing_else_is():
    assert DOCUMENTED.keys() == CHANGES.keys()


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_every_documented_option_is_read(name, set_options, capfd):
    value, changed = CHANGES[name]
    assert not changed(*make_and_step(capfd))
    set_options(**{f"prdp_{name}": value})
    if name == "ratio":
        set_options(prdp_ladder="geometric")
    if name == "gap":
        set_options(prdp_rule="discrepancy")
    assert changed(*make_and_step(capfd))


@pytest.mark.parametrize("ladder", ["iterations", "tolerances"])
def test_every_option_that_is_read_is_documented(ladder, monkeypatch):
    read = set()

    class Recorder:
        """PETSc's options, noting each name that is asked for."""

        def __init__(self, prefix):
            self.prefix, self.options = prefix, PETSc.Options(prefix)

        def __getattr__(self, method):
            def ask(name, *arguments):
                read.add(f"{self.prefix}{name}")
                return getattr(self.options, method)(name, *arguments)

            return ask

    monkeypatch.setattr(module, "PETSc", SimpleNamespace(Options=Recorder, Sys=PETSc.Sys))
    refinement_from_options(ladder=ladder)
    assert read == {f"prdp_{name}" for name in DOCUMENTED}


def test_documented_defaults():
    iterations, tolerances = refinement_from_options(), refinement_from_options(ladder="tolerances")
    assert iterations.ladder == IterationLadder(start=1, step=1, stop=None)
    assert tolerances.ladder == ToleranceLadder(start=0.1, factor=0.1, stop=1e-10)
    assert {name: default for name, (_, default) in DOCUMENTED.items() if default} == {
        "ladder": "iterations",
        "start": f"{iterations.ladder.start}, or {tolerances.ladder.start}",
        "step": f"{iterations.ladder.step}, or {tolerances.ladder.factor}",
        "ratio": "1.4142",
        "stop": f"no limit, or {tolerances.ladder.stop}",
        "rule": "prdp",
        "tau_step": f"{iterations.tau_step}",
        "tau_stop": f"{iterations.tau_stop}",
        "ema_window": f"{iterations.ema_window}",
        "error_window": f"{iterations.error_window}",
        "gap": f"{refinement_from_options(rule='discrepancy').gap}",
    }


def test_documented_types():
    assert {name: kind for name, (kind, _) in DOCUMENTED.items()} == {
        "ladder": "geometric|iterations|tolerances|newton",
        "start": "number",
        "step": "number",
        "ratio": "real",
        "stop": "number",
        "rule": "prdp|discrepancy",
        "tau_step": "real",
        "tau_stop": "real",
        "ema_window": "int",
        "error_window": "int",
        "gap": "real",
        "monitor": "",
        "view": "",
    }


def test_the_package_has_it():
    assert prdp_fem.refinement_from_options is refinement_from_options


# --- where a value comes from ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, prefix, defaults, expected",
    [
        ({}, "", {}, {}),
        (
            {},
            "",
            {"start": 2, "stop": 9, "tau_step": 0.5},
            {"start": 2, "stop": 9, "tau_step": 0.5},
        ),
        # The database goes before defaults of the call …
        ({"prdp_start": "3"}, "", {"start": 2, "stop": 9}, {"start": 3, "stop": 9}),
        (
            {"prdp_tau_stop": "0.25", "prdp_ema_window": "1"},
            "",
            {"tau_stop": 0.5, "ema_window": 2, "error_window": 4},
            {"tau_stop": 0.25, "ema_window": 1, "error_window": 4},
        ),
        # … where its prefix is that of the call.
        ({"heat_prdp_start": "3"}, "", {"start": 2}, {"start": 2}),
        ({"heat_prdp_start": "3"}, "heat_", {"start": 2}, {"start": 3}),
        ({"prdp_start": "3"}, "heat_", {"start": 2}, {"start": 2}),
        (
            {"prdp_start": "3", "heat_prdp_start": "4", "wave_prdp_start": "5"},
            "heat_",
            {},
            {"start": 4},
        ),
        (
            {"prdp_step": "4", "prdp_stop": "9", "prdp_tau_step": "1", "prdp_error_window": "1"},
            "",
            {},
            {"step": 4, "stop": 9, "tau_step": 1.0, "error_window": 1},
        ),
        ({"prdp_stop": "9"}, "", {"stop": None}, {"stop": 9}),
    ],
)
def test_iterations(set_options, options, prefix, defaults, expected):
    set_options(**options)
    refinement = refinement_from_options(prefix, **defaults)
    rule = {"tau_step": 0.98, "tau_stop": 0.9, "ema_window": 6, "error_window": 3}
    assert type(refinement) is ProgressiveRefinement
    assert refinement.ladder == IterationLadder(
        **{name: value for name, value in expected.items() if name not in rule}
    )
    assert {name: getattr(refinement, name) for name in rule} == {
        name: expected.get(name, value) for name, value in rule.items()
    }
    assert (refinement.level, refinement.history, refinement.monitors) == (0, [], [])


@pytest.mark.parametrize(
    "options, arguments, expected",
    [
        ({"prdp_ladder": "tolerances"}, {}, ToleranceLadder()),
        ({}, {"ladder": "tolerances"}, ToleranceLadder()),
        ({"prdp_ladder": "tolerances"}, {"ladder": "iterations"}, ToleranceLadder()),
        (
            {"prdp_ladder": "newton", "prdp_start": "2", "prdp_stop": "6"},
            {"step": 2},
            NewtonLadder(2, 2, 6),
        ),
        ({"prdp_ladder": "iterations"}, {"ladder": "tolerances"}, IterationLadder()),
        (
            {"prdp_start": "0.5", "prdp_step": "0.25", "prdp_stop": "1e-3"},
            {"ladder": "tolerances"},
            ToleranceLadder(0.5, 0.25, 1e-3),
        ),
        (
            {"prdp_step": "0.25"},
            {"ladder": "tolerances", "step": 0.5, "stop": 1e-3},
            ToleranceLadder(0.1, 0.25, 1e-3),
        ),
        (
            {"prdp_ladder": "tolerances", "prdp_stop": "1e-6"},
            {"start": 0.5},
            ToleranceLadder(0.5, 0.1, 1e-6),
        ),
    ],
)
def test_tolerances(set_options, options, arguments, expected):
    set_options(**options)
    assert refinement_from_options(**arguments).ladder == expected


def test_options_are_read_when_the_refinement_is_made(set_options):
    refinement = refinement_from_options()
    set_options(prdp_start="9")
    assert refinement.setting.iterations == 1
    assert refinement_from_options().setting.iterations == 9


# --- output ---------------------------------------------------------------------------------------


@pytest.mark.parallel([1, 2, 3])
def test_view(set_options, capfd):
    set_options(prdp_view=None, prdp_stop="60")
    refinement = refinement_from_options(tau_stop=0.5)
    output = printed(capfd)
    assert output == f"{refinement!r}\n"
    assert "stop=60" in output and "tau_stop=0.5" in output


@pytest.mark.parallel([1, 2, 3])
def test_monitor(set_options, capfd):
    set_options(prdp_monitor=None)
    refinement = refinement_from_options(start=5, step=10, ema_window=1, error_window=1)
    assert printed(capfd) == ""
    refinement.step(0.5)
    refinement.step(0.25)  # the second metric is a plateau, as error_window is 1
    refinement.step(0.25)  # r = 1: stay
    first, second, third = printed(capfd).splitlines()
    assert (
        first.split()
        == "0 PRDP metric 5.000000e-01 smoothed 5.000000e-01 level 0 (5 iterations)".split()
    )
    assert (
        second.split()
        == (
            "1 PRDP metric 2.500000e-01 smoothed 2.500000e-01 level 0 (5 iterations), refined to 15"
            " iterations"
        ).split()
    )
    assert (
        third.split()
        == "2 PRDP metric 2.500000e-01 smoothed 2.500000e-01 level 1 (15 iterations)".split()
    )


@pytest.mark.parallel([1, 2, 3])
def test_monitor_of_tolerances(set_options, capfd):
    set_options(heat_prdp_monitor=None)
    refinement_from_options("heat_", ladder="tolerances").step(3)
    assert "level 0 (relative tolerance 0.1)" in printed(capfd)


@pytest.mark.parallel([1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prdp_monitor": "false", "prdp_view": "0"},
        {"heat_prdp_monitor": None, "heat_prdp_view": None},
    ],
)
def test_no_output_unasked_for(set_options, capfd, options):
    set_options(**options)
    refinement_from_options().step(1.0)
    assert capfd.readouterr().out == ""


@pytest.mark.parallel([2, 3])
def test_output_and_metric_of_rank_0(set_options, capfd):
    set_options(prdp_monitor=None, prdp_view=None)
    comm = MPI.COMM_WORLD
    refinement = refinement_from_options()
    refinement.step(comm.rank + 1.0)
    output = capfd.readouterr().out
    assert refinement.comm == comm  # the world's by default
    assert comm.allgather(refinement.history[0].metric) == [1.0] * comm.size
    assert comm.allgather(len(output.splitlines())) == [2, *[0] * (comm.size - 1)]


def test_communicator_is_handed_on(set_options, capfd):
    set_options(prdp_view=None)
    comm = MPI.COMM_SELF.Dup()
    assert refinement_from_options(comm=comm).comm is comm
    assert capfd.readouterr().out != ""
    comm.Free()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, prefix, arguments, message",
    [
        (
            {"prdp_ladder": "levels"},
            "",
            {},
            "-prdp_ladder must be one of geometric, iterations, tolerances, newton, found 'levels'",
        ),
        (
            {"heat_prdp_ladder": "levels"},
            "heat_",
            {},
            "-heat_prdp_ladder must be one of geometric, iterations, tolerances, newton, found",
        ),
        (
            {},
            "",
            {"ladder": "levels"},
            "-prdp_ladder must be one of geometric, iterations, tolerances, newton, found 'levels'",
        ),
        ({"prdp_start": "0"}, "", {}, "start must be an integer of at least 1, found 0"),
        ({"prdp_step": "-2"}, "", {}, "step must be an integer of at least 1, found -2"),
        (
            {"prdp_start": "9"},
            "",
            {"stop": 8},
            "start must not exceed stop, found start=9 and stop=8",
        ),
        ({"prdp_tau_step": "1.5"}, "", {}, "tau_step must lie in (0, 1], found 1.5"),
        ({"prdp_tau_stop": "0"}, "", {}, "tau_stop must lie in (0, 1], found 0.0"),
        ({"prdp_ema_window": "0"}, "", {}, "ema_window must be an integer of at least 1, found 0"),
        (
            {"prdp_error_window": "-1"},
            "",
            {},
            "error_window must be an integer of at least 1, found -1",
        ),
        ({}, "", {"error_window": 2.5}, "error_window must be an integer of at least 1, found 2.5"),
        ({"prdp_start": "1"}, "", {"ladder": "tolerances"}, "start must lie in (0, 1), found 1.0"),
        ({"prdp_step": "0"}, "", {"ladder": "tolerances"}, "factor must lie in (0, 1), found 0.0"),
        (
            {"prdp_start": "1e-11"},
            "",
            {"ladder": "tolerances"},
            "start must not be below stop, found start=1e-11 and stop=1e-10",
        ),
    ],
)
def test_bad_values(set_options, capfd, options, prefix, arguments, message):
    set_options(**options, **{f"{prefix}prdp_view": None})
    with pytest.raises(ValueError) as error:
        refinement_from_options(prefix, **arguments)
    assert message in str(error.value)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    "ladder, option, has",
    [
        ("geometric", "step", "start, ratio, stop"),
        ("iterations", "ratio", "start, step, stop"),
        ("tolerances", "ratio", "start, step, stop"),
    ],
)
def test_options_of_another_ladder_are_not_left_unread(set_options, ladder, option, has):
    message = f"prdp_{option} is no option of the ladder {ladder}, which has {has}: leave it away"
    with pytest.raises(ValueError, match=message):
        refinement_from_options(ladder=ladder, **{option: 2})
    set_options(**{f"heat_prdp_{option}": "2", "heat_prdp_ladder": ladder})
    with pytest.raises(ValueError, match=f"-heat_{message}"):
        refinement_from_options("heat_")


def test_options_of_another_rule_are_not_left_unread(set_options):
    with pytest.raises(
        ValueError, match="prdp_gap is no option of the rule prdp, which has tau_st"
    ):
        refinement_from_options(gap=0.2)
    set_options(prdp_tau_stop="0.5", heat_prdp_rule="prpd")
    with pytest.raises(ValueError, match="prdp_tau_stop is no option of the rule discrepancy, whi"):
        refinement_from_options(rule="discrepancy")
    with pytest.raises(ValueError, match="-heat_prdp_rule must be one of prdp, discrepancy, found"):
        refinement_from_options("heat")


def test_a_geometric_ladder_from_options(set_options):
    assert refinement_from_options(ladder="geometric").ladder == GeometricLadder()
    set_options(prdp_ladder="geometric", prdp_start="2", prdp_ratio="3", prdp_stop="20")
    assert list(refinement_from_options().ladder) == [*map(Iterations, (2, 6, 18))]


@pytest.mark.parametrize(
    "kind, name, value, expected",
    [
        *[
            ("iterations", name, value, f"-prdp_{name} must be an integer, found '{value}'")
            for name in ("start", "stop", "ema_window")
            for value in (
                "two",
                "1.5",
                "1e3",
                "5it",
                "0x10",
                "1_000",
                "nan",
                "inf",
                "1 2",
                "--5",
                "true",
                "5,6",
                "decide",
                "٣",
            )
        ],
        *[
            ("tolerances", name, value, f"-prdp_{name} must be a number, found '{value}'")
            for name in ("start", "tau_step")
            for value in (
                "high",
                "1e",
                "0.5s",
                "1_0.5",
                "nan",
                "inf",
                "0.1,0.2",
                ".",
                "e5",
                "0,5",
                "50%",
                "1/2",
                "mouse",
            )
        ],
        *[
            (
                "iterations",
                name,
                value,
                f"-prdp_{name} must be true or false, or have no value, found '{value}'",
            )
            for name in ("monitor", "view")
            for value in ("maybe", "2", "ascii", "yes please")
        ],
        ("iterations", "start", "99999999999", "(as the options -prdp_start 99999999999 have it)"),
        (
            "iterations",
            "step",
            "2147483648",
            (
                "step must be an integer of at most 2147483647, found "
                "2147483648 (as the options -prdp_step"
            ),
        ),
        (
            "iterations",
            "stop",
            "4294967297",
            "stop must be an integer of at most 2147483647, found 4294967297",
        ),
        ("newton", "start", "18446744073709551617", "found 18446744073709551617"),
        (
            "iterations",
            "ema_window",
            "99999999999",
            "(as the options -prdp_ema_window 99999999999 have it)",
        ),
        (
            "iterations",
            "tau_step",
            "1e400",
            "tau_step must lie in (0, 1], found inf (as the options -prdp_tau_step 1e400 have it)",
        ),
        (
            "tolerances",
            "start",
            "-1",
            "start must lie in (0, 1), found -1.0 (as the options -prdp_start -1 have it)",
        ),
    ],
)
def test_values_that_cannot_be_meant(set_options, kind, name, value, expected):
    """None of them turns into another number, as PETSc has some of them."""
    set_options(**{f"prdp_{name}": value})
    with pytest.raises(ValueError) as error:
        refinement_from_options(ladder=kind)
    assert expected in str(error.value) and "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize(
    "value, number", [("7", 7), ("+7", 7), ("007", 7), ("2147483647", 2**31 - 1)]
)
def test_integers_are_read_to_the_last_digit(set_options, value, number):
    set_options(prdp_start=value)
    assert refinement_from_options().setting.iterations == number


@pytest.mark.parametrize(
    "value, number",
    [
        ("0.1", 0.1),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("+2.5E-1", 0.25),
        ("0.30000000000000004", 0.1 + 0.2),
    ],
)
def test_reals_are_read_to_the_last_digit(set_options, value, number):
    set_options(prdp_tau_step=value)
    assert refinement_from_options().tau_step == number


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("prdp_strat", "-prdp_start"),
        ("prdp_tau_stp", "-prdp_tau_st"),
        ("prdp_taustep", "-prdp_tau_step"),
        ("prdp_monitr", "-prdp_monitor"),
        ("prdp_devcie", "-prdp_device"),
        ("heat_prdp_strat", "-heat_prdp_start"),
        ("wave_prdp_windows", "-wave_prdp_ema_window"),
        ("prdp_factor", None),
        ("prdp_STRAT", "-prdp_start"),
        ("prdp-start", "-prdp_start"),
        ("prdpstart", "-prdp_start"),
        ("prdp_", None),
        ("prdp", None),
    ],
)
@pytest.mark.parametrize("prefix", ["", "heat_"])
def test_options_that_are_none(set_options, option, nearest, prefix):
    set_options(**{option: "5"})
    with pytest.raises(
        ValueError,
        match=rf"^there is no option -{option} 5(, did you mean "
        rf"{nearest}.*\?)?: known are -prdp_ladder",
    ) as error:
        refinement_from_options(prefix)
    assert nearest is None or f"did you mean {nearest}" in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        "prdp_start",
        "PRDP_Start",
        "heat_prdp_start",
        "physics_prdp_device",
        "prdp_device",
        "ksp_rtol",
        "compute_drp",
    ],
)
def test_options_that_others_read(set_options, option):
    if not PETSc.Options().hasName(option):  # as all tests on a device have one of them
        set_options(**{option: "5"})
    refinement_from_options("wave")


def test_an_option_with_two_dashes_is_not_read_in_silence():
    options = PETSc.Options()
    options.insertString("--prdp_start 5")
    try:
        with pytest.raises(
            ValueError,
            match="the option --prdp_start 5 is not read with two dashes: write -prdp_start 5",
        ):
            refinement_from_options()
    finally:
        options.delValue("--prdp_start")


def test_a_misspelt_package_is_a_warning(set_options):
    """The option may be another package's."""
    set_options(pdrp_start="5")
    with pytest.warns(
        UserWarning, match="-pdrp_start 5 is not read by prdp_fem: is it meant to be -prdp_start?"
    ):
        refinement_from_options()


def test_numbers_that_petsc_would_turn_into_others_are_refused_for_solvers(set_options):
    mesh = firedrake.UnitIntervalMesh(3)
    V = firedrake.FunctionSpace(mesh, "CG", 1)
    w, v = firedrake.TrialFunction(V), firedrake.TestFunction(V)
    u = firedrake.Function(V, name="heat")
    problem = firedrake.LinearVariationalProblem(w * v * firedrake.dx, v * firedrake.dx, u)
    set_options(heat_ksp_max_it="8589934595")
    with pytest.raises(
        ValueError,
        match=(
            "the solver for 'heat' has ksp_max_it '8589934595', and "
            "PETSc would make another integer"
        ),
    ):
        prdp_fem.LinearVariationalSolver(
            problem, options_prefix="heat", solver_parameters={"ksp_type": "cg"}
        )
    prdp_fem.LinearVariationalSolver(problem, solver_parameters={"ksp_divtol": "1e10"})


def test_a_prefix_needs_no_underscore(set_options):
    """As a solver's does not."""
    set_options(heat_prdp_start="5")
    assert (
        refinement_from_options("heat").setting
        == refinement_from_options("heat_").setting
        == Iterations(5)
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"prefix": 5}, TypeError, "prefix must be a string"),
        ({"prefix": None}, TypeError, "prefix must be a string"),
        ({"prefix": "-heat_"}, ValueError, "prefix must have no spaces"),
        ({"prefix": "heat wave_"}, ValueError, "prefix must have no spaces"),
        ({"ladder": 5}, ValueError, "-prdp_ladder must be one of"),
        ({"ladder": None}, ValueError, "-prdp_ladder must be one of"),
        ({"ladder": ["iterations"]}, ValueError, "-prdp_ladder must be one of"),
        ({"comm": "world"}, TypeError, "comm must be a communicator"),
        ({"comm": 1}, TypeError, "comm must be a communicator"),
        ({"comm": PETSc.COMM_WORLD}, TypeError, "comm must be a communicator"),
        ({"start": "abc"}, ValueError, "start must be an integer of at least 1, found 'abc'"),
        ({"stop": 2.5}, ValueError, "stop must be an integer"),
        ({"tau_step": None}, ValueError, "tau_step must lie in"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        refinement_from_options(**arguments)


@pytest.mark.parallel([2, 3])
@pytest.mark.timeout(60, method="thread")
@pytest.mark.parametrize("option", ["prdp_start", "prdp_strat"])
def test_options_of_one_rank_only_are_an_error_on_all(option):
    comm, options = MPI.COMM_WORLD, PETSc.Options()
    if comm.rank == 1:
        options.setValue(option, "5")
    try:
        with pytest.raises(
            ValueError,
            match=(
                "there is no option|rank 1 of . has raised|options of "
                "a refinement must be the same on all"
            ),
        ):
            refinement_from_options()
    finally:
        if comm.rank == 1:
            options.delValue(option)


@pytest.mark.parametrize("name", ["start", "tau_step"])
def test_option_without_its_value(set_options, name):
    set_options(**{f"prdp_{name}": None})
    with pytest.raises(ValueError, match=f"-prdp_{name} needs a value"):
        refinement_from_options()


@pytest.mark.parametrize(
    "defaults, unknown",
    [
        ({"strat": 2}, "strat"),
        ({"factor": 0.5}, "factor"),
        ({"monitor": True}, "monitor"),
        ({"zeta": 1, "alpha": 2, "stop": 3}, "alpha, zeta"),
    ],
)
@pytest.mark.parametrize("ladder", ["iterations", "tolerances"])
def test_defaults_without_an_option(defaults, unknown, ladder):
    with pytest.raises(TypeError) as error:
        refinement_from_options(ladder=ladder, **defaults)
    assert (
        str(error.value)
        == f"no option has the default {unknown}: known are start, step, ratio, stop, tau_step,"
        " tau_stop, ema_window, error_window, gap"
    )
