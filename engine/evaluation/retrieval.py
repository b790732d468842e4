"""All captions of a split against all of its images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.evaluation.decisions import not_finite
from engine.evaluation.pairs import Block, Pairs
from engine.trained import Trained
from pipelines.datasets import TaskData
from pipelines.packing import pack_texts
from pipelines.progress import Show
from pipelines.ragged import lengths_of
from pipelines.regions import Regions

BLOCK_ROWS = 4096
"""Region rows of the images that are scored in one call."""
_TEXTS = 256
"""Captions whose own layers run in one call."""


def pair_scores(trained: Trained, data: TaskData, show: Show) -> NDArray[np.float32]:
    """float32 [captions, images of the pool]: scores of every caption with every image of the split.

    Raises BadInput naming the task where a score is not a finite number.
    """
    assert data.pool is not None
    pairs = Pairs(trained.model, trained.row(data.spec.name).head)
    captions = _captions(trained, data, pairs)
    images = data.pool.images.astype(np.int64)
    scores = np.empty((len(captions), len(images)), np.float32)
    for first, block in _blocks(trained, data, pairs, images):
        found = []
        for done, caption in enumerate(captions, 1):
            found.append(pairs.scores(caption, block))
            show(f"{data.spec.name}, pairs", first * len(captions) + done * block.rows.n, scores.size)
        part = scores[:, first : first + block.rows.n]
        part[:] = torch.stack(found).cpu().numpy()
        finite = np.isfinite(part).all(1)
        if not finite.all():  # told now: the rest may take hours
            raise not_finite(trained, data, f"caption {data.ids[int(np.argmin(finite))]}")
    return scores


def _captions(trained: Trained, data: TaskData, pairs: Pairs) -> list[Tensor]:
    token = trained.token(data.spec.name)
    captions: list[Tensor] = []
    for start in range(0, len(data), _TEXTS):
        token_ids, cu_texts = pack_texts(data, np.arange(start, min(start + _TEXTS, len(data))), token)
        on_device = torch.from_numpy(token_ids).to(trained.device)
        captions += pairs.texts(on_device, lengths_of(cu_texts).tolist(), token is not None)
    return captions


def _blocks(trained: Trained, data: TaskData, pairs: Pairs, images: NDArray[np.int64]) -> Iterator[tuple[int, Block]]:
    """(place of the first image, block) of all images, in their order."""
    rows = 1 + data.detector_counts(images)
    start = 0
    while start < len(images):
        stop = start + max(1, int(np.searchsorted(np.cumsum(rows[start:]), BLOCK_ROWS, side="right")))
        regions = Regions.of(data, images[start:stop])
        features = torch.empty((regions.rows, data.store.feature_dim), dtype=trained.dtype)
        boxes = torch.empty((regions.rows, 5))
        regions.fill(features, boxes, threads=1)
        lengths = lengths_of(regions.cu_images).tolist()
        yield start, pairs.block(features.to(trained.device), boxes.to(trained.device), lengths)
        start = stop
