"""Runs over several seeds: what is repeated, and what comes out of their scores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import blind, pretraining, seeds
from engine import student


def write_run(folder: Path, scores: dict[str, float], done: bool = True) -> None:
    folder.mkdir(parents=True)
    rows = [
        {"iteration": 9, "event": "result", "task": task, "score": score, "majority": 0.25}
        for task, score in scores.items()
    ]
    rows += [{"iteration": 9, "event": "end", "reason": "done" if done else "signal"}]
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"a": 0.5})
    assert seeds.train(tmp_path / "no config.yaml", tmp_path / "run", []) == 0
    assert not (tmp_path / "run.log").exists()


def test_a_run_that_fails_leaves_its_words(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"a": 0.5}, done=False)
    assert seeds.train(tmp_path / "no config.yaml", tmp_path / "run", []) == 2
    assert "no config.yaml" in (tmp_path / "run.log").read_text()


def test_intervals_are_students() -> None:
    assert student.interval([0.1, 0.2, 0.3]) == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-4)
    assert student.interval([0.1]) != student.interval([0.1])


def test_gains_are_seed_by_seed(tmp_path: Path) -> None:
    for seed, (before, after) in enumerate([((0.5, 0.9), (0.6, 0.8)), ((0.3, 0.9), (0.5, 1.0))]):
        write_run(blind.folder_of(tmp_path / "blind", seed, blind=False), dict(zip("ab", before, strict=True)))
        write_run(tmp_path / "runs" / f"tasks-{seed}", dict(zip("ab", after, strict=True)))
    a, b, mean = pretraining.compare(tmp_path / "runs", tmp_path / "blind", [0, 1])
    assert (a.task, b.task, mean.task) == ("a", "b", "mean")
    assert (a.scratch, a.pretrained, a.gain) == pytest.approx((0.4, 0.55, 0.15))
    assert a.gain_interval == pytest.approx(12.706 * 0.0707107 / 2**0.5, rel=1e-4)
    assert b.gain == pytest.approx(0.0) and mean.gain == pytest.approx(0.075)
    assert "| a | 40.0 | 55.0 | +15.0 ± 63.5 |" in pretraining.table([a], 2)
