"""Synthetic samples: the same content packed and padded, for every task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.batches import Answer, Samples, draw, pack, packed_rows, pad, padded_row_share, padded_rows
from bench.lengths import load
from engine.golden import pack_padded
from engine.losses import loss_and_score
from engine.model.heads import HeadSpec
from engine.model.published import PUBLISHED_HEADS
from engine.model.trunk import unshared
from engine.tasks import TaskRow, load_table
from pipelines.batch import Batch, ChoiceTarget, OptionTarget, RegionTarget, SoftLabelTarget
from tests.bench.test_peers import small

TASKS = load_table().default_tasks()
BATCH = 3


def samples_of(row: TaskRow, turn: int = 0) -> Samples:
    return draw(row, load()[row.name], small(), BATCH, (7, turn))


@pytest.mark.parametrize("row", TASKS, ids=lambda row: row.name)
def test_both_forms_hold_the_same(row: TaskRow) -> None:
    """What is left of the padded form without its padding is the packed form, an item per pair."""
    samples = samples_of(row)
    batch, padded = pack(samples), pad(samples)
    assert padded.inputs.input_ids.shape[1] == row.max_tokens
    assert padded.inputs.features.shape[1] == row.max_regions
    assert (~padded.inputs.image_mask.bool()[..., None] * padded.inputs.features).count_nonzero() == 0
    i = padded.inputs
    images = {"features": i.features, "locations": i.locations, "image_mask": i.image_mask}
    again = pack_padded(row.name, i.input_ids, i.input_mask, images, row.number, None, BATCH)
    each = unshared(batch)
    for name in ("token_ids", "cu_texts", "features", "boxes", "cu_images"):
        torch.testing.assert_close(getattr(each, name), getattr(again, name), rtol=0, atol=0, msg=name)
    assert packed_rows(batch) == samples.real_rows
    assert padded_rows(padded) == batch.n_pairs * (row.max_tokens + 1 + row.max_regions)


@pytest.mark.parametrize("row", TASKS, ids=lambda row: row.name)
def test_the_engine_can_train_on_it(row: TaskRow) -> None:
    """Items by first appearance, keys of their own, a target of the task's kind that fits the logits."""
    batch = pack(samples_of(row))
    assert batch.examples == BATCH
    assert batch.max_text == int(batch.cu_texts.diff().max())
    assert len({*batch.text_key.tolist(), *batch.image_key.tolist()}) == batch.n_texts + batch.n_images
    for items in (batch.pair_text.tolist(), batch.pair_image.tolist()):
        assert list(dict.fromkeys(items)) == list(range(len(set(items))))
    loss, score = loss_and_score(logits_of(batch, PUBLISHED_HEADS[row.head]), batch)
    assert loss.isfinite() and score.shape == (BATCH,)


def logits_of(batch: Batch, head: HeadSpec) -> torch.Tensor:
    if isinstance(batch.target, RegionTarget | ChoiceTarget):
        return torch.randn(batch.pair_image_rows)
    return torch.randn(batch.n_pairs if isinstance(batch.target, OptionTarget) else BATCH, head.outputs)


def test_retrieval_and_nlvr2_share_items() -> None:
    rows = {row.name: row for row in TASKS}
    retrieval, pairs = pack(samples_of(rows["coco_retrieval"])), pack(samples_of(rows["nlvr2"]))
    assert (retrieval.n_pairs, retrieval.n_texts, retrieval.n_images) == (4 * BATCH, 3 * BATCH, 2 * BATCH)
    assert retrieval.pair_text[:4].tolist() == [0, 1, 0, 2]
    assert retrieval.pair_image[:4].tolist() == [0, 0, 1, 0]
    assert (pairs.n_pairs, pairs.n_texts, pairs.n_images) == (2 * BATCH, BATCH, 2 * BATCH)


def test_pointing_has_the_published_slots() -> None:
    rows = {row.name: row for row in TASKS}
    for name, slots in (("visual7w", 4), ("guesswhat_pointing", 204)):
        samples = samples_of(rows[name])
        padded, target = pad(samples), pack(samples).target
        assert padded.choice_index is not None
        assert isinstance(target, ChoiceTarget)
        assert padded.choice_index.shape == (BATCH, slots)
        used = padded.choice_index != 204
        assert torch.equal(padded.choice_index[used] + 101, target.rows)
        assert torch.equal(padded.target[..., 0][used], target.scores)


def test_batches_depend_on_seed_and_turn_alone() -> None:
    row = TASKS[0]
    first, again, other = (pack(samples_of(row, turn)) for turn in (0, 0, 1))
    assert torch.equal(first.token_ids, again.token_ids) and torch.equal(first.features, again.features)
    assert not torch.equal(first.features, other.features)
    assert isinstance(first.target, SoftLabelTarget)


def test_padded_row_share_by_hand() -> None:
    """Two questions of 4 and 6 tokens on images of 3 and 101 regions, padded to 24 text and 101 region rows each."""
    row: Any = load_table().row("vqa")
    samples = Samples(
        row, PUBLISHED_HEADS["vil_prediction"],
        texts=[torch.arange(4), torch.arange(6)], features=[torch.zeros(3, 2), torch.zeros(101, 2)],
        boxes=[torch.zeros(3, 5), torch.zeros(101, 5)], pair_text=[0, 1], pair_image=[0, 1],
        answers=[Answer(torch.tensor([0]), torch.ones(1))] * 2,
    )  # fmt: skip
    real = (4 + 1) + (6 + 1) + 3 + 101
    assert samples.real_rows == real == packed_rows(pack(samples))
    assert padded_rows(pad(samples)) == 2 * (24 + 101)
    assert padded_row_share(250, real) == pytest.approx(134 / 250)
    assert padded_row_share(packed_rows(pack(samples)), real) == 0
