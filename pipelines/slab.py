"""All tensors of a batch in one piece of memory, so that one copy moves them to a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from pipelines import ragged
from pipelines.batch import Batch, Part, changed, tensors_of

ALIGNMENT = 256
"""Bytes; each tensor begins at a multiple, as torch's own allocations on a GPU do."""


def in_one_slab(batch: Batch, take: Callable[[int], Tensor]) -> Batch:
    """The batch with every tensor a view of `take(bytes)`, uint8. Equal shapes give equal layouts, equal batches equal bytes.

    A tensor on the device `meta` has a shape and no values: it gets its place, which is left to be filled.
    """
    slab, batch = settled(batch, take)
    return replace(batch, slab=slab)


def settled(part: Part, take: Callable[[int], Tensor]) -> tuple[Tensor, Part]:
    """The same for any dataclass of tensors: the slab, and the dataclass with its tensors there, one after the other."""
    tensors = tensors_of(part)
    starts = ragged.offsets_of([aligned(x.nbytes) for x in tensors]).tolist()
    slab = take(starts[-1])
    memory, following = slab.numpy(), iter(starts)
    for (start, end), x in zip(pairwise(starts), tensors, strict=True):
        memory[start + x.nbytes : end] = 0

    def settle(x: Tensor) -> Tensor:
        start = next(following)
        place = slab[start : start + x.nbytes].view(x.dtype).view(x.shape)
        return place if x.is_meta else place.copy_(x)

    return slab, changed(part, settle)


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes up in a slab."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pageable(nbytes: int) -> Tensor:
    """Ordinary memory, uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)
