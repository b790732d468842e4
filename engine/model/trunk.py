"""The trunk: two streams over packed rows, co-attention between them, and only what the head needs at the end.

The schedule is the published one (spec section 1.5): text layers up to t_biattention_id[k], image layers up to
v_biattention_id[k], bridge k; after the last bridge the remaining layers of both streams. What runs before the first
bridge depends on one modality alone, so it runs once per unique text or image; then rows are gathered into pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.model.bridge import Bridge
from engine.model.config import ModelConfig
from engine.model.embeddings import ImageEmbedding, TextEmbedding
from engine.model.flat import FlatBlock
from engine.model.poolers import Poolers
from engine.model.randomness import Randomness
from engine.model.transformer_layer import TransformerLayer
from engine.ranges import span
from kernels.rows import Rows
from pipelines.batch import Batch

At = Callable[[FlatBlock], Randomness]
"""The random coordinates of a block."""


class Need(Enum):
    """What a head reads of the trunk. Everything else is not computed; this is exact (spec section 3.3)."""

    POOLED = "row 0 of both streams"
    REGIONS = "all region rows"
    ALL = "all rows of both streams"


@dataclass(frozen=True)
class Streams:
    """The trunk's output for P pairs. Under `Need.POOLED` text and image hold row 0 of each pair only."""

    text: Tensor | None  # [pair text rows, D] or [P, D]; None under Need.REGIONS
    image: Tensor  # [pair region rows, V] or [P, V]
    text_rows: Rows
    image_rows: Rows


class Trunk(nn.Module):
    """θs of Algorithm 1: everything that all tasks share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        c = config
        self.text_embedding = TextEmbedding(c)
        self.image_embedding = ImageEmbedding(c)
        self.text_layers = nn.ModuleList(
            TransformerLayer(
                f"bert.encoder.layer.{i}.", c.hidden_size, c.num_attention_heads, c.intermediate_size,
                c.hidden_dropout_prob, c.attention_probs_dropout_prob,
            )
            for i in range(c.num_hidden_layers)
        )  # fmt: skip
        self.image_layers = nn.ModuleList(
            TransformerLayer(
                f"bert.encoder.v_layer.{j}.", c.v_hidden_size, c.v_num_attention_heads, c.v_intermediate_size,
                c.v_hidden_dropout_prob, c.v_attention_probs_dropout_prob,
            )
            for j in range(c.v_num_hidden_layers)
        )  # fmt: skip
        self.bridges = nn.ModuleList(Bridge(f"bert.encoder.c_layer.{k}.", c) for k in range(c.n_bridges))
        self.poolers = Poolers(c)
        blocks = [self.text_embedding, self.image_embedding, *self.text_layers, *self.image_layers, *self.bridges]
        layers = (("text", c.num_hidden_layers), ("image", c.v_num_hidden_layers), ("connection", c.n_bridges))
        titles = [f"{kind} {place}" for kind, count in layers for place in range(count)]
        titles = ["text embedding", "image embedding", *titles, "poolers"]
        for number, (block, title) in enumerate(zip([*blocks, self.poolers], titles, strict=True)):
            block.number, block.title = number, title
        self.n_blocks = len(blocks) + 1
        """Blocks numbered for randomness; heads come after."""

    def forward(self, batch: Batch, need: Need, random: Randomness, share: bool = True) -> Streams:
        """Streams of the batch's pairs. `share=False` runs every pair on copies of its own (same numbers, more work)."""
        if not share:
            batch = unshared(batch)
        texts = Rows(batch.cu_texts, batch.token_ids.numel(), batch.max_text, batch.text_key)
        images = Rows(batch.cu_images, batch.features.shape[0], batch.max_image, batch.image_key)
        text = self.text_alone(batch.token_ids, texts, batch.task_token is not None, random)
        image = self.image_alone(batch.features, batch.boxes, images, random)
        text, image, text_rows, image_rows = _paired(batch, text, image, texts, images)
        return self.together(text, image, text_rows, image_rows, need, random)

    def text_alone(self, token_ids: Tensor, rows: Rows, has_task_token: bool, random: Randomness) -> Tensor:
        """[T, D]: texts before the first bridge, where no image is looked at."""
        at = self._at(random)
        with span(self.text_embedding.title):
            text = self.text_embedding(token_ids, rows, has_task_token, at(self.text_embedding))
        return self._run(self.text_layers, 0, self.config.t_biattention_id[0], text, rows, at)

    def image_alone(self, features: Tensor, boxes: Tensor, rows: Rows, random: Randomness) -> Tensor:
        """[R, V]: images before the first bridge, where no text is read."""
        at = self._at(random)
        with span(self.image_embedding.title):
            image = self.image_embedding(features, boxes, rows, at(self.image_embedding))
        return self._run(self.image_layers, 0, self.config.v_biattention_id[0], image, rows, at)

    def together(
        self,
        text: Tensor,
        image: Tensor,
        text_rows: Rows,
        image_rows: Rows,
        need: Need,
        random: Randomness,
        projected: tuple[Tensor, Tensor] | None = None,
    ) -> Streams:
        """Streams of pairs from what each of them was alone. `projected`: see `Bridge.forward`; of the first bridge."""
        c, at = self.config, self._at(random)
        last = c.n_bridges - 1
        for k, bridge in enumerate(self.bridges):
            if k:
                text = self._run(
                    self.text_layers, c.t_biattention_id[k - 1], c.t_biattention_id[k], text, text_rows, at
                )
                image = self._run(
                    self.image_layers, c.v_biattention_id[k - 1], c.v_biattention_id[k], image, image_rows, at
                )
            assert isinstance(bridge, Bridge)
            with span(bridge.title):
                if k == last and need is Need.REGIONS:
                    image = bridge.image_side(text, image, text_rows, image_rows, at(bridge))
                else:
                    given = None if k else projected
                    text, image = bridge(text, image, text_rows, image_rows, at(bridge), given)
        first_only = need is Need.POOLED
        image = self._run(
            self.image_layers, c.v_biattention_id[last], c.v_num_hidden_layers, image, image_rows, at, first_only
        )
        if need is Need.REGIONS:
            return Streams(None, image, text_rows, image_rows)
        text = self._run(
            self.text_layers, c.t_biattention_id[last], c.num_hidden_layers, text, text_rows, at, first_only
        )
        return Streams(text, image, text_rows, image_rows)

    def pooled(self, streams: Streams, random: Randomness, pretraining: bool = False) -> Tensor:
        """[P, H]: the dropped-out product of both streams' pooled row 0."""
        assert streams.text is not None
        text, image, rows = streams.text, streams.image, streams.text_rows.first
        if text.shape[0] != rows.total:
            text = text.index_select(0, streams.text_rows.starts)
            image = image.index_select(0, streams.image_rows.starts)
        with span(self.poolers.title):
            return self.poolers(text, image, rows, self._at(random)(self.poolers), slot=int(pretraining))

    def _at(self, random: Randomness) -> At:
        return lambda block: random.at(block.number)

    @staticmethod
    def _run(
        layers: nn.ModuleList, start: int, stop: int, x: Tensor, rows: Rows, at: At, first_only: bool = False
    ) -> Tensor:
        """Layers start..stop-1; with `first_only` the result is row 0 of each item."""
        for i in range(start, stop):
            layer = layers[i]
            assert isinstance(layer, FlatBlock)
            with span(layer.title):
                x = layer(x, rows, at(layer), first_only=first_only and i == stop - 1)
        return x.index_select(0, rows.starts) if first_only and start == stop else x


