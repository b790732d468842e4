"""Counter-based random draws: every number is a hash of who asks, never of what was drawn before.

So the order of an epoch, a negative or a key is the same on one rank or eight, in any batch composition, in any
thread and after a resume. The hash is a chain of splitmix64 finalisers over the tuple of words (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), written out here because NumPy does not
promise that its generators' streams stay the same between versions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# What a draw is for. Two purposes never share a stream, whatever their other words are.
ORDER, CAPTION_IMAGE, CAPTION, IMAGE, HARD_IMAGE, HARD_CAPTION, TEXT_KEY = range(1, 8)
UNMATCHED, UNMATCHED_CAPTION, MASKED_WORD, WORD_FATE, RANDOM_WORD, MASKED_REGION, REGION_FATE = range(8, 15)


def hash_words(*words: ArrayLike) -> NDArray[np.uint64]:
    """uint64 hash of a tuple of non-negative integers; words broadcast against each other."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(word) for word in words)), np.uint64)
    with np.errstate(over="ignore"):  # wrapping at 2**64 is the arithmetic meant
        for word in words:
            state = _finalise(state ^ np.asarray(word).astype(np.uint64))
    return state


def _finalise(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = state + _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def permutation(n: int, seed: int, number: int, epoch: int) -> NDArray[np.int64]:
    """The order of the n examples of task `number` in `epoch`, int64 [n]."""
    return np.argsort(hash_words(seed, ORDER, number, epoch, np.arange(n)), kind="stable")


def draws(
    seed: int, purpose: int, number: int, samples: NDArray[np.int64], epoch: int, n: ArrayLike
) -> NDArray[np.int64]:
    """One uniform integer in [0, n) for each sample of task `number`, int64 [len(samples)].

    `n` is one bound or one for each sample, at least 1 and below 2**31. The 32 high bits of the hash are scaled,
    so the bias is at most n / 2**32.
    """
    high = hash_words(seed, purpose, number, epoch, samples) >> np.uint64(32)
    return ((high * np.asarray(n).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def text_keys(number: int, examples: NDArray[np.int64]) -> NDArray[np.int64]:
    """Who a text is: a 32-bit key of (task number, example index), int64 [len(examples)].

    A caption that serves as another example's negative keeps the key that it has as a positive.
    """
    return (hash_words(TEXT_KEY, number, examples) >> np.uint64(32)).astype(np.int64)


def image_keys(identities: Iterable[str]) -> NDArray[np.int64]:
    """Who an image is: a 32-bit key of its identity, the same in every data set and store, int64."""
    return np.fromiter((zlib.crc32(identity.encode()) for identity in identities), np.int64)
