"""Which implementation an op uses: the one rule, the override per op, and the report.

    CUDA tensor                       triton; torch for `projection`, which is cuBLAS's
    CPU tensor                        native, where the C++ library can be built; `projection` only with AMX
    float64, or neither of the above  torch

An override (`use`, the configuration's `kernels`, or `STOPGO_KERNELS=native` / `STOPGO_KERNELS=attention=torch,adamw=native`)
is obeyed or refused with a reason, never replaced. Other projects' ops (`names.OTHERS`) are taken in no other way. Triton runs
on CPU tensors under its interpreter (`TRITON_INTERPRET=1`), when asked for by name: that is for tests, it is thousands of
times slower.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import native_library
from kernels.names import CHOICES, PROJECTION, check, parse
from kernels.native_library import Native

ENVIRONMENT = "STOPGO_KERNELS"


_MODULES = {"apex": "apex.optimizers", "deepspeed": "deepspeed"}
_INSTALL = {"apex": "NVIDIA's, from source: the apex of PyPI is another one", "deepspeed": "make setup"}


class UnusableBackend(ValueError):
    """An override that cannot be obeyed; the text names op, reason and mend."""


class Saved(NamedTuple):
    """What a forward leaves for its backward, and which implementation made it."""

    backend: str
    values: tuple


class Choice(NamedTuple):
    """One line of the report."""

    op: str
    backend: str
    reason: str


_overrides: dict[str, str] = parse(os.environ.get(ENVIRONMENT, ""))
_decided: dict[tuple[str, torch.dtype, torch.device], str] = {}
"""What `choose` found under these overrides; a step asks six hundred times."""


def use(overrides: Mapping[str, str]) -> None:
    """From now on these ops use these backends, and all others what the environment says, or the rule."""
    _set({**parse(os.environ.get(ENVIRONMENT, "")), **check(overrides)})


@contextmanager
def using(overrides: Mapping[str, str] | str) -> Iterator[None]:
    """For the time of a `with` block, on top of what is in use; a single name is for all ops."""
    before = dict(_overrides)
    _set({**before, **(parse(overrides) if isinstance(overrides, str) else check(overrides))})
    try:
        yield
    finally:
        _set(before)


def _set(overrides: Mapping[str, str]) -> None:
    _overrides.clear()
    _overrides.update(overrides)
    _decided.clear()


def choose(op: str, x: Tensor) -> str:
    """The backend of `op` for tensors like x. UnusableBackend where an override cannot be obeyed."""
    key = op, x.dtype, x.device
    backend = _decided.get(key)
    if backend is None:
        backend = _decided[key] = _decide(*key)
    return backend


def by_rule(op: str, x: Tensor) -> str:
    """What `choose` would say without an override."""
    return _rule(op, x.dtype, x.device)


def _decide(
    op: str, dtype: torch.dtype, device: torch.device, native: Callable[[], Native] = native_library.found
) -> str:
    forced = _overrides.get(op)
    if forced is None:
        return _rule(op, dtype, device, native)
    _refuse_unusable(op, forced, device, native)
    return forced if dtype is not torch.float64 else "torch"


def _rule(
    op: str, dtype: torch.dtype, device: torch.device, native: Callable[[], Native] = native_library.found
) -> str:
    """`native` is asked on a CPU only: elsewhere nothing is built."""
    if dtype is torch.float64:
        return "torch"
    if device.type == "cuda":
        return "torch" if op == PROJECTION else "triton"
    return "native" if device.type == "cpu" and _has_native(op, native()) else "torch"


def report(device: torch.device, build: bool = True) -> list[Choice]:
    """What every op uses on `device`, and why. Raises UnusableBackend.

    Without `build` nothing is compiled: what can be is taken for built (`native_library.expected`).
    """
    native = native_library.found if build else native_library.expected
    return [Choice(op, _decide(op, torch.float32, device, native), _reason(op, device, native)) for op in CHOICES]


def grouped(choices: Iterable[Choice]) -> dict[str, list[str]]:
    """The ops by what they use: {"native (amx)": ["attention", …]}."""
    by_backend: dict[str, list[str]] = {}
    for choice in choices:
        by_backend.setdefault(f"{choice.backend} ({choice.reason})", []).append(choice.op)
    return by_backend


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _refuse_unusable(op: str, backend: str, device: torch.device, native: Callable[[], Native]) -> None:
    if backend == "native" and device.type != "cpu":
        raise UnusableBackend(f"{op}: the native kernels are for the CPU, not for {device} (use triton or torch)")
    if backend == "native" and not native().isa:
        raise UnusableBackend(f"{op}: no native kernels here: {native().reason} (use torch)")
    if backend == "native" and not _has_native(op, native()):
        raise UnusableBackend(f"{op}: the native one needs a CPU with AMX; this library is {native().isa} (use torch)")
    if backend in _MODULES and not _installed(_MODULES[backend]):
        raise UnusableBackend(f"{op}: {backend} is not installed ({_INSTALL[backend]}; or use native, triton or torch)")
    if backend == "apex" and device.type != "cuda":
        raise UnusableBackend(f"{op}: apex needs a CUDA device, not {device} (use native or torch)")
    if backend == "triton" and device.type != "cuda" and not interpreting():
        raise UnusableBackend(
            f"{op}: Triton needs a CUDA device, not {device} (use native or torch; for tests set TRITON_INTERPRET=1)"
        )


def _installed(module: str) -> bool:
    """The package of that name, and not another one that has taken the name."""
    try:
        return find_spec(module) is not None
    except ImportError:
        return False


def _has_native(op: str, native: Native) -> bool:
    return native.isa == "amx" if op == PROJECTION else bool(native.isa)


def _reason(op: str, device: torch.device, native: Callable[[], Native]) -> str:
    if op in _overrides:
        return "as asked"
    if device.type == "cuda":
        return "CUDA device"
    if device.type != "cpu":
        return f"no kernels for {device.type}"
    if native().isa:
        return native().isa if _has_native(op, native()) else "oneDNN"
    return native().reason
