"""Where the right image stands among all of the pool (spec section 6)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RECALLS = (1, 5, 10)
LISTED = 20
"""Images that the result file of the authors has for each caption."""


def ranks(scores: NDArray[np.float32], right: NDArray[np.int32]) -> NDArray[np.int64]:
    """int64 [captions], from 0: images that score at least as well as the right one. A tie is wrong: a constant model must
    not find everything. `scores` [captions, images]; `right`: the column of each caption's image."""
    own = scores[np.arange(len(scores)), right]
    return (scores >= own[:, None]).sum(1) - 1


def measures(found: NDArray[np.int64]) -> dict[str, float]:
    """R@k for k of `RECALLS`, median and mean rank. Ranks come from 0; the two that are told count from 1, the median of an
    even number of captions rounded down, as published."""
    recalls = {f"r@{k}": float((found < k).mean()) for k in RECALLS}
    return {**recalls, "median_rank": float(np.floor(np.median(found) + 1)), "mean_rank": float(found.mean() + 1)}


def best(scores: NDArray[np.float32], count: int = LISTED) -> NDArray[np.int64]:
    """int64 [captions, at most count]: the images with the highest scores, best first; of equals the first in the pool."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]
