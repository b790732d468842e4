"""`Batch`: what the pipelines hand to the engine. Packed rows, unique items, pairs by index, sparse targets.

Shape letters: T text rows of all texts, R region rows of all images, P pairs, B examples, F feature width.
Texts stand one after the other in `token_ids`, images in `features`. There is no padded row, but for those of the dummy
example that `pipelines.buckets` puts at the end of a batch whose shapes must repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class SoftLabelTarget:
    """Sparse soft labels: example b owns entries `offsets[b]:offsets[b+1]` of `labels` and `scores`."""

    offsets: Tensor  # int64 [B + 1]
    labels: Tensor  # int64 [n]
    scores: Tensor  # float32 [n]


@dataclass(frozen=True)
class OptionTarget:
    """Which of an example's consecutive pairs matches: P = B * options."""

    index: Tensor  # int64 [B]


@dataclass(frozen=True)
class RegionTarget:
    """A score per region row of each pair (IoU with the true box; row 0, the whole image, included).

    `scores` follows the pairs: pair p owns `cu_regions[p]:cu_regions[p+1]`, in the row order of its image.
    In training, IoU below 0.5 is 0 already; in evaluation it is not thresholded (spec section 2).
    """

    cu_regions: Tensor  # int32 [P + 1]
    scores: Tensor  # float32 [sum of regions over pairs]


@dataclass(frozen=True)
class ChoiceTarget:
    """Some region rows of each pair are options: pair p owns `offsets[p]:offsets[p+1]` of `rows` and `scores`."""

    offsets: Tensor  # int64 [P + 1]
    rows: Tensor  # int64 [n], row within the pair's image (0 = global row)
    scores: Tensor  # float32 [n]


@dataclass(frozen=True)
class ClassTarget:
    """One class per example; -1 means none (an all-zero target)."""

    index: Tensor  # int64 [B]


@dataclass(frozen=True)
class MaskedTarget:
    """Pretraining: what was hidden, by packed row, of captions that belong to their image. Every pair has its own text and
    image."""

    word_rows: Tensor  # int64 [m], rows of the packed texts
    word_labels: Tensor  # int64 [m]
    region_rows: Tensor  # int64 [k], rows of the packed images
    region_target: Tensor  # float32 [k, classes], the detector's distribution
    unmatched: Tensor  # int64 [P], 1 = the caption is of another image


BatchTarget = SoftLabelTarget | OptionTarget | RegionTarget | ChoiceTarget | ClassTarget | MaskedTarget


