"""Varlen self-attention over packed rows, dropout inside.

    context = dropout(softmax(q kᵀ / √D)) v        per item and head (spec section 1.4)

Shapes: Tq, Tk rows of all items; N heads of D; item i of `q_rows` attends item i of `k_rows` and nothing else.
q, k, v are [rows, N * D] and may be strided views into one packed projection; no permuted copies are asked of the caller.
Backward computes the probabilities again, from their rows' sums, and draws the dropout mask again.

The Triton kernels stand in `attention_triton.py`: they serve `coattention` too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention_triton
from kernels.backends import Saved, choose
from kernels.dropout import ATTENTION_TILE, Dropout, keep_mask
from kernels.native_library import dtype_code, library, pointer
from kernels.recorded import Recorded
from kernels.rows import Rows
from kernels.variants import Variant

HEAD_SHIFT: int = attention_triton.HEAD_SHIFT.value
"""In dropout counters, the row of head h and query row r is (h << HEAD_SHIFT) + r."""


class Direction(NamedTuple):
    """One attention of a call: items of the query rows read items of the key rows. A bridge has two of them."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_rows: Rows
    k_rows: Rows
    dropout: Dropout | None
    context: Tensor
    """[Tq, N * D], written by forward, read by backward."""
    sums: Tensor
    """float32, 2 * Tq * N values, what backward needs of each row's softmax, in the backend's own form: the logarithm of the
    sum of exponentials (native), or the largest score and the sum of exponentials beside it (Triton)."""


class Gradients(NamedTuple):
    """Of one direction: of its context, and where to write those of its inputs (dim 1 contiguous)."""

    dcontext: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


Forward = Callable[[Sequence[Direction], int], None]
Backward = Callable[[Sequence[Direction], Sequence[Gradients], int], None]


def direction(
    q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, dropout: Dropout | None
) -> Direction:
    """One attention with memory for its outputs. ValueError for shapes that kernels would read past the end of."""
    width = q.shape[1]
    if width % heads or not width == k.shape[1] == v.shape[1]:
        raise ValueError(f"{heads} heads do not fit q, k and v of widths {width}, {k.shape[1]} and {v.shape[1]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v differ in type: {q.dtype}, {k.dtype}, {v.dtype}")
    if q_rows.n != k_rows.n:
        raise ValueError(f"{q_rows.n} items ask, {k_rows.n} items answer")
    for name, x, rows in (("q", q, q_rows), ("k", k, k_rows), ("v", v, k_rows)):
        if x.shape[0] != rows.total:
            raise ValueError(f"{name} has {x.shape[0]} rows, its items have {rows.total}")
    context = torch.empty(q_rows.total, width, dtype=q.dtype, device=q.device)
    sums = torch.empty(2 * q_rows.total * heads, dtype=torch.float32, device=q.device)
    return Direction(as_rows(q), as_rows(k), as_rows(v), q_rows, k_rows, dropout, context, sums)


