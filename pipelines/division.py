"""How one step's batch is divided: over the ranks of a run, and over the micro-batches of each.

The batch itself is that of one rank (`pipelines.sampler`); a division only says who computes which of its examples. Losses
are means over the whole batch, so each part knows which share of that mean's divisor it holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets import TaskData
from pipelines.targets import Indices


@dataclass(frozen=True)
class Division:
    """The place of one rank among all, and how many micro-batches it makes of its part."""

    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    @property
    def whole(self) -> bool:
        """Whether nothing is divided."""
        return self.world_size == self.accumulation == 1

    def part(self, costs: NDArray[np.int64], micro: int) -> Indices:
        """Positions, int64 [n], ascending, of the examples of this rank's micro-batch number `micro`, by examples' `costs`."""
        return divide(costs, self.world_size * self.accumulation)[micro * self.world_size + self.rank]


WHOLE = Division()
"""One rank, one batch."""


def divide(costs: NDArray[np.int64], parts: int) -> list[Indices]:
    """Positions of each part: as many examples (or one fewer), and about as much cost, ascending. A function of costs alone.

    Dealt from the dearest to the cheapest, forth and back, so that who gets a dear one gets a cheap one next.
    """
    order = np.argsort(-costs, kind="stable")
    turn = np.arange(len(order)) % (2 * parts)
    part = np.where(turn < parts, turn, 2 * parts - 1 - turn)
    return [np.sort(order[part == number]) for number in range(parts)]


def example_rows(data: TaskData, indices: Indices) -> NDArray[np.int64]:
    """Text and region rows of these examples, int64 [n]: what the trunk's work grows with. Retrieval counts the match alone."""
    texts = data.token_offsets[indices + 1] - data.token_offsets[indices]
    images = data.image_rows[indices].astype(np.int64)
    flat = images.reshape(-1)
    regions = 1 + data.detector_counts(flat) + data.candidate_counts(flat)
    return texts * images.shape[1] + regions.reshape(images.shape).sum(1)
