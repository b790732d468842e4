"""One image's record in a feature store: the byte layout, written and read in place.

    value of the LMDB entry (its first byte lies 16 bytes into a page)
    0    msgpack array of eight uint32, 41 bytes: version, num_boxes, feature_dim, dtype, width, height, classes, crc32
    48   mean      float32 [feature_dim]       the global row: mean of the detector's rows, before they were rounded
         boxes     float32 [num_boxes, 4]      x1, y1, x2, y2 in pixels
         scales    float32 [num_boxes]         for features of dtype uint8 alone: what each region's are multiplied by
         features  dtype   [num_boxes, feature_dim]
         probs     float16 [num_boxes, classes]    the detector's class distribution, where there is one

Every part begins at 48 modulo 64 in the value, which is a multiple of 64 in the file and in memory: LMDB puts a value
of more than half a page on pages of its own, after a header of 16 bytes, and shorter records are padded up to that.
All eight header fields have a fixed width, so that native code finds them without a msgpack parser. The checksum
starts from that of the image's key: a record found under another key does not pass.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.boxes import Float32

RECORD_VERSION = 1
DTYPES = ("float16", "bfloat16", "float32", "uint8")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1}
HEADER_BYTES = 48
_LEAST_BYTES = 2048  # more than half of LMDB's 4096-byte page
_ALIGN = 64
_HEADER = struct.Struct(">B" + "BI" * 8)  # msgpack: fixarray of 8, then 0xce and a big-endian uint32, eight times
_FIXARRAY_8, _UINT32 = 0x98, 0xCE
_UNCHECKED = slice(36, 41)  # the checksum itself
Bytes = bytes | bytearray | memoryview
Kind = TypeVar("Kind", bound=np.generic)
Ints = TypeVar("Ints", int, NDArray[np.int64])


@dataclass(frozen=True, slots=True)
class Record:
    """One image's regions. The arrays are read-only views of the store's memory map: copy what must outlive a batch."""

    width: int
    """Pixels of the image that the boxes refer to."""
    height: int
    mean: Float32
    """float32 [F]: the global row."""
    boxes: Float32
    """float32 [n, 4]: x1, y1, x2, y2 in pixels."""
    features: NDArray[np.generic]
    """[n, F] float16, float32 or uint8 (times `scales`); bfloat16 as its uint16 bits."""
    class_probs: NDArray[np.float16] | None
    """float16 [n, C], or None."""
    scales: Float32 | None = None
    """float32 [n] where the features are uint8."""

    def values(self) -> Float32:
        """The features as numbers, float32 [n, F]."""
        if self.features.dtype == np.uint16:
            return bfloat16_values(self.features.view(np.uint16))
        numbers: Float32 = self.features.astype(np.float32)
        return numbers if self.scales is None else numbers * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class Layout(Generic[Ints]):
    """Where the parts of a record lie, in bytes from the start of the value; of one record, or of many at once."""

    boxes: Ints
    scales: Ints
    features: Ints
    probs: Ints
    end: Ints

    @classmethod
    def of(cls, num_boxes: Ints, feature_dim: int, dtype: str, classes: Ints) -> Layout[Ints]:
        """The layout of `num_boxes` rows of `feature_dim` values and `classes` class probabilities."""
        boxes = _aligned(num_boxes * 0 + HEADER_BYTES + 4 * feature_dim)
        scales = _aligned(boxes + 16 * num_boxes)
        features = _aligned(scales + 4 * num_boxes) if dtype == "uint8" else scales
        probs = _aligned(features + ITEM_BYTES[dtype] * num_boxes * feature_dim)
        end = probs + 2 * num_boxes * classes
        return cls(boxes, scales, features, probs, end + (_LEAST_BYTES - end) * (end < _LEAST_BYTES))


def _aligned(offset: Ints) -> Ints:
    return HEADER_BYTES + -(-(offset - HEADER_BYTES) // _ALIGN) * _ALIGN


def encode_record(
    key: bytes,
    dtype: str,
    features: Float32,
    boxes: Float32,
    width: int,
    height: int,
    class_probs: Float32 | None,
    mean: Float32 | None = None,
) -> bytearray:
    """A record's bytes. `features` float32 [n, F], `boxes` float32 [n, 4], `class_probs` float32 [n, C] or None; `mean`
    float32 [F], by default that of the features."""
    num_boxes, feature_dim = features.shape
    classes = 0 if class_probs is None else class_probs.shape[1]
    layout = Layout.of(num_boxes, feature_dim, dtype, classes)
    value = bytearray(layout.end)
    record = view_record(np.frombuffer(value, dtype=np.uint8), num_boxes, feature_dim, dtype, classes, width, height)
    if mean is None:
        mean = features.sum(axis=0, dtype=np.float32) / np.float32(num_boxes)
    record.mean[...] = mean
    record.boxes[...] = boxes
    if record.scales is not None:
        record.scales[...] = scales_of(features)
        features = features / record.scales[:, None]
    record.features[...] = to_stored(features, dtype)
    if record.class_probs is not None and class_probs is not None:
        record.class_probs[...] = class_probs
    fields = (RECORD_VERSION, num_boxes, feature_dim, DTYPES.index(dtype), width, height, classes)
    _HEADER.pack_into(value, 0, _FIXARRAY_8, *(x for field in (*fields, 0) for x in (_UINT32, field)))
    struct.pack_into(">BI", value, _UNCHECKED.start, _UINT32, checksum(key, value))
    return value


def view_record(
    value: NDArray[np.uint8], num_boxes: int, feature_dim: int, dtype: str, classes: int, width: int, height: int
) -> Record:
    """The parts of a record as views of its bytes `value`, whose length the caller has checked against `Layout`."""
    layout = Layout.of(num_boxes, feature_dim, dtype, classes)
    kinds: dict[str, type[np.generic]] = {
        "float16": np.float16, "bfloat16": np.uint16, "float32": np.float32, "uint8": np.uint8,
    }  # fmt: skip
    feature_bytes = ITEM_BYTES[dtype] * num_boxes * feature_dim

    def part(start: int, size: int, kind: type[Kind], columns: int) -> NDArray[Kind]:
        return value[start : start + size].view(kind).reshape(-1, columns)

    return Record(
        width=width,
        height=height,
        mean=value[HEADER_BYTES : HEADER_BYTES + 4 * feature_dim].view(np.float32),
        boxes=part(layout.boxes, 16 * num_boxes, np.float32, 4),
        features=part(layout.features, feature_bytes, kinds[dtype], feature_dim),
        class_probs=part(layout.probs, 2 * num_boxes * classes, np.float16, classes) if classes else None,
        scales=part(layout.scales, 4 * num_boxes, np.float32, 1)[:, 0] if dtype == "uint8" else None,
    )


def read_header(value: Bytes) -> tuple[int, ...] | None:
    """version, num_boxes, feature_dim, dtype number, width, height, classes, crc32; None if this is no header."""
    content = memoryview(value)
    if len(content) < HEADER_BYTES:
        return None
    mark, *rest = _HEADER.unpack(content[: _HEADER.size])
    if mark != _FIXARRAY_8 or set(rest[::2]) != {_UINT32}:
        return None
    return tuple(rest[1::2])


def checksum(key: bytes, value: Bytes) -> int:
    """crc32 over the key, the header before the checksum, and all that follows it."""
    content = memoryview(value)
    start = zlib.crc32(content[: _UNCHECKED.start], zlib.crc32(key))
    return zlib.crc32(content[_UNCHECKED.stop :], start)


def scales_of(features: Float32) -> Float32:
    """For uint8: what each region's values are divided by, float32 [n], so that its largest becomes 255."""
    largest = features.max(axis=1) / np.float32(255)
    return np.where(largest > 0, largest, np.float32(1))


def to_stored(features: Float32, dtype: str) -> NDArray[np.generic]:
    """float32 values in the stored type, rounded to nearest even; bfloat16 as uint16 bits. Values are finite, and for
    uint8 divided by their scales."""
    if dtype == "uint8":
        return np.rint(features).clip(0, 255).astype(np.uint8)
    if dtype == "bfloat16":
        return bfloat16_bits(features)
    with np.errstate(over="ignore"):  # the writer refuses what becomes infinite, by name
        return features.astype(dtype)


def bfloat16_bits(values: Float32) -> NDArray[np.uint16]:
    """Finite float32 -> bfloat16 bits as uint16, rounded to nearest even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)


def bfloat16_values(bits: NDArray[np.uint16]) -> Float32:
    """bfloat16 bits as uint16 -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
