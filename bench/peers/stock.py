"""*stock*: the best that stock torch makes of the same recipe: bfloat16 autocast and torch's fused AdamW in four groups."""

from __future__ import annotations

from itertools import product

import torch

from bench.peers.authors import NO_DECAY, WEIGHT_DECAY
from bench.peers.model import PaddedModel
from bench.peers.recipe import HEAD_PREFIX, Recipe
from bench.provider import Setting


def build(setting: Setting) -> Recipe:
    """The provider."""
    return Recipe(setting, "stock", optimizer, autocast=True)


def optimizer(model: PaddedModel, base_lr: float, head_lr: float) -> torch.optim.AdamW:
    """Heads and the rest, decayed and not."""
    groups = []
    for head, decayed in product((False, True), repeat=2):
        parameters = [
            parameter
            for name, parameter in model.named_parameters()
            if name.startswith(HEAD_PREFIX) == head and any(part in name for part in NO_DECAY) != decayed
        ]
        lr = head_lr if head else base_lr
        groups.append({"params": parameters, "lr": lr, "weight_decay": WEIGHT_DECAY if decayed else 0.0})
    return torch.optim.AdamW(groups, lr=base_lr, betas=(0.9, 0.999), eps=1e-6, fused=True)
