"""Wrong options for retrieval: which captions and images stand beside the right one (spec section 3.2).

The order of options is fixed, the match first: (image, caption); (image, caption of another image); (another image,
caption); (image, caption of a hard image). Hard images are looked up in a pool mined beforehand; without a pool, and
in validation, they are random other images. Draws depend on seed, task, example and epoch alone.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import ragged
from pipelines.errors import BadInput
from pipelines.random import CAPTION, CAPTION_IMAGE, HARD_CAPTION, HARD_IMAGE, IMAGE, draws
from pipelines.store.reader import FeatureStore

OPTIONS = 4

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class HardPool:
    """The hard neighbours of each image of a split, nearest first, as positions in `CaptionPool.images`."""

    offsets: ragged.Offsets
    neighbours: NDArray[np.int32]


@dataclass
class CaptionPool:
    """The images of a retrieval split and the captions (examples) of each."""

    images: NDArray[np.int32]
    """int32 [m]: store rows, ascending."""
    position: NDArray[np.int32]
    """int32 [n]: the image of each example, as a position in `images`."""
    offsets: ragged.Offsets
    """int64 [m + 1]: image j has the captions `captions[offsets[j]:offsets[j + 1]]`."""
    captions: NDArray[np.int64]
    hard: HardPool | None = None

    @classmethod
    def of(cls, image_rows: NDArray[np.int32], where: str) -> CaptionPool:
        """From each example's store row. Raises BadInput where there is no other image to draw."""
        images, position, counts = np.unique(image_rows, return_inverse=True, return_counts=True)
        if len(images) < 2:
            raise BadInput(where, "captions of one image only", "retrieval draws its wrong options from other images")
        captions = np.argsort(position, kind="stable")
        return cls(images, position.astype(np.int32), ragged.offsets_of(counts), captions)


def draw_options(
    pool: CaptionPool, examples: Indices, *, number: int, seed: int, epoch: int, training: bool
) -> tuple[Indices, Indices]:
    """The options of these examples: (text, image), each int64 [B, 4]; texts are examples, images are store rows.

    Validation is the same in every epoch, and takes a random image for the hard one.
    """
    epoch = epoch if training else 0
    draw = _Draw(pool, examples, number, seed, epoch)
    hard = draw.hard_image(pool.hard) if training and pool.hard is not None else draw.other_image(HARD_IMAGE)
    texts = np.stack(
        [examples, draw.caption(draw.other_image(CAPTION_IMAGE), CAPTION), examples, draw.caption(hard, HARD_CAPTION)],
        axis=1,
    )
    own = pool.images[pool.position[examples]].astype(np.int64)
    images = np.stack([own, own, pool.images[draw.other_image(IMAGE)].astype(np.int64), own], axis=1)
    return texts, images


@dataclass(frozen=True)
class _Draw:
    pool: CaptionPool
    examples: Indices
    number: int
    seed: int
    epoch: int

    def _uniform(self, purpose: int, n: NDArray[np.int64] | int) -> Indices:
        return draws(self.seed, purpose, self.number, self.examples, self.epoch, n)

    def other_image(self, purpose: int) -> Indices:
        """A random image that is not the example's own: positions in `pool.images`."""
        own = self.pool.position[self.examples]
        other = self._uniform(purpose, len(self.pool.images) - 1)
        return other + (other >= own)

    def hard_image(self, hard: HardPool) -> Indices:
        starts = hard.offsets[self.pool.position[self.examples]]
        counts = hard.offsets[self.pool.position[self.examples] + 1] - starts
        return hard.neighbours[starts + self._uniform(HARD_IMAGE, counts)].astype(np.int64)

    def caption(self, images: Indices, purpose: int) -> Indices:
        """A random caption of each image: examples."""
        starts = self.pool.offsets[images]
        return self.pool.captions[starts + self._uniform(purpose, self.pool.offsets[images + 1] - starts)]


def load_hard_pool(path: Path, pool: CaptionPool, store: FeatureStore) -> HardPool:
    """Read a mined pool: a `.npz` with `images` (unicode [m]: image keys) and `pool` (int [m, k]: positions in
    `images`, nearest first). `python -m pipelines.mine` makes one.

    Raises BadInput for a file of another form, and as `fit_hard_pool`.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            keys, nearest = file["images"], file["pool"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        # NumPy's own words advise to unpickle the file.
        what = str(error) if isinstance(error, (OSError, KeyError)) else "no archive of plain arrays"
        raise BadInput(path, f"not a pool of hard negatives: {what}", "mine it again") from error
    return fit_hard_pool(keys, nearest, pool, store, path)


def fit_hard_pool(
    keys: NDArray[Any], nearest: NDArray[Any], pool: CaptionPool, store: FeatureStore, path: Path
) -> HardPool:
    """A mined pool on the images of a split: `keys` and `nearest` as the file at `path` has them. The image itself, and
    images that the split does not have, are passed over.

    Raises BadInput for arrays that do not fit, and for an image of the split without a hard neighbour.
    """
    if (
        keys.ndim != 1
        or keys.dtype.kind != "U"
        or nearest.ndim != 2
        or nearest.dtype.kind not in "iu"
        or not (len(keys) == len(nearest) and nearest.size and nearest.min() >= 0 and nearest.max() < len(keys))
    ):
        raise BadInput(
            path,
            f"images {keys.dtype}{keys.shape} and pool {nearest.dtype}{nearest.shape} do not fit",
            "wanted: image keys [m] and positions [m, k] among them",
        )
    here = {key: position for position, key in enumerate(store.keys()[row] for row in pool.images)}
    position = np.array([here.get(key, -1) for key in keys.tolist()], np.int32)
    table = np.full((len(pool.images), nearest.shape[1]), -1, np.int32)
    table[position[position >= 0]] = position[nearest[position >= 0]]
    usable = (table >= 0) & (table != np.arange(len(table))[:, None])
    counts = usable.sum(axis=1)
    if not counts.all():
        image = store.keys()[pool.images[int(np.argmin(counts))]]
        raise BadInput(
            path,
            f"no hard neighbour for {int((counts == 0).sum())} images of the split, such as {image!r}",
            "mine the pool on this split's images",
        )
    return HardPool(ragged.offsets_of(counts), table[usable])
