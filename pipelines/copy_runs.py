"""Many runs of values copied at once, with conversion, or many images whole: from a feature store's memory map into a batch.

The native form (`native/copy_runs.cpp`) takes addresses, converts while it copies, needs no Python between two images, and
lets go of Python's lock meanwhile. Where it cannot be built, one line says so, and torch copies run by run.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.native_build import build, library_path
from pipelines import boxes

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
"""The types that runs have in a store."""
_CODES = {dtype: code for code, dtype in enumerate(DTYPES.values())}
_TARGETS = (torch.float32, torch.bfloat16)
_SOURCES = Path(__file__).resolve().parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread")
_ABI_VERSION = 2
_COST = "torch copies image by image; a batch of features takes two to five times as long"
_P, _N, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _NativeRecords(ctypes.Structure):
    """`StopgoRecords` of native/copy_runs.h."""

    _fields_ = (("type", _D), ("width", _N), ("means", _P), ("boxes", _P), ("scales", _P), ("features", _P))


def copy_runs(
    source: torch.dtype, target: torch.dtype, sources: Int64, targets: Int64, lengths: Int64, threads: int = 1
) -> None:
    """Run i: `lengths[i]` values of type `source` at the address `sources[i]` go to `targets[i]`, as type `target`.

    `target` is float32 or bfloat16, rounded to nearest even, or uint8 where `source` is. The caller answers for the
    addresses: runs lie within memory that it keeps, and do not overlap. All arrays int64 [runs]. `threads` share the work.
    """
    _check(source, target, sources, targets, lengths)
    library = _library()
    if library is None:
        _copy_runs_torch(source, target, sources, targets, lengths)
        return
    arrays = [_pointer(x) for x in (sources, targets, lengths)]
    library.stopgo_copy_runs(_CODES[source], _CODES[target], len(sources), *arrays, threads)


@dataclass(frozen=True, eq=False)
class Records:
    """Where the records of a feature store lie in memory, which whoever made this keeps. Addresses are int64 [images]."""

    dtype: torch.dtype
    """Of the features."""
    width: int
    means: Int64
    """float32 [width]."""
    boxes: Int64
    """float32 [regions, 4]: x1, y1, x2, y2 in pixels."""
    scales: Int64
    """float32 [regions], where the features are uint8: what each region's are multiplied by."""
    features: Int64
    """[regions, width]."""

    @cached_property
    def native(self) -> _NativeRecords:
        """The same for the native form. All of it is contiguous."""
        addresses = (self.means, self.boxes, self.scales, self.features)
        return _NativeRecords(_CODES[self.dtype], self.width, *map(_pointer, addresses))


def gather_records(
    records: Records,
    rows: Int64,
    counts: Int64,
    first: Int64,
    sizes: Int32,
    features: torch.Tensor | None,
    locations: torch.Tensor | None,
    global_row: bool,
    threads: int = 1,
) -> None:
    """Images whole, from a store to a batch: image `rows[i]` fills the batch's rows from `first[i]` on, with its mean where
    `global_row`, then its first `counts[i]` regions.

    `features`: [R, width] float32 or bfloat16, rounded to nearest even. `locations`: float32 [R, 5] as `boxes.locations`
    gives them, in shares of `sizes`, int32 [n, 2]: width, height. Either may be None; both contiguous. The caller answers
    for rows and counts. `rows`, `counts`, `first`: int64 [n]. `threads` share the work.
    """
    _check(torch.float32, torch.float32 if features is None else features.dtype, rows, counts, first)
    if locations is not None and locations.dtype != torch.float32:
        raise ValueError(f"locations are float32, not {locations.dtype}")
    if sizes.dtype != np.int32 or sizes.shape != (len(rows), 2) or not sizes.flags.c_contiguous:
        raise ValueError(f"wanted: contiguous int32 [{len(rows)}, 2], not {sizes.dtype} {sizes.shape}")
    library = _library()
    if library is None:
        _gather_records_torch(records, rows, counts, first, sizes, features, locations, global_row)
        return
    library.stopgo_gather_records(
        ctypes.byref(records.native), 0 if features is None else _CODES[features.dtype], len(rows), _pointer(rows),
        _pointer(counts), _pointer(first), global_row, _pointer(sizes), features if features is None else features.data_ptr(),
        locations if locations is None else locations.data_ptr(), threads,
    )  # fmt: skip


