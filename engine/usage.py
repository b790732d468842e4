"""What a process has used of its machine from one log iteration to the next. `stopgo doctor RUN` tells disk from CPU by it."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

_BLOCK = 512
"""Bytes of a block of `ru_inblock`."""


class Meter:
    """`take()` says what was used since the last time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._now()

    def take(self) -> dict[str, float | int | str | None]:
        """The columns of the event `usage` in `engine.journal`."""
        before, self._before = self._before, self._now()
        seconds, cpu, blocks = (now - then for now, then in zip(self._before, before, strict=True))
        on_gpu = self._device.type == "cuda"
        return {
            "seconds": seconds,
            "cpu_s": cpu,
            "threads": torch.get_num_threads(),
            "read_bytes": int(blocks) * _BLOCK,
            "memory_bytes": _own_memory(),
            "device": self._device.type,
            "device_bytes": torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
        }

    @staticmethod
    def _now() -> tuple[float, float, float]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), used.ru_utime + used.ru_stime, used.ru_inblock


def _own_memory() -> int | None:
    """Bytes that are this process's alone: the pages of feature stores belong to the page cache. None where /proc is not."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), None)
