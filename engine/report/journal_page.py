"""What a run folder says by itself, without its data: results, throughput, configuration, provenance. No torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from engine.figures import RunHistory, read_history
from engine.journal import EVENTS_FILE, METRICS_FILE, read_rows
from engine.report.charts import Curve, Timeline, colour, curves, timeline
from pipelines.errors import BadInput

Fact = tuple[str, str]


@dataclass(frozen=True)
class Result:
    """A task's line of the result table; scores in [0, 1]."""

    name: str
    title: str
    group: str
    colour: int
    score: float | None
    best: float | None
    majority: float | None
    blind: float | None
    final: bool
    """Whether the run came to its results; else the score is the last validation's."""


@dataclass(frozen=True)
class Throughput:
    """A task's speed: medians over the log windows, the first left out."""

    title: str
    colour: int
    steps: int
    steps_per_s: float | None
    examples_per_s: float | None
    step_ms: float | None
    waiting: float | None
    """Share of the time of its steps that they waited for data."""
    stopped: float
    """Share of the iterations that it was stopped."""


@dataclass(frozen=True)
class JournalPage:
    """Everything that the journal and config.yaml tell."""

    name: str
    folder: str
    history: RunHistory
    results: tuple[Result, ...]
    mean: float | None
    throughput: tuple[Throughput, ...]
    timeline: Timeline
    curves: tuple[Curve, ...]
    data: tuple[Mapping[str, Any], ...]
    """Of each task: title, examples, removed_examples, epoch_iterations."""
    facts: tuple[Fact, ...]
    headline: tuple[Fact, ...]
    config: str
    state: str
    """finished, ended early, or under way."""


def read_page(folder: Path) -> JournalPage:
    """Of a run folder. Raises BadInput for one without a journal, or whose rows lack what they should have."""
    events, metrics = read_rows(folder / EVENTS_FILE), read_rows(folder / METRICS_FILE)
    _check(events, metrics, folder)
    history = read_history(folder)
    start = next(row for row in events if row["event"] == "start")
    results = tuple(_result(task) for task in history.tasks)
    scores = [result.score for result in results]
    mean = None if None in scores else sum(score for score in scores if score is not None) / len(scores)
    config_file = folder / "config.yaml"
    end = next((row for row in reversed(events) if row["event"] in ("end", "resume")), None)
    state = _STATES.get(end.get("reason") if end else None, "ended early")
    return JournalPage(
        history.name, folder.resolve().name, history, results, mean, _throughput(history, metrics), timeline(history),
        tuple(curves(history)), tuple(start["tasks"]), _facts(start, events, metrics),
        _headline(history, results, mean, events),
        config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else "", state,
    )  # fmt: skip


_NEEDED: dict[str, dict[str, tuple[type, ...]]] = {
    "start": {"name": (str,), "tasks": (list,)},
    "validation": {"task": (str,), "score": (int, float)},
    "decision": {"task": (str,), "state": (str,)},
    "result": {"task": (str,), "score": (int, float)},
}
"""Columns of events without which nothing can be drawn, and their types."""


