"""A task's split as columns: annotations read, tokenised and tied to the feature stores once, before training.

Nothing here keeps a Python object per example: the twelve tasks together have 4.5 million.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines import ragged
from pipelines.answers import Answers
from pipelines.candidates import tie
from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.negatives import CaptionPool, load_hard_pool
from pipelines.random import image_keys, text_keys
from pipelines.sheet import Sheet
from pipelines.store.reader import FeatureStore
from pipelines.targets import (
    EXAMPLE_TARGETS,
    AnswerVocabulary,
    Choices,
    Classes,
    SoftLabels,
    TargetColumns,
    TrueBoxes,
    concatenate,
)

TargetKind = Literal["soft_labels", "options", "regions", "choices", "classes", "masked"]

CHUNK = 65_536
"""Examples held as Python objects at a time while a split is read."""


class Tokenizer(Protocol):
    """What a data set needs of a tokenizer; `pipelines.wordpiece.WordPiece` is one."""

    def encode_batch(self, texts: Sequence[str], max_tokens: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]: ...


@dataclass(frozen=True)
class DataSpec:
    """What the pipelines need to know of a task."""

    name: str
    reader: str
    """module:function that yields `Example`s."""
    number: int
    """The published task number: part of every random draw's key."""
    max_tokens: int
    """[CLS] and [SEP] included, the task token not."""
    max_regions: int
    """Global row and appended annotated boxes included."""
    images: int
    """Images per example: 1, or 2 (NLVR2)."""
    target: TargetKind
    options: int = 1
    """(image, text) pairs to choose from: 4 for retrieval."""


