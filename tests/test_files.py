"""Files of results: whole or not there, replaced with a word, and checked as they are read."""

import argparse
import copy
import fcntl
import json
import math
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from firedrake import COMM_WORLD, Ensemble
from jobs import run_ranks

from prdp_fem import IterationLadder
from prdp_fem.history import History
from prdp_fem.ranks.job import Refused
from prdp_fem.studies import CONVERGED, PRDP, Run, Study, draw_training
from prdp_fem.studies.files import alone, write
from prdp_fem.studies.report import read_runs, write_report

CONVERGED_RUN, PRDP_RUN = "study-converged-seed1.json", "study-prdp-seed1.json"


def history(epochs=4):
    """One solve and one adjoint solve an epoch, of three iterations each."""
    counted = list(range(1, epochs + 1))
    iterations = [3 * count for count in counted]
    return History(
        metric=[0.25] * epochs,
        level=[0] * epochs,
        settings={0: "3 iterations"},
        solves=counted,
        adjoint_solves=counted,
        forward_iterations=iterations,
        adjoint_iterations=iterations,
        solver_seconds=[1.0 * count for count in counted],
        seconds=[2.0 * count for count in counted],
    )


def make_study(folder, *, epochs=4, **others):
    arguments = {
        "schedules": [CONVERGED, PRDP],
        "seeds": [1],
        "output": folder,
        "resume": False,
        "size": "default",
        "solver_options": "",
        "ensemble": Ensemble(COMM_WORLD, COMM_WORLD.size),
        **others,
    }
    return Study(
        "study", argparse.Namespace(**arguments), ladder=IterationLadder(), setup={"epochs": epochs}
    )


def run(folder, *, epochs=4, meanwhile=None, extras=None, **others):
    """A study whose runs cost nothing; ``meanwhile`` is called in each, on the first rank."""

    def train(seed, refinement, label):
        if meanwhile is not None and COMM_WORLD.rank == 0:
            meanwhile()
        COMM_WORLD.barrier()
        return history(epochs), extras or {}

    return make_study(folder, epochs=epochs, **others).run(train)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def epochs_in(path):
    return len(json.loads(path.read_text())["history"]["metric"])


@pytest.mark.parallel(1)
def test_a_run_that_is_put_off_is_not_lost_with_an_error_in_the_next(tmp_path):
    folder = tmp_path / "runs"
    study, trained = make_study(folder), []

    def train(seed, refinement, label):
        if trained:
            folder.unlink()
            raise ValueError("the training has diverged")
        trained.append(label)
        shutil.rmtree(folder)
        folder.write_text("in the way")
        return history(), {}

    with pytest.raises(ValueError, match="the training has diverged"):
        study.run(train)
    assert names(folder) == [CONVERGED_RUN]


def test_what_is_kept_beside_may_be_numpys(tmp_path):
    run(tmp_path, extras={"drag": np.float64(0.5), "lift": np.arange(3)})
    assert Run.read(tmp_path / PRDP_RUN).extras == {"drag": 0.5, "lift": [0, 1, 2]}


def test_what_json_does_not_take_is_refused_in_the_end(tmp_path, capfd):
    with pytest.raises(
        Refused, match="what is to be kept must be plain numbers, strings and lists"
    ):
        run(tmp_path, extras={"drag": {1, 2}})
    assert names(tmp_path) == []


@pytest.mark.parametrize("returned", [None, history(), (history(), None), ({}, history())])
def test_what_no_training_returns_is_named(tmp_path, returned):
    with pytest.raises(TypeError, match="a training must return its History and a dictionary"):
        make_study(tmp_path).run(lambda *_: returned)


@pytest.mark.parallel(1)
def test_a_script_that_changes_its_folder_has_all_runs_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    run(Path("runs"), meanwhile=lambda: monkeypatch.chdir(tmp_path / "elsewhere"))
    assert (
        names(tmp_path / "runs") == [CONVERGED_RUN, PRDP_RUN]
        and names(tmp_path / "elsewhere") == []
    )


