"""Studies: schedules by name, runs in files, savings, tables, figures and reports."""

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from firedrake import COMM_WORLD, Ensemble

from prdp_fem import FixedRefinement, IterationLadder, Iterations
from prdp_fem.history import Account, History
from prdp_fem.statistics import Statistics
from prdp_fem.studies import CONVERGED, DIRECT, PRDP, Run, Schedule, Study, draw_training
from prdp_fem.studies import runs as runs_module
from prdp_fem.studies.report import read_runs, write_report
from prdp_fem.studies.runs import machine
from prdp_fem.studies.savings import (
    best_constant,
    best_converged,
    savings,
    spent_until_accurate,
)
from prdp_fem.studies.tables import markdown_table, plain_table


def history(metrics, iterations, *, seconds=1.0):
    """Two solves (one of them adjoint) an epoch, of the given iterations each."""
    epochs = np.arange(1, len(metrics) + 1)
    spent = np.cumsum(iterations).tolist()
    return History(
        metric=list(metrics),
        level=[0] * len(metrics),
        settings={0: "1 iteration"},
        solves=epochs.tolist(),
        adjoint_solves=epochs.tolist(),
        forward_iterations=spent,
        adjoint_iterations=spent,
        solver_seconds=(0.5 * seconds * epochs).tolist(),
        seconds=(seconds * epochs).tolist(),
    )


def run_of(schedule, error, iterations, *, seed=1, seconds=1.0, epochs=20, study="study"):
    return Run(
        study,
        schedule.name,
        seed,
        history([error**2] * epochs, iterations, seconds=seconds),
        {"size": "default"},
        {},
        {"processor": "abacus", "ranks": 1},
    )


def test_an_account_counts_from_its_opening():
    class Solver:
        statistics = Statistics(solves=5, forward_iterations=50, forward_seconds=3.0)

    refinement = FixedRefinement(Iterations(10))
    record, account = History(), Account([Solver()])
    Solver.statistics.solves += 2
    Solver.statistics.forward_iterations += 20
    Solver.statistics.adjoint_solves += 1
    Solver.statistics.adjoint_iterations += 7
    Solver.statistics.adjoint_seconds += 0.25
    record.record(0.5, refinement, account)
    assert (record.solves, record.adjoint_solves, record.iterations, record.solver_seconds) == (
        [2],
        [1],
        [27],
        [0.25],
    )
    assert (
        record.settings == {0: "10 iterations"}
        and record.iterations_per_solve.tolist() == [9.0]
        and len(record) == 1
    )


def test_savings_split_into_refining_late_and_never_converging():
    converged = run_of(CONVERGED, 0.01, [100] * 20, seconds=4.0)
    prdp = run_of(PRDP, 0.0102, [1] * 10 + [20] * 10, seconds=1.0)
    saved = savings(prdp, converged)
    assert saved.excess == pytest.approx(0.02)
    assert saved.iterations == pytest.approx(1 - 210 / 2000)
    assert saved.incomplete == pytest.approx(1 - 20 / 100)  # had K been 20 throughout
    assert saved.progressive == pytest.approx((400 - 210) / 2000)
    assert saved.progressive + saved.incomplete == pytest.approx(saved.iterations)
    assert saved.solver_seconds == saved.seconds == pytest.approx(0.75)


def test_the_error_is_the_mean_of_the_last_ten_epochs():
    metrics = [1.0] * 10 + [0.04] * 5 + [0.01] * 5
    assert Run("study", "prdp", 1, history(metrics, [1] * 20)).error == pytest.approx(
        (5 * 0.2 + 5 * 0.1) / 10
    )


