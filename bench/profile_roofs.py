"""What this machine can do at best, measured in the same run as a profile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.kernel_measure import Ceilings
from kernels import huge_pages

_BIG = 2**28
"""Bytes that no cache holds."""


class Roofs(Ceilings):
    """Ceilings that remember what was measured, and know what cannot come out of a cache."""

    def __init__(self, device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> None:
        self.bandwidths: dict[int, float] = {}
        """Bytes per second by the size class of a call."""
        super().__init__(device, seconds)
        self.dtype_name = str(dtype).removeprefix("torch.")
        self.memory, self.peak = self.bytes_per_s(_BIG), self.flops_per_s(dtype)
        """Bytes per second, and FLOP per second of products."""

    def limit(self, moved: float, cold: float, flops: float, once: int) -> tuple[str, float]:
        """(bound, seconds) of a call. `cold`: of the bytes `moved`, those that a step passes through once; `once`: these of all
        calls of the step, which caches hold together or not at all."""
        seconds = self._seconds_of(cold, once) + self._seconds_of(moved - cold, moved - cold)
        products = flops / self.peak
        return ("GEMM", products) if products > seconds else ("bandwidth", seconds)

    def as_json(self) -> dict[str, Any]:
        """Bytes and FLOPs per second."""
        return {
            "memory_bytes_per_s": self.memory,
            "bytes_per_s_by_size": {str(size): rate for size, rate in sorted(self.bandwidths.items())},
            "flops_per_s": {self.dtype_name: self.peak},
        }

    def _seconds_of(self, moved: float, together: float) -> float:
        """Of so many bytes at the rate of `together` bytes."""
        if moved < 1:
            return 0.0
        size_class = 1 << (max(round(together), 2**16) - 1).bit_length()
        return moved / self.bytes_per_s(min(size_class, _BIG))

    def _bytes_per_s(self, moved: int) -> float:
        self.bandwidths[moved] = found = super()._bytes_per_s(moved)
        return found

    def _buffers(self, values: int) -> tuple[Tensor, Tensor]:
        """In huge pages, where weights and the optimizer's state lie: a copy in small ones is slower than AdamW."""
        source, target = super()._buffers(values)
        if self._device.type == "cuda":
            return source, target
        return huge_pages.empty_like(source).copy_(source), huge_pages.empty_like(target)
