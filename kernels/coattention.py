"""Co-attention: both directions of the bridge between the streams (paper section 3.1, spec section 1.4).

    text reads image:  text context  = dropout(softmax(q_text k_imageᵀ / √D)) v_image
    image reads text:  image context = dropout(softmax(q_image k_textᵀ / √D)) v_text

The directions share no operand; one call takes both, so that a fused kernel can run them in one launch. The kernels are those
of `attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import attention_triton
from kernels.attention import BACKWARD, FORWARD, attention_torch, copy_into, direction, gradients
from kernels.backends import Saved, choose
from kernels.dropout import Dropout
from kernels.recorded import Recorded
from kernels.rows import Rows
from kernels.variants import Variant

QKV = tuple[Tensor, Tensor, Tensor]
"""(q, k, v) of one stream, or their gradients."""


def coattention_forward(
    text: QKV,
    image: QKV,
    text_rows: Rows,
    image_rows: Rows,
    heads: int,
    text_dropout: Dropout | None,
    image_dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Saved]:
    """(`coattention`'s two results, what `coattention_backward` needs), outside of autograd."""
    backend = choose("coattention", text[0])
    if backend == "torch":
        more = (text_rows, image_rows, heads, text_dropout, image_dropout)
        recorded = Recorded(lambda *x: coattention_torch(x[:3], x[3:], *more), *text, *image)
        return *recorded.outputs, Saved(backend, (recorded,))  # type: ignore[return-value]
    (q_text, k_text, v_text), (q_image, k_image, v_image) = text, image
    directions = [
        direction(q_text, k_image, v_image, text_rows, image_rows, heads, text_dropout),
        direction(q_image, k_text, v_text, image_rows, text_rows, heads, image_dropout),
    ]
    if q_text.shape[1] != q_image.shape[1] or q_text.dtype != q_image.dtype:
        raise ValueError(f"text is {q_text.shape[1]} wide ({q_text.dtype}), image {q_image.shape[1]} ({q_image.dtype})")
    FORWARD[backend](directions, heads)
    contexts = [d.context for d in directions]
    kept = [d._replace(context=d.context.detach()) for d in directions]
    return contexts[0], contexts[1], Saved(backend, (kept, heads))


def coattention_backward(saved: Saved, dtext_context: Tensor, dimage_context: Tensor, dtext: QKV, dimage: QKV) -> None:
    """Writes the gradients of each stream's own q, k and v into `dtext` and `dimage`; as `attention_backward` otherwise."""
    if saved.backend == "torch":
        (recorded,) = saved.values
        copy_into((*dtext, *dimage), recorded.backward(dtext_context, dimage_context))
        return
    directions, heads = saved.values
    (dq_text, dk_text, dv_text), (dq_image, dk_image, dv_image) = dtext, dimage
    of_directions = [
        gradients(directions[0], dtext_context, dq_text, dk_image, dv_image),
        gradients(directions[1], dimage_context, dq_image, dk_text, dv_text),
    ]
    BACKWARD[saved.backend](directions, of_directions, heads)


class _Coattention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        text, image = inputs[:3], inputs[3:6]
        text_context, image_context, ctx.saved = coattention_forward(text, image, *inputs[6:])
        ctx.save_for_backward(*inputs[:6])
        return text_context, image_context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtext_context: Tensor, dimage_context: Tensor) -> Any:
        empty = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors]
        dq_text, dk_text, dv_text, dq_image, dk_image, dv_image = empty
        dtext, dimage = (dq_text, dk_text, dv_text), (dq_image, dk_image, dv_image)
        coattention_backward(ctx.saved, dtext_context, dimage_context, dtext, dimage)
        return *dtext, *dimage, None, None, None, None, None


def coattention(
    text: QKV,
    image: QKV,
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
    text: QKV,
    image: QKV,
    text_rows: Rows,
    image_rows: Rows,
    heads: int,
    text_dropout: Dropout | None = None,
    image_dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain reference: one attention each."""
    (q_text, k_text, v_text), (q_image, k_image, v_image) = text, image
    text_context = attention_torch(q_text, k_image, v_image, text_rows, image_rows, heads, text_dropout)
    image_context = attention_torch(q_image, k_text, v_text, image_rows, text_rows, heads, image_dropout)
    return text_context, image_context


def variants() -> list[Variant]:
    """Every Triton kernel that the full model's bridges launch: 8 heads of 128, texts and images on both sides of each tile."""
    lengths = (32, 64, 65)
    return attention_triton.variants("coattention", 128, [((t, r), (r, t)) for t in lengths for r in lengths])
