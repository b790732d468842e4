"""The region rows of a batch's images, and where their features and boxes come from.

Shape letters as in `pipelines.batch`: R region rows, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipelines import ragged
from pipelines.boxes import Float32
from pipelines.datasets import TaskData
from pipelines.resident import Resident
from pipelines.targets import Indices


@dataclass(frozen=True)
class Regions:
    """The region rows of a batch's images: global row, detected rows, annotated rows of each."""

    data: TaskData
    images: Indices
    """int64 [n_images]: store rows."""
    detected: NDArray[np.int64]
    """int64 [n_images]: detected rows taken; `max_regions` may cut some from the end."""
    cu_images: ragged.Offsets
    """int64 [n_images + 1]."""

    @classmethod
    def of(cls, data: TaskData, images: Indices) -> Regions:
        detected, annotated = data.detector_counts(images), data.candidate_counts(images)
        return cls(data, images, detected, ragged.offsets_of(1 + detected + annotated))

    @property
    def rows(self) -> int:
        return int(self.cu_images[-1])

    @property
    def first_candidate(self) -> NDArray[np.int64]:
        """int64 [n_images]: row within the image."""
        return 1 + self.detected

    @property
    def in_bytes(self) -> bool:
        """Whether every store that the features come from holds uint8 values with a scale per region."""
        return all(store.dtype == "uint8" for store in self.data.stores)

    def pixels(self) -> Float32:
        """Boxes in pixels, float32 [R, 4]."""
        boxes = np.empty((self.rows, 4), np.float32)
        self.data.store.gather_boxes(self.images, self.cu_images[:-1], boxes, taken=self.detected)
        if self.data.candidates is not None:
            self.data.candidates.gather_boxes(*self._annotated(), boxes, global_row=False)
        return boxes

    def fill(self, features: Tensor | None, locations: Tensor, threads: int) -> None:
        """Copy the features from the memory map to where they stay, [at least R, F], where they are wanted; and write what the
        model reads of the boxes, float32 [at least R, 5]. Rows beyond R become zeros."""
        store, candidates = self.data.store, self.data.candidates
        sizes, rows = store.sizes[self.images], self.rows
        if locations.shape[0] > rows:  # asked before the copying, which pushes all else out of the caches
            for x in (features, locations):
                if x is not None:
                    x[rows:].zero_()
        store.gather(
            self.images, self.cu_images[:-1], features, locations, taken=self.detected, sizes=sizes, threads=threads
        )
        if candidates is not None:
            candidates.gather(*self._annotated(), features, locations, sizes=sizes, global_row=False, threads=threads)

    def fill_bytes(self, values: Tensor, scales: Tensor, threads: int) -> None:
        """The same without conversion, from stores of bytes: uint8 [R, F], and float32 [R, 1] to multiply them by. Global rows
        have no bytes: theirs are undefined, and their scales 0."""
        starts = self.cu_images[:-1]
        self.data.store.gather_bytes(self.images, starts + 1, values, scales, taken=self.detected, threads=threads)
        if self.data.candidates is not None:
            self.data.candidates.gather_bytes(*self._annotated(), values, scales, threads=threads)
        scales.numpy()[starts] = 0

    def fill_global(self, rows: Tensor) -> None:
        """The global rows alone, [n_images, F]."""
        none = np.zeros_like(self.images)
        self.data.store.gather(self.images, np.arange(len(self.images)), rows, taken=none)

    def resident_rows(self, resident: Resident) -> NDArray[np.int64]:
        """Where these rows lie in the resident table, int64 [R]."""
        parts = resident.rows(self.data.store, self.images, self.detected, global_row=True)
        if self.data.candidates is not None:
            images, _ = self._annotated()
            annotated = resident.rows(self.data.candidates, images, self.data.candidate_counts(self.images), False)
            parts = [part for pair in zip(parts, annotated, strict=True) for part in pair]
        return np.concatenate(parts)

    def _annotated(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the images in the store of annotated boxes, and where those begin in the batch."""
        return self.data.candidate_rows[self.images].astype(np.int64), self.cu_images[:-1] + self.first_candidate