def test_the_best_constant_is_the_smallest_that_is_good_enough():
    runs = {CONVERGED: {s: run_of(CONVERGED, 0.01, [100] * 20, seed=s) for s in (1, 2, 3)}}
    # K = 8: the median counts
    errors = {2: (0.02, 0.02, 0.02), 8: (0.0101, 0.02, 0.0101), 16: (0.01, 0.01, 0.01)}
    for iterations, values in errors.items():
        schedule = Schedule("constant", iterations)
        runs[schedule] = {
            seed: run_of(schedule, error, [iterations] * 20, seed=seed)
            for seed, error in enumerate(values, 1)
        }
    assert best_constant(runs) == Schedule("constant", 8)
    assert (
        best_constant(
            {CONVERGED: runs[CONVERGED], Schedule("constant", 2): runs[Schedule("constant", 2)]}
        )
        is None
    )


def test_tables_show_medians():
    runs = {
        CONVERGED: {s: run_of(CONVERGED, 0.01, [100] * 20, seed=s, seconds=4.0) for s in (1, 2, 3)},
        PRDP: {s: run_of(PRDP, 0.0101, [10 if s > 1 else 40] * 20, seed=s) for s in (1, 2, 3)},
    }
    for table in (plain_table(runs), markdown_table(runs)):
        for figure in ("1.010%", "+1.0%", "4,000", "400", "90.0%", "75.0%"):
            assert figure in table
    assert "**PRDP**" in markdown_table(runs)


def arguments(tmp_path, **others):
    return argparse.Namespace(
        **{
            "schedules": [CONVERGED, PRDP],
            "seeds": [1, 2],
            "output": tmp_path,
            "resume": False,
            "size": "default",
            "ensemble": Ensemble(COMM_WORLD, COMM_WORLD.size),
            "solver_options": "",
            **others,
        }
    )


def make_study(tmp_path, *, setup=None, **others):
    return Study(
        "study", arguments(tmp_path, **others), ladder=IterationLadder(), setup=setup or {"dofs": 9}
    )


def test_runs_are_kept_and_resumed(tmp_path):
    trained = []

    def train(seed, refinement, label):
        trained.append((seed, str(refinement.setting), label))
        return history([0.25] * 20, [3] * 20), {"drag": [1.0, 2.0]}

    runs = make_study(tmp_path).run(train)
    assert trained == [
        (seed, setting, f"seed {seed}, {title}")
        for seed in (1, 2)
        for setting, title in (("relative tolerance 1e-10", "converged"), ("1 iteration", "PRDP"))
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"study-{name}-seed{seed}.json" for name in ("converged", "prdp") for seed in (1, 2)
    )
    again = make_study(tmp_path, resume=True).run(train)
    assert len(trained) == 4 and again == runs
    assert again[PRDP][2].extras == {"drag": [1.0, 2.0]} and again[PRDP][2].history.settings == {
        0: "1 iteration"
    }
    (tmp_path / "study-prdp-seed2.json").unlink()
    make_study(tmp_path, resume=True).run(train)
    assert trained[4:] == [(2, "1 iteration", "seed 2, PRDP")]


def test_runs_of_another_set_up_are_not_mixed_in_nor_lost(tmp_path):
    make_study(tmp_path).run(lambda seed, refinement, label: (history([0.25] * 20, [3] * 20), {}))
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match="another set-up .dofs: 9 there, 16 here.: choose another --output"
    ):
        make_study(tmp_path, setup={"dofs": 16}, resume=True).run(lambda *_: pytest.fail("trained"))
    with pytest.raises(ValueError, match="options: None there, -physics_pc_type ilu here"):
        make_study(tmp_path, solver_options="-physics_pc_type ilu", resume=True).run(
            lambda *_: pytest.fail("trained")
        )
    assert before == {path: path.read_text() for path in tmp_path.iterdir()}


def test_a_set_up_is_compared_as_it_is_read_again(tmp_path):
    kept = make_study(tmp_path, setup={"grid": (3, 4)}).run(
        lambda *_: (history([0.25] * 20, [3] * 20), {})
    )
    assert (
        make_study(tmp_path, setup={"grid": (3, 4)}, resume=True).run(
            lambda *_: pytest.fail("trained")
        )
        == kept
    )


