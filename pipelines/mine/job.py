"""Mining one data set: its training split, the ranking of its images, the rows that are done, the pool at the end."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines import ragged
from pipelines.datasets import TaskData
from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.mine.features import global_rows
from pipelines.mine.nearest import NearestByDistance, Neighbours
from pipelines.mine.partial import Partial
from pipelines.mine.wording import NearestByCaptions
from pipelines.negatives import CaptionPool, fit_hard_pool
from pipelines.progress import Show
from pipelines.store.reader import FeatureStore

_WHAT = "images mined"


class Ranking(Protocol):
    """Who is near whom."""

    k: int
    rows_at_once: int

    def digest(self) -> str: ...

    def nearest(self, start: int, stop: int) -> Neighbours: ...

    def value(self, image: int, other: int) -> float: ...


@dataclass(frozen=True)
class Means:
    """What a ranking is computed with."""

    memory: int
    """Bytes."""
    device: torch.device
    folder: Path
    """For what does not fit in memory."""
    show: Show


def _by_features(data: TaskData, pool: CaptionPool, neighbours: int, means: Means) -> Ranking:
    features = global_rows(data.store, pool.images, means.memory // 2, means.folder, means.show)
    held = 0 if isinstance(features, np.memmap) else features.nbytes
    return NearestByDistance(features, neighbours, means.memory - held, means.device)


def _by_captions(data: TaskData, pool: CaptionPool, neighbours: int, means: Means) -> Ranking:
    lengths = np.diff(data.token_offsets) - 2  # without [CLS] and [SEP]
    words = data.token_ids[ragged.ranges(data.token_offsets[:-1] + 1, lengths)]
    offsets = ragged.offsets_of(lengths)
    return NearestByCaptions(words, offsets, pool.position, neighbours, means.memory, means.device)


@dataclass(frozen=True)
class Method:
    """A way to compare images."""

    rank: Callable[[TaskData, CaptionPool, int, Means], Ranking]
    value: str
    """What it measures."""


METHODS = {"features": Method(_by_features, "distance"), "captions": Method(_by_captions, "similarity")}


def mine(
    data: TaskData, by: str, neighbours: int, target: Path, means: Means, resume: bool = False
) -> tuple[Ranking, Neighbours]:
    """Mine the pool of a training split and write it to `target`; the ranking and what it found.

    `by`: a key of `METHODS`. The result depends on the data, `by` and `neighbours` alone: not on memory, device or
    interruptions. Raises BadInput; `target` then does not exist.
    """
    pool = matching(data)
    ranking = METHODS[by].rank(data, pool, neighbours, means)
    keys = image_keys(pool, data.store)
    settings = {
        "set": data.spec.name,
        "by": by,
        "neighbours": neighbours,
        "images": len(keys),
        "data": hashlib.sha256("\n".join([ranking.digest(), *keys.tolist()]).encode()).hexdigest()[:16],
    }
    with Partial(target, settings, ranking.k, resume) as partial:
        means.show(_WHAT, partial.rows, len(keys))
        while partial.rows < len(keys):
            partial.add(ranking.nearest(partial.rows, min(partial.rows + ranking.rows_at_once, len(keys))))
            means.show(_WHAT, partial.rows, len(keys))
        found = partial.neighbours()
        write_pool(target, keys, found.positions, settings, data)
        partial.remove()
    return ranking, found


def matching(data: TaskData) -> CaptionPool:
    """The images and captions of a retrieval split."""
    if data.pool is None:
        raise ValueError(f"{data.spec.name} has no matching target")
    return data.pool


def image_keys(pool: CaptionPool, store: FeatureStore) -> NDArray[np.str_]:
    """The images of a split, unicode [m], in the order of the pool's positions."""
    return np.array([store.keys()[row] for row in pool.images])


def write_pool(
    target: Path, keys: NDArray[np.str_], nearest: NDArray[Any], made: Mapping[str, Any], data: TaskData
) -> None:
    """Write what `load_hard_pool` reads, and, as JSON under `made`, where it comes from. Raises BadInput as that, first.

    The file's bytes depend on the arguments alone.
    """
    fit_hard_pool(keys, nearest, matching(data), data.store, target)
    content = io.BytesIO()
    np.savez(content, images=keys, pool=nearest.astype(np.int32), made=np.array(json.dumps(made)))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, content.getvalue())
    except OSError as error:
        raise BadInput(target, f"cannot write here: {error.strerror}") from error
