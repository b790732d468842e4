"""Masked-word modelling over the masked rows alone: multiply by the tied word embeddings, softmax cross-entropy.

loss = (1 / m) Σ_masked −log softmax(h Eᵀ + b)_label       (paper 3.1, spec section 2.1); 0 where nothing is masked.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def masked_lm_loss(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """float32 scalar. hidden [m, D], masked rows after the transform; labels int64 [m]; embeddings [vocab, D]; bias [vocab]."""
    return masked_lm_loss_torch(hidden, embeddings, bias, labels)


def masked_lm_loss_torch(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The plain reference."""
    logits = F.linear(hidden, embeddings, bias).float()
    return F.cross_entropy(logits, labels, reduction="sum") / max(hidden.shape[0], 1)