def _paired(batch: Batch, text: Tensor, image: Tensor, texts: Rows, images: Rows) -> tuple[Tensor, Tensor, Rows, Rows]:
    """Rows of unique items gathered into rows of pairs, and the pairs' row spaces."""
    key = pair_key(batch.text_key[batch.pair_text], batch.image_key[batch.pair_image])
    if batch.n_texts == batch.n_pairs:
        text_rows = replace(texts, item_key=key)
    else:
        text_rows, gather = texts.take(batch.pair_text, batch.pair_text_rows, key)
        text = _gathered(text, gather)
    if batch.n_images == batch.n_pairs:
        image_rows = replace(images, item_key=key)
    else:
        image_rows, gather = images.take(batch.pair_image, batch.pair_image_rows, key)
        image = _gathered(image, gather)
    return text, image, text_rows, image_rows


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows], where rows repeat. Both ways compute the same; on a GPU the gradient of `index_select` adds repeats up in
    whatever order they come and in x's dtype, that of `embedding` in sorted segments and in float32."""
    return F.embedding(rows, x) if x.is_cuda else x.index_select(0, rows)


def pair_key(text_key: Tensor, image_key: Tensor) -> Tensor:
    """int64 in [0, 2**32): who a pair is, from who its text and image are."""
    mixed = (text_key * 0x9E3779B1 + image_key * 0x85EBCA77 + 0x165667B1) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF
    return mixed ^ (mixed >> 16)


def unshared(batch: Batch) -> Batch:
    """The same pairs, each with a text and an image of its own (same keys, so the same random draws)."""
    texts = Rows(batch.cu_texts, batch.token_ids.numel(), batch.max_text, batch.text_key)
    images = Rows(batch.cu_images, batch.features.shape[0], batch.max_image, batch.image_key)
    text_rows, text_gather = texts.take(batch.pair_text, batch.pair_text_rows, batch.text_key[batch.pair_text])
    image_rows, image_gather = images.take(batch.pair_image, batch.pair_image_rows, batch.image_key[batch.pair_image])
    pairs = torch.arange(batch.n_pairs, device=batch.pair_text.device)
    return replace(
        batch,
        token_ids=batch.token_ids[text_gather],
        cu_texts=text_rows.cu_seqlens,
        features=batch.features[image_gather],
        boxes=batch.boxes[image_gather],
        cu_images=image_rows.cu_seqlens,
        pair_text=pairs,
        pair_image=pairs,
        text_key=text_rows.item_key,
        image_key=image_rows.item_key,
    )
