"""All tensors of a batch in one piece of memory, so that one copy moves them to a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pipelines import ragged
from pipelines.batch import Batch

ALIGNMENT = 256
"""Bytes; each tensor begins at a multiple, as torch's own allocations on a GPU do."""


def in_one_slab(batch: Batch, take: Callable[[int], Tensor]) -> Batch:
    """The batch with every tensor a view of `take(bytes)`, uint8. Equal shapes give equal layouts, equal batches equal bytes.

    A tensor on the device `meta` has a shape and no values: it gets its place, which is left to be filled.
    """
    sizes = [x.nbytes for x in batch.tensors()]
    starts = ragged.offsets_of([-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]).tolist()
    slab = take(starts[-1])
    memory, following = slab.numpy(), iter(starts)
    for start, size, end in zip(starts, sizes, starts[1:], strict=False):
        memory[start + size : end] = 0

    def settled(x: Tensor) -> Tensor:
        start = next(following)
        place = slab[start : start + x.nbytes].view(x.dtype).view(x.shape)
        return place if x.is_meta else place.copy_(x)

    return replace(batch.map(settled), slab=slab)


def pageable(nbytes: int) -> Tensor:
    """Ordinary memory, uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)
