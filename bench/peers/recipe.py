"""A padded training step, as both peers make it: only optimizer and precision differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.batches import pad, padded_rows
from bench.memory import release, tensor_bytes
from bench.peers.losses import PaddedBatch
from bench.peers.model import PaddedInputs, PaddedModel
from bench.provider import LR_MULTIPLIER, Rows, Setting, Step, StepClock
from engine.tasks import TaskRow, base_lr, load_table, loss_scale

HEAD_LR = 1e-4
"""Of the heads whose name begins so (spec section 4.3)."""
HEAD_PREFIX = "vil_"

MakeOptimizer = Callable[[PaddedModel, float, float], torch.optim.Optimizer]
"""(model, learning rate, that of the `vil_` heads) -> the recipe's optimizer."""


class Recipe:
    """The padded model and an optimizer; with `autocast` its products run in bfloat16."""

    def __init__(self, setting: Setting, name: str, make_optimizer: MakeOptimizer, autocast: bool) -> None:
        self.setting, self.name, self.autocast = setting, name, autocast
        torch.manual_seed(setting.run.seed)
        self.model = PaddedModel(setting.run.model)
        self.model.initialise(setting.run.seed)
        self.model.to(setting.device).train()
        rows = load_table().default_tasks()
        self._loss_scale = loss_scale(rows)
        self.optimizer = make_optimizer(self.model, base_lr(rows) * LR_MULTIPLIER, HEAD_LR * LR_MULTIPLIER)
        self._clock = StepClock(setting.device)
        self._batch: PaddedBatch | None = None
        self._task = ""

    def prepare(self, row: TaskRow, turn: int) -> Rows:
        """See `Provider`."""
        samples = self.setting.samples(row, turn)
        batch = pad(samples)
        self._task, self._batch = row.name, moved(batch, self.setting.device)
        return Rows(padded_rows(batch), samples.real_rows)

    def step(self) -> Step:
        """See `Provider`. Gradients are dropped after the update, as torch's `zero_grad` does today."""
        self._clock.start()
        loss = self._loss()
        (loss * self._loss_scale[self._task]).backward()
        self._clock.half(lambda: tensor_bytes(p.grad for p in self.model.parameters() if p.grad is not None))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self._clock.stop(loss.detach())

    def _loss(self) -> Tensor:
        """All heads are evaluated; what the loss does not need is freed when this returns, as in the published code."""
        assert self._batch is not None
        with torch.autocast(self.setting.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(self._batch.inputs)
        return self._batch.loss_and_score(logits)[0]

    def rest(self) -> int:
        """See `Provider`. Both optimizers make new moments where they find none."""
        self._batch = None
        self.optimizer.state.clear()
        release()
        return self._clock.memory.held()

    def state(self) -> dict[str, int]:
        """See `Provider`."""
        return {
            "weights": tensor_bytes(self.model.parameters()),
            "optimizer": tensor_bytes(_moments(self.optimizer)),
        }

    def describe(self) -> dict[str, Any]:
        """See `Provider`."""
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "precision": "bfloat16 autocast" if self.autocast else "float32",
            "optimizer": f"{type(self.optimizer).__name__}, {len(self.optimizer.param_groups)} parameter groups",
            "layout": "padded",
        }


def _moments(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))


def moved(batch: PaddedBatch, device: torch.device) -> PaddedBatch:
    """The batch on the device."""
    moved = {name: value.to(device) for name, value in batch.inputs._asdict().items() if isinstance(value, Tensor)}
    inputs = PaddedInputs(**moved, task_token=batch.inputs.task_token)
    index = None if batch.choice_index is None else batch.choice_index.to(device)
    return replace(batch, inputs=inputs, target=batch.target.to(device), choice_index=index)
