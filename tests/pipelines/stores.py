"""Small made-up stores for the store's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.store.writer import StoreWriter

Float32 = NDArray[np.float32]
WIDTH, HEIGHT = 640, 427


def made_up(seed: int, feature_dim: int = 32, classes: int = 0) -> tuple[Float32, Float32, Float32 | None]:
    """Features [n, F], boxes [n, 4] and class distributions [n, C] of an image; n from 1 to 9."""
    rng = np.random.default_rng(seed)
    n = 1 + seed % 9
    corners = np.sort(rng.random((n, 2, 2)), axis=1) * np.array([WIDTH, HEIGHT])
    probs = rng.dirichlet(np.ones(classes), size=n).astype(np.float32) if classes else None
    features = rng.gamma(1.0, size=(n, feature_dim)).astype(np.float32)
    return features, corners.reshape(n, 4).astype(np.float32), probs


def write_store(path: Path, images: int = 12, feature_dim: int = 32, dtype: str = "float16", classes: int = 0) -> Path:
    """A store of images 0, 1, …; every other one with class distributions, if `classes`."""
    with StoreWriter(path, feature_dim, dtype, "made up") as writer:
        for seed in range(images):
            features, boxes, probs = made_up(seed, feature_dim, classes if seed % 2 else 0)
            writer.add(seed, features, boxes, WIDTH, HEIGHT, probs)
    return path
