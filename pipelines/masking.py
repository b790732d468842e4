"""What pretraining hides from the model, drawn on the host by counters alone (paper section 3.1, spec section 2.1).

A draw depends on seed, task, epoch, example and place, so a batch's masks are the same on any rank and after a resume.
Inputs of an unmatched caption are masked like all others, or the masks would give the answer away; they have no labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipelines import ragged
from pipelines.boxes import Float32, paired_iou
from pipelines.random import (
    MASKED_REGION,
    MASKED_WORD,
    RANDOM_WORD,
    REGION_FATE,
    UNMATCHED,
    UNMATCHED_CAPTION,
    WORD_FATE,
    draws,
    hash_words,
)

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

_BECOMES_MASK, _BECOMES_RANDOM = 0.8, 0.9
"""Of the chosen words so many become [MASK]; from there to here a random word; the rest stay."""
_REGION_ZEROED = 0.9
"""Of the chosen regions; the rest keep their features."""
_UNIT = 1 << 30


@dataclass(frozen=True)
class Masking:
    """How much is hidden, and of which vocabulary."""

    mask_token: int
    vocabulary: int
    """Words that a random one is drawn from, special ones included, as published."""
    words: float = 0.15
    regions: float = 0.15
    unmatched: float = 0.5
    """Share of images that get another image's caption."""
    overlap: Literal["paper", "authors"] = "paper"
    """What becomes of regions that overlap a chosen one: see `mask_regions`."""
    iou: float = 0.4
    """Overlap above which a region gives a chosen one away."""


@dataclass(frozen=True)
class Draw:
    """Who draws: the examples of a batch."""

    number: int
    seed: int
    epoch: int
    examples: Indices
    """int64 [B]."""

    def share(self, purpose: int, items: Indices | None = None, places: Indices | None = None) -> NDArray[np.float64]:
        """Uniform in [0, 1): one number an example, or for place `places[i]` of the example at `items[i]`."""
        if items is None:
            return draws(self.seed, purpose, self.number, self.examples, self.epoch, _UNIT) / _UNIT
        assert places is not None
        hashed = hash_words(self.seed, purpose, self.number, self.epoch, self.examples[items], places)
        return (hashed >> np.uint64(34)).astype(np.int64) / _UNIT


def draw_captions(draw: Draw, count: int, share: float) -> tuple[Indices, Flags]:
    """The example whose caption each example of the batch gets, int64 [B], and whether that is another one's, bool [B].

    Another one's is drawn uniformly from the other `count` - 1 examples.
    """
    other = draws(draw.seed, UNMATCHED_CAPTION, draw.number, draw.examples, draw.epoch, count - 1)
    other = other + (other >= draw.examples)
    unmatched = draw.share(UNMATCHED) < share
    return np.where(unmatched, other, draw.examples), unmatched


@dataclass(frozen=True)
class MaskedWords:
    """Words as the model sees them, and what it has to guess."""

    token_ids: NDArray[np.int64]  # [T]
    rows: Indices  # [m], of matched captions alone
    labels: NDArray[np.int64]  # [m]


def mask_words(
    draw: Draw, masking: Masking, token_ids: NDArray[np.int64], cu_texts: ragged.Offsets, unmatched: Flags
) -> MaskedWords:
    """Choose among the word pieces of each text, [CLS] and [SEP] at its ends aside. One text an example, in their order."""
    text, place = _chosen(draw, MASKED_WORD, np.diff(cu_texts) - 2, masking.words)
    rows = cu_texts[text] + place
    fate = draw.share(WORD_FATE, text, place)
    words = (draw.share(RANDOM_WORD, text, place) * masking.vocabulary).astype(np.int64)
    seen = token_ids.copy()
    seen[rows[fate < _BECOMES_MASK]] = masking.mask_token
    random = (fate >= _BECOMES_MASK) & (fate < _BECOMES_RANDOM)
    seen[rows[random]] = words[random]
    asked = rows[~unmatched[text]]
    return MaskedWords(seen, asked, token_ids[asked])


