"""What pretraining hides (paper section 3.1, spec section 2.1): the rules against plain loops, the shares, the counters."""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Literal

import numpy as np
import pytest
import torch

from pipelines import ragged
from pipelines.batch import Batch, MaskedTarget
from pipelines.boxes import iou_inclusive
from pipelines.datasets import DataSpec, TaskData, load_task
from pipelines.errors import BadInput
from pipelines.masking import Draw, Masking, draw_captions, mask_regions, mask_words
from pipelines.pretraining import check_classes, pack_masked
from pipelines.wordpiece import WordPiece
from tests.pipelines import small_world
from tests.pipelines.test_packing import assert_equal

MASK, VOCABULARY, CLS, SEP = 4, 600, 2, 3
PLAIN = Masking(mask_token=MASK, vocabulary=VOCABULARY)
Overlap = Literal["paper", "authors"]


def draw(examples: int = 2000, epoch: int = 0, seed: int = 0) -> Draw:
    return Draw(number=32, seed=seed, epoch=epoch, examples=np.arange(examples))


@lru_cache(maxsize=1)
def captions() -> TaskData:
    """The small world's captions."""
    spec = DataSpec("conceptual_captions", "pipelines.readers.conceptual_captions:read", 32, 36, 37, 1, "masked")
    sheet = small_world.sheet()
    return load_task(spec, sheet, "train", WordPiece.load(sheet.vocabulary))


def packed(
    indices: list[int], masking: Masking = PLAIN, *, epoch: int = 0, training: bool = True, **more: object
) -> Batch:
    chosen = np.array(indices)
    return pack_masked(captions(), chosen, masking, epoch=epoch, seed=5, training=training, **more)  # type: ignore[arg-type]


# Words


def texts(n: int, words: int = 20) -> tuple[np.ndarray, np.ndarray]:
    ids = np.tile(np.array([CLS, *range(100, 100 + words), SEP], np.int64), n)
    return ids, ragged.offsets_of([words + 2] * n)


def test_shares_of_words() -> None:
    ids, cu_texts = texts(2000)
    found = mask_words(draw(), PLAIN, ids, cu_texts, np.zeros(2000, bool))
    assert len(found.rows) == pytest.approx(0.15 * 40_000, rel=0.04)
    np.testing.assert_array_equal(found.labels, ids[found.rows])
    assert not {CLS, SEP} & set(found.labels.tolist())
    seen = found.token_ids[found.rows]
    changed = seen != found.labels
    assert (seen == MASK).mean() == pytest.approx(0.8, abs=0.02)
    assert (changed & (seen != MASK)).mean() == pytest.approx(0.1, abs=0.015)
    random = seen[changed & (seen != MASK)]
    assert random.min() < 30 and random.max() > VOCABULARY - 30, (
        "special tokens and the last ones among them, as published"
    )
    untouched = np.ones(len(ids), bool)
    untouched[found.rows] = False
    np.testing.assert_array_equal(found.token_ids[untouched], ids[untouched])


def test_words_of_unmatched_captions_are_hidden_and_not_asked_for() -> None:
    ids, cu_texts = texts(500)
    matched = mask_words(draw(500), PLAIN, ids, cu_texts, np.zeros(500, bool))
    unmatched = np.arange(500) % 2 == 1
    half = mask_words(draw(500), PLAIN, ids, cu_texts, unmatched)
    np.testing.assert_array_equal(half.token_ids, matched.token_ids)
    text = np.searchsorted(cu_texts, matched.rows, side="right") - 1
    np.testing.assert_array_equal(half.rows, matched.rows[~unmatched[text]])


# Captions


def test_captions_of_others() -> None:
    found, unmatched = draw_captions(draw(4000), 5000, 0.5)
    assert unmatched.mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(found[~unmatched], np.arange(4000)[~unmatched])
    assert (found[unmatched] != np.arange(4000)[unmatched]).all(), "its own caption would be a match"
    assert found.min() >= 0 and found.max() < 5000 and len(np.unique(found[unmatched])) > 1500
    few = {int(i) for epoch in range(60) for i in draw_captions(draw(1, epoch), 3, 1.0)[0]}
    assert few == {1, 2}


# Regions


