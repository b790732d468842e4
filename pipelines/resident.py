"""Features that stay in the device's memory: copied there once, and then only their row numbers travel with a batch.

All twelve data sets are some 220 GB in bfloat16, and half of that as bytes; a run over fewer of them, or the shard of a node's
eight GPUs, fits. **One process holds all of its run's features; this has never run on a GPU.** Over several ranks each would
hold the images whose key's checksum is its rank, modulo the ranks of its node, 27 GB a GPU on eight; a batch's rows would be
exchanged by one all-to-all over NVLink (2.6 GB/s a GPU are wanted, some 400 are there), and global batches would stay what
they are, since no sampler asks where an image lies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines import ragged
from pipelines.datasets import TaskData
from pipelines.errors import BadInput
from pipelines.store.reader import FeatureStore

_CHUNK = 256
_ROOM = 0.9
"""Of the device's free memory that features may take."""

Images = NDArray[np.int64]


@dataclass(frozen=True)
class Resident:
    """The features of every image that some data sets use, on a device."""

    table: Tensor
    """[N, F]. Row 0 is zeros; then each image's global row and regions, store by store."""
    first: dict[FeatureStore, Images]
    """int64 [images of the store]: where an image's global row is; -1 where no data set uses it."""

    @classmethod
    def of(
        cls,
        datas: Iterable[TaskData],
        dtype: torch.dtype,
        device: torch.device,
        show: Callable[[int, int], None] = lambda done, total: None,
    ) -> Resident:
        """Copy them. `show(images done, images in all)` is told as it goes. Raises BadInput without the room, and for damaged
        records."""
        used: dict[FeatureStore, NDArray[np.bool_]] = {}
        for data in datas:
            _mark(used, data.store, data.image_rows)
            if data.candidates is not None:
                _mark(used, data.candidates, data.candidate_rows[data.candidate_rows >= 0])
        first, end = {}, 1
        for store, flags in used.items():
            offsets = end + ragged.offsets_of(np.where(flags, store.counts + 1, 0))
            first[store], end = np.where(flags, offsets[:-1], -1), int(offsets[-1])
        width = next(iter(used)).feature_dim
        _check_room(end * width * dtype.itemsize, device)
        table = torch.zeros((end, width), dtype=dtype, device=device)
        done, total = 0, sum(int(flags.sum()) for flags in used.values())
        for store, flags in used.items():
            images = np.flatnonzero(flags)
            for start in range(0, len(images), _CHUNK):
                chunk = images[start : start + _CHUNK]
                offsets = ragged.offsets_of(store.counts[chunk] + 1)
                rows = torch.empty((int(offsets[-1]), width), dtype=dtype)
                store.gather(chunk, offsets[:-1], rows)
                place = int(first[store][chunk[0]])  # images of one store lie in its order, without gaps
                table[place : place + len(rows)] = rows.to(device)
                done += len(chunk)
                show(done, total)
            store.release()
        return cls(table, first)

    def rows(self, store: FeatureStore, images: Images, counts: Images, global_row: bool) -> list[Images]:
        """Rows of the table of each image's global row (if wanted) and its first `counts` regions."""
        starts = self.first[store][images] + (not global_row)
        return [np.arange(a, a + n + global_row) for a, n in zip(starts.tolist(), counts.tolist(), strict=True)]


def _mark(used: dict[FeatureStore, NDArray[np.bool_]], store: FeatureStore, rows: NDArray[np.int32]) -> None:
    used.setdefault(store, np.zeros(len(store), bool))[rows.reshape(-1)] = True


def _check_room(needed: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if needed > _ROOM * free:
        raise BadInput(
            "resident_features", f"{needed / 2**30:.1f} GiB of features, {free / 2**30:.1f} GiB free on {device}",
            "resident_features=false, or fewer data sets",
        )  # fmt: skip
