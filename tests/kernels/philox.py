"""Philox 4x32-10 and the keep rule of dropout in numpy, written from their definitions and nothing of `kernels`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

WORD = 0xFFFFFFFF


def words(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The four 32-bit words of one block (Salmon et al., SC 2011), in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (high >> 32) ^ c1 ^ k0, high & WORD, (low >> 32) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _words(c0: NDArray, c1: int, c2: NDArray, c3: int, key: tuple[int, int]) -> list[NDArray[np.uint64]]:
    """The same over arrays, in unsigned 64-bit arithmetic."""
    mask, shift = np.uint64(WORD), np.uint64(32)
    a, c = (np.asarray(x, np.uint64) for x in (c0, c2))
    b, d = (np.full_like(a, x, np.uint64) for x in (c1, c3))
    k0, k1 = key
    for _ in range(10):
        low, high = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (high >> shift) ^ b ^ np.uint64(k0), high & mask, (low >> shift) ^ d ^ np.uint64(k1), low & mask
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [a, b, c, d]


def keep_row(
    seed: int, step: int, site: int, p: float, item: int, row: int, width: int, tile: int
) -> NDArray[np.bool_]:
    """[width]: which columns of one row are kept.

    Column c of a tile uses 16-bit lane c // (tile / 8) of block c % (tile / 8); blocks are counted through all tiles.
    """
    column = np.arange(width)
    eighth = tile // 8
    block = column // tile * eighth + column % tile % eighth
    lane = column % tile // eighth
    word = np.choose(lane // 2, _words(np.full(width, item), row, block, site, (seed, step)))
    sixteen = np.where(lane % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return sixteen >= round(p * 65536)
