"""What follows every projection of a post-LN layer:  y = LayerNorm(dropout(x + bias) + residual)  (spec section 1.4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.dropout import Dropout, drop
from kernels.rows import Rows

LAYER_NORM_EPS = 1e-12
"""Of every LayerNorm of the model (spec section 1.1)."""


def bias_dropout_residual_layernorm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None = None
) -> Tensor:
    """[rows, width]: x and residual [rows, width]; bias, weight and shift [width]; mean and variance in float32."""
    return bias_dropout_residual_layernorm_torch(x, bias, residual, weight, shift, rows, dropout)


def bias_dropout_residual_layernorm_torch(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None = None
) -> Tensor:
    """The plain reference."""
    x = x + bias
    if dropout is not None:
        x = drop(x, dropout, rows.row_key, rows.row_index)
    return F.layer_norm(x + residual, weight.shape, weight, shift, LAYER_NORM_EPS)
