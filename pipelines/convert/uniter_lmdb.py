"""uniter-lmdb: UNITER's LMDBs, one msgpack map or one npz archive per image.

Key: the name of the npz file that the entry was made from. Arrays: `features` float16 [n, F], `norm_bb` float16
[n, 7] (x1, y1, x2, y2, w, h, area as shares of the image), `soft_labels` [n, C] optional. Arrays in msgpack are maps
{nd, type, kind, shape, data}, their names as bytes or as text. `__keys__` lists the names. No entry tells the image's
size, so `--sizes` must.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from pipelines.convert.npz import Arrays, load_arrays, regions_of
from pipelines.convert.source import LMDB_FILES, MISSING_SIZE, Regions, Sizes, SourceImage, find_files
from pipelines.errors import BadInput
from pipelines.store.lmdb_file import LmdbFile

_LIST_KEY = b"__keys__"
_ZIP_MAGIC = b"PK\x03\x04"


def images(source: Path, sizes: Sizes | None) -> Iterator[SourceImage]:
    """Every image of every LMDB. Raises `BadInput` if a name of the list has no entry, or without `sizes`."""
    if sizes is None:
        raise BadInput(source, "UNITER's stores hold no image size", MISSING_SIZE)
    files = find_files(source, LMDB_FILES)
    for number, file in enumerate(files):
        environment = LmdbFile(file)
        _check_list(environment)
        for position, key in enumerate(environment.keys):
            if key != _LIST_KEY:
                name = key.decode("utf-8", "replace")
                progress = (number + position / len(environment.keys)) / len(files)
                load = partial(_regions, environment, position, name, f"{file}: {name}", sizes)
                yield SourceImage(name, f"{file}: {name}", progress, load)


def _check_list(environment: LmdbFile) -> None:
    if _LIST_KEY not in environment.keys:
        return
    where = f"{environment.path}: __keys__"
    try:
        listed = json.loads(bytes(environment.value(environment.keys.index(_LIST_KEY))))
        known = set(environment.keys)
        absent = [name for name in listed if name.encode() not in known]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(where, f"not a JSON list of names ({error})", "is it the right FORMAT?") from error
    if absent:
        raise BadInput(where, f"{len(absent)} listed images have no entry, as {absent[0]!r}", "fetch it again")


def _regions(environment: LmdbFile, position: int, name: str, where: str, sizes: Sizes) -> Regions:
    value = bytes(environment.value(position))
    arrays = load_arrays(value, where) if value.startswith(_ZIP_MAGIC) else _msgpack_arrays(value, where)
    return regions_of(arrays, name, where, sizes)


def _msgpack_arrays(value: bytes, where: str) -> Arrays:
    try:
        content = msgpack.unpackb(value, raw=True, strict_map_key=False)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadInput(where, f"neither msgpack nor npz ({error})", "is it the right FORMAT?") from error
    if not isinstance(content, dict):
        raise BadInput(where, "no map of arrays", "is it the right FORMAT?")
    return {
        name.decode("utf-8", "replace"): _array(array, f"{where}: {name!r}")
        for name, array in content.items()
        if isinstance(name, bytes) and isinstance(array, dict) and array.get(b"nd")
    }


def _array(packed: dict[Any, Any], where: str) -> NDArray[Any]:
    """One array as msgpack-numpy writes it; its object arrays would be pickles, and are refused."""
    try:
        kind, shape, data = np.dtype(packed[b"type"].decode()), packed[b"shape"], packed[b"data"]
        if kind.kind not in "fiub":
            raise ValueError(f"type {kind} is not numeric")
        if len(data) != kind.itemsize * math.prod(shape):
            raise ValueError(f"{len(data)} bytes do not make the shape {list(shape)}")
        return np.frombuffer(data, dtype=kind).reshape(shape)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(where, f"damaged array ({error})", "fetch it again") from error
