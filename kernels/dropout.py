"""Counter-based dropout: who is dropped is a function of (seed, step, item, row, column, site), of nothing else.

So the same seed gives the same mask on every backend, on any number of ranks, packed in any order, shared or not, and
after a resume; and no mask has to be stored. Philox 4x32-10 (Salmon et al., SC 2011) with key (seed, step) and counter
(item key, row within the item, column block, site) gives 128 bits, used as eight 16-bit lanes: a value is kept if its
lane is at least `threshold` = round(p * 65536), i.e. p = 0.1 becomes 6554 / 65536 = 0.10001.

Which lane of which block a column uses: columns are cut into tiles of `tile` columns (a whole row for element-wise ops,
64 for attention probabilities). Within a tile, column c uses block `c % (tile / 8)` and lane `c // (tile / 8)`, so that
a kernel that holds an eighth of the tile applies one draw to eight slices without moving values between threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import native_library

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
ATTENTION_TILE = 64


@dataclass(frozen=True)
class Dropout:
    """One dropout place of one step: probability and random coordinates (all in [0, 2**32))."""

    p: float
    seed: int
    step: int
    site: int

    @property
    def threshold(self) -> int:
        """Lanes below it are dropped."""
        return round(self.p * 65536)

    @property
    def scale(self) -> float:
        """What kept values are multiplied by, so that the mean stays: 1 / (1 - p as drawn)."""
        return 65536 / (65536 - self.threshold)


def row_tile(width: int) -> int:
    """The tile of an element-wise op: the whole row, rounded up to eight columns."""
    return (width + 7) // 8 * 8


def keep_mask(dropout: Dropout, row_key: Tensor, row_index: Tensor, width: int, tile: int | None = None) -> Tensor:
    """uint8 [rows, width], 1 = kept. `row_key`, `row_index`: int64 [rows]. Native on CPU, plain torch elsewhere."""
    tile = tile or row_tile(width)
    if row_key.device.type == "cpu" and native_library.available():
        return native_library.keep_mask(dropout, row_key, row_index, width, tile)
    return keep_mask_torch(dropout, row_key, row_index, width, tile)


def keep_mask_torch(dropout: Dropout, row_key: Tensor, row_index: Tensor, width: int, tile: int) -> Tensor:
    """The plain reference of `keep_mask`."""
    eighth = tile // 8
    tiles = (width + tile - 1) // tile
    rows = row_key.numel()
    block = torch.arange(tiles * eighth, device=row_key.device)
    words = philox(
        (dropout.seed, dropout.step),
        (row_key[:, None], row_index[:, None], block[None, :], torch.full_like(block, dropout.site)[None, :]),
    )
    lanes = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    columns = lanes.view(rows, tiles, eighth, 8).transpose(2, 3).reshape(rows, tiles * tile)
    return (columns[:, :width] >= dropout.threshold).to(torch.uint8)


def philox(
    key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on int64 tensors that hold unsigned 32-bit values; counters broadcast against each other."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap to the same 64 bits as unsigned ones; the shift is arithmetic, the mask undoes that.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def drop(x: Tensor, dropout: Dropout | None, row_key: Tensor, row_index: Tensor) -> Tensor:
    """Element-wise dropout of x [rows, width]; the identity for None."""
    if dropout is None:
        return x
    keep = keep_mask(dropout, row_key, row_index, x.shape[-1])
    return (x.float() * (keep * dropout.scale)).to(x.dtype)  # in bfloat16 the scale itself would be rounded
