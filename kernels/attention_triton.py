"""The Triton kernels of `attention` and `coattention`: one launch computes one or two directions.

A program has one head of one item of one direction, and either all of its rows or one tile of them. It reads heads in
place, as columns of a packed projection, and writes contexts and gradients in place; nothing of size queries × keys and
no dropout mask is ever stored. The grid follows from what the host knows (items, heads, longest item), so nothing waits
for the device and a CUDA graph can hold it all; programs beyond the end of a short item have nothing to do.

Forward: a program has a tile of queries. Keys that fit one tile (texts) need one pass; others are read tile by tile under
a running maximum and sum (Milakov and Gimelshein, 2018; Dao, FlashAttention-2, 2023).

Backward, without atomics: with P the probabilities, M the scaled mask, dP = M ∘ (dO Vᵀ),

    dV = (M ∘ P)ᵀ dO    dS = P ∘ (dP - delta)    dQ = dS K / √D    dK = dSᵀ Q / √D    delta = Σ_keys P ∘ dP = Σ_D dO ∘ O

| a program has | it loops over | it keeps | it also writes, tile by tile, if it has ALL of the item |
|---|---|---|---|
| a tile of keys | tiles of queries | dK, dV | dQ |
| a tile of queries | tiles of keys | dQ | dK, dV |

So where either side fits a tile, one launch does everything and reads every operand once. Else tiles of queries go first and
leave their delta behind for the tiles of keys of a second launch.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dropout import triton_arguments
from kernels.variants import Variant

if TYPE_CHECKING:
    from kernels.attention import Direction, Gradients

HEAD_SHIFT = tl.constexpr(16)
_LOG2_E = tl.constexpr(1.4426950408889634)


class _Inputs(NamedTuple):
    """One direction within a kernel: what both passes are given."""

    q: Any
    k: Any
    v: Any
    q_stride: Any
    k_stride: Any
    v_stride: Any
    cu_q: Any
    cu_k: Any
    item_key: Any
    step: Any
    seed: Any
    site: Any
    threshold: Any
    context: Any
    context_stride: Any
    sums: Any
    rows: Any


class _Gradients(NamedTuple):
    """One direction within a kernel: what backward is given besides."""

    dcontext: Any
    dq: Any
    dk: Any
    dv: Any
    dcontext_stride: Any
    dq_stride: Any
    dk_stride: Any
    dv_stride: Any
    delta: Any


@triton.jit
def _span(cu, item):
    """(first row, rows) of an item."""
    first = tl.load(cu + item)
    return first, tl.load(cu + item + 1) - first


@triton.jit
def _at(x, stride, first, head, HEAD_DIM: tl.constexpr):
    """Where a head of an item begins."""
    return x + first.to(tl.int64) * stride + head * HEAD_DIM


@triton.jit
def _places(base, stride, row, BLOCK_D: tl.constexpr):
    return base + row[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _exist(row, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    mask = (row < rows)[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _read(base, stride, row, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head, [len(row), BLOCK_D]; zeros past the item's last of `rows` rows."""
    return tl.load(_places(base, stride, row, BLOCK_D), mask=_exist(row, rows, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def _write(base, stride, row, rows, values, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The opposite, rounded to the memory's type."""
    rounded = values.to(base.dtype.element_ty)
    tl.store(_places(base, stride, row, BLOCK_D), rounded, mask=_exist(row, rows, HEAD_DIM, BLOCK_D))


@triton.jit
def _dot(a, b):
    """In full precision for float32, on tensor cores for the others; sums in float32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _kept(x, item, head, row, first_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """bool [ROWS, COLUMNS]: which probabilities of these queries and of keys from `first_column` dropout keeps."""
    counter = ((head << HEAD_SHIFT) + row)[:, None]
    block = (first_column // 64 * 8 + tl.arange(0, 8))[None, :]
    seed = x.seed.to(tl.uint64) | (tl.load(x.step).to(tl.uint64) << 32)
    c0, c3 = tl.load(x.item_key + item).to(tl.uint32), x.site.to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, counter.to(tl.uint32), block.to(tl.uint32), c3)
    # Column c of a tile of 64 uses lane c // 8 of block c % 8. In the accumulator of a tensor core, too, a thread has all
    # columns of the same c % 8: it draws what it needs, selects lanes by constants, and moves nothing to other threads. (The
    # wide products of `kernels.dropout.draw` look so dear to Triton that it draws elsewhere and moves the mask.)
    lane = (first_column % 64 // 8 + tl.arange(0, COLUMNS // 8))[None, :, None]
    low, high = tl.where(lane < 2, w0[:, None, :], w1[:, None, :]), tl.where(lane < 6, w2[:, None, :], w3[:, None, :])
    word = tl.where(lane < 4, low, high)
    bits = tl.where(lane % 2 == 0, word << 16, word)
    return (bits >= (x.threshold.to(tl.uint32) << 16)).reshape([ROWS, COLUMNS])


@triton.jit
def _scale_of_kept(threshold):
    return 65536.0 / (65536 - threshold.to(tl.int32)).to(tl.float32)


@triton.jit
def _scores(q, k, scale, column, keys):
    """Scaled scores in units of log 2; minus infinity past the last key."""
    return tl.where((column < keys)[None, :], _dot(q, tl.trans(k)) * (scale * _LOG2_E), float("-inf"))


@triton.jit
def _forward_tile(
    x, item, head, tile, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """Context and sums of one tile of queries. ALL: one tile holds every key."""
    q_first, queries = _span(x.cu_q, item)
    if tile * BLOCK_Q < queries:
        k_first, keys = _span(x.cu_k, item)
        row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q = _read(_at(x.q, x.q_stride, q_first, head, HEAD_DIM), x.q_stride, row, queries, HEAD_DIM, BLOCK_D)
        k_base = _at(x.k, x.k_stride, k_first, head, HEAD_DIM)
        v_base = _at(x.v, x.v_stride, k_first, head, HEAD_DIM)
        if ALL:
            column = tl.arange(0, BLOCK_K)
            k = _read(k_base, x.k_stride, column, keys, HEAD_DIM, BLOCK_D)
            v = _read(v_base, x.v_stride, column, keys, HEAD_DIM, BLOCK_D)
            scores = _scores(q, k, scale, column, keys)
            largest = tl.max(scores, 1)
            p = tl.exp2(scores - largest[:, None])
            total = tl.sum(p, 1)
            if DROPOUT:
                p = tl.where(_kept(x, item, head, row, 0, BLOCK_Q, BLOCK_K), p, 0.0)
            context = _dot(p.to(v.dtype), v)
        else:
            largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            context = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for first in range(0, keys, BLOCK_K):
                column = first + tl.arange(0, BLOCK_K)
                k = _read(k_base, x.k_stride, column, keys, HEAD_DIM, BLOCK_D)
                v = _read(v_base, x.v_stride, column, keys, HEAD_DIM, BLOCK_D)
                scores = _scores(q, k, scale, column, keys)
                new_largest = tl.maximum(largest, tl.max(scores, 1))
                shrink = tl.exp2(largest - new_largest)
                p = tl.exp2(scores - new_largest[:, None])
                total = total * shrink + tl.sum(p, 1)
                if DROPOUT:
                    p = tl.where(_kept(x, item, head, row, first, BLOCK_Q, BLOCK_K), p, 0.0)
                context = context * shrink[:, None] + _dot(p.to(v.dtype), v)
                largest = new_largest
        context *= ((_scale_of_kept(x.threshold) if DROPOUT else 1.0) / total)[:, None]
        base = _at(x.context, x.context_stride, q_first, head, HEAD_DIM)
        _write(base, x.context_stride, row, queries, context, HEAD_DIM, BLOCK_D)
        place = x.sums + head * 2 * x.rows + q_first + row
        tl.store(place, largest, mask=row < queries)
        tl.store(place + x.rows, total, mask=row < queries)


@triton.jit
def _read_sums(x, head, q_first, row, queries):
    """The largest score of each row, and one over its sum of exponentials; (0, 1) past the item's end."""
    place, exists = x.sums + head * 2 * x.rows + q_first + row, row < queries
    return tl.load(place, mask=exists, other=0.0), 1.0 / tl.load(place + x.rows, mask=exists, other=1.0)


@triton.jit
def _again(
    x, item, head, q, k, v, do, largest, inverse, row, first_column, keys, scale,
    DROPOUT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(P, M ∘ P without M's scale in the inputs' type, dP) of a tile."""
    scores = _scores(q, k, scale, first_column + tl.arange(0, BLOCK_K), keys)
    p = tl.exp2(scores - largest[:, None]) * inverse[:, None]
    dp = _dot(do, tl.trans(v))
    kept_p = p
    if DROPOUT:
        kept = _kept(x, item, head, row, first_column, BLOCK_Q, BLOCK_K)
        kept_p = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * _scale_of_kept(x.threshold), 0.0)
    return p, kept_p.to(do.dtype), dp


@triton.jit
def _backward_keys(
    x, g, item, head, tile, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys; dQ too if it holds ALL keys."""
    k_first, keys = _span(x.cu_k, item)
    first_key = tile * BLOCK_K
    if first_key < keys:
        q_first, queries = _span(x.cu_q, item)
        column = first_key + tl.arange(0, BLOCK_K)
        k = _read(_at(x.k, x.k_stride, k_first, head, HEAD_DIM), x.k_stride, column, keys, HEAD_DIM, BLOCK_D)
        v = _read(_at(x.v, x.v_stride, k_first, head, HEAD_DIM), x.v_stride, column, keys, HEAD_DIM, BLOCK_D)
        q_base = _at(x.q, x.q_stride, q_first, head, HEAD_DIM)
        do_base = _at(g.dcontext, g.dcontext_stride, q_first, head, HEAD_DIM)
        dq_base = _at(g.dq, g.dq_stride, q_first, head, HEAD_DIM)
        dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        for first in range(0, queries, BLOCK_Q):
            row = first + tl.arange(0, BLOCK_Q)
            q = _read(q_base, x.q_stride, row, queries, HEAD_DIM, BLOCK_D)
            do = _read(do_base, g.dcontext_stride, row, queries, HEAD_DIM, BLOCK_D)
            largest, inverse = _read_sums(x, head, q_first, row, queries)
            p, kept_p, dp = _again(
                x, item, head, q, k, v, do, largest, inverse, row, first_key, keys, scale, DROPOUT, BLOCK_Q, BLOCK_K
            )
            dv += _dot(tl.trans(kept_p), do)
            if ALL:
                delta = tl.sum(p * dp, 1)
            else:
                delta = tl.load(g.delta + head * x.rows + q_first + row, mask=row < queries, other=0.0)
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dk += _dot(tl.trans(ds), q)
            if ALL:
                _write(dq_base, g.dq_stride, row, queries, _dot(ds, k) * scale, HEAD_DIM, BLOCK_D)
        if DROPOUT:
            dv *= _scale_of_kept(x.threshold)
        dk_base = _at(g.dk, g.dk_stride, k_first, head, HEAD_DIM)
        dv_base = _at(g.dv, g.dv_stride, k_first, head, HEAD_DIM)
        _write(dk_base, g.dk_stride, column, keys, dk * scale, HEAD_DIM, BLOCK_D)
        _write(dv_base, g.dv_stride, column, keys, dv, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_queries(
    x, g, item, head, tile, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries; dK and dV too if it holds ALL queries."""
    q_first, queries = _span(x.cu_q, item)
    if tile * BLOCK_Q < queries:
        k_first, keys = _span(x.cu_k, item)
        row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
        q_base = _at(x.q, x.q_stride, q_first, head, HEAD_DIM)
        o_base = _at(x.context, x.context_stride, q_first, head, HEAD_DIM)
        do_base = _at(g.dcontext, g.dcontext_stride, q_first, head, HEAD_DIM)
        q = _read(q_base, x.q_stride, row, queries, HEAD_DIM, BLOCK_D)
        do = _read(do_base, g.dcontext_stride, row, queries, HEAD_DIM, BLOCK_D)
        largest, inverse = _read_sums(x, head, q_first, row, queries)
        k_base = _at(x.k, x.k_stride, k_first, head, HEAD_DIM)
        v_base = _at(x.v, x.v_stride, k_first, head, HEAD_DIM)
        dk_base = _at(g.dk, g.dk_stride, k_first, head, HEAD_DIM)
        dv_base = _at(g.dv, g.dv_stride, k_first, head, HEAD_DIM)
        if do.dtype == tl.float32:
            # What dO ∘ O sums to is rounded apart from dP, and dP - delta may be next to nothing (0 for a row with one key).
            delta = tl.zeros([BLOCK_Q], tl.float32)
            for first in range(0, keys, BLOCK_K):
                column = first + tl.arange(0, BLOCK_K)
                k = _read(k_base, x.k_stride, column, keys, HEAD_DIM, BLOCK_D)
                v = _read(v_base, x.v_stride, column, keys, HEAD_DIM, BLOCK_D)
                p, kept_p, dp = _again(
                    x, item, head, q, k, v, do, largest, inverse, row, first, keys, scale, DROPOUT, BLOCK_Q, BLOCK_K
                )
                delta += tl.sum(p * dp, 1)
        else:
            o = _read(o_base, x.context_stride, row, queries, HEAD_DIM, BLOCK_D)
            delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        for first in range(0, keys, BLOCK_K):
            column = first + tl.arange(0, BLOCK_K)
            k = _read(k_base, x.k_stride, column, keys, HEAD_DIM, BLOCK_D)
            v = _read(v_base, x.v_stride, column, keys, HEAD_DIM, BLOCK_D)
            p, kept_p, dp = _again(
                x, item, head, q, k, v, do, largest, inverse, row, first, keys, scale, DROPOUT, BLOCK_Q, BLOCK_K
            )
            ds = (p * (dp - delta[:, None])).to(q.dtype)
            dq += _dot(ds, k)
            if ALL:
                dv = _dot(tl.trans(kept_p), do)
                if DROPOUT:
                    dv *= _scale_of_kept(x.threshold)
                _write(dv_base, g.dv_stride, column, keys, dv, HEAD_DIM, BLOCK_D)
                _write(dk_base, g.dk_stride, column, keys, _dot(tl.trans(ds), q) * scale, HEAD_DIM, BLOCK_D)
        dq_base = _at(g.dq, g.dq_stride, q_first, head, HEAD_DIM)
        _write(dq_base, g.dq_stride, row, queries, dq * scale, HEAD_DIM, BLOCK_D)
        if not ALL:
            tl.store(g.delta + head * x.rows + q_first + row, delta, mask=row < queries)


@triton.jit
def _backward_tile(
    x, g, item, head, tile, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, ALL: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    if OF_KEYS:
        _backward_keys(x, g, item, head, tile, scale, HEAD_DIM, BLOCK_D, DROPOUT, BLOCK_Q, BLOCK_K, ALL)
    else:
        _backward_queries(x, g, item, head, tile, scale, HEAD_DIM, BLOCK_D, DROPOUT, BLOCK_Q, BLOCK_K, ALL)


# The kernels. Each has two parts, a and b, with programs of their own in one grid: (tiles of a, then of b; heads; items). So
# programs of the same item follow each other, and what several of them read comes from the cache.

_VARYING = [
    *(f"{name}_{part}" for name in ("seed", "site", "threshold", "rows") for part in "ab"),
    "tiles_a",
]
"""Integers whose value must not decide what is compiled."""


@triton.jit(do_not_specialize=_VARYING)
def _forward(
    q_a, k_a, v_a, q_stride_a, k_stride_a, v_stride_a, cu_q_a, cu_k_a, item_key_a,
    step_a, seed_a: tl.uint32, site_a: tl.uint32, threshold_a: tl.uint32, context_a, context_stride_a, sums_a, rows_a,
    q_b, k_b, v_b, q_stride_b, k_stride_b, v_stride_b, cu_q_b, cu_k_b, item_key_b,
    step_b, seed_b: tl.uint32, site_b: tl.uint32, threshold_b: tl.uint32, context_b, context_stride_b, sums_b, rows_b,
    scale, tiles_a,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q_A: tl.constexpr, BLOCK_K_A: tl.constexpr, ALL_A: tl.constexpr,
    BLOCK_Q_B: tl.constexpr, BLOCK_K_B: tl.constexpr, ALL_B: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if TWO and tile >= tiles_a:
        b = _Inputs(
            q_b, k_b, v_b, q_stride_b, k_stride_b, v_stride_b, cu_q_b, cu_k_b, item_key_b,
            step_b, seed_b, site_b, threshold_b, context_b, context_stride_b, sums_b, rows_b,
        )  # fmt: skip
        _forward_tile(b, item, head, tile - tiles_a, scale, HEAD_DIM, BLOCK_D, DROPOUT, BLOCK_Q_B, BLOCK_K_B, ALL_B)
    else:
        a = _Inputs(
            q_a, k_a, v_a, q_stride_a, k_stride_a, v_stride_a, cu_q_a, cu_k_a, item_key_a,
            step_a, seed_a, site_a, threshold_a, context_a, context_stride_a, sums_a, rows_a,
        )  # fmt: skip
        _forward_tile(a, item, head, tile, scale, HEAD_DIM, BLOCK_D, DROPOUT, BLOCK_Q_A, BLOCK_K_A, ALL_A)


@triton.jit(do_not_specialize=_VARYING)
def _backward(
    q_a, k_a, v_a, q_stride_a, k_stride_a, v_stride_a, cu_q_a, cu_k_a, item_key_a,
    step_a, seed_a: tl.uint32, site_a: tl.uint32, threshold_a: tl.uint32, context_a, context_stride_a, sums_a, rows_a,
    dcontext_a, dq_a, dk_a, dv_a, dcontext_stride_a, dq_stride_a, dk_stride_a, dv_stride_a, delta_a,
    q_b, k_b, v_b, q_stride_b, k_stride_b, v_stride_b, cu_q_b, cu_k_b, item_key_b,
    step_b, seed_b: tl.uint32, site_b: tl.uint32, threshold_b: tl.uint32, context_b, context_stride_b, sums_b, rows_b,
    dcontext_b, dq_b, dk_b, dv_b, dcontext_stride_b, dq_stride_b, dk_stride_b, dv_stride_b, delta_b,
    scale, tiles_a,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_Q_A: tl.constexpr, BLOCK_K_A: tl.constexpr, ALL_A: tl.constexpr, OF_KEYS_A: tl.constexpr,
    BLOCK_Q_B: tl.constexpr, BLOCK_K_B: tl.constexpr, ALL_B: tl.constexpr, OF_KEYS_B: tl.constexpr, TWO: tl.constexpr,
):  # fmt: skip
    tile, head, item = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if TWO and tile >= tiles_a:
        b = _Inputs(
            q_b, k_b, v_b, q_stride_b, k_stride_b, v_stride_b, cu_q_b, cu_k_b, item_key_b,
            step_b, seed_b, site_b, threshold_b, context_b, context_stride_b, sums_b, rows_b,
        )  # fmt: skip
        gb = _Gradients(dcontext_b, dq_b, dk_b, dv_b, dcontext_stride_b, dq_stride_b, dk_stride_b, dv_stride_b, delta_b)
        _backward_tile(
            b, gb, item, head, tile - tiles_a, scale,
            HEAD_DIM, BLOCK_D, DROPOUT, BLOCK_Q_B, BLOCK_K_B, ALL_B, OF_KEYS_B,
        )  # fmt: skip
    else:
        a = _Inputs(
            q_a, k_a, v_a, q_stride_a, k_stride_a, v_stride_a, cu_q_a, cu_k_a, item_key_a,
            step_a, seed_a, site_a, threshold_a, context_a, context_stride_a, sums_a, rows_a,
        )  # fmt: skip
        ga = _Gradients(dcontext_a, dq_a, dk_a, dv_a, dcontext_stride_a, dq_stride_a, dk_stride_a, dv_stride_a, delta_a)
        _backward_tile(
            a, ga, item, head, tile, scale,
            HEAD_DIM, BLOCK_D, DROPOUT, BLOCK_Q_A, BLOCK_K_A, ALL_A, OF_KEYS_A,
        )  # fmt: skip


# Which programs a launch has, and the sizes of their tiles: found by compiling for sm_80 and sm_90, the largest without spills.
# In float32, products take no tensor cores but many registers, so tiles are small.


class _Part(NamedTuple):
    """One kind of program of a launch."""

    direction: int
    tiles: int
    block_q: int
    block_k: int
    all: bool
    """Forward: one tile holds every key. Backward: the program's tile holds all of its side."""
    of_keys: bool = False
    """Backward: programs have a tile of keys, rather than of queries."""


class _Sizes(NamedTuple):
    """What a kernel is compiled for, besides its tiles."""

    dtype: torch.dtype
    head_dim: int
    directions: int
    dropout: bool

    @property
    def full(self) -> bool:
        """Whether products are in full precision."""
        return self.dtype is torch.float32

    @property
    def wide(self) -> bool:
        """Whether a head asks for eight warps."""
        return self.head_dim > 64

    def options(self, backward: bool) -> dict[str, int]:
        """Of a launch. With two stages, the next tile of a loop is on its way while one is worked on."""
        warps = 8 if self.wide and not (self.full and backward) else 4
        return {"num_warps": warps, "num_stages": 1 if self.full else 2}

    def forward(self, direction: int, queries: int, keys: int) -> _Part:
        """For items of up to so many queries and keys."""
        if self.full:
            block_q, block_k = 32, 16
        elif self.wide and max(queries, keys) <= 64:
            block_q, block_k = 64, 64
        else:
            block_q = 32 if queries <= 32 else 128 if self.wide and queries > 64 else 64
            block_k = 32 if keys <= 32 else 64
        return _Part(direction, triton.cdiv(queries, block_q), block_q, block_k, keys <= block_k)

    def backward(self, direction: int, queries: int, keys: int) -> list[_Part]:
        """One part that does everything, or one for dQ and then one for dK and dV."""
        if keys <= 64 and not self.full:
            return [_Part(direction, 1, 32, 32 if keys <= 32 else 64, all=True, of_keys=True)]
        if queries <= 64 and not self.full:
            blocks = (64, 32) if queries > 32 else (32, 64 if self.wide else 32)
            return [_Part(direction, 1, *blocks, all=True)]
        if self.full:
            of_queries = (16, 16 if self.wide and self.directions == 1 else 32)
            of_keys = (16, 16 if self.wide else 32)
        else:
            of_queries, of_keys = (128 if self.wide else 64, 32), (32, 64 if self.wide else 32)
        return [
            _Part(direction, triton.cdiv(queries, of_queries[0]), *of_queries, all=False),
            _Part(direction, triton.cdiv(keys, of_keys[1]), *of_keys, all=False, of_keys=True),
        ]

    def constexprs(self, launch: _Launch) -> dict[str, Any]:
        """The constants that both kernels have."""
        a, b = launch[0], launch[-1]
        return {
            "HEAD_DIM": self.head_dim, "BLOCK_D": max(triton.next_power_of_2(self.head_dim), 16),
            "DROPOUT": self.dropout, "TWO": len(launch) == 2,
            "BLOCK_Q_A": a.block_q, "BLOCK_K_A": a.block_k, "ALL_A": a.all,
            "BLOCK_Q_B": b.block_q, "BLOCK_K_B": b.block_k, "ALL_B": b.all,
        }  # fmt: skip


_Launch = tuple[_Part, ...]
"""One or two parts."""

_Longest = tuple[int, int]
"""(queries, keys) of the longest items of a direction."""


def _forward_launch(sizes: _Sizes, longest: Sequence[_Longest]) -> _Launch:
    """Every direction in one launch."""
    return tuple(sizes.forward(i, *of) for i, of in enumerate(longest))


def _backward_launches(sizes: _Sizes, longest: Sequence[_Longest]) -> list[_Launch]:
    """One, or two one after the other. Two directions have as many, since they share their sides."""
    return list(zip(*(sizes.backward(i, *of) for i, of in enumerate(longest)), strict=True))


def _backward_constexprs(sizes: _Sizes, launch: _Launch) -> dict[str, Any]:
    return sizes.constexprs(launch) | {"OF_KEYS_A": launch[0].of_keys, "OF_KEYS_B": launch[-1].of_keys}


# The launchers.


def _sizes(directions: Sequence[Direction], heads: int) -> tuple[_Sizes, list[_Longest]]:
    q = directions[0].q
    sizes = _Sizes(q.dtype, q.shape[1] // heads, len(directions), any(d.dropout is not None for d in directions))
    return sizes, [(d.q_rows.max_seqlen, d.k_rows.max_seqlen) for d in directions]


def _inputs(d: Direction) -> _Inputs:
    # Without dropout there is no step to read; where the other direction has one, nothing falls below a threshold of 0.
    step, seed, site, threshold = d.q_rows.item_key, 0, 0, 0
    if d.dropout is not None:
        told = triton_arguments(d.dropout, d.q_rows.item_key, d.q_rows.item_key)
        step, seed, site, threshold = told["step"], told["seed"], told["site"], told["threshold"]
    return _Inputs(
        d.q, d.k, d.v, d.q.stride(0), d.k.stride(0), d.v.stride(0),
        d.q_rows.cu_seqlens, d.k_rows.cu_seqlens, d.q_rows.item_key, step, seed, site, threshold,
        d.context, d.context.stride(0), d.sums, d.q_rows.total,
    )  # fmt: skip


def _gradients(g: Gradients, sums: Tensor) -> _Gradients:
    strides = [x.stride(0) for x in g]
    return _Gradients(*g, *strides, sums.new_empty(sums.numel() // 2))  # type: ignore[call-arg]


def forward(directions: Sequence[Direction], heads: int) -> None:
    """Context and sums of one or two directions, in one launch."""
    items = directions[0].q_rows.n
    if not items:
        return
    sizes, longest = _sizes(directions, heads)
    launch = _forward_launch(sizes, longest)
    a, b = (_inputs(directions[part.direction]) for part in (launch[0], launch[-1]))
    tiles = sum(part.tiles for part in launch)
    _forward[tiles, heads, items](
        *a, *b, sizes.head_dim**-0.5, launch[0].tiles,
        **sizes.constexprs(launch), **sizes.options(backward=False),
    )  # fmt: skip


def backward(directions: Sequence[Direction], gradients: Sequence[Gradients], heads: int) -> None:
    """dq, dk and dv of one or two directions, in one launch or two."""
    items = directions[0].q_rows.n
    if not items:
        return
    sizes, longest = _sizes(directions, heads)
    inputs = [_inputs(d) for d in directions]
    outputs = [_gradients(g, d.sums) for g, d in zip(gradients, directions, strict=True)]
    for launch in _backward_launches(sizes, longest):
        first, last = launch[0].direction, launch[-1].direction
        tiles = sum(part.tiles for part in launch)
        _backward[tiles, heads, items](
            *inputs[first], *outputs[first], *inputs[last], *outputs[last], sizes.head_dim**-0.5, launch[0].tiles,
            **_backward_constexprs(sizes, launch), **sizes.options(backward=True),
        )  # fmt: skip


# For ahead-of-time compilation.

_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
_TYPES = {
    **dict.fromkeys(("cu_q", "cu_k"), "*i32"),
    **dict.fromkeys(("item_key", "step"), "*i64"),
    **dict.fromkeys(("seed", "site", "threshold"), "u32"),
    **dict.fromkeys((f"{name}_stride" for name in ("q", "k", "v", "context", "dcontext", "dq", "dk", "dv")), "i32:16"),
    "sums": "*fp32",
    "delta": "*fp32",
    "rows": "i32",
}
"""Of the arguments of either part that are not tensors of the op's dtype."""


def variants(op: str, head_dim: int, longest: Iterable[Sequence[_Longest]]) -> list[Variant]:
    """The kernels that runs pick whose longest items are `longest`: (queries, keys) of each direction."""
    found = []
    for dtype in _POINTERS:
        for dropout in (True, False):
            for of in longest:
                sizes = _Sizes(dtype, head_dim, len(of), dropout)
                launch = _forward_launch(sizes, of)
                found.append(_variant(op, _forward, sizes, launch, sizes.constexprs(launch)))
                for launch in _backward_launches(sizes, of):
                    found.append(_variant(op, _backward, sizes, launch, _backward_constexprs(sizes, launch)))
    return list({(variant.name, variant.dtype): variant for variant in found}.values())


def _variant(op: str, kernel: Any, sizes: _Sizes, launch: _Launch, constexprs: dict[str, Any]) -> Variant:
    pointer = _POINTERS[sizes.dtype]
    types = {
        f"{name}_{part}": _TYPES.get(name, pointer) for name in _Inputs._fields + _Gradients._fields for part in "ab"
    }
    types |= {"scale": "fp32", "tiles_a": "i32"} | dict.fromkeys(constexprs, "constexpr")
    backward = kernel is _backward
    programs = " + ".join(
        f"{'all ' * part.all}{part.block_q} x {part.block_k}{' of keys' * part.of_keys}" for part in launch
    )
    return Variant(
        op=op,
        name=f"{'backward' if backward else 'forward'} D={sizes.head_dim}{' dropout' * sizes.dropout}: {programs}",
        kernel=kernel,
        signature={argument: types[argument] for argument in kernel.arg_names},
        constexprs=constexprs,
        **sizes.options(backward),
        dtype=str(sizes.dtype).removeprefix("torch."),
        dot=True,
        copies=not sizes.full and (backward or not all(part.all for part in launch)),
    )
