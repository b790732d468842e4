"""A pool to retrieve from, made up with real lengths, in both forms: as the engine reads it, and padded as the peers do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench import lengths
from bench.batches import random_image, random_text
from bench.peers.model import PaddedInputs
from engine.model.config import ModelConfig
from engine.tasks import TaskRow


@dataclass(frozen=True)
class Pool:
    """Captions and images of a task; nothing in it is shared or padded yet."""

    row: TaskRow
    texts: list[Tensor]
    """int64 [length] each, the task token not included."""
    features: list[Tensor]
    """float32 [regions, F] each."""
    boxes: list[Tensor]

    @classmethod
    def drawn(cls, row: TaskRow, config: ModelConfig, captions: int, images: int, seed: int) -> Pool:
        """Lengths from `bench/lengths.json`, everything else at random."""
        random, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        measured = lengths.load()[row.name]
        rows = measured.texts.draw(random, captions).tolist()
        texts = [random_text(length - 1, config.vocab_size, generator) for length in rows]
        drawn = [
            random_image(length, config.v_feature_size, generator)
            for length in measured.draw_regions(random, images).tolist()
        ]
        return cls(row, texts, [features for features, _ in drawn], [boxes for _, boxes in drawn])

    def packed_text(self, caption: int) -> Tensor:
        """int64 [length + 1], the task token in its place."""
        text = self.texts[caption]
        return torch.cat((text[:1], torch.tensor([self.row.number]), text[1:]))

    def padded_text(self, caption: int) -> PaddedInputs:
        """One row of text, without an image."""
        ids, mask = (torch.zeros(1, self.row.max_tokens, dtype=torch.int64) for _ in range(2))
        text, nothing = self.texts[caption], torch.empty(0)
        ids[0, : len(text)], mask[0, : len(text)] = text, 1
        return PaddedInputs(ids, mask, nothing, nothing, nothing, self.row.number)

    def padded_images(self, first: int, stop: int, dtype: torch.dtype) -> PaddedInputs:
        """Rows of images, without a text."""
        n, nothing = stop - first, torch.empty(0, dtype=torch.int64)
        features = torch.zeros(n, self.row.max_regions, self.features[0].shape[1], dtype=dtype)
        boxes = torch.zeros(n, self.row.max_regions, 5, dtype=dtype)
        mask = torch.zeros(n, self.row.max_regions, dtype=torch.int64)
        for place in range(n):
            rows = len(self.boxes[first + place])
            features[place, :rows], boxes[place, :rows] = self.features[first + place], self.boxes[first + place]
            mask[place, :rows] = 1
        return PaddedInputs(nothing, nothing, features, boxes, mask, None)
