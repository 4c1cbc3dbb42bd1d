"""A report on studies: tables and figures between the lines of a text that explains them.

``python -m prdp_fem.studies.report RUNS REPORT.md`` reads all runs in a folder, and renews in the
report what stands between ``<!-- summary -->`` or ``<!-- study NAME: TITLE -->`` and the next
``<!-- end -->``; the summary has a row for each study, under its title, in each of two tables.
Figures are put into a folder beside the report that is called as the report is.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Mapping
from dataclasses import astuple
from pathlib import Path

import numpy as np

from prdp_fem.studies.figures import draw_study
from prdp_fem.studies.files import write
from prdp_fem.studies.runs import Run, Runs
from prdp_fem.studies.savings import (
    Savings,
    best_constant,
    best_converged,
    savings,
    spent_until_accurate,
)
from prdp_fem.studies.schedules import CONVERGED, PRDP, Schedule
from prdp_fem.studies.tables import in_markdown, markdown_table, reached, rows_of

__all__ = ["read_runs", "related", "write_report"]

_BLOCK = re.compile(
    r"<!-- (summary|study (?P<name>[^\s:]+): (?P<title>[^\n]+)) -->\n.*?<!-- end -->", re.DOTALL
)


def read_runs(folder: Path) -> dict[str, Runs]:
    """All runs in a folder, by study, schedule and seed: converged physics first, then progressive
    refinement, then constants.

    Raises
    ------
    ValueError
        Where runs of a study differ in their set-up.
    """
    runs = sorted(
        (Run.read(path) for path in sorted(folder.glob("*.json"))),
        key=lambda run: (run.study, Schedule.from_text(run.schedule).place, run.seed),
    )
    studies: dict[str, dict[Schedule, dict[int, Run]]] = {}
    setups: dict[str, dict] = {}
    for run in runs:
        setup = setups.setdefault(run.study, run.setup)
        if run.setup != setup:
            raise ValueError(
                f"the runs of {run.study} in {folder} have different set-ups: {run.setup} and"
                f" {setup}"
            )
        by_seed = studies.setdefault(run.study, {}).setdefault(Schedule.from_text(run.schedule), {})
        if run.seed in by_seed:
            raise ValueError(
                f"{folder} has two runs of {run.study} under {run.schedule} with seed "
                f"{run.seed}: remove one"
            )
        by_seed[run.seed] = run
    return dict(studies)


def write_report(folder: Path, report: Path) -> list[str]:
    """Renew the tables and figures in a report.

    Parameters
    ----------
    folder : Path
        Of the runs.
    report : Path
        A Markdown file with the marks that the module's docstring names.

    Returns
    -------
    list of str
        Studies that have runs but no place in the report: those with another solver are in the
        place of the study that is trained alike.

    Raises
    ------
    ValueError
        Where the report names a study without runs, or its marks are not in pairs.
    """
    studies = read_runs(folder)
    text = report.read_text(encoding="utf-8")
    marks = [
        len(re.findall(pattern, text)) for pattern in (r"<!-- (?:summary|study )", "<!-- end -->")
    ]
    if len(blocks := list(_BLOCK.finditer(text))) != marks[0] or marks[0] != marks[1]:
        raise ValueError(
            f"{report} has {marks[0]} blocks that begin (<!-- summary --> or <!-- study NAME: TITLE"
            f" -->), {marks[1]} that end (<!-- end -->), and {len(blocks)} that do both: mend its"
            " marks"
        )
    titles = {match["name"]: match["title"] for match in blocks if match["name"]}
    if missing := [name for name in titles if name not in studies]:
        raise ValueError(
            f"there are no runs of {', '.join(missing)} in {folder}: make reproduce makes them"
        )

    figures = report.with_suffix("")

    def block(match):
        if (name := match["name"]) is not None:
            content = _section(name, studies, figures)
        else:
            content = _summary(titles, studies)
        return f"<!-- {match[1]} -->\n{content}\n<!-- end -->"

    write(report, _BLOCK.sub(block, text))
    placed = {other for name in titles for other in related(name, studies)}
    return [name for name in studies if name not in placed]


def _summary(titles: Mapping[str, str], studies: Mapping[str, Runs]) -> str:
    """One row a study, by its title, medians over the seeds: against the best converged solver at
    first, then against converged physics with the study's own.
    """
    return "\n".join(
        [
            "**Against the best converged solver** that was tried, that is, the fastest in all of "
            "those that solve to the same tolerance throughout, or directly, and are as good as "
            "converged physics:",
            "",
            *_against_the_best(titles, studies),
            "",
            "**Against converged physics with the same solver:**",
            "",
            *_against_converged(titles, studies),
        ]
    )


def _against_the_best(titles: Mapping[str, str], studies: Mapping[str, Runs]) -> list[str]:
    lines = [
        "| study | best converged solver | error of PRDP, against converged | solver time saved |"
        " all time saved | seconds to accuracy: PRDP | best converged |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, title in titles.items():
        runs = studies[name]
        prdp, converged = runs.get(PRDP, {}), runs.get(CONVERGED, {})
        excess = _medians(prdp, converged)
        best = best_converged(related(name, studies), converged)
        if excess is None or best is None:
            continue
        by_seed = studies[best[0]][best[1]]
        saved = _medians(prdp, by_seed)
        times = [_seconds_to_accuracy(one, converged) for one in (prdp, by_seed)]
        lines.append(
            f"| {title} | {_called(name, *best, studies)} | {excess.excess:+.1%} |"
            f" {_share(saved, 'solver_seconds')} | {_share(saved, 'seconds')} |"
            f" {times[0]} | {times[1]} |"
        )
    return lines


def related(name: str, studies: Mapping[str, Runs]) -> dict[str, Runs]:
    """A study, and those of the same training with other solvers, by their names."""

    def setup(runs: Runs, without: Collection[str] = ()) -> dict:
        found = next(iter(next(iter(runs.values())).values())).setup
        return {key: value for key, value in found.items() if key not in without}

    mine = studies[name]
    others = {
        other: runs
        for other, runs in studies.items()
        if setup(runs) != setup(mine) and setup(runs, _OF_SOLVERS) == setup(mine, _OF_SOLVERS)
    }
    return {name: mine, **others}


# Those entries of a set-up that say how is solved, and not what is trained.
_OF_SOLVERS = ("solver", "ladder", "options", "converged")


def _called(name: str, study: str, schedule: Schedule, studies: Mapping[str, Runs]) -> str:
    """A way to solve, by its solver where that is another one than the study's."""
    if study == name:
        return schedule.title
    solver = next(iter(studies[study][schedule].values())).setup.get("solver", study)
    return f"{solver}, {schedule.title}"


