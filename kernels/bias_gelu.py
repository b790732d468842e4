"""Bias and erf-GELU in one op:  y = z Φ(z),  z = x + bias  (spec section 1.1: 0.5 z (1 + erf(z / √2))).

x and y are [rows, width], bias is [width]. Nothing is kept for backward but x, from which y can be had again:

    dx = dy (Φ(z) + z φ(z)),   dbias = Σ_rows dx
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose
from kernels.native_library import dtype_code, library, pointer
from kernels.recorded import Recorded
from kernels.row_slices import check_rows, fold, fold_variant, summed_rows, variant_of
from kernels.variants import Variant

# Triton


@triton.jit
def _normal_cdf(z):
    """Φ."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _normal_pdf(z):
    """φ."""
    return 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(x, bias, y, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    there = (row < rows) & (column < WIDTH)
    at = row.to(tl.int64) * WIDTH + column
    z = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    z += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + at, (z * _normal_cdf(z)).to(y.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["rows", "chunk"])
def _backward_kernel(
    dy, x, bias, dx, y, partial, rows, chunk, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partial float32 [chunks, WIDTH]: sums of dx over a chunk of rows. y: None where it is not wanted."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    b = tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    start_row = tl.program_id(0) * chunk
    for first in range(start_row, tl.minimum(start_row + chunk, rows), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        there = (row < rows) & (column < WIDTH)
        at = row.to(tl.int64) * WIDTH + column
        z = tl.load(x + at, mask=there, other=0.0).to(tl.float32) + b
        gradient = tl.load(dy + at, mask=there, other=0.0).to(tl.float32)
        cdf = _normal_cdf(z)
        gradient *= cdf + z * _normal_pdf(z)
        sums += gradient
        tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=there)
        if y is not None:
            tl.store(y + at, (z * cdf).to(y.dtype.element_ty), mask=there)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    partial += tl.program_id(0).to(tl.int64) * WIDTH
    tl.store(partial + column, tl.sum(sums, 0), mask=column < WIDTH)


# Launchers

_ROWS, _MOST_COLUMNS = 8, 256
"""Of what a program holds at a time."""
_WARPS = 4


def _constexprs(width: int) -> dict[str, int]:
    return {"WIDTH": width, "COLUMNS": min(triton.next_power_of_2(width), _MOST_COLUMNS), "ROWS": _ROWS}


def _forward_triton(x: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    rows, width = x.shape
    sizes = _constexprs(width)
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, sizes["COLUMNS"]))
        _forward_kernel[grid](x, bias, y, rows, **sizes, num_warps=_WARPS)
    return y


def _backward_triton(dy: Tensor, x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor, y: Tensor | None) -> None:
    rows, width = x.shape
    sizes, chunk = _constexprs(width), summed_rows(rows)
    chunks = triton.cdiv(rows, chunk)
    sums = x.new_empty((chunks, 1, width), dtype=torch.float32)
    if rows:
        grid = (chunks, triton.cdiv(width, sizes["COLUMNS"]))
        _backward_kernel[grid](dy, x, bias, dx, y, sums, rows, chunk, **sizes, num_warps=_WARPS)
    fold(sums, [dbias])


def _forward_native(x: Tensor, bias: Tensor) -> Tensor:
    y = torch.empty_like(x)
    library().stopgo_bias_gelu_forward(dtype_code(x), *x.shape, *map(pointer, (x, bias, y)))
    return y


def _backward_native(dy: Tensor, x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor, y: Tensor | None) -> None:
    library().stopgo_bias_gelu_backward(dtype_code(x), *x.shape, *map(pointer, (dy, x, bias, dx, dbias, y)))


def _backward_torch(dy: Tensor, x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor, y: Tensor | None) -> None:
    recorded = Recorded(bias_gelu_torch, x, bias)
    for destination, gradient in zip((dx, dbias), recorded.backward(dy), strict=True):
        destination.copy_(gradient)
    if y is not None:
        y.copy_(recorded.outputs[0])


_FORWARD = {"triton": _forward_triton, "native": _forward_native, "torch": lambda x, bias: bias_gelu_torch(x, bias)}
_BACKWARD = {"triton": _backward_triton, "native": _backward_native, "torch": _backward_torch}


def bias_gelu_forward(x: Tensor, bias: Tensor) -> Tensor:
    """y [rows, width], outside of autograd. Contiguous, in one dtype; ValueError for what does not fit."""
    check_rows("bias_gelu", x.shape[0], {"x": x}, {"bias": bias})
    with torch.no_grad():
        return _FORWARD[choose("bias_gelu", x)](x, bias)


def bias_gelu_backward(dy: Tensor, x: Tensor, bias: Tensor, dx: Tensor, dbias: Tensor, y: Tensor | None = None) -> None:
    """Writes dx and dbias under dy, and into `y`, where one is given, the forward's output again. All contiguous.

    dx may be dy, y may be x.
    """
    matrices = {"x": x, "dy": dy, "dx": dx} | ({} if y is None else {"y": y})
    check_rows("bias_gelu", x.shape[0], matrices, {"bias": bias, "dbias": dbias})
    _BACKWARD[choose("bias_gelu", x)](dy, x, bias, dx, dbias, y)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return bias_gelu_forward(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        dx, dbias = torch.empty_like(x), torch.empty_like(bias)
        bias_gelu_backward(dy.contiguous(), x, bias, dx, dbias)
        return dx, dbias


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """[rows, width] from x [rows, width] and bias [width], in x's dtype."""
    if choose("bias_gelu", x) == "torch":
        return bias_gelu_torch(x, bias)
    y: Tensor = _Function.apply(x.contiguous(), bias.contiguous())
    return y


def bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    """The plain reference."""
    return F.gelu(x + bias)


def variants() -> list[Variant]:
    """Every kernel that a run can launch here."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (1024, 2048, 3072):
            sizes: dict[str, object] = dict(_constexprs(width))
            for name, kernel, constexprs in (
                ("forward", _forward_kernel, {}),
                ("backward", _backward_kernel, {"y": None}),
                ("backward and y", _backward_kernel, {}),
            ):
                constants = {**sizes, **constexprs}
                found.append(variant_of("bias_gelu", f"{name}, {width} wide", kernel, dtype, constants, _WARPS))
            found.append(fold_variant("bias_gelu", dtype, width, 1))
    return found
