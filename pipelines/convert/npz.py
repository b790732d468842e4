"""npz: one `.npz` (or `.npy`) file per image, the file's name being the image's.

| array | names | shape |
|---|---|---|
| features | features, x | [n, F], or [F, n] as some published archives have it |
| boxes | boxes, bbox | [n, 4] x1, y1, x2, y2 in pixels |
| or | norm_bb | [n, 4 or 7] the same as shares of the image |
| size | image_width, image_w, img_w, width; image_height, image_h, img_h, height | one number each; else --sizes |
| classes | class_probs, cls_prob, soft_labels | [n, C], optional |

A `.npy` file holds features only, which is not enough: it is refused by name. Object arrays (pickles) are not read.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.convert.source import Regions, Sizes, SourceImage, boxes_in_pixels, find_files, size_of
from pipelines.errors import BadInput

_FILES = ("*.npz", "*.npy")
Arrays = Mapping[str, NDArray[Any]]

_FEATURES = ("features", "x")
_BOXES = ("boxes", "bbox")
_WIDTH = ("image_width", "image_w", "img_w", "width")
_HEIGHT = ("image_height", "image_h", "img_h", "height")
_PROBS = ("class_probs", "cls_prob", "soft_labels")
_SAVE = "save features, boxes, image_width and image_height with numpy.savez"


def images(source: Path, sizes: Sizes | None) -> Iterator[SourceImage]:
    """One image per file."""
    files = find_files(source, _FILES)
    for number, file in enumerate(files):
        yield SourceImage(file.name, str(file), number / len(files), partial(_regions, file, sizes))


def _regions(file: Path, sizes: Sizes | None) -> Regions:
    if file.suffix == ".npy":
        raise BadInput(file, "a .npy file has features but no boxes", _SAVE)
    return regions_of(load_arrays(file, str(file)), file.name, str(file), sizes)


def load_arrays(source: Path | bytes, where: str) -> Arrays:
    """The plain arrays of an npz archive that a converter may use; others are not even decoded."""
    wanted = {*_FEATURES, *_BOXES, *_WIDTH, *_HEIGHT, *_PROBS, "norm_bb"}
    try:
        with np.load(io.BytesIO(source) if isinstance(source, bytes) else source, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise BadInput(where, "no npz archive", _SAVE)
            return {name: archive[name] for name in archive.files if name in wanted}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, MemoryError, RuntimeError) as error:
        what = f"no archive of plain arrays ({error})"
        raise BadInput(where, what, "truncated or damaged? fetch it again") from error


def regions_of(arrays: Arrays, name: str, where: str, sizes: Sizes | None) -> Regions:
    """Regions from named arrays (the table above). A size in the arrays goes before one in `sizes`."""
    features = _pick(arrays, _FEATURES)
    if features is None:
        raise BadInput(where, f"no array named {' or '.join(_FEATURES)}, only {', '.join(arrays) or 'none'}", _SAVE)
    width, height = _number(arrays, _WIDTH, where), _number(arrays, _HEIGHT, where)
    if width is None or height is None:
        width, height = size_of(name, where, sizes)
    boxes = _pick(arrays, _BOXES)
    if boxes is None and "norm_bb" in arrays:
        boxes = boxes_in_pixels(where, arrays["norm_bb"], width, height)
    if boxes is None:
        raise BadInput(where, f"no array named {', '.join(_BOXES)} or norm_bb", _SAVE)
    if features.ndim == boxes.ndim == 2 and len(features) != len(boxes) == features.shape[1]:
        features = features.T
    return Regions(features, boxes, width, height, _pick(arrays, _PROBS))


def _pick(arrays: Arrays, names: tuple[str, ...]) -> NDArray[Any] | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _number(arrays: Arrays, names: tuple[str, ...], where: str) -> int | None:
    value = _pick(arrays, names)
    if value is None:
        return None
    try:
        return int(np.asarray(value).reshape(()))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadInput(where, f"{' or '.join(names)} is not one number") from error
