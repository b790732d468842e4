"""Scoring a model on a split: the exact mean over all examples, in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from engine.losses import outcome
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from pipelines.batch import Batch


class Interrupted(Exception):
    """A stop was asked for in the middle of a validation; nothing was decided."""


@dataclass(frozen=True)
class Validated:
    """Means over a split's examples. Batches count by their examples, so a mean within a batch may weigh some more."""

    score: float
    """In [0, 1], exact."""
    loss: float
    parts: tuple[float, ...]
    """Of a loss that is a sum."""


@torch.inference_mode()
def validate(
    model: ViLBERT,
    batches: Iterable[Batch],
    head: str,
    device: torch.device,
    share: bool = True,
    stop_asked: Callable[[], bool] = lambda: False,
) -> Validated:
    """Scores and losses in evaluation mode. Sums in float64 on the host, so batch sizes do not matter to the score.

    Raises `Interrupted` between two batches once `stop_asked()`; ValueError for no batch at all.
    """
    total, losses, examples = 0.0, torch.zeros(0, dtype=torch.float64), 0
    for batch in batches:
        if stop_asked():
            raise Interrupted
        batch = batch.to(device)
        found = outcome(model, batch, head, Randomness(), share)
        total += float(found.score.double().sum())
        of_batch = torch.stack((found.loss, *found.parts)).double().cpu() * batch.examples
        losses = of_batch if not examples else losses + of_batch
        examples += batch.examples
    if not examples:
        raise ValueError("no example to validate on")
    loss, *parts = (losses / examples).tolist()
    return Validated(total / examples, loss, tuple(parts))
