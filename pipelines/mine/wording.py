"""Nearest images by their captions: TF-IDF over word pieces, the mean cosine of all pairs of their captions.

Training draws one of a hard image's captions at random: the mean says how near that one will be. It is linear, so the
captions of an image become one vector, the mean of their unit vectors, and m x m products stand for those of all n x n
pairs. (By the best caption instead, Flickr30k's two young men in a yard were nearest to two dogs playing in a yard.)

Weights are rounded down to multiples of 2**-12, which takes less than 0.01 from a similarity. All sums of products are
then multiples of 2**-24 of at most 1, which float32 holds exactly: no block, order of summation or device changes a
bit, and equal is equal.

Letters: m images, n captions, V words in use, r images asked for, b images of a block, k neighbours.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from pipelines import ragged
from pipelines.boxes import Float32
from pipelines.mine.nearest import Neighbours

STEPS = 1 << 12
"""A weight is a multiple of 1 / STEPS."""
_POSITION_BITS = 32
_LAST = (1 << 31) - 1
SIZES = (16, 256), (256, 8192)
"""Least and most rows and columns of a block. With 256 rows the weights of all common words stay in the cache."""

Positions = NDArray[np.int64]


@dataclass(frozen=True)
class Weights:
    """A vector of length 1 at most for each image, its words other than 0 alone; there may be none."""

    offsets: ragged.Offsets
    """int64 [m + 1]."""
    words: Positions
    weights: Float32

    def row(self, image: int) -> tuple[Positions, Float32]:
        """Words and weights of one image."""
        part = slice(self.offsets[image], self.offsets[image + 1])
        return self.words[part], self.weights[part]

    def rows(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Words, offsets and weights of several, as `embedding_bag` takes them."""
        offsets = self.offsets[start : stop + 1]
        part = slice(offsets[0], offsets[-1])
        arrays = (self.words[part], offsets - offsets[0], self.weights[part])
        words, starts, weights = (torch.from_numpy(array).to(device) for array in arrays)
        return words, starts, weights


def mean_tf_idf(words: Positions, offsets: ragged.Offsets, image: Positions, vocabulary: int) -> Weights:
    """The mean over the captions of each image of their unit vectors, rounded down.

    Captions as `NearestByCaptions` has them, words being 0 to `vocabulary` - 1. The weight of a word in a caption is how
    often it stands there, times idf = ln(n / captions that have the word): words of every caption weigh nothing.
    """
    caption = np.repeat(np.arange(len(image)), np.diff(offsets))
    pairs, times = np.unique(caption * vocabulary + words, return_counts=True)
    caption, word = np.divmod(pairs, vocabulary)
    weights = times * np.log(len(image) / np.bincount(word, minlength=vocabulary)[word])
    lengths = np.sqrt(np.bincount(caption, weights * weights, minlength=len(image)))[caption]
    weights = np.divide(weights, lengths, out=np.zeros_like(weights), where=lengths > 0)
    captions = np.bincount(image)
    pairs, place = np.unique(image[caption] * vocabulary + word, return_inverse=True)
    owner, word = np.divmod(pairs, vocabulary)
    steps = np.floor(np.bincount(place, weights, minlength=len(pairs)) / captions[owner] * STEPS)
    used = steps > 0
    counts = np.bincount(owner[used], minlength=len(captions))
    return Weights(ragged.offsets_of(counts), word[used], (steps[used] / STEPS).astype(np.float32))


class NearestByCaptions:
    """Answers for captions, given as word ids: `words` flat, `offsets` int64 [n + 1], `image` [n] the image of each,
    0 to m - 1, every image having one at least.

    `memory`: bytes for blocks, on the device as on the host.
    """

    def __init__(
        self,
        words: NDArray[np.integer],
        offsets: ragged.Offsets,
        image: NDArray[np.integer],
        neighbours: int,
        memory: int,
        device: torch.device,
    ) -> None:
        used, dense = np.unique(words, return_inverse=True)
        self.vocabulary = max(1, len(used))
        self.weights = mean_tf_idf(dense, offsets, image.astype(np.int64), self.vocabulary)
        self.images = len(self.weights.offsets) - 1
        self.k = min(neighbours, self.images - 1)
        self.device = device
        rows, columns = SIZES
        self.rows_at_once = _within(rows, memory // (16 * self.vocabulary))
        self.columns_at_once = _within(columns, memory // (64 * self.rows_at_once))

    def digest(self) -> str:
        """sha256 of all weights."""
        digest = hashlib.sha256()
        for array in (self.weights.offsets, self.weights.words, self.weights.weights):
            digest.update(array.data)
        return digest.hexdigest()

    def nearest(self, start: int, stop: int) -> Neighbours:
        """The neighbours of images `start` to `stop`."""
        queries = self._dense(start, stop)
        best = torch.empty(stop - start, 0, dtype=torch.int64, device=self.device)
        for first in range(0, self.images, self.columns_at_once):
            keys = self._keys(queries, start, first, min(first + self.columns_at_once, self.images))
            top = keys.topk(min(self.k, keys.shape[1]), dim=1).values
            best = torch.cat([best, top], dim=1)
            best = best.topk(min(self.k, best.shape[1]), dim=1).values
        positions = _LAST - (best & ((1 << _POSITION_BITS) - 1))
        values = (best >> _POSITION_BITS).double() / STEPS**2
        return Neighbours(positions.to(torch.int32).cpu().numpy(), values.float().cpu().numpy())

    def value(self, image: int, other: int) -> float:
        """The similarity of two images, 0 to 1."""
        own, theirs = (dict(zip(*self.weights.row(row), strict=True)) for row in (image, other))
        return float(sum(weight * theirs.get(word, 0) for word, weight in own.items()))

    def _dense(self, start: int, stop: int) -> Tensor:
        """float32 [V, r]: the vectors of these images."""
        words, offsets, weights = self.weights.rows(start, stop, self.device)
        column = torch.repeat_interleave(torch.arange(stop - start, device=self.device), offsets.diff())
        dense = torch.zeros(self.vocabulary, stop - start, device=self.device)
        dense[words, column] = weights
        return dense

    def _keys(self, queries: Tensor, start: int, first: int, last: int) -> Tensor:
        """int64 [r, b]: similarity and position in one integer, the greatest the nearest. Of equal similarities the
        smaller position is the greater one; -1 for an image beside itself.
        """
        words, offsets, weights = self.weights.rows(first, last, self.device)
        scores = embedding_bag(
            words, queries, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True
        )
        keys = scores.mul_(STEPS**2).T.to(torch.int64, memory_format=torch.contiguous_format)
        keys = keys.bitwise_left_shift_(_POSITION_BITS).add_(_LAST - torch.arange(first, last, device=self.device))
        own = torch.tensor(range(max(start, first), min(start + len(keys), last)), dtype=torch.int64)
        keys[own - start, own - first] = -1
        return keys


def _within(limits: tuple[int, int], size: int) -> int:
    return max(limits[0], min(limits[1], size))
