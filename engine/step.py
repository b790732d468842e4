"""One task-step of Algorithm 1: forward, loss, backward, guarded update. Nothing in it waits for the device.

`Stepper` is what the loop drives: `Plain` in one process, or `engine.sharded.Sharded`, which is DeepSpeed, over many.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine.graphs import Graphs
from engine.losses import Outcome, outcome
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.optimizer import Optimizer
from engine.ranges import span
from engine.slices import Kept
from pipelines.batch import Batch


@dataclass(frozen=True)
class StepResult:
    """Device scalars, float32: loss before the loss scale, mean training score, gradient norm, 1 if nothing changed.

    Over ranks, loss, score and parts are this rank's addends of what the whole batch has; norm and skipping are common.
    """

    loss: Tensor
    score: Tensor
    grad_norm: Tensor
    skipped: Tensor
    parts: Tensor
    """float32 [k]: the parts of a loss that is a sum; empty for others."""


class Stepper(Protocol):
    """A model and its update rule θs ∪ θt."""

    base_lr: float
    """The trunk's rate, before the schedule."""
    graphs: Graphs | None

    def step(
        self, batches: Sequence[Batch], head: str, *, loss_scale: float, lr_multiplier: float, random: Randomness
    ) -> StepResult:
        """One update of trunk and head from one step's micro-batches, which are on the host.

        A loss or gradient that is not finite, on any rank, changes nothing on all of them.
        """

    def whole(self) -> AbstractContextManager[object]:
        """Within it the model's parameters are whole, to be used as they are."""

    def state(self) -> list[Kept]:
        """What of the optimizer's state this rank keeps: the live tensors."""

    def weights(self) -> list[Kept]:
        """What of the float32 weights this rank keeps, under `unit/name`: the live tensors."""

    def loaded(self) -> None:
        """State and weights have been written into the tensors that `state` and `weights` gave."""


class Plain:
    """The whole model and optimizer in this process."""

    def __init__(
        self,
        model: ViLBERT,
        optimizer: Optimizer,
        device: torch.device,
        share: bool = True,
        graphs: Graphs | None = None,
    ) -> None:
        self.model, self.optimizer, self.device, self.share, self.graphs = model, optimizer, device, share, graphs
        self.base_lr = optimizer.units["trunk"].lr

    def step(
        self, batches: Sequence[Batch], head: str, *, loss_scale: float, lr_multiplier: float, random: Randomness
    ) -> StepResult:
        """See `Stepper`."""
        with span("copy"):
            on_device = batches if self.graphs else [batch.to(self.device) for batch in batches]
        return train_step(
            self.model, self.optimizer, on_device, head, loss_scale=loss_scale, lr_multiplier=lr_multiplier, random=random,
            share=self.share, graphs=self.graphs,
        )  # fmt: skip

    def whole(self) -> AbstractContextManager[object]:
        """See `Stepper`."""
        return nullcontext()

    def state(self) -> list[Kept]:
        """See `Stepper`."""
        return [Kept(key, 0, tensor) for key, tensor in self.optimizer.state_dict().items()]

    def weights(self) -> list[Kept]:
        """See `Stepper`."""
        return [Kept(key, 0, master) for key, master in self.optimizer.masters().items()]

    def loaded(self) -> None:
        """See `Stepper`."""
        self.optimizer.follow_masters()


def train_step(
    model: ViLBERT,
    optimizer: Optimizer,
    batches: Batch | Sequence[Batch],
    head: str,
    *,
    loss_scale: float,
    lr_multiplier: float,
    random: Randomness,
    share: bool = True,
    graphs: Graphs | None = None,
) -> StepResult:
    """Update θs ∪ θt from one batch. A loss or gradient that is not finite changes nothing (decided on the device).

    The batch is on the device, whole or as the micro-batches that it is divided into; with `graphs` it is padded to a shape
    bucket, on the host, and copied by them.
    """
    work = partial(forward_backward, model, head, loss_scale, share)
    batches = [batches] if isinstance(batches, Batch) else batches
    if graphs is None:
        results = summed([work(batch, random) for batch in batches])
    else:
        (batch,) = batches
        with span("graph"):
            results = graphs.run((head, loss_scale, share), batch, random, work)
    loss, score = results[0], results[1]
    with span("step"):
        grad_norm, skipped = optimizer.step(head, lr_multiplier, loss)
    return StepResult(loss, score, grad_norm, skipped, results[2:])


def forward_backward(
    model: ViLBERT, head: str, loss_scale: float, share: bool, batch: Batch, random: Randomness
) -> Tensor:
    """float32 [2 + parts]: loss, mean score, the loss's parts. The gradients of loss * loss_scale stay in the parameters."""
    found = outcome(model, batch, head, random, share)
    with span("loss"):
        loss, results = addends(found, batch)
    with span("backward"):
        (loss * loss_scale).backward()
    return results


def addends(found: Outcome, batch: Batch) -> tuple[Tensor, Tensor]:
    """(loss, results): what this batch adds to loss, mean score and parts (float32 [2 + parts]) of the step's whole batch.

    Only the first has a gradient. A batch that is the whole adds all of it, to the bit.
    """
    score = found.score.mean()
    if batch.shares == (1.0,):
        loss, parts = found.loss, found.parts
    elif found.parts:
        parts = tuple(part * share for part, share in zip(found.parts, batch.shares, strict=True))
        loss, score = torch.stack(parts).sum(), score * batch.shares[-1]
    else:
        loss, score, parts = found.loss * batch.shares[0], score * batch.shares[0], ()
    return loss, torch.stack((loss.detach(), score, *(part.detach() for part in parts)))


def summed(results: Sequence[Tensor]) -> Tensor:
    """The addends of micro-batches put together."""
    return results[0] if len(results) == 1 else torch.stack(list(results)).sum(0)
