"""What one gets without looking: the majority answer, or blind chance where there is no majority to speak of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from engine.losses import ACCEPTED_IOU
from pipelines.batch import Batch, ChoiceTarget, ClassTarget, MaskedTarget, OptionTarget, RegionTarget, SoftLabelTarget
from pipelines.datasets import TaskData
from pipelines.targets import Classes, SoftLabels


def majority(train: TaskData, val_batches: Iterable[Batch]) -> float:
    """Mean validation score of the one answer (or class) that scores best on the training split.

    Retrieval, regions and choices have no constant answer; there it is the score of a uniformly random pick.
    """
    best = _best_answer(train)
    expected = [_chance(batch) if best is None else _score_of(best, batch) for batch in val_batches]
    return float(torch.cat(expected).mean())


def _best_answer(train: TaskData) -> int | None:
    if isinstance(train.target, SoftLabels):
        return int(np.bincount(train.target.labels, train.target.scores, minlength=1).argmax())
    if isinstance(train.target, Classes):
        return int(np.bincount(train.target.index[train.target.index >= 0], minlength=1).argmax())
    return None


def _score_of(answer: int, batch: Batch) -> torch.Tensor:
    """float64 [B]: what this answer scores on each example."""
    target = batch.target
    if isinstance(target, ClassTarget):
        return (target.index == answer).double()
    assert isinstance(target, SoftLabelTarget)
    example = torch.arange(batch.examples).repeat_interleave(target.offsets.diff())
    scores = target.scores.double() * (target.labels == answer)
    return torch.zeros(batch.examples, dtype=torch.float64).index_add_(0, example, scores)


def _chance(batch: Batch) -> torch.Tensor:
    """float64 [B]: share of an example's options that are right."""
    target = batch.target
    if isinstance(target, MaskedTarget):
        return torch.full((batch.examples,), 0.5, dtype=torch.float64)  # matched or not
    if isinstance(target, OptionTarget):
        return torch.full((batch.examples,), batch.examples / batch.n_pairs, dtype=torch.float64)
    if isinstance(target, ChoiceTarget):
        return 1.0 / target.offsets.diff().double()
    if isinstance(target, RegionTarget):
        lengths = target.cu_regions.diff().long()
        pair = torch.arange(lengths.numel()).repeat_interleave(lengths)
        found = torch.zeros(lengths.numel(), dtype=torch.float64)
        found.index_add_(0, pair, (target.scores > ACCEPTED_IOU).double())
        return found / lengths
    raise TypeError(f"no chance level for {type(target).__name__}")
