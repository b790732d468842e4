"""All tensors of a batch in one piece of memory, so that one copy moves them to a device."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from pipelines.batch import Batch, Part, changed, tensors_of

ALIGNMENT = 256
"""Bytes; each tensor begins at a multiple, as torch's own allocations on a GPU do."""


def in_one_slab(batch: Batch, take: Callable[[int], Tensor]) -> Batch:
    """The batch with every tensor a view of `take(bytes)`, uint8. Equal shapes give equal layouts, equal batches equal bytes.

    A tensor on the device `meta` has a shape and no values: it gets its place, which is left to be filled.
    """
    slab, settle = _settling(batch, take)
    return changed(batch, settle, slab=slab)


def settled(part: Part, take: Callable[[int], Tensor]) -> tuple[Tensor, Part]:
    """The same for any dataclass of tensors: the slab, and the dataclass with its tensors there, one after the other."""
    slab, settle = _settling(part, take)
    return slab, changed(part, settle)


def _settling(part: object, take: Callable[[int], Tensor]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The slab, zero where no tensor is, and what puts one tensor after the other there."""
    tensors = tensors_of(part)
    starts = [0, *accumulate(aligned(x.nbytes) for x in tensors)]
    slab = take(starts[-1])
    for x, (start, end) in zip(tensors, pairwise(starts), strict=True):
        ctypes.memset(slab.data_ptr() + start + x.nbytes, 0, end - start - x.nbytes)
    following = iter(starts)
    typed = {dtype: slab.view(dtype) for dtype in {x.dtype for x in tensors}}

    def settle(x: Tensor) -> Tensor:
        x, values = x.contiguous(), typed[x.dtype]
        first = values.storage_offset() + next(following) // x.itemsize
        place = values.as_strided(x.shape, x.stride(), first)  # a slice and views of it take four times as long
        return place if x.is_meta else place.copy_(x)

    return slab, settle


def aligned(nbytes: int) -> int:
    """What a tensor of so many bytes takes up in a slab."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def pageable(nbytes: int) -> Tensor:
    """Ordinary memory, uint8 [nbytes]."""
    return torch.empty(nbytes, dtype=torch.uint8)
