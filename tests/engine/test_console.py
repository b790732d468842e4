"""The live table, the plain lines and the result table say what they were told, and the terminal is left as found."""

from __future__ import annotations

import io
import os

import pytest

from engine.console import Console, ResultRow, TaskView
from engine.stopgo import Decision
from engine.tasks import load_table

ROWS = load_table().default_tasks()


class Clock:
    """Two seconds pass between any two looks."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 2.0
        return self.now


def shown(mode: str, terminal: bool = False) -> str:
    stream = io.StringIO()
    if terminal:
        stream.isatty = lambda: True  # type: ignore[method-assign]
    console = Console(mode, stream, Clock())  # type: ignore[arg-type]
    console.start(300, ROWS)
    console.update(10, {"vqa": TaskView(loss=1.25, score=0.5, best=0.5, iterations_per_s=2.0, examples_per_s=256.0)})
    console.message("gqa stops [at iteration 20]")
    console.update(20, {"gqa": TaskView(state=Decision.STOP, loss=0.75, score=0.25, best=0.3, skipped=2)})
    console.finish([ResultRow("VQAv2", "G1", 0.5, majority=0.25), ResultRow("NLVR2", "G4", 0.7, majority=0.5)])
    return stream.getvalue()


def test_plain_lines_without_control_codes() -> None:
    text = shown("auto")
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0] == "iteration 10/300  5.00 it/s  0:58 left  12 go, 0 stop  (scores in %)"
    assert lines[1] == "  vqa: score 50.0, best 50.0, loss 1.250, go"
    assert lines[2] == "gqa stops [at iteration 20]"
    assert lines[3] == "iteration 20/300  5.00 it/s  0:56 left  11 go, 1 stop  (scores in %)"
    assert lines[4] == "  gqa: score 25.0, best 30.0, loss 0.750, stop"


def test_the_live_table_shows_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    for text in (shown("table"), shown("auto", terminal=True)):
        assert text.index("\x1b[?25l") < text.rindex("\x1b[?25h")  # the cursor comes back
        for row in ROWS:
            assert row.title in text
        for expected in (
            "● go",
            "■ stop",
            "-2",
            "256",
            "1.250",
            "G4",
            "iteration 20/300",
            "gqa stops [at iteration 20]",
        ):
            assert expected in text


def test_the_result_table_has_only_measured_columns() -> None:
    table = shown("plain").partition("scores, %")[2]
    assert "majority" in table
    assert "blind" not in table
    assert [line.split() for line in table.splitlines() if "VQAv2" in line] == [["VQAv2", "G1", "50.0", "25.0"]]
    assert [line.split() for line in table.splitlines() if "mean" in line] == [["mean", "60.0", "37.5"]]


def test_a_mean_over_missing_values_is_not_shown() -> None:
    stream = io.StringIO()
    Console("plain", stream).finish([ResultRow("A", "G1", 0.5, blind=0.5), ResultRow("B", "G1", 0.5)])
    assert ["mean", "50.0", "–"] in [line.split() for line in stream.getvalue().splitlines()]


def test_quiet_says_nothing() -> None:
    assert shown("quiet") == ""


def test_closing_twice_is_harmless() -> None:
    console = Console("table", io.StringIO())
    console.start(10, ROWS, iteration=5)
    console.close()
    console.close()


def test_a_reader_that_is_gone_ends_no_run() -> None:
    """As where the ssh of a launcher ends: rich would end the process, before it has saved."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        console = Console("plain", stream)
        for _ in range(2):
            console.message("nobody hears this")
