"""Task heads (θt of Algorithm 1) and the pretraining heads. A head's kind is data; no code knows task names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.explicit import Fields, run
from engine.model.flat import FlatBlock
from engine.model.randomness import Randomness
from engine.model.sublayers import layer_norm, projection_backward
from engine.model.trunk import Need, Streams, Trunk
from kernels.bias_gelu import bias_gelu, bias_gelu_backward, bias_gelu_forward
from kernels.dropout import drop
from kernels.projection import input_gradient, project, weight_gradient
from kernels.recorded import Recorded


@dataclass(frozen=True)
class HeadSpec:
    """What a head is: its kind (a key of `KINDS`) and its number of outputs."""

    kind: str
    outputs: int


class Head(FlatBlock):
    """Streams of P pairs -> logits. `need` says what the trunk must compute; `pairs` how many pairs make an example."""

    need = Need.POOLED
    pairs = 1

    def __init__(self, prefix: str, config: ModelConfig, outputs: int) -> None:
        super().__init__()


class MLPHead(Head):
    """Two layers over the pooled product: linear, GELU, LayerNorm, linear (paper eq. 1; spec section 1.6)."""

    def __init__(self, prefix: str, config: ModelConfig, outputs: int) -> None:
        super().__init__(prefix, config, outputs)
        width, inner = self.pairs * config.bi_hidden_size, 2 * config.bi_hidden_size
        self.allocate(
            f"{prefix}.logit_fc.",
            {"inner": [("0.weight", (inner, width))], "out": [("3.weight", (outputs, inner))]},
            {
                "inner_bias": [("0.bias", (inner,))],
                "weight": [("2.weight", (inner,))],
                "shift": [("2.bias", (inner,))],
                "out_bias": [("3.bias", (outputs,))],
            },
        )

    def forward(self, trunk: Trunk, streams: Streams, random: Randomness) -> Tensor:
        """[B, outputs]; the pooled vectors of an example's pairs stand one after the other."""
        pooled = trunk.pooled(streams, random)
        return run(self, _MLP(), pooled.view(-1, self.pairs * pooled.shape[1]))


class _MLP:
    """The arithmetic of `MLPHead`; its matrices are too large to be concatenated by autograd at every step."""

    def forward(self, w: Fields, x: Tensor) -> tuple[Tensor, Any]:
        inner = project(x, w["inner"])
        norm = Recorded(layer_norm, bias_gelu_forward(inner, w["inner_bias"]), w["weight"], w["shift"])
        return project(norm.outputs[0], w["out"], w["out_bias"]), (x, inner, norm)

    def backward(self, w: Fields, g: Fields, saved: Any, dy: Tensor) -> tuple[Tensor]:
        x, inner, norm = saved
        dnormed = projection_backward(w["out"], g["out"], g["out_bias"], norm.outputs[0], dy)
        dinner, dweight, dshift = norm.backward(dnormed)
        g["weight"].copy_(dweight)
        g["shift"].copy_(dshift)
        bias_gelu_backward(dinner, inner, w["inner_bias"], dinner, g["inner_bias"])
        weight_gradient(dinner, x, g["inner"])
        return (input_gradient(dinner, w["inner"]),)


class PairedMLPHead(MLPHead):
    """The same over two pairs' products concatenated (paper eq. 4): rows 2i and 2i + 1 are one example."""

    pairs = 2


class LinearHead(Head):
    """One linear layer over the pooled product (paper eq. 2; SNLI-VE's three classes)."""

    def __init__(self, prefix: str, config: ModelConfig, outputs: int) -> None:
        super().__init__(prefix, config, outputs)
        self.allocate(
            f"{prefix}.",
            {"out": [("weight", (outputs, config.bi_hidden_size))]},
            {"out_bias": [("bias", (outputs,))]},
        )

    def forward(self, trunk: Trunk, streams: Streams, random: Randomness) -> Tensor:
        """[P, outputs]."""
        w = self.fields()
        return F.linear(trunk.pooled(streams, random), w["out"], w["out_bias"])


class RegionHead(Head):
    """One logit per region row (paper eq. 3), after a dropout of its own."""

    need = Need.REGIONS

    def __init__(self, prefix: str, config: ModelConfig, outputs: int) -> None:
        super().__init__(prefix, config, outputs)
        self.allocate(
            f"{prefix}.",
            {"out": [("weight", (outputs, config.v_hidden_size))]},
            {"out_bias": [("bias", (outputs,))]},
        )
        self.p = config.head_dropout_prob

    def forward(self, trunk: Trunk, streams: Streams, random: Randomness) -> Tensor:
        """[region rows over pairs]."""
        w = self.fields()
        rows = streams.image_rows
        dropout = random.at(trunk.n_blocks).dropout(self.p, slot=0)
        x = drop(streams.image, dropout, rows.row_key, rows.row_index)
        return F.linear(x, w["out"], w["out_bias"]).squeeze(-1)


KINDS: dict[str, type[Head]] = {
    "answers": MLPHead,
    "paired_classes": PairedMLPHead,
    "match": LinearHead,
    "classes": LinearHead,
    "regions": RegionHead,
}
"""Head kinds of the task table."""


class PretrainingHeads(FlatBlock):
    """Masked words, masked regions, alignment (spec sections 1.6 and 2.1). The word decoder is the embedding table."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        text, image, pooled, classes = (
            config.hidden_size,
            config.v_hidden_size,
            config.bi_hidden_size,
            config.v_target_size,
        )
        self.allocate(
            "cls.",
            {
                "words": [("predictions.transform.dense.weight", (text, text))],
                "align": [("bi_seq_relationship.weight", (2, pooled))],
                "regions": [("imagePredictions.transform.dense.weight", (image, image))],
                "classes": [("imagePredictions.decoder.weight", (classes, image))],
            },
            {
                "decoder_bias": [("predictions.bias", (config.vocab_size,))],
                "words_bias": [("predictions.transform.dense.bias", (text,))],
                "words_weight": [("predictions.transform.LayerNorm.weight", (text,))],
                "words_shift": [("predictions.transform.LayerNorm.bias", (text,))],
                "align_bias": [("bi_seq_relationship.bias", (2,))],
                "regions_bias": [("imagePredictions.transform.dense.bias", (image,))],
                "regions_weight": [("imagePredictions.transform.LayerNorm.weight", (image,))],
                "regions_shift": [("imagePredictions.transform.LayerNorm.bias", (image,))],
                "classes_bias": [("imagePredictions.decoder.bias", (classes,))],
            },
        )

    def transform(self, x: Tensor, stream: str) -> Tensor:
        """Linear, GELU, LayerNorm of text ("words") or image ("regions") rows, before the decoder."""
        w = self.fields()
        x = bias_gelu(F.linear(x, w[stream]), w[f"{stream}_bias"])
        return layer_norm(x, w[f"{stream}_weight"], w[f"{stream}_shift"])
