"""Nearest images by the Euclidean distance of their features: exact, in blocks of bounded memory.

Products of float32 blocks choose candidates, float64 ranks them. Rounding could lose a neighbour among the former, so
every score is an upper bound of the true one: an image that no bound puts near is certainly not near, and where the
bounds leave a doubt (many images at one distance) all images in doubt are ranked. The result is that of brute force in
float64, whatever the blocks, threads and device.

Letters: m images, F features, r rows asked for, b columns of a block, c candidates, k neighbours.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.boxes import Float32

Float64 = NDArray[np.float64]
Positions = NDArray[np.int64]

SPARE = 32
"""Candidates beyond k: with them hardly a row of ordinary features is in doubt."""
LARGEST = 1e15
"""Features beyond this could overflow float32 when squared and summed."""
_UNDERFLOW = 1e-30  # more than all products too small for float32 can amount to
_SIDES = (32, 4096)  # least and most rows of a block: more is no faster
_RANKED = 64  # rows subtracted at a time: they stay in the cache


class Neighbours(NamedTuple):
    """The k nearest of some images, nearest first; of equally near ones the smaller position first."""

    positions: NDArray[np.int32]
    """int32 [r, k]."""
    values: Float32
    """float32 [r, k]: the distance, or the similarity."""


class NearestByDistance:
    """Answers for `features`, float32 [m, F], in memory or mapped, none beyond `LARGEST`. An image is no neighbour of
    itself; images with the same features are neighbours at distance 0.

    `memory`: bytes for blocks, on the device as on the host.
    """

    def __init__(self, features: Float32, neighbours: int, memory: int, device: torch.device) -> None:
        if torch.get_float32_matmul_precision() != "highest":
            raise ValueError("the bounds are those of whole float32 products: set_float32_matmul_precision('highest')")
        self.features, self.device = features, device
        self.k = min(neighbours, len(features) - 1)
        self.candidates = min(self.k + SPARE, len(features) - 1)
        self.rows_at_once = block_side(memory, features.shape[1], self.candidates)
        # Distances do not depend on the origin, the rounding of products does: from the mean, it is least.
        self.centre = torch.from_numpy(features.mean(axis=0, dtype=np.float64).astype(np.float32))
        # Twice the bound for a sum of F products in any order (Higham, "Accuracy and Stability of Numerical
        # Algorithms", section 3.1): room for the rounding of centre, norms and float64 distances.
        self.error = 2 * (features.shape[1] + 8) * 2.0**-24

    def digest(self) -> str:
        """sha256 of the features."""
        return hashlib.sha256(self.features.data).hexdigest()

    def nearest(self, start: int, stop: int) -> Neighbours:
        """The neighbours of images `start` to `stop`."""
        queries = self._centred(start, stop)
        squares = queries.double().square().sum(dim=1)
        scores, columns = self._choose(queries, start)
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            ranked = list(threads.map(self._rank, range(start, stop), columns.cpu().numpy()))
            if self.candidates < len(self.features) - 1:
                furthest = torch.from_numpy(np.array([distances[-1] for _, distances in ranked])).to(self.device)
                reach = 0.5 * (squares * (1 - self.error) - _UNDERFLOW - furthest)  # below it, further than the k-th
                doubt = torch.nonzero(scores[:, -1] >= reach)[:, 0]
                near = self._within(queries[doubt], reach[doubt])
                for row, again in zip(doubt.tolist(), near, strict=True):
                    ranked[row] = self._rank(start + row, again[again != start + row])
        positions, distances = (np.stack(column) for column in zip(*ranked, strict=True))
        return Neighbours(positions.astype(np.int32), np.sqrt(distances).astype(np.float32))

    def value(self, image: int, other: int) -> float:
        """The distance of two images."""
        return float(np.sqrt(self._squared_distances(image, np.array([other]))[0]))

    def _centred(self, start: int, stop: int) -> Tensor:
        rows = torch.from_numpy(np.array(self.features[start:stop])).sub_(self.centre)
        return rows.to(self.device)

    def _scores(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """First column and scores, float32 [r, b], of each block of columns.

        With s the score of image j for a row q: |q - j|² >= |q|² (1 - error) - 2 s, with certainty. |q| |j|, by which
        the product errs, is at most half of |q|² + |j|²; the part of j is in the score already.
        """
        for first in range(0, len(self.features), self.rows_at_once):
            block = self._centred(first, first + self.rows_at_once)
            penalty = block.double().square().sum(dim=1).mul_(self.error - 0.5).float()
            yield first, torch.addmm(penalty, queries, block.T)

    def _choose(self, queries: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """The candidates with the highest scores, best first: scores and columns [r, c]."""
        best = torch.empty(len(queries), 0, device=self.device)
        columns = torch.empty(len(queries), 0, dtype=torch.int64, device=self.device)
        for first, scores in self._scores(queries):
            shared = range(max(start, first), min(start + len(queries), first + scores.shape[1]))
            own = torch.tensor(shared, dtype=torch.int64)
            scores[own - start, own - first] = -torch.inf
            top, places = scores.topk(min(self.candidates, scores.shape[1]), dim=1)
            best, columns = torch.cat([best, top], dim=1), torch.cat([columns, places + first], dim=1)
            best, places = best.topk(min(self.candidates, best.shape[1]), dim=1)
            columns = columns.gather(1, places)
        return best, columns

    def _within(self, queries: Tensor, reach: Tensor) -> list[Positions]:
        """For each row all columns with a score of at least `reach`."""
        found: list[list[Positions]] = [[] for _ in range(len(queries))]
        for first, scores in self._scores(queries) if len(queries) else ():
            for row, hits in enumerate((scores >= reach[:, None]).cpu().numpy()):
                found[row].append(np.flatnonzero(hits) + first)
        return [np.concatenate(parts) for parts in found]

    def _rank(self, image: int, columns: Positions) -> tuple[Positions, Float64]:
        """The k nearest among `columns` and their squared distances."""
        squares = self._squared_distances(image, columns)
        order = np.lexsort((columns, squares))[: self.k]
        return columns[order], squares[order]

    def _squared_distances(self, image: int, columns: Positions) -> Float64:
        """float64, by the definition. NumPy sums each row alone: a distance does not depend on what stands beside it."""
        own = self.features[image].astype(np.float64)
        squares = np.empty(len(columns))
        for first in range(0, len(columns), _RANKED):
            part = slice(first, first + _RANKED)
            difference = self.features[columns[part]] - own
            np.square(difference, out=difference).sum(axis=1, out=squares[part])
        return squares


def block_side(memory: int, features: int, candidates: int) -> int:
    """Rows of a square block so that rows, columns (one of them also in float64), scores and candidates fit."""
    least, most = _SIDES
    for side in range(most, least, -least):
        if side * features * 16 + side * side * 4 + side * candidates * 64 <= memory:
            return side
    return least
