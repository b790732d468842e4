"""Who runs when: turns, warm-ups and rests, with providers that only write down what they are asked."""

from __future__ import annotations

import math
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import pytest
import torch

from bench import comparison
from bench.comparison import HEAPS_GROW, WARMING, TaskResult, compare, geometric_mean
from bench.estimate import Estimate
from bench.gemms import GemmTimes
from bench.lengths import load
from bench.provider import Rows, Setting, Step
from bench.worker import PROVIDERS
from engine.tasks import load_table
from tests.bench.test_iterations import setting

PEAK, KEPT = 1000, 100
ENOUGH = round(HEAPS_GROW * 2 * (PEAK - KEPT))
"""Of memory, for two providers and what their heaps grow by."""
SECONDS = {"ours": 1.0, "authors": 8.0, "stock": 2.0}

asked: list[tuple[Any, ...]] = []


class Scribe:
    """Stands in for `Worker`."""

    loss = 1.0

    def __init__(self, name: str, setting: Setting) -> None:
        self.name = name

    def ask(self, what: str, *arguments: Any) -> Any:
        asked.append((self.name, what, *arguments[1:]))
        answers = {
            "prepare": Rows(20, 15), "rest": KEPT, "state": {"weights": 300, "optimizer": 200}, "describe": {}, "count": {},
            "step": Step(SECONDS[self.name] / 2, SECONDS[self.name] / 2, self.loss, 7, PEAK, 50),
            "gemms": GemmTimes([0.4], [0.5], 3, 10),
        }  # fmt: skip
        return answers[what]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asked.append((self.name, "closed"))


def run(monkeypatch: pytest.MonkeyPatch, available: int, peers: list[str], turns: list[int]) -> TaskResult:
    asked.clear()
    monkeypatch.setattr(comparison, "Worker", Scribe)
    monkeypatch.setattr(comparison, "available_bytes", lambda device: available)
    told = setting()
    rates = {torch.float32: 1e9, torch.bfloat16: 1e9}
    estimate = Estimate(told.run.model, torch.bfloat16, 1, rates, load())
    lines: list[str] = []
    results, described = compare(told, [load_table().row("vqa")], peers, turns, estimate, lines.append)
    assert list(described) == ["ours", *peers] and "vqa" in lines[0]
    return results[0]


def test_turns_alternate_and_everybody_stays_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough memory: after the warm-ups, steps follow each other in turn, each on the round's batch."""
    result = run(monkeypatch, ENOUGH, ["stock"], [1, 2])
    assert not result.rested
    warmed = [call for call in asked if call[1] == "prepare" and call[2] in WARMING]
    assert warmed == [(name, "prepare", turn) for name in ("ours", "stock") for turn in WARMING]
    first = asked.index(("ours", "prepare", 1))
    last = asked.index(("ours", "prepare", 0), first)
    steps = [call for call in asked[first:last] if call[1] in ("prepare", "step")]
    assert steps == [
        ("ours", "prepare", 1), ("ours", "step"), ("stock", "prepare", 1), ("stock", "step"),
        ("ours", "prepare", 2), ("ours", "step"), ("stock", "prepare", 2), ("stock", "step"),
    ]  # fmt: skip
    assert asked[-2:] == [("stock", "closed"), ("ours", "closed")]


def test_where_memory_is_short_only_one_is_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, ENOUGH - 1, ["stock"], [1, 2])
    assert result.rested
    awake: set[str] = set()
    for name, what, *_ in asked:
        if what in ("prepare", "rest"):
            awake = awake | {name} if what == "prepare" else awake - {name}
        assert len(awake) <= 1
    for number, call in enumerate(asked):
        if call[1:] in (("prepare", 1), ("prepare", 2)):
            assert asked[number - 1] == (call[0], "step"), "a step to wake up"
            assert asked[number - 2] == (call[0], "prepare", 0)


def test_numbers_of_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, 10 * PEAK, ["authors", "stock"], [0, 0, 0])
    assert result.ratios == {"authors": 8.0, "stock": 2.0}
    ours = result.providers["ours"]
    assert ours.working_bytes == PEAK - 300 - 200 - 50
    assert ours.padded_row_share == pytest.approx(0.25)
    assert result.gemms is not None and result.gemms.share == pytest.approx(0.8)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_a_loss_that_is_not_finite_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scribe, "loss", math.nan)
    with pytest.raises(ValueError, match="ours, vqa: loss nan"):
        run(monkeypatch, PEAK, [], [1])


def test_the_estimate_learns() -> None:
    told = setting()
    row = load_table().row("vqa")
    estimate = Estimate(told.run.model, torch.bfloat16, 4, {torch.float32: 1e9, torch.bfloat16: 1e9}, load())
    guess = estimate.step_s("authors", row)
    estimate.learn("authors", row, 3 * guess)
    assert estimate.step_s("authors", row) == pytest.approx(3 * guess)
    assert replace(estimate, batch=8).step_s("authors", row) > 3 * guess
    assert all(estimate.step_s(provider, row) > 0 for provider in PROVIDERS)


def test_what_there_is_is_kept_after_every_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs out of time in the second task has the first."""
    kept: list[list[str]] = []
    monkeypatch.setattr(comparison, "Worker", Scribe)
    monkeypatch.setattr(comparison, "available_bytes", lambda device: ENOUGH)
    rows, told = [load_table().row(name) for name in ("vqa", "gqa")], setting()
    estimate = Estimate(told.run.model, torch.bfloat16, 2, {torch.float32: 1e9, torch.bfloat16: 1e9}, load())
    compare(
        told, rows, [], [1], estimate, lambda line: None, lambda found: kept.append([one.row.name for one in found])
    )
    assert kept == [["vqa"], ["vqa", "gqa"]]
