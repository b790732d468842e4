"""Packing against a plain reference: every pair rebuilt alone, by loops, from the examples themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipelines.batch import Batch, ChoiceTarget, ClassTarget, OptionTarget, RegionTarget, SoftLabelTarget
from pipelines.boxes import iou_inclusive
from pipelines.datasets import TaskData
from pipelines.examples import Example
from pipelines.negatives import load_hard_pool
from pipelines.packing import pack
from pipelines.targets import Indices
from tests.pipelines import small

INDICES = np.array([7, 3, 31, 3, 18, 0, 22])


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.build(tmp_path_factory.mktemp("small"))


def packed(data: TaskData, indices: Indices = INDICES, **changes: Any) -> Batch:
    options: dict[str, Any] = {"epoch": 0, "seed": 5, "training": True, "task_token": None}
    return pack(data, indices, **{**options, **changes})


def plain_text(example: Example, data: TaskData, task_token: int | None) -> list[int]:
    words = [5 + small.WORDS.index(word) for word in example.text.split()][: data.spec.max_tokens - 2]
    return [2, *([] if task_token is None else [task_token]), *words, 3]


def plain_regions(image: str, data: TaskData) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
    """Features, pixel boxes and the first annotated row of one image."""
    record = data.store.record(image)
    appended = data.candidates.record(image) if data.candidates else None
    room = data.spec.max_regions - 1 - (len(appended.boxes) if appended else 0)
    features = [record.mean[None], record.features[:room]]
    boxes = [np.array([[0, 0, small.WIDTH, small.HEIGHT]], np.float32), record.boxes[:room]]
    first = 1 + len(record.boxes[:room])
    if appended:
        features.append(appended.features)
        boxes.append(appended.boxes)
    return np.concatenate(features), np.concatenate(boxes), first


def plain_locations(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    rows = []
    for x1, y1, x2, y2 in boxes:
        w, h = small.WIDTH, small.HEIGHT
        rows.append([x1 / w, y1 / h, x2 / w, y2 / h, (x2 - x1) * (y2 - y1) / (w * h)])
    return np.array(rows, np.float32)


def pair(batch: Batch, p: int) -> tuple[list[int], NDArray[np.float32], NDArray[np.float32]]:
    """Pair p taken out of the batch again: its tokens, features and locations."""
    text, image = int(batch.pair_text[p]), int(batch.pair_image[p])
    tokens = batch.token_ids[batch.cu_texts[text] : batch.cu_texts[text + 1]].tolist()
    rows = slice(int(batch.cu_images[image]), int(batch.cu_images[image + 1]))
    return tokens, batch.features[rows].float().numpy(), batch.boxes[rows].numpy()


@pytest.mark.parametrize("task_token", [None, 12])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", ["answers", "phrases", "pointing", "pairs"])
def test_every_pair_is_its_example(sheet: Path, name: str, share: bool, task_token: int | None) -> None:
    data = small.load(sheet, name)
    batch = packed(data, share=share, task_token=task_token)
    assert batch.n_pairs == len(INDICES) * data.spec.images
    for position, index in enumerate(INDICES):
        example = small.EXAMPLES[name][index]
        for turn, image in enumerate(example.images):
            tokens, features, locations = pair(batch, position * data.spec.images + turn)
            expected, boxes, _ = plain_regions(image, data)
            assert tokens == plain_text(example, data, task_token)
            np.testing.assert_array_equal(features, expected)
            np.testing.assert_allclose(locations, plain_locations(boxes), atol=1e-6)
            assert locations[0].tolist() == [0, 0, 1, 1, 1]
    assert batch.example_ids == tuple(f"{name}-{index}" for index in INDICES)
    assert batch.max_text == int(batch.cu_texts.diff().max())
    assert batch.max_image == int(batch.cu_images.diff().max())


def test_shared_items_appear_once(sheet: Path) -> None:
    data = small.load(sheet, "pairs")
    batch = packed(data)
    examples = [small.EXAMPLES["pairs"][index] for index in INDICES]
    assert batch.n_texts == len(set(INDICES.tolist()))
    assert batch.n_images == len({image for example in examples for image in example.images})
    assert batch.pair_text[0] == batch.pair_text[1], "both images of a statement read one text"
    alone = packed(data, share=False)
    assert alone.n_texts == alone.n_images == alone.n_pairs == 2 * len(INDICES)
    assert torch.equal(batch.text_key[batch.pair_text], alone.text_key)
    assert torch.equal(batch.image_key[batch.pair_image], alone.image_key)


def test_soft_labels(sheet: Path) -> None:
    target = packed(small.load(sheet, "answers")).target
    assert isinstance(target, SoftLabelTarget)
    for position, index in enumerate(INDICES):
        wanted = small.target("answers", index)
        known = [
            (small.ANSWERS.index(a), s)
            for a, s in zip(wanted.answers, wanted.scores, strict=True)
            if a in small.ANSWERS
        ]
        rows = slice(int(target.offsets[position]), int(target.offsets[position + 1]))
        assert target.labels[rows].tolist() == [label for label, _ in known]
        np.testing.assert_allclose(target.scores[rows], [score for _, score in known], rtol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_region_scores(sheet: Path, training: bool) -> None:
    data = small.load(sheet, "phrases")
    target = packed(data, training=training).target
    assert isinstance(target, RegionTarget)
    below = 0
    for position, index in enumerate(INDICES):
        example = small.EXAMPLES["phrases"][index]
        _, boxes, _ = plain_regions(example.images[0], data)
        expected = iou_inclusive(boxes, np.array(small.target("phrases", index).boxes, np.float32)).max(axis=1)
        below += int(((expected > 0) & (expected < 0.5)).sum())
        if training:
            expected[expected < 0.5] = 0
        rows = slice(int(target.cu_regions[position]), int(target.cu_regions[position + 1]))
        np.testing.assert_allclose(target.scores[rows], expected, rtol=1e-6)
    assert below, "the threshold must have something to do"


def test_choices(sheet: Path) -> None:
    data = small.load(sheet, "pointing")
    target = packed(data).target
    assert isinstance(target, ChoiceTarget)
    for position, index in enumerate(INDICES):
        example = small.EXAMPLES["pointing"][index]
        wanted = small.target("pointing", index)
        _, boxes, first = plain_regions(example.images[0], data)
        rows = target.rows[target.offsets[position] : target.offsets[position + 1]].tolist()
        assert rows == [first + choice for choice in wanted.choices]
        assert boxes[rows].tolist() == [list(wanted.candidates[choice]) for choice in wanted.choices]
        expected = iou_inclusive(boxes[rows], boxes[rows[wanted.answer]])[:, 0]
        expected[expected < 0.5] = 0
        scores = target.scores[target.offsets[position] : target.offsets[position + 1]].numpy()
        np.testing.assert_allclose(scores, expected, rtol=1e-6)
        assert scores[wanted.answer] == 1


def test_classes(sheet: Path) -> None:
    target = packed(small.load(sheet, "pairs")).target
    assert isinstance(target, ClassTarget)
    assert target.index.tolist() == [small.target("pairs", index).index for index in INDICES]


@pytest.mark.parametrize("share", [True, False])
def test_retrieval_options(sheet: Path, share: bool) -> None:
    data = small.load(sheet, "captions")
    batch = packed(data, share=share)
    assert isinstance(batch.target, OptionTarget)
    assert batch.target.index.tolist() == [0] * len(INDICES)
    examples = small.EXAMPLES["captions"]
    caption_of = {tuple(plain_text(example, data, None)): example for example in examples}
    for position, index in enumerate(INDICES):
        own = examples[index].images[0]
        options = [pair(batch, 4 * position + option) for option in range(4)]
        own_features = plain_regions(own, data)[0]
        for option, (tokens, features, _) in enumerate(options):
            caption, same_image = caption_of[tuple(tokens)], np.array_equal(features, own_features)
            assert same_image == (option != 2)
            assert (caption.id == examples[index].id) == (option in (0, 2))
            if option in (1, 3):
                assert caption.images[0] != own, "a negative caption never describes the positive's image"
    if share:
        assert batch.n_texts <= 3 * len(INDICES)
        assert batch.n_images <= 2 * len(INDICES)


def test_negatives_change_with_the_epoch_in_training_only(sheet: Path) -> None:
    data = small.load(sheet, "captions")
    keys = [packed(data, epoch=epoch, share=False).text_key for epoch in (0, 1)]
    assert not torch.equal(*keys)
    fixed = [packed(data, epoch=epoch, share=False, training=False).text_key for epoch in (0, 1)]
    assert torch.equal(*fixed)


def test_negatives_do_not_depend_on_the_batch(sheet: Path) -> None:
    data = small.load(sheet, "captions")
    together = packed(data, share=False)
    for position, index in enumerate(INDICES):
        alone = packed(data, np.array([index]), share=False)
        four = slice(4 * position, 4 * position + 4)
        assert torch.equal(together.text_key[four], alone.text_key)
        assert torch.equal(together.image_key[four], alone.image_key)


def test_hard_negatives_come_from_the_pool(sheet: Path) -> None:
    data = small.load(sheet, "captions")
    keys = np.array(small.IMAGES)
    pool = np.stack([np.arange(12), (np.arange(12) + 1) % 12, (np.arange(12) + 2) % 12], axis=1)
    path = sheet.parent / "hard.npz"
    np.savez(path, images=keys, pool=pool)
    used = [image for image in small.IMAGES if image in {e.images[0] for e in small.EXAMPLES["captions"]}]
    assert len(used) == 12, "every image has captions in this world"
    assert data.pool is not None
    data.pool.hard = load_hard_pool(path, data.pool, data.store)
    batch = packed(data, share=False)
    caption_of = {tuple(plain_text(e, data, None)): e for e in small.EXAMPLES["captions"]}
    for position, index in enumerate(INDICES):
        own = small.IMAGES.index(small.EXAMPLES["captions"][index].images[0])
        tokens, _, _ = pair(batch, 4 * position + 3)
        hard = small.IMAGES.index(caption_of[tuple(tokens)].images[0])
        assert (hard - own) % 12 in (1, 2)


def test_blind_zeroes_what_is_seen_and_nothing_else(sheet: Path) -> None:
    data = small.load(sheet, "phrases")
    seeing, blind = packed(data), packed(data, blind=True)
    assert not blind.features.any()
    assert torch.equal(seeing.boxes, blind.boxes)
    assert torch.equal(seeing.cu_images, blind.cu_images)
    assert isinstance(seeing.target, RegionTarget)
    assert isinstance(blind.target, RegionTarget)
    assert torch.equal(seeing.target.scores, blind.target.scores)


@pytest.mark.parametrize("name", list(small.SPECS))
def test_equal_arguments_give_equal_batches(sheet: Path, name: str) -> None:
    first, second = (packed(small.load(sheet, name), task_token=4) for _ in range(2))
    assert_equal(first, second)


def assert_equal(first: Any, second: Any) -> None:
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype, field.name
            assert torch.equal(a, b), field.name
        elif dataclasses.is_dataclass(a):
            assert_equal(a, b)
        else:
            assert a == b, field.name


def test_bfloat16_features_are_the_rounded_ones(sheet: Path) -> None:
    data = small.load(sheet, "answers")
    assert torch.equal(packed(data, dtype=torch.bfloat16).features, packed(data).features.to(torch.bfloat16))


def test_a_split_without_answers_has_no_target(sheet: Path) -> None:
    small.EXAMPLES["hidden"] = [dataclasses.replace(e, target=None) for e in small.EXAMPLES["answers"]]
    sheet.write_text(sheet.read_text().replace("examples: answers", "examples: hidden"))
    try:
        assert packed(small.load(sheet, "answers")).target is None
    finally:
        sheet.write_text(sheet.read_text().replace("examples: hidden", "examples: answers"))
