"""Many runs of values copied at once, with conversion: from a feature store's memory map into a batch.

The native form (`native/copy_runs.cpp`) takes addresses, converts while it copies, needs no Python between two images, and
lets go of Python's lock meanwhile. Where it cannot be built, one line says so, and torch copies run by run.
"""

from __future__ import annotations

import ctypes
import sys
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.native_build import build, library_path

Int64 = NDArray[np.int64]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
"""The types that runs have in a store."""
_CODES = {dtype: code for code, dtype in enumerate(DTYPES.values())}
_TARGETS = (torch.float32, torch.bfloat16)
_SOURCES = Path(__file__).resolve().parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread")
_ABI_VERSION = 1
_COST = "torch copies image by image; a batch of features takes two to five times as long"
_P, _N, _D = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


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


def scale_runs(
    target: torch.dtype, width: int, sources: Int64, scales: Int64, targets: Int64, rows: Int64, threads: int = 1
) -> None:
    """The same for rows of `width` uint8 values, each times its row's scale: run i has `rows[i]` rows, and as many
    float32 scales from the address `scales[i]` on."""
    _check(torch.float32, target, sources, scales, targets, rows)
    library = _library()
    if library is None:
        _scale_runs_torch(target, width, sources, scales, targets, rows)
        return
    arrays = [_pointer(x) for x in (sources, scales, targets, rows)]
    library.stopgo_scale_runs(_CODES[target], width, len(sources), *arrays, threads)


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
    loaded.stopgo_scale_runs.argtypes = [_D, _N, _N, _P, _P, _P, _P, _D]
    loaded.stopgo_copy_runs.restype = loaded.stopgo_scale_runs.restype = None
    return loaded


def _check(source: torch.dtype, target: torch.dtype, *arrays: Int64) -> None:
    if target not in _TARGETS and not source == target == torch.uint8:
        raise ValueError(f"features become float32 or bfloat16, not {target}")
    for array in arrays:
        if array.dtype != np.int64 or array.shape != arrays[0].shape or not array.flags.c_contiguous:
            raise ValueError(f"wanted: contiguous int64 {arrays[0].shape}, not {array.dtype} {array.shape}")


def _pointer(array: Int64) -> int:
    return int(array.ctypes.data)


def _copy_runs_torch(source: torch.dtype, target: torch.dtype, sources: Int64, targets: Int64, lengths: Int64) -> None:
    for start, stop, length in zip(sources.tolist(), targets.tolist(), lengths.tolist(), strict=True):
        _convert(_values(start, length, source), _values(stop, length, target))


def _scale_runs_torch(
    target: torch.dtype, width: int, sources: Int64, scales: Int64, targets: Int64, rows: Int64
) -> None:
    for start, scale, stop, count in zip(*(x.tolist() for x in (sources, scales, targets, rows)), strict=True):
        values = _values(start, count * width, torch.uint8).view(count, width)
        factors = _values(scale, count, torch.float32).view(count, 1)
        _values(stop, count * width, target).view(count, width).copy_(values * factors)


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
