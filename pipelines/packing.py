"""From columns to a `Batch`: packed rows, unique items, pairs by index; the features are copied once, to where they stay
(`pipelines.draft`).

Shape letters as in `pipelines.batch`: T text rows, R region rows, P pairs, B examples.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import buckets, ragged
from pipelines.batch import Batch, BatchTarget, OptionTarget
from pipelines.datasets import TaskData
from pipelines.draft import Draft, filling
from pipelines.negatives import draw_options
from pipelines.regions import Regions
from pipelines.resident import Resident
from pipelines.targets import Choices, Classes, Indices, SoftLabels, TrueBoxes


def draft(
    data: TaskData,
    indices: Indices,
    *,
    epoch: int,
    seed: int,
    training: bool,
    task_token: int | None,
    dtype: torch.dtype = torch.float32,
    share: bool = True,
    blind: bool = False,
    grid: buckets.Grid | None = None,
    threads: int = 1,
    resident: Resident | None = None,
) -> Draft:
    """The batch of these examples, before its features. Equal arguments give equal batches.

    `epoch` and `seed` choose retrieval's wrong options. In `training`, overlaps below one half are no match.
    `task_token` becomes row 1 of every text. `dtype` of the features is float32 or bfloat16. With `share`, a text or
    image that several pairs use appears once; without, each pair has its own copy, under the same key. `blind`
    zeroes the features and leaves the boxes: what can be said without looking. With a `grid` the batch is padded to a
    shape bucket; then `share` shares within examples alone, so that every batch has equally many items. `threads` copy
    features. With `resident` those stay where they are, and their rows' numbers travel. Raises BadInput for a damaged record.
    """
    texts, images = _pairs(data, indices, epoch=epoch, seed=seed, training=training)
    if grid is None:
        (unique_texts, pair_text), (unique_images, pair_image) = _unique(texts, share), _unique(images, share)
    else:
        k = len(texts) // len(indices)
        unique_texts, pair_text = _unique_within(texts.reshape(-1, k), share)
        unique_images, pair_image = _unique_within(images.reshape(-1, k), share)
    token_ids, cu_texts = pack_texts(data, unique_texts, task_token)
    regions = Regions.of(data, unique_images)
    target = _target(data, indices, regions, pair_image, training)
    batch = skeleton(
        data,
        indices,
        unique_texts,
        token_ids,
        cu_texts,
        regions,
        pair_text,
        pair_image,
        target,
        task_token,
        dtype,
    )
    if grid is not None:
        batch = buckets.pad(batch, grid)
    if resident is not None:
        batch = _staying(batch, regions, resident, blind)
    return Draft(batch, regions, blind=blind, threads=threads)


pack = filling(draft)
"""The same, on the host, in one slab."""


def skeleton(
    data: TaskData,
    indices: Indices,
    texts: Indices,
    token_ids: NDArray[np.int64],
    cu_texts: ragged.Offsets,
    regions: Regions,
    pair_text: NDArray[np.int64],
    pair_image: NDArray[np.int64],
    target: BatchTarget | None,
    task_token: int | None,
    dtype: torch.dtype,
) -> Batch:
    """Everything of a batch but its features and boxes, which have a shape and no values yet (device `meta`).

    `texts`: the example that each text is of, int64 [n_texts].
    """
    text_rows, image_rows = ragged.lengths_of(cu_texts), ragged.lengths_of(regions.cu_images)
    return Batch(
        task=data.spec.name,
        examples=len(indices),
        task_token=task_token,
        token_ids=torch.from_numpy(token_ids),
        cu_texts=torch.from_numpy(cu_texts.astype(np.int32)),
        features=torch.empty((regions.rows, data.store.feature_dim), dtype=dtype, device="meta"),
        boxes=torch.empty((regions.rows, 5), device="meta"),
        cu_images=torch.from_numpy(regions.cu_images.astype(np.int32)),
        pair_text=torch.from_numpy(pair_text),
        pair_image=torch.from_numpy(pair_image),
        text_key=torch.from_numpy(data.text_keys[texts]),
        image_key=torch.from_numpy(data.image_keys[regions.images]),
        target=target,
        max_text=int(text_rows.max()),
        max_image=int(image_rows.max()),
        example_ids=tuple(data.ids[indices].tolist()),
        pair_text_rows=int(text_rows[pair_text].sum()),
        pair_image_rows=int(image_rows[pair_image].sum()),
    )


def _staying(batch: Batch, regions: Regions, resident: Resident, blind: bool) -> Batch:
    """The batch with numbers of features instead of features; row 0 of the table, zeros, for padding and for the blind."""
    rows = np.zeros(len(batch.boxes), np.int64)
    if not blind:
        rows[: regions.rows] = regions.resident_rows(resident)
    none = torch.empty((0, batch.features.shape[1]), dtype=batch.features.dtype)
    return replace(batch, features=none, feature_rows=torch.from_numpy(rows), resident=resident.table)


def _pairs(data: TaskData, indices: Indices, *, epoch: int, seed: int, training: bool) -> tuple[Indices, Indices]:
    """(text, image) of every pair, int64 [P] each: texts are example indices, images are store rows."""
    if data.pool is not None:
        texts, images = draw_options(
            data.pool, indices, number=data.spec.number, seed=seed, epoch=epoch, training=training
        )
        return texts.reshape(-1), images.reshape(-1)
    return np.repeat(indices, data.spec.images), data.image_rows[indices].astype(np.int64).reshape(-1)


def _unique(items: Indices, share: bool) -> tuple[Indices, NDArray[np.int64]]:
    """The items that the batch holds, and which of them each pair uses.

    In the order of their first appearance: where nothing is shared, pair p has item p, and the model gathers nothing.
    """
    if not share:
        return items, np.arange(len(items))
    places: dict[int, int] = {}
    used = [places.setdefault(item, len(places)) for item in items.tolist()]
    return np.fromiter(places, np.int64, len(places)), np.array(used)


def _unique_within(items: Indices, share: bool) -> tuple[Indices, NDArray[np.int64]]:
    """The same for items [B, k] of B examples, where only pairs of one example share, and all examples alike."""
    pairs = range(items.shape[1])
    first = [next(i for i in pairs if i == j or (share and (items[:, i] == items[:, j]).all())) for j in pairs]
    own = sorted(set(first))
    place = np.array([own.index(i) for i in first])
    return items[:, own].reshape(-1), (np.arange(len(items))[:, None] * len(own) + place).reshape(-1)


def pack_texts(data: TaskData, texts: Indices, task_token: int | None) -> tuple[NDArray[np.int64], ragged.Offsets]:
    """Token ids int64 [T] and cu_texts int64 [n_texts + 1]."""
    if task_token is None:
        flat, cu_texts = ragged.take(data.token_offsets, texts)
        return data.token_ids[flat].astype(np.int64), cu_texts
    starts = data.token_offsets[texts]
    lengths = data.token_offsets[texts + 1] - starts + 1
    cu_texts = ragged.offsets_of(lengths)
    first = cu_texts[:-1]
    flat = ragged.ranges(starts - 1, lengths)  # row 0 is word 0, row 1 the task token, row 2 word 1
    flat[first] += 1
    token_ids = data.token_ids[flat].astype(np.int64)
    token_ids[first + 1] = task_token
    return token_ids, cu_texts


def _target(
    data: TaskData,
    indices: Indices,
    regions: Regions,
    pair_image: NDArray[np.int64],
    training: bool,
) -> BatchTarget | None:
    match data.target:
        case SoftLabels() | Classes() as columns:
            return columns.pack(indices)
        case TrueBoxes() as boxes:
            rows, cu_regions = ragged.take(regions.cu_images, pair_image)
            return boxes.pack(indices, cu_regions, regions.pixels()[rows], training)
        case Choices() as choices:
            return choices.pack(indices, regions.first_candidate[pair_image])
        case None if data.pool is not None:
            return OptionTarget(torch.zeros(len(indices), dtype=torch.int64))  # the match is always the first
        case _:
            return None
