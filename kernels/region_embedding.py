"""The image stream's input:  dropout(LayerNorm(x + b_f + boxes W_lᵀ + b_l)),  x = features W_fᵀ  (spec section 1.2).

x and y are [R, V], boxes float32 [R, 5], W_l [V, 5], all other weights [V]. Sums, mean and variance are in float32. Backward
computes the sum again and draws the mask again; with dz the gradient of what is normalised,

    dx = dz,   db_f = db_l = Σ_rows dz,   dW_l = Σ_rows dz ⊗ box        (boxes get no gradient)
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose
from kernels.bias_dropout_residual_layernorm import LAYER_NORM_EPS, draw_rows, drop_slices, norm_gradients, normalise
from kernels.dropout import NO_DROPOUT, Dropout, drop_torch, kept, native_row_arguments, triton_row_arguments
from kernels.native_library import dtype_code, library, pointer
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
    times,
    variant_of,
    widened,
    zero_slices,
)
from kernels.rows import Rows
from kernels.variants import Variant

BOX = 5
"""Values of a box: four corners and the share of the image's area."""

# Triton


@triton.jit
def _load_column(location_weight, i: tl.constexpr, block, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """Slices of column i of W_l."""
    slices = ()
    for lane in tl.static_range(8):
        at = location_weight + (lane * EIGHTH + block) * 5 + i
        slices = appended(slices, tl.load(at, mask=inside(block, lane, WIDTH, EIGHTH), other=0.0))
    return slices


@triton.jit
def _load_columns(location_weight, block, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """Slices of all five columns. Spelled out: Triton 3.6 flattens a tuple of tuples that is appended to."""
    columns0 = _load_column(location_weight, 0, block, WIDTH, EIGHTH)
    columns1 = _load_column(location_weight, 1, block, WIDTH, EIGHTH)
    columns2 = _load_column(location_weight, 2, block, WIDTH, EIGHTH)
    columns3 = _load_column(location_weight, 3, block, WIDTH, EIGHTH)
    columns4 = _load_column(location_weight, 4, block, WIDTH, EIGHTH)
    return columns0, columns1, columns2, columns3, columns4


@triton.jit
def _load_box(boxes, row, live):
    """Five float32 [ROWS, 1]."""
    box = ()
    for i in tl.static_range(5):
        box = appended(box, tl.load(boxes + row * 5 + i, mask=live, other=0.0))
    return box


@triton.jit
def _sums(xs, feature_biases, location_biases, columns, box, block, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """float32 slices of x + b_f + box W_lᵀ + b_l; zeros outside."""
    zs = ()
    for lane in tl.static_range(8):
        located = location_biases[lane].to(tl.float32)
        for i in tl.static_range(5):
            located += columns[i][lane].to(tl.float32) * box[i]
        z = xs[lane].to(tl.float32) + feature_biases[lane].to(tl.float32) + located
        zs = appended(zs, tl.where(inside(block, lane, WIDTH, EIGHTH), z, 0.0))
    return zs


@triton.jit(do_not_specialize=["seed", "site", "threshold", "rows"])
def _forward_kernel(
    x, feature_bias, boxes, location_weight, location_bias, weight, shift, y, mean, rstd,
    row_key, row_index, step, seed: tl.uint32, site: tl.uint32, threshold: tl.uint32, scale, eps, rows,
    WIDTH: tl.constexpr, EIGHTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    block = tl.arange(0, BLOCK)[None, :]
    everywhere = block >= 0
    feature_biases = load_slices(feature_bias, block, everywhere, WIDTH, EIGHTH)
    location_biases = load_slices(location_bias, block, everywhere, WIDTH, EIGHTH)
    columns = _load_columns(location_weight, block, WIDTH, EIGHTH)
    weights = load_slices(weight, block, everywhere, WIDTH, EIGHTH)
    shifts = load_slices(shift, block, everywhere, WIDTH, EIGHTH)
    start_row = tl.program_id(0) * CHUNK
    for first in range(start_row, tl.minimum(start_row + CHUNK, rows), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < rows
        start = row.to(tl.int64) * WIDTH
        xs = load_slices(x + start, block, live, WIDTH, EIGHTH)
        box = _load_box(boxes, row, live)
        zs = _sums(xs, feature_biases, location_biases, columns, box, block, WIDTH, EIGHTH)
        row_mean, row_rstd = normalise(zs, block, eps, WIDTH, EIGHTH)
        words = None
        if row_key is not None:
            words = draw_rows(row_key, row_index, step, seed, site, row, live, block, xs[0])
        for lane in tl.static_range(8):
            value = (zs[lane] - row_mean) * row_rstd * weights[lane].to(tl.float32) + shifts[lane].to(tl.float32)
            if row_key is not None:
                value = tl.where(kept(words, lane, threshold), value * scale, 0.0)
            store_slice(y + start, value, block, live, lane, WIDTH, EIGHTH)
        tl.store(mean + row, row_mean, mask=live)
        tl.store(rstd + row, row_rstd, mask=live)


@triton.jit(do_not_specialize=["seed", "site", "threshold", "rows"])
def _backward_kernel(
    dy, x, feature_bias, boxes, location_weight, location_bias, weight, mean, rstd, dx, partial,
    row_key, row_index, step, seed: tl.uint32, site: tl.uint32, threshold: tl.uint32, scale, rows,
    WIDTH: tl.constexpr, EIGHTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partial float32 [chunks, 8, WIDTH]: sums over a chunk of rows, of db_f, dweight, dshift and the columns of dW_l."""
    block = tl.arange(0, BLOCK)[None, :]
    everywhere = block >= 0
    feature_biases = load_slices(feature_bias, block, everywhere, WIDTH, EIGHTH)
    location_biases = load_slices(location_bias, block, everywhere, WIDTH, EIGHTH)
    columns = _load_columns(location_weight, block, WIDTH, EIGHTH)
    weights = load_slices(weight, block, everywhere, WIDTH, EIGHTH)
    dbiases = zero_slices(ROWS, BLOCK)
    dweights = zero_slices(ROWS, BLOCK)
    dshifts = zero_slices(ROWS, BLOCK)
    dcolumns0 = zero_slices(ROWS, BLOCK)
    dcolumns1 = zero_slices(ROWS, BLOCK)
    dcolumns2 = zero_slices(ROWS, BLOCK)
    dcolumns3 = zero_slices(ROWS, BLOCK)
    dcolumns4 = zero_slices(ROWS, BLOCK)
    start_row = tl.program_id(0) * CHUNK
    for first in range(start_row, tl.minimum(start_row + CHUNK, rows), ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        live = row < rows
        start = row.to(tl.int64) * WIDTH
        xs = load_slices(x + start, block, live, WIDTH, EIGHTH)
        dys = widened(load_slices(dy + start, block, live, WIDTH, EIGHTH))
        box = _load_box(boxes, row, live)
        row_mean = tl.load(mean + row, mask=live, other=0.0)
        row_rstd = tl.load(rstd + row, mask=live, other=0.0)
        zs = _sums(xs, feature_biases, location_biases, columns, box, block, WIDTH, EIGHTH)
        if row_key is not None:
            words = draw_rows(row_key, row_index, step, seed, site, row, live, block, xs[0])
            dys = drop_slices(dys, words, threshold, scale)
        hats, dzs = norm_gradients(dys, zs, weights, row_mean, row_rstd, WIDTH)
        for lane in tl.static_range(8):
            store_slice(dx + start, dzs[lane], block, live, lane, WIDTH, EIGHTH)
        dbiases = plus(dbiases, dzs)
        dweights = plus(dweights, products(dys, hats))
        dshifts = plus(dshifts, dys)
        dcolumns0 = plus(dcolumns0, times(dzs, box[0]))
        dcolumns1 = plus(dcolumns1, times(dzs, box[1]))
        dcolumns2 = plus(dcolumns2, times(dzs, box[2]))
        dcolumns3 = plus(dcolumns3, times(dzs, box[3]))
        dcolumns4 = plus(dcolumns4, times(dzs, box[4]))
    partial += tl.program_id(0).to(tl.int64) * 8 * WIDTH
    store_column_sums(partial, dbiases, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + WIDTH, dweights, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 2 * WIDTH, dshifts, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 3 * WIDTH, dcolumns0, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 4 * WIDTH, dcolumns1, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 5 * WIDTH, dcolumns2, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 6 * WIDTH, dcolumns3, BLOCK, WIDTH, EIGHTH)
    store_column_sums(partial + 7 * WIDTH, dcolumns4, BLOCK, WIDTH, EIGHTH)


# Launchers

_WARPS_PER_ROW = 4
"""Of 1024 columns: the sums of eight vectors must fit into registers."""
_CHUNK = 64
"""Rows of one program in forward, which reads eight vectors."""
_SUMMED = 128
"""In backward, where every chunk leaves eight rows of float32 sums behind."""


class _Call(NamedTuple):
    """The arguments of one call."""

    x: Tensor
    feature_bias: Tensor
    boxes: Tensor
    location_weight: Tensor
    location_bias: Tensor
    weight: Tensor
    shift: Tensor
    rows: Rows
    dropout: Dropout | None


class _Gradients(NamedTuple):
    """Of one call; that of location_bias is that of feature_bias."""

    x: Tensor
    feature_bias: Tensor
    location_weight: Tensor
    weight: Tensor
    shift: Tensor


def _forward_triton(call: _Call, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    *inputs, rows, dropout = call
    layout = RowLayout.of(y.shape[1], _WARPS_PER_ROW)
    if len(y):
        _forward_kernel[(triton.cdiv(len(y), _CHUNK),)](
            *inputs, y, mean, rstd, eps=LAYER_NORM_EPS, rows=len(y),
            **triton_row_arguments(dropout, rows), **layout.constexprs, CHUNK=_CHUNK, num_warps=WARPS,
        )  # fmt: skip


def _backward_triton(call: _Call, mean: Tensor, rstd: Tensor, dy: Tensor, to: _Gradients) -> None:
    *inputs, _, rows, dropout = call
    count, width = dy.shape
    layout = RowLayout.of(width, _WARPS_PER_ROW)
    sums = dy.new_empty((triton.cdiv(count, _SUMMED), 3 + BOX, width), dtype=torch.float32)
    if count:
        _backward_kernel[(len(sums),)](
            dy, *inputs, mean, rstd, to.x, sums, rows=count,
            **triton_row_arguments(dropout, rows), **layout.constexprs, CHUNK=_SUMMED, num_warps=WARPS,
        )  # fmt: skip
    fold(sums, [to.feature_bias, to.weight, to.shift], to.location_weight)


def _forward_native(call: _Call, y: Tensor, mean: Tensor, rstd: Tensor) -> None:
    *inputs, rows, dropout = call
    library().stopgo_region_embedding_forward(
        dtype_code(y), *y.shape, *map(pointer, inputs),
        *native_row_arguments(dropout, rows), LAYER_NORM_EPS, *map(pointer, (y, mean, rstd)),
    )  # fmt: skip


def _backward_native(call: _Call, mean: Tensor, rstd: Tensor, dy: Tensor, to: _Gradients) -> None:
    *inputs, _, rows, dropout = call
    library().stopgo_region_embedding_backward(
        dtype_code(dy), *dy.shape, *map(pointer, (dy, *inputs, mean, rstd)),
        *native_row_arguments(dropout, rows), *map(pointer, to),
    )  # fmt: skip


_FORWARD = {"triton": _forward_triton, "native": _forward_native}
_BACKWARD = {"triton": _backward_triton, "native": _backward_native}


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> Tensor:
        call = _Call(*arguments)
        y = torch.empty_like(call.x)
        mean, rstd = (call.x.new_empty(len(y), dtype=torch.float32) for _ in range(2))
        _FORWARD[backend](call, y, mean, rstd)
        ctx.backend, ctx.rows, ctx.dropout = backend, call.rows, call.dropout
        ctx.save_for_backward(*call[:7], mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        *inputs, mean, rstd = ctx.saved_tensors
        call = _Call._make([*inputs, ctx.rows, ctx.dropout])
        to = _Gradients(*(torch.empty_like(getattr(call, name)) for name in _Gradients._fields))
        _BACKWARD[ctx.backend](call, mean, rstd, dy.contiguous(), to)
        return None, to.x, to.feature_bias, None, to.location_weight, to.feature_bias, to.weight, to.shift, None, None


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
    inputs = x, feature_bias, boxes, location_weight, location_bias, weight, shift
    backend = choose("region_embedding", x)
    if backend == "torch":
        return region_embedding_torch(*inputs, rows, dropout)
    call = _Call._make([*(part.contiguous() for part in inputs), rows, dropout])._replace(
        boxes=boxes.float().contiguous()
    )
    _check(call)
    y: Tensor = _Function.apply(backend, *call)
    return y


def _check(call: _Call) -> None:
    """ValueError for what does not fit."""
    vectors = {name: getattr(call, name) for name in ("feature_bias", "location_bias", "weight", "shift")}
    check_rows("region_embedding", call.rows.total, {"x": call.x}, vectors)
    check_rows("region_embedding", call.x.shape[1], {"location_weight": call.location_weight}, {})
    if call.boxes.shape != (len(call.x), BOX) or call.location_weight.shape[1] != BOX or call.boxes.requires_grad:
        found = f"{tuple(call.boxes.shape)} and location_weight {tuple(call.location_weight.shape)}"
        raise ValueError(f"region_embedding: boxes {found}; wanted [R, {BOX}], [V, {BOX}], and boxes get no gradient")


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
    return x if dropout is None else drop_torch(x, dropout, rows.row_key, rows.row_index)


def variants() -> list[Variant]:
    """Every kernel that a run can launch here."""
    launches: list[tuple[str, Any, dict[str, object]]] = [
        ("forward", _forward_kernel, {"CHUNK": _CHUNK}),
        ("forward, no dropout", _forward_kernel, {"CHUNK": _CHUNK, **NO_DROPOUT}),
        ("backward", _backward_kernel, {"CHUNK": _SUMMED}),
        ("backward, no dropout", _backward_kernel, {"CHUNK": _SUMMED, **NO_DROPOUT}),
    ]
    width, op = 1024, "region_embedding"
    sizes = RowLayout.of(width, _WARPS_PER_ROW).constexprs
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, kernel, constexprs in launches:
            found.append(variant_of(op, f"{name}, {width} wide", kernel, dtype, {**sizes, **constexprs}, WARPS))
        found.append(fold_variant(op, dtype, width, 3 + BOX))
    return found