def boxes(n_images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of images with up to 12 regions that often overlap, one image without any; and their offsets."""
    random = np.random.default_rng(seed)
    counts = random.integers(1, 13, n_images)
    counts[3] = 0
    cu_images = ragged.offsets_of(1 + counts)
    corners = random.uniform(0, 40, (int(cu_images[-1]), 2))
    return np.concatenate([corners, corners + random.uniform(20, 60, corners.shape)], 1).astype(np.float32), cu_images


@pytest.mark.parametrize("overlap", ["paper", "authors"])
def test_regions_against_loops(overlap: Overlap) -> None:
    pixels, cu_images = boxes(300)
    masking = Masking(MASK, VOCABULARY, overlap=overlap)
    unmatched = np.arange(300) % 3 == 0
    found = mask_regions(draw(300), masking, pixels, cu_images, unmatched)
    everything = mask_regions(draw(300), masking, pixels, cu_images, np.zeros(300, bool))
    chosen = set(everything.rows.tolist())
    kept = 0
    for image, (start, end) in enumerate(zip(cu_images[:-1].tolist(), cu_images[1:].tolist(), strict=True)):
        own = [row for row in range(start + 1, end) if row in chosen]
        assert [row for row in found.rows.tolist() if start < row < end] == ([] if unmatched[image] else own)
        close = iou_inclusive(pixels[own], pixels[start:end]) > 0.4 if own else np.zeros((1, end - start), bool)
        near = {start + i for i in np.flatnonzero(close.any(0)).tolist() if i}
        assert not found.zeroed[start] and not found.averaged[start], "the global row is made anew"
        left = [row for row in range(start + 1, end) if row not in near and row not in chosen]
        assert found.divisor[image] == max(len(left), 1)
        for row in range(start + 1, end):
            if row in chosen:
                kept += not found.zeroed[row]
            else:
                assert found.zeroed[row] == (overlap == "paper" and row in near)
            assert found.averaged[row] == (row in left if overlap == "paper" else True)
    assert 0.04 < kept / len(chosen) < 0.16, "a tenth keeps its features"
    assert len(chosen) == pytest.approx(0.15 * (cu_images[-1] - 300), rel=0.15)


def test_an_overlap_of_exactly_the_limit_gives_nothing_away() -> None:
    cu_images = np.array([0, 3])
    near = np.array([[0, 0, 99, 99], [0, 0, 99, 99], [0, 0, 99, 39]], np.float32)  # 100 x 100 and 100 x 40: IoU 0.4
    for examples in range(200):
        one = Draw(32, 0, examples, np.array([0]))
        found = mask_regions(one, PLAIN, near, cu_images, np.zeros(1, bool))
        if found.rows.tolist() == [1]:
            assert not found.zeroed[2]
            return
    pytest.fail("the first region was never the only one chosen")


# Batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overlap", ["paper", "authors"])
def test_a_batch_shows_what_is_left(overlap: Overlap, dtype: torch.dtype) -> None:
    data = captions()
    masking = Masking(MASK, VOCABULARY, regions=0.8, overlap=overlap)
    indices = list(range(40))
    batch = packed(indices, masking, dtype=dtype)
    target = batch.target
    assert isinstance(target, MaskedTarget) and batch.n_pairs == 40 and batch.task_token is None
    none = packed(indices, Masking(MASK, VOCABULARY, words=0, regions=0, unmatched=0), dtype=dtype)
    cu = batch.cu_images.tolist()
    plain = none.features.float()
    emptied = 0
    for i, (start, end) in enumerate(itertools.pairwise(cu)):
        rows = batch.features[start + 1 : end].float()
        gone = ~rows.any(1)
        torch.testing.assert_close(rows[~gone], plain[start + 1 : end][~gone], rtol=0, atol=0)
        own = mask_regions(
            Draw(32, 5, 0, np.array([indices[i]])), masking, data.store.record(str(indices[i])).boxes[
                np.r_[0, 0 : end - start - 1]], np.array([0, end - start]), np.zeros(1, bool),
        )  # fmt: skip
        assert gone.tolist() == own.zeroed[1:].tolist()
        averaged = rows[torch.from_numpy(own.averaged[1:])].sum(0) / float(own.divisor[0])
        torch.testing.assert_close(batch.features[start].float(), averaged.to(dtype).float(), rtol=1e-6, atol=1e-6)
        emptied += not own.averaged.any()
        asked = [row - start for row in target.region_rows.tolist() if start <= row < end]
        assert asked == ([] if target.unmatched[i] else own.rows.tolist())
    assert overlap == "authors" or emptied, "some image has nothing left, and a global row of zeros"
    for place, row in enumerate(target.region_rows.tolist()):
        image = int(np.searchsorted(cu, row, side="right")) - 1
        record = data.store.record(str(indices[image]))
        assert record.class_probs is not None
        expected = torch.from_numpy(record.class_probs[row - cu[image] - 1].astype(np.float32))
        assert torch.equal(target.region_target[place], expected)


def test_a_batch_reads_the_caption_that_it_says() -> None:
    data = captions()
    masking = Masking(MASK, VOCABULARY, words=0)
    batch = packed(list(range(30)), masking)
    assert isinstance(batch.target, MaskedTarget)
    whole, offsets = data.token_ids, data.token_offsets
    found, unmatched = draw_captions(Draw(32, 5, 0, np.arange(30)), len(data), 0.5)
    assert batch.target.unmatched.tolist() == unmatched.astype(int).tolist()
    for i, text in enumerate(found.tolist()):
        ours = batch.token_ids[batch.cu_texts[i] : batch.cu_texts[i + 1]].tolist()
        assert ours == whole[offsets[text] : offsets[text + 1]].tolist()
    assert len(batch.target.word_rows) == 0


def test_masks_do_not_depend_on_the_batch_and_change_with_the_epoch() -> None:
    many, one = packed(list(range(20))), packed([13])
    start, end = int(many.cu_images[13]), int(many.cu_images[14])
    assert torch.equal(many.features[start:end], one.features)
    start, end = int(many.cu_texts[13]), int(many.cu_texts[14])
    assert torch.equal(many.token_ids[start:end], one.token_ids)
    assert_equal(packed(list(range(20))), many)
    other = packed(list(range(20)), epoch=1)
    assert other.token_ids.shape != many.token_ids.shape or not torch.equal(other.token_ids, many.token_ids)
    first, again = (packed(list(range(20)), epoch=epoch, training=False) for epoch in (0, 3))
    assert_equal(first, again)


def test_blind_batches_have_no_features() -> None:
    assert not packed([1, 2], blind=True).features.any()


def test_stores_that_cannot_be_pretrained_on() -> None:
    data = captions()
    check_classes(data, 48)
    with pytest.raises(BadInput, match="48 detector classes, the model has 1601"):
        check_classes(data, 1601)
    without = small_world.sheet()
    spec = DataSpec("snli_ve", small_world.TASKS["snli_ve"]["reader"], 13, 56, 101, 1, "classes")
    other = load_task(spec, without, "val", WordPiece.load(without.vocabulary))
    other.store.with_probs[:] = False
    try:
        with pytest.raises(BadInput, match="no class distributions"):
            check_classes(other, 48)
    finally:
        other.store.with_probs[:] = True
