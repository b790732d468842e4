"""Who is given up, and when: two ranks in one process, over a store of their own. Whole processes: test_faults.py."""

from __future__ import annotations

import time
from typing import Any

import pytest
from torch._C._distributed_c10d import TCPStore

from engine import watchdog
from engine.ranks import Ranks
from engine.watchdog import ALL_ALIVE, Watchdog


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.05)
    monkeypatch.setattr(watchdog, "SILENT_S", 0.5)


@pytest.fixture
def two() -> list[Ranks]:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return [Ranks(rank, 2, rank, 2, store=store) for rank in (0, 1)]


@pytest.fixture
def given_up(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def give_up(self: Any, idle: float, lost: str) -> None:
        found.append(lost)
        self._done.set()

    monkeypatch.setattr(Watchdog, "_give_up", give_up)
    return found


def test_both_alive_then_one_silent(two: list[Ranks]) -> None:
    with Watchdog(two[0], 60) as first:
        with Watchdog(two[1], 60) as second:
            second.moved("iteration 3, task vqa")
            time.sleep(0.2)
            assert first.lost().startswith(ALL_ALIVE) and "rank 1 is in iteration 3, task vqa" in first.lost()
        assert first.lost() == "no sign of life from rank 1"


@pytest.mark.parametrize(
    ("starting", "others", "gives_up"), [(True, True, False), (True, False, True), (False, True, True)]
)
def test_a_slow_start_is_no_loss(
    two: list[Ranks], given_up: list[str], starting: bool, others: bool, gives_up: bool
) -> None:
    with Watchdog(two[1], 60) as other, Watchdog(two[0], 0.2) as first:
        first.moved("somewhere", starting)
        if not others:
            other._done.set()
        time.sleep(2)
    assert bool(given_up) == gives_up


def test_a_store_that_does_not_answer_is_said(two: list[Ranks], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watchdog, "_read", lambda self: time.sleep(5))
    with Watchdog(two[0], 60) as first:
        assert first.lost() == "rank 0, or its machine, does not answer"
