"""Lists of different lengths kept as one flat array and offsets: item i owns `flat[offsets[i]:offsets[i + 1]]`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Offsets = NDArray[np.int64]


def offsets_of(lengths: ArrayLike) -> Offsets:
    """Cumulative sum with a leading zero, int64 [n + 1]."""
    counts = np.asarray(lengths)
    offsets = np.zeros(len(counts) + 1, np.int64)
    counts.cumsum(out=offsets[1:])
    return offsets


def lengths_of(offsets: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """The inverse. (`np.diff` takes five times as long.)"""
    return offsets[1:] - offsets[:-1]


def ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """`starts[0], starts[0] + 1, …` (lengths[0] of them), then those of item 1, …: int64 [sum of lengths]."""
    offsets = offsets_of(lengths)
    shift = starts - offsets[:-1]
    return shift.repeat(lengths) + np.arange(offsets[-1])


def take(offsets: Offsets, items: NDArray[np.int64]) -> tuple[NDArray[np.int64], Offsets]:
    """The flat positions of the chosen items, one after the other, and their new offsets."""
    starts = offsets[items]
    lengths = offsets[items + 1] - starts
    return ranges(starts, lengths), offsets_of(lengths)


def join(parts: Iterable[Offsets]) -> Offsets:
    """The offsets of several ragged arrays put one after the other."""
    return offsets_of(np.concatenate([lengths_of(part) for part in parts]))