@contextmanager
def largest_file(size):
    """No file of this process can have more bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What is there already


def test_runs_of_another_set_up_are_kept_under_another_name(tmp_path, capfd):
    run(tmp_path, epochs=6)
    run(tmp_path, epochs=2)
    said = capfd.readouterr().out
    assert f"{tmp_path / PRDP_RUN} is there already, of another set-up (epochs: 6 there, 2 " in said
    assert f"{tmp_path / PRDP_RUN} was there already, and is kept as {PRDP_RUN}.1" in said
    run(tmp_path, epochs=3)
    assert [epochs_in(tmp_path / f"{PRDP_RUN}{number}") for number in ("", ".1", ".2")] == [3, 6, 2]
    assert read_runs(tmp_path)["study"][PRDP][1].setup["epochs"] == 3


def test_runs_of_the_same_set_up_are_replaced_with_a_word(tmp_path, capfd):
    run(tmp_path)
    assert "already" not in capfd.readouterr().out
    run(tmp_path, extras={"drag": 2.0})
    said = capfd.readouterr().out
    assert (
        f"{tmp_path / PRDP_RUN} is there already, of the same set-up, and will be replaced" in said
    )
    assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN]
    assert Run.read(tmp_path / PRDP_RUN).extras == {"drag": 2.0}


@pytest.mark.parametrize("content", ["null", "", "[1, 2]", "my notes"])
def test_what_is_no_run_is_kept_under_another_name(tmp_path, capfd, content):
    (tmp_path / PRDP_RUN).write_text(content)
    run(tmp_path)
    assert f"{tmp_path / PRDP_RUN} does not hold a run of a study" in capfd.readouterr().out
    assert (tmp_path / f"{PRDP_RUN}.1").read_text() == content and epochs_in(
        tmp_path / PRDP_RUN
    ) == 4


def test_a_folder_in_the_place_of_a_run_is_kept_under_another_name(tmp_path):
    (tmp_path / PRDP_RUN).mkdir()
    run(tmp_path)
    assert (tmp_path / f"{PRDP_RUN}.1").is_dir() and epochs_in(tmp_path / PRDP_RUN) == 4


def test_what_somebody_else_has_written_meanwhile_is_kept(tmp_path):
    """As where a file system has no locks; also where it is of the same set-up."""
    run(tmp_path)

    def write_another():
        other = Run.read(tmp_path / PRDP_RUN)
        other.extras = {"drag": 7.0}
        other.write(tmp_path / PRDP_RUN)

    run(tmp_path, meanwhile=write_another, schedules=[PRDP])
    assert Run.read(tmp_path / PRDP_RUN).extras == {}
    assert Run.read(tmp_path / f"{PRDP_RUN}.1").extras == {"drag": 7.0}


def test_a_figure_is_replaced_with_a_word(tmp_path, capfd):
    study = make_study(tmp_path)
    for epochs, is_said in ((4, False), (4, False), (6, True)):
        runs = {CONVERGED: {1: Run("study", "converged", 1, history(epochs))}}
        study.draw(lambda runs=runs: draw_training(runs, study.path("training")))
        said = capfd.readouterr().out
        assert (f"{study.path('training')} was there already, and is replaced" in said) is is_said


# What cannot be written


@pytest.mark.parallel([1, 2, 3])
def test_a_run_that_finds_no_space_is_printed_and_refused_on_all_ranks(tmp_path, capfd):
    extras = {"state": [0.123456789] * 50_000}
    message = "study-prdp-seed1.json cannot be written: File too large"
    with largest_file(300_000), pytest.raises(Refused, match=message) as refused:
        run(tmp_path, extras=extras)
    assert "\n" not in str(refused.value)
    if COMM_WORLD.rank == 0:
        assert "50.000%" in capfd.readouterr().out
        assert names(tmp_path) == []


@pytest.mark.parallel([1, 2])
def test_what_found_no_space_at_first_is_written_later(tmp_path, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = iter([300_000, before[0]])
    extras = {"state": [0.123456789] * 50_000}
    try:
        runs = run(
            tmp_path,
            extras=extras,
            meanwhile=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (next(limits), before[1])),
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    if COMM_WORLD.rank == 0:
        said = capfd.readouterr().out
        assert f"{CONVERGED_RUN} cannot be written: File too large: it will be tried again" in said
        assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN]
        assert Run.read(tmp_path / CONVERGED_RUN) == runs[CONVERGED][1]


@pytest.mark.parallel([1, 2])
def test_a_figure_that_finds_no_space_is_refused_on_all_ranks_and_leaves_the_one_before(tmp_path):
    study = make_study(tmp_path)
    runs = study.run(lambda *_: (history(), {}))
    (tmp_path / "study-training.png").write_bytes(b"before")
    message = "training.png cannot be written: File too large: with --resume, runs are taken"
    with largest_file(10_000), pytest.raises(Refused, match=message):
        study.draw(lambda: draw_training(runs, study.path("training")))
    if COMM_WORLD.rank == 0:
        assert (tmp_path / "study-training.png").read_bytes() == b"before"
        assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN, "study-training.png"]


@pytest.mark.parallel([1, 2])
def test_a_folder_that_goes_is_made_again_with_all_runs(tmp_path):
    folder = tmp_path / "deeper" / "results"
    folder.mkdir(parents=True)
    run(folder, meanwhile=lambda: shutil.rmtree(tmp_path / "deeper"))
    if COMM_WORLD.rank == 0:
        assert names(folder) == [CONVERGED_RUN, PRDP_RUN]


@pytest.mark.parallel([1, 2])
def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()

    def replace():
        if folder.is_dir():
            shutil.rmtree(folder)
            folder.write_text("a file")

    message = "results/study-prdp-seed1.json cannot be written: .*results is not a folder"
    with pytest.raises(Refused, match=message):
        run(folder, meanwhile=replace)
    if COMM_WORLD.rank == 0:
        assert folder.read_text() == "a file"


def test_an_interrupted_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write(path, "before")

    def interrupt(*_):
        raise KeyboardInterrupt

    for step in ("fsync", "chmod", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"os.{step}", interrupt)
            write(path, "after")
        assert path.read_text() == "before" and names(tmp_path) == ["results.json"]


def test_a_refusal_is_the_same_on_other_ranks():
    error = pickle.loads(pickle.dumps(Refused("no space")))
    assert type(error) is Refused and str(error) == "no space"


# Two at a time


HOLDER = """
import sys
from pathlib import Path
from prdp_fem.studies.files import alone

