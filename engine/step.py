"""One task-step of Algorithm 1: forward, loss, backward, guarded update. Nothing in it waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from engine.graphs import Graphs
from engine.losses import loss_and_score
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
    loss, score = work(batch, random) if graphs is None else graphs.run((head, loss_scale, share), batch, random, work)
    grad_norm, skipped = optimizer.step(head, lr_multiplier, loss)
    return StepResult(loss, score, grad_norm, skipped)


def forward_backward(
    model: ViLBERT, head: str, loss_scale: float, share: bool, batch: Batch, random: Randomness
) -> tuple[Tensor, Tensor]:
    """(loss, mean score), float32 scalars; the gradients of loss * loss_scale are left in the parameters."""
    loss, score = loss_and_score(model(batch, head, random, share), batch)
    (loss * loss_scale).backward()
    return loss.detach(), score.mean()
