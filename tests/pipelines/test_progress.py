"""What people see of long work."""

from __future__ import annotations

import pytest

from pipelines import progress


def test_without_a_terminal_lines_are_few_and_say_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    clock = iter([0.0, 0.0, 10.0, 20.0, 40.0, 60.0, 75.0])
    monkeypatch.setattr("pipelines.progress.time.monotonic", lambda: next(clock))
    with progress.progress_on_stderr() as show:
        for done in (1000, 1100, 1200, 1400, 1600, 1700):  # 1,000 were there before: 10 a second
            show("rows", done, 2000)
    assert capsys.readouterr().err == "rows: 1,400 of 2,000, 60 s left\nrows: 1,700 of 2,000, 32 s left\n"


def test_on_a_terminal_a_bar_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.progress_on_stderr() as show:
        show("rows", 0, 400)
        show("rows", 400, 400)
    shown = capsys.readouterr().err
    assert "rows" in shown and "400/400" in shown
