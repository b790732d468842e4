"""Synthetic samples with real lengths, and the same samples in two forms: packed for the engine, padded for its peers.

What the numbers say does not matter to a step's time; how many rows there are does. So lengths are drawn from
`bench/lengths.json`, everything else at random from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from bench.lengths import DETECTED, TaskLengths
from bench.peers.losses import FIRST_CHOICE_ROW, PaddedBatch, one_hot
from bench.peers.model import PaddedInputs
from engine.model.config import ModelConfig
from engine.model.heads import HeadSpec
from engine.model.published import PUBLISHED_HEADS
from engine.tasks import TaskRow
from pipelines.batch import (
    Batch,
    BatchTarget,
    ChoiceTarget,
    ClassTarget,
    OptionTarget,
    RegionTarget,
    SoftLabelTarget,
)

CLS, SEP, FIRST_WORD = 101, 102, 103

_RETRIEVAL_TEXTS, _RETRIEVAL_IMAGES = (0, 1, 0, 2), (0, 0, 1, 0)
"""A sample's four pairs, out of its three captions and two images (spec section 3.2)."""


@dataclass(frozen=True)
class Answer:
    """What one sample asks for: places and their scores. Places are labels, region rows, options' rows or one class."""

    places: Tensor  # int64 [n]
    scores: Tensor  # float32 [n]


@dataclass
class Samples:
    """The samples of one batch, ragged: nothing is padded, shared or copied yet."""

    row: TaskRow
    head: HeadSpec
    options: int | None = None
    """How many of an image's annotated boxes a sample chooses from; None: all."""
    texts: list[Tensor] = field(default_factory=list)
    """int64 [length] each, [CLS] and [SEP] included, the task token not."""
    features: list[Tensor] = field(default_factory=list)
    """float32 [regions, F] each, row 0 the mean of the detected ones."""
    boxes: list[Tensor] = field(default_factory=list)
    """float32 [regions, 5] each."""
    pair_text: list[int] = field(default_factory=list)
    pair_image: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    @property
    def real_rows(self) -> int:
        """Text and region rows of all pairs, task tokens included: the rows that a step cannot do without."""
        texts = sum(len(self.texts[i]) + 1 for i in self.pair_text)
        return texts + sum(len(self.boxes[i]) for i in self.pair_image)


def draw(row: TaskRow, lengths: TaskLengths, config: ModelConfig, batch: int, seed: tuple[int, int]) -> Samples:
    """`batch` samples of a task; a pure function of the arguments. `seed`: of the run, and the batch's number."""
    samples = Samples(row, PUBLISHED_HEADS[row.head], options=lengths.options)
    random = np.random.default_rng((*seed, row.number))
    generator = torch.Generator().manual_seed(int(random.integers(2**62)))
    texts, images = _items(row)
    text_rows = iter(lengths.texts.draw(random, batch * (max(texts) + 1)).tolist())
    region_rows = iter(lengths.draw_regions(random, batch * (max(images) + 1)).tolist())
    for _ in range(batch):
        samples.pair_text += [len(samples.texts) + i for i in texts]
        samples.pair_image += [len(samples.features) + i for i in images]
        samples.texts += [random_text(next(text_rows) - 1, config.vocab_size, generator) for _ in range(max(texts) + 1)]
        for _ in range(max(images) + 1):
            features, boxes = random_image(next(region_rows), config.v_feature_size, generator)
            samples.features.append(features)
            samples.boxes.append(boxes)
        samples.answers.append(_answer(samples, random))
    return samples


def _items(row: TaskRow) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(text, image) of each pair of a sample, numbered within the sample by first appearance."""
    if row.loss == "options":
        return _RETRIEVAL_TEXTS, _RETRIEVAL_IMAGES
    return (0,) * row.images, tuple(range(row.images))


def random_text(length: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """int64 [length], the ends included."""
    words = torch.randint(FIRST_WORD, vocabulary, (length - 2,), generator=generator)
    return torch.cat((torch.tensor([CLS]), words, torch.tensor([SEP])))


def random_image(rows: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Features like a detector's (not negative, half of them zero), boxes in the unit square."""
    features = torch.randn(rows, width, generator=generator).relu_()
    features[0] = features[1 : 1 + DETECTED].mean(0)
    corners = torch.rand(rows, 2, 2, generator=generator).sort(1).values  # [rows, (lower, upper), (x, y)]
    area = (corners[:, 1] - corners[:, 0]).prod(1, keepdim=True)
    boxes = torch.cat((corners.view(rows, 4), area), 1)
    boxes[0] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    return features, boxes


def _answer(samples: Samples, random: np.random.Generator) -> Answer:
    """A target for the sample drawn last, like the real ones: few soft labels, few overlapping regions, one right option."""
    places, scores = np.zeros(1, np.int64), np.ones(1)
    match samples.row.loss:
        case "soft_labels":
            places = random.choice(samples.head.outputs, random.integers(1, 6), replace=False)
            scores = random.choice([0.3, 0.6, 0.9, 1.0], len(places))
        case "regions":
            places = random.choice(len(samples.boxes[-1]), 5, replace=False)
            scores = random.uniform(0.5, 1.0, len(places))
        case "choices":
            places = np.arange(1 + DETECTED, len(samples.boxes[-1]))
            if samples.options is not None:
                places = np.sort(random.choice(places, samples.options, replace=False))
            scores = (np.arange(len(places)) == random.integers(len(places))).astype(np.float64)
        case "classes":
            places = random.integers(samples.head.outputs, size=1)
        case "options":
            pass  # the match stands first
    return Answer(torch.as_tensor(places, dtype=torch.int64), torch.as_tensor(scores, dtype=torch.float32))


