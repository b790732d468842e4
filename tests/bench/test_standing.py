"""The table of goals: verdicts, missing results, results that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.standing import COMMANDS, GOALS, Goal, main, table

ROOT = Path(__file__).parents[2]


def test_verdicts() -> None:
    more = Goal("", "", lambda _: 0.0, goal=5, floor=4)
    assert [more.verdict(value) for value in (5.0, 4.2, 3.9)] == ["reached", "above the floor", "**below the floor**"]
    less = Goal("", "", lambda _: 0.0, goal=1.1, floor=1.2, less_is_better=True)
    assert [less.verdict(value) for value in (1.0, 1.15, 1.3)] == ["reached", "above the floor", "**below the floor**"]


def test_what_was_not_measured_says_how(tmp_path: Path) -> None:
    lines = table(tmp_path).splitlines()[2:]
    assert len(lines) == len(GOALS)
    assert all("no result: `python -m bench." in line for line in lines)
    assert {goal.file for goal in GOALS} == COMMANDS.keys()


def test_a_result_is_read(tmp_path: Path) -> None:
    tasks = {"vqa": {"ratio": {"authors": 3.0}}, "guesswhat_pointing": {"ratio": {"authors": 14.0}}}
    result = {
        "geometric_mean": {"authors": 5.61, "stock": 2.1},
        "tasks": tasks,
        "gemm_share": 0.77,
        "memory": {"working_ratio": {"authors": 0.3}},
    }
    (tmp_path / "iterations_batch_16.json").write_text(json.dumps(result))
    found = table(tmp_path)
    assert "batch 16 | 5.50 × | 5.00 × | 5.61 × | reached |" in found
    assert "worst task, batch 16 | 4.00 × | 3.50 × | 3.00 × | **below the floor** |" in found
    assert "| 0.85 | 0.75 | 0.77 | above the floor |" in found


@pytest.mark.parametrize("text", ["{", "[]", '{"geometric_mean": {}}'])
def test_a_file_that_is_no_result_is_an_error(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "iterations_batch_4.json").write_text(text)
    assert main(["--results", str(tmp_path)]) == 2
    assert "iterations_batch_4.json" in capsys.readouterr().err


def test_the_readme_shows_the_table_of_the_results() -> None:
    """Measured again, it has to be written again: `python -m bench.standing`."""
    assert table(ROOT / "bench/results") in (ROOT / "bench/README.md").read_text()