def test_pictures_show_progressive_refinement_where_there_is_some(tmp_path):
    study = make_study(tmp_path)
    runs = {
        schedule: {seed: run_of(schedule, 0.01, [1] * 20, seed=seed) for seed in (2, 1)}
        for schedule in (CONVERGED, PRDP)
    }
    assert study.representative(runs) == (PRDP, runs[PRDP][2])
    assert study.representative({CONVERGED: runs[CONVERGED]}) == (CONVERGED, runs[CONVERGED][2])
    assert study.path("flow") == tmp_path / "study-flow.png"


def test_a_machine_may_be_without_torch(monkeypatch):
    def version(name):
        if name == "torch":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(runs_module, "version", version)
    described = machine(Ensemble(COMM_WORLD, 1))
    assert "torch" not in described and described["numpy"] == "1" and described["members"] == 1


def test_a_run_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    run = run_of(PRDP, 0.01, [1] * 20)
    run.extras["drag"] = object()
    with pytest.raises(ValueError, match="object"):
        run.write(tmp_path / "run.json")
    assert not list(tmp_path.iterdir())
    (tmp_path / "run.json").mkdir()
    run.extras = {}
    with pytest.raises(OSError):
        run.write(tmp_path / "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_seconds_of_other_machines_are_not_compared():
    runs = {schedule: {1: run_of(schedule, 0.01, [10] * 20)} for schedule in (CONVERGED, PRDP)}
    runs[PRDP][1].machine = {**runs[CONVERGED][1].machine, "ranks": 2}
    saved = savings(runs[PRDP][1], runs[CONVERGED][1])
    assert np.isnan(saved.seconds) and np.isnan(saved.solver_seconds) and saved.iterations == 0
    assert "nan" not in plain_table(runs)


def test_an_option_that_the_solver_did_not_look_at_is_told(tmp_path, capfd):
    make_study(tmp_path, solver_options="-physics_pc_tipe ilu").run(
        lambda *_: (history([0.25] * 20, [3] * 20), {})
    )
    assert "the solver did not look at -physics_pc_tipe" in capfd.readouterr().out


def test_short_runs_are_averaged_as_a_whole(tmp_path, capfd):
    study = make_study(tmp_path)
    study.print_table({CONVERGED: {1: run_of(CONVERGED, 0.01, [10] * 4, epochs=4)}})
    assert "over all of 4" in capfd.readouterr().out


def test_other_files_are_refused(tmp_path):
    (tmp_path / "study-prdp-seed1.json").write_text('{"study": "study"}')
    with pytest.raises(ValueError, match="does not hold a run of a study"):
        make_study(tmp_path, resume=True).run(lambda *_: pytest.fail("trained"))


REPORT = """# Results

<!-- summary -->
stale
<!-- end -->

Prose that stays.

<!-- study study: The study, as people call it -->
<!-- end -->
More of it.
"""


@pytest.fixture
def runs_folder(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    for seed in (1, 2, 3):
        for schedule, error, iterations in (
            (CONVERGED, 0.01, 100),
            (PRDP, 0.0101, 10),
            (Schedule("constant", 12), 0.01, 12),
        ):
            run = run_of(schedule, error, [iterations] * 20, seed=seed)
            run.write(folder / Run.file_name("study", schedule, seed))
    varied = Schedule.from_text("prdp:0.9:0.8")
    run_of(varied, 0.012, [8] * 20).write(folder / Run.file_name("study", varied, 1))
    return folder


def test_a_report_renews_tables_and_keeps_prose(tmp_path, runs_folder):
    report = tmp_path / "results.md"
    report.write_text(REPORT)
    assert write_report(runs_folder, report) == []
    text = report.read_text()
    assert "Prose that stays." in text and "More of it." in text and "stale" not in text
    assert (
        "| The study, as people call it | +1.0% | 90.0% | 0% + 90% | 0% | 0% | 88.0% (K = 12) |"
        in text
    )
    assert "PRDP 0.9, 0.8" in text and "seed 1:" in text and "abacus, 1 rank" in text
    assert (tmp_path / "results" / "study.png").stat().st_size > 10_000
    write_report(runs_folder, report)
    assert report.read_text() == text
    other = run_of(PRDP, 0.01, [1] * 20, study="other")
    other.write(runs_folder / Run.file_name("other", PRDP, 1))
    assert write_report(runs_folder, report) == ["other"]


def test_a_report_without_runs_is_refused(tmp_path, runs_folder):
    report = tmp_path / "results.md"
    report.write_text(REPORT.replace("study study", "study another"))
    with pytest.raises(ValueError, match="no runs of another"):
        write_report(runs_folder, report)
    entries = json.loads((runs_folder / "study-prdp-seed2.json").read_text())
    entries["setup"]["size"] = "full"
    (runs_folder / "study-prdp-seed2.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="different set-ups"):
        read_runs(runs_folder)


@pytest.mark.parametrize(
    "report",
    [
        REPORT.replace("<!-- end -->", "", 1),
        REPORT + "<!-- end -->",
        REPORT.replace("study study:", "study study"),
    ],
)
def test_a_report_with_a_mark_too_few_is_left_alone(tmp_path, runs_folder, report):
    path = tmp_path / "results.md"
    path.write_text(report)
    with pytest.raises(ValueError, match="mend its marks"):
        write_report(runs_folder, path)
    assert path.read_text() == report and not (tmp_path / "results").exists()


def test_training_is_drawn(tmp_path, runs_folder):
    draw_training(read_runs(runs_folder)["study"], tmp_path / "training.png")
    assert (tmp_path / "training.png").stat().st_size > 10_000


SCRIPT = """
from prdp_fem.studies import command_line
def check(arguments):
    return "no epochs of 7" if arguments.epochs == 7 else None
print(command_line(__file__, "A demo.", check=check))
"""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--schedules", "converged", "fast"],
            "a schedule is converged, direct, rtol:TOLERANCE, prdp",
        ),
        (["--seed", "x"], "expected a whole number below 2^31, found x"),
        (["--epochs", "0"], "at least one epoch"),
        (["--seed", "99999999999999999999"], "below 2^31"),
        (["--schedules", "99999999999"], "a schedule is converged, direct, rtol:TOLERANCE, prdp"),
        (["-quick"], "-quick would be an option of PETSc: write --quick"),
        (["--epochs", "7"], "no epochs of 7"),
        (["--nonsense"], "cannot make anything of --nonsense"),
        (["--quick", "--full"], "not allowed with"),
        (["--output", "/dev/null/x"], "cannot put results into"),
        (["--output", "/proc"], "cannot put results into /proc"),
    ],
)
def test_a_wrong_command_line_is_refused(tmp_path, options, message):
    script = tmp_path / "demo.py"
    script.write_text(SCRIPT)
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert result.returncode == 2 and message in result.stderr


