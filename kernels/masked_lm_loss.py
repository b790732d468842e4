"""Masked-word modelling over the masked rows alone: multiply by the tied word embeddings, softmax cross-entropy.

    loss = (1 / m) Σ_masked −log softmax(h Eᵀ + b)_label       (paper 3.1, spec section 2.1)

and 0, with zero gradients, where nothing is masked. Logits exist for a chunk of rows at a time, or, on a GPU, for few rows: see
`masked_rows.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.masked_rows import masked_rows_loss
from kernels.masked_rows_triton import variants_of
from kernels.variants import Variant


def masked_lm_loss(
    hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor, rows: Tensor | None = None
) -> Tensor:
    """float32 scalar. hidden [m, D], masked rows after the transform; labels int64 [m]; embeddings [vocab, D]; bias [vocab].

    `rows`: int64 [m], all different: hidden is [n, D] then, and these of its rows are masked. ValueError for shapes or
    dtypes that do not fit each other; IndexError (on the CPU) for a label outside of the vocabulary.
    """
    return masked_rows_loss("masked_lm_loss", masked_lm_loss_torch, hidden, embeddings, bias, labels, rows)


def masked_lm_loss_torch(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """The plain reference."""
    logits = F.linear(hidden, embeddings, bias).float()
    return F.cross_entropy(logits, labels, reduction="sum") / max(hidden.shape[0], 1)


def variants() -> list[Variant]:
    """Every Triton kernel of this op, at the full model's 30,522 words."""
    labels = {dtype: ["*i64"] for dtype in (torch.float32, torch.bfloat16, torch.float16)}
    return variants_of("masked_lm_loss", 30522, labels)
