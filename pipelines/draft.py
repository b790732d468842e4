"""A batch before its features, and the features made from it on the host. `pipelines.raw` leaves that to the device.

Shape letters as in `pipelines.batch`: R region rows, F feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ParamSpec

import numpy as np
import torch
from torch import Tensor

from pipelines import ragged
from pipelines.arena import Arena
from pipelines.batch import Batch
from pipelines.masking import MaskedRegions
from pipelines.regions import Regions
from pipelines.slab import in_one_slab
from pipelines.targets import Indices

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Draft:
    """All that is decided about a batch; what remains is moving features."""

    batch: Batch
    """Without a slab; its features and boxes have a shape and no values yet (device `meta`)."""
    regions: Regions
    hidden: MaskedRegions | None = None
    """What pretraining hides."""
    blind: bool = False
    """Features become zeros."""
    threads: int = 1
    """How many copy features."""


@cache
def arena() -> Arena:
    """The process's memory for batches."""
    return Arena(pin=torch.cuda.is_available())


def filled(draft: Draft) -> Batch:
    """The batch on the host, in one slab. Raises BadInput for a damaged record."""
    batch = in_one_slab(draft.batch, arena().take)
    without = draft.blind or batch.resident is not None
    draft.regions.fill(None if without else batch.features, batch.boxes, draft.threads)
    if draft.blind:
        batch.features.zero_()
    elif draft.hidden is not None:
        hide(batch.features, draft.hidden, draft.regions.cu_images)
    return batch


def filling(draft: Callable[Arguments, Draft]) -> Callable[Arguments, Batch]:
    """The function that gives the whole batch where `draft` gives what `filled` begins with."""

    def pack(*arguments: Arguments.args, **options: Arguments.kwargs) -> Batch:
        return filled(draft(*arguments, **options))

    return pack


def hide(features: Tensor, hidden: MaskedRegions, cu_images: ragged.Offsets) -> None:
    """Zero what is hidden, and make the global rows anew from what is left, in place. `features` [R, F]."""
    features[torch.from_numpy(hidden.zeroed)] = 0
    rows, counts = averaged_rows(hidden, cu_images)
    means = mean_rows(features, torch.from_numpy(rows), torch.from_numpy(counts), torch.from_numpy(hidden.divisor))
    features[torch.from_numpy(cu_images[:-1])] = means


def averaged_rows(hidden: MaskedRegions, cu_images: ragged.Offsets) -> tuple[Indices, Indices]:
    """The rows that make up the global rows, int64 [m], image after image, and how many each image has, int64 [n_images]."""
    return np.flatnonzero(hidden.averaged), np.add.reduceat(hidden.averaged.astype(np.int64), cu_images[:-1])


def mean_rows(features: Tensor, rows: Tensor, counts: Tensor, divisor: Tensor) -> Tensor:
    """[n_images, F] in the type of `features`: sums in float32 over consecutive groups of `rows`, one row after the other,
    so that there is one result; image i has the next `counts[i]` rows, and its sum is divided by `divisor[i]`."""
    # unsafe: without a look at `counts`, for which a GPU would have to be waited
    sums = torch.segment_reduce(features[rows].float(), "sum", lengths=counts, axis=0, unsafe=True)
    return (sums / divisor[:, None]).to(features.dtype)
