"""One LMDB environment of a feature store, checked at the door: its index, and where the parts of each record lie."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadInput
from pipelines.store.lmdb_file import LmdbFile
from pipelines.store.metadata import METADATA_KEY, Metadata, unpack_metadata
from pipelines.store.record import DTYPES, RECORD_VERSION, Layout, Record, checksum, read_header, view_record

AGAIN = "convert the features again"


class Shard:
    """The environment at `path`, read-only. Rows are its images in the order of `metadata.keys`.

    Opening checks the file's length against its tree, every page of the tree, the version, that the store is complete,
    and that each record has the length that its shape needs; so no later read can leave the file. Raises `BadInput`.
    """

    def __init__(self, path: Path, readahead: bool = True) -> None:
        self.path = path
        file = LmdbFile(path)
        if not readahead:
            file.map.madvise(mmap.MADV_RANDOM)
        if METADATA_KEY not in file.keys:
            raise BadInput(path, "an LMDB, but not a feature store", "convert it: python -m pipelines.convert")
        place = file.keys.index(METADATA_KEY)
        self.metadata: Metadata = unpack_metadata(path, file.value(place))
        if not self.metadata.complete:
            raise BadInput(path, "unfinished store", "finish its conversion with --resume")
        self.offsets: NDArray[np.int64] = np.delete(file.offsets, place)
        """int64 [images]: where each record begins in `file_bytes`; its parts follow as `layout` says."""
        self.file_bytes: NDArray[np.uint8] = file.bytes
        """uint8 [bytes of data.mdb], read-only: the memory map."""
        self._map = file.map
        counts = self.metadata.counts.astype(np.int64)
        classes = np.where(self.metadata.with_probs, self.metadata.classes, 0).astype(np.int64)
        self.layout: Layout[NDArray[np.int64]]
        """Bytes from the start of each record, int64 [images] each."""
        self._check_index([key for key in file.keys if key != METADATA_KEY], len(counts))
        self.layout = Layout.of(counts, self.metadata.feature_dim, self.metadata.dtype, classes)
        self._check_sizes(np.delete(file.sizes, place))

    def record(self, row: int) -> Record:
        """One image's record, as views of the memory map. Unverified."""
        m = self.metadata
        width, height = m.sizes[row].tolist()
        return view_record(
            self._value(row), int(m.counts[row]), m.feature_dim, m.dtype, self._classes(row), width, height
        )

    def fetch(self, row: int) -> None:
        """Ask the system to read this record ahead."""
        page = mmap.PAGESIZE
        start = int(self.offsets[row]) // page * page
        self._map.madvise(mmap.MADV_WILLNEED, start, int(self.offsets[row] + self.layout.end[row]) - start)

    def release(self) -> None:
        """See `FeatureStore.release`."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def verify(self, row: int) -> None:
        """Read a record against its checksum and the store's index. Raises BadInput naming the image."""
        m = self.metadata
        key, value = m.keys[row], self._value(row)
        header = read_header(value.data)
        expected = (
            RECORD_VERSION,
            int(m.counts[row]),
            m.feature_dim,
            DTYPES.index(m.dtype),
            *m.sizes[row].tolist(),
            self._classes(row),
        )
        if header is None or header[:-1] != expected:
            raise BadInput(f"{self.path}: image {key}", "its header does not fit the store's index", AGAIN)
        if header[-1] != checksum(key.encode(), value.data):
            raise BadInput(f"{self.path}: image {key}", "damaged record (checksum)", AGAIN)

    def _value(self, row: int) -> NDArray[np.uint8]:
        start = int(self.offsets[row])
        return self.file_bytes[start : start + int(self.layout.end[row])]

    def _classes(self, row: int) -> int:
        return self.metadata.classes if self.metadata.with_probs[row] else 0

    def _check_index(self, keys: list[bytes], images: int) -> None:
        m = self.metadata
        lengths = {images, len(m.sizes), len(m.with_probs)}
        if keys != [key.encode() for key in m.keys] or lengths != {len(keys)}:
            raise BadInput(self.path, "its index and its records differ", AGAIN)

    def _check_sizes(self, sizes: NDArray[np.int64]) -> None:
        wrong = np.flatnonzero(self.layout.end != sizes)
        if len(wrong):
            row = int(wrong[0])
            raise BadInput(
                f"{self.path}: image {self.metadata.keys[row]}",
                f"{sizes[row]} bytes, but {self.metadata.counts[row]} regions need {self.layout.end[row]}",
                AGAIN,
            )
