"""Runs over several ranks, at every ZeRO stage, against the same run in one plain process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.assembly import assemble
from engine.config import load
from engine.cursor import Cursor, Window
from engine.loop import Listener, Loop
from engine.ranks import Ranks
from engine.tasks import CONFIGS
from engine.validation import Validated
from tests.engine import sharded_run
from tests.engine.on_ranks import needs_deepspeed, on_ranks
from tests.engine.sharded_run import PLAIN, STEPS, relative
from tests.engine.small_run import configure
from tests.pipelines import small_world
from tests.recorded import record

pytestmark = needs_deepspeed

TOLERANCE = 1e-5
"""Of a loss, relative, over 20 updates in float32: ranks sum gradients in another order. What was seen: ranks.json."""
STAGES = "0123"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    configure(folder)
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """What every rank found, by number of ranks, launcher and stages: all in one launch. 0 ranks: one plain process."""

    @cache
    def found(n: int, launcher: str, stages: str) -> list[dict[str, Any]]:
        folder = str(tmp_path_factory.mktemp("runs"))
        if n < 2:
            return [sharded_run.runs(Ranks(), str(data), folder, [*stages] if n else [PLAIN])]
        return on_ranks(n, sharded_run.runs, str(data), folder, [*stages], launcher=launcher)

    def asked(n: int, launcher: str = "torchrun", stages: str = STAGES) -> list[dict[str, Any]]:
        return found(n, launcher, stages)

    return asked


@pytest.mark.parametrize(
    ("n", "launcher", "stages"),
    [
        (1, "torchrun", "0123"),
        (2, "torchrun", "0123"),
        (2, "deepspeed", "1"),
        pytest.param(2, "deepspeed", "0123", marks=pytest.mark.slow),
        pytest.param(4, "torchrun", "0123", marks=pytest.mark.slow),
        pytest.param(4, "deepspeed", "0123", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_one_plain_process(
    runs: Callable[..., list[dict[str, Any]]], n: int, launcher: str, stages: str
) -> None:
    plain, ranks = runs(0)[0][PLAIN], runs(n, launcher, stages)
    assert len(plain["steps"]) == STEPS
    apart = {stage: relative(ranks[0][stage]["steps"], plain["steps"]) for stage in stages}
    record("exactness", f"losses against one plain process, {n} ranks by {launcher}", apart)
    assert max(apart.values()) <= (TOLERANCE if n > 1 else 0), apart
    for stage in stages:
        for (_, _, ours), (_, _, theirs) in zip(ranks[0][stage]["scores"], plain["scores"], strict=True):
            assert ours == pytest.approx(theirs, abs=1 / 16), "more than one of the 16 examples is scored another way"


@pytest.mark.parametrize("n", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_each_rank_keeps_its_share_of_the_optimizer(runs: Callable[..., list[dict[str, Any]]], n: int) -> None:
    ranks = runs(n)
    found = {}
    for stage in STAGES:
        shares = [rank[stage]["bytes"] * n / rank[stage]["all_bytes"] for rank in ranks]
        found[stage] = shares
        if stage == "0":
            assert shares == [n] * n, "nothing is sharded"
        else:
            assert shares == pytest.approx([1.0] * n, abs=0.05), f"stage {stage}"
            assert sum(shares) == pytest.approx(n, abs=1e-12), "every value has one owner"
    record("exactness", f"bytes of moments and masters of each rank, over all / {n}", found)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_tell_the_same(runs: Callable[..., list[dict[str, Any]]], n: int) -> None:
    first, *others = runs(n)
    for stage in STAGES:
        for other in others:
            for what in ("steps", "scores", "cursor"):
                assert first[stage][what] == other[stage][what], f"stage {stage}: {what}"


PRETRAINING = ["world.size=small", "max_iterations=4", "logging.every=1", "logging.console=quiet", "device=cpu",
               "validation.max_examples=16", "task_overrides.conceptual_captions.batch=9"]  # fmt: skip


class Sums(Listener):
    """Remembers the losses of a sum."""

    def __init__(self) -> None:
        self.found: list[list[float]] = []

    def window(self, iteration: int, task: str, window: Window, *_: object) -> None:
        self.found.append([window.loss, *window.parts])

    def validated(self, iteration: int, task: str, found: Validated, *_: object) -> None:
        self.found.append([found.loss, *found.parts])


def pretrained(ranks: Ranks, world: str, folder: str, backend: str) -> list[list[float]]:
    """On one rank: the losses of every step and of the validation, and their parts."""
    more = [f"world.path={world}", f"world.seed={small_world.SEED}", *PRETRAINING, *sharded_run.of(backend)]
    parts = assemble(load(CONFIGS / "runs" / "world_pretrain.yaml", more), ranks=ranks)
    sums = Sums()
    assert Loop(parts, Cursor(), Path(folder) / f"{backend}-{ranks.world_size}", sums).run()
    return sums.found


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_pretraining_on_two_ranks(tmp_path: Path, stage: str) -> None:
    """Nine examples a batch: the ranks have five and four, and other numbers of hidden words and regions."""
    world = str(small_world.world())
    plain = pretrained(Ranks(), world, str(tmp_path), PLAIN)
    assert len(plain) == 5 and all(len(row) == 4 for row in plain)
    ranks = on_ranks(2, pretrained, world, str(tmp_path), stage)
    assert ranks[0] == ranks[1]
    pairs = [pair for ours, theirs in zip(ranks[0], plain, strict=True) for pair in zip(ours, theirs, strict=True)]
    apart = max(abs(a - b) / abs(b) for a, b in pairs)
    record("exactness", f"losses of pretraining on 2 ranks against one plain process, stage {stage}", apart)
    assert apart < TOLERANCE
