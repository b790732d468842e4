"""Varlen self-attention over packed rows, dropout inside.

    context = dropout(softmax(q kᵀ / √D)) v        per item and head (spec section 1.4)

Shapes: Tq, Tk rows of all items; N heads of D; item i of `q_rows` attends item i of `k_rows` and nothing else.
q, k, v are [rows, N * D] and may be strided views into one packed projection; no permuted copies are asked of the caller.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.dropout import ATTENTION_TILE, Dropout, keep_mask
from kernels.rows import Rows

HEAD_SHIFT = 16
"""In dropout counters, the row of head h and query row r is (h << HEAD_SHIFT) + r."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, dropout: Dropout | None = None
) -> Tensor:
    """[Tq, N * D] context of q [Tq, N * D] over k, v [Tk, N * D]. Softmax in float32, the rest in the given dtype."""
    return attention_torch(q, k, v, q_rows, k_rows, heads, dropout)


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
