"""The published model as plain padded torch (spec sections 1.2 to 1.6), every op a stock one, under the published names.

B rows of the published model, one (text, image) pair each, padded: L tokens (+1 for the task token), R regions. Every
forward evaluates every head, the two pretraining heads included, as the published one does. Nothing of the engine's model
is in here: this is also the oracle of its tests.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.config import ModelConfig

EPS = 1e-12
MASKED = -10000.0
"""What the published code adds to the scores and logits of padded rows."""

SEGMENTS = 0
"""All twelve tasks use this segment only."""


class PaddedInputs(NamedTuple):
    """What the published loaders hand to the model."""

    input_ids: Tensor  # int64 [B, L], without the task token
    input_mask: Tensor  # [B, L], 1 = real
    features: Tensor  # [B, R, F]
    locations: Tensor  # [B, R, 5]
    image_mask: Tensor  # [B, R], 1 = real
    task_token: int | None


class PaddedModel(nn.Module):
    """All 560 published tensors; `forward` gives the logits of every head by published prefix."""

    def __init__(self, config: ModelConfig, answers: int = 3129, gqa_answers: int = 1533) -> None:
        """`answers` and `gqa_answers` are hard-coded in the published code."""
        super().__init__()
        c, pooled = config, config.bi_hidden_size
        self.config = c
        self.bert = _Trunk(c)
        self.cls = _PretrainingHeads(c, self.bert.embeddings.word_embeddings)
        self.vil_prediction = _Classifier(pooled, 2 * pooled, answers)
        self.vil_prediction_gqa = _Classifier(pooled, 2 * pooled, gqa_answers)
        self.vil_binary_prediction = _Classifier(2 * pooled, 2 * pooled, 2)
        self.vil_logit = nn.Linear(pooled, 1)
        self.vil_tri_prediction = nn.Linear(pooled, 3)
        self.vision_logit = nn.Linear(c.v_hidden_size, 1)
        self.linguisic_logit = nn.Linear(c.hidden_size, 1)  # the published spelling

    def forward(self, inputs: PaddedInputs) -> dict[str, Tensor]:
        """Logits by head: pooled heads [B, outputs] (`vil_binary_prediction` [B / 2, 2], absent where B is odd), the
        region head [B, R, 1], the word heads [B, L + 1, 1 or vocabulary], the region class head [B, R, classes]."""
        text, image, image_mask = self.bert(inputs)
        t, v = self.bert.t_pooler(text), self.bert.v_pooler(image)
        product = t * v if self.config.fusion_method == "mul" else t + v
        logits: dict[str, Tensor] = self.cls(text, image, product)
        p = self.config.head_dropout_prob
        pooled = F.dropout(product, p, self.training)
        logits["vil_prediction"] = self.vil_prediction(pooled)
        logits["vil_prediction_gqa"] = self.vil_prediction_gqa(pooled)
        if len(pooled) % 2 == 0:
            logits["vil_binary_prediction"] = self.vil_binary_prediction(pooled.view(-1, 2 * pooled.shape[1]))
        logits["vil_logit"] = self.vil_logit(pooled)
        logits["vil_tri_prediction"] = self.vil_tri_prediction(pooled)
        regions = self.vision_logit(F.dropout(image, p, self.training))
        logits["vision_logit"] = regions + (1.0 - image_mask.to(regions.dtype))[..., None] * MASKED
        logits["linguisic_logit"] = self.linguisic_logit(F.dropout(text, p, self.training))
        return logits

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """New weights (spec section 1.8): matrices normal, biases 0, LayerNorm scales 1."""
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()


class _Trunk(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.config = c
        self.embeddings = _TextEmbeddings(c)
        self.v_embeddings = _ImageEmbeddings(c)
        self.encoder = _Encoder(c)
        self.t_pooler = _Pooler(c.hidden_size, c.bi_hidden_size)
        self.v_pooler = _Pooler(c.v_hidden_size, c.bi_hidden_size)

    def forward(self, inputs: PaddedInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Text states [B, L', D], image states [B, R, V], image mask [B, R]."""
        text = self.embeddings(inputs.input_ids, inputs.task_token)
        text_mask = inputs.input_mask
        if inputs.task_token is not None:
            text_mask = torch.cat((torch.ones_like(text_mask[:, :1]), text_mask), 1)
        image = self.v_embeddings(inputs.features, inputs.locations)
        text, image = self.encoder(text, image, _bias(text_mask, text.dtype), _bias(inputs.image_mask, image.dtype))
        return text, image, inputs.image_mask