def test_a_command_line_is_read(tmp_path):
    script = tmp_path / "demo.py"
    script.write_text(SCRIPT)
    options = [
        "--seed",
        "1",
        "2",
        "--schedules",
        "prdp",
        "4",
        "--quick",
        "-ksp_view",
        "-log_view",
        "x",
    ]
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert (
        result.returncode == 0
        and "seeds=[1, 2]" in result.stdout
        and "size='quick'" in result.stdout
    )
    assert (tmp_path / "output").is_dir()


LEFT = "WARNING! There are options you set that were not used!"


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--quick", "--seed", "1", "2", "--schedules", "prdp", "4", "--epochs=3"], []),
        (["--help"], []),
        (["-h"], []),
        (["--nonsense"], []),
        (["--epochs", "0"], []),
        (["--sched", "4"], []),
        (["--quick", "-log_view", ":log.txt"], []),
        (
            ["--quick", "-physics_ksp_tipe", "cg", "--seed", "2", "-prdp_monitor"],
            ["-physics_ksp_tipe value: cg", "-prdp_monitor"],
        ),
        (["-options_left", "no", "-physics_ksp_tipe", "cg"], []),
    ],
)
def test_petsc_says_in_the_end_which_of_its_options_nobody_has_asked_for(tmp_path, options, left):
    script = tmp_path / "demo.py"
    script.write_text(SCRIPT)
    environment = {
        name: value
        for name, value in os.environ.items()
        if name != "FIREDRAKE_DISABLE_OPTIONS_LEFT"
    }
    result = subprocess.run(
        [sys.executable, script, *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert (LEFT in result.stdout) is bool(left)
    assert result.stdout.count("Option left:") == len(left)
    assert all(f"Option left: name:{option}" in result.stdout for option in left)


def test_a_study_may_judge_by_other_errors_than_the_refinement_is_told():
    run = run_of(PRDP, 0.5, [10] * 20)
    run.extras = {"errors": [0.4] * 5 + [0.05] + [0.2] * 4 + [0.1] * 10}
    assert run.error == pytest.approx(0.1)
    assert run.iterations_until(0.1) == run.history.iterations[10]  # earlier ones do not last
    assert (
        run.iterations_until(0.5) == run.history.iterations[0]
        and run.iterations_until(0.05) is None
    )


def test_iterations_per_solve_where_nothing_was_solved_are_those_of_the_last_time():
    record = history([0.1] * 4, [10, 20, 0, 0])
    record.solves = record.adjoint_solves = [1, 2, 2, 2]
    assert record.iterations_per_solve.tolist() == [10, 20, 20, 20]


def assessed(run, in_use, converged=()):
    """The run, with errors that were assessed every five epochs."""
    epochs = range(5, len(run.history) + 1, 5)
    run.history.in_use = [[epoch, error] for epoch, error in zip(epochs, in_use)]
    run.history.converged = [[epoch, error] for epoch, error in zip(epochs, converged)]
    return run


def test_runs_keep_what_was_assessed_and_said(tmp_path):
    run = assessed(run_of(PRDP, 0.01, [1] * 20), [0.4, 0.3, 0.2, 0.1], [0.5, 0.4, 0.3, 0.3])
    run.history.warnings = ["the physics were coarse"]
    assert (run.error, run.judged, run.error_in_use) == pytest.approx((0.01, 0.15, 0.15))
    assert run.error_converged == pytest.approx(0.3)
    run.write(tmp_path / "run.json")
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["warnings"] == ["the physics were coarse"]
    assert written["history"]["in_use"] == [[5, 0.4], [10, 0.3], [15, 0.2], [20, 0.1]]
    assert Run.read(tmp_path / "run.json") == run
    old = {**written, "history": dict(written["history"])}
    for name in ("in_use", "converged", "warnings"):
        del old["history"][name]
    for name in ("warnings", "checksum"):
        del old[name]
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = Run.read(tmp_path / "old.json")
    assert (read.error_in_use, read.judged, read.warnings) == (None, read.error, [])
    assert read.until_accurate(1.0) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_use", [[5, 0.1], [5, 0.1]]),
        ("in_use", [[21, 0.1]]),
        ("in_use", [[5]]),
        ("converged", [[5, -0.1]]),
        ("converged", {"5": 0.1}),
        ("warnings", "one"),
        ("warnings", [1]),
    ],
)
def test_what_was_not_assessed_so_is_refused(tmp_path, name, value):
    run = run_of(PRDP, 0.01, [1] * 20)
    setattr(run.history, name, value)
    run.write(tmp_path / "run.json")
    with pytest.raises(ValueError, match=f"{name} must be"):
        Run.read(tmp_path / "run.json")


