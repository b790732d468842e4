"""What follows every projection of a post-LN layer:  y = LayerNorm(dropout(x + bias) + residual)  (spec section 1.4).

x, residual and y are [rows, width], bias and the norm's weight and shift [width]. Sums, mean and variance are in float32,
whatever the dtype. Forward keeps mean and 1 / σ of every row; backward computes the sum again and draws the mask again:

    ẑ = (z − mean) / σ,   g = dy · weight,   dz = (g − mean(g) − ẑ mean(g ẑ)) / σ,
    dresidual = dz,   dx = dropout(dz),   dbias = Σ_rows dx,   dweight = Σ_rows dy ẑ,   dshift = Σ_rows dy
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import Saved, choose
from kernels.dropout import (
    NO_DROPOUT,
    Dropout,
    draw,
    drop_torch,
    held_like,
    kept,
    native_row_arguments,
    triton_row_arguments,
)
from kernels.native_library import dtype_code, library, pointer
from kernels.recorded import Recorded
from kernels.row_slices import (
    WARPS,
    RowLayout,
    appended,
    check_rows,
    fold,
    fold_variant,
    inside,
    load_slices,
    plus,
    products,
    store_column_sums,
    store_slice,
    summed_rows,
    variant_of,
    widened,
    zero_slices,
)
from kernels.rows import Rows
from kernels.variants import Variant

OP = "bias_dropout_residual_layernorm"
LAYER_NORM_EPS = 1e-12
"""Of every LayerNorm of the model (spec section 1.1)."""

# Triton


@triton.jit
def draw_rows(row_key, row_index, step, seed, site, row, live, block, data):
    """The random words of these rows: see `kernels.dropout`."""
    item, place = tl.load(row_key + row, mask=live, other=0), tl.load(row_index + row, mask=live, other=0)
    return draw(seed, tl.load(step), item, place, held_like(block, data), site)


@triton.jit
def drop_slices(values, words, threshold, scale):
    """float32 slices: those that a draw keeps are scaled, the others are 0."""
    slices = ()
    for lane in tl.static_range(8):
        slices = appended(slices, tl.where(kept(words, lane, threshold), values[lane].to(tl.float32) * scale, 0.0))
    return slices


@triton.jit
def _sums(xs, biases, residuals, words, threshold, scale, block, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """float32 slices of dropout(x + bias) + residual; zeros outside. words: None for no dropout."""
    zs = ()
    for lane in tl.static_range(8):
        z = xs[lane].to(tl.float32) + biases[lane].to(tl.float32)
        if words is not None:
            z = tl.where(kept(words, lane, threshold), z * scale, 0.0)
        z += residuals[lane].to(tl.float32)
        zs = appended(zs, tl.where(inside(block, lane, WIDTH, EIGHTH), z, 0.0))
    return zs


@triton.jit
def normalise(zs, block, eps, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """(mean, 1 / σ) [ROWS, 1] of rows of float32 slices; the variance from centred values."""
    total = zs[0]
    for lane in tl.static_range(1, 8):
        total += zs[lane]
    mean = tl.sum(total, 1, keep_dims=True) / WIDTH
    squares = tl.zeros_like(total)
    for lane in tl.static_range(8):
        centred = tl.where(inside(block, lane, WIDTH, EIGHTH), zs[lane] - mean, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, 1, keep_dims=True) / WIDTH + eps)


@triton.jit
def norm_gradients(dys, zs, weights, mean, rstd, WIDTH: tl.constexpr):
    """(ẑ, dz): slices, from float32 gradients dy of a LayerNorm's output and its input z; dz is 0 where 1 / σ is."""
    hats = ()
    gradient = tl.zeros_like(zs[0])
    along = tl.zeros_like(zs[0])
    for lane in tl.static_range(8):
        hat = (zs[lane] - mean) * rstd
        g = dys[lane] * weights[lane].to(tl.float32)
        gradient += g
        along += g * hat
        hats = appended(hats, hat)
    gradient_mean = tl.sum(gradient, 1, keep_dims=True) / WIDTH
    along_mean = tl.sum(along, 1, keep_dims=True) / WIDTH
    dzs = ()
    for lane in tl.static_range(8):
        g = dys[lane] * weights[lane].to(tl.float32)
        dzs = appended(dzs, (g - gradient_mean - hats[lane] * along_mean) * rstd)
    return hats, dzs


