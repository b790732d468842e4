"""The scores of a series: collected from its runs, kept in `results.json`, and what tables ask of them. Imports no torch."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.experiments.driver import State, state_of
from engine.experiments.scores import Score, scores_of, steps_of
from engine.experiments.series import Job, Series
from engine.student import interval
from pipelines.errors import BadInput
from pipelines.files import write_atomic

RESULTS = "results.json"


@dataclass(frozen=True)
class Row:
    """One task of one finished run."""

    run: str
    system: str
    part: str
    seed: int
    task: str
    steps: int
    """Of this task in this run."""
    split: str
    metric: str
    score: float
    """In [0, 1]."""
    majority: float | None
    blind: float | None


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, in points (per cent), with its 95 % interval."""

    mean: float
    half: float
    """Half-width; NaN for one seed."""
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}" if self.seeds > 1 else f"{self.mean:.1f}"

    def signed(self) -> str:
        """With + or −, as a difference is written."""
        return f"{self.mean:+.1f} ± {self.half:.1f}" if self.seeds > 1 else f"{self.mean:+.1f}"


BySeed = Mapping[int, float]
"""Seed -> a score in [0, 1], or a difference of such."""


def estimate(values: BySeed, scale: float = 100.0) -> Estimate | None:
    """Mean and interval over the seeds, times `scale`; None for no seed."""
    scaled = [scale * value for value in values.values()]
    return Estimate(statistics.mean(scaled), interval(scaled), len(scaled)) if scaled else None


def combine(rule: Callable[..., float], *parts: BySeed) -> dict[int, float]:
    """`rule` of what all parts have, seed by seed; seeds that one of them lacks are left out."""
    shared = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {seed: rule(*(part[seed] for part in parts)) for seed in sorted(shared)}


def mean(parts: Iterable[BySeed]) -> dict[int, float]:
    """Mean over tasks, seed by seed."""
    return combine(lambda *values: statistics.mean(values), *parts)


def difference(first: BySeed, second: BySeed) -> dict[int, float]:
    """`first` − `second`, paired by seed."""
    return combine(lambda a, b: a - b, first, second)


@dataclass(frozen=True)
class Results:
    """Every row of a series."""

    rows: tuple[Row, ...]

    def of(self, system: str, task: str, part: str | None = None) -> dict[int, float]:
        """Scores of a task under a system (one part of it, if it has several that train the task), by seed."""
        return {
            row.seed: row.score
            for row in self.rows
            if row.system == system and row.task == task and part in (None, row.part)
        }

    def mean(self, system: str, tasks: Sequence[str]) -> dict[int, float]:
        """Mean over these tasks, for the seeds that have all of them."""
        return mean(self.of(system, task) for task in tasks)

    def tasks(self) -> list[str]:
        """All that some run has, in order."""
        return list(dict.fromkeys(row.task for row in self.rows))

    def seeds(self) -> list[int]:
        """All that some run has."""
        return sorted({row.seed for row in self.rows})


def collect(series: Series, jobs: Iterable[Job]) -> tuple[Results, dict[str, str]]:
    """Rows of the jobs that are done; beside them jobs whose folder cannot be used, and why."""
    rows: list[Row] = []
    unusable: dict[str, str] = {}
    for job in jobs:
        try:
            if state_of(series, job) is State.DONE:
                folder = series.folder(job.name)
                steps = steps_of(folder)
                rows += [_row(job, task, score, steps.get(task, 0)) for task, score in scores_of(folder).items()]
        except BadInput as error:
            unusable[job.name] = str(error)
    return Results(tuple(rows)), unusable


def _row(job: Job, task: str, found: Score, steps: int) -> Row:
    return Row(job.name, job.entry.system, job.entry.part, job.seed, task, steps, found.split, found.metric,
               found.score, found.majority, found.blind)  # fmt: skip


def save(series: Series, results: Results, failed: Mapping[str, str]) -> Path:
    """Write `results.json`: the plan, a row per task and run, and what failed."""
    content: dict[str, Any] = {
        **series.as_json(), "runs": [asdict(row) for row in results.rows],
        "failed": [{"run": name, "why": why} for name, why in failed.items()],
    }  # fmt: skip
    path = series.output / RESULTS
    write_atomic(path, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return path
