"""Memory for batches that is used again: no pages are asked from the system, and none zeroed by it, step after step.

A batch's memory goes back when the last tensor on it is gone, so nobody has to return it, and no batch is overwritten
while somebody reads it. How much there is depends on how many batches are alive at a time.

On a GPU's host the memory is page-locked. torch keeps such memory for reuse itself, and knows which copies still read it.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Buffer = NDArray[np.uint8]

_HUGE_PAGE = 2 << 20
_ROOM = 1.25  # batches of one task differ in size


class Arena:
    """Gives out pieces of memory on the host. Safe to use from several threads."""

    def __init__(self, pin: bool) -> None:
        """`pin`: page-locked memory."""
        self._pin = pin
        self._lock = Lock()
        self._free: list[Buffer] = []
        self._returned: deque[Buffer] = deque()
        self.allocated = 0
        """Bytes taken from the system and kept, in use or not."""

    def take(self, nbytes: int) -> Tensor:
        """uint8 [nbytes], aligned to 64 bytes, with whatever was in it."""
        if self._pin:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        with self._lock:
            buffer = self._fitting(nbytes)
        piece = buffer[:nbytes]
        # torch holds `piece` as long as a tensor shows it. Any thread may end it, this one within the lock too: hence
        # a queue, which needs none.
        weakref.finalize(piece, self._returned.append, buffer).atexit = False
        return torch.from_numpy(piece)

    def _fitting(self, nbytes: int) -> Buffer:
        """The smallest free buffer that is large enough, else a new one in place of the largest that is not."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free.sort(key=len)
        for place, buffer in enumerate(self._free):
            if len(buffer) >= nbytes:
                return self._free.pop(place)
        if self._free:
            self.allocated -= len(self._free.pop())
        return self._new(nbytes)

    def _new(self, nbytes: int) -> Buffer:
        size = -(-int(nbytes * _ROOM) // _HUGE_PAGE) * _HUGE_PAGE
        self.allocated += size
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # huge pages are for private memory
        memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)
