"""What one gets without looking: the majority answer, or blind chance where there is no majority to speak of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from engine.losses import ACCEPTED_IOU
from pipelines.batch import Batch, ChoiceTarget, OptionTarget, RegionTarget
from pipelines.datasets import TaskData
from pipelines.targets import Classes, SoftLabels


def majority(train: TaskData, val: TaskData, val_batches: Iterable[Batch]) -> float:
    """Mean validation score of the one answer (or class) that scores best on the training split.

    Retrieval, regions and choices have no constant answer; there it is the score of a uniformly random pick.
    """
    if isinstance(train.target, SoftLabels) and isinstance(val.target, SoftLabels):
        classes = int(max(train.target.labels.max(initial=0), val.target.labels.max(initial=0))) + 1
        best = np.bincount(train.target.labels, train.target.scores, classes).argmax()
        return float(val.target.scores[val.target.labels == best].sum() / len(val))
    if isinstance(train.target, Classes) and isinstance(val.target, Classes):
        known = train.target.index[train.target.index >= 0]
        return float((val.target.index == np.bincount(known).argmax()).mean())
    return _chance(val_batches)


def _chance(batches: Iterable[Batch]) -> float:
    expected = [_expected_score(batch) for batch in batches]
    return float(torch.cat(expected).mean())


def _expected_score(batch: Batch) -> torch.Tensor:
    """float64 [B]: share of an example's options that are right."""
    target = batch.target
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
