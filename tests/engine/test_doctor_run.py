"""`stopgo doctor RUN_FOLDER`: where the time of a run went, told from its journal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.doctor import run
from engine.doctor.__main__ import main
from engine.doctor.lines import Asked, Line, examine
from engine.journal import read_rows
from pipelines.errors import BadInput

EVERY, WINDOW_S = 10, 100.0


def rows(wait_ms: float, step_ms: float, windows: int = 3) -> list[dict[str, Any]]:
    """Two tasks, each a step an iteration, a row every ten; a window lasts 100 s, the first one 900."""
    return [
        {
            "t": 1000.0 + WINDOW_S * number + seconds, "iteration": EVERY * (number + 1), "task": task,
            "steps": EVERY * (number + 1), "step_ms": step_ms, "data_wait_ms": wait_ms if task == "vqa" else 0.0,
        }
        for number in range(windows)
        for seconds, task in ((0.0, "vqa"), (0.5, "gqa"))
    ]  # fmt: skip


def usage(cpu_s: float, read_bytes: float, device: str = "cpu", windows: int = 3) -> list[dict[str, Any]]:
    """What `engine.usage` writes with each row: of two threads."""
    return [
        {
            "iteration": EVERY * (number + 1), "event": "usage", "seconds": WINDOW_S, "cpu_s": cpu_s, "threads": 2,
            "read_bytes": read_bytes, "memory_bytes": 2**30, "device": device, "device_bytes": None,
        }
        for number in range(windows)
    ]  # fmt: skip


START = {"iteration": 0, "event": "start"}


def verdict(metrics: list, events: list, config: Mapping[str, Any] | None = None) -> dict[str, Line]:
    return {line.what: line for line in run.verdict(run.measure(metrics, [START, *events]), config or {})}


CASES = {
    "a disk": (rows(4000, 2500), usage(100, 30e6 * WINDOW_S), "data", "problem", "bound by the disk, which gave 28.6 MiB/s",
               "rsync"),
    "a slow disk": (rows(500, 4000), usage(100, 2e6 * WINDOW_S), "data", "note", "bound by the disk", "--dtype uint8"),
    "filling batches": (rows(4000, 2500), usage(190, 0), "data", "problem", "bound by the CPU that fills batches",
                        "data_threads=6"),
    "filling batches for a GPU": (rows(4000, 2500), usage(190, 0, "cuda"), "data", "problem", "the CPU that fills",
                                  "resident_features=true"),
    "data, by an old journal": (rows(4000, 2500), [], "data", "problem", "disk or CPU", "data_threads=6"),
    "computing": (rows(100, 4500), usage(190, 0), "steps", "good", "bound by computing (90% of the time)", ""),
    "busy neighbours": (rows(100, 4500), usage(80, 0), "steps", "note", "the CPU was busy only 40%", "threads=4"),
    "a GPU or its host": (rows(0, 4900), usage(100, 0, "cuda"), "steps", "note", "a journal cannot tell", "bench.profile"),
    "steps, by an old journal": (rows(0, 4900), [], "steps", "good", "bound by its steps (98% of the time)", ""),
    "validation": (rows(0, 2000), [{"iteration": 15, "event": "validation"}], "validation", "note", "60% of the time",
                   "validation.max_examples"),
    "no validation": (rows(0, 2000), [], "validation", "good", "0 validations", ""),
    "saving": (rows(0, 4500), [{"iteration": 20, "event": "checkpoint", "stalled_ms": 9000.0}], "checkpoints", "note",
               "4% of the time", "checkpoint.every=200"),
    "saves of the first window": (rows(0, 4500), [{"iteration": 5, "event": "checkpoint", "stalled_ms": 9e4}], "data", "good",
                                  "0.0%", ""),
}  # fmt: skip
CONFIG = {"data_threads": 3, "threads": 4, "checkpoint": {"every": 100}}


@pytest.mark.parametrize("case", CASES)
def test_what_bound_a_run(case: str) -> None:
    metrics, events, what, state, said, mend = CASES[case]
    line = verdict(metrics, events, CONFIG)[what]
    assert (line.state, said in line.value, mend in line.mend) == (state, True, True), line


def test_the_task_that_waits_most_is_named() -> None:
    assert "40% of the time, most for vqa (4000 ms a step)" in verdict(rows(4000, 2500), [])["data"].value


def test_the_first_window_and_those_of_a_resume_do_not_count() -> None:
    metrics = rows(100, 4000, windows=6)
    metrics[0]["t"] -= 800
    for row in metrics[6:]:
        row["t"] += 3600  # a night between iteration 30 and 40
    resume = {"iteration": 35, "event": "resume"}
    found = run.measure(metrics, [START, resume])
    assert (found.windows, found.seconds) == (4, 4 * WINDOW_S)
    assert found.waiting == pytest.approx(4 * EVERY * 0.1)
    assert found.stepping == pytest.approx(4 * 2 * EVERY * 4.0)


def test_a_task_that_stopped_counts_by_its_steps() -> None:
    metrics = rows(0, 4000)
    del metrics[3]  # gqa ran in no iteration of the second window
    metrics[4]["steps"] = 15  # and in five of the third
    assert run.measure(metrics, [START]).steps == {"vqa": 20, "gqa": 5}


def test_a_row_without_its_numbers_is_named() -> None:
    metrics = rows(0, 4000)
    metrics[2]["step_ms"] = None
    with pytest.raises(BadInput, match="row of iteration 20: step_ms is None"):
        run.measure(metrics, [START])


@pytest.mark.parametrize("metrics", [[], rows(0, 4000, windows=1)], ids=["no row", "one row"])
def test_a_run_that_has_just_begun(metrics: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "folder_files", lambda folder: ({"name": "x", "max_iterations": 9}, metrics, [START]))
    first, second = examine(run.PROBES, Asked(run=tmp_path))
    assert "still running" in first.value
    assert second.state == "good" and "not told yet" in second.value


@pytest.fixture
def no_probes_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.doctor.__main__.SECTIONS", {"run": run.PROBES})


@pytest.mark.usefixtures("no_figures", "no_probes_of_the_machine")
def test_a_real_run(undisturbed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = undisturbed("float32")
    events = [row for row in read_rows(folder / "events.jsonl") if row["event"] == "usage"]
    config = yaml.safe_load((folder / "config.yaml").read_text())
    last, every = config["max_iterations"], config["logging"]["every"]
    assert [row["iteration"] for row in events] == [*range(every, last + 1, every)]
    assert all(row["device"] == "cpu" and row["device_bytes"] is None and row["read_bytes"] >= 0 for row in events)
    assert all(row["cpu_s"] > 0 and row["seconds"] > 0 and row["memory_bytes"] > 2**20 for row in events)
    found = run.measure(read_rows(folder / "metrics.jsonl"), read_rows(folder / "events.jsonl"))
    assert found.windows == len(events) - 1
    assert 0 < found.stepping + found.waiting + found.saving <= found.seconds
    capsys.readouterr()
    assert main([str(folder)]) in (0, 1)
    assert f"iteration {last} of {last}; ended: done" in capsys.readouterr().out


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl", "events.jsonl"])
def test_a_folder_without_its_files_is_bad_input(
    missing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in {"config.yaml", "metrics.jsonl", "events.jsonl"} - {missing}:
        (tmp_path / name).write_text("")
    assert main([str(tmp_path)]) == 2
    assert missing in capsys.readouterr().err


def test_a_damaged_journal_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("name: x")
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\nnonsense\n{"iteration": 2}\n')
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl: line 2: not a row of a journal" in capsys.readouterr().err
