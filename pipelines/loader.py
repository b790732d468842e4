"""Batches ahead of time: one background thread for all tasks.

A batch is a pure function of (task, step), so prefetching it, or not, changes no result: it only moves the work off
the training loop's path. The heavy part of packing is copying, which lets other threads run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from pipelines.batch import Batch
from pipelines.buckets import Grid
from pipelines.datasets import TaskData
from pipelines.division import WHOLE, Division, example_rows
from pipelines.draft import Draft, filled
from pipelines.masking import Masking
from pipelines.packing import draft, pack
from pipelines.pretraining import asked_of, draft_masked, pack_masked
from pipelines.raw import RawBatch, raw
from pipelines.resident import Resident
from pipelines.sampler import Sampler
from pipelines.targets import Indices

BatchSource = Callable[[int], Batch]
"""Gives the batch after `step` consumed ones. Pure: equal steps give equal batches."""


@dataclass(frozen=True)
class TrainingSource:
    """A task's training batches by step, without end."""

    data: TaskData
    sampler: Sampler
    task_token: int | None
    dtype: torch.dtype = torch.float32
    share: bool = True
    blind: bool = False
    grid: Grid | None = None
    """Pads batches to shape buckets on this grid."""
    masking: Masking | None = None
    """Pretraining: what is hidden."""
    threads: int = 1
    """How many copy a batch's features."""
    resident: Resident | None = None
    """Where they stay on the device."""
    division: Division = WHOLE
    """Which part of every step's batch is wanted. Where a rank makes several micro-batches of its part, they are counted
    instead of steps: micro-batch m of step s is `source(s * accumulation + m)`."""

    def __call__(self, step: int) -> Batch:
        return filled(self._draft(step))

    def raw(self, step: int) -> RawBatch:
        """The same batch with the work of a device left to do."""
        return raw(self._draft(step))

    def _draft(self, number: int) -> Draft:
        step, micro = divmod(number, self.division.accumulation)
        indices, epoch = self.sampler.indices(step), self.sampler.epoch(step)
        if self.division.whole:
            return self._draft_of(indices, epoch)
        mine = self.division.part(example_rows(self.data, indices), micro)
        shares = self._shares(indices, mine, epoch)
        # Where there are fewer examples than parts, one stands in that counts for nothing.
        whole = self._draft_of(indices[mine] if len(mine) else indices[:1], epoch)
        return replace(whole, batch=replace(whole.batch, shares=shares, step_examples=len(indices)))

    def _shares(self, indices: Indices, mine: Indices, epoch: int) -> tuple[float, ...]:
        share = len(mine) / len(indices)
        if self.masking is None:
            return (share,)
        words, regions = asked_of(
            self.data, indices, self.masking, epoch=epoch, seed=self.sampler.seed, training=True
        )  # fmt: skip
        return (*(float(n[mine].sum() / max(n.sum(), 1)) for n in (words, regions)), share)

    def _draft_of(self, indices: Indices, epoch: int) -> Draft:
        seed = self.sampler.seed
        if self.masking is not None:
            return draft_masked(
                self.data, indices, self.masking, epoch=epoch, seed=seed, training=True, dtype=self.dtype,
                blind=self.blind, threads=self.threads,
            )  # fmt: skip
        return draft(
            self.data, indices, epoch=epoch, seed=seed, training=True, task_token=self.task_token, dtype=self.dtype,
            share=self.share, blind=self.blind, grid=self.grid, threads=self.threads, resident=self.resident,
        )  # fmt: skip


def validation_batches(
    data: TaskData,
    batch: int,
    *,
    seed: int,
    task_token: int | None,
    dtype: torch.dtype = torch.float32,
    share: bool = True,
    blind: bool = False,
    max_examples: int | None = None,
    masking: Masking | None = None,
    resident: Resident | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """A split in its own order, each example once; wrong options and what is hidden are the same at every pass.

    Of the batches, whose examples do not depend on `world_size`, a rank gets every `world_size`-th."""
    count = len(data) if max_examples is None else min(len(data), max_examples)
    for start in range(rank * batch, count, world_size * batch):
        indices = np.arange(start, min(start + batch, count))
        if masking is not None:
            yield pack_masked(data, indices, masking, epoch=0, seed=seed, training=False, dtype=dtype, blind=blind)
        else:
            yield pack(
                data, indices, epoch=0, seed=seed, training=False, task_token=task_token, dtype=dtype, share=share,
                blind=blind, resident=resident,
            )  # fmt: skip


class Loader:
    """Prefetches the batches that are asked for ahead, and hands them over in any order."""

    def __init__(self, sources: Mapping[str, BatchSource], depth: int = 4) -> None:
        """`depth`: how many batches may be ready or under way at a time; this bounds the memory that they hold."""
        self._sources = dict(sources)
        self._depth = depth
        self._pending: dict[tuple[str, int], Future[Batch]] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")

    def request(self, task: str, step: int) -> bool:
        """Start on a batch. False, and nothing done, where `depth` others are pending: ask again later."""
        key = (task, step)
        if key not in self._pending:
            if len(self._pending) >= self._depth:
                return False
            self._pending[key] = self._thread.submit(self._sources[task], step)
        return True

    def take(self, task: str, step: int) -> Batch:
        """The batch: the prefetched one, or one made now, in the caller's thread.

        An error in making it (BadInput for a damaged record) is raised here.
        """
        future = self._pending.pop((task, step), None)
        return self._sources[task](step) if future is None else future.result()

    def close(self) -> None:
        """Drop what is pending and end the thread."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
