"""Shape buckets: batches padded a little, so that few shapes occur and a CUDA graph of each can be used again.

A batch gets one dummy example at its end, wired to dummy texts and images whose rows fill both streams up to a grid. The
dummies belong to nobody: real rows attend to real rows only, their random draws depend on their own keys, and the losses
leave the dummy example out. So losses, scores, masks and gradients of the real examples are those of the unpadded batch;
only products over all rows may round differently.

Everything is computed from host integers, where the batch is made. What remains of a batch's shape is its `Bucket`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import ragged
from pipelines.batch import (
    Batch,
    BatchTarget,
    ChoiceTarget,
    ClassTarget,
    MaskedTarget,
    OptionTarget,
    RegionTarget,
    SoftLabelTarget,
)

LEAST_TEXT, LEAST_IMAGE = 2, 1
"""Rows of the shortest dummy: [CLS] and the task token; the global row."""

LONGEST_STEP = 64
"""`max_text` and `max_image` are rounded up to this, the row tile of the attention kernels."""


@dataclass(frozen=True)
class Grid:
    """How finely rows are rounded up. A step is about 1/40 of a batch's rows, so that both streams' steps make 5 %."""

    text_step: int = 48
    """Largest step of text rows. A dummy text has at most one row more: it must fit the model's positions, and the
    attention kernels have a form of their own for texts of up to 64 rows."""
    image_step: int = 128
    """Largest step of region rows."""

    @classmethod
    def fitting(cls, positions: int) -> Grid:
        """For a model with so many text positions."""
        return cls(text_step=min(cls.text_step, positions - LEAST_TEXT + 1))

    def steps(self, rows: int) -> tuple[int, int]:
        """(step of text rows, step of region rows) for a batch of so many rows in both streams together."""
        step = _power_of_two(rows // 40)
        return min(step, self.text_step), min(step, self.image_step)


@dataclass(frozen=True)
class Stream:
    """All that shapes depend on in one stream, as host integers."""

    items: int
    rows: int
    pair_rows: int
    """Rows summed over pairs."""
    longest: int
    """Upper bound of an item's rows."""


@dataclass(frozen=True)
class Bucket:
    """All that shapes depend on in a padded batch. Two batches of one task and bucket have equal shapes everywhere."""

    examples: int
    pairs: int
    text: Stream
    image: Stream
    entries: int
    """Soft labels or choices of all examples; 0 for other targets."""


@dataclass(frozen=True)
class Dummies:
    """The dummy items of one stream."""

    lengths: tuple[int, ...]
    of_pairs: tuple[int, ...]
    """[k]: which of them each pair of the dummy example uses."""

    def pad(self, stream: Stream) -> Stream:
        """The stream with these at its end."""
        pair_rows = sum(self.lengths[item] for item in self.of_pairs)
        longest = max(stream.longest, *self.lengths)
        return Stream(
            stream.items + len(self.lengths), stream.rows + sum(self.lengths), stream.pair_rows + pair_rows,
            _up(longest, LONGEST_STEP),
        )  # fmt: skip


def bucket_of(batch: Batch) -> Bucket:
    """What shapes depend on in this batch, padded or not."""
    text = Stream(batch.n_texts, batch.token_ids.numel(), batch.pair_text_rows, batch.max_text)
    image = Stream(batch.n_images, batch.boxes.shape[0], batch.pair_image_rows, batch.max_image)
    return Bucket(batch.examples, batch.n_pairs, text, image, _entries(batch.target))


