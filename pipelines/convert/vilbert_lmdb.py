"""vilbert-lmdb: the authors' LMDBs, one pickled dictionary per image (spec section 5.1).

Key: the image id as text. Value: `features` [n, F], `boxes` [n, 4] x1, y1, x2, y2 in pixels, `image_w`, `image_h`; in
an older form both arrays are base64 texts of float32. The entry `keys` lists all ids. The pickles are read through an
allow-list of NumPy's array constructors; any other name in them is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from pipelines.convert.source import LMDB_FILES, Regions, Sizes, SourceImage, find_files
from pipelines.errors import BadInput
from pipelines.pickles import NUMPY, load_pickle
from pipelines.store.lmdb_file import LmdbFile

_LIST_KEY = b"keys"
_NEEDED = ("features", "boxes", "image_w", "image_h")


def images(source: Path, sizes: Sizes | None) -> Iterator[SourceImage]:
    """Every image of every LMDB. Raises `BadInput` if an id of the list has no entry."""
    del sizes  # the values hold them
    files = find_files(source, LMDB_FILES)
    for number, file in enumerate(files):
        environment = LmdbFile(file)
        _check_list(environment)
        for position, key in enumerate(environment.keys):
            if key != _LIST_KEY:
                name = key.decode("utf-8", "replace")
                where = f"{file}: {name}"
                progress = (number + position / len(environment.keys)) / len(files)
                yield SourceImage(name, where, progress, partial(_regions, environment, position, where))


def _check_list(environment: LmdbFile) -> None:
    if _LIST_KEY not in environment.keys:
        return
    value = bytes(environment.value(environment.keys.index(_LIST_KEY)))
    listed = load_pickle(value, NUMPY, where=f"{environment.path}: keys")
    if not isinstance(listed, list):
        raise BadInput(f"{environment.path}: keys", "not a list of image ids", "is it the right FORMAT?")
    known = set(environment.keys)
    absent = [key for key in listed if (key.encode() if isinstance(key, str) else key) not in known]
    if absent:
        what = f"{len(absent)} listed images have no entry, as {absent[0]!r}"
        raise BadInput(environment.path, what, "fetch it again")


def _regions(environment: LmdbFile, position: int, where: str) -> Regions:
    content = load_pickle(bytes(environment.value(position)), NUMPY, where=where)
    if not isinstance(content, dict) or any(name not in content for name in _NEEDED):
        raise BadInput(where, f"expected a dictionary with {', '.join(_NEEDED)}", "is it the right FORMAT?")
    try:
        boxes = np.asarray(_array(content["boxes"], 4))
        features = _array(content["features"], None if boxes.ndim != 2 else (len(boxes), -1))
        return Regions(features, boxes, int(content["image_w"]), int(content["image_h"]))
    except (ValueError, TypeError, OverflowError) as error:
        raise BadInput(where, f"a value of the wrong kind ({error})") from error


def _array(value: ArrayLike, shape: int | tuple[int, int] | None) -> ArrayLike:
    """An array as it is; base64 text of float32 as rows of `shape` columns, or of the whole shape."""
    if not isinstance(value, str | bytes):
        return value
    flat = np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return flat.reshape((-1, shape) if isinstance(shape, int) else shape or -1)
