"""What every format reader yields, and the few things that they share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.identity import image_key


@dataclass(frozen=True, slots=True)
class Regions:
    """The regions of one image, as its file holds them; the store's writer validates them."""

    features: ArrayLike
    """[n, F]."""
    boxes: ArrayLike
    """[n, 4]: x1, y1, x2, y2 in pixels."""
    width: int
    """Pixels of the image that the boxes refer to."""
    height: int
    class_probs: ArrayLike | None = None
    """[n, C]: the detector's class distribution."""
    mean: ArrayLike | None = None
    """[F]: the global row, where the source has it from features that were not rounded yet."""


class SourceImage(NamedTuple):
    """One image of a source: its name is known at once, its regions are decoded on demand (a resume skips most)."""

    name: str
    where: str
    """File, and line or key, for messages."""
    progress: float
    """Share of the source that lies behind this image, 0 to 1."""
    load: Callable[[], Regions]


Sizes = Mapping[str, tuple[int, int]]
"""Image key -> width, height in pixels."""

LMDB_FILES = ("data.mdb", "*.lmdb")
"""An environment is a folder around `data.mdb`, or, more rarely, one file."""

MISSING_SIZE = "give --sizes FILE, a JSON object {name: [width, height]} in pixels"


def find_files(source: Path, patterns: tuple[str, ...]) -> list[Path]:
    """`source` itself if it is a file, else all files below it that match one of the patterns, in a fixed order."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise BadInput(source, "no such file or folder")
    found = sorted({path for pattern in patterns for path in source.rglob(pattern) if path.is_file()})
    if not found:
        raise BadInput(source, f"no {' or '.join(patterns)} in this folder or below it", "is it the right FORMAT?")
    return found


def read_sizes(path: Path) -> Sizes:
    """Image sizes from a JSON object {any name of the image: [width, height]}."""
    try:
        content = json.loads(path.read_bytes())
        return {image_key(name): (int(width), int(height)) for name, (width, height) in content.items()}
    except OSError as error:
        raise BadInput(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(path, "no JSON object {name: [width, height]}", str(error)) from error


def size_of(name: str, where: str, sizes: Sizes | None) -> tuple[int, int]:
    """Width and height of an image whose own file does not say. Raises `BadInput` where `sizes` does not either."""
    if sizes is None:
        raise BadInput(where, "this format holds no image size", MISSING_SIZE)
    size = sizes.get(image_key(name))
    if size is None:
        raise BadInput(where, f"no size of image {image_key(name)} in the file of --sizes", "add it there")
    return size


def boxes_in_pixels(where: str, normalised: ArrayLike, width: int, height: int) -> Float32:
    """[n, 4 or more] boxes as shares of the image, x1, y1, x2, y2 first -> float32 [n, 4] pixels within the image.

    Shares kept in float16 are off by up to 0.16 pixels at a width of 640, hence the clipping.
    """
    shares = np.asarray(normalised, dtype=np.float32)
    if shares.ndim != 2 or shares.shape[1] < 4:
        raise BadInput(where, f"norm_bb of shape {list(shares.shape)}, expected [n, 4 or 7]")
    if shares[:, :4].max(initial=0) > 1.01 or shares[:, :4].min(initial=0) < -0.01:
        raise BadInput(where, "norm_bb outside 0..1", "boxes in pixels belong under the name boxes")
    return np.clip(shares[:, :4], 0, 1) * np.array([width, height, width, height], dtype=np.float32)