with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_a_second_process_is_refused_before_it_works(tmp_path):
    lock = tmp_path / ".study.lock"
    with holder(lock) as process:
        message = f"another run .process {process.pid} on .* choose another --output"
        with pytest.raises(Refused, match=message):
            make_study(tmp_path).run(lambda *_: pytest.fail("trained"))
    assert not lock.exists()
    run(tmp_path)
    assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN]


def test_the_lock_of_a_process_that_was_killed_is_nobodys(tmp_path):
    lock = tmp_path / ".study.lock"
    with holder(lock) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert lock.exists()
        run(tmp_path)
    assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN]


def test_a_lock_file_that_came_from_another_host_is_nobodys(tmp_path):
    (tmp_path / ".study.lock").write_text("process 1 on another")
    run(tmp_path)
    assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN]


def test_other_studies_do_not_wait(tmp_path):
    with holder(tmp_path / ".other.lock"):
        run(tmp_path)


def test_a_lock_goes_with_what_is_raised_under_it(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path, meanwhile=lambda: 1 / 0)
    assert names(tmp_path) == []


def test_without_locks_it_is_said(tmp_path, monkeypatch, capfd):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    run(tmp_path)
    assert "has no locks (Function not implemented)" in capfd.readouterr().out
    assert names(tmp_path) == [CONVERGED_RUN, PRDP_RUN]


def test_a_lock_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "results").write_text("a file")
    message = "results/x.lock cannot be written: File exists"
    with pytest.raises(Refused, match=message), alone(tmp_path / "results" / "x.lock"):
        pytest.fail("held")


# What is read


