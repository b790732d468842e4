"""The journal survives kills: torn lines, cut rows, and the same rows again after a resume."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.journal import CLOCK_COLUMNS, EVENTS_FILE, METRICS, METRICS_FILE, Journal, cut, read_rows
from pipelines.errors import BadInput


def without_clocks(folder: Path, name: str = METRICS_FILE) -> list[dict[str, object]]:
    rows = read_rows(folder / name)
    return [{key: value for key, value in row.items() if key not in CLOCK_COLUMNS} for row in rows]


def up_to(last: int) -> Callable[[dict[str, Any]], bool]:
    return lambda row: row["iteration"] <= last


def run(folder: Path, first: int, last: int, keep: Callable[[dict[str, Any]], bool] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    with Journal(folder, keep) as journal:
        for iteration in range(first, last + 1):
            journal.metrics(iteration, task="vqa", state="go", loss=1 / iteration, step_ms=3.0)
            journal.event("validation", iteration, task="vqa", score=0.5, best=0.5)
        journal.sync()


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, task="vqa", loss=0.25)
    journal.event("decision", 1, task="vqa", state="stop")
    assert without_clocks(tmp_path) == [{"iteration": 1, "task": "vqa", "loss": 0.25}]
    assert without_clocks(tmp_path, EVENTS_FILE) == [
        {"iteration": 1, "event": "decision", "task": "vqa", "state": "stop"}
    ]
    journal.close()


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.metrics(1, task="vqa", loss=math.nan, grad_norm=math.inf)
        journal.event("start", 0, tasks=[{"name": "vqa", "x": -math.inf}])
    assert without_clocks(tmp_path) == [{"iteration": 1, "task": "vqa", "loss": None, "grad_norm": None}]
    assert read_rows(tmp_path / EVENTS_FILE)[0]["tasks"] == [{"name": "vqa", "x": None}]


def test_a_resumed_run_leaves_the_rows_of_an_uninterrupted_one(tmp_path: Path) -> None:
    run(tmp_path / "whole", 1, 20)
    run(tmp_path / "cut", 1, 13)
    with (tmp_path / "cut" / METRICS_FILE).open("a") as file:
        file.write('{"t": 1.0, "iteration": 14, "ta')  # killed while writing
    run(tmp_path / "cut", 9, 20, up_to(8))
    for name in (METRICS_FILE, EVENTS_FILE):
        assert without_clocks(tmp_path / "cut", name) == without_clocks(tmp_path / "whole", name)
        assert len(read_rows(tmp_path / "cut" / name)) == 20
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == [EVENTS_FILE, METRICS_FILE]


def test_cutting_keeps_the_lines_before_to_the_byte(tmp_path: Path) -> None:
    run(tmp_path, 1, 5)
    before = (tmp_path / METRICS_FILE).read_bytes()
    cut(tmp_path / METRICS_FILE, up_to(3))
    assert (tmp_path / METRICS_FILE).read_bytes() == b"".join(before.splitlines(keepends=True)[:3])
    cut(tmp_path / METRICS_FILE, lambda row: False)
    assert (tmp_path / METRICS_FILE).read_bytes() == b""


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    run(tmp_path, 1, 3)
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["iteration"] for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize("broken", ["{", "[1]", '{"t": 1}', '"x"', "\xff"])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, broken: str) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(f"{json.dumps({'iteration': 1})}\n{broken}\n{json.dumps({'iteration': 2})}\n")
    with pytest.raises(BadInput, match="line 2: not a row"):
        read_rows(path)


def test_a_used_folder_and_a_missing_journal_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        Journal(tmp_path, lambda row: True)
    run(tmp_path, 1, 2)
    with pytest.raises(BadInput, match="another run"):
        Journal(tmp_path)


def test_undocumented_columns_and_events_are_refused(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        with pytest.raises(ValueError, match="no column los"):
            journal.metrics(1, los=1.0)
        with pytest.raises(ValueError, match="no event walk"):
            journal.event("walk", 1)
    assert "loss" in METRICS


def test_rows_that_a_full_disk_has_no_room_for_come_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        """A file that takes a few bytes of each write while `room` is left."""

        room = 100

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: bytes) -> int:
            if not Full.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = data[: Full.room]
            Full.room -= len(taken)
            return self.file.write(taken)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    with Journal(tmp_path) as journal:
        monkeypatch.setattr(journal._metrics, "_file", Full(journal._metrics._file))
        for iteration in range(1, 6):
            journal.metrics(iteration, task="vqa")
        journal.sync()
        assert len(read_rows(tmp_path / METRICS_FILE)) < 5
        Full.room = 10**6
        journal.metrics(6, task="vqa")
        assert [row["iteration"] for row in read_rows(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err.count("rows wait in memory") == 1
