"""How much memory a process holds, and how much it held at most since it was last asked."""

from __future__ import annotations

import ctypes
import gc
import resource
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


class PeakMemory:
    """High-water marks: of the process on the CPU (resident set, libraries included), of torch's allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Start anew from what is held now. OSError where the kernel does not let a process reset its mark."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _CLEAR.write_text(_RESET_PEAK)

    def held(self) -> int:
        """Bytes held now."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device)
        return _field("VmRSS")

    def read(self) -> int:
        """Bytes held at most since the last reset."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _field("VmHWM")


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    return _field("RssAnon")


def minor_faults() -> int:
    """Pages that the kernel handed to this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def release() -> None:
    """Give back to the system what is free: others are waiting for their turn."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)


class Spare:
    """The memory of tensors whose values do not matter: given back, and taken again as zeros."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors}
        self._sizes = [(storage, storage.nbytes()) for storage in storages.values()]

    def drop(self) -> None:
        """Until `restore`, the tensors must not be used."""
        for storage, _ in self._sizes:
            storage.resize_(0)

    def restore(self) -> None:
        """Zeros, where something was dropped."""
        for storage, size in self._sizes:
            if storage.nbytes() < size:
                storage.resize_(size)
                torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).zero_()


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that these tensors lie in; what several share counts once."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def total_bytes() -> int:
    """The machine's memory."""
    return _field("MemTotal", Path("/proc/meminfo"))


def available_bytes(device: torch.device) -> int:
    """What more of it, or of the GPU's, processes can have."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _field("MemAvailable", Path("/proc/meminfo"))


def _field(name: str, file: Path = _STATUS) -> int:
    line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
