"""The published losses and training scores on padded tensors (spec section 2), by kind of target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.model import PaddedInputs

FIRST_CHOICE_ROW = 101
"""Region row of the first annotated box, hard-coded in the published loaders and losses."""


@dataclass(frozen=True)
class PaddedBatch:
    """B samples in the published layout: n rows of the model, and the dense target."""

    inputs: PaddedInputs
    samples: int
    head: str
    """Published prefix of the head in use."""
    loss: str
    """Kind of the target, as the task table names it."""
    target: Tensor
    """soft_labels [B, answers]; options int64 [B]; regions [B, R, 1]; choices [B, slots, 1]; classes [B, classes]."""
    choice_index: Tensor | None = None
    """choices: int64 [B, slots], counted from region row 101; unused slots point at a padded row."""

    def loss_and_score(self, logits: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss before any loss scale, mean training score) of a forward's logits."""
        return _KINDS[self.loss](logits[self.head].float(), self)


def _soft_labels(logits: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, batch.target) * batch.target.shape[1]
    return loss, batch.target.gather(1, logits.detach().argmax(1, keepdim=True)).mean()


def _options(logits: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    logits = logits.view(batch.samples, -1)
    return F.cross_entropy(logits, batch.target), (logits.detach().argmax(1) == batch.target).float().mean()


def _regions(logits: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, batch.target) * batch.target.shape[1]
    best = logits.detach().argmax(1, keepdim=True)
    return loss, (batch.target.gather(1, best) > 0.5).float().mean()


def _choices(logits: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    assert batch.choice_index is not None
    chosen = logits[:, FIRST_CHOICE_ROW:].gather(1, batch.choice_index[..., None])
    loss = F.binary_cross_entropy_with_logits(chosen, batch.target) * batch.target.shape[1]
    return loss, (chosen.detach().argmax(1) == batch.target.argmax(1)).float().mean()


def _classes(logits: Tensor, batch: PaddedBatch) -> tuple[Tensor, Tensor]:
    loss = F.binary_cross_entropy_with_logits(logits, batch.target)
    return loss, batch.target.gather(1, logits.detach().argmax(1, keepdim=True)).mean()


_KINDS: dict[str, Callable[[Tensor, PaddedBatch], tuple[Tensor, Tensor]]] = {
    "soft_labels": _soft_labels,
    "options": _options,
    "regions": _regions,
    "choices": _choices,
    "classes": _classes,
}


def one_hot(classes: Tensor, count: int) -> Tensor:
    """float32 [B, count]; class -1 is all zeros."""
    known = (classes >= 0)[:, None]
    return F.one_hot(classes.clamp(min=0), count).to(torch.float32) * known
