"""The image stream's input:  dropout(LayerNorm(x + b_f + boxes W_lᵀ + b_l)),  x = features W_fᵀ  (spec section 1.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kernels.bias_dropout_residual_layernorm import LAYER_NORM_EPS
from kernels.dropout import Dropout, drop
from kernels.rows import Rows


def region_embedding(
    x: Tensor,
    feature_bias: Tensor,
    boxes: Tensor,
    location_weight: Tensor,
    location_bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    rows: Rows,
    dropout: Dropout | None = None,
) -> Tensor:
    """[R, V] from projected features x [R, V], boxes [R, 5], location_weight [V, 5] and vectors [V]."""
    return region_embedding_torch(x, feature_bias, boxes, location_weight, location_bias, weight, shift, rows, dropout)


def region_embedding_torch(
    x: Tensor,
    feature_bias: Tensor,
    boxes: Tensor,
    location_weight: Tensor,
    location_bias: Tensor,
    weight: Tensor,
    shift: Tensor,
    rows: Rows,
    dropout: Dropout | None = None,
) -> Tensor:
    """The plain reference."""
    x = x + feature_bias + F.linear(boxes.to(x.dtype), location_weight, location_bias)
    x = F.layer_norm(x, weight.shape, weight, shift, LAYER_NORM_EPS)
    return x if dropout is None else drop(x, dropout, rows.row_key, rows.row_index)
