"""`Poolers`: from row 0 of both streams to the vector that pooled heads read (spec section 1.6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.flat import FlatBlock
from engine.model.randomness import Randomness
from kernels.dropout import drop
from kernels.rows import Rows


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