@dataclass(frozen=True)
class TaskData:
    """One split of one task, n examples."""

    spec: DataSpec
    split: str
    store: FeatureStore
    candidates: FeatureStore | None
    """Features of annotated boxes, where the task appends them."""
    ids: NDArray[np.generic]
    """StringDType [n]."""
    group_names: tuple[str, ...]
    group_codes: NDArray[np.int32]
    """int32 [n]: position in `group_names`."""
    token_ids: NDArray[np.int32]
    token_offsets: ragged.Offsets
    """int64 [n + 1]."""
    image_rows: NDArray[np.int32]
    """int32 [n, images]: rows of `store`."""
    candidate_rows: NDArray[np.int32]
    """int32 [images of the store]: row of `candidates`, -1 where the image has none."""
    image_keys: NDArray[np.int64]
    """int64 [images of the store]: `pipelines.random.image_keys`."""
    target: TargetColumns | None
    """None for retrieval, and where the split publishes no answers."""
    pool: CaptionPool | None
    """Retrieval: where negatives come from."""
    missing_examples: int = 0
    """Examples left out because an image has no features (only with `allow_missing`)."""
    missing_images: tuple[str, ...] = ()
    removed_examples: int = 0
    """Examples left out because some data set tests on their image."""
    removed_images: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def text_keys(self) -> NDArray[np.int64]:
        """int64 [n]: `pipelines.random.text_keys`."""
        return text_keys(self.spec.number, np.arange(len(self)))

    @property
    def stores(self) -> tuple[FeatureStore, ...]:
        """The stores that its batches are read from."""
        return (self.store,) if self.candidates is None else (self.store, self.candidates)

    def detector_counts(self, store_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many detected regions of these images enter a batch: what `max_regions` leaves, int64 [n]."""
        room = self.spec.max_regions - 1 - self.candidate_counts(store_rows)
        return np.minimum(self.store.counts[store_rows].astype(np.int64), room)

    def candidate_counts(self, store_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many annotated boxes are appended to these images, int64 [n]."""
        if self.candidates is None:
            return np.zeros(len(store_rows), np.int64)
        return self.candidates.counts[self.candidate_rows[store_rows]].astype(np.int64)


def load_task(
    spec: DataSpec,
    sheet: Sheet,
    split: str,
    tokenizer: Tokenizer,
    *,
    answers: AnswerVocabulary | None = None,
    allow_missing: bool = False,
    removed: AbstractSet[str] = frozenset(),
    store: FeatureStore | None = None,
) -> TaskData:
    """Read one split of a task.

    `answers` and `store`, of detected regions, default to those that the sheet names. With `allow_missing`, examples
    whose image has no features are left out and counted; otherwise they are refused. Examples that show an image of
    `removed` (keys, see `pipelines.held_out`) are left out and counted: NLVR2's if either of their two images is one.
    Raises BadInput, naming the sheet's key, the file, or the example and its image.
    """
    entry = sheet.entry(spec.name)
    where = f"{sheet.path}: sets.{spec.name}"
    if spec.target == "soft_labels" and answers is None:
        if entry.answers is None:
            raise BadInput(f"{where}.answers", "missing", f"{spec.name} needs an answer vocabulary")
        answers = Answers.load(entry.answers)
    if spec.target == "choices" and entry.candidates is None:
        raise BadInput(f"{where}.candidates", "missing", f"{spec.name} needs the features of its annotated boxes")
    if store is None:
        store = sheet.detected(spec.name, split)
    columns = _Columns(spec, split, f"{where}.{split}", tokenizer, answers, store, removed)
    if entry.candidates is not None and spec.target == "choices":
        columns.candidates = sheet.store(entry.candidates)
        if columns.candidates.feature_dim != columns.store.feature_dim:
            raise BadInput(
                f"{where}.candidates",
                f"features of {columns.candidates.feature_dim} values beside {columns.store.feature_dim}",
                "both stores must come from one detector",
            )
    for examples in _chunks(sheet.examples(spec.name, split, spec.reader)):
        columns.add(examples)
    data = columns.finish(allow_missing)
    if entry.hard_negatives is not None and data.pool is not None and split == "train":
        data.pool.hard = load_hard_pool(entry.hard_negatives, data.pool, data.store)
    return data


def _chunks(examples: Iterator[Example]) -> Iterator[list[Example]]:
    while chunk := list(islice(examples, CHUNK)):
        yield chunk


class _Columns:
    """Collects a split's columns, one chunk of examples after the other."""

    def __init__(
        self,
        spec: DataSpec,
        split: str,
        where: str,
        tokenizer: Tokenizer,
        answers: AnswerVocabulary | None,
        store: FeatureStore,
        removed: AbstractSet[str],
    ) -> None:
        self.spec, self.split, self.where = spec, split, where
        self.tokenizer, self.answers, self.store = tokenizer, answers, store
        self.removed = removed
        self.candidates: FeatureStore | None = None
        self.candidate_rows = np.full(len(store), -1, np.int32)
        self.ids: list[NDArray[np.generic]] = []
        self.group_of: dict[str, int] = {}
        self.group_codes: list[NDArray[np.int32]] = []
        self.token_ids: list[NDArray[np.int32]] = []
        self.token_offsets: list[ragged.Offsets] = []
        self.image_rows: list[NDArray[np.int32]] = []
        self.targets: list[TargetColumns] = []
        self.answered = 0
        self.missing: dict[str, str] = {}  # image -> first example that wants it
        self.missing_examples = 0
        self.removed_images: set[str] = set()
        self.removed_examples = 0

    def add(self, examples: list[Example]) -> None:
        examples = [example for example in examples if self._stays(example) and self._has_features(example)]
        if not examples:
            return
        self._check(examples)
        self.ids.append(np.array([example.id for example in examples], np.dtypes.StringDType()))
        codes = [self.group_of.setdefault(example.group, len(self.group_of)) for example in examples]
        self.group_codes.append(np.array(codes, np.int32))
        ids, offsets = self.tokenizer.encode_batch([example.text for example in examples], self.spec.max_tokens)
        self.token_ids.append(np.asarray(ids, np.int32))
        self.token_offsets.append(np.asarray(offsets, np.int64))
        keys = (image for example in examples for image in example.images)
        self.image_rows.append(self.store.index(keys).astype(np.int32).reshape(-1, self.spec.images))
        self._add_targets(examples)

    def finish(self, allow_missing: bool) -> TaskData:
        if self.missing and not allow_missing:
            image, example = next(iter(self.missing.items()))
            raise BadInput(
                f"{self.where}: example {example}",
                f"no features of image {image!r} in {self.store.path} ({len(self.missing)} images, "
                f"{self.missing_examples} examples in all)",
                "convert or extract the missing images",
            )
        if not self.ids:
            raise self._empty()
        image_rows = np.concatenate(self.image_rows)
        pool = CaptionPool.of(image_rows[:, 0], self.where) if self.spec.target == "options" else None
        return TaskData(
            spec=self.spec,
            split=self.split,
            store=self.store,
            candidates=self.candidates,
            ids=np.concatenate(self.ids),
            group_names=tuple(self.group_of),
            group_codes=np.concatenate(self.group_codes),
            token_ids=np.concatenate(self.token_ids),
            token_offsets=ragged.join(self.token_offsets),
            image_rows=image_rows,
            candidate_rows=self.candidate_rows,
            image_keys=image_keys(self.store.keys()),
            target=self._target(sum(map(len, self.ids))),
            pool=pool,
            missing_examples=self.missing_examples,
            missing_images=tuple(self.missing),
            removed_examples=self.removed_examples,
            removed_images=tuple(sorted(self.removed_images)),
        )

    def _empty(self) -> BadInput:
        if self.removed_examples and not self.missing:
            what = f"all of its {self.removed_examples:,} examples show test images"
            return BadInput(self.where, what, "name annotations of this split; is `source` right?")
        return BadInput(self.where, "no example left" if self.missing else "the annotations hold no example")

    def _stays(self, example: Example) -> bool:
        found = [image for image in example.images if image in self.removed]
        self.removed_images.update(found)
        self.removed_examples += bool(found)
        return not found

    def _has_features(self, example: Example) -> bool:
        absent = [image for image in example.images if image not in self.store]
        for image in absent:
            self.missing.setdefault(image, example.id)
        self.missing_examples += bool(absent)
        return not absent

    def _check(self, examples: list[Example]) -> None:
        wanted = EXAMPLE_TARGETS[self.spec.target]
        for example in examples:
            if len(example.images) != self.spec.images:
                raise BadInput(
                    f"{self.where}: example {example.id}",
                    f"{len(example.images)} images where the task row says {self.spec.images}",
                )
            unanswered = example.target is None and self.spec.target != "choices"  # what to choose from is no secret
            if not unanswered and not isinstance(example.target, wanted):
                raise BadInput(
                    f"{self.where}: reader {self.spec.reader}",
                    f"gives {type(example.target).__name__} where {wanted.__name__} is wanted",
                    f"the task row says loss {self.spec.target}",
                )

    def _add_targets(self, examples: list[Example]) -> None:
        if self.candidates is not None:
            for example in examples:
                image, row = tie(example, self.candidates, self.spec.max_regions, self.where)
                self.candidate_rows[self.store.index([image])] = row
        targets = [example.target for example in examples if example.target is not None]
        self.answered += len(targets)
        if len(targets) == len(examples) and self.spec.target not in ("options", "masked"):
            self.targets.append(self._columns(targets))

    def _columns(self, targets: list[Any]) -> TargetColumns:
        match self.spec.target:
            case "soft_labels":
                assert self.answers is not None  # load_task saw to it
                return SoftLabels.of(targets, self.answers)
            case "regions":
                return TrueBoxes.of(targets)
            case "choices":
                return Choices.of(targets)
            case _:
                return Classes.of(targets)

    def _target(self, examples: int) -> TargetColumns | None:
        if self.answered not in (0, examples):
            raise BadInput(
                self.where,
                f"only {self.answered} of {examples} examples have an answer",
                "split the annotations: all with answers or none",
            )
        target = concatenate(self.targets) if self.targets else None
        if isinstance(target, SoftLabels) and not len(target.labels):
            raise BadInput(
                self.where,
                f"no answer of its {examples} examples is in the vocabulary",
                "name the vocabulary made for these annotations",
            )
        return target
