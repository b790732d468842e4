"""The halves of a layer, forward and backward: what follows attention, the feed-forward, a projection's gradients.

Shapes: rows × width, all rows of a stream packed. Names of fields are those of a block's layout, under a prefix.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.explicit import Fields
from kernels.backends import Saved
from kernels.bias_dropout_residual_layernorm import (
    LAYER_NORM_EPS,
    bias_dropout_residual_layernorm_backward,
    bias_dropout_residual_layernorm_forward,
)
from kernels.dropout import Dropout
from kernels.feed_forward import feed_forward_backward as inner_backward
from kernels.feed_forward import feed_forward_forward as inner_forward
from kernels.projection import input_gradient, project, weight_gradient
from kernels.rows import Rows


def residual_forward(
    w: Fields, prefix: str, norm: str, context: Tensor, residual: Tensor, rows: Rows, dropout: Dropout | None
) -> tuple[Tensor, tuple[Tensor, Saved]]:
    """LayerNorm(dropout(context W + b) + residual), the second half of attention (spec section 1.4)."""
    projected = project(context, w[f"{prefix}out"])
    y, saved = bias_dropout_residual_layernorm_forward(
        projected, w[f"{prefix}out_bias"], residual, w[f"{norm}weight"], w[f"{norm}shift"], rows, dropout
    )
    return y, (context, saved)


def residual_backward(
    w: Fields, g: Fields, prefix: str, norm: str, saved: tuple[Tensor, Saved], dy: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradient of context, gradient of residual). `dy` is overwritten."""
    context, normed = saved
    dprojected = torch.empty_like(dy)
    bias_dropout_residual_layernorm_backward(
        normed, dy, dprojected, dy, g[f"{prefix}out_bias"], g[f"{norm}weight"], g[f"{norm}shift"]
    )
    weight_gradient(dprojected, context, g[f"{prefix}out"])
    return input_gradient(dprojected, w[f"{prefix}out"]), dy


def feed_forward_forward(
    w: Fields, prefix: str, x: Tensor, rows: Rows, dropout: Dropout | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Saved]]:
    """LayerNorm(dropout(gelu(x U + a) D + b) + x) (spec section 1.4)."""
    projected, inner = inner_forward(x, w[f"{prefix}up"], w[f"{prefix}up_bias"], w[f"{prefix}down"])
    y, saved = bias_dropout_residual_layernorm_forward(
        projected, w[f"{prefix}down_bias"], x, w[f"{prefix}weight"], w[f"{prefix}shift"], rows, dropout
    )
    return y, (x, inner, saved)


def feed_forward_backward(w: Fields, g: Fields, prefix: str, saved: tuple[Tensor, Tensor, Saved], dy: Tensor) -> Tensor:
    """Gradient of x, in memory of its own: `dy` came from outside and is left alone."""
    x, inner, normed = saved
    dprojected, dx = torch.empty_like(dy), torch.empty_like(dy)
    bias_dropout_residual_layernorm_backward(
        normed, dy, dprojected, dx, g[f"{prefix}down_bias"], g[f"{prefix}weight"], g[f"{prefix}shift"]
    )
    return inner_backward(
        dprojected, x, inner, w[f"{prefix}up"], w[f"{prefix}up_bias"], w[f"{prefix}down"], dx,
        g[f"{prefix}up"], g[f"{prefix}up_bias"], g[f"{prefix}down"],
    )  # fmt: skip


def projection_backward(w: Tensor, gw: Tensor, gb: Tensor, x: Tensor, dy: Tensor, dx: Tensor | None = None) -> Tensor:
    """Gradient of x under y = x Wᵀ + b, added to dx where one is given; writes the gradients of W and b."""
    weight_gradient(dy, x, gw, gb)
    return input_gradient(dy, w, dx)


def layer_norm(x: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
    """Alone, where nothing is there to fuse it with: few rows."""
    return F.layer_norm(x, weight.shape, weight, shift, LAYER_NORM_EPS)
