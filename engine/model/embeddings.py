"""The first rows of both streams (spec section 1.2).

Rows are gathered by `F.embedding` and `index_select`, not by indexing: the backward of indexing adds repeated rows up in
an order that changes from run to run once two CPU threads share the work, and a resume would not be exact.

Shape letters: T text rows, R region rows, D text width, V image width, F feature width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.explicit import Fields, run
from engine.model.flat import FlatBlock, add_rows
from engine.model.randomness import Randomness
from engine.model.sublayers import layer_norm
from kernels.dropout import drop
from kernels.projection import linear
from kernels.recorded import Recorded
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
        x = run(self, _TextLookup(token_ids, rows, has_task_token))
        return drop(x, random.dropout(self.p, slot=0), rows.row_key, rows.row_index)


class _TextLookup:
    """Sum of the tables' rows, normalised. Its backward touches the rows that were read, not a table's copy."""

    def __init__(self, token_ids: Tensor, rows: Rows, has_task_token: bool) -> None:
        self.ids, self.rows, self.has_task_token = token_ids, rows, has_task_token

    def forward(self, w: Fields) -> tuple[Tensor, Any]:
        position, task_rows = self.rows.row_index, self.rows.starts + 1
        words = self.ids
        if self.has_task_token:
            is_task = position == 1
            position = position - (position > 1).long()
            words = words.masked_fill(is_task, 0)
        x = F.embedding(words, w["words"]) + F.embedding(position, w["positions"]) + w["segments"][0]
        if self.has_task_token:
            x = x.index_copy(0, task_rows, F.embedding(self.ids[task_rows], w["tasks"]))
        norm = Recorded(layer_norm, x, w["weight"], w["shift"])
        return norm.outputs[0], (norm, words, position, task_rows)

    def backward(self, w: Fields, g: Fields, saved: Any, dy: Tensor) -> tuple[()]:
        norm, words, position, task_rows = saved
        dx, dweight, dshift = norm.backward(dy)
        g["weight"].copy_(dweight)
        g["shift"].copy_(dshift)
        if self.has_task_token:
            add_rows(g["tasks"], self.ids[task_rows], dx[task_rows])
            dx = dx.index_fill(0, task_rows, 0.0)
        elif "tasks" in g:
            g["tasks"].zero_()
        add_rows(g["words"], words, dx)
        add_rows(g["positions"], position, dx)
        g["segments"].zero_()
        g["segments"][0] = dx.float().sum(0)
        return ()


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
        x = linear(features.to(w["features"].dtype), w["features"])
        return region_embedding(
            x, w["feature_bias"], boxes, w["locations"], w["location_bias"], w["weight"], w["shift"], rows,
            random.dropout(self.p, slot=0),
        )  # fmt: skip
