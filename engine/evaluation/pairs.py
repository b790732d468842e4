"""Every text with every image, fast: what retrieval asks of a model (spec section 6).

A caption is scored against a block of images at a time. What a pair does not change is computed once:

    the text's layers before the first bridge                        once per caption
    the image's embedding and layers before the first bridge         once per image
    the image's queries, keys and values at the first bridge         once per image
    the text's queries, keys and values at the first bridge          once per caption and block

Behind the first bridge every row depends on its pair. One caption a call has two more merits: the texts of a call are
equally long, so that no attention pads; and the images of a block stand there once each, in their own order, so that their
rows, the many, are read where they lie. Only the few rows of the caption are copied. Exact: the same numbers as the model's
forward on the pairs, but for the order in which a product may add.

Shape letters: T text rows, R region rows of a block, D text width, V image width, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from engine.model.bridge import Bridge
from engine.model.heads import Head
from engine.model.randomness import Randomness
from engine.model.trunk import Need
from engine.model.vilbert import ViLBERT
from kernels.rows import Rows

_EVALUATION = Randomness()


@dataclass(frozen=True)
class Block:
    """Some images, as far as they can be computed without a text."""

    image: Tensor
    """[R, V]: their rows before the first bridge."""
    qkv: Tensor
    """[R, 3 * inner]: what the first bridge makes of them."""
    rows: Rows


class Pairs:
    """Scores of (text, image) pairs by a head of kind `match`, in evaluation mode."""

    def __init__(self, model: ViLBERT, head: str) -> None:
        module = model.heads[head]
        assert isinstance(module, Head) and module.need is Need.POOLED
        bridge = model.trunk.bridges[0]
        assert isinstance(bridge, Bridge)
        self._trunk, self._head, self._bridge = model.trunk, module, bridge

    @torch.inference_mode()
    def texts(self, token_ids: Tensor, lengths: list[int], has_task_token: bool) -> list[Tensor]:
        """Each text before the first bridge, [length, D]. `token_ids`: int64 [T], as `Batch.token_ids`; lengths sum to T."""
        rows = _rows(lengths, token_ids.device)
        return list(self._trunk.text_alone(token_ids, rows, has_task_token, _EVALUATION).split(lengths))

    @torch.inference_mode()
    def block(self, features: Tensor, boxes: Tensor, lengths: list[int]) -> Block:
        """Images of these lengths before the first bridge. `features` [R, F], `boxes` float32 [R, 5], as in `Batch`."""
        rows = _rows(lengths, features.device)
        image = self._trunk.image_alone(features, boxes, rows, _EVALUATION)
        return Block(image, self._bridge.project_image(image), rows)

    @torch.inference_mode()
    def scores(self, text: Tensor, block: Block) -> Tensor:
        """float32 [images of the block]: how well the text fits each. `text`: one of `texts`."""
        n, length = block.rows.n, len(text)
        projected = self._bridge.project_text(text).repeat(n, 1), block.qkv
        streams = self._trunk.together(
            text.repeat(n, 1), block.image, _equal_rows(n, length, text.device), block.rows, Need.POOLED, _EVALUATION,
            projected,
        )  # fmt: skip
        logits: Tensor = self._head(self._trunk, streams, _EVALUATION)
        return logits[:, 0].float()


def _rows(lengths: list[int], device: torch.device) -> Rows:
    """Nothing is drawn at random here, so items need no keys."""
    ends = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
    return Rows(ends, sum(lengths), max(lengths), torch.zeros(len(lengths), dtype=torch.int64, device=device))


@cache
def _equal_rows(n: int, length: int, device: torch.device) -> Rows:
    """Blocks have few sizes, and captions few lengths."""
    return _rows([length] * n, device)