def test_the_time_to_accuracy_is_that_of_the_first_checkpoint_that_is_accurate():
    run = assessed(run_of(PRDP, 0.01, [1, 3] * 10, seconds=2.0), [0.4, 0.2, 0.3, 0.1])
    spent = run.until_accurate(0.2)
    assert (spent.iterations, spent.solver_seconds, spent.seconds) == (40, 10.0, 20.0)
    assert run.until_accurate(0.05) is None


RTOL = Schedule("rtol", rtol=1e-6)


def test_the_best_converged_solver_is_the_fastest_that_is_as_good():
    def runs(schedule, error, seconds):
        return {
            seed: run_of(schedule, error, [9] * 20, seed=seed, seconds=seconds) for seed in (1, 2)
        }

    own = {CONVERGED: runs(CONVERGED, 0.01, 4.0), PRDP: runs(PRDP, 0.01, 0.5)}
    other = {DIRECT: runs(DIRECT, 0.01, 2.0), RTOL: runs(RTOL, 0.0101, 1.0)}
    loose = Schedule("rtol", rtol=1e-1)
    other[loose] = runs(loose, 0.0103, 0.1)
    assert best_converged({"own": own}, own[CONVERGED]) == ("own", CONVERGED)
    assert best_converged({"own": own, "other": other}, own[CONVERGED]) == ("other", RTOL)
    for run in (*other[RTOL].values(), *other[DIRECT].values()):
        run.machine["processor"] = "slide rule"
    assert best_converged({"own": own, "other": other}, own[CONVERGED]) == ("own", CONVERGED)


