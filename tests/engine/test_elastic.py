"""Runs that stop and go on: at the same ranks and stage to the bit, at others with the losses of the undisturbed run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from engine import checkpoint
from engine.checkpoint import checkpoints
from engine.journal import read_rows
from engine.ranks import Ranks
from tests.engine.on_ranks import needs_deepspeed, on_ranks
from tests.engine.sharded_run import PLAIN, journalled, same, state
from tests.engine.small_run import configure
from tests.engine.test_kill import rows
from tests.recorded import record

pytestmark = needs_deepspeed

SETTINGS = ["device=cpu", "validation.max_examples=16", "stopgo.gap=2", "logging.every=3"]
SHORT = [*SETTINGS, "max_iterations=6"]
LONG = [*SETTINGS, "max_iterations=24", "logging.every=1", "optimizer.base_lr=1e-4"]
"""At several times the published rates. At the small run's own, 1e-3, rounding has grown to 1.5e-5 by then (4 ranks to 2)."""
BOUNDARIES = 6 * 5 + 10
"""Of a short run, about: its task steps and the batches of its validations."""


def resumed(ranks: Ranks, data: str, folder: str, backends: list[str], stops: list[int], *more: str) -> list[str]:
    """On one rank, by backend: a run left alone, and one stopped after so many boundaries and continued, a stop."""
    for backend in backends:
        assert journalled(ranks, data, f"{folder}/{backend}", backend, [*SHORT, *more])[0]
        for stop in stops:
            run = f"{folder}/{backend}-{stop}"
            assert not journalled(ranks, data, run, backend, [*SHORT, *more], stop)[0], f"stop {stop} came too late"
            assert journalled(ranks, data, run, backend, [*SHORT, *more])[0]
    return backends


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    return folder


def on(n: int, function: Any, *arguments: Any) -> Any:
    return function(Ranks(), *arguments) if n == 1 else on_ranks(n, function, *arguments)[0]


DRAWN = sorted(random.SystemRandom().sample(range(1, BOUNDARIES - 5), 5))


@pytest.mark.parametrize(
    ("n", "backends", "stops", "precision"),
    [
        (1, ["2"], [11], "float32"),
        (2, ["1"], [17], "bfloat16"),
        pytest.param(1, ["0", "1", "2", "3"], DRAWN, "float32", marks=pytest.mark.slow, id="1-drawn"),
        pytest.param(2, ["0", "1", "2", "3"], DRAWN, "float32", marks=pytest.mark.slow, id="2-drawn"),
        pytest.param(2, ["0", "1", "2", "3"], DRAWN[:2], "bfloat16", marks=pytest.mark.slow, id="2-drawn-bfloat16"),
    ],
)
def test_a_stopped_run_continues_to_the_bit(
    data: Path, tmp_path: Path, n: int, backends: list[str], stops: list[int], precision: str
) -> None:
    """Weights, masters, moments, cursor and rows of the metrics: no bit differs."""
    on(n, resumed, str(data), str(tmp_path), backends, stops, f"precision={precision}")
    for backend in backends:
        straight = tmp_path / backend
        cursor = (checkpoints(straight / "checkpoints")[0] / "cursor.json").read_text()
        for stop in stops:
            other = tmp_path / f"{backend}-{stop}"
            found = checkpoints(other / "checkpoints")
            assert len(found) == 2, "one where it stopped, and the last"
            assert same(state(other / "checkpoints"), state(straight / "checkpoints")), f"stage {backend}, stop {stop}"
            assert (found[0] / "cursor.json").read_text() == cursor, f"stage {backend}, stop {stop}"
            assert rows(other / "metrics.jsonl") == rows(straight / "metrics.jsonl")
            decided = ("validation", "decision")
            assert rows(other / "events.jsonl", *decided) == rows(straight / "events.jsonl", *decided)
    if len(backends) > 1:
        what = f"bits that differ after a stop and a resume, {n} ranks, {precision}"
        record("exactness", what, {"stages": backends, "stopped after boundaries": stops, "differing": 0})


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_rows(run / "metrics.jsonl")]


def furthest_loss(ours: Path, theirs: Path) -> float:
    """Largest relative difference of a step's loss."""
    found, expected = losses(ours), losses(theirs)
    assert len(found) == len(expected) > 4 * 24
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, "1"), (1, PLAIN)),
        pytest.param((1, PLAIN), (2, "3"), marks=pytest.mark.slow),
        *(
            pytest.param(before, after, marks=pytest.mark.slow)
            for before, after in [
                ((2, "1"), (1, "1")),
                ((2, "2"), (1, "3")),
                ((2, "3"), (1, "2")),
                ((1, "1"), (2, "1")),
                ((1, "3"), (2, "0")),
                ((2, "0"), (2, "3")),
                ((2, "1"), (4, "1")),
                ((2, "3"), (4, "2")),
                ((4, "2"), (2, "1")),
                ((1, PLAIN), (1, "2")),
                ((1, "2"), (1, PLAIN)),
            ]
        ),
    ],
    ids=lambda case: f"{case[0]} ranks {case[1]}",
)
def test_a_run_goes_on_over_other_ranks_and_stages(
    data: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    """Stopped in the fourth iteration of 24; over the 20 that follow its losses are those of the run left alone."""
    assert journalled(Ranks(), str(data), str(tmp_path / "straight"), PLAIN, LONG)[0]
    run = str(tmp_path / "moved")
    done, iteration = on(before[0], journalled, str(data), run, before[1], LONG, 17)
    assert not done and iteration == 4
    assert on(after[0], journalled, str(data), run, after[1], LONG)[0]
    apart = furthest_loss(tmp_path / "moved", tmp_path / "straight")
    record("exactness", f"losses of a run moved from {before} to {after}", apart)
    assert apart < 1e-5


def test_forgotten_moments_would_show(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would see of a resume that loses the optimizer's state."""
    assert journalled(Ranks(), str(data), str(tmp_path / "straight"), PLAIN, LONG)[0]
    assert not journalled(Ranks(), str(data), str(tmp_path / "forgot"), PLAIN, LONG, 17)[0]
    load = checkpoint.load

    def forgetful(path: Path, model: Any, stepper: Any) -> Any:
        cursor = load(path, model, stepper)
        for kept in stepper.state():
            kept.values.zero_()
        return cursor

    monkeypatch.setattr(checkpoint, "load", forgetful)
    assert journalled(Ranks(), str(data), str(tmp_path / "forgot"), PLAIN, LONG)[0]
    first = zip(
        losses(tmp_path / "forgot"), losses(tmp_path / "straight"), strict=False
    )  # later stop-and-go differs too
    assert max(abs(a - b) / abs(b) for a, b in first) > 1e-4