GOOD = asdict(
    Run("study", "prdp", 1, history(), {"epochs": 4}, {}, {"processor": "abacus", "ranks": 1})
)


def changed(path, value):
    """A run with something else at a path of keys; without it where the value is ``...``."""
    entries = json.loads(json.dumps(GOOD))
    inner = entries
    *way, last = path
    for key in way:
        inner = inner[key]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return json.dumps(entries)


WRONG = {
    "null": "null",
    "a list": "[]",
    "a number": "3",
    "a text": '"run"',
    "nothing": "",
    "not json": "{'study': 1}",
    "deep": "[" * 100_000,
    "truncated": json.dumps(GOOD)[:-20],
    "bytes": b"\xff\xfe\0",
    "a long number": "1" * 5000,
    **{
        f"{path} {str(value)[:20]}": changed(path.split("."), value)
        for path, value in [
            ("study", ...),
            ("history", ...),
            ("extras", ...),
            ("history.seconds", ...),
            ("history.settings", ...),
            ("another", 1),
            ("history.another", []),
            ("study", 3),
            ("schedule", "fast"),
            ("schedule", None),
            ("seed", "1"),
            ("seed", True),
            ("seed", 1.5),
            ("setup", []),
            ("extras", None),
            ("machine", "abacus"),
            ("machine.ranks", "2"),
            ("machine.processor", None),
            ("history", []),
            ("history.metric", 0.1),
            ("history.metric", []),
            ("history.metric", [0.1] * 3),
            ("history.metric", ["a"] * 4),
            ("history.metric", [None] * 4),
            ("history.metric", [math.nan] * 4),
            ("history.metric", [math.inf] * 4),
            ("history.metric", [-1.0] * 4),
            ("history.metric", {"0": 1}),
            ("history.level", [0.5] * 4),
            ("history.level", [-1] * 4),
            ("history.solves", [1, 2, 3, "4"]),
            ("history.solves", [4, 3, 2, 1]),
            ("history.solves", [2**70] * 4),
            ("history.seconds", [1.0, 3.0, 2.0, 4.0]),
            ("history.settings", ["1 iteration"]),
            ("history.settings", {"zero": "1 iteration"}),
            ("history.settings", {"0": 1}),
            ("extras.errors", [0.1]),
            ("extras.errors", 0.1),
            ("extras.errors", ["a"] * 4),
            ("extras.labels", "error"),
            ("extras.labels", {"outer": 3}),
            ("checksum", 1),
            ("checksum", None),
        ]
    },
}


@pytest.mark.parametrize("content", WRONG.values(), ids=WRONG.keys())
def test_what_is_no_run_is_named_with_resume_and_in_reports(tmp_path, content):
    path = tmp_path / PRDP_RUN
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = path.read_bytes()
    study = make_study(tmp_path, resume=True)
    for read in (lambda: read_runs(tmp_path), lambda: study.run(lambda *_: pytest.fail("trained"))):
        with pytest.raises(Refused, match=f"{PRDP_RUN} does not hold a run of a study") as refused:
            read()
        assert len(str(refused.value)) < 400 + len(str(tmp_path)) and "\n" not in str(refused.value)
    assert path.read_bytes() == before and names(tmp_path) == [PRDP_RUN]


def test_a_run_of_another_name_is_not_taken(tmp_path):
    run(tmp_path, seeds=[1])
    shutil.copy(tmp_path / PRDP_RUN, tmp_path / "study-prdp-seed2.json")
    with pytest.raises(
        Refused, match=r"seed2.json was made with another set-up \(seed: 1 there, 2 here\)"
    ):
        run(tmp_path, seeds=[2], schedules=[PRDP], resume=True)
    with pytest.raises(ValueError, match="two runs of study under prdp with seed 1"):
        read_runs(tmp_path)


