"""What a model decides for every example of a split: an answer, a region, an option, a class."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.losses import option_logits, ragged_argmax
from engine.tasks import LossKind
from engine.trained import Trained
from pipelines.batch import Batch, ChoiceTarget
from pipelines.datasets import TaskData
from pipelines.errors import BadInput
from pipelines.progress import Show


def decide(trained: Trained, data: TaskData, show: Show) -> NDArray[np.int64]:
    """int64 [n]: the arg-max, the first of equals, of every example in the split's order.

    A label of the vocabulary, a row of the image (0 is the whole), a place among the options, or a class, as the task's loss
    says. Raises BadInput naming task and example for logits that are not finite, and where there is nothing to choose from.
    """
    row = trained.row(data.spec.name)
    if row.loss == "choices" and data.target is None:
        raise BadInput(f"task {row.name}, {data.split}", "its annotations name no boxes to choose from",
                       "evaluate it on a split that does")  # fmt: skip
    decided: list[Tensor] = []
    done = 0
    for batch in trained.batches(data):
        logits = trained.logits(batch)
        if not logits.isfinite().all():
            raise not_finite(trained, data, f"one of the {batch.examples} examples from {batch.example_ids[0]} on")
        decided.append(_DECISIONS[row.loss](logits, batch))
        done += batch.examples
        show(row.title, done, len(data))
    return torch.cat(decided).numpy()


def not_finite(trained: Trained, data: TaskData, examples: str) -> BadInput:
    """What to raise where the model's answer to these examples is no number."""
    what = f"the model of {trained.path} gives {examples} a logit that is not finite"
    return BadInput(f"task {data.spec.name}, {data.split}", what, "its training diverged: take an earlier checkpoint")


def _output(logits: Tensor, batch: Batch) -> Tensor:
    """[B] of [B, outputs]."""
    return logits.argmax(-1)


def _region(logits: Tensor, batch: Batch) -> Tensor:
    """[B] of [region rows], one pair an example."""
    ends = batch.cu_images.diff().long()[batch.pair_image].cumsum(0)
    offsets = torch.cat((ends.new_zeros(1), ends))
    return ragged_argmax(logits, offsets) - offsets[:-1]


def _option(logits: Tensor, batch: Batch) -> Tensor:
    """The same among the rows that are options."""
    target = batch.target
    assert isinstance(target, ChoiceTarget)
    return ragged_argmax(option_logits(logits, target, batch), target.offsets) - target.offsets[:-1]


_DECISIONS: dict[LossKind, Callable[[Tensor, Batch], Tensor]] = {
    "soft_labels": _output,
    "classes": _output,
    "regions": _region,
    "choices": _option,
}
