"""A batch whose features the device makes: what the host sends there, and the last step of it.

Two kinds of batches leave work to the device: those of pretraining, whose hidden regions become zeros and whose global rows
are made anew, and those from stores of bytes, which become numbers there. Every value comes out as the host's own way has
it (`pipelines.draft`): multiplying by a row's factor is all that is done to a value, and global rows are summed in one order.

Shape letters as in `pipelines.batch`: R region rows, F feature width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch, moved
from pipelines.draft import Draft, arena, averaged_rows, filled, mean_rows
from pipelines.masking import MaskedRegions
from pipelines.slab import aligned, settled

BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
"""Which integers have as many bits: times 1 they stay as they are, times 0 they are zero."""


@dataclass(frozen=True)
class StoredGlobals:
    """Global rows as they were stored."""

    rows: Tensor  # [n_images, F], in the run's type

    def made(self, features: Tensor) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class MeanGlobals:
    """Global rows to be made of the rows that are left: the arguments of `mean_rows`."""

    rows: Tensor  # int64 [m]
    counts: Tensor  # int64 [n_images]
    divisor: Tensor  # int64 [n_images]

    def made(self, features: Tensor) -> Tensor:
        return mean_rows(features, self.rows, self.counts, self.divisor)


@dataclass(frozen=True)
class Head:
    """What is used on the device as it is."""

    batch: Batch
    """Where there is work, with no features: [0, F]."""
    globals: StoredGlobals | MeanGlobals | None


@dataclass(frozen=True)
class Work:
    """A row of features is a row of `values` times its factor."""

    factors: Tensor
    """[R, 1]. For bytes float32: the scale, 0 for a hidden row. For bits: 1, or 0 for a hidden row, of the same type."""
    values: Tensor
    """[R, F]: uint8 as stored, or the bits of the run's type as int16 or int32."""

    @property
    def in_bytes(self) -> bool:
        return self.values.dtype == torch.uint8


@dataclass(frozen=True)
class RawBatch:
    """All of it on the host, one piece of memory."""

    slab: Tensor
    """uint8: the memory of `head`."""
    head: Head
    work: Work | None
    """None: the features are in `head` already."""


@dataclass(frozen=True)
class _Parts:
    head: Head
    work: Work


def raw(draft: Draft) -> RawBatch:
    """The batch with its work left to be done, where there is any. Raises BadInput for a damaged record.

    A batch in a shape bucket is whole: its slab goes to a recorded graph in one piece.
    """
    regions, hidden = draft.regions, draft.hidden
    whole = draft.blind or draft.batch.padding or draft.batch.resident is not None
    if whole or (hidden is None and not regions.in_bytes):
        batch = filled(draft)
        assert batch.slab is not None
        return RawBatch(batch.slab, Head(replace(batch, slab=None), None), None)
    dtype, (rows, width) = draft.batch.features.dtype, draft.batch.features.shape
    made = torch.uint8 if regions.in_bytes else BITS[dtype]
    planned = _Parts(
        Head(replace(draft.batch, features=torch.empty((0, width), dtype=dtype)), _globals(draft)),
        Work(_meta(rows, 1, torch.float32 if regions.in_bytes else made), _meta(rows, width, made)),
    )
    slab, parts = settled(planned, arena().take)
    head, work = parts.head, parts.work
    if regions.in_bytes:
        regions.fill(None, head.batch.boxes, draft.threads)
        regions.fill_bytes(work.values, work.factors, draft.threads)
    else:
        regions.fill(work.values.view(dtype), head.batch.boxes, draft.threads)
        work.factors.fill_(1)
    if hidden is not None:
        work.factors.numpy()[hidden.zeroed] = 0
    if isinstance(head.globals, StoredGlobals):
        regions.fill_global(head.globals.rows)
    of_work = aligned(work.factors.nbytes) + aligned(work.values.nbytes)
    return RawBatch(slab[: slab.numel() - of_work], head, work)


def finished(raw: RawBatch, slab: Tensor, features: Tensor | None) -> Batch:
    """The batch on the device. `slab`: a copy of the raw one. `features` [R, F], where there was work: what values times
    factors gave, float32 for bytes and bits otherwise; written to.
    """
    head = moved(raw.head, raw.slab, slab)
    if raw.work is None:
        return replace(head.batch, slab=slab)
    assert features is not None and head.globals is not None
    dtype = head.batch.features.dtype
    features = features.to(dtype) if raw.work.in_bytes else features.view(dtype)
    features[head.batch.cu_images[:-1].long()] = head.globals.made(features)
    return replace(head.batch, features=features)


def _globals(draft: Draft) -> StoredGlobals | MeanGlobals:
    if draft.hidden is None:
        batch = draft.batch
        return StoredGlobals(_meta(batch.n_images, batch.features.shape[1], batch.features.dtype))
    return _means(draft.hidden, draft.regions.cu_images)


def _means(hidden: MaskedRegions, cu_images: np.ndarray) -> MeanGlobals:
    rows, counts = averaged_rows(hidden, cu_images)
    return MeanGlobals(*(torch.from_numpy(x) for x in (rows, counts, hidden.divisor)))


def _meta(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty((rows, columns), dtype=dtype, device="meta")
