"""Padded batches: the same losses, scores, masks and gradients as unpadded ones, little padding, and few shapes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench import batches
from bench.buckets import drawn
from bench.lengths import load as load_lengths
from engine.assembly import assemble
from engine.losses import loss_and_score
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.tasks import load_table
from pipelines.batch import Batch, BatchTarget, ChoiceTarget, RegionTarget, SoftLabelTarget
from pipelines.buckets import Grid, Stream, bucket_of, dummies, pad
from pipelines.packing import pack
from pipelines.slab import in_one_slab, pageable
from tests.engine.small_run import configure
from tests.pipelines import small
from tests.pipelines.test_packing import assert_equal

TASKS = [row.name for row in load_table().default_tasks()]

MODEL = ModelConfig(
    vocab_size=200, max_position_embeddings=320, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
    intermediate_size=32, v_feature_size=8, v_target_size=5, v_hidden_size=16, v_num_hidden_layers=2,
    v_num_attention_heads=2, v_intermediate_size=16, bi_hidden_size=16, bi_num_attention_heads=2,
    v_biattention_id=(0, 1), t_biattention_id=(1, 2), initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> ViLBERT:
    model = ViLBERT(MODEL, PUBLISHED_HEADS)
    model.initialise(0)
    return model


def batch_of(name: str, examples: int = 3) -> Batch:
    return batches.pack(batches.draw(load_table().tasks[name], load_lengths()[name], MODEL, examples, seed=(1, 0)))


def outcome(model: ViLBERT, batch: Batch, share: bool = True, step: int = 5) -> dict[str, Tensor]:
    """Loss, scores and every gradient of a training step with dropout, in evaluation's order."""
    model.zero_grad(set_to_none=True)
    head = load_table().tasks[batch.task].head if batch.task in TASKS else f"{batch.task}_head"
    loss, score = loss_and_score(model(batch, head, Randomness(7, step, training=True), share), batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    for block in model.blocks():
        block.drop_gradients()
    return {"loss": loss.detach(), "score": score, **found}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but for the rounding of sums over more rows; scores equal."""
    assert found.keys() == expected.keys()
    assert torch.equal(found["score"], expected["score"])
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        rounding = 2e-5 * float(value.abs().max()) + 1e-7 * largest  # some gradients are 0 but for what is rounded
        assert torch.allclose(found[name], value, rtol=1e-4, atol=rounding), name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_padding_changes_nothing_of_the_real_examples(model: ViLBERT, name: str, share: bool) -> None:
    batch = batch_of(name)
    padded = pad(batch)
    assert padded.padding > 0
    assert padded.examples == batch.examples
    expected = outcome(model, batch, share)
    assert_same(outcome(model, padded, share), expected)
    other = outcome(model, padded, share, step=6)
    assert not torch.allclose(other["loss"], expected["loss"], rtol=1e-4), "masks must matter for this to mean anything"


@pytest.mark.parametrize("name", TASKS)
def test_what_the_dummies_hold_does_not_matter(model: ViLBERT, name: str) -> None:
    batch = batch_of(name)
    padded = pad(batch)
    expected = outcome(model, padded)
    padded.features[len(batch.features) :] = 50.0
    padded.boxes[len(batch.boxes) :] = -3.0
    padded.text_key[batch.n_texts :] = 99
    words = padded.token_ids[len(batch.token_ids) :]
    words[words != batch.task_token] = 150
    found = outcome(model, padded)
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", list(small.SPECS))
def test_a_packed_batch_on_a_grid_is_the_same_batch(tmp_path: Path, name: str, share: bool) -> None:
    """Through the pipelines, whose batches share items across examples as well: numbers stay, and so do the pairs."""
    parts = assemble(configure(tmp_path, "model.hidden_dropout_prob=0.1"))
    data = parts.tasks[name].train.data
    settings: dict[str, Any] = {"epoch": 0, "seed": 5, "training": True, "task_token": 4, "share": share}
    indices = np.array([7, 3, 31, 3, 18, 0, 22, 3])
    plain, padded = pack(data, indices, **settings), pack(data, indices, **settings, grid=Grid.fitting(16))
    k = plain.n_pairs // len(indices)
    assert padded.n_pairs == plain.n_pairs + k
    for p in range(plain.n_pairs):
        for ours, theirs in zip(_pair(padded, p), _pair(plain, p), strict=True):
            assert torch.equal(ours, theirs)
    head = parts.tasks[name].row.head
    results = []
    for batch in (plain, padded):
        loss, score = loss_and_score(parts.model(batch, head, Randomness(7, 5, True), share), batch)
        results.append((loss.detach(), score))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=0)
    assert torch.equal(results[1][1], results[0][1])


def _pair(batch: Batch, p: int) -> tuple[Tensor, ...]:
    text, image = batch.pair_text[p], batch.pair_image[p]
    rows = slice(batch.cu_images[image], batch.cu_images[image + 1])
    words = batch.token_ids[batch.cu_texts[text] : batch.cu_texts[text + 1]]
    return words, batch.features[rows], batch.boxes[rows], batch.text_key[text], batch.image_key[image]


def test_counts_of_items_are_the_same_in_every_batch_of_a_task(tmp_path: Path) -> None:
    """Items shared by chance across examples would make a new shape each time."""
    parts = assemble(configure(tmp_path))
    for name, texts, images in (("answers", 1, 1), ("captions", 3, 2), ("pairs", 1, 2)):
        source = dataclasses.replace(parts.tasks[name].train, grid=Grid.fitting(16))
        found = {(batch.n_texts, batch.n_images) for batch in map(source, range(4))}
        assert len(found) == 1
        extra = {"answers": (1, 1), "captions": (3, 3), "pairs": (1, 2)}[name]
        assert found == {(8 * texts + extra[0], 8 * images + extra[1])}


@pytest.mark.parametrize("task_token", [None, 12])
@pytest.mark.parametrize("name", TASKS)
def test_a_padded_batch_is_whole(name: str, task_token: int | None) -> None:
    """What the model takes for granted: offsets that end where rows end, rows of the pairs, row 1 of every text."""
    batch = pad(dataclasses.replace(batch_of(name), task_token=task_token))
    for cu, total, longest in (
        (batch.cu_texts, len(batch.token_ids), batch.max_text),
        (batch.cu_images, len(batch.features), batch.max_image),
    ):
        lengths = cu.diff()
        assert int(cu[-1]) == total
        assert int(lengths.min()) >= 1
        assert int(lengths.max()) <= longest
    assert len(batch.boxes) == len(batch.features)
    assert int(batch.cu_texts.diff()[batch.pair_text].sum()) == batch.pair_text_rows
    assert int(batch.cu_images.diff()[batch.pair_image].sum()) == batch.pair_image_rows
    assert int(batch.cu_texts.diff().min()) >= 2
    if task_token is not None:
        first_dummy = batch_of(name).n_texts
        assert (batch.token_ids[batch.cu_texts[first_dummy:-1].long() + 1] == task_token).all()
    identical = torch.equal(batch.pair_text, torch.arange(batch.n_pairs))
    assert identical == (batch.n_texts == batch.n_pairs), "the trunk takes equal counts for pair p has text p"
    match batch.target:
        case SoftLabelTarget(offsets, labels, scores):
            assert int(offsets[-1]) == len(labels) == len(scores)
            _same_labels(batch.target, batch_of(name).target)
        case RegionTarget(cu_regions, scores):
            assert int(cu_regions[-1]) == len(scores) == batch.pair_image_rows
        case ChoiceTarget(offsets, rows, scores):
            assert int(offsets[-1]) == len(rows) == len(scores)


def _same_labels(padded: SoftLabelTarget, plain: BatchTarget | None) -> None:
    """Example by example, and nobody has all of the padding."""
    assert isinstance(plain, SoftLabelTarget)
    more = len(padded.labels) - len(plain.labels)
    examples = len(plain.offsets) - 1
    assert len(padded.offsets) - 1 == examples
    for b in range(examples):
        wanted, found = (
            [(label, score) for label, score in zip(t.labels[rows].tolist(), t.scores[rows].tolist(), strict=True)]
            for t, rows in ((t, slice(t.offsets[b], t.offsets[b + 1])) for t in (plain, padded))
        )
        assert found[: len(wanted)] == wanted
        assert {score for _, score in found[len(wanted) :]} <= {0.0}
        assert len(found) - len(wanted) in (more // examples, more // examples + 1)


@pytest.mark.parametrize("name", TASKS)
def test_one_slab_holds_everything(name: str) -> None:
    batch = in_one_slab(pad(batch_of(name)), pageable)
    assert batch.slab is not None
    tensors = [x for x in (*vars(batch).values(), *vars(batch.target).values()) if isinstance(x, Tensor)]
    assert {x.untyped_storage().data_ptr() for x in tensors} == {batch.slab.untyped_storage().data_ptr()}
    assert all(x.data_ptr() % 256 == batch.slab.data_ptr() % 256 for x in tensors)
    elsewhere = torch.zeros(batch.slab.numel() + 512, dtype=torch.uint8)
    moved = batch.in_slab(elsewhere)
    elsewhere[: batch.slab.numel()].copy_(batch.slab)
    assert_equal(moved, batch)
    assert moved.features.data_ptr() != batch.features.data_ptr()
    assert_equal(batch.to("cpu"), batch)


@pytest.mark.parametrize("name", TASKS)
def test_equal_batches_have_equal_slabs(name: str) -> None:
    def dirty(nbytes: int) -> Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)

    batch = pad(batch_of(name))
    first = in_one_slab(batch, pageable)
    again = in_one_slab(first, dirty)  # from a batch that has a slab, in memory that held something else
    other = in_one_slab(batch, lambda nbytes: torch.zeros(nbytes + 256, dtype=torch.uint8)[256:])
    assert first.slab is not None and again.slab is not None and other.slab is not None
    assert torch.equal(again.slab, other.slab) and first.slab.shape == again.slab.shape
    assert_equal(again, other)


@pytest.mark.parametrize("step", [1, 2, 16, 48])
@pytest.mark.parametrize(
    ("items", "pairs", "k", "uses"),
    [(5, 5, 1, 1), (3, 6, 2, 2), (10, 10, 2, 1), (6, 8, 4, None), (4, 8, 4, None), (3, 4, 1, None), (4, 5, 1, None)],
)
def test_dummies_fill_both_kinds_of_rows(items: int, pairs: int, k: int, uses: int | None, step: int) -> None:
    for rows in range(50, 80):
        pair_rows = rows * uses if uses else rows + 3 * (rows % 7) + 11
        stream = Stream(items, rows, pair_rows, 20)
        found = dummies(stream, pairs, k, uses, step, least=2)
        padded = found.pad(stream)
        assert padded.rows % step == 0
        assert padded.pair_rows % step == 0
        assert padded.longest % 64 == 0
        assert padded.longest >= 20
        assert len(found.of_pairs) == k
        assert all(2 <= length <= step + 1 for length in found.lengths)
        assert uses == 1 or padded.items != pairs + k


def test_refused_batches() -> None:
    batch = batch_of("vqa")
    with pytest.raises(ValueError, match="cannot be padded"):
        pad(pad(batch))
    with pytest.raises(ValueError, match="4 pairs of 3 examples cannot be padded"):
        pad(dataclasses.replace(batch, pair_text=torch.arange(4)))


@pytest.mark.parametrize("examples", [16, None])
def test_padding_is_little_and_shapes_are_few(examples: int | None) -> None:
    """Real lengths, 200 batches of each task: 16 examples (one of many ranks) and the published batch sizes."""
    lengths = load_lengths()
    for row in load_table().default_tasks():
        found = [drawn(row, lengths[row.name], examples or row.batch, seed) for seed in range(200)]
        assert max(share for _, share in found) <= 0.05, row.name
        few = {"guesswhat_pointing": 80, "coco_retrieval": 60, "flickr30k_retrieval": 60}.get(row.name, 20)
        assert len({bucket for bucket, _ in found}) <= few, row.name


def test_a_drawn_bucket_is_that_of_a_real_batch() -> None:
    """The simulation above must pad as `pad` does: for images of one size, and texts all alike, both are exact."""
    row, lengths = load_table().tasks["nlvr2"], load_lengths()["nlvr2"]
    alike = dataclasses.replace(lengths, texts=dataclasses.replace(lengths.texts, counts={20: 1}))
    bucket, share = drawn(row, alike, 6, seed=0)
    batch = pad(batches.pack(batches.draw(row, alike, MODEL, 6, seed=(0, 0))))
    assert bucket_of(batch) == bucket
    assert share == batch.padding / (batch.pair_text_rows + batch.pair_image_rows)