def native() -> bool:
    """Whether the native form is in use (builds it the first time)."""
    return _library() is not None


def path() -> Path:
    """Where the library lies."""
    return library_path("stopgo_pipelines", _SOURCES, _FLAGS)


@cache
def _library() -> ctypes.CDLL | None:
    why = "" if path().exists() else build(path(), _SOURCES, _FLAGS, ["-pthread"])
    if why:
        print(f"stopgo: no native copying of features ({why}): {_COST}", file=sys.stderr)
        return None
    loaded = ctypes.CDLL(str(path()))
    if loaded.stopgo_pipelines_abi_version() != _ABI_VERSION:
        raise RuntimeError(f"{path()} has another interface than this checkout; remove it")
    loaded.stopgo_copy_runs.argtypes = [_D, _D, _N, _P, _P, _P, _D]
    loaded.stopgo_gather_records.argtypes = [_P, _D, _N, _P, _P, _P, _D, _P, _P, _P, _D]
    loaded.stopgo_copy_runs.restype = loaded.stopgo_gather_records.restype = None
    return loaded


def _check(source: torch.dtype, target: torch.dtype, *arrays: Int64) -> None:
    if target not in _TARGETS and not source == target == torch.uint8:
        raise ValueError(f"features become float32 or bfloat16, not {target}")
    for array in arrays:
        if array.dtype != np.int64 or array.shape != arrays[0].shape or not array.flags.c_contiguous:
            raise ValueError(f"wanted: contiguous int64 {arrays[0].shape}, not {array.dtype} {array.shape}")


def _pointer(array: NDArray[np.generic]) -> int:
    return int(array.ctypes.data)


def _copy_runs_torch(source: torch.dtype, target: torch.dtype, sources: Int64, targets: Int64, lengths: Int64) -> None:
    for start, stop, length in zip(sources.tolist(), targets.tolist(), lengths.tolist(), strict=True):
        _convert(_values(start, length, source), _values(stop, length, target))


def _gather_records_torch(
    records: Records, rows: Int64, counts: Int64, first: Int64, sizes: Int32,
    features: torch.Tensor | None, locations: torch.Tensor | None, global_row: bool,
) -> None:  # fmt: skip
    parts = (records.means, records.boxes, records.scales, records.features)
    addresses = np.stack([part[rows] for part in parts], axis=1).tolist()
    images = zip(addresses, counts.tolist(), first.tolist(), sizes.tolist(), strict=True)
    for (mean, box, scale, feature), count, start, (width, height) in images:
        region = start + global_row
        if features is not None:
            if global_row:
                features[start] = _values(mean, records.width, torch.float32)
            values = _values(feature, count * records.width, records.dtype).view(count, records.width)
            if records.dtype == torch.uint8:
                values = values * _values(scale, count, torch.float32)[:, None]
            _convert(values, features[region : region + count])
        if locations is not None:
            if global_row:
                locations[start] = torch.tensor([0.0, 0, 1, 1, 1])
            pixels = _values(box, count * 4, torch.float32).numpy()
            locations[region : region + count] = torch.from_numpy(boxes.locations(pixels, width, height))


def _values(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """The values at an address, as a tensor."""
    memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an empty run, or memory that cannot be written, which sources are not
        return torch.frombuffer(memory, dtype=dtype) if count else torch.empty(0, dtype=dtype)


def _convert(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy with conversion. float16 to bfloat16 goes through float32: exact there, and three times as fast."""
    if source.dtype == torch.float16 and target.dtype == torch.bfloat16:
        target.copy_(source.to(torch.float32))
    else:
        target.copy_(source)
