"""The ways to score all pairs of a pool, each in the pieces that its time is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.peers.model import PaddedModel
from bench.peers.retrieval import AuthorsLoop, PairwiseLoop
from bench.retrieval_pool import Pool
from engine.evaluation.pairs import Pairs
from engine.model.config import ModelConfig
from engine.model.published import PUBLISHED_HEADS, export_published
from engine.model.vilbert import ViLBERT

HEAD = "vil_logit"


@dataclass(frozen=True)
class Piece:
    """Work that is repeated: `run(turn)` does `units` of it, other captions or images at every turn."""

    run: Callable[[int], object]
    units: int
    of: str
    """captions, images or pairs: how many units a whole pool has."""


class Way(Protocol):
    """One way."""

    def pieces(self) -> dict[str, Piece]:
        """What its time is made of."""

    def scores(self, captions: int, images: int) -> Tensor:
        """float32 [captions, images] of the pool's first."""


def models(config: ModelConfig, dtype: torch.dtype, seed: int) -> tuple[ViLBERT, PaddedModel, PaddedModel]:
    """Equal weights: ours in `dtype`, the peers' in `dtype`, the peers' in float32."""
    ours = ViLBERT(config, {HEAD: PUBLISHED_HEADS[HEAD]})
    ours.initialise(seed)
    state = export_published(ours)
    peers = []
    for kind in (dtype, torch.float32):
        peers.append(PaddedModel(config).eval())
        peers[-1].load_state_dict(state)
        peers[-1].to(kind)
    return ours.to(dtype).eval(), peers[0], peers[1]


class Ours:
    """`engine.evaluation.pairs`: texts once, images once, then blocks."""

    def __init__(self, model: ViLBERT, pool: Pool, dtype: torch.dtype, captions: int, block: int) -> None:
        self.pairs, self.pool, self.dtype = Pairs(model, HEAD), pool, dtype
        self.captions, self.block = captions, block
        self._ready = self.images(0, block), self.texts(range(len(pool.texts)))

    def pieces(self) -> dict[str, Piece]:
        return {
            "texts": Piece(lambda turn: self.texts(_turn(self.pool, turn, self.captions)), self.captions, "captions"),
            "images": Piece(lambda turn: self.images(0, self.block), self.block, "images"),
            "pairs": Piece(self._pairs, self.captions * self.block, "pairs"),
        }

    def scores(self, captions: int, images: int) -> Tensor:
        texts, starts = self.texts(range(captions)), range(0, images, self.block)
        blocks = [self.images(start, min(start + self.block, images)) for start in starts]
        return torch.stack([torch.cat([self.pairs.scores(text, block) for block in blocks]) for text in texts])

    def _pairs(self, turn: int) -> None:
        block, texts = self._ready
        for caption in _turn(self.pool, turn, self.captions):
            self.pairs.scores(texts[caption], block)

    def texts(self, captions: Any) -> list[Tensor]:
        packed = [self.pool.packed_text(caption) for caption in captions]
        return self.pairs.texts(torch.cat(packed), [len(text) for text in packed], True)

    def images(self, first: int, stop: int) -> Any:
        features, boxes = self.pool.features[first:stop], self.pool.boxes[first:stop]
        return self.pairs.block(torch.cat(features).to(self.dtype), torch.cat(boxes), [len(x) for x in boxes])


class Loop:
    """A peer: calls of one caption with some images, which lie padded in memory before the clock starts."""

    def __init__(
        self, loop: PairwiseLoop | AuthorsLoop, pool: Pool, dtype: torch.dtype, captions: int, images: int
    ) -> None:
        self.loop, self.pool, self.dtype = loop, pool, dtype
        self.captions, self.images = captions, images
        self._padded = pool.padded_images(0, images, dtype)

    def pieces(self) -> dict[str, Piece]:
        return {"pairs": Piece(self._pairs, self.captions * self.images, "pairs")}

    def scores(self, captions: int, images: int) -> Tensor:
        starts = range(0, images, self.images)
        parts = [self.pool.padded_images(start, min(start + self.images, images), self.dtype) for start in starts]
        texts = [self.pool.padded_text(caption) for caption in range(captions)]
        return torch.stack([torch.cat([self.loop.scores(text, part) for part in parts]) for text in texts])

    def _pairs(self, turn: int) -> None:
        for caption in _turn(self.pool, turn, self.captions):
            self.loop.scores(self.pool.padded_text(caption), self._padded)


def _turn(pool: Pool, turn: int, captions: int) -> list[int]:
    return [(turn * captions + place) % len(pool.texts) for place in range(captions)]


@dataclass
class Rows:
    """What was computed: rows that went through layers, and bytes of features that were embedded."""

    rows: int = 0
    feature_bytes: int = 0


@contextmanager
def counted(model: ViLBERT | PaddedModel) -> Iterator[Rows]:
    """Rows of both streams that the model's layers give out, padding among them, within the block."""
    found = Rows()

    def rows(module: nn.Module, inputs: Any, output: Any) -> None:
        for x in output if isinstance(output, tuple) else (output,):
            found.rows += x.numel() // x.shape[-1]

    def features(module: nn.Module, inputs: Any, output: Any) -> None:
        found.feature_bytes += inputs[0].nbytes

    layers, embedding = _watched(model)
    handles = [layer.register_forward_hook(rows) for layer in layers]
    handles.append(embedding.register_forward_hook(features))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _watched(model: ViLBERT | PaddedModel) -> tuple[list[nn.Module], nn.Module]:
    """The layers of both streams and between them, and what reads features."""
    if isinstance(model, ViLBERT):
        trunk = model.trunk
        return [*trunk.text_layers, *trunk.image_layers, *trunk.bridges], trunk.image_embedding
    encoder = model.bert.encoder
    return [*encoder.layer, *encoder.v_layer, *encoder.c_layer], model.bert.v_embeddings
