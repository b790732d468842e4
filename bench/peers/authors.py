"""*authors*: the published recipe as its code runs it.

Padded to the task's lengths, float32, every head evaluated at every step, AdamW with one parameter group per tensor and an
update in Python (spec sections 3.2, 3.3 and 4.4). Left out, in its favour: anomaly detection, the never-read co-attention
mask, LayerNorm and GELU spelled out in several ops, and everything around the step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.peers.model import PaddedModel
from bench.peers.recipe import HEAD_PREFIX, Recipe
from bench.provider import Setting

WEIGHT_DECAY = 0.01
NO_DECAY = ("bias", "LayerNorm.weight")
"""A name that holds one of these is not decayed; by substring, as published."""


class PerTensorAdamW(torch.optim.Optimizer):
    """The published rule (spec section 4.4): no bias correction, decay after the step, one tensor at a time."""

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6
    ) -> None:
        super().__init__(groups, {"betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """m, v and θ ← θ − lr m / (√v + eps), then θ ← θ − lr λ θ, for every tensor that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                exp_avg.mul_(beta1).add_(p.grad, alpha=1.0 - beta1)
                exp_avg_sq.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
                p.addcdiv_(exp_avg, exp_avg_sq.sqrt().add_(group["eps"]), value=-group["lr"])
                if group["weight_decay"] > 0.0:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def build(setting: Setting) -> Recipe:
    """The provider."""
    return Recipe(setting, "authors", _optimizer, autocast=False)


def _optimizer(model: PaddedModel, base_lr: float, head_lr: float) -> PerTensorAdamW:
    """One group per tensor."""
    groups = []
    for name, parameter in model.named_parameters():
        lr = head_lr if name.startswith(HEAD_PREFIX) else base_lr
        decay = 0.0 if any(part in name for part in NO_DECAY) else WEIGHT_DECAY
        groups.append({"params": [parameter], "lr": lr, "weight_decay": decay})
    return PerTensorAdamW(groups)
