"""Scoring a model on a split: the exact mean over all examples, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from engine.losses import loss_and_score
from engine.model.vilbert import ViLBERT
from pipelines.batch import Batch


class Interrupted(Exception):
    """A stop was asked for in the middle of a validation; nothing was decided."""


@torch.inference_mode()
def validate(
    model: ViLBERT,
    batches: Iterable[Batch],
    head: str,
    device: torch.device,
    share: bool = True,
    stop_asked: Callable[[], bool] = lambda: False,
) -> float:
    """Mean score in [0, 1] over the batches' examples. Sums in float64 on the host, so batch sizes do not matter.

    Raises `Interrupted` between two batches once `stop_asked()`; ValueError for no batch at all.
    """
    total, examples = 0.0, 0
    for batch in batches:
        if stop_asked():
            raise Interrupted
        batch = batch.to(device)
        _, score = loss_and_score(model(batch, head, share=share), batch)
        total += float(score.double().sum())
        examples += batch.examples
    if not examples:
        raise ValueError("no example to validate on")
    return total / examples
