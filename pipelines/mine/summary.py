"""What was mined, for people: how near neighbours are beside random pairs, and a few of them in words."""

from __future__ import annotations

import numpy as np

from pipelines.datasets import TaskData
from pipelines.mine.job import Ranking, matching
from pipelines.mine.nearest import Neighbours
from pipelines.random import IMAGE, draws
from pipelines.wordpiece import WordPiece

_PAIRS = 1000
_EXAMPLES, _CAPTIONS = 2, 5


def summary(data: TaskData, ranking: Ranking, found: Neighbours, value: str, tokenizer: WordPiece) -> list[str]:
    """Lines of text. `value`: what the values are, "distance" or "similarity"."""
    images, k = found.positions.shape
    first, last = (float(found.values[:, column].mean(dtype=np.float64)) for column in (0, -1))
    random = _random_pairs(ranking, images)
    lines = [
        f"mean {value}: {first:.3f} to the nearest, {last:.3f} to neighbour {k}, {random:.3f} between random images"
    ]
    if abs(last - first) >= abs(random - first):
        lines.append(f"neighbour {k} is no nearer than a random one: give fewer --neighbours")
    if value == "distance" and (twins := int((found.values[:, 0] == 0).sum())):
        lines.append(f"{twins:,} images have the very features of another one: the same photo twice?")
    for image in np.linspace(0, images - 1, min(_EXAMPLES, images)).astype(int).tolist():
        other = int(found.positions[image, 0])
        lines += [*_described(data, image, tokenizer), f"  {value} {found.values[image, 0]:.3f} to its nearest,"]
        lines += _described(data, other, tokenizer)
    return lines


def _random_pairs(ranking: Ranking, images: int) -> float:
    own = np.arange(_PAIRS) * images // _PAIRS
    other = draws(0, IMAGE, 0, np.arange(_PAIRS), 0, images - 1)
    other += other >= own
    values = [ranking.value(image, pair) for image, pair in zip(own.tolist(), other.tolist(), strict=True)]
    return float(np.mean(values))


def _described(data: TaskData, image: int, tokenizer: WordPiece) -> list[str]:
    """An image's key and its first captions."""
    pool = matching(data)
    captions = pool.captions[pool.offsets[image] : pool.offsets[image + 1]][:_CAPTIONS].tolist()
    texts = [data.token_ids[data.token_offsets[each] : data.token_offsets[each + 1]] for each in captions]
    return [f"  image {data.store.keys()[pool.images[image]]}", *(f"    {tokenizer.decode(ids)}" for ids in texts)]
