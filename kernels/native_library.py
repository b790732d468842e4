"""The native library: found, or built once with the C++ compiler at hand, loaded by ctypes.

There is one library per instruction set, all with the interface of `native/stopgo.h`; the best one that this CPU can
run is built and loaded (`STOPGO_ISA` names a lesser one). Where it cannot be built, one line says so and names the
cost; the plain torch path computes the same.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch  # first, so that the library shares torch's OpenMP pool instead of bringing a second one
from torch import Tensor

from kernels.native_build import NO_COMPILER, build, compiler, library_path

_SOURCES = Path(__file__).resolve().parent / "native"
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast")
_ISA_FLAGS = {
    "amx": "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16 -mamx-tile -mamx-bf16",
    "avx512bf16": "-march=x86-64-v4 -mprefer-vector-width=512 -mavx512bf16",
    "avx512": "-march=x86-64-v4 -mprefer-vector-width=512",
    "avx2": "-march=x86-64-v3",
    "portable": "",
}
"""Best first. CMakeLists.txt says the same."""
_NEEDED = {
    "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"},
    "avx512bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma", "f16c", "bmi2"},
    "portable": set(),
}
"""Flags of /proc/cpuinfo that each instruction set asks for."""
_ABI_VERSION = 4
_COST = "plain torch computes the same; a training step takes about twice the time"

P, N, D, W, F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_uint32, ctypes.c_float
R = ctypes.c_double
_ROWS = [P, P, W, W, W, W]  # row_key, row_index, seed, step, site, threshold
_SIGNATURES: dict[str, list] = {
    "stopgo_keep_mask": [W, W, W, W, P, P, N, N, N, P],
    "stopgo_dropout": [D, N, N, P, *_ROWS, P],
    "stopgo_bias_dropout_residual_layernorm_forward": [D, N, N, P, P, P, P, P, *_ROWS, F, P, P, P],
    "stopgo_bias_dropout_residual_layernorm_backward": [D, N, N, P, P, P, P, P, P, P, *_ROWS, P, P, P, P, P],
    "stopgo_bias_gelu_forward": [D, N, N, P, P, P],
    "stopgo_bias_gelu_backward": [D, N, N, P, P, P, P, P, P],
    "stopgo_column_sums": [D, N, N, P, N, P],
    "stopgo_transpose": [N, N, P, N, P],
    "stopgo_region_embedding_forward": [D, N, N, P, P, P, P, P, P, P, *_ROWS, F, P, P, P],
    "stopgo_region_embedding_backward": [D, N, N, P, P, P, P, P, P, P, P, P, *_ROWS, P, P, P, P, P],
    "stopgo_attention_forward": [D, D, P, N, N, N],
    "stopgo_attention_backward": [D, D, P, N, N, N],
    "stopgo_soft_label_bce": [D, N, N, P, P, P, P, P, P, P],
    "stopgo_divergence_rows": [D, N, N, P, P, D, P, F, D, P, P],
    "stopgo_cross_entropy_rows": [D, N, N, P, P, P, F, D, P, P],
    "stopgo_adamw": [D, N, P, P, P, P, P, R, R, R, R, R, P],
}
_AMX_SIGNATURES: dict[str, list] = {
    "stopgo_projection_forward": [N, N, N, P, N, P, P, P, N],
    "stopgo_projection_input_gradient": [N, N, N, P, N, P, P, N, D],
    "stopgo_projection_gelu_forward": [N, N, N, P, N, P, P, P, P],
    "stopgo_projection_gelu_gradient": [N, N, N, P, N, P, P, P, P],
    "stopgo_projection_weight_gradient": [N, N, N, P, N, P, N, P, P],
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Native(NamedTuple):
    """What the native kernels are here."""

    isa: str
    """The instruction set in use; empty where they cannot be used."""
    reason: str
    """Why they cannot; empty where they can."""


def found() -> Native:
    """What is in use here (built the first time)."""
    return Native(isa(), "") if available() else Native("", reason())


def expected() -> Native:
    """What `found` would say, as far as can be told without compiling: a library that is not built yet counts as one that
    can be, where there is a compiler."""
    name = wanted_isa()
    return Native(name, "") if path_of(name).exists() or compiler() else Native("", NO_COMPILER)


def available() -> bool:
    """Whether the native kernels can be used here (builds them the first time)."""
    return _loaded()[0] is not None


def reason() -> str:
    """Why they cannot be used; empty where they can."""
    return _loaded()[1]


def library() -> ctypes.CDLL:
    """The loaded library; its functions are those of `native/stopgo.h`. RuntimeError where there is none."""
    found, why = _loaded()
    if found is None:
        raise RuntimeError(f"no native kernels: {why}")
    return found


@cache
def isa() -> str:
    """The instruction set in use."""
    return str(library().stopgo_isa().decode())


def dtype_code(x: Tensor) -> int:
    """The `dtype` argument of a call. KeyError for a dtype that the kernels do not have."""
    return _DTYPES[x.dtype]


def pointer(x: Tensor | None) -> int | None:
    """The address of a CPU tensor's data, for a call."""
    return None if x is None else x.data_ptr()


@cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    name = wanted_isa()
    path = path_of(name)
    why = "" if path.exists() else build(path, _SOURCES, _flags(name), ["-fopenmp"])
    if why:
        print(f"stopgo: no native kernels ({why}): {_COST}", file=sys.stderr)
        return None, why
    loaded = ctypes.CDLL(str(path))
    if loaded.stopgo_abi_version() != _ABI_VERSION:
        raise RuntimeError(f"{path} has another interface than this checkout; remove it")
    for function, arguments in (_SIGNATURES | (_AMX_SIGNATURES if name == "amx" else {})).items():
        bound = getattr(loaded, function)
        bound.argtypes, bound.restype = arguments, None
    loaded.stopgo_isa.restype = ctypes.c_char_p
    loaded.stopgo_square_sum.argtypes, loaded.stopgo_square_sum.restype = [D, N, P], ctypes.c_double
    return loaded, ""


def wanted_isa() -> str:
    """The instruction set to use: `STOPGO_ISA`, else the best one. ValueError for one that does not exist."""
    name = os.environ.get("STOPGO_ISA") or best_isa()
    if name not in _ISA_FLAGS:
        raise ValueError(f"STOPGO_ISA={name}: there are {', '.join(_ISA_FLAGS)}")
    return name


def best_isa() -> str:
    """The best instruction set that this CPU, and the kernel under it, can run."""
    flags = _cpu_flags()
    for name, needed in _NEEDED.items():
        if needed <= flags and (name != "amx" or _may_use_tiles()):
            return name
    return "portable"


def path_of(isa_name: str) -> Path:
    """Where the library of an instruction set lies."""
    return library_path(f"stopgo_native-{isa_name}", _SOURCES, _flags(isa_name))


def _flags(isa_name: str) -> list[str]:
    return [*_FLAGS, *_ISA_FLAGS[isa_name].split()]


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())


def _may_use_tiles() -> bool:
    """Linux hands out the tile registers on request only: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0
