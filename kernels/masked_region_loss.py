"""Masked-region modelling over the masked rows alone: project to detector classes, KL against the detector's distribution.

    loss = (1 / m) Σ_masked Σ_c t_c (log t_c − log softmax(h W ᵀ + b)_c)       (paper 3.1, spec section 2.1)

and 0, with zero gradients, where nothing is masked (the published code divides by zero there).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def masked_region_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """float32 scalar. hidden [m, V], masked rows after the transform; weight [C, V]; bias [C]; target [m, C]."""
    return masked_region_loss_torch(hidden, weight, bias, target)


def masked_region_loss_torch(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The plain reference."""
    log_probabilities = F.linear(hidden, weight, bias).float().log_softmax(-1)
    divergence = torch.special.xlogy(target, target) - target * log_probabilities
    return divergence.sum() / max(hidden.shape[0], 1)
