"""How long may the runs of a series be, so that all of them fit into so many minutes? Told from a short timed trial.

Imports no torch.
"""

from __future__ import annotations

import math
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import load
from engine.experiments.driver import start, trained
from engine.experiments.series import Job, Series
from engine.experiments.systems import PRETRAINING
from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows
from pipelines.errors import BadInput

TRIAL_ITERATIONS = 20
LEAST_ITERATIONS = 20
RESERVE = 0.08
"""Share of the minutes that is kept back: the trial is short, and the last runs do not fill all processes."""


@dataclass(frozen=True)
class Cost:
    """Seconds, measured with as many processes at once as the series will have."""

    steps: Mapping[str, float]
    """One step of each task, its share of validation included."""
    together: float
    """A run of all tasks, beside its steps: start, reading, the last validation, figures."""
    alone: float
    """The same of a run of one task."""
    spent: float
    """Of the trial itself."""
    pretraining: float = 0.0
    """The run that all others wait for, if there is one."""

    def run(self, tasks: Sequence[str], iterations: float) -> float:
        """A run of these tasks."""
        mean = statistics.mean(self.steps.values())
        beside = self.together if len(tasks) > 1 else self.alone
        return beside + iterations * sum(self.steps.get(task, mean) for task in tasks)


def iterations_within(cost: Cost, jobs: Sequence[Job], minutes: float, at_once: int) -> int:
    """The most iterations of runs of several tasks with which all jobs fit. A task alone takes at most as many steps.

    Raises BadInput where so few are left that nothing would be learnt.
    """
    jobs = [job for job in jobs if job.entry.system != PRETRAINING]
    first = cost.spent + cost.pretraining
    budget = (60 * minutes * (1 - RESERVE) - first) * at_once
    beside = sum(cost.run(job.entry.tasks, 0) for job in jobs)
    each = sum(cost.run(job.entry.tasks, 1) for job in jobs) - beside
    iterations = int((budget - beside) / each)
    if iterations < LEAST_ITERATIONS:
        least = (first + (beside + LEAST_ITERATIONS * each) / at_once) / (1 - RESERVE) / 60
        what = f"{len(jobs)} runs would have {max(0, iterations)} iterations each, too few to learn anything"
        raise BadInput(f"--minutes {minutes:g}", what, f"give at least {math.ceil(least)}, fewer seeds or more --jobs")
    return iterations


def seconds(cost: Cost, jobs: Sequence[Job], iterations: int, at_once: int) -> float:
    """What the jobs take at most: stop-and-go only makes runs shorter."""
    runs = [cost.run(job.entry.tasks, iterations) for job in jobs if job.entry.system != PRETRAINING]
    return cost.pretraining + sum(runs) / at_once


def measure(series: Series, jobs: Sequence[Job], at_once: int) -> Cost:
    """Train all tasks, then one, for a few iterations, `at_once` times at once, and pretrain if one of the jobs does.

    Raises BadInput where that fails.
    """
    begun = time.monotonic()
    folder = series.output / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    names = [row.name for row in series.rows]
    wall, run = _trial(series, folder / "together", series.base, _tasks(names), at_once)
    steps, validation = _step_seconds(run), _validation_seconds(run)
    one = names[0]
    wall_alone, run_alone = _trial(series, folder / "alone", series.base, _tasks([one]), at_once)
    alone = _step_seconds(run_alone)[one]
    pretraining = (
        _pretraining(series, folder / "pretraining") if any(job.entry.system == PRETRAINING for job in jobs) else 0.0
    )
    cost = Cost(
        {task: seconds + validation[task] for task, seconds in steps.items()},
        max(0.0, wall - TRIAL_ITERATIONS * sum(steps.values())),
        max(0.0, wall_alone - TRIAL_ITERATIONS * alone),
        time.monotonic() - begun,
        pretraining,
    )
    shutil.rmtree(folder, ignore_errors=True)
    return cost


def _pretraining(series: Series, folder: Path) -> float:
    """The whole pretraining, from a few steps of it."""
    path = series.catalogue.model(series.model).pretraining
    assert path is not None  # `Series.check` has said so
    wall, run = _trial(series, folder, path, [], 1)
    step = sum(_step_seconds(run).values())
    return wall + (load(path, list(series.overrides)).max_iterations - TRIAL_ITERATIONS) * step


def _tasks(names: Sequence[str]) -> list[str]:
    return [f"tasks=[{', '.join(names)}]"]


def _trial(series: Series, folder: Path, config: Path, given: Sequence[str], at_once: int) -> tuple[float, Path]:
    """Wall seconds of the slowest, and the run folder of the first."""
    begun = time.monotonic()
    runs = [folder / str(number) for number in range(at_once)]
    processes = [start(_command(series, run, config, given), run.with_suffix(".log"), series.threads) for run in runs]
    try:
        codes = [process.wait() for process in processes]
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    if any(codes):
        log = runs[0].with_suffix(".log")
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise BadInput("trial", lines[-1].removeprefix("error: ") if lines else f"exit code {codes[0]}", f"see {log}")
    return time.monotonic() - begun, runs[0]


def _command(series: Series, run: Path, config: Path, given: Sequence[str]) -> list[str]:
    shared = [f"output={run}", "logging.console=plain", "logging.every=10", *series.overrides]
    shared += [f"threads={series.threads}"] if series.threads else []
    return trained("--config", str(config), *shared, f"max_iterations={TRIAL_ITERATIONS}", *given)


def _step_seconds(run: Path) -> dict[str, float]:
    """Mean of the last log window of each task: the first one warms up."""
    return {row["task"]: (row["step_ms"] + row["data_wait_ms"]) / 1000 for row in read_rows(run / METRICS_FILE)}


def _validation_seconds(run: Path) -> dict[str, float]:
    """What validation adds to a step of each task: that of all tasks, shared evenly, over the task's epoch."""
    events: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_rows(run / EVENTS_FILE):
        events[row["event"]].append(row)
    last = max(row["t"] for row in events["validation"])
    blind = max(0.0, events["result"][0]["t"] - last)  # every task once, with its eyes closed
    tasks = events["start"][0]["tasks"]
    return {task["name"]: blind / len(tasks) / task["epoch_iterations"] for task in tasks}
