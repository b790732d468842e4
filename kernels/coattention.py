"""Co-attention: both directions of the bridge between the streams (paper section 3.1, spec section 1.4).

    text reads image:  text context  = dropout(softmax(q_text k_imageᵀ / √D)) v_image
    image reads text:  image context = dropout(softmax(q_image k_textᵀ / √D)) v_text

The directions share no operand; one call takes both, so that a fused kernel can run them in one launch.
"""

from __future__ import annotations

from torch import Tensor

from kernels.attention import attention_torch
from kernels.dropout import Dropout
from kernels.rows import Rows


def coattention(
    text: tuple[Tensor, Tensor, Tensor],
    image: tuple[Tensor, Tensor, Tensor],
    text_rows: Rows,
    image_rows: Rows,
    heads: int,
    text_dropout: Dropout | None = None,
    image_dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """(text context [T, N * D], image context [R, N * D]) from (q, k, v) of each stream, [rows, N * D], maybe strided.

    `text_dropout` acts where text reads the image, `image_dropout` where the image reads the text.
    """
    (q_text, k_text, v_text), (q_image, k_image, v_image) = text, image
    text_context = attention_torch(q_text, k_image, v_image, text_rows, image_rows, heads, text_dropout)
    image_context = attention_torch(q_image, k_text, v_text, image_rows, text_rows, heads, image_dropout)
    return text_context, image_context
