"""`Bridge`: a co-attention layer, where the streams read each other (paper section 3.1, spec section 1.4).

Shape letters: T text rows, R region rows, D text width, V image width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.model.config import ModelConfig
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
from kernels.coattention import coattention_backward, coattention_forward
from kernels.projection import project
from kernels.rows import Rows


class Bridge(FlatBlock):
    """A co-attention layer: each stream reads the other, then its own feed-forward (spec section 1.4).

    In published names suffix 1 is the image, 2 the text. `q_dense1` and `q_dense2`, which nothing ever calls, are not
    parts of this block; `engine.model.published` carries them.
    """

    def __init__(self, prefix: str, config: ModelConfig) -> None:
        super().__init__()
        text, image, inner = config.hidden_size, config.v_hidden_size, config.bi_hidden_size
        text_ff, image_ff = config.intermediate_size, config.v_intermediate_size
        qkv = ("query", "key", "value")
        self.allocate(
            prefix,
            {
                "image_qkv": [(f"biattention.{part}1.weight", (inner, image)) for part in qkv],
                "text_qkv": [(f"biattention.{part}2.weight", (inner, text)) for part in qkv],
                "image_out": [("biOutput.dense1.weight", (image, inner))],
                "text_out": [("biOutput.dense2.weight", (text, inner))],
                "image_up": [("v_intermediate.dense.weight", (image_ff, image))],
                "image_down": [("v_output.dense.weight", (image, image_ff))],
                "text_up": [("t_intermediate.dense.weight", (text_ff, text))],
                "text_down": [("t_output.dense.weight", (text, text_ff))],
            },
            {
                "image_qkv_bias": [(f"biattention.{part}1.bias", (inner,)) for part in qkv],
                "text_qkv_bias": [(f"biattention.{part}2.bias", (inner,)) for part in qkv],
                "image_out_bias": [("biOutput.dense1.bias", (image,))],
                "image_bridge_weight": [("biOutput.LayerNorm1.weight", (image,))],
                "image_bridge_shift": [("biOutput.LayerNorm1.bias", (image,))],
                "text_out_bias": [("biOutput.dense2.bias", (text,))],
                "text_bridge_weight": [("biOutput.LayerNorm2.weight", (text,))],
                "text_bridge_shift": [("biOutput.LayerNorm2.bias", (text,))],
                "image_up_bias": [("v_intermediate.dense.bias", (image_ff,))],
                "image_down_bias": [("v_output.dense.bias", (image,))],
                "image_weight": [("v_output.LayerNorm.weight", (image,))],
                "image_shift": [("v_output.LayerNorm.bias", (image,))],
                "text_up_bias": [("t_intermediate.dense.bias", (text_ff,))],
                "text_down_bias": [("t_output.dense.bias", (text,))],
                "text_weight": [("t_output.LayerNorm.weight", (text,))],
                "text_shift": [("t_output.LayerNorm.bias", (text,))],
            },
        )
        self.inner, self.heads = inner, config.bi_num_attention_heads
        self.text_dropout, self.image_dropout = config.hidden_dropout_prob, config.v_hidden_dropout_prob
        # The published code drops text-reads-image probabilities at the image's rate, and the other way round.
        self.text_reads, self.image_reads = config.v_attention_probs_dropout_prob, config.attention_probs_dropout_prob

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        text_rows: Rows,
        image_rows: Rows,
        random: Randomness,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(text [T, D], image [R, V]) of the same pairs -> both, updated from each other's inputs.

        `projected`: what `project_text` and `project_image` made of these rows, where that is known already. Only without
        gradients, else ValueError: they would lack a part.
        """
        if projected is not None and torch.is_grad_enabled():
            raise ValueError("projections that were made before have no gradients")
        return run(self, _BothSides(self, text_rows, image_rows, random, projected), text, image)

    def project_text(self, text: Tensor) -> Tensor:
        """[T, 3 * inner]: queries, keys and values of text rows [T, D], which depend on no image."""
        return _projected(self.values(), "text", text)

    def project_image(self, image: Tensor) -> Tensor:
        """[R, 3 * inner]: those of region rows [R, V], which depend on no text."""
        return _projected(self.values(), "image", image)

    def image_side(self, text: Tensor, image: Tensor, text_rows: Rows, image_rows: Rows, random: Randomness) -> Tensor:
        """The image output alone, [R, V]: what the text side would need (query2, key1, value1, …) is not computed."""
        return run(self, _ImageSide(self, text_rows, image_rows, random), text, image)


def _projected(w: Fields, side: str, x: Tensor) -> Tensor:
    """[rows, 3 * inner]: queries, keys and values of one side."""
    return project(x, w[f"{side}_qkv"], w[f"{side}_qkv_bias"])