@dataclass(frozen=True)
class Batch:
    """One task's batch. Every tensor lives on one device; integers are as stated, floats float32 or bfloat16."""

    task: str
    examples: int
    """B: samples in the sense of the data set (an NLVR2 statement, a retrieval caption)."""
    task_token: int | None
    """Row of the published task-token table, or None. If set, row 1 of every text is the task token."""
    token_ids: Tensor
    """int64 [T]: WordPiece ids; where there is a task token, row 1 of each text holds `task_token`, not a word."""
    cu_texts: Tensor
    """int32 [n_texts + 1]: cumulative text lengths, task rows included."""
    features: Tensor
    """[R, F]: row 0 of an image is its global row (mean of the detector's rows), appended boxes come last."""
    boxes: Tensor
    """float32 [R, 5]: x1/w, y1/h, x2/w, y2/h, area fraction; the global row is 0, 0, 1, 1, 1."""
    cu_images: Tensor
    """int32 [n_images + 1]."""
    pair_text: Tensor
    """int64 [P]: one pair = one (text, image) row of the published model. Texts and images are numbered by their first
    appearance among the pairs, so as many texts as pairs means pair p has text p."""
    pair_image: Tensor
    """int64 [P]."""
    text_key: Tensor
    """int64 [n_texts], values in [0, 2**32): who this text is, for counter-based random draws."""
    image_key: Tensor
    """int64 [n_images], likewise."""
    target: BatchTarget | None
    max_text: int
    """Longest text of the batch in rows, known on the host so that no kernel has to ask the device."""
    max_image: int
    example_ids: tuple[str, ...] = ()
    """[B], for result files."""
    pair_text_rows: int = -1
    """Text rows summed over pairs, counted here where the batch is made, on the host."""
    pair_image_rows: int = -1
    """Region rows summed over pairs, likewise."""
    padding: int = 0
    """Of these text and region rows, how many are of the dummy example that stands at the end; 0: there is none. `examples`
    does not count it, nor do `example_ids`, soft labels, options and classes; `cu_regions` and the `offsets` of choices do."""
    shares: tuple[float, ...] = (1.0,)
    """Where a step's batch is divided (`pipelines.division`): what share of the divisor of the loss, or of each of its parts,
    this part holds. Over all parts they sum to 1."""
    step_examples: int = -1
    """Examples of the step's whole batch."""
    feature_rows: Tensor | None = None
    """int64 [R]: the rows of `resident` that the features are, where they stay on the device; `features` is then [0, F]."""
    slab: Tensor | None = field(default=None, metadata={"stays": True})
    """uint8: the memory that every tensor above is a view of, so that one copy moves them all; None: each has its own."""
    resident: Tensor | None = field(default=None, metadata={"stays": True})
    """[N, F] on the device, shared by all batches (`pipelines.resident`): it does not move with them."""

    def __post_init__(self) -> None:
        if self.pair_text_rows < 0:
            object.__setattr__(self, "pair_text_rows", int(self.cu_texts.diff()[self.pair_text].sum()))
            object.__setattr__(self, "pair_image_rows", int(self.cu_images.diff()[self.pair_image].sum()))
        if self.step_examples < 0:
            object.__setattr__(self, "step_examples", self.examples)

    @property
    def n_texts(self) -> int:
        return self.cu_texts.numel() - 1

    @property
    def n_images(self) -> int:
        return self.cu_images.numel() - 1

    @property
    def n_pairs(self) -> int:
        return self.pair_text.numel()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`: one copy where it has a slab."""
        if self.slab is not None:
            return self.in_slab(self.slab.to(device, non_blocking=True))
        return self.map(lambda x: x.to(device, non_blocking=True))

    def in_slab(self, slab: Tensor) -> Batch:
        """The same batch read from other memory: each tensor is a view of `slab`, at the place that it has in its own."""
        assert self.slab is not None
        return replace(moved(self, self.slab, slab), slab=slab[: self.slab.numel()])

    def with_features(self) -> Batch:
        """The batch with features to compute with: itself, or a copy with those that stay on the device."""
        if self.resident is None:
            return self
        assert self.feature_rows is not None
        return replace(self, features=self.resident.index_select(0, self.feature_rows))

    def tensors(self) -> list[Tensor]:
        """Every tensor of the batch and its target, in the order of `map`; the slab is none of them."""
        return tensors_of(self)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A copy of the batch with all of its tensors changed, without a slab."""
        return changed(self, change, slab=None)


Part = TypeVar("Part")
"""A dataclass of tensors and of other such dataclasses."""


def changed(part: Part, change: Callable[[Tensor], Tensor], **others: object) -> Part:
    """A copy with all tensors changed, in the order of the fields, and `others`: fields that have new values."""
    for name, value in _parts(part):
        others[name] = change(value) if isinstance(value, Tensor) else changed(value, change)
    return replace(part, **others)  # type: ignore[type-var]


def tensors_of(part: object) -> list[Tensor]:
    """All tensors, in the same order."""
    found: list[Tensor] = []
    for _, value in _parts(part):
        found.extend((value,) if isinstance(value, Tensor) else tensors_of(value))
    return found


def _parts(part: Any) -> Iterator[tuple[str, Any]]:
    """The fields that are tensors or have some."""
    for name in _moving(type(part)):  # type: ignore[arg-type]
        value = getattr(part, name)
        if isinstance(value, Tensor) or is_dataclass(value):
            yield name, value


@cache
def _moving(kind: type[Any]) -> tuple[str, ...]:
    """Names of the fields whose tensors change with the others."""
    return tuple(place.name for place in fields(kind) if not place.metadata.get("stays"))


def moved(part: Part, slab: Tensor, other: Tensor) -> Part:
    """A copy whose tensors, views of `slab` before, are views of the same places of `other`."""
    first = slab.storage_offset()

    def move(x: Tensor) -> Tensor:
        start = x.storage_offset() * x.element_size() - first
        return other[start : start + x.nbytes].view(x.dtype).view(x.shape)

    return changed(part, move)