class _TextEmbeddings(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.task_embeddings = nn.Embedding(c.task_rows, c.hidden_size)
        self.LayerNorm = nn.LayerNorm(c.hidden_size, EPS)
        self.p = c.hidden_dropout_prob

    def forward(self, ids: Tensor, task_token: int | None) -> Tensor:
        """The task's row stands after [CLS] and has neither position nor segment."""
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.word_embeddings(ids) + self.position_embeddings(places)
        x = x + self.token_type_embeddings(torch.full_like(ids, SEGMENTS))
        if task_token is not None:
            token = self.task_embeddings(torch.full_like(ids[:, :1], task_token))
            x = torch.cat((x[:, :1], token, x[:, 1:]), 1)
        return F.dropout(self.LayerNorm(x), self.p, self.training)


class _ImageEmbeddings(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.image_embeddings = nn.Linear(c.v_feature_size, c.v_hidden_size)
        self.image_location_embeddings = nn.Linear(5, c.v_hidden_size)
        self.LayerNorm = nn.LayerNorm(c.v_hidden_size, EPS)
        self.p = c.hidden_dropout_prob  # the text key, as published

    def forward(self, features: Tensor, locations: Tensor) -> Tensor:
        x = self.LayerNorm(self.image_embeddings(features) + self.image_location_embeddings(locations))
        return F.dropout(x, self.p, self.training)


class _Encoder(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(
                c.hidden_size, c.num_attention_heads, c.intermediate_size,
                c.attention_probs_dropout_prob, c.hidden_dropout_prob,
            )
            for _ in range(c.num_hidden_layers)
        )  # fmt: skip
        self.v_layer = nn.ModuleList(
            _Layer(
                c.v_hidden_size, c.v_num_attention_heads, c.v_intermediate_size,
                c.v_attention_probs_dropout_prob, c.v_hidden_dropout_prob,
            )
            for _ in range(c.v_num_hidden_layers)
        )  # fmt: skip
        self.c_layer = nn.ModuleList(_ConnectionLayer(c) for _ in range(c.n_bridges))
        self.t_stops = (0, *c.t_biattention_id, c.num_hidden_layers)
        self.v_stops = (0, *c.v_biattention_id, c.v_num_hidden_layers)

    def forward(self, text: Tensor, image: Tensor, text_bias: Tensor, image_bias: Tensor) -> tuple[Tensor, Tensor]:
        """The published schedule: text layers up to a bridge, image layers up to it, the bridge; then the rest.

        One text and many images: the text is repeated in front of the first bridge (the published `fast_mode`, for retrieval).
        """
        for k in range(len(self.c_layer) + 1):
            for layer in self.layer[self.t_stops[k] : self.t_stops[k + 1]]:
                text = layer(text, text_bias)
            for layer in self.v_layer[self.v_stops[k] : self.v_stops[k + 1]]:
                image = layer(image, image_bias)
            if k < len(self.c_layer):
                text = text.expand(len(image), -1, -1)
                image, text = self.c_layer[k](image, text, image_bias, text_bias)
        return text, image


class _Layer(nn.Module):
    """Self-attention and feed-forward, each with residual and LayerNorm after it."""

    def __init__(self, width: int, heads: int, inner: int, p_attention: float, p: float) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, p_attention, p)
        self.intermediate = _Intermediate(width, inner)
        self.output = _Output(inner, width, p)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.attention(x, bias)
        return self.output(self.intermediate(x), x)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, p_attention: float, p: float) -> None:
        super().__init__()
        self.self = _SelfAttention(width, heads, p_attention)
        self.output = _Output(width, width, p)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.output(self.self(x, bias), x)


class _SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.heads, self.p = heads, p

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        p = self.p if self.training else 0.0
        return _attend(self.query(x), self.key(x), self.value(x), bias, self.heads, p)