def test_a_run_that_was_changed_by_hand_is_named(tmp_path):
    """Also where what it holds could be that of a run."""
    run(tmp_path, extras={"drag": [1.0, 2.0]})
    text = (tmp_path / PRDP_RUN).read_text()
    for old, new in (("2.0]},", '"two"]},'), ("2.0]},", "3.0]},"), ("0.25", "0.26")):
        (tmp_path / PRDP_RUN).write_text(text.replace(old, new))
        assert text.replace(old, new) != text
        with pytest.raises(Refused, match="history or extras have been changed"):
            run(tmp_path, extras={"drag": [1.0, 2.0]}, resume=True)
    (tmp_path / PRDP_RUN).write_text(json.dumps(json.loads(text), indent=2))
    assert run(tmp_path, resume=True, meanwhile=lambda: pytest.fail("trained"))[PRDP][1].extras


@pytest.mark.parallel([1, 2, 3])
def test_a_file_that_is_no_run_is_refused_on_all_ranks(tmp_path):
    (tmp_path / PRDP_RUN).write_text("null")
    message = "does not hold a run of a study .*: remove it, choose another --output"
    with pytest.raises(Refused, match=message):
        run(tmp_path, resume=True)


def test_runs_without_any_cost_are_compared():
    """Seconds of a small problem can be rounded to none."""
    still = history()
    still.solver_seconds = still.seconds = [0.0] * 4
    runs = {
        schedule: {1: Run("study", schedule.name, 1, copy.deepcopy(still))}
        for schedule in (CONVERGED, PRDP)
    }
    study = make_study(Path())
    study.print_table(runs)


REPORT = "<!-- summary -->\n<!-- end -->\n<!-- study study: The study -->\n<!-- end -->\n"


def test_a_report_that_finds_no_space_stays_as_it_was(tmp_path):
    runs = tmp_path / "runs"
    run(runs)
    report = tmp_path / "results.md"
    report.write_text(REPORT)
    with largest_file(100_000):
        report.write_text(REPORT + 99_900 * "x")
        before = report.read_text()
        with pytest.raises(Refused, match="cannot be written: File too large"):
            write_report(runs, report)
    assert report.read_text() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: (folder / "results.md").unlink(),
            "results.md cannot be read: No such file",
        ),
        (lambda folder: (folder / "results.md").write_bytes(b"\xff"), "results.md is not text"),
        (
            lambda folder: ((folder / "results.md").unlink(), (folder / "results.md").mkdir()),
            "results.md cannot be read: Is a directory",
        ),
        (lambda folder: shutil.rmtree(folder / "runs"), "there is no folder"),
        (
            lambda folder: (folder / "runs" / PRDP_RUN).write_text("null"),
            "seed1.json does not hold a run of a study",
        ),
        (lambda folder: (folder / "results").write_text("a file"), "results is not a folder"),
    ],
    ids=["no report", "no text", "a folder", "no runs", "null", "figures"],
)
def test_the_report_ends_with_a_sentence(tmp_path, make, message):
    run(tmp_path / "runs")
    (tmp_path / "results.md").write_text(REPORT)
    make(tmp_path)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "prdp_fem.studies.report",
            tmp_path / "runs",
            tmp_path / "results.md",
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


# How a program ends


SCRIPT = """
import sys
from mpi4py import MPI
from prdp_fem.ranks.job import Refused
from prdp_fem.studies.command_line import Parser

Parser(description="A program.").parse()
if MPI.COMM_WORLD.rank < int(sys.argv[-1]):
    raise Refused("mesh.msh holds no mesh")
MPI.COMM_WORLD.barrier()
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_refused_is_said_once_without_a_traceback(ranks):
    job = run_ranks(ranks, SCRIPT, "-raising", str(ranks))
    assert job.status == 1 and job.output.count("mesh.msh holds no mesh") == 1
    assert "Traceback" not in job.output and "raised" not in job.output


def test_what_one_rank_refuses_ends_the_job():
    job = run_ranks(2, SCRIPT, "-raising", "1")
    assert job.status == 1
    assert "rank 0 of 2 raised, and ends the job:\nmesh.msh holds no mesh\n" in job.output


def test_other_errors_have_their_traceback():
    job = run_ranks(1, SCRIPT.replace("raise Refused", "raise ValueError"), "-raising", "1")
    assert job.status == 1 and "Traceback" in job.output
    assert "ValueError: mesh.msh holds no mesh" in job.output