def _check(events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """The rows are those of a journal: a folder may come from anywhere."""
    tasks: set[str] = set()
    for row in events:
        wanted = {"t": (int, float), "event": (str,), **_NEEDED.get(str(row.get("event")), {})}
        _check_row(row, wanted, folder / EVENTS_FILE)
        for task in row["tasks"] if row["event"] == "start" else ():
            _check_row(task, dict.fromkeys(("name", "title", "group"), (str,)), folder / EVENTS_FILE)
            tasks.add(task["name"])
    for row in metrics:
        _check_row(row, {"task": (str,), "loss": (int, float, type(None))}, folder / METRICS_FILE)
    for row in (*events, *metrics):
        if "task" in row and tasks and row["task"] not in tasks:
            raise BadInput(folder, f"its journal has rows of {row['task']!r}, which is no task of the run", _MEND)


def _check_row(row: Any, wanted: Mapping[str, tuple[type, ...]], path: Path) -> None:
    for key, kinds in wanted.items():
        if not isinstance(row, dict) or not isinstance(row.get(key), kinds):
            where = f"{path}: iteration {row['iteration']}" if isinstance(row, dict) and "iteration" in row else path
            raise BadInput(where, f"a row whose {key!r} is missing or of another kind", _MEND)


_MEND = "the files are of another program, or damaged"
_STATES = {"done": "finished", "signal": "ended early, by a signal", "error": "ended with an error", None: "under way"}


def _result(task: Any) -> Result:
    row = task.result or {}
    last = task.validations[-1][1] if task.validations else None
    best = max((score for _, score in task.validations), default=None)
    return Result(
        task.name, task.title, task.group, colour(task), row.get("score", last), row.get("best", best),
        row.get("majority"), row.get("blind"), bool(row),
    )  # fmt: skip


def _throughput(history: RunHistory, metrics: Sequence[Mapping[str, Any]]) -> tuple[Throughput, ...]:
    found = []
    for task in history.tasks:
        rows = [row for row in metrics if row["task"] == task.name]
        counted = rows[1:] or rows
        waits, steps = ([row.get(key) or 0.0 for row in counted] for key in ("data_wait_ms", "step_ms"))
        whole = sum(waits) + sum(steps)
        stopped = sum(end - start for start, end, state in task.bands(history.last) if state != "go")
        found.append(
            Throughput(
                task.title, colour(task), max((row.get("steps") or 0 for row in rows), default=0),
                _median(counted, "iterations_per_s"), _median(counted, "examples_per_s"), _median(counted, "step_ms"),
                sum(waits) / whole if whole else None, stopped / history.last,
            )
        )  # fmt: skip
    return tuple(found)


def _median(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return median(values) if values else None


def _headline(
    history: RunHistory, results: Sequence[Result], mean: float | None, events: Sequence[Mapping[str, Any]]
) -> tuple[Fact, ...]:
    stops = sum(state == "stop" for task in history.tasks for _, state in task.changes)
    facts = [
        ("task" if len(results) == 1 else "tasks", str(len(results))),
        ("iterations", f"{history.last:,}"),
        ("time", _time(_seconds(events))),
    ]
    if mean is not None:
        facts.insert(0, ("mean score", f"{100 * mean:.1f} %"))
    return (*facts, ("stops by DSG", str(stops)))


def _seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Of the process, or of all of them: what lies between an end and a resume is left out."""
    total, begun = 0.0, events[0]["t"]
    for before, row in pairwise(events):
        if row["event"] == "resume":
            total, begun = total + before["t"] - begun, row["t"]
    return float(total + events[-1]["t"] - begun)


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _facts(
    start: Mapping[str, Any], events: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]
) -> tuple[Fact, ...]:
    usage = [row for row in events if row["event"] == "usage"]
    kinds = [row["event"] for row in events]
    facts = [
        ("configuration hash", str(start.get("config_hash", "–"))),
        ("begun", _date(events[0]["t"])),
        ("last row of the journal", _date(events[-1]["t"])),
        ("processes", str(start.get("world_size", 1))),
        ("resumed", f"{kinds.count('resume')} times"),
        ("checkpoints written", str(kinds.count("checkpoint"))),
        ("steps that the guard skipped", f"{sum(row.get('skipped') or 0 for row in metrics):,}"),
    ]
    if usage:
        seconds = sum(row.get("seconds") or 0 for row in usage)
        cores = sum(row.get("cpu_s") or 0 for row in usage) / seconds if seconds else 0
        facts += [
            ("device", f"{usage[-1].get('device')}, {usage[-1].get('threads')} thread(s)"),
            ("cores in use, mean", f"{cores:.2f}"),
            ("memory, most", f"{max(row.get('memory_bytes') or 0 for row in usage) / 2**20:,.0f} MiB"),
        ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "numpy", "tokenizers"))
    return (*facts, ("page made with", f"Python {platform.python_version()}, {versions}"))


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
