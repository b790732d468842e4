"""Saving while training goes on: who waits for whom, what is saved, and which checkpoints stay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from engine import saving
from engine.assembly import Parts, assemble
from engine.checkpoint import checkpoints
from engine.cursor import Cursor
from engine.loop import Listener, Loop
from engine.ranks import Ranks
from engine.saving import Saved, Saver
from tests.engine.on_ranks import needs_deepspeed, on_ranks
from tests.engine.sharded_run import furthest
from tests.engine.small_run import configure

LIMIT_S = 60
"""A writer that nobody lets go on gives up then: the order of things shows it."""


class Told(Listener):
    """What happened, in order."""

    def __init__(self, order: list[str], done: Callable[[int], None]) -> None:
        self.order, self.done = order, done

    def iteration_done(self, cursor: Cursor) -> None:
        self.order.append(f"iteration {cursor.iteration}")
        self.done(cursor.iteration)

    def saved(self, saved: Saved) -> None:
        self.order.append(f"saved {saved.number}")


def blocked(ranks: Ranks, data: str, folder: str, backend: str, until: str) -> list[str]:
    """On one rank: what happened, in order. The last rank's writer of the first save, begun after iteration 2, waits.

    `until`: "iteration 3" is over, or the "second save" is asked for, after iteration 4.
    """
    overrides = ["device=cpu", backend, "max_iterations=5", "checkpoint.every=2", "checkpoint.keep=9"]
    parts = assemble(configure(Path(data), *overrides), ranks=ranks)
    gate, order = threading.Event(), []
    write = Saver._write

    def waits(saver: Saver, temporary: Path, *what: Any) -> None:
        number = saver._number
        if number == 1 and ranks.rank == ranks.world_size - 1:
            order.append("waits" if gate.wait(LIMIT_S) else "gave up waiting")
        write(saver, temporary, *what)
        order.append(f"written {number}")

    def done(iteration: int) -> None:
        if until == "iteration 3" and iteration == 3:
            gate.set()

    loop = Loop(parts, Cursor(), Path(folder), Told(order, done))
    wait_for_save = loop._wait_for_save

    def asked(must: bool = False) -> None:
        if loop.saver.busy:
            order.append("second save asked for")
            gate.set()
        wait_for_save(must)

    loop._wait_for_save = asked  # type: ignore[method-assign]
    Saver._write = waits  # type: ignore[assignment,method-assign]
    try:
        assert loop.run()
    finally:
        Saver._write = write  # type: ignore[method-assign]
    return order


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    return folder


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=[needs_deepspeed, pytest.mark.slow])])
def test_training_goes_on_while_a_save_is_written(data: Path, tmp_path: Path, n: int) -> None:
    """And what is saved is the moment at which it was asked for."""
    backend = "backend=plain" if n == 1 else "deepspeed=zero1"
    asked = (str(data), str(tmp_path / "blocked"), backend, "iteration 3")
    orders = [blocked(Ranks(), *asked)] if n == 1 else on_ranks(n, blocked, *asked)
    last = orders[-1]
    assert last.index("iteration 3") < last.index("waits") < last.index("written 1")
    for order in orders:
        assert order.index("iteration 3") < order.index("saved 1"), "no rank calls it saved before all have written"
        assert order.index("saved 1") < order.index("written 2")
    two, four, five = sorted(checkpoints(tmp_path / "blocked"))
    assert [path.name for path in (two, four, five)] == [f"iteration-000000{number}" for number in (2, 4, 5)]
    overrides = ["device=cpu", "backend=plain", "max_iterations=5", "checkpoint.every=2", "checkpoint.keep=9"]
    parts = assemble(configure(data, *overrides))
    assert Loop(parts, Cursor(), tmp_path / "free", Listener()).run()
    ours, theirs = (load_file(path / "weights.safetensors") for path in (two, tmp_path / "free" / two.name))
    assert furthest(ours, theirs) <= (0 if n == 1 else 2e-3)


def test_a_second_save_waits_for_the_first(data: Path, tmp_path: Path) -> None:
    order = blocked(Ranks(), str(data), str(tmp_path), "backend=plain", "second save")
    first = [order.index(what) for what in ("iteration 4", "second save asked for", "waits", "written 1", "saved 1")]
    assert first == sorted(first)
    assert order.index("saved 1") < order.index("written 2") < order.index("saved 2")
    assert len(checkpoints(tmp_path)) == 3


@pytest.fixture(scope="module")
def parts(data: Path) -> Parts:
    return assemble(configure(data))


def save(folder: Path, parts: Parts, iteration: int, scores: dict[str, float], keep: int, best: bool = True) -> None:
    saver = Saver(folder, parts.model, parts.stepper, Ranks(), keep, best)
    saver.start(Cursor(iteration=iteration, scores=scores))
    saved = saving.wait(saver, saver.says)
    assert saved is not None and saved.path is not None, saved
    saver.close()


def numbers(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("iteration-")) for path in checkpoints(folder)]


@pytest.mark.parametrize(
    ("best", "keep", "stay"),
    [
        (False, 1, [60]),
        (False, 3, [60, 50, 40]),
        (True, 1, [60, 30, 20]),
        (True, 2, [60, 50, 30, 20]),
        (True, 9, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_the_newest_and_the_best_of_each_task_stay(
    tmp_path: Path, parts: Parts, best: bool, keep: int, stay: list[int]
) -> None:
    """vqa is best at 20 (30 and 40 say so too: it was not validated again), nlvr2 at 30."""
    history = [(10, 0.5, 0.1), (20, 0.7, 0.2), (30, 0.7, 0.9), (40, 0.7, 0.3), (50, 0.6, 0.3), (60, 0.2, 0.1)]
    for iteration, vqa, nlvr2 in history:
        save(tmp_path, parts, iteration, {"vqa": vqa, "nlvr2": nlvr2}, keep, best)
        assert numbers(tmp_path)[0] == iteration, "the newest is never removed"
    assert numbers(tmp_path) == stay


def test_a_better_score_replaces_the_best(tmp_path: Path, parts: Parts) -> None:
    for iteration, score in ((10, 0.5), (20, 0.6), (30, 0.4), (40, 0.6), (50, 0.1)):
        save(tmp_path, parts, iteration, {"vqa": score}, keep=1)
    assert numbers(tmp_path) == [50, 20]


@pytest.mark.parametrize("damage", ["", "{", '{"format": 99}'])
def test_a_damaged_checkpoint_does_not_keep_others_from_being_saved(tmp_path: Path, parts: Parts, damage: str) -> None:
    save(tmp_path, parts, 10, {"vqa": 0.5}, keep=9)
    save(tmp_path, parts, 20, {"vqa": 0.6}, keep=9)
    (checkpoints(tmp_path)[0] / "cursor.json").write_text(damage)
    save(tmp_path, parts, 30, {"vqa": 0.4}, keep=1)
    assert numbers(tmp_path) == [30, 10], "the best of those that can be read"


def test_a_run_keeps_the_best_of_each_task(data: Path, tmp_path: Path) -> None:
    """By the loop: a new best score is saved at the end of its iteration, and stays."""
    config = configure(data, "device=cpu", "max_iterations=12", "checkpoint.best=true", "checkpoint.keep=1")
    scores: dict[str, list[tuple[int, float]]] = {}

    class Scores(Listener):
        def validated(self, iteration: int, task: str, found: Any, *_: object) -> None:
            scores.setdefault(task, []).append((iteration, found.score))

    assert Loop(assemble(config), Cursor(), tmp_path, Scores()).run()
    best = {max(found, key=lambda row: (row[1], -row[0]))[0] for found in scores.values()}
    assert set(numbers(tmp_path)) == best | {12}