def pack(samples: Samples, dtype: torch.dtype = torch.float32) -> Batch:
    """The samples as the pipelines hand them to the engine: rows one after the other, items once, features in `dtype`."""
    token = torch.tensor([samples.row.number])
    texts = [torch.cat((text[:1], token, text[1:])) for text in samples.texts]
    return Batch(
        task=samples.row.name,
        examples=len(samples.answers),
        task_token=samples.row.number,
        token_ids=torch.cat(texts),
        cu_texts=_cumulative(texts).int(),
        features=torch.cat(samples.features).to(dtype),
        boxes=torch.cat(samples.boxes),
        cu_images=_cumulative(samples.boxes).int(),
        pair_text=torch.tensor(samples.pair_text),
        pair_image=torch.tensor(samples.pair_image),
        text_key=torch.arange(len(texts)),
        image_key=torch.arange(len(samples.boxes)) + len(texts),
        target=_packed_target(samples),
        max_text=max(map(len, texts)),
        max_image=max(map(len, samples.boxes)),
    )


def _packed_target(samples: Samples) -> BatchTarget:
    answers = samples.answers
    places, scores = torch.cat([a.places for a in answers]), torch.cat([a.scores for a in answers])
    offsets = _cumulative([a.places for a in answers])
    match samples.row.loss:
        case "soft_labels":
            return SoftLabelTarget(offsets, places, scores)
        case "options":
            return OptionTarget(places)
        case "regions":
            images = [samples.boxes[i] for i in samples.pair_image]
            return RegionTarget(_cumulative(images).int(), torch.cat(_region_scores(samples)))
        case "choices":
            return ChoiceTarget(offsets, places, scores)
        case "classes":
            return ClassTarget(places)
        case "masked":
            raise ValueError("the benchmarks' samples are of the twelve tasks")


def _region_scores(samples: Samples) -> list[Tensor]:
    """A score per region row of each sample's image."""
    pairs = zip(samples.pair_image, samples.answers, strict=True)
    return [torch.zeros(len(samples.boxes[i])).index_copy(0, a.places, a.scores) for i, a in pairs]


def pad(samples: Samples) -> PaddedBatch:
    """The same samples as the published loaders lay them out: a row per pair, padded to the task's lengths."""
    row = samples.row
    texts = [samples.texts[i] for i in samples.pair_text]
    images = [samples.boxes[i] for i in samples.pair_image]
    inputs = PaddedInputs(
        input_ids=_padded(texts, row.max_tokens),
        input_mask=_padded([torch.ones_like(text) for text in texts], row.max_tokens),
        features=_padded([samples.features[i] for i in samples.pair_image], row.max_regions),
        locations=_padded(images, row.max_regions),
        image_mask=_padded([torch.ones(len(boxes), dtype=torch.int64) for boxes in images], row.max_regions),
        task_token=row.number,
    )
    target, choice_index = _padded_target(samples)
    return PaddedBatch(inputs, len(samples.answers), row.head, row.loss, target, choice_index)


def _padded_target(samples: Samples) -> tuple[Tensor, Tensor | None]:
    """(dense target, choice index) as `PaddedBatch` has them."""
    answers, row = samples.answers, samples.row
    match row.loss:
        case "soft_labels":
            dense = torch.zeros(len(answers), samples.head.outputs)
            return torch.stack(
                [line.index_copy(0, a.places, a.scores) for line, a in zip(dense, answers, strict=True)]
            ), None
        case "options":
            return torch.cat([a.places for a in answers]), None
        case "regions":
            return _padded(_region_scores(samples), row.max_regions)[..., None], None
        case "choices":
            unused = row.max_regions - FIRST_CHOICE_ROW - 1  # the last row, which is padding
            slots = unused if samples.options is None else samples.options
            index = _padded([a.places - FIRST_CHOICE_ROW for a in answers], slots, fill=unused)
            return _padded([a.scores for a in answers], slots)[..., None], index
        case "classes":
            return one_hot(torch.cat([a.places for a in answers]), samples.head.outputs), None
        case "masked":
            raise ValueError("the benchmarks' samples are of the twelve tasks")


def _padded(items: list[Tensor], length: int, fill: int = 0) -> Tensor:
    """[n, length, …]: items [m, …] with `fill` after their end."""
    result = items[0].new_full((len(items), length, *items[0].shape[1:]), fill)
    for line, item in zip(result, items, strict=True):
        line[: len(item)] = item
    return result


def _cumulative(items: Sequence[Tensor]) -> Tensor:
    """int64 [n + 1]: where each item begins when they stand one after the other."""
    return torch.tensor([0, *accumulate(map(len, items))])


def padded_row_share(rows: int, real: int) -> float:
    """Share of a batch's rows (text and regions, over all pairs) that are padding."""
    return (rows - real) / rows


def packed_rows(batch: Batch) -> int:
    """Text and region rows of all pairs, as the engine runs them."""
    return batch.pair_text_rows + batch.pair_image_rows


def padded_rows(batch: PaddedBatch) -> int:
    """Text and region rows of all pairs in the published layout, task tokens included."""
    texts, regions = batch.inputs.input_ids, batch.inputs.image_mask
    return texts.numel() + len(texts) + regions.numel()
