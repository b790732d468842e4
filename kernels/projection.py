"""The products of a projection  y = x Wᵀ + b:  the forward, and the gradients  dx = dy W,  dW = dyᵀ x,  db = Σ_rows dy.

x is [rows, depth], W [width, depth], y [rows, width]; rows of x, y and their gradients may be strided, W is contiguous.

A product is torch's business on every device (cuBLAS, oneDNN), but for bfloat16 on CPUs with AMX, where
`native/products.cpp` is worth having. Product by product it is as fast as oneDNN, with few rows half as fast again; but oneDNN
compiles every shape that it has not seen, and packed batches have other row counts at every step; and gradients of weights
are written past the caches. Together that is a sixth of a step (bench/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose
from kernels.native_library import library, pointer

_STEP = 32
"""What the native products want widths and depths to be multiples of."""


def project(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, [rows, width]."""
    if not is_native(w, (x, w.shape[1]), bias=bias):
        return F.linear(x, w, bias)
    return NATIVE["forward"](x, w, bias, out=x.new_empty(x.shape[0], w.shape[0]))


def input_gradient(dy: Tensor, w: Tensor, dx: Tensor | None = None) -> Tensor:
    """dy W, [rows, depth], added to dx where one is given."""
    if not is_native(w, (dy, w.shape[0]), *([] if dx is None else [(dx, w.shape[1])])):
        return torch.mm(dy, w) if dx is None else dx.addmm_(dy, w)
    if dx is None:
        return NATIVE["input_gradient"](dy, w, out=dy.new_empty(dy.shape[0], w.shape[1]))
    return NATIVE["added_input_gradient"](dx, dy, w, out=dx)


def weight_gradient(dy: Tensor, x: Tensor, out: Tensor, bias_out: Tensor | None = None) -> None:
    """Writes dyᵀ x into out [width, depth] and, where it is given, the sums of dy over its rows into bias_out [width]."""
    if is_native(out, (dy, out.shape[0]), (x, out.shape[1]), bias=bias_out):
        NATIVE["weight_gradient"](dy, x, bias_out, out=out)
        return
    torch.mm(_turned(dy) if _worth_turning(dy) else dy.t(), x, out=out)
    if bias_out is not None:
        torch.sum(dy, 0, out=bias_out)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """`project`, as autograd follows it."""
    result: Tensor = _Linear.apply(x, w)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return project(x, w)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, w = ctx.saved_tensors
        dw = torch.empty_like(w) if ctx.needs_input_grad[1] else None
        if dw is not None:
            weight_gradient(dy, x, dw)
        return input_gradient(dy, w) if ctx.needs_input_grad[0] else None, dw


# Native


def is_native(w: Tensor, *matrices: tuple[Tensor, int], bias: Tensor | None = None) -> bool:
    """Whether the native product is to be used: w [width, depth], the weight or its gradient; matrices, each with the number
    of its columns; bias [width]. The kernels read through bare pointers: what does not fit is left to torch, which says so."""
    if choose("projection", w) != "native" or w.dtype is not torch.bfloat16 or not w.is_contiguous():
        return False
    width, depth = w.shape
    rows = matrices[0][0].shape[0]
    if not rows or width % _STEP or depth % _STEP:
        return False
    for x, columns in matrices:
        if not fits(x, (rows, columns), w) or x.stride(1) != 1:
            return False
    return bias is None or (fits(bias, (width,), w) and bias.is_contiguous())


def fits(x: Tensor, shape: tuple[int, ...], w: Tensor) -> bool:
    """Whether x has this shape, and dtype and device of w."""
    return x.shape == shape and x.dtype is w.dtype and x.device == w.device


def _forward(x: Tensor, w: Tensor, bias: Tensor | None = None, *, out: Tensor) -> Tensor:
    library().stopgo_projection_forward(
        x.shape[0], *w.shape, x.data_ptr(), x.stride(0), w.data_ptr(), pointer(bias), out.data_ptr(), out.stride(0)
    )
    return out


def _input_gradient(dy: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    return _add_input_gradient(dy, w, out, 0)


def _added_input_gradient(dx: Tensor, dy: Tensor, w: Tensor, *, out: Tensor) -> Tensor:
    assert dx.data_ptr() == out.data_ptr(), "added in place"
    return _add_input_gradient(dy, w, out, 1)


def _add_input_gradient(dy: Tensor, w: Tensor, dx: Tensor, add: int) -> Tensor:
    library().stopgo_projection_input_gradient(
        dy.shape[0], w.shape[1], w.shape[0], dy.data_ptr(), dy.stride(0), w.data_ptr(), dx.data_ptr(), dx.stride(0), add
    )
    return dx


def _weight_gradient(dy: Tensor, x: Tensor, bias_out: Tensor | None = None, *, out: Tensor) -> Tensor:
    library().stopgo_projection_weight_gradient(
        dy.shape[0],
        *out.shape,
        dy.data_ptr(),
        dy.stride(0),
        x.data_ptr(),
        x.stride(0),
        out.data_ptr(),
        pointer(bias_out),
    )
    return out


def _gelu_forward(x: Tensor, w: Tensor, bias: Tensor, y: Tensor, *, out: Tensor) -> Tensor:
    library().stopgo_projection_gelu_forward(
        x.shape[0], *w.shape, x.data_ptr(), x.stride(0), *map(pointer, (w, bias, out, y))
    )
    return out


def _gelu_gradient(dy: Tensor, w: Tensor, bias: Tensor, inner: Tensor, *, out: Tensor) -> Tensor:
    library().stopgo_projection_gelu_gradient(
        dy.shape[0], w.shape[1], w.shape[0], dy.data_ptr(), dy.stride(0), *map(pointer, (w, bias, inner, out))
    )
    return out


NATIVE: dict[str, Callable[..., Tensor]] = {
    "forward": _forward,
    "input_gradient": _input_gradient,
    "added_input_gradient": _added_input_gradient,
    "weight_gradient": _weight_gradient,
    "gelu_forward": _gelu_forward,
    "gelu_gradient": _gelu_gradient,
}
"""By name, so that whoever records a step's products (bench/gemms.py) can look on."""

PLAIN = {"gelu_forward": "forward", "gelu_gradient": "input_gradient"}
"""The product alone, of those that do more; their first two operands are its."""


# oneDNN's AMX products read a transposed left operand at less than half the speed of a plain one.


def _worth_turning(x: Tensor) -> bool:
    return x.element_size() == 2 and choose("projection", x) == "native"


def _turned(x: Tensor) -> Tensor:
    """xᵀ [columns, rows], contiguous; x of a 16-bit dtype."""
    rows, columns = x.shape
    turned = x.new_empty(columns, rows)
    library().stopgo_transpose(rows, columns, x.data_ptr(), x.stride(0), turned.data_ptr())
    return turned