class _Intermediate(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class _Output(nn.Module):
    def __init__(self, inner: int, width: int, p: float) -> None:
        super().__init__()
        self.dense = nn.Linear(inner, width)
        self.LayerNorm = nn.LayerNorm(width, EPS)
        self.p = p

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(F.dropout(self.dense(x), self.p, self.training) + residual)


class _ConnectionLayer(nn.Module):
    """Co-attention: text reads image and image reads text, both from the layer's inputs; then a feed-forward each.

    Published suffixes: 1 = image, 2 = text.
    """

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.biattention = _CoAttention(c)
        self.biOutput = _CoOutput(c)
        self.v_intermediate = _Intermediate(c.v_hidden_size, c.v_intermediate_size)
        self.v_output = _Output(c.v_intermediate_size, c.v_hidden_size, c.v_hidden_dropout_prob)
        self.t_intermediate = _Intermediate(c.hidden_size, c.intermediate_size)
        self.t_output = _Output(c.intermediate_size, c.hidden_size, c.hidden_dropout_prob)

    def forward(self, image: Tensor, text: Tensor, image_bias: Tensor, text_bias: Tensor) -> tuple[Tensor, Tensor]:
        to_text, to_image = self.biattention(image, text, image_bias, text_bias)
        image, text = self.biOutput(to_image, image, to_text, text)
        return self.v_output(self.v_intermediate(image), image), self.t_output(self.t_intermediate(text), text)


class _CoAttention(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.query1, self.key1, self.value1 = (nn.Linear(c.v_hidden_size, c.bi_hidden_size) for _ in range(3))
        self.query2, self.key2, self.value2 = (nn.Linear(c.hidden_size, c.bi_hidden_size) for _ in range(3))
        self.heads = c.bi_num_attention_heads
        self.p1, self.p2 = c.v_attention_probs_dropout_prob, c.attention_probs_dropout_prob

    def forward(self, image: Tensor, text: Tensor, image_bias: Tensor, text_bias: Tensor) -> tuple[Tensor, Tensor]:
        """(what the text read, [B, L', bi]; what the image read, [B, R, bi])."""
        p1, p2 = (self.p1, self.p2) if self.training else (0.0, 0.0)
        to_text = _attend(self.query2(text), self.key1(image), self.value1(image), image_bias, self.heads, p1)
        to_image = _attend(self.query1(image), self.key2(text), self.value2(text), text_bias, self.heads, p2)
        return to_text, to_image


class _CoOutput(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.dense1, self.q_dense1 = (nn.Linear(c.bi_hidden_size, c.v_hidden_size) for _ in range(2))
        self.dense2, self.q_dense2 = (nn.Linear(c.bi_hidden_size, c.hidden_size) for _ in range(2))
        self.LayerNorm1, self.LayerNorm2 = nn.LayerNorm(c.v_hidden_size, EPS), nn.LayerNorm(c.hidden_size, EPS)
        self.p1, self.p2 = c.v_hidden_dropout_prob, c.hidden_dropout_prob

    def forward(self, to_image: Tensor, image: Tensor, to_text: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """`q_dense1` and `q_dense2` are in the published layout, and called by nothing."""
        image = self.LayerNorm1(F.dropout(self.dense1(to_image), self.p1, self.training) + image)
        text = self.LayerNorm2(F.dropout(self.dense2(to_text), self.p2, self.training) + text)
        return image, text


class _Pooler(nn.Module):
    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, pooled)

    def forward(self, states: Tensor) -> Tensor:
        return torch.relu(self.dense(states[:, 0]))


class _Classifier(nn.Module):
    """Two-layer head; the published index 1 is the GELU."""

    def __init__(self, width: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.logit_fc = nn.Sequential(
            nn.Linear(width, inner), nn.GELU(), nn.LayerNorm(inner, EPS), nn.Linear(inner, outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logit_fc(x)
        return logits


class _Transform(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = nn.LayerNorm(width, EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class _PretrainingHeads(nn.Module):
    """`cls`: words of every token, detector classes of every region, alignment of every pair."""

    def __init__(self, c: ModelConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.predictions = _Words(c, words)
        self.bi_seq_relationship = nn.Linear(c.bi_hidden_size, 2)
        self.imagePredictions = _Regions(c)
        self.p = c.head_dropout_prob

    def forward(self, text: Tensor, image: Tensor, pooled: Tensor) -> dict[str, Tensor]:
        return {
            "cls.predictions": self.predictions(text),
            "cls.imagePredictions": self.imagePredictions(image),
            "cls.bi_seq_relationship": self.bi_seq_relationship(F.dropout(pooled, self.p, self.training)),
        }


class _Words(nn.Module):
    def __init__(self, c: ModelConfig, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = _Transform(c.hidden_size)
        self.decoder = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.decoder.weight = words.weight  # tied
        self.bias = nn.Parameter(torch.zeros(c.vocab_size))

    def forward(self, text: Tensor) -> Tensor:
        return F.linear(self.transform(text), self.decoder.weight, self.bias)


class _Regions(nn.Module):
    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.transform = _Transform(c.v_hidden_size)
        self.decoder = nn.Linear(c.v_hidden_size, c.v_target_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.decoder(self.transform(image))


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, n]: what is added to attention scores."""
    return (1.0 - mask.to(dtype))[:, None, None, :] * MASKED


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, heads: int, p: float) -> Tensor:
    """Three stock ops. torch's fused attention takes the same path on the CPU where there is dropout, and is no faster."""

    def split(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], heads, -1).transpose(1, 2)

    scores = split(q) @ split(k).transpose(-1, -2) / math.sqrt(q.shape[-1] // heads) + bias
    probabilities = F.dropout(scores.softmax(-1), p)
    return (probabilities @ split(v)).transpose(1, 2).reshape(q.shape)
