"""How a step's batch is divided over ranks and micro-batches: every example once, every loss its share of the whole's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.assembly import Parts, assemble
from engine.config import load
from engine.cursor import Cursor
from engine.loop import Listener, Loop
from engine.losses import outcome
from engine.model.randomness import Randomness
from engine.step import addends
from engine.tasks import CONFIGS
from pipelines.batch import Batch, MaskedTarget
from pipelines.division import Division, divide, example_rows
from pipelines.loader import TrainingSource
from tests.engine.sharded_run import furthest, relative, runs, state
from tests.engine.small_run import configure
from tests.pipelines import small_world

TASKS = ["answers", "captions", "phrases", "pointing", "pairs"]
DIVISIONS = [(2, 1), (1, 2), (3, 1), (4, 2), (11, 1)]
"""Ranks and micro-batches; the last are more than a batch's eight examples."""

costs_of_batches = st.lists(st.integers(1, 10_000), max_size=60).map(lambda costs: np.array(costs, np.int64))


@given(costs_of_batches, st.integers(1, 9))
def test_parts_hold_every_example_once(costs: np.ndarray, parts: int) -> None:
    found = divide(costs, parts)
    assert len(found) == parts
    assert sorted(np.concatenate(found).tolist()) == list(range(len(costs)))
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    assert all((np.diff(part) > 0).all() for part in found), "in the batch's own order"


@given(costs_of_batches, st.integers(1, 4), st.integers(1, 3))
def test_ranks_and_micro_batches_share_one_division(costs: np.ndarray, ranks: int, micro: int) -> None:
    found = [Division(rank, ranks, micro).part(costs, m) for rank in range(ranks) for m in range(micro)]
    assert sorted(np.concatenate(found).tolist()) == list(range(len(costs)))
    assert Division().whole and not Division(0, 2).whole and not Division(0, 1, 2).whole


@given(st.lists(st.integers(1, 1000), min_size=32, max_size=256), st.integers(2, 8))
def test_costs_are_balanced(costs: list[int], parts: int) -> None:
    """No two parts are further apart than the dearest example: what dealing forth and back promises at most."""
    sums = [int(np.array(costs)[part].sum()) for part in divide(np.array(costs), parts)]
    assert max(sums) - min(sums) <= max(costs)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return assemble(configure(tmp_path_factory.mktemp("data")))