class _BothSides:
    """Co-attention, then each stream's own projection and feed-forward."""

    def __init__(
        self,
        bridge: Bridge,
        text_rows: Rows,
        image_rows: Rows,
        random: Randomness,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.inner, self.heads, self.projected = bridge.inner, bridge.heads, projected
        self.rows = {"text": text_rows, "image": image_rows}
        self.text_reads = random.dropout(bridge.text_reads, slot=0)
        self.image_reads = random.dropout(bridge.image_reads, slot=1)
        self.dropouts = {
            "text": [random.dropout(bridge.text_dropout, slot) for slot in (2, 3)],
            "image": [random.dropout(bridge.image_dropout, slot) for slot in (4, 5)],
        }

    def forward(self, w: Fields, text: Tensor, image: Tensor) -> tuple[tuple[Tensor, Tensor], Any]:
        projected = self.projected or (_projected(w, "text", text), _projected(w, "image", image))
        text_qkv, image_qkv = (x.split(self.inner, 1) for x in projected)
        text_context, image_context, attended = coattention_forward(
            text_qkv, image_qkv, self.rows["text"], self.rows["image"], self.heads, self.text_reads, self.image_reads
        )
        new_text, text_rest = self.side_forward(w, "text", text_context, text)
        new_image, image_rest = self.side_forward(w, "image", image_context, image)
        return (new_text, new_image), (text, image, attended, text_rest, image_rest)

    def backward(self, w: Fields, g: Fields, saved: Any, dtext: Tensor, dimage: Tensor) -> tuple[Tensor, Tensor]:
        text, image, attended, text_rest, image_rest = saved
        dtext_context, dtext = self.side_backward(w, g, "text", text_rest, dtext)
        dimage_context, dimage = self.side_backward(w, g, "image", image_rest, dimage)
        dtext_qkv, dimage_qkv = (x.new_empty(len(x), 3 * self.inner) for x in (text, image))
        coattention_backward(
            attended, dtext_context, dimage_context, dtext_qkv.split(self.inner, 1), dimage_qkv.split(self.inner, 1)
        )
        return (
            projection_backward(w["text_qkv"], g["text_qkv"], g["text_qkv_bias"], text, dtext_qkv, dtext),
            projection_backward(w["image_qkv"], g["image_qkv"], g["image_qkv_bias"], image, dimage_qkv, dimage),
        )

    def side_forward(self, w: Fields, side: str, context: Tensor, residual: Tensor) -> tuple[Tensor, Any]:
        """What follows co-attention in one stream."""
        rows, (attended_dropout, fed_dropout) = self.rows[side], self.dropouts[side]
        x, attended = residual_forward(w, f"{side}_", f"{side}_bridge_", context, residual, rows, attended_dropout)
        y, fed = feed_forward_forward(w, f"{side}_", x, rows, fed_dropout)
        return y, (attended, fed)

    def side_backward(self, w: Fields, g: Fields, side: str, saved: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        """(gradient of context, gradient of the residual)."""
        attended, fed = saved
        dx = feed_forward_backward(w, g, f"{side}_", fed, dy)
        return residual_backward(w, g, f"{side}_", f"{side}_bridge_", attended, dx)


class _ImageSide(_BothSides):
    """The image's half: its queries read the text's keys and values."""

    def forward(self, w: Fields, text: Tensor, image: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
        (q_weight, _), (q_bias, _) = self._halves(w["image_qkv"]), self._halves(w["image_qkv_bias"])
        (_, kv_weight), (_, kv_bias) = self._halves(w["text_qkv"]), self._halves(w["text_qkv_bias"])
        q, kv = project(image, q_weight, q_bias), project(text, kv_weight, kv_bias)
        k, v = kv.split(self.inner, 1)
        context, attended = attention_forward(
            q, k, v, self.rows["image"], self.rows["text"], self.heads, self.image_reads
        )
        y, rest = self.side_forward(w, "image", context, image)
        return y, (text, image, attended, rest)

    def backward(self, w: Fields, g: Fields, saved: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        text, image, attended, rest = saved
        dcontext, dimage = self.side_backward(w, g, "image", rest, dy)
        dq, dkv = torch.empty_like(dcontext), text.new_empty(len(text), 2 * self.inner)
        attention_backward(attended, dcontext, dq, *dkv.split(self.inner, 1))
        (gq, unread_kv), (gq_bias, unread_kv_bias) = self._halves(g["image_qkv"]), self._halves(g["image_qkv_bias"])
        (unread_q, gkv), (unread_q_bias, gkv_bias) = self._halves(g["text_qkv"]), self._halves(g["text_qkv_bias"])
        own = [field for name, field in g.items() if name.startswith("text_") and not name.startswith("text_qkv")]
        for unused in (unread_kv, unread_kv_bias, unread_q, unread_q_bias, *own):
            unused.zero_()
        return (
            projection_backward(self._halves(w["text_qkv"])[1], gkv, gkv_bias, text, dkv),
            projection_backward(self._halves(w["image_qkv"])[0], gq, gq_bias, image, dq, dimage),
        )

    def _halves(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """The query's part, and that of key and value."""
        return qkv.split([self.inner, 2 * self.inner])
