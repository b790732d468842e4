"""Masked-region modelling over the masked rows alone: project to detector classes, KL against the detector's distribution.

    loss = (1 / m) Σ_masked Σ_c t_c (log t_c − log softmax(h W ᵀ + b)_c)       (paper 3.1, spec section 2.1)

and 0, with zero gradients, where nothing is masked (the published code divides by zero there). Logits exist for a chunk of
rows at a time, or, on a GPU, for few rows: see `masked_rows.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.masked_rows import masked_rows_loss
from kernels.masked_rows_triton import variants_of
from kernels.variants import Variant


def masked_region_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None = None
) -> Tensor:
    """float32 scalar. hidden [m, V], masked rows after the transform; weight [C, V]; bias [C]; target [m, C], which may
    have another floating dtype and need not sum to 1.

    `rows`: int64 [m], all different: hidden is [n, V] then, and these of its rows are masked. ValueError for shapes or
    dtypes that do not fit each other.
    """
    return masked_rows_loss("masked_region_loss", masked_region_loss_torch, hidden, weight, bias, target, rows)


def masked_region_loss_torch(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Tensor:
    """The plain reference."""
    target = target.float()
    log_probabilities = F.linear(hidden, weight, bias).float().log_softmax(-1)
    divergence = torch.special.xlogy(target, target) - target * log_probabilities
    return divergence.sum() / max(hidden.shape[0], 1)


def variants() -> list[Variant]:
    """Every Triton kernel of this op, at the full model's 1,601 classes."""
    targets = {
        torch.float32: ["*fp32"],
        torch.bfloat16: ["*fp32", "*bf16", "*fp16"],
        torch.float16: ["*fp32", "*fp16"],
    }
    return variants_of("masked_region_loss", 1601, targets)