def test_what_is_as_good_is_decided_by_the_error_in_use():
    """A network that makes up for coarse physics has a small error through them."""
    converged = {
        1: assessed(run_of(CONVERGED, 0.01, [100] * 20, seconds=4.0), [0.3, 0.2, 0.1, 0.1])
    }
    runs = {CONVERGED: converged}
    for iterations, last in ((2, 0.2), (8, 0.101)):
        schedule = Schedule("constant", iterations)
        run = run_of(schedule, 0.009, [iterations] * 20)
        runs[schedule] = {1: assessed(run, [0.4, 0.3, 0.104, last])}
    assert savings(runs[Schedule("constant", 2)][1], converged[1]).excess == pytest.approx(0.52)
    assert best_constant(runs) is None
    runs[Schedule("constant", 8)][1].history.in_use[2][1] = 0.1
    assert best_constant(runs) == Schedule("constant", 8)
    spent = spent_until_accurate(runs[Schedule("constant", 2)][1], converged[1])
    assert spent.iterations == 2 * 15 * 2 and spent.seconds == 15.0
    table = plain_table(runs)
    for column in ("in use", "with converged physics", "seconds to accuracy"):
        assert column in table and column not in plain_table(
            {CONVERGED: {1: run_of(CONVERGED, 0.01, [1] * 20)}}
        )


def test_a_report_compares_with_solvers_of_studies_that_are_trained_alike(tmp_path, runs_folder):
    for seed in (1, 2, 3):
        run = run_of(RTOL, 0.01, [20] * 20, seed=seed, seconds=0.5, study="study_icc")
        run.setup |= {"solver": "icc", "ladder": "another"}
        run.write(runs_folder / Run.file_name("study_icc", RTOL, seed))
    alien = run_of(RTOL, 0.01, [20] * 20, seconds=0.1, study="alien")
    alien.setup["nodes"] = 3
    alien.write(runs_folder / Run.file_name("alien", RTOL, 1))
    report = tmp_path / "results.md"
    report.write_text(REPORT)
    assert write_report(runs_folder, report) == ["alien"]
    text = report.read_text()
    row = "| The study, as people call it | icc, to 1e-6 | +1.0% | -100% | -100% | not assessed |"
    assert row in text and "Other solvers" in text and "| icc, to 1e-6 | 1.000%" in text


def test_options_are_told_before_any_training(tmp_path, capfd):
    said = []

    def train(*_):
        said.append(capfd.readouterr().out)
        return history([0.25] * 20, [3] * 20), {}

    tried = []
    study = make_study(tmp_path, solver_options="-physics_pc_tipe ilu", schedules=[DIRECT, PRDP])
    study.run(train, trial=lambda refinement: tried.append(str(refinement.setting)))
    assert "the solver did not look at -physics_pc_tipe" in said[0]
    assert tried == ["1 iteration"] and "did not look" not in "".join(said[1:])
