"""Which examples make up a task's batch: a pure function of how many batches it has consumed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.random import permutation


class Sampler:
    """Every example once per epoch, in an order that depends on seed, task number and epoch alone.

    The only state of a task's data is the count of batches consumed (its cursor); a resume needs nothing else.
    """

    def __init__(self, n: int, batch: int, seed: int, number: int) -> None:
        """`n` examples in batches of `batch`; `number` is the task's number. Raises ValueError for an empty set."""
        if n < 1 or batch < 1:
            raise ValueError(f"a sampler needs at least one example and a batch of at least one, not {n} and {batch}")
        self.n = n
        self.batch = batch
        self.seed = seed
        self.number = number
        self._order: tuple[int, NDArray[np.int64]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        return -(-self.n // self.batch)

    def epoch(self, step: int) -> int:
        """The epoch of the batch after `step` consumed ones, from 0."""
        return step // self.batches_per_epoch

    def indices(self, step: int) -> NDArray[np.int64]:
        """The examples of that batch, int64 [at most `batch`]; the last batch of an epoch may be smaller."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._epoch_order(epoch)[position * self.batch : (position + 1) * self.batch]

    def _epoch_order(self, epoch: int) -> NDArray[np.int64]:
        cached = self._order  # read once: another thread may replace it meanwhile
        if cached is None or cached[0] != epoch:
            cached = (epoch, permutation(self.n, self.seed, self.number, epoch))
            self._order = cached
        return cached[1]