def gradients(of: Direction, dcontext: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Gradients:
    """Where one direction's gradients come from and go to. ValueError for destinations that kernels cannot write in place."""
    for name, destination, x in (("dq", dq, of.q), ("dk", dk, of.k), ("dv", dv, of.v)):
        if destination.shape != x.shape or destination.dtype != x.dtype or as_rows(destination) is not destination:
            raise ValueError(
                f"{name} should be {x.dtype} {list(x.shape)} with contiguous rows, "
                f"not {destination.dtype} {list(destination.shape)}, {destination.stride()} apart"
            )
    return Gradients(as_rows(dcontext.to(of.context.dtype)), dq, dk, dv)


def as_rows(x: Tensor) -> Tensor:
    """x itself where its rows are contiguous, however far apart; else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


# The native launchers. The structure is StopgoDirection of native/stopgo.h.


class _NativeDirection(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((name, ctypes.c_int64) for name in ("q_stride", "k_stride", "v_stride")),
        *((name, ctypes.c_void_p) for name in ("cu_q", "cu_k", "item_key")),
        *((name, ctypes.c_uint32) for name in ("seed", "step", "site", "threshold")),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("lse", ctypes.c_void_p),
        ("dout", ctypes.c_void_p),
        ("dout_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("dq", "dk", "dv")),
        *((name, ctypes.c_int64) for name in ("dq_stride", "dk_stride", "dv_stride")),
    )


def _native_direction(d: Direction, gradients: Gradients | None = None) -> _NativeDirection:
    native = _NativeDirection(
        q=pointer(d.q), k=pointer(d.k), v=pointer(d.v),
        q_stride=d.q.stride(0), k_stride=d.k.stride(0), v_stride=d.v.stride(0),
        cu_q=pointer(d.q_rows.cu_seqlens), cu_k=pointer(d.k_rows.cu_seqlens), item_key=pointer(d.q_rows.item_key),
        out=pointer(d.context), out_stride=d.context.stride(0), lse=pointer(d.sums),
    )  # fmt: skip
    if d.dropout is not None:
        native.seed, native.step, native.site = d.dropout.seed, int(d.dropout.step), d.dropout.site
        native.threshold = d.dropout.threshold
    if gradients is not None:
        g = gradients
        native.dout, native.dout_stride = pointer(g.dcontext), g.dcontext.stride(0)
        native.dq, native.dk, native.dv = pointer(g.dq), pointer(g.dk), pointer(g.dv)
        native.dq_stride, native.dk_stride, native.dv_stride = (x.stride(0) for x in (g.dq, g.dk, g.dv))
    return native


def _native_sizes(directions: Sequence[Direction], heads: int) -> tuple[int, int, int]:
    """(items, heads, head_dim) of a call."""
    first = directions[0]
    return first.q_rows.n, heads, first.q.shape[1] // heads


def _forward_native(directions: Sequence[Direction], heads: int) -> None:
    array = (_NativeDirection * len(directions))(*map(_native_direction, directions))
    dtype = dtype_code(directions[0].q)
    library().stopgo_attention_forward(dtype, len(directions), array, *_native_sizes(directions, heads))


def _backward_native(directions: Sequence[Direction], gradients: Sequence[Gradients], heads: int) -> None:
    array = (_NativeDirection * len(directions))(*map(_native_direction, directions, gradients))
    dtype = dtype_code(directions[0].q)
    library().stopgo_attention_backward(dtype, len(directions), array, *_native_sizes(directions, heads))


FORWARD: dict[str, Forward] = {"triton": attention_triton.forward, "native": _forward_native}
"""Writes context and sums of every direction."""

BACKWARD: dict[str, Backward] = {"triton": attention_triton.backward, "native": _backward_native}
"""Writes dq, dk and dv of every direction."""


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, dropout: Dropout | None
) -> tuple[Tensor, Saved]:
    """(`attention`'s result, what `attention_backward` needs), outside of autograd."""
    backend = choose("attention", q)
    if backend == "torch":
        recorded = Recorded(lambda q, k, v: attention_torch(q, k, v, q_rows, k_rows, heads, dropout), q, k, v)
        return recorded.outputs[0], Saved(backend, (recorded,))
    d = direction(q, k, v, q_rows, k_rows, heads, dropout)
    FORWARD[backend]([d], heads)
    return d.context, Saved(backend, (d._replace(context=d.context.detach()), heads))


def attention_backward(saved: Saved, dcontext: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes the gradients of q, k and v under `dcontext` [Tq, N * D]; all may be strided rows, none may overlap."""
    if saved.backend == "torch":
        (recorded,) = saved.values
        copy_into((dq, dk, dv), recorded.backward(dcontext))
    else:
        d, heads = saved.values
        BACKWARD[saved.backend]([d], [gradients(d, dcontext, dq, dk, dv)], heads)


def copy_into(destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Each source into its destination."""
    for destination, source in zip(destinations, sources, strict=True):
        destination.copy_(source)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> Tensor:
        context, ctx.saved = attention_forward(q, k, v, *more)
        ctx.save_for_backward(q, k, v)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcontext: Tensor) -> Any:
        gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors]
        attention_backward(ctx.saved, dcontext, *gradients)
        return *gradients, None, None, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, dropout: Dropout | None = None
) -> Tensor:
    """[Tq, N * D] context of q [Tq, N * D] over k, v [Tk, N * D]. Softmax in float32, the rest in the given dtype."""
    if choose("attention", q) == "torch":
        return attention_torch(q, k, v, q_rows, k_rows, heads, dropout)
    context: Tensor = _Attention.apply(q, k, v, q_rows, k_rows, heads, dropout)
    return context


def variants() -> list[Variant]:
    """Every Triton kernel that the full model's layers launch: heads of 64 (text) and of 128 (image), all rows or the first."""
    lengths = [((queries, keys),) for keys in (32, 64, 65) for queries in (keys, 1)]
    return [v for head_dim in (64, 128) for v in attention_triton.variants("attention", head_dim, lengths)]


def attention_torch(
    q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, dropout: Dropout | None = None
) -> Tensor:
    """The plain reference: pads inside, three batched products, unpads."""
    width = q.shape[-1]
    q4, k4, v4 = (_padded(x, rows, heads) for x, rows in ((q, q_rows), (k, k_rows), (v, k_rows)))
    scores = (q4 @ k4.transpose(-1, -2)).float() * (width // heads) ** -0.5
    scores = scores.masked_fill(k_rows.is_padding[:, None, None, :], float("-inf"))
    probabilities = scores.softmax(-1)
    if dropout is not None:
        probabilities = probabilities * _scaled_keep(dropout, q_rows, k_rows, heads)
    context = (probabilities.to(v.dtype) @ v4).transpose(1, 2).reshape(-1, width)
    return context if q_rows.total == context.shape[0] else context[q_rows.slots]


def _padded(x: Tensor, rows: Rows, heads: int) -> Tensor:
    """[n, heads, max_seqlen, D]; padded places are zeros."""
    places = rows.n * rows.max_seqlen
    if places != rows.total:
        x = x.new_zeros(places, x.shape[-1]).index_copy(0, rows.slots, x)
    return x.view(rows.n, rows.max_seqlen, heads, -1).transpose(1, 2)


def _scaled_keep(dropout: Dropout, q_rows: Rows, k_rows: Rows, heads: int) -> Tensor:
    """float32 [n, heads, max q, max k]: 0 for dropped places, the dropout's scale for kept ones."""
    device = q_rows.item_key.device
    row = torch.arange(q_rows.max_seqlen, device=device)
    row = row[None, :] + (torch.arange(heads, device=device)[:, None] << HEAD_SHIFT)
    shape = (q_rows.n, heads, q_rows.max_seqlen)
    key, index = (part.expand(shape).reshape(-1) for part in (q_rows.item_key[:, None, None], row[None]))
    keep = keep_mask(dropout, key, index, k_rows.max_seqlen, ATTENTION_TILE)
    return keep.view(*shape, k_rows.max_seqlen) * dropout.scale