def _share(saved: Savings | None, quantity: str) -> str:
    fraction = np.nan if saved is None else getattr(saved, quantity)
    return "" if np.isnan(fraction) else f"{fraction:.0%}"


def _seconds_to_accuracy(by_seed: Mapping[int, Run], converged: Mapping[int, Run]) -> str:
    pairs = [(run, converged[seed]) for seed, run in by_seed.items() if seed in converged]
    if not any(other.history.in_use for _, other in pairs):
        return "not assessed"
    return reached([spent_until_accurate(*pair) for pair in pairs], "seconds", ".1f")


def _against_converged(titles: Mapping[str, str], studies: Mapping[str, Runs]) -> list[str]:
    lines = [
        (
            "| study | error, against converged | inner iterations saved | by refining late + by"
            " never converging | solver time saved | all time saved | best K in hindsight saves |"
        ),
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, title in titles.items():
        runs = studies[name]
        converged = runs.get(CONVERGED, {})
        prdp = _medians(runs.get(PRDP, {}), converged)
        if prdp is None:
            continue
        best = best_constant(runs)
        in_hindsight = "none tried is good enough"
        if best is not None and (saved := _medians(runs[best], converged)) is not None:
            in_hindsight = f"{saved.iterations:.1%} ({best.title})"
        lines.append(
            f"| {title} | {prdp.excess:+.1%} | {prdp.iterations:.1%} | {prdp.progressive:.0%} +"
            f" {prdp.incomplete:.0%} | {prdp.solver_seconds:.0%} | {prdp.seconds:.0%} |"
            f" {in_hindsight} |"
        )
    return lines


def _medians(by_seed: Mapping[int, Run], others: Mapping[int, Run]) -> Savings | None:
    """Of runs against others, over the seeds; None where they have none in common."""
    saved = [astuple(savings(run, others[seed])) for seed, run in by_seed.items() if seed in others]
    return Savings(*np.median(saved, axis=0)) if saved else None


def _machine(run: Run) -> str:
    processor = run.machine.get("processor", "an unknown processor")
    ranks = run.machine.get("ranks", 1)
    return f"{processor}, {ranks} rank{'s' if ranks > 1 else ''}"


def _section(name: str, studies: Mapping[str, Runs], figures: Path) -> str:
    runs = studies[name]
    some = next(iter(next(iter(runs.values())).values()))
    setup = ", ".join(f"{key}: {value}" for key, value in some.setup.items())
    machines = sorted({_machine(run) for by_seed in runs.values() for run in by_seed.values()})
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    draw_study(runs, figures / f"{name}.png")
    parts = [
        f"*{setup}. Seeds {', '.join(map(str, seeds))}; {'; '.join(machines)}.*",
        markdown_table(
            {schedule: by_seed for schedule, by_seed in runs.items() if not schedule.is_varied}
        ),
    ]
    if others := _other_solvers(name, studies):
        parts += ["Other solvers, each to the same tolerance throughout, or directly:", others]
    if varied := {schedule: by_seed for schedule, by_seed in runs.items() if schedule.is_varied}:
        # Compared at equal seeds: thresholds are varied for some of them only.
        chosen = set.intersection(*(set(by_seed) for by_seed in varied.values()))
        compared = {
            schedule: {seed: runs[schedule][seed] for seed in chosen if seed in runs[schedule]}
            for schedule in (CONVERGED, PRDP, *varied)
            if schedule in runs
        }
        parts += [
            (
                f"Other thresholds (tau_step, tau_stop), seed{'s' if len(chosen) > 1 else ''}"
                f" {', '.join(map(str, sorted(chosen)))}:"
            ),
            markdown_table(compared),
        ]
    parts.append(
        f"![{name}: errors, iterations, and what is reached against what it"
        f" takes]({figures.name}/{name}.png)"
    )
    return "\n\n".join(parts)


def _other_solvers(name: str, studies: Mapping[str, Runs]) -> str:
    """A table of converged schedules with other solvers; empty where there are none."""
    named = {
        _called(name, other, schedule, studies): by_seed
        for other, runs in related(name, studies).items()
        for schedule, by_seed in runs.items()
        if other != name and schedule.is_converged
    }
    return in_markdown(rows_of(named, studies[name].get(CONVERGED, {}))) if named else ""


def main() -> None:
    """The command that the module's docstring names."""
    parser = argparse.ArgumentParser(
        description="Renew the tables and figures in a report on studies."
    )
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("report", type=Path, help="Markdown file")
    arguments = parser.parse_args()
    if not arguments.runs.is_dir():
        parser.error(f"there is no folder {arguments.runs}")
    try:
        unplaced = write_report(arguments.runs, arguments.report)
    except UnicodeDecodeError:
        parser.error(f"{arguments.report} is not text")
    except ValueError as error:  # a Refused is one, too
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{error.filename} cannot be read: {error.strerror}")
    if unplaced:
        print(f"no place in {arguments.report} for {', '.join(unplaced)}")


if __name__ == "__main__":
    main()
