"""The native library: found, or built once with the C++ compiler at hand, loaded by ctypes.

Where there is neither, one line says so and names the cost; the plain torch path gives the same bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch  # first, so that the library shares torch's OpenMP pool instead of bringing a second one
from torch import Tensor

if TYPE_CHECKING:
    from kernels.dropout import Dropout

_ROOT = Path(__file__).resolve().parent
_SOURCES = sorted((_ROOT / "native").glob("*.cpp"))
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp", "-fno-math-errno")
_ABI_VERSION = 1


@cache
def _library() -> ctypes.CDLL | None:
    if os.environ.get("STOPGO_NATIVE", "1") == "0":
        return None
    path = _ROOT.parent / "build" / f"libstopgo_native-{_digest()}.so"
    reason = "" if path.exists() else _build(path)
    if reason:
        print(
            f"stopgo: no native kernels ({reason}); dropout falls back to plain torch, about 20 x slower",
            file=sys.stderr,
        )
        return None
    library = ctypes.CDLL(str(path))
    if library.stopgo_abi_version() != _ABI_VERSION:
        raise RuntimeError(f"{path} has another interface than this checkout; remove it")
    pointer, integer, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32
    library.stopgo_keep_mask.argtypes = [word] * 3 + [pointer] * 2 + [integer] * 3 + [word, pointer]
    library.stopgo_keep_mask.restype = None
    return library


def available() -> bool:
    """Whether the native kernels can be used here (builds them the first time)."""
    return _library() is not None


def keep_mask(dropout: Dropout, row_key: Tensor, row_index: Tensor, width: int, tile: int) -> Tensor:
    """See `kernels.dropout.keep_mask`; CPU tensors."""
    library = _library()
    assert library is not None
    row_key, row_index = row_key.contiguous(), row_index.contiguous()
    out = torch.empty(row_key.numel(), width, dtype=torch.uint8)
    library.stopgo_keep_mask(
        dropout.seed, dropout.step, dropout.site, row_key.data_ptr(), row_index.data_ptr(), row_key.numel(), width, tile,
        dropout.threshold, out.data_ptr(),
    )  # fmt: skip
    return out


def _digest() -> str:
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for source in _SOURCES:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build(path: Path) -> str:
    """Compile into `path`; returns why it failed, or an empty string."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        return "no C++ compiler found"
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".so", delete=False) as temporary:
        pass  # built under another name and renamed, so that processes starting together never load half a file
    command = [compiler, *_FLAGS, "-o", temporary.name, *map(str, _SOURCES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        os.unlink(temporary.name)
        return f"{compiler}: {error}"
    if done.returncode:
        os.unlink(temporary.name)
        return f"{compiler} failed: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else done.returncode}"
    os.replace(temporary.name, path)
    return ""
