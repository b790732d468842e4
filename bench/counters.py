"""What a step does, counted: it does not depend on how busy the machine is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import native_library

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"}
_COPIES = {"copy_", "_to_copy", "clone", "cat", "stack"}
_SYNCS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
"""Ops whose result the host must know before it goes on: on a GPU each would wait for the device."""

_QUESTIONS = {"stopgo_isa", "stopgo_abi_version"}
"""Functions of the native library that compute nothing."""


@dataclass
class Counts:
    """One step's work. Views and bare allocations launch nothing and are not in `launches`."""

    ops: Counter[str] = field(default_factory=Counter)
    """Torch ops that compute, by name, and the project's native kernels."""
    allocations: int = 0
    copied_bytes: int = 0

    def as_json(self) -> dict[str, Any]:
        return {
            "launches": self.ops.total(),
            "native_calls": sum(count for name, count in self.ops.items() if name.startswith("stopgo_")),
            "copies": sum(self.ops[name] for name in _COPIES),
            "copied_bytes": self.copied_bytes,
            "syncs": {name: self.ops[name] for name in sorted(_SYNCS) if self.ops[name]},
            "allocations": self.allocations,
            "ops": dict(self.ops.most_common()),
        }


class _TorchOps(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ALLOCATIONS:
            self.counts.allocations += 1
        elif not func.is_view and name != "_unsafe_view":
            self.counts.ops[name] += 1
            if name in _COPIES and isinstance(result, Tensor):
                self.counts.copied_bytes += result.numel() * result.element_size()
        return result


@contextmanager
def counting() -> Iterator[Counts]:
    """What runs within the block, backward passes and native kernels included."""
    counts = Counts()
    with _native_calls(counts), _TorchOps(counts):
        yield counts


def native_functions() -> tuple[Any, dict[str, Any]]:
    """(the native library, its functions that compute by their names, which are its attributes); (None, {}) without one."""
    library = native_library.library() if native_library.available() else None
    found = {} if library is None else vars(library)
    return library, {name: f for name, f in found.items() if name.startswith("stopgo_") and name not in _QUESTIONS}


@contextmanager
def _native_calls(counts: Counts) -> Iterator[None]:
    """The library's functions are attributes of one object: for the block, each also counts itself."""
    library, functions = native_functions()

    def counted(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            counts.ops[name] += 1
            return function(*arguments)

        return call

    for name, function in functions.items():
        setattr(library, name, counted(name, function))
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(library, name, function)
