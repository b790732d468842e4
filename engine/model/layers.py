"""The blocks of the two streams: embeddings, transformer layers, bridges, poolers (spec sections 1.2 to 1.6).

Rows are gathered by `F.embedding` and `index_select`, not by indexing: the backward of indexing adds repeated rows up in
an order that changes from run to run once two CPU threads share the work, and a resume would not be exact.

Shape letters: T text rows, R region rows, D text width, V image width, H co-attention width, P pairs, n items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.flat import FlatBlock
from engine.model.randomness import Randomness
from kernels.attention import attention
from kernels.bias_dropout_residual_layernorm import LAYER_NORM_EPS, bias_dropout_residual_layernorm
from kernels.bias_gelu import bias_gelu
from kernels.coattention import coattention
from kernels.dropout import drop
from kernels.region_embedding import region_embedding
from kernels.rows import Rows


class TextEmbedding(FlatBlock):
    """Word + position + segment, the task row spliced in at row 1, LayerNorm, dropout (spec section 1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        tables = {
            "words": [("word_embeddings.weight", (config.vocab_size, width))],
            "positions": [("position_embeddings.weight", (config.max_position_embeddings, width))],
            "segments": [("token_type_embeddings.weight", (config.type_vocab_size, width))],
        }
        if config.task_rows:
            tables["tasks"] = [("task_embeddings.weight", (config.task_rows, width))]
        norm = {"weight": [("LayerNorm.weight", (width,))], "shift": [("LayerNorm.bias", (width,))]}
        self.allocate("bert.embeddings.", tables, norm)
        self.p = config.hidden_dropout_prob

    def forward(self, token_ids: Tensor, rows: Rows, has_task_token: bool, random: Randomness) -> Tensor:
        """[T, D] from token_ids int64 [T]; with a task token, row 1 of each text holds the task-table row instead.

        The task row gets no position and no segment; words keep the positions that they have without it.
        """
        w = self.fields()
        position = rows.row_index
        if not has_task_token:
            x = F.embedding(token_ids, w["words"]) + F.embedding(position, w["positions"]) + w["segments"][0]
        else:
            is_task = position == 1
            position = position - (position > 1).long()
            words = F.embedding(token_ids.masked_fill(is_task, 0), w["words"])
            x = words + F.embedding(position, w["positions"]) + w["segments"][0]
            task_rows = rows.starts + 1
            x = x.index_copy(0, task_rows, F.embedding(token_ids[task_rows], w["tasks"]))
        x = F.layer_norm(x, w["weight"].shape, w["weight"], w["shift"], LAYER_NORM_EPS)
        return drop(x, random.dropout(self.p, slot=0), rows.row_key, rows.row_index)


class ImageEmbedding(FlatBlock):
    """Projected features + projected boxes, LayerNorm, dropout with the text probability (spec section 1.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.v_hidden_size
        self.allocate(
            "bert.v_embeddings.",
            {
                "features": [("image_embeddings.weight", (width, config.v_feature_size))],
                "locations": [("image_location_embeddings.weight", (width, 5))],
            },
            {
                "feature_bias": [("image_embeddings.bias", (width,))],
                "location_bias": [("image_location_embeddings.bias", (width,))],
                "weight": [("LayerNorm.weight", (width,))],
                "shift": [("LayerNorm.bias", (width,))],
            },
        )
        self.p = config.hidden_dropout_prob

    def forward(self, features: Tensor, boxes: Tensor, rows: Rows, random: Randomness) -> Tensor:
        """[R, V] from features [R, F] and boxes [R, 5]."""
        w = self.fields()
        x = F.linear(features.to(w["features"].dtype), w["features"])
        return region_embedding(
            x, w["feature_bias"], boxes, w["locations"], w["location_bias"], w["weight"], w["shift"], rows,
            random.dropout(self.p, slot=0),
        )  # fmt: skip


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
        w = self.fields()
        q_rows = rows.first if first_only else rows
        if first_only:
            q_weight, kv_weight = w["qkv"].split([self.width, 2 * self.width])
            q_bias, kv_bias = w["qkv_bias"].split([self.width, 2 * self.width])
            k, v = F.linear(x, kv_weight, kv_bias).chunk(2, -1)
            x = x.index_select(0, rows.starts)
            q = F.linear(x, q_weight, q_bias)
        else:
            q, k, v = F.linear(x, w["qkv"], w["qkv_bias"]).chunk(3, -1)
        context = attention(q, k, v, q_rows, rows, self.heads, random.dropout(self.attention_dropout, slot=0))
        x = bias_dropout_residual_layernorm(
            F.linear(context, w["out"]), w["out_bias"], x, w["attention_weight"], w["attention_shift"], q_rows,
            random.dropout(self.hidden_dropout, slot=1),
        )  # fmt: skip
        inner = bias_gelu(F.linear(x, w["up"]), w["up_bias"])
        return bias_dropout_residual_layernorm(
            F.linear(inner, w["down"]), w["down_bias"], x, w["weight"], w["shift"], q_rows,
            random.dropout(self.hidden_dropout, slot=2),
        )  # fmt: skip


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
        self, text: Tensor, image: Tensor, text_rows: Rows, image_rows: Rows, random: Randomness
    ) -> tuple[Tensor, Tensor]:
        """(text [T, D], image [R, V]) of the same pairs -> both, updated from each other's inputs."""
        w = self.fields()
        q_text, k_text, v_text = F.linear(text, w["text_qkv"], w["text_qkv_bias"]).chunk(3, -1)
        q_image, k_image, v_image = F.linear(image, w["image_qkv"], w["image_qkv_bias"]).chunk(3, -1)
        text_context, image_context = coattention(
            (q_text, k_text, v_text), (q_image, k_image, v_image), text_rows, image_rows, self.heads,
            random.dropout(self.text_reads, slot=0), random.dropout(self.image_reads, slot=1),
        )  # fmt: skip
        text = self._after(w, "text", text_context, text, text_rows, self.text_dropout, random, slot=2)
        image = self._after(w, "image", image_context, image, image_rows, self.image_dropout, random, slot=4)
        return text, image

    def image_side(self, text: Tensor, image: Tensor, text_rows: Rows, image_rows: Rows, random: Randomness) -> Tensor:
        """The image output alone, [R, V]: what the text side would need (query2, key1, value1, …) is not computed."""
        w = self.fields()
        rest = [self.inner, 2 * self.inner]
        q_weight, q_bias = w["image_qkv"].split(rest)[0], w["image_qkv_bias"].split(rest)[0]
        kv_weight, kv_bias = w["text_qkv"].split(rest)[1], w["text_qkv_bias"].split(rest)[1]
        k, v = F.linear(text, kv_weight, kv_bias).chunk(2, -1)
        q = F.linear(image, q_weight, q_bias)
        context = attention(q, k, v, image_rows, text_rows, self.heads, random.dropout(self.image_reads, slot=1))
        return self._after(w, "image", context, image, image_rows, self.image_dropout, random, slot=4)

    @staticmethod
    def _after(
        w: dict[str, Tensor], side: str, context: Tensor, x: Tensor, rows: Rows, p: float, random: Randomness, slot: int
    ) -> Tensor:
        x = bias_dropout_residual_layernorm(
            F.linear(context, w[f"{side}_out"]), w[f"{side}_out_bias"], x,
            w[f"{side}_bridge_weight"], w[f"{side}_bridge_shift"], rows, random.dropout(p, slot),
        )  # fmt: skip
        inner = bias_gelu(F.linear(x, w[f"{side}_up"]), w[f"{side}_up_bias"])
        return bias_dropout_residual_layernorm(
            F.linear(inner, w[f"{side}_down"]), w[f"{side}_down_bias"], x,
            w[f"{side}_weight"], w[f"{side}_shift"], rows, random.dropout(p, slot + 1),
        )  # fmt: skip


class Poolers(FlatBlock):
    """ReLU projections of both streams' row 0, and their dropped-out product (spec section 1.6)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, text, image = config.bi_hidden_size, config.hidden_size, config.v_hidden_size
        self.allocate(
            "bert.",
            {"text": [("t_pooler.dense.weight", (width, text))], "image": [("v_pooler.dense.weight", (width, image))]},
            {"text_bias": [("t_pooler.dense.bias", (width,))], "image_bias": [("v_pooler.dense.bias", (width,))]},
        )
        self.multiply = config.fusion_method == "mul"
        self.p = config.head_dropout_prob

    def forward(self, text: Tensor, image: Tensor, rows: Rows, random: Randomness, slot: int = 0) -> Tensor:
        """[P, H] from row 0 of each pair's text [P, D] and image [P, V]; `rows` has one row a pair.

        `slot` 0 is the task heads' dropout, 1 the pretraining heads', which draw their own.
        """
        w = self.fields()
        t = torch.relu(F.linear(text, w["text"], w["text_bias"]))
        v = torch.relu(F.linear(image, w["image"], w["image_bias"]))
        return drop(t * v if self.multiply else t + v, random.dropout(self.p, slot), rows.row_key, rows.row_index)
