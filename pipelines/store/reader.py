"""Read a feature store: checked at the door, then straight from the memory map."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY, unpack_metadata
from pipelines.store.record import (
    DTYPES,
    HEADER_BYTES,
    RECORD_VERSION,
    Layout,
    Record,
    checksum,
    read_header,
    view_record,
)

Verify = Literal["always", "first", "never"]
_AGAIN = "convert the features again"
_TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class FeatureStore:
    """A finished store at `path`, read-only.

    Opening checks the file's length against its tree, every page of the tree, the version, that the store is
    complete, and that each record has the length that its shape needs; so no later read can leave the file. Checksums
    are tested on the first read of each record in a process (`verify`). `readahead=False` suits random reads of a
    store that the page cache cannot hold.

    One store may be used from many threads and after a fork; pickled, it opens again where it is unpickled.
    Raises `BadInput`, naming the store and the key.
    """

    def __init__(self, path: Path | str, verify: Verify = "first", readahead: bool = True) -> None:
        self.path = Path(path)
        self._arguments = (self.path, verify, readahead)
        if not self.path.exists():
            raise BadInput(self.path, "no feature store here", "make one with python -m pipelines.convert")
        file = LmdbFile(self.path)
        self._map = file.map
        if not readahead:
            self._map.madvise(mmap.MADV_RANDOM)
        if METADATA_KEY not in file.keys:
            raise BadInput(self.path, "an LMDB, but not a feature store", "convert it: python -m pipelines.convert")
        place = file.keys.index(METADATA_KEY)
        metadata = unpack_metadata(self.path, file.value(place))
        if not metadata.complete:
            raise BadInput(self.path, "unfinished store", "finish its conversion with --resume")
        self.feature_dim: int = metadata.feature_dim
        self.dtype: str = metadata.dtype
        self.classes: int = metadata.classes
        """Length of a class distribution; 0 where no record has one."""
        self.source: str = metadata.source
        self.counts: NDArray[np.int32] = metadata.counts
        """int32 [images]: regions of each image, the global row not counted."""
        self.sizes: NDArray[np.int32] = metadata.sizes
        """int32 [images, 2]: width, height in pixels."""
        self.with_probs: NDArray[np.bool_] = metadata.with_probs
        """bool [images]: which records have class distributions."""
        self._keys = metadata.keys
        self._rows = {key: row for row, key in enumerate(self._keys)}
        self.offsets: NDArray[np.int64] = np.delete(file.offsets, place)
        """int64 [images]: where each record begins in `file_bytes`; its parts follow as `Layout` says."""
        self.file_bytes: NDArray[np.uint8] = file.bytes
        """uint8 [bytes of data.mdb], read-only: the memory map."""
        self._check_index([key for key in file.keys if key != METADATA_KEY], np.delete(file.sizes, place))
        self._verify = verify
        self._unverified = np.full(len(self), verify != "never")
        self.release()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch knows no read-only tensors; nothing here writes to this one
            self._tensor = torch.from_numpy(self.file_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, self._arguments

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def keys(self) -> tuple[str, ...]:
        """Image keys; position = row in `counts`, `sizes` and `index`."""
        return self._keys

    def index(self, keys: Iterable[str]) -> NDArray[np.int64]:
        """Rows of these images, int64 [n]."""
        try:
            return np.fromiter((self._rows[key] for key in keys), dtype=np.int64)
        except KeyError as error:
            raise BadInput(
                f"{self.path}: image {error.args[0]}", "no features", "convert or extract this image"
            ) from error

    def record(self, key: str) -> Record:
        """One image's record, as views of the memory map."""
        row = int(self.index([key])[0])
        self._verify_row(row)
        width, height = self.sizes[row].tolist()
        return view_record(
            self._value(row), int(self.counts[row]), self.feature_dim, self.dtype, self._classes(row), width, height
        )

    def gather(
        self,
        rows: Sequence[int] | NDArray[np.int64],
        starts: Sequence[int] | NDArray[np.int64],
        features: Tensor,
        boxes: Float32,
        max_regions: int | None = None,
        global_row: bool = True,
    ) -> None:
        """Copy many images into preallocated rows: the way from the memory map to a batch.

        Image i (`rows[i]`, from `index`) fills the rows from `starts[i]` on: its global row (the mean of all its
        regions, with the box 0, 0, width, height) unless `global_row` is false, then its first `max_regions` regions.
        `features`: [R, F] float32 or bfloat16 on the CPU; `boxes`: float32 [R, 4], pixels. Values are converted once,
        rounded to nearest even; other rows are left alone.
        """
        targets = torch.from_numpy(boxes)
        first = int(global_row)
        stored = _TORCH[self.dtype]
        for row, start in zip(np.asarray(rows).tolist(), np.asarray(starts).tolist(), strict=True):
            self._verify_row(row)
            count = int(self.counts[row])
            taken = count if max_regions is None else min(count, max_regions)
            if start < 0 or start + first + taken > len(features):
                raise IndexError(f"rows {start} to {start + first + taken} of {len(features)}")
            offset = int(self.offsets[row])
            layout = self._layout(row)
            if global_row:
                features[start] = self._part(offset + HEADER_BYTES, 1, torch.float32, self.feature_dim)[0]
                boxes[start, :2] = 0
                boxes[start, 2:] = self.sizes[row]
            inside = slice(start + first, start + first + taken)
            _convert(self._part(offset + layout.features, taken, stored, self.feature_dim), features[inside])
            targets[inside] = self._part(offset + layout.boxes, taken, torch.float32, 4)

    def release(self) -> None:
        """Leave the pages read so far to the page cache: they no longer count as this process's memory."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _part(self, start: int, rows: int, dtype: torch.dtype, columns: int) -> Tensor:
        """[rows, columns] of the memory map, from byte `start` on."""
        return self._tensor[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)

    def _value(self, row: int) -> NDArray[np.uint8]:
        start = int(self.offsets[row])
        return self.file_bytes[start : start + self._layout(row).end]

    def _classes(self, row: int) -> int:
        return self.classes if self.with_probs[row] else 0

    def _layout(self, row: int) -> Layout:
        return Layout.of(int(self.counts[row]), self.feature_dim, self.dtype, self._classes(row))

    def _check_index(self, keys: list[bytes], sizes: NDArray[np.int64]) -> None:
        lengths = {len(self.counts), len(self.sizes), len(self.with_probs)}
        if keys != [key.encode() for key in self._keys] or lengths != {len(keys)}:
            raise BadInput(self.path, "its index and its records differ", _AGAIN)
        needed = [self._layout(row).end for row in range(len(keys))]
        wrong = np.flatnonzero(np.array(needed, dtype=np.int64) != sizes)
        if len(wrong):
            row = int(wrong[0])
            raise BadInput(
                f"{self.path}: image {self._keys[row]}",
                f"{sizes[row]} bytes, but {self.counts[row]} regions need {needed[row]}",
                _AGAIN,
            )

    def verify_records(self) -> None:
        """Read every record against its checksum, so that no damage waits for the middle of a run. Raises BadInput."""
        for row in np.flatnonzero(self._unverified):
            self._verify_row(int(row))

    def _verify_row(self, row: int) -> None:
        if not self._unverified[row]:
            return
        key, value = self._keys[row], self._value(row)
        header = read_header(value.data)
        expected = (
            RECORD_VERSION,
            int(self.counts[row]),
            self.feature_dim,
            DTYPES.index(self.dtype),
            *self.sizes[row].tolist(),
            self._classes(row),
        )
        if header is None or header[:-1] != expected:
            raise BadInput(f"{self.path}: image {key}", "its header does not fit the store's index", _AGAIN)
        if header[-1] != checksum(key.encode(), value.data):
            raise BadInput(f"{self.path}: image {key}", "damaged record (checksum)", _AGAIN)
        self._unverified[row] = self._verify == "always"


def _convert(source: Tensor, target: Tensor) -> None:
    """Copy with conversion. float16 to bfloat16 goes through float32: exact there, and three times as fast."""
    if source.dtype == torch.float16 and target.dtype == torch.bfloat16:
        target.copy_(source.to(torch.float32))
    else:
        target.copy_(source)
