"""The metadata record of a store: what it holds, and per image what a sampler asks without reading a payload.

One LMDB entry under `METADATA_KEY`: msgpack `{"crc32": int, "body": bytes}`, where body is the msgpack map that
`pack_metadata` writes. An unfinished store carries one without index and with `complete` false.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from pipelines.errors import BadInput
from pipelines.store.record import DTYPES

METADATA_KEY = b"__metadata__"
FORMAT = "stopgo features"
STORE_VERSION = 1
_AGAIN = "convert the features again"


@dataclass(frozen=True)
class Metadata:
    """What a store holds. Arrays go by image, in the order of `keys`."""

    feature_dim: int
    dtype: str
    classes: int
    """Length of a class distribution; 0 where no record has one."""
    source: str
    complete: bool = False
    keys: tuple[str, ...] = ()
    """Ascending by their bytes, the order of the LMDB."""
    counts: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """[images]: regions."""
    sizes: NDArray[np.int32] = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    """[images, 2]: width, height in pixels."""
    with_probs: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    """[images]: whether the record has class distributions."""


def pack_metadata(metadata: Metadata) -> bytes:
    """The bytes of the metadata record."""
    body = msgpack.packb(
        {
            "format": FORMAT,
            "version": STORE_VERSION,
            "feature_dim": metadata.feature_dim,
            "dtype": metadata.dtype,
            "classes": metadata.classes,
            "source": metadata.source,
            "complete": metadata.complete,
            "images": len(metadata.keys),
            "regions": int(metadata.counts.sum()),
            "keys": list(metadata.keys),
            "counts": metadata.counts.astype("<i4").tobytes(),
            "sizes": metadata.sizes.astype("<i4").tobytes(),
            "with_probs": metadata.with_probs.tobytes(),
        }
    )
    packed: bytes = msgpack.packb({"crc32": zlib.crc32(body), "body": body})
    return packed


def unpack_metadata(path: Path, value: bytes | memoryview) -> Metadata:
    """The metadata of the store at `path`. Raises `BadInput` if it is damaged or of another format or version."""
    outer = _unpack(path, value)
    body_bytes = outer.get("body")
    if not isinstance(body_bytes, bytes) or outer.get("crc32") != zlib.crc32(body_bytes):
        raise BadInput(path, "the store's metadata are damaged (checksum)", _AGAIN)
    body = _unpack(path, body_bytes)
    if body.get("format") != FORMAT:
        raise BadInput(path, "not a feature store", "make one with python -m pipelines.convert")
    if body.get("version") != STORE_VERSION:
        raise BadInput(path, f"store version {body.get('version')}, this code reads {STORE_VERSION}", _AGAIN)
    try:
        return Metadata(
            feature_dim=int(body["feature_dim"]),
            dtype=DTYPES[DTYPES.index(body["dtype"])],
            classes=int(body["classes"]),
            source=str(body["source"]),
            complete=bool(body["complete"]),
            keys=tuple(map(str, body["keys"])),
            counts=np.frombuffer(body["counts"], dtype="<i4"),
            sizes=np.frombuffer(body["sizes"], dtype="<i4").reshape(-1, 2),
            with_probs=np.frombuffer(body["with_probs"], dtype=np.bool_),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(path, f"the store's metadata do not follow their version ({error!r})", _AGAIN) from error


def _unpack(path: Path, value: bytes | memoryview) -> dict[str, Any]:
    try:
        content = msgpack.unpackb(value)
    except (ValueError, msgpack.UnpackException) as error:
        raise BadInput(path, f"the store's metadata are damaged ({error})", _AGAIN) from error
    if not isinstance(content, dict):
        raise BadInput(path, "the store's metadata are damaged (no map)", _AGAIN)
    return content
