"""Read a feature store: checked at the door, then straight from the memory map into a batch.

A store is one LMDB environment, or a folder of several, its shards, which read as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pipelines.boxes import Float32
from pipelines.copy_runs import DTYPES, Records, copy_runs, gather_records
from pipelines.errors import BadInput
from pipelines.store.record import HEADER_BYTES, Record
from pipelines.store.shard import Shard

Verify = Literal["always", "first", "never"]
Rows = NDArray[np.int64]


class FeatureStore:
    """A finished store at `path`, read-only. Its images are in the order of their keys' bytes, whatever the shards.

    What opening checks is said in `pipelines.store.shard`. Checksums are tested on the first read of each record in a
    process (`verify`). `readahead=False` suits random reads of a store that the page cache cannot hold.

    One store may be used from many threads and after a fork; pickled, it opens again where it is unpickled.
    Raises `BadInput`, naming the store and the key.
    """

    def __init__(self, path: Path | str, verify: Verify = "first", readahead: bool = True) -> None:
        self.path = Path(path)
        self._arguments = (self.path, verify, readahead)
        self._shards = [Shard(part, readahead) for part in shard_paths(self.path)]
        first = self._shards[0].metadata
        self.feature_dim: int = first.feature_dim
        self.dtype: str = first.dtype
        self.classes: int = max(shard.metadata.classes for shard in self._shards)
        """Length of a class distribution; 0 where no record has one."""
        self.source: str = first.source
        self._check_alike()
        keys = [key for shard in self._shards for key in shard.metadata.keys]
        order = np.array(sorted(range(len(keys)), key=lambda row: keys[row].encode()), np.int64)
        self._keys = tuple(keys[row] for row in order.tolist())
        self._rows = {key: row for row, key in enumerate(self._keys)}
        if len(self._rows) < len(keys):
            twice = next(a for a, b in zip(self._keys, self._keys[1:], strict=False) if a == b)
            raise BadInput(f"{self.path}: image {twice}", "in two shards", "each image once: remove one of the shards")

        def merged(parts: Iterable[NDArray[Any]]) -> NDArray[Any]:
            return np.concatenate(list(parts))[order]

        self.counts: NDArray[np.int32] = merged(shard.metadata.counts for shard in self._shards)
        """int32 [images]: regions of each image, the global row not counted."""
        self.sizes: NDArray[np.int32] = merged(shard.metadata.sizes for shard in self._shards)
        """int32 [images, 2]: width, height in pixels."""
        self.with_probs: NDArray[np.bool_] = merged(shard.metadata.with_probs for shard in self._shards)
        """bool [images]: which records have class distributions."""
        self._shard_of = merged(np.full(len(shard.offsets), i) for i, shard in enumerate(self._shards))
        self._row_in_shard = merged(np.arange(len(shard.offsets)) for shard in self._shards)
        # Addresses of the records' parts; the shards keep the maps alive.
        starts = [shard.file_bytes.ctypes.data + shard.offsets for shard in self._shards]
        layouts = [shard.layout for shard in self._shards]
        self.records = Records(
            DTYPES[self.dtype],
            self.feature_dim,
            merged(start + HEADER_BYTES for start in starts),
            merged(start + layout.boxes for start, layout in zip(starts, layouts, strict=True)),
            merged(start + layout.scales for start, layout in zip(starts, layouts, strict=True)),
            merged(start + layout.features for start, layout in zip(starts, layouts, strict=True)),
        )
        """Where the parts of each record lie in this process's memory."""
        self._probs = merged(start + layout.probs for start, layout in zip(starts, layouts, strict=True))
        self._verify = verify
        self._unverified = np.full(len(self), verify != "never")
        self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, self._arguments

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(shard.file_bytes.nbytes for shard in self._shards)

    def keys(self) -> tuple[str, ...]:
        """Image keys; position = row in `counts`, `sizes` and `index`."""
        return self._keys

    def index(self, keys: Iterable[str]) -> Rows:
        """Rows of these images, int64 [n]."""
        try:
            return np.fromiter((self._rows[key] for key in keys), dtype=np.int64)
        except KeyError as error:
            raise BadInput(
                f"{self.path}: image {error.args[0]}", "no features", "convert or extract this image"
            ) from error

    def record(self, key: str) -> Record:
        """One image's record, as views of the memory map."""
        row = self.index([key])
        self._verify_rows(row)
        shard, place = self._locate(int(row[0]))
        return shard.record(place)

    def gather(
        self,
        rows: ArrayLike,
        starts: ArrayLike,
        features: Tensor | None,
        locations: Tensor | None = None,
        *,
        taken: ArrayLike | None = None,
        sizes: NDArray[np.int32] | None = None,
        global_row: bool = True,
        threads: int = 1,
    ) -> None:
        """Copy many images into preallocated rows: the way from the memory map to a batch.

        Image i (`rows[i]`, from `index`) fills the rows of `features` from `starts[i]` on: its global row (the mean of all
        its regions) unless `global_row` is false, then its first `taken[i]` regions, by default all; and the same rows of
        `locations`, what the model reads of their boxes (`pipelines.boxes.locations`), in shares of `sizes` [n, 2], by
        default the images' own. `features`: [R, F] float32 or bfloat16 on the CPU, `locations`: float32 [R, 5], contiguous;
        None: these are not wanted. Values are converted once, rounded to nearest even; other rows are left alone. `threads`
        share the copying. Raises BadInput for a damaged record, before anything is copied.
        """
        wanted = [(x, n) for x, n in ((features, self.feature_dim), (locations, 5)) if x is not None]
        for x, columns in wanted:
            if x.shape[1:] != (columns,) or not x.is_contiguous():
                raise ValueError(f"{list(x.shape)}, wanted contiguous [rows, {columns}]")
        room = min(x.shape[0] for x, _ in wanted)
        images, first, counts = self._places(rows, starts, taken, global_row, room)
        self._verify_rows(images)
        if sizes is None:
            sizes = self.sizes[images]
        gather_records(self.records, images, counts, first, sizes, features, locations, global_row, threads)

    def gather_bytes(
        self,
        rows: ArrayLike,
        starts: ArrayLike,
        values: Tensor,
        scales: Tensor,
        *,
        taken: ArrayLike | None = None,
        threads: int = 1,
    ) -> None:
        """The same from a store of uint8, as they are stored: values to uint8 [R, F], and what they are to be multiplied by to
        float32 [R, 1], contiguous both. Without global rows, which a store has in float32 alone."""
        if self.dtype != "uint8" or values.dtype != torch.uint8 or scales.dtype != torch.float32:
            raise ValueError(
                f"a store of {self.dtype} to {values.dtype} and {scales.dtype}, wanted bytes and their scales"
            )
        images, first, counts = self._places(rows, starts, taken, False, min(len(values), len(scales)))
        width = self.feature_dim
        assert values.shape[1:] == (width,) and values.is_contiguous()
        assert scales.shape[1:] == (1,) and scales.is_contiguous()
        self._verify_rows(images)
        targets = values.data_ptr() + first * width
        copy_runs(torch.uint8, torch.uint8, self.records.features[images], targets, counts * width, threads)
        copy_runs(torch.float32, torch.float32, self.records.scales[images], scales.data_ptr() + first * 4, counts)

    def gather_boxes(
        self,
        rows: ArrayLike,
        starts: ArrayLike,
        boxes: Float32,
        *,
        taken: ArrayLike | None = None,
        global_row: bool = True,
    ) -> None:
        """The same for the boxes, float32 [R, 4] in pixels; that of the global row is 0, 0, width, height."""
        images, first, counts = self._places(rows, starts, taken, global_row, len(boxes))
        self._verify_rows(images)
        if global_row:
            boxes[first, :2] = 0
            boxes[first, 2:] = self.sizes[images]
        assert boxes.flags.c_contiguous and boxes.dtype == np.float32
        targets = boxes.ctypes.data + (first + global_row) * 16
        copy_runs(torch.float32, torch.float32, self.records.boxes[images], targets, counts * 4)

    def gather_probs(self, rows: ArrayLike, regions: ArrayLike, probs: Tensor) -> None:
        """The class distributions of single regions: region `regions[i]` of image `rows[i]` into row i of `probs`, float32
        [n, classes]. Every image must have them (`with_probs`). Raises BadInput for a damaged record."""
        images, region = np.asarray(rows, np.int64), np.asarray(regions, np.int64)
        if not self.with_probs[images].all() or (region >= self.counts[images]).any() or (region < 0).any():
            raise IndexError("a region without a class distribution")
        assert probs.shape == (len(images), self.classes) and probs.dtype == torch.float32 and probs.is_contiguous()
        self._verify_rows(images)
        sources = self._probs[images] + region * (2 * self.classes)
        targets = probs.data_ptr() + np.arange(len(images)) * (4 * self.classes)
        copy_runs(torch.float16, torch.float32, sources, targets, np.full_like(images, self.classes))

    def release(self) -> None:
        """Leave the pages read so far to the page cache: they no longer count as this process's memory."""
        for shard in self._shards:
            shard.release()

    def verify_records(self) -> None:
        """Read every record against its checksum, so that no damage waits for the middle of a run. Raises BadInput."""
        self._verify_rows(np.arange(len(self)))

    def _places(
        self, rows: ArrayLike, starts: ArrayLike, taken: ArrayLike | None, global_row: bool, room: int
    ) -> tuple[Rows, Rows, Rows]:
        """(rows, starts, regions taken), int64 [n] each, seen to lie within the store and the target."""
        images, first = np.asarray(rows, np.int64), np.asarray(starts, np.int64)
        if images.shape != first.shape or images.ndim != 1:
            raise ValueError(f"{images.shape} rows and {first.shape} starts")
        counts = self.counts[images].astype(np.int64)
        if taken is not None:
            counts = np.minimum(counts, np.asarray(taken, np.int64))
        ends = first + counts + int(global_row)
        if ((room - ends) | first | counts | images).min(initial=0) < 0:  # one of them is negative
            raise IndexError(f"rows {first.min()} to {ends.max()} of {room}")
        return images, first, counts

    def _locate(self, row: int) -> tuple[Shard, int]:
        return self._shards[self._shard_of[row]], int(self._row_in_shard[row])

    def _verify_rows(self, images: Rows) -> None:
        """Test those that are due. All are asked for before the first is read, so that a disk has much to do at once."""
        due = [self._locate(row) for row in images[self._unverified[images]].tolist()]
        for shard, place in due:
            shard.fetch(place)
        for shard, place in due:
            shard.verify(place)
        if due and self._verify == "first":
            self._unverified[images] = False

    def _check_alike(self) -> None:
        for shard in self._shards[1:]:
            for name, wanted in (("feature_dim", self.feature_dim), ("dtype", self.dtype)):
                found = getattr(shard.metadata, name)
                if found != wanted:
                    raise BadInput(shard.path, f"{name} {found} beside {wanted} of {self._shards[0].path.name}",
                                   "the shards of a store are of one kind")  # fmt: skip
            if shard.metadata.classes not in (0, self.classes):
                raise BadInput(shard.path, f"{shard.metadata.classes} classes beside {self.classes}",
                               "the shards of a store are of one kind")  # fmt: skip


def shard_paths(path: Path) -> list[Path]:
    """The environments of a store: the path itself, or the folders in it that hold one, by name. BadInput where none is."""
    if not path.exists():
        raise BadInput(path, "no feature store here", "make one with python -m pipelines.convert")
    if not path.is_dir() or (path / "data.mdb").exists():
        return [path]
    shards = sorted(folder for folder in path.iterdir() if (folder / "data.mdb").exists())
    unfinished = [folder for folder in shards if folder.suffix == ".partial"]
    if unfinished:
        raise BadInput(unfinished[0], "an unfinished shard", "finish it with --resume, or remove the folder")
    return shards or [path]  # LmdbFile says what is missing