def divided(source: TrainingSource, step: int, ranks: int, micro: int) -> list[Batch]:
    """Every part of a step's batch."""
    sources = [replace(source, division=Division(rank, ranks, micro)) for rank in range(ranks)]
    return [one(step * micro + number) for one in sources for number in range(micro)]


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize(("ranks", "micro"), DIVISIONS)
def test_losses_and_gradients_of_the_parts_sum_to_those_of_the_whole(
    parts: Parts, name: str, ranks: int, micro: int
) -> None:
    """Dropout included: an example's masks are its own."""
    task = parts.tasks[name]
    for step in (0, 4):
        whole = task.train(step)
        batches = divided(task.train, step, ranks, micro)
        real = [batch for batch in batches if batch.shares[0] > 0]
        assert sum(batch.shares[0] for batch in batches) == pytest.approx(1, abs=1e-12)
        assert sum(batch.examples for batch in real) == whole.examples == batches[0].step_examples
        assert {int(key) for batch in real for key in batch.text_key} == set(whole.text_key.tolist())
        assert {int(key) for batch in real for key in batch.image_key} == set(whole.image_key.tolist())
        expected, gradients = _with_gradients(parts, task.row.head, [whole])
        found, theirs = _with_gradients(parts, task.row.head, batches)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for key, value in gradients.items():
            assert float((theirs[key] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-6, key


def _with_gradients(parts: Parts, head: str, batches: list[Batch]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    parts.model.zero_grad(set_to_none=True)
    results = []
    for batch in batches:
        loss, found = addends(outcome(parts.model, batch, head, Randomness(0, 3, True)), batch)
        loss.backward()
        results.append(found)
    gradients = {key: p.grad.clone() for key, p in parts.model.named_parameters() if p.grad is not None}
    parts.model.zero_grad(set_to_none=True)
    return torch.stack(results).sum(0), gradients


def test_a_rank_without_an_example_adds_nothing(parts: Parts) -> None:
    """Where a batch has fewer examples than there are ranks, one stands in, and counts for nothing."""
    task = parts.tasks["pairs"]
    idle = [batch for batch in divided(task.train, 0, 11, 1) if batch.shares[0] == 0]
    assert len(idle) == 3 and all(batch.examples == 1 for batch in idle)
    found, gradients = _with_gradients(parts, task.row.head, idle)
    assert not found.any() and not any(gradient.any() for gradient in gradients.values())


@pytest.fixture(scope="module")
def pretraining() -> Parts:
    overrides = [
        f"world.path={small_world.world()}", f"world.seed={small_world.SEED}", "world.size=small",
        "task_overrides.conceptual_captions.batch=8", "logging.console=quiet",
    ]  # fmt: skip
    return assemble(load(CONFIGS / "runs" / "world_pretrain.yaml", overrides))


@pytest.mark.parametrize(("ranks", "micro"), DIVISIONS)
def test_pretraining_is_divided_by_what_each_loss_asks_for(pretraining: Parts, ranks: int, micro: int) -> None:
    """Means over hidden words, over hidden regions and over captions have three divisors."""
    task = pretraining.tasks["conceptual_captions"]
    whole, batches = task.train(1), divided(task.train, 1, ranks, micro)
    assert np.sum([batch.shares for batch in batches], axis=0) == pytest.approx([1, 1, 1], abs=1e-12)
    assert isinstance(whole.target, MaskedTarget)
    for batch in batches:
        assert isinstance(batch.target, MaskedTarget)
        if batch.shares[-1]:
            words, regions = len(whole.target.word_rows), len(whole.target.region_rows)
            assert batch.shares[0] == pytest.approx(len(batch.target.word_rows) / words)
            assert batch.shares[1] == pytest.approx(len(batch.target.region_rows) / regions)
    expected, gradients = _with_gradients(pretraining, task.row.head, [whole])
    found, theirs = _with_gradients(pretraining, task.row.head, batches)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for key, value in gradients.items():
        assert float((theirs[key] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-6, key


@pytest.mark.parametrize("name", TASKS)
def test_rows_of_an_example_are_those_of_its_batch(parts: Parts, name: str) -> None:
    """What is balanced is what the trunk has to do: text and region rows (retrieval: of the match alone)."""
    source = parts.tasks[name].train
    for index in range(8):
        batch = _alone(source, index)
        rows = example_rows(source.data, np.array([index]))
        if name == "captions":
            assert int(rows[0]) < len(batch.token_ids) + len(batch.features)
            continue
        token = batch.task_token is not None
        texts = len(batch.token_ids) - token * (len(batch.cu_texts) - 1)
        pairs = batch.n_pairs // (len(batch.cu_texts) - 1)
        assert int(rows[0]) == texts * pairs + len(batch.features)


def _alone(source: TrainingSource, index: int) -> Batch:
    from pipelines.packing import pack

    return pack(source.data, np.array([index]), epoch=0, seed=0, training=True, task_token=source.task_token)


def test_micro_batches_make_the_same_steps(tmp_path: Path) -> None:
    """accumulation changes how a step is computed, never what it is."""
    configure(tmp_path / "data") if (tmp_path / "data").mkdir() is None else None
    more = [f"task_overrides.{name}.accumulation={2 + number % 2}" for number, name in enumerate(TASKS)]
    found = []
    for name, overrides in (("one", []), ("several", more)):
        from engine.ranks import Ranks

        found.append(runs(Ranks(), str(tmp_path / "data"), str(tmp_path / name), ["plain"], *overrides)["plain"])
    assert relative(found[1]["steps"], found[0]["steps"]) < 1e-5
    assert furthest(state(tmp_path / "several" / "plain-1"), state(tmp_path / "one" / "plain-1")) < 2e-3
    assert found[1]["cursor"]["consumed"] == found[0]["cursor"]["consumed"], "steps are counted, not micro-batches"


def test_micro_batches_of_a_step_are_of_one_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = assemble(configure(tmp_path, "task_overrides.captions.accumulation=2", "max_iterations=3"))
    step, seen = built.stepper.step, []

    def watched(batches: list[Batch], head: str, **more: object) -> object:
        seen.append(([batch.task for batch in batches], sum(batch.examples for batch in batches), head))
        return step(batches, head, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(built.stepper, "step", watched)
    assert Loop(built, Cursor(), tmp_path / "run", Listener()).run()
    assert len(seen) == 15
    for tasks, examples, _ in seen:
        assert len(set(tasks)) == 1 and len(tasks) == (2 if tasks[0] == "captions" else 1)
        assert examples == 8
