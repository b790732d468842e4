"""One task-step of Algorithm 1: forward, loss, backward, guarded update. Nothing in it waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.graphs import Graphs
from engine.losses import outcome
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer
from pipelines.batch import Batch


@dataclass(frozen=True)
class StepResult:
    """Device scalars, float32: loss before the loss scale, mean training score, gradient norm, 1 if nothing changed."""

    loss: Tensor
    score: Tensor
    grad_norm: Tensor
    skipped: Tensor
    parts: Tensor
    """float32 [k]: the parts of a loss that is a sum; empty for others."""


def train_step(
    model: ViLBERT,
    optimizer: Optimizer,
    batch: Batch,
    head: str,
    *,
    loss_scale: float,
    lr_multiplier: float,
    random: Randomness,
    share: bool = True,
    graphs: Graphs | None = None,
) -> StepResult:
    """Update θs ∪ θt from one batch. A loss or gradient that is not finite changes nothing (decided on the device).

    The batch is on the device; with `graphs` it is padded to a shape bucket, on the host, and copied by them.
    """
    work = partial(forward_backward, model, head, loss_scale, share)
    results = work(batch, random) if graphs is None else graphs.run((head, loss_scale, share), batch, random, work)
    loss, score = results[0], results[1]
    grad_norm, skipped = optimizer.step(head, lr_multiplier, loss)
    return StepResult(loss, score, grad_norm, skipped, results[2:])


def forward_backward(
    model: ViLBERT, head: str, loss_scale: float, share: bool, batch: Batch, random: Randomness
) -> Tensor:
    """float32 [2 + parts]: loss, mean score, the loss's parts. The gradients of loss * loss_scale stay in the parameters."""
    found = outcome(model, batch, head, random, share)
    (found.loss * loss_scale).backward()
    return torch.stack((found.loss.detach(), found.score.mean(), *(part.detach() for part in found.parts)))
