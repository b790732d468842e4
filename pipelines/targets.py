"""What the examples of a data set ask for, as columns: built once at load, gathered for each batch.

One class per kind of target. Each holds all examples of a split in a few flat arrays, so that millions of examples
cost no Python objects, and packs the chosen ones into the tensors of `pipelines.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import ragged
from pipelines.batch import ChoiceTarget, ClassTarget, RegionTarget, SoftLabelTarget
from pipelines.boxes import Float32, paired_iou
from pipelines.examples import Choice, Label, Matching, Region, SoftAnswers

Indices = NDArray[np.int64]

EXAMPLE_TARGETS = {
    "soft_labels": SoftAnswers,
    "options": Matching,
    "regions": Region,
    "choices": Choice,
    "classes": Label,
    "masked": Matching,
}
"""The target that a task's reader must give, by the target kind in `DataSpec.target`."""

POSITIVE_IOU = 0.5
"""An overlap below this is no match: 0 in the training target (spec section 2)."""


class AnswerVocabulary(Protocol):
    """What soft labels need of an answer vocabulary; `pipelines.answers.Answers` is one."""

    def __len__(self) -> int: ...

    def label(self, answer: str | int) -> int | None: ...


@dataclass(frozen=True)
class SoftLabels:
    """Sparse answers with scores."""

    offsets: ragged.Offsets  # int64 [n + 1]
    labels: NDArray[np.int32]
    scores: Float32

    @classmethod
    def of(cls, targets: Sequence[SoftAnswers], answers: AnswerVocabulary) -> SoftLabels:
        """Answers become labels; those outside the vocabulary are dropped. Raises BadInput as `answers.label` does."""
        labels: list[int] = []
        scores: list[float] = []
        lengths = []
        for target in targets:
            before = len(labels)
            for answer, score in zip(target.answers, target.scores, strict=True):
                label = answers.label(answer)
                if label is not None:
                    labels.append(label)
                    scores.append(score)
            lengths.append(len(labels) - before)
        return cls(ragged.offsets_of(lengths), np.array(labels, np.int32), np.array(scores, np.float32))

    def pack(self, indices: Indices) -> SoftLabelTarget:
        flat, offsets = ragged.take(self.offsets, indices)
        labels = torch.from_numpy(self.labels[flat].astype(np.int64))
        return SoftLabelTarget(torch.from_numpy(offsets), labels, torch.from_numpy(self.scores[flat]))


@dataclass(frozen=True)
class TrueBoxes:
    """The boxes that a text refers to, in pixels."""

    offsets: ragged.Offsets  # int64 [n + 1]
    boxes: Float32  # [sum, 4]

    @classmethod
    def of(cls, targets: Sequence[Region]) -> TrueBoxes:
        flat = [box for target in targets for box in target.boxes]
        return cls(
            ragged.offsets_of([len(target.boxes) for target in targets]), np.array(flat, np.float32).reshape(-1, 4)
        )

    def pack(self, indices: Indices, cu_regions: ragged.Offsets, boxes: Float32, training: bool) -> RegionTarget:
        """`boxes` [cu_regions[-1], 4]: the pixel boxes of each pair's region rows, the whole image first."""
        lengths = np.diff(cu_regions)
        starts = self.offsets[indices]
        counts = self.offsets[indices + 1] - starts
        best = np.zeros(len(boxes), np.float32)
        for turn in range(int(counts.max(initial=0))):  # nearly always once: only a plural phrase has several boxes
            has = counts > turn
            rows = np.repeat(has, lengths)
            true_boxes = np.repeat(self.boxes[starts[has] + turn], lengths[has], axis=0)
            best[rows] = np.maximum(best[rows], paired_iou(boxes[rows], true_boxes))
        if training:
            best[best < POSITIVE_IOU] = 0
        return RegionTarget(torch.from_numpy(cu_regions.astype(np.int32)), torch.from_numpy(best))


@dataclass(frozen=True)
class Choices:
    """Which annotated boxes are options, and how far each overlaps the answer."""

    offsets: ragged.Offsets  # int64 [n + 1]
    candidates: NDArray[np.int32]  # row among the image's annotated boxes
    scores: Float32

    @classmethod
    def of(cls, targets: Sequence[Choice]) -> Choices:
        """Scores are the IoU with the answer's box, 0 below one half, in every split (spec section 2)."""
        boxes = np.array([target.candidates[choice] for target in targets for choice in target.choices], np.float32)
        answers = np.array([target.candidates[target.choices[target.answer]] for target in targets], np.float32)
        lengths = [len(target.choices) for target in targets]
        scores = paired_iou(boxes.reshape(-1, 4), np.repeat(answers.reshape(-1, 4), lengths, axis=0))
        scores[scores < POSITIVE_IOU] = 0
        choices = np.array([choice for target in targets for choice in target.choices], np.int32)
        return cls(ragged.offsets_of(lengths), choices, scores)

    def pack(self, indices: Indices, first_candidate: NDArray[np.int64]) -> ChoiceTarget:
        """`first_candidate` [B]: the row of the first annotated box in each example's image."""
        flat, offsets = ragged.take(self.offsets, indices)
        rows = self.candidates[flat] + np.repeat(first_candidate, np.diff(offsets))
        return ChoiceTarget(torch.from_numpy(offsets), torch.from_numpy(rows), torch.from_numpy(self.scores[flat]))


@dataclass(frozen=True)
class Classes:
    """One class per example, -1 for none."""

    index: NDArray[np.int32]

    @classmethod
    def of(cls, targets: Sequence[Label]) -> Classes:
        return cls(np.array([target.index for target in targets], np.int32))

    def pack(self, indices: Indices) -> ClassTarget:
        return ClassTarget(torch.from_numpy(self.index[indices].astype(np.int64)))


TargetColumns = SoftLabels | TrueBoxes | Choices | Classes


def concatenate(parts: Sequence[TargetColumns]) -> TargetColumns:
    """The columns of several runs of examples as one. All parts are of one class."""
    kind = type(parts[0])
    joined: dict[str, Any] = {}
    for field in fields(kind):
        columns = [getattr(part, field.name) for part in parts]
        joined[field.name] = ragged.join(columns) if field.name == "offsets" else np.concatenate(columns)
    return kind(**joined)
