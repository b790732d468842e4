"""Batches for pretraining: captions and images with parts hidden, and what was there (paper section 3.1)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import MaskedTarget
from pipelines.datasets import TaskData
from pipelines.draft import Draft, filling
from pipelines.errors import BadInput
from pipelines.masking import Draw, Masking, asked, draw_captions, mask_regions, mask_words
from pipelines.packing import pack_texts, skeleton
from pipelines.regions import Regions
from pipelines.targets import Indices


def draft_masked(
    data: TaskData,
    indices: Indices,
    masking: Masking,
    *,
    epoch: int,
    seed: int,
    training: bool,
    dtype: torch.dtype = torch.float32,
    blind: bool = False,
    threads: int = 1,
) -> Draft:
    """The batch of these examples, before its features; one text and one image an example, without a task token.

    Equal arguments give equal batches; validation is the same in every epoch. `blind` zeroes every feature. Raises BadInput
    for a damaged record, and for one without class distributions.
    """
    draw = Draw(data.spec.number, seed, epoch if training else 0, indices)
    texts, unmatched = draw_captions(draw, len(data), masking.unmatched)
    token_ids, cu_texts = pack_texts(data, texts, None)
    words = mask_words(draw, masking, token_ids, cu_texts, unmatched)
    regions = Regions.of(data, data.image_rows[indices, 0].astype(np.int64))
    hidden = mask_regions(draw, masking, regions.pixels(), regions.cu_images, unmatched)
    target = MaskedTarget(
        word_rows=torch.from_numpy(words.rows),
        word_labels=torch.from_numpy(words.labels),
        region_rows=torch.from_numpy(hidden.rows),
        region_target=_distributions(data, regions, hidden.rows),
        unmatched=torch.from_numpy(unmatched.astype(np.int64)),
    )
    own = np.arange(len(indices))
    batch = skeleton(data, indices, texts, words.token_ids, cu_texts, regions, own, own, target, None, dtype)
    return Draft(batch, regions, hidden, blind, threads)


pack_masked = filling(draft_masked)
"""The same, on the host, in one slab."""


def asked_of(
    data: TaskData, indices: Indices, masking: Masking, *, epoch: int, seed: int, training: bool
) -> tuple[Indices, Indices]:
    """How many words and regions `draft_masked` asks each of these examples for, int64 [B] each; it reads no features."""
    draw = Draw(data.spec.number, seed, epoch if training else 0, indices)
    texts, unmatched = draw_captions(draw, len(data), masking.unmatched)
    words = data.token_offsets[texts + 1] - data.token_offsets[texts] - 2
    images = data.image_rows[indices, 0].astype(np.int64)
    regions = data.detector_counts(images) + data.candidate_counts(images)
    return asked(draw, masking, words, regions, unmatched)


def _distributions(data: TaskData, regions: Regions, rows: Indices) -> Tensor:
    """float32 [k, classes]: what the detector said of these region rows."""
    image = np.searchsorted(regions.cu_images, rows, side="right") - 1
    found = torch.empty((len(rows), data.store.classes))
    data.store.gather_probs(regions.images[image], rows - regions.cu_images[image] - 1, found)
    return found


def check_classes(data: TaskData, classes: int) -> None:
    """Raises BadInput where a split cannot be pretrained on: images without class distributions, or others than the model's."""
    images = np.unique(data.image_rows)
    without = images[~data.store.with_probs[images]]
    if len(without):
        raise BadInput(
            f"{data.store.path}: image {data.store.keys()[int(without[0])]}",
            f"no class distributions ({len(without)} images in all)",
            "pretraining guesses them: convert features that have them",
        )
    if data.store.classes != classes:
        raise BadInput(
            data.store.path,
            f"{data.store.classes} detector classes, the model has {classes}",
            "set model.v_target_size",
        )