def asked(draw: Draw, masking: Masking, words: Indices, regions: Indices, unmatched: Flags) -> tuple[Indices, Indices]:
    """How many words and how many regions each example is asked for, int64 [B] each, from how many it has.

    What `mask_words` and `mask_regions` choose, without their texts and boxes: the divisors of a batch's losses.
    """

    def count(purpose: int, lengths: Indices, share: float) -> Indices:
        item, _ = _chosen(draw, purpose, lengths, share)
        return np.bincount(item[~unmatched[item]], minlength=len(lengths))

    return count(MASKED_WORD, words, masking.words), count(MASKED_REGION, regions, masking.regions)


def _chosen(draw: Draw, purpose: int, lengths: Indices, share: float) -> tuple[Indices, Indices]:
    """(item, place) of what is chosen among places 1 to lengths[i] of each item; place 0 is [CLS], or the global row."""
    item = np.repeat(np.arange(len(lengths)), lengths)
    place = ragged.ranges(np.ones(len(lengths), np.int64), lengths)
    chosen = draw.share(purpose, item, place) < share
    return item[chosen], place[chosen]


@dataclass(frozen=True)
class MaskedRegions:
    """What becomes of the region rows of a batch; rows count from its first, global rows included."""

    zeroed: Flags
    """bool [R]: features that become zeros; the global rows are not among them, but made anew."""
    averaged: Flags
    """bool [R]: the rows whose features, after zeroing, are summed into the global row."""
    divisor: NDArray[np.int64]
    """int64 [n_images]: what that sum is divided by, at least 1."""
    rows: Indices
    """int64 [k]: chosen rows of images with their own caption, whose class is to be guessed."""


def mask_regions(
    draw: Draw, masking: Masking, pixels: Float32, cu_images: ragged.Offsets, unmatched: Flags
) -> MaskedRegions:
    """Choose among the regions of each image. One image an example, in their order; `pixels` float32 [R, 4].

    Of the chosen 90 % become zeros, and 10 % keep their features. `paper`: so do regions that overlap a chosen one by more
    than `iou`, which have no label, and the global row is the mean of the regions that are neither (zeros if there is
    none). `authors`, as coded: overlapping regions stay as they are, and the global row is the sum of all regions after
    zeroing over the number of those that overlap no chosen one.
    """
    image, place = _chosen(draw, MASKED_REGION, np.diff(cu_images) - 1, masking.regions)
    rows = cu_images[image] + place
    gone = rows[draw.share(REGION_FATE, image, place) < _REGION_ZEROED]

    is_region = np.ones(int(cu_images[-1]), bool)
    is_region[cu_images[:-1]] = False
    near = _near(rows, image, pixels, cu_images, masking.iou)
    chosen, zeroed = np.zeros_like(is_region), np.zeros_like(is_region)
    chosen[rows], zeroed[gone] = True, True
    if masking.overlap == "paper":
        zeroed |= near & ~chosen
        averaged = is_region & ~near & ~chosen
    else:
        averaged = is_region
    left = np.add.reduceat((is_region & ~near & ~chosen).astype(np.int64), cu_images[:-1])
    return MaskedRegions(zeroed, averaged, np.maximum(left, 1), rows[~unmatched[image]])


def _near(rows: Indices, image: Indices, pixels: Float32, cu_images: ragged.Offsets, iou: float) -> Flags:
    """bool [R]: regions that overlap one of these rows of their image by more than `iou`."""
    starts, lengths = cu_images[image] + 1, np.diff(cu_images)[image] - 1
    others, chosen = ragged.ranges(starts, lengths), np.repeat(rows, lengths)
    close = paired_iou(pixels[chosen], pixels[others]) > iou
    near = np.zeros(int(cu_images[-1]), bool)
    near[others[close]] = True
    return near
