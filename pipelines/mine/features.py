"""The features that images are compared by: the global row of each, the mean of all its detected rows (spec 3.2, 5.5)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.mine.nearest import LARGEST
from pipelines.progress import Show
from pipelines.store.reader import FeatureStore

_CHUNK = 256
_WHAT = "features read"


def global_rows(store: FeatureStore, rows: NDArray[np.int32], resident: int, folder: Path, show: Show) -> Float32:
    """float32 [m, F] of these rows of the store, each record tested against its checksum on the way.

    In memory up to `resident` bytes; more is mapped from a file in `folder` that has no name and is gone with the
    process. Raises BadInput for damaged records, features too large for distances, and a full disk.
    """
    features = _array((len(rows), store.feature_dim), resident, folder)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        count = len(rows[part])
        none = np.zeros(count, np.int64)
        store.gather(rows[part].astype(np.int64), np.arange(count), torch.from_numpy(features[part]), taken=none)
        fits = (np.abs(features[part]) < LARGEST).all(axis=1)
        if not fits.all():
            image = store.keys()[rows[start + int(np.argmin(fits))]]
            raise BadInput(f"{store.path}: image {image}", f"features beyond {LARGEST:g}", "extract this image again")
        store.release()
        show(_WHAT, start + count, len(rows))
    return features


def _array(shape: tuple[int, int], resident: int, folder: Path) -> Float32:
    size = 4 * shape[0] * shape[1]
    if size <= resident:
        return np.empty(shape, np.float32)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(
                file.fileno(), 0, size
            )  # a full disk says so here, not by a signal when it is written to
            return np.memmap(file, np.float32, "r+", shape=shape)
    except OSError as error:
        mend = f"{size / 1e9:.2f} GB are wanted: make room, or give --memory {2 * size / 1e9:.1f}"
        raise BadInput(folder, f"cannot write a temporary file here: {error.strerror}", mend) from error
