"""Our way from a store to a batch, and what no way can beat: copying the same bytes to the same place."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bench.pipeline_images import HEIGHT, WIDTH, Image
from pipelines.arena import Arena
from pipelines.batch import Batch
from pipelines.datasets import DataSpec, TaskData
from pipelines.packing import pack
from pipelines.random import image_keys
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter
from pipelines.targets import Classes

_WORDS = 12


def write(path: Path, images: Iterable[Image], width: int, dtype: str) -> None:
    """A store of these images."""
    with StoreWriter(path, width, dtype, "bench.pipeline") as writer:
        for image in images:
            writer.add(image.key, image.features, image.boxes, WIDTH, HEIGHT)


class OurReader:
    """`pipelines.packing.pack` whole: texts, keys, boxes and targets too, which the peers are not asked for."""

    first_row = 1

    def __init__(self, path: Path, threads: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
        self.store = FeatureStore(path)
        self._data = task_data(self.store)
        self._threads, self._dtype = threads, dtype

    def batch(self, keys: list[str]) -> Batch:
        return pack(
            self._data, self.store.index(keys), epoch=0, seed=0, training=True, task_token=1, dtype=self._dtype,
            threads=self._threads,
        )  # fmt: skip


class Memcpy:
    """The bytes of the features, by `memcpy`, one call an image, from the store's map into memory that is used again."""

    first_row = 0

    def __init__(self, path: Path) -> None:
        self._store = FeatureStore(path, verify="never")
        self._arena = Arena(pin=False)

    def batch(self, keys: list[str]) -> Tensor:
        rows = self._store.index(keys).tolist()
        sizes = [int(self._store.counts[row]) * self._store.feature_dim * 2 for row in rows]
        target = self._arena.take(sum(sizes))
        place = target.data_ptr()
        for row, size in zip(rows, sizes, strict=True):
            ctypes.memmove(place, int(self._store.records.features[row]), size)
            place += size
        return target


def task_data(store: FeatureStore) -> TaskData:
    """A task with one example an image, of `_WORDS` words and one class."""
    n = len(store)
    offsets = np.arange(n + 1, dtype=np.int64) * _WORDS
    return TaskData(
        spec=DataSpec("pipeline", "", 1, 64, 1 + int(store.counts.max()), 1, "classes"),
        split="train", store=store, candidates=None, ids=np.array(list(store.keys()), np.dtypes.StringDType()),
        group_names=("",), group_codes=np.zeros(n, np.int32), token_ids=np.full(n * _WORDS, 7, np.int32),
        token_offsets=offsets, image_rows=np.arange(n, dtype=np.int32)[:, None],
        candidate_rows=np.full(n, -1, np.int32), image_keys=image_keys(store.keys()),
        target=Classes(np.zeros(n, np.int32)), pool=None,
    )  # fmt: skip
