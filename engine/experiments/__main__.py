"""`stopgo experiment NAME`: the systems, tables and figures of the paper, trained here and set beside its numbers.

NAME is a table or figure of the paper (table1 … table6, figure1, figure2, figure4), one system of
configs/experiments/systems.yaml, or `all`: over several seeds all tasks together, each task alone, fine-tuned from all
tasks, and all tasks without stop-and-go. What a run needs is trained first. Every run is a process of `engine.train` in
OUTPUT/runs/NAME-seedK. Finished runs are not repeated, and a stopped series goes on with the same command.

    stopgo experiment --list                                       # every row of the paper: what makes it, how far it is
    stopgo experiment all --model tiny --minutes 60                # the embedded world, everything in about an hour
    stopgo experiment table6 --model tiny --iterations 450
    stopgo experiment table2 --model vilbert_6l_6c --data configs/data/published.yaml --weights pretrained.bin
    stopgo experiment table2 --tables                              # tables and figures of the runs that are there, no training

Writes OUTPUT/results.json (a row per task and run), OUTPUT/tables/*.{md,csv,json}, OUTPUT/figures/*.{png,svg}, and
OUTPUT/report.html, a page with all of these and with pictures (`stopgo report OUTPUT` makes it again).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from engine.experiments import results, tables, timing
from engine.experiments.driver import Outcome, alone_in, train
from engine.experiments.results import collect
from engine.experiments.series import PLAN, Job, Series, read_plan
from engine.experiments.systems import PRETRAINING, Catalogue, ModelRow, load_catalogue
from engine.tasks import CONFIGS
from pipelines.errors import BadInput

EXIT_SAVED = 75
_EPILOG = """\
Exit codes: 0 done; 1 a run failed, the others are done; 2 bad input, before the first run; 75 stopped by a signal and
saved: the same command goes on.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        return _experiment(arguments, load_catalogue())
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="stopgo experiment", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="what to run: a table, a figure, a system, or all")
    add("--list", action="store_true", help="list every row of the paper with its experiment and status, and stop")
    add("--json", action="store_true", help="with --list: as JSON")
    add("--tables", action="store_true", help="train nothing: tables and figures of the runs that are there")
    add(
        "--model",
        default="tiny",
        help="row of configs/experiments/models.yaml: tiny (default), tiny_pretrained, vilbert_6l_6c",
    )
    add(
        "--base", type=Path, metavar="RUN.yaml", help="run configuration that all runs override, instead of the model's"
    )
    add("--data", metavar="SHEET", help="data sheet, instead of the base configuration's")
    add("--weights", metavar="FILE", help="pretrained model that runs begin from, instead of one pretrained here")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="length of runs so that all fit into so many, from a timed trial")
    length.add_argument(
        "--iterations", type=int, help="length of runs of several tasks (default: the base configuration's)"
    )
    add("--seeds", type=int, metavar="N", help="seeds 0 to N-1 (default: 3)")
    add("--jobs", type=int, help="runs at a time (default: 1; tiny models: one on each core, each with one CPU thread)")
    add("--output", type=Path, help="folder of the series (default: runs/experiments/MODEL)")
    add("overrides", nargs="*", metavar="key=value", help="for every run, e.g. world.path=.world precision=bfloat16")
    return parser


def _experiment(arguments: argparse.Namespace, catalogue: Catalogue) -> int:
    name, overrides = _name_and_overrides(arguments)
    series, planned = _series(arguments, catalogue, overrides)
    if arguments.list:
        _list(series, arguments.json)
        return 0
    if name is None:
        raise BadInput("NAME", "nothing to run", "stopgo experiment --list shows what there is")
    chosen = catalogue.chosen(name)
    if arguments.tables:
        _write(series, {}, name)
        return _report(series)
    jobs = series.jobs(chosen.systems, chosen.alone)
    series.check([job for job in jobs if job.seed == series.seeds[0]])
    with alone_in(series.output):
        return _train(arguments, series, planned, jobs, name)


def _train(
    arguments: argparse.Namespace, series: Series, planned: tuple[int, ...], jobs: Sequence[Job], name: str
) -> int:
    at_once = _at_once(arguments, series.catalogue.model(series.model))
    if arguments.minutes and not planned:
        cost = timing.measure(series, jobs, at_once)
        series = replace(series, iterations=timing.iterations_within(cost, jobs, arguments.minutes, at_once))
        told = timing.seconds(cost, jobs, series.iterations, at_once) / 60
        _say(f"{len(jobs)} runs, {at_once} at a time, {series.iterations} iterations: at most about {told:.0f} min")
    elif arguments.minutes:
        _say(f"going on with the {series.iterations} iterations of {series.output / PLAN}; --minutes is not read")
    # Fewer seeds of this experiment must not lose those of another in the same folder.
    whole = replace(series, seeds=tuple(sorted({*series.seeds, *planned})))
    whole.save()
    outcome = train(series, jobs, at_once, _Teller(jobs))
    _write(whole, outcome.failed, "" if outcome.interrupted else name)
    if outcome.interrupted:
        _say("stopped and saved; the same command goes on")
        return EXIT_SAVED
    return _report(series) or (1 if outcome.failed else 0)


