"""`TransformerLayer`: a post-LN BERT layer of either stream (spec section 1.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.model.explicit import Fields, run
from engine.model.flat import FlatBlock
from engine.model.randomness import Randomness
from engine.model.sublayers import (
    feed_forward_backward,
    feed_forward_forward,
    projection_backward,
    residual_backward,
    residual_forward,
)
from kernels.attention import attention_backward, attention_forward
from kernels.projection import project
from kernels.rows import Rows


class TransformerLayer(FlatBlock):
    """A post-LN BERT layer of either stream (spec section 1.4)."""

    def __init__(
        self, prefix: str, width: int, heads: int, inner: int, hidden_dropout: float, attention_dropout: float
    ) -> None:
        super().__init__()
        square = (width, width)
        qkv = [(f"attention.self.{part}", square) for part in ("query", "key", "value")]
        self.allocate(
            prefix,
            {
                "qkv": [(f"{name}.weight", shape) for name, shape in qkv],
                "out": [("attention.output.dense.weight", square)],
                "up": [("intermediate.dense.weight", (inner, width))],
                "down": [("output.dense.weight", (width, inner))],
            },
            {
                "qkv_bias": [(f"{name}.bias", (width,)) for name, _ in qkv],
                "out_bias": [("attention.output.dense.bias", (width,))],
                "attention_weight": [("attention.output.LayerNorm.weight", (width,))],
                "attention_shift": [("attention.output.LayerNorm.bias", (width,))],
                "up_bias": [("intermediate.dense.bias", (inner,))],
                "down_bias": [("output.dense.bias", (width,))],
                "weight": [("output.LayerNorm.weight", (width,))],
                "shift": [("output.LayerNorm.bias", (width,))],
            },
        )
        self.width, self.heads = width, heads
        self.hidden_dropout, self.attention_dropout = hidden_dropout, attention_dropout

    def forward(self, x: Tensor, rows: Rows, random: Randomness, first_only: bool = False) -> Tensor:
        """[rows, width] -> [rows, width]; with `first_only`, row 0 of each item alone, [n, width], at its cost."""
        through = _FirstRows if first_only else _AllRows
        return run(self, through(self, rows, random), x)


class _AllRows:
    """Self-attention and feed-forward of every row."""

    def __init__(self, layer: TransformerLayer, rows: Rows, random: Randomness) -> None:
        self.width, self.heads, self.rows, self.out_rows = layer.width, layer.heads, rows, rows
        self.thirds = [layer.width] * 3
        self.attention_dropout = random.dropout(layer.attention_dropout, slot=0)
        self.attended_dropout = random.dropout(layer.hidden_dropout, slot=1)
        self.fed_dropout = random.dropout(layer.hidden_dropout, slot=2)

    def forward(self, w: Fields, x: Tensor) -> tuple[Tensor, Any]:
        qkv = project(x, w["qkv"], w["qkv_bias"])
        q, k, v = qkv.split_with_sizes(self.thirds, 1)
        context, attended = attention_forward(q, k, v, self.rows, self.rows, self.heads, self.attention_dropout)
        y, rest = self.rest_forward(w, context, x)
        return y, (x, attended, rest)

    def backward(self, w: Fields, g: Fields, saved: Any, dy: Tensor) -> tuple[Tensor]:
        x, attended, rest = saved
        dcontext, dx = self.rest_backward(w, g, rest, dy)
        dqkv = dx.new_empty(len(x), 3 * self.width)
        attention_backward(attended, dcontext, *dqkv.split_with_sizes(self.thirds, 1))
        return (projection_backward(w["qkv"], g["qkv"], g["qkv_bias"], x, dqkv, dx),)

    def rest_forward(self, w: Fields, context: Tensor, residual: Tensor) -> tuple[Tensor, Any]:
        """What follows attention."""
        x, attended = residual_forward(w, "", "attention_", context, residual, self.out_rows, self.attended_dropout)
        y, fed = feed_forward_forward(w, "", x, self.out_rows, self.fed_dropout)
        return y, (attended, fed)

    def rest_backward(self, w: Fields, g: Fields, saved: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of context, gradient of the residual)."""
        attended, fed = saved
        return residual_backward(w, g, "", "attention_", attended, feed_forward_backward(w, g, "", fed, dy))


class _FirstRows(_AllRows):
    """The same for row 0 of each item, which reads all rows: the last layer of a pooled head."""

    def __init__(self, layer: TransformerLayer, rows: Rows, random: Randomness) -> None:
        super().__init__(layer, rows, random)
        self.out_rows = rows.first
        self.sizes = [layer.width, 2 * layer.width]

    def forward(self, w: Fields, x: Tensor) -> tuple[Tensor, Any]:
        (q_weight, kv_weight), (q_bias, kv_bias) = w["qkv"].split(self.sizes), w["qkv_bias"].split(self.sizes)
        first = x.index_select(0, self.rows.starts)
        q, kv = project(first, q_weight, q_bias), project(x, kv_weight, kv_bias)
        k, v = kv.split(self.width, 1)
        context, attended = attention_forward(q, k, v, self.out_rows, self.rows, self.heads, self.attention_dropout)
        y, rest = self.rest_forward(w, context, first)
        return y, (x, first, attended, rest)

    def backward(self, w: Fields, g: Fields, saved: Any, dy: Tensor) -> tuple[Tensor]:
        x, first, attended, rest = saved
        dcontext, dfirst = self.rest_backward(w, g, rest, dy)
        dq, dkv = torch.empty_like(dfirst), x.new_empty(len(x), 2 * self.width)
        attention_backward(attended, dcontext, dq, *dkv.split(self.width, 1))
        (q_weight, kv_weight), (gq, gkv) = w["qkv"].split(self.sizes), g["qkv"].split(self.sizes)
        gq_bias, gkv_bias = g["qkv_bias"].split(self.sizes)
        dfirst = projection_backward(q_weight, gq, gq_bias, first, dq, dfirst)
        dx = projection_backward(kv_weight, gkv, gkv_bias, x, dkv)
        return (dx.index_add_(0, self.rows.starts, dfirst),)
