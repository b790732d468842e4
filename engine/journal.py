"""The run's own record: `metrics.jsonl` (one row per task and log step) and `events.jsonl`. Imports no torch.

Every line is one JSON object with at least `t` and `iteration`. Rows are flushed as they are written, so a killed
process loses at most half a line; numbers that are not finite are written as null. A resume cuts the rows past its
checkpoint and writes them again: all columns but `CLOCK_COLUMNS` come out the same.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipelines.errors import BadInput

METRICS_FILE = "metrics.jsonl"
EVENTS_FILE = "events.jsonl"

METRICS = {
    "t": "seconds since 1970",
    "iteration": "last iteration that the row covers, from 1",
    "task": "name of the task",
    "state": "go or stop",
    "loss": "mean training loss since the task's last row, before the loss scale",
    "score": "mean training score over the same steps, in [0, 1]",
    "loss_parts": "where the loss is a sum (pretraining), the means of its parts by name; else empty",
    "lr": "the trunk's learning rate in this iteration",
    "grad_norm": "mean norm of the gradient over these steps",
    "steps": "steps of this task since the start of the run",
    "skipped": "steps of this row that the guard skipped",
    "examples_per_s": "examples of this task over the time of its own steps",
    "iterations_per_s": "steps of this task over the time of its own steps",
    "step_ms": "mean time of the task's steps",
    "data_wait_ms": "mean time that its steps waited for their batch",
}
"""Columns of `metrics.jsonl`."""

EVENTS = {
    "start": "name, config_hash, max_iterations, tasks: [{name, title, group, epoch_iterations, examples, "
    "removed_examples}] (training examples used, and left out as test images), blind, world_size",
    "resume": "checkpoint, world_size",
    "validation": "task, score, best (highest so far), loss, loss_parts",
    "decision": "task, state: go or stop from the next iteration on",
    "phase": "tasks: those of the next phase of the curriculum",
    "checkpoint": "path, stalled_ms: how long the loop waited for it",
    "save_failed": "error: why a checkpoint could not be saved",
    "graphs": "eager, captures, replays, dropped, rows, padded_rows, padded_row_share: of CUDA graphs, since the process began",
    "usage": "what the process of rank 0 used since the last log iteration: seconds, cpu_s (of all its threads), threads (of "
    "torch), read_bytes (from disks; what the page cache had is not among them); and now: memory_bytes (its own), device, "
    "device_bytes (most that tensors took on a GPU; null on a CPU)",
    "signal": "name: why the run ends early",
    "result": "task, score (last), best, majority, blind: final scores and baselines, null where not measured",
    "end": "reason: done, signal or error",
}
"""Kinds of rows of `events.jsonl` (column `event`), and their columns beside `t` and `iteration`."""

CLOCK_COLUMNS = frozenset({"t", "examples_per_s", "iterations_per_s", "step_ms", "data_wait_ms"})
"""Columns that differ between two identical runs."""


class Journal:
    """Both files of one run folder, open for appending.

    A new run starts with `Journal(folder)`; a resumed one with `Journal(folder, keep)`, which first cuts the rows that
    `keep` refuses: those past its checkpoint. Raises BadInput where a new run finds old files, or a resumed one none.
    """

    def __init__(self, folder: Path, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
        paths = [folder / METRICS_FILE, folder / EVENTS_FILE]
        for path in paths:
            if keep is not None:
                read_rows(path)  # both files are sound before either is cut
            elif path.exists():
                raise BadInput(path, "another run has written here", "choose another output, or resume that run")
        if keep is not None:
            for path in paths:
                cut(path, keep)
        self._metrics, self._events = map(_Lines, paths)

    def metrics(self, iteration: int, **columns: Any) -> None:
        """Append one row of `METRICS`; the time is added. Raises ValueError for a column not documented there."""
        if unknown := columns.keys() - METRICS.keys():
            raise ValueError(f"{METRICS_FILE} has no column {', '.join(sorted(unknown))}")
        self._metrics.append({"t": time.time(), "iteration": iteration, **columns})

    def event(self, kind: str, iteration: int, **columns: Any) -> None:
        """Append one row of a kind in `EVENTS`; the time is added. Raises ValueError for another kind."""
        if kind not in EVENTS:
            raise ValueError(f"{EVENTS_FILE} has no event {kind}")
        self._events.append({"t": time.time(), "iteration": iteration, "event": kind, **columns})

    def sync(self) -> None:
        """Force both files to the disk, before a checkpoint that relies on them is committed."""
        for file in (self._metrics, self._events):
            file.sync()

    def close(self) -> None:
        """Close both files."""
        self._metrics.close()
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a journal file; a torn last line, left by a killed process, is left out.

    Raises BadInput for a missing file and for a broken line that is not the last one.
    """
    return [row for row, _ in _parsed(path)]


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the rows that `keep` refuses, and a torn last line, atomically. Raises BadInput as `read_rows` does."""
    kept = b"".join(line for row, line in _parsed(path) if keep(row))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class _Lines:
    """A file that grows by whole lines. What a full disk has no room for waits in memory, and goes first the next time."""

    def __init__(self, path: Path) -> None:
        self._path, self._waiting = path, b""
        self._file = path.open("ab", buffering=0)

    def append(self, row: dict[str, Any]) -> None:
        """Write a row; a full disk is said once, and does not end a run that could still train."""
        said = bool(self._waiting)
        self._waiting += json.dumps(_finite(row), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if not said:
                print(f"warning: {self._path}: {error.strerror}; rows wait in memory", file=sys.stderr, flush=True)

    def sync(self) -> None:
        """Force what has been written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file. Rows that found no room to the end are lost, which is said."""
        if self._waiting:
            print(f"warning: {self._path}: {self._waiting.count(10)} rows found no room", file=sys.stderr, flush=True)
        self._file.close()

    def _write(self) -> None:
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise BadInput(path, "no such file", "it belongs to the run folder") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):  # only the last line can lack its end: the process died while writing it
            break
        row = _row(line)
        if row is None:
            raise BadInput(f"{path}: line {number}", "not a row of a journal", "remove that line")
        rows.append((row, line))
    return rows


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("iteration"), int) else None
