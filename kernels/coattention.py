"""Co-attention: both directions of the bridge between the streams (paper section 3.1, spec section 1.4).

    text reads image:  text context  = dropout(softmax(q_text k_imageᵀ / √D)) v_image
    image reads text:  image context = dropout(softmax(q_image k_textᵀ / √D)) v_text

The directions share no operand, but a launch: forward is one, backward at most two, over both. Kernels and launchers are
those of `attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.attention import BACKWARD, FORWARD, Gradients, as_rows, attention_torch, copy_into, direction
from kernels.backends import Saved, choose
from kernels.dropout import Dropout
from kernels.recorded import Recorded
from kernels.rows import Rows

Projections = tuple[Tensor, Tensor, Tensor]
"""q, k and v of one stream, [rows, N * D], maybe strided."""


def coattention_forward(
    text: Projections,
    image: Projections,
    text_rows: Rows,
    image_rows: Rows,
    heads: int,
    text_dropout: Dropout | None,
    image_dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Saved]:
    """(text context, image context, what `coattention_backward` needs), outside of autograd."""
    backend = choose("coattention", text[0])
    if backend == "torch":
        recorded = Recorded(
            lambda *x: coattention_torch(x[:3], x[3:], text_rows, image_rows, heads, text_dropout, image_dropout),
            *text, *image,
        )  # fmt: skip
        return *recorded.outputs, Saved(backend, (recorded,))  # type: ignore[return-value]
    (q_text, k_text, v_text), (q_image, k_image, v_image) = text, image
    reads = (
        direction(q_text, k_image, v_image, text_rows, image_rows, heads, text_dropout),
        direction(q_image, k_text, v_text, image_rows, text_rows, heads, image_dropout),
    )
    FORWARD[backend](reads, heads)
    kept = tuple(d._replace(context=d.context.detach()) for d in reads)
    return reads[0].context, reads[1].context, Saved(backend, (kept, heads))


def coattention_backward(
    saved: Saved, dtext_context: Tensor, dimage_context: Tensor, dtext: Projections, dimage: Projections
) -> None:
    """Writes the gradients of each stream's own q, k and v into `dtext` and `dimage`, maybe strided rows."""
    if saved.backend == "torch":
        (recorded,) = saved.values
        copy_into((*dtext, *dimage), recorded.backward(dtext_context, dimage_context))
        return
    directions, heads = saved.values
    (dq_text, dk_text, dv_text), (dq_image, dk_image, dv_image) = dtext, dimage
    gradients = (
        Gradients(as_rows(dtext_context), dq_text, dk_image, dv_image),
        Gradients(as_rows(dimage_context), dq_image, dk_text, dv_text),
    )
    BACKWARD[saved.backend](directions, gradients, heads)


class _Coattention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        projections, more = arguments[:6], arguments[6:]
        text_context, image_context, ctx.saved = coattention_forward(projections[:3], projections[3:], *more)
        ctx.save_for_backward(*projections)
        return text_context, image_context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtext_context: Tensor, dimage_context: Tensor) -> Any:
        g = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors]
        coattention_backward(ctx.saved, dtext_context, dimage_context, (g[0], g[1], g[2]), (g[3], g[4], g[5]))
        return *g, None, None, None, None, None


def coattention(
    text: Projections,
    image: Projections,
    text_rows: Rows,
    image_rows: Rows,
    heads: int,
    text_dropout: Dropout | None = None,
    image_dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """(text context [T, N * D], image context [R, N * D]) from (q, k, v) of each stream, [rows, N * D], maybe strided.

    `text_dropout` acts where text reads the image, `image_dropout` where the image reads the text.
    """
    more = (text_rows, image_rows, heads, text_dropout, image_dropout)
    if choose("coattention", text[0]) == "torch":
        return coattention_torch(text, image, *more)
    contexts: tuple[Tensor, Tensor] = _Coattention.apply(*text, *image, *more)
    return contexts


def coattention_torch(
    text: Projections,
    image: Projections,
    text_rows: Rows,
    image_rows: Rows,
    heads: int,
    text_dropout: Dropout | None = None,
    image_dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain reference: two attentions."""
    (q_text, k_text, v_text), (q_image, k_image, v_image) = text, image
    return (
        attention_torch(q_text, k_image, v_image, text_rows, image_rows, heads, text_dropout),
        attention_torch(q_image, k_text, v_text, image_rows, text_rows, heads, image_dropout),
    )
