"""Made-up images for the pipeline's benchmarks: as many regions and values as a detector gives, of any number of images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 640, 480


@dataclass(frozen=True)
class Image:
    """One image's regions."""

    key: str
    features: NDArray[np.float32]
    """[regions, width], of at least 0, multiples of 1/32 below 8: the same in float16, bfloat16 and float32."""
    boxes: NDArray[np.float32]
    """[regions, 4], pixels."""


def key_of(number: int) -> str:
    """An image's name: six digits, as most of COCO's have."""
    return str(100_000 + number)


def images(count: int, regions: int, width: int, first: int = 0) -> Iterator[Image]:
    """Images `first` to `first + count`, each a function of its number."""
    for number in range(first, first + count):
        random = np.random.default_rng(number)
        features = random.integers(0, 256, (regions, width), np.uint8).astype(np.float32) / np.float32(32)
        corners = np.sort(random.random((regions, 2, 2)), axis=1) * np.array([WIDTH, HEIGHT])
        yield Image(key_of(number), features, corners.reshape(regions, 4).astype(np.float32))