def dummies(stream: Stream, pairs: int, k: int, uses: int | None, step: int, least: int) -> Dummies:
    """The dummy items that bring a stream's rows, and its rows over pairs, to multiples of `step`.

    The batch has `pairs` pairs, `k` to an example. `uses`: each item serves so many consecutive pairs, and the dummies are
    like that too; None: items are shared in another way. Then the first dummy pair has a dummy of its own, which fills the
    rows over pairs; the other pairs share one; and one that no pair uses fills the rows.
    """
    if uses is not None:
        others = k // uses - 1
        filling = _fill(stream.rows + others * least, step, least)
        return Dummies((filling, *[least] * others), tuple(pair // uses for pair in range(k)))
    shared = [least] if k > 1 else []
    own = _fill(stream.pair_rows + (k - 1) * least, step, least)
    # As many items as pairs would mean that pair p has item p.
    more = [least] if stream.items + len(shared) + 2 == pairs + k else []
    unused = _fill(stream.rows + own + sum(shared) + sum(more), step, least)
    return Dummies((own, *shared, *more, unused), (0, *[1] * (k - 1)))


def pad(batch: Batch, grid: Grid | None = None) -> Batch:
    """A copy of the batch with a dummy example at its end.

    A tensor on the device `meta` gains rows there. ValueError for a batch that is padded already, or whose examples differ
    in their number of pairs.
    """
    k, rest = divmod(batch.n_pairs, batch.examples)
    if batch.padding or rest:
        raise ValueError(f"{batch.task}: {batch.n_pairs} pairs of {batch.examples} examples cannot be padded")
    before = bucket_of(batch)
    text_step, image_step = (grid or Grid()).steps(before.text.rows + before.image.rows)
    texts = dummies(before.text, before.pairs, k, _uses(batch.pair_text, before.text.items), text_step, LEAST_TEXT)
    images = dummies(
        before.image, before.pairs, k, _uses(batch.pair_image, before.image.items), image_step, LEAST_IMAGE
    )
    text, image = texts.pad(before.text), images.pad(before.image)

    pieces = {
        "token_ids": [batch.token_ids, _dummy_tokens(texts, batch.task_token)],
        "cu_texts": [batch.cu_texts, _ends(before.text.rows, texts.lengths, torch.int32)],
        "features": [batch.features, _zeros(batch.features, image.rows - before.image.rows)],
        "boxes": [batch.boxes, _zeros(batch.boxes, image.rows - before.image.rows)],
        "cu_images": [batch.cu_images, _ends(before.image.rows, images.lengths, torch.int32)],
        "pair_text": [batch.pair_text, torch.tensor(texts.of_pairs) + before.text.items],
        "pair_image": [batch.pair_image, torch.tensor(images.of_pairs) + before.image.items],
        "text_key": [batch.text_key, _zeros(batch.text_key, len(texts.lengths))],
        "image_key": [batch.image_key, _zeros(batch.image_key, len(images.lengths))],
    }
    target = _pad_target(batch.target, [images.lengths[item] for item in images.of_pairs])
    joined: dict[str, Any] = {name: torch.cat(parts) for name, parts in pieces.items()}
    new_target = {name: torch.cat(parts) for name, parts in target.items()}
    return replace(
        batch,
        **joined,
        target=None if batch.target is None else type(batch.target)(**new_target),
        max_text=text.longest,
        max_image=image.longest,
        pair_text_rows=text.pair_rows,
        pair_image_rows=image.pair_rows,
        padding=text.pair_rows - before.text.pair_rows + image.pair_rows - before.image.pair_rows,
        slab=None,
    )


def padded_entries(n: int) -> int:
    """Soft labels or choices, rounded up to a power of two: they cost next to nothing."""
    return 1 << (n - 1).bit_length()


def _entries(target: BatchTarget | None) -> int:
    return target.scores.numel() if isinstance(target, SoftLabelTarget | ChoiceTarget) else 0


def _uses(pair_item: Tensor, items: int) -> int | None:
    """How many consecutive pairs each item serves, where all serve equally many, in their order; else None."""
    uses, rest = divmod(pair_item.numel(), items)
    regular = not rest and np.array_equal(pair_item.numpy(), np.arange(pair_item.numel()) // max(uses, 1))
    return uses if regular else None


def _pad_target(target: BatchTarget | None, dummy_regions: list[int]) -> dict[str, list[Tensor]]:
    """The pieces of each tensor of the padded target. `dummy_regions` [k]: region rows of each dummy pair."""
    match target:
        case SoftLabelTarget():
            return {name: [x] for name, x in vars(_spread(target)).items()}
        case RegionTarget(cu_regions, scores):
            ends = _ends(scores.numel(), dummy_regions, torch.int32)
            return {"cu_regions": [cu_regions, ends], "scores": [scores, _zeros(scores, sum(dummy_regions))]}
        case ChoiceTarget(offsets, rows, scores):
            n = padded_entries(scores.numel() + 1)
            more, ends = n - scores.numel(), torch.full((len(dummy_regions),), n)
            return {
                "offsets": [offsets, ends],
                "rows": [rows, _zeros(rows, more)],
                "scores": [scores, _zeros(scores, more)],
            }
        case OptionTarget(index) | ClassTarget(index):
            return {"index": [index]}
        case MaskedTarget():
            raise ValueError("what pretraining hides differs in number from batch to batch: it has no buckets")
        case None:
            return {}


def _spread(target: SoftLabelTarget) -> SoftLabelTarget:
    """Padded with labels of score 0, which add nothing to a loss or a score; all examples get about equally many, as a kernel
    that has one program an example would wait for the one that had all."""
    examples, n = target.offsets.numel() - 1, target.scores.numel()
    more = padded_entries(max(n, 1)) - n
    shift = torch.arange(examples + 1) * more // examples
    place = torch.arange(n) + shift[:-1].repeat_interleave(target.offsets.diff())
    labels, scores = (x.new_zeros(n + more).index_copy_(0, place, x) for x in (target.labels, target.scores))
    return SoftLabelTarget(target.offsets + shift, labels, scores)


def _dummy_tokens(texts: Dummies, task_token: int | None) -> Tensor:
    """int64 [sum of lengths]: the first word of the vocabulary, and the task token where the model looks for it."""
    tokens = torch.zeros(sum(texts.lengths), dtype=torch.int64)
    if task_token is not None:
        starts = ragged.offsets_of(texts.lengths)[:-1]
        tokens[torch.from_numpy(starts + 1)] = task_token
    return tokens


def _ends(rows: int, lengths: list[int] | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Where items of these lengths end that stand after `rows` others."""
    ends: NDArray[np.int64] = rows + np.cumsum(lengths)
    return torch.from_numpy(ends).to(dtype)


def _zeros(like: Tensor, rows: int) -> Tensor:
    return like.new_zeros((rows, *like.shape[1:]))


def _fill(rows: int, step: int, least: int) -> int:
    """The smallest number from `least` on that brings `rows` to a multiple of `step`."""
    return least + -(rows + least) % step


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _power_of_two(n: int) -> int:
    """The largest up to n, at least 1."""
    return 1 << max(n, 1).bit_length() - 1
