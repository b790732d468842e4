"""A layer's feed-forward, up to its second bias:  y = gelu(x Uᵀ + a) Dᵀ  (spec section 1.4).

x is [rows, width], U [inner width, width], a [inner width], D [width, inner width]. Backward makes the activation again
instead of keeping it. Where products and GELU are native, the activation costs no pass of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.backends import choose
from kernels.bias_gelu import bias_gelu_backward, bias_gelu_forward
from kernels.projection import NATIVE, fits, input_gradient, is_native, project, weight_gradient


def feed_forward_forward(x: Tensor, up: Tensor, bias: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """(y, x Uᵀ [rows, inner width], which backward needs)."""
    inner, activated = _activate(x, up, bias)
    return project(activated, down), inner


def feed_forward_backward(
    dy: Tensor,
    x: Tensor,
    inner: Tensor,
    up: Tensor,
    bias: Tensor,
    down: Tensor,
    dx: Tensor,
    dup: Tensor,
    dbias: Tensor,
    ddown: Tensor,
) -> Tensor:
    """Adds the gradient of x to dx, and writes those of U, a and D. `inner` is overwritten."""
    if _fuses_gradient(dy, down, bias, inner):
        dinner = NATIVE["gelu_gradient"](dy, down, bias, inner, out=torch.empty_like(inner))
        weight_gradient(dinner, x, dup, dbias)
    else:
        dinner = input_gradient(dy, down)
        bias_gelu_backward(dinner, inner, bias, dinner, dbias, inner)
        weight_gradient(dinner, x, dup)
    weight_gradient(dy, inner, ddown)  # inner holds the activation now
    return input_gradient(dinner, up, dx)


def _activate(x: Tensor, up: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(x Uᵀ, gelu(x Uᵀ + a))."""
    if not _fuses(x, up, bias):
        inner = project(x, up)
        return inner, bias_gelu_forward(inner, bias)
    inner, activated = (x.new_empty(x.shape[0], up.shape[0]) for _ in range(2))
    return NATIVE["gelu_forward"](x, up, bias, activated, out=inner), activated


def _fuses(x: Tensor, up: Tensor, bias: Tensor) -> bool:
    return choose("bias_gelu", x) == "native" and is_native(up, (x, up.shape[1]), bias=bias)


def _fuses_gradient(dy: Tensor, down: Tensor, bias: Tensor, inner: Tensor) -> bool:
    width, inner_width = down.shape
    return (
        choose("bias_gelu", dy) == "native"
        and is_native(down, (dy, width), (inner, inner_width))
        and inner.is_contiguous()
        and fits(bias, (inner_width,), down)
        and bias.is_contiguous()
    )