@triton.jit(do_not_specialize=["seed", "site", "threshold", "rows"])
def _forward_kernel(
    x, bias, residual, weight, shift, y, mean, rstd,
    row_key, row_index, step, seed: tl.uint32, site: tl.uint32, threshold: tl.uint32, scale, eps, rows,
    WIDTH: tl.constexpr, EIGHTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, BLOCK)[None, :]
    everywhere = block >= 0
    biases = load_slices(bias, block, everywhere, WIDTH, EIGHTH)
    weights = load_slices(weight, block, everywhere, WIDTH, EIGHTH)
    shifts = load_slices(shift, block, everywhere, WIDTH, EIGHTH)
    start_row = tl.program_id(0) * CHUNK
    for first in range(start_row, tl.minimum(start_row + CHUNK, rows), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < rows
        start = row.to(tl.int64) * WIDTH
        xs = load_slices(x + start, block, live, WIDTH, EIGHTH)
        residuals = load_slices(residual + start, block, live, WIDTH, EIGHTH)
        words = None
        if row_key is not None:
            words = draw_rows(row_key, row_index, step, seed, site, row, live, block, xs[0])
        zs = _sums(xs, biases, residuals, words, threshold, scale, block, WIDTH, EIGHTH)
        row_mean, row_rstd = normalise(zs, block, eps, WIDTH, EIGHTH)
        for lane in tl.static_range(8):
            value = (zs[lane] - row_mean) * row_rstd * weights[lane].to(tl.float32) + shifts[lane].to(tl.float32)
            store_slice(y + start, value, block, live, lane, WIDTH, EIGHTH)
        tl.store(mean + row, row_mean, mask=live)
        tl.store(rstd + row, row_rstd, mask=live)


@triton.jit(do_not_specialize=["seed", "site", "threshold", "rows", "chunk"])
def _backward_kernel(
    dy, x, bias, residual, weight, mean, rstd, dx, dresidual, partial,
    row_key, row_index, step, seed: tl.uint32, site: tl.uint32, threshold: tl.uint32, scale, rows, chunk,
    WIDTH: tl.constexpr, EIGHTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """partial float32 [chunks, 3, WIDTH]: sums over a chunk of rows, of dbias, dweight and dshift."""
    block = tl.arange(0, BLOCK)[None, :]
    everywhere = block >= 0
    biases = load_slices(bias, block, everywhere, WIDTH, EIGHTH)
    weights = load_slices(weight, block, everywhere, WIDTH, EIGHTH)
    dbiases = zero_slices(ROWS, BLOCK)
    dweights = zero_slices(ROWS, BLOCK)
    dshifts = zero_slices(ROWS, BLOCK)
    start_row = tl.program_id(0) * chunk
    for first in range(start_row, tl.minimum(start_row + chunk, rows), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < rows
        start = row.to(tl.int64) * WIDTH
        xs = load_slices(x + start, block, live, WIDTH, EIGHTH)
        residuals = load_slices(residual + start, block, live, WIDTH, EIGHTH)
        dys = widened(load_slices(dy + start, block, live, WIDTH, EIGHTH))
        row_mean = tl.load(mean + row, mask=live, other=0.0)
        row_rstd = tl.load(rstd + row, mask=live, other=0.0)
        words = None
        if row_key is not None:
            words = draw_rows(row_key, row_index, step, seed, site, row, live, block, xs[0])
        zs = _sums(xs, biases, residuals, words, threshold, scale, block, WIDTH, EIGHTH)
        hats, dzs = norm_gradients(dys, zs, weights, row_mean, row_rstd, WIDTH)
        dxs = dzs
        if row_key is not None:
            dxs = drop_slices(dzs, words, threshold, scale)
        for lane in tl.static_range(8):
            store_slice(dx + start, dxs[lane], block, live, lane, WIDTH, EIGHTH)
            if dresidual is not None:
                store_slice(dresidual + start, dzs[lane], block, live, lane, WIDTH, EIGHTH)
        dbiases = plus(dbiases, dxs)
        dweights = plus(dweights, products(dys, hats))
        dshifts = plus(dshifts, dys)
    partial += tl.program_id(0).to(tl.int64) * 3 * WIDTH
    store_column_sums(partial, dbiases, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + WIDTH, dweights, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 2 * WIDTH, dshifts, BLOCK, WIDTH, EIGHTH)


# Launchers

_CHUNK = 16
"""Rows of one program in forward: enough for the vectors to be read rarely, few enough to fill a device."""


def _forward_triton(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None
) -> tuple[Tensor, Saved]:
    count, width = x.shape
    y, mean, rstd = torch.empty_like(x), *_statistics(x)
    layout = RowLayout.of(width)
    if count:
        _forward_kernel[(triton.cdiv(count, _CHUNK),)](
            x, bias, residual, weight, shift, y, mean, rstd, eps=LAYER_NORM_EPS, rows=count,
            **triton_row_arguments(dropout, rows), **layout.constexprs, CHUNK=_CHUNK, num_warps=WARPS,
        )  # fmt: skip
    return y, Saved("triton", (x, bias, residual, weight, mean, rstd, rows, dropout))


def _backward_triton(
    saved: Saved, dy: Tensor, dx: Tensor, dresidual: Tensor, dbias: Tensor, dweight: Tensor, dshift: Tensor
) -> None:
    *inputs, rows, dropout = saved.values
    count, width = dy.shape
    layout = RowLayout.of(width)
    chunk = summed_rows(count)
    sums = dy.new_empty((triton.cdiv(count, chunk), 3, width), dtype=torch.float32)
    if count:
        same = dx.data_ptr() == dresidual.data_ptr()
        _backward_kernel[(len(sums),)](
            dy, *inputs, dx, None if same else dresidual, sums, rows=count, chunk=chunk,
            **triton_row_arguments(dropout, rows), **layout.constexprs, num_warps=WARPS,
        )  # fmt: skip
    fold(sums, [dbias, dweight, dshift])


def _forward_native(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None
) -> tuple[Tensor, Saved]:
    y, mean, rstd = torch.empty_like(x), *_statistics(x)
    library().stopgo_bias_dropout_residual_layernorm_forward(
        dtype_code(x), *x.shape, *map(pointer, (x, bias, residual, weight, shift)),
        *native_row_arguments(dropout, rows), LAYER_NORM_EPS, *map(pointer, (y, mean, rstd)),
    )  # fmt: skip
    return y, Saved("native", (x, bias, residual, weight, mean, rstd, rows, dropout))


def _backward_native(
    saved: Saved, dy: Tensor, dx: Tensor, dresidual: Tensor, dbias: Tensor, dweight: Tensor, dshift: Tensor
) -> None:
    *inputs, rows, dropout = saved.values
    library().stopgo_bias_dropout_residual_layernorm_backward(
        dtype_code(dy), *dy.shape, *map(pointer, (dy, *inputs)),
        *native_row_arguments(dropout, rows), *map(pointer, (dx, dresidual, dbias, dweight, dshift)),
    )  # fmt: skip


def _forward_recorded(
    backend: str, x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows,
    dropout: Dropout | None,
) -> tuple[Tensor, Saved]:  # fmt: skip
    """torch's ops, or torch's with another project's LayerNorm."""
    function = partial(_WITH_AUTOGRAD[backend], rows=rows, dropout=dropout)
    recorded = Recorded(function, x, bias, residual, weight, shift)
    return recorded.outputs[0], Saved(backend, (recorded,))


def _backward_recorded(
    saved: Saved, dy: Tensor, dx: Tensor, dresidual: Tensor, dbias: Tensor, dweight: Tensor, dshift: Tensor
) -> None:
    gradients = saved.values[0].backward(dy)
    for destination, gradient in zip((dx, dbias, dresidual, dweight, dshift), gradients, strict=True):
        destination.copy_(gradient)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for mean and 1 / σ of every row."""
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


_FORWARD: dict[str, Callable[..., tuple[Tensor, Saved]]] = {
    "triton": _forward_triton,
    "native": _forward_native,
    "torch": partial(_forward_recorded, "torch"),
    "apex": partial(_forward_recorded, "apex"),
}
_BACKWARD: dict[str, Callable[..., None]] = {
    "triton": _backward_triton,
    "native": _backward_native,
    "torch": _backward_recorded,
    "apex": _backward_recorded,
}


def bias_dropout_residual_layernorm_forward(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None
) -> tuple[Tensor, Saved]:
    """(y, what backward needs), outside of autograd. All contiguous, in one dtype; ValueError for what does not fit."""
    check_rows(OP, rows.total, {"x": x, "residual": residual}, {"bias": bias, "weight": weight, "shift": shift})
    return _FORWARD[choose(OP, x)](x, bias, residual, weight, shift, rows, dropout)


def bias_dropout_residual_layernorm_backward(
    saved: Saved, dy: Tensor, dx: Tensor, dresidual: Tensor, dbias: Tensor, dweight: Tensor, dshift: Tensor
) -> None:
    """Writes the gradients under dy [rows, width] into the destinations, all contiguous.

    dx may be dy, dresidual may be dy; without dropout dx may be dresidual (they are equal then).
    """
    _BACKWARD[saved.backend](saved, dy, dx, dresidual, dbias, dweight, dshift)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y, ctx.saved = bias_dropout_residual_layernorm_forward(*inputs)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, bias, residual, weight, *_ = ctx.saved.values
        dx, dbias, dresidual, dweight, dshift = map(torch.empty_like, (x, bias, residual, weight, weight))
        bias_dropout_residual_layernorm_backward(ctx.saved, dy.contiguous(), dx, dresidual, dbias, dweight, dshift)
        return dx, dbias, dresidual, dweight, dshift, None, None


def bias_dropout_residual_layernorm(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None = None
) -> Tensor:
    """[rows, width]: x and residual [rows, width]; bias, weight and shift [width]; mean and variance in float32."""
    inputs = x, bias, residual, weight, shift
    backend = choose(OP, x)
    if backend in _WITH_AUTOGRAD:
        return _WITH_AUTOGRAD[backend](*inputs, rows, dropout)
    y: Tensor = _Function.apply(*(part.contiguous() for part in inputs), rows, dropout)
    return y


def bias_dropout_residual_layernorm_torch(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None = None
) -> Tensor:
    """The plain reference."""
    z = _sum_torch(x, bias, residual, rows, dropout)
    return F.layer_norm(z, weight.shape, weight, shift, LAYER_NORM_EPS)


def _sum_torch(x: Tensor, bias: Tensor, residual: Tensor, rows: Rows, dropout: Dropout | None) -> Tensor:
    x = x + bias
    if dropout is not None:
        x = drop_torch(x, dropout, rows.row_key, rows.row_index)
    return x + residual


def _with_apex(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, rows: Rows, dropout: Dropout | None = None
) -> Tensor:
    """The same with apex's fused LayerNorm."""
    layer_norm = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    return layer_norm(_sum_torch(x, bias, residual, rows, dropout), weight, shift, weight.shape, LAYER_NORM_EPS)


_WITH_AUTOGRAD: dict[str, Callable[..., Tensor]] = {"torch": bias_dropout_residual_layernorm_torch, "apex": _with_apex}


def variants() -> list[Variant]:
    """Every kernel that a run can launch here."""
    launches: list[tuple[str, Any, dict[str, object]]] = [
        ("forward", _forward_kernel, {"CHUNK": _CHUNK}),
        ("forward, no dropout", _forward_kernel, {"CHUNK": _CHUNK, **NO_DROPOUT}),
        ("backward", _backward_kernel, {}),
        ("backward, no dropout", _backward_kernel, NO_DROPOUT),
        ("backward, no dropout, one gradient", _backward_kernel, {**NO_DROPOUT, "dresidual": None}),
    ]
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (768, 1024, 2048):
            sizes = RowLayout.of(width).constexprs
            for name, kernel, constexprs in launches:
                found.append(variant_of(OP, f"{name}, {width} wide", kernel, dtype, {**sizes, **constexprs}, WARPS))
            found.append(fold_variant(OP, dtype, width, 3))
    return found