def _name_and_overrides(arguments: argparse.Namespace) -> tuple[str | None, tuple[str, ...]]:
    """`--list key=value` gives no name: what has an equals sign is an override."""
    given = [*([arguments.name] if arguments.name else []), *arguments.overrides]
    names = [text for text in given if "=" not in text]
    if len(names) > 1:
        raise BadInput(" ".join(names), "one experiment at a time", "name one of them")
    return (names[0] if names else None), tuple(text for text in given if "=" in text)


def _series(
    arguments: argparse.Namespace, catalogue: Catalogue, overrides: tuple[str, ...]
) -> tuple[Series, tuple[int, ...]]:
    """The series that the arguments describe, and the seeds that its folder has a plan for: its length then holds."""
    for flag in ("minutes", "iterations", "seeds", "jobs"):
        value = getattr(arguments, flag)
        if value is not None and value <= 0:
            raise BadInput(f"--{flag} {value}", "must be above 0")
    model = catalogue.model(arguments.model)
    at_once = _at_once(arguments, model)
    data = (f"data={arguments.data}",) if arguments.data else ()
    series = Series(
        catalogue, arguments.model, arguments.base or model.base, arguments.iterations or 0,
        tuple(range(arguments.seeds or 3)), arguments.output or Path("runs/experiments") / arguments.model,
        (*data, *overrides), arguments.weights, threads=1 if model.small or at_once > 1 else None,
    )  # fmt: skip
    plan = read_plan(series.output)
    if plan is None:
        return replace(series, iterations=arguments.iterations or series.base_config.max_iterations), ()
    if not arguments.seeds:
        series = replace(series, seeds=tuple(plan["seeds"]))
    planned = tuple(plan["seeds"])
    if arguments.list or arguments.tables:  # of what is there, whatever it was begun with
        begun = {
            "model": plan["model"],
            "base": CONFIGS.parent / plan["base"],
            "overrides": tuple(plan["overrides"]),
            "weights": plan["weights"],
        }
        return replace(series, iterations=plan["iterations"], **begun), planned
    asked = replace(series, iterations=arguments.iterations or plan["iterations"])
    for key, now in asked.as_json().items():
        if key != "seeds" and now != plan[key]:
            mend = "say the same, or take another --output"
            raise BadInput(f"{series.output / PLAN}: {key}", f"{plan[key]!r}, and now {now!r}", mend)
    return asked, planned


def _at_once(arguments: argparse.Namespace, model: ModelRow) -> int:
    """Runs at a time: steps of a small model gain less from a second thread than from a second run."""
    return arguments.jobs or (len(os.sched_getaffinity(0)) if model.small else 1)


class _Teller:
    """A line on stderr for every run that ends, and the time that is left, told by tasks: most of it goes into their steps."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._ended, self._all, self._trained = 0, len(jobs), 0
        self._left = sum(_weight(job) for job in jobs)
        self._begun = time.monotonic()

    def __call__(self, job: Job, how: str, outcome: Outcome) -> None:
        self._ended += 1
        self._left -= _weight(job)
        self._trained += _weight(job) if how == "done" else 0
        if job.entry.system == PRETRAINING:
            self._begun = time.monotonic()  # it says nothing about the others, which wait for it
        seconds = time.monotonic() - self._begun
        told = self._trained and self._left and not outcome.interrupted
        left = f", about {max(1, round(self._left * seconds / self._trained / 60))} min left" if told else ""
        _say(f"[{self._ended}/{self._all}] {job.name}: {how}{left}")


def _weight(job: Job) -> int:
    """One for what every run takes, and one for each task; pretraining is not counted."""
    return 0 if job.entry.system == PRETRAINING else 1 + len(job.entry.tasks)


def _write(series: Series, failed: Mapping[str, str], name: str) -> None:
    """`results.json`, tables and figures of all that is there; the table that was asked for by `name`, on the terminal."""
    from engine.experiments import figures  # matplotlib takes a second
    from engine.experiments.parameters import counted  # and torch more

    found, unusable = collect(series, series.jobs(dict.fromkeys(entry.system for entry in series.entries.values())))
    failed = {**unusable, **failed}
    series.output.mkdir(parents=True, exist_ok=True)
    results.save(series, found, failed)
    systems = list(dict.fromkeys(row.system for row in found.rows))
    made = tables.Found(series, found, counted(series, systems))
    for table, make in tables.TABLES.items():
        tables.write(make(made), table, series.output / "tables")
    if name in ("table1", "all"):
        from engine.experiments.overlap import table1

        tables.write(table1(series, series.output / "figures"), "table1", series.output / "tables")
    drawn = figures.write_all(made, series.output / "figures")
    for row in failed.items():
        _say("failed: " + ": ".join(row))
    if name:
        shown = series.output / "tables" / f"{name if name in (*tables.TABLES, 'table1') else 'differences'}.md"
        print(shown.read_text(encoding="utf-8"))
    _say(f"{series.output}: results.json, {len(tables.TABLES)} tables, figures {', '.join(drawn) or 'none yet'}")


def _report(series: Series) -> int:
    """The page with all tables and figures, and pictures of what one of the runs says."""
    from engine.report.__main__ import main as report  # imports torch

    return report([str(series.output)])


def _list(series: Series, as_json: bool) -> None:
    from engine.experiments import listing  # reads data sheets, and so imports torch

    if as_json:
        print(json.dumps(listing.as_json(series), indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(listing.page(series))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
