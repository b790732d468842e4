"""Counter-based dropout: who is dropped is a function of (seed, step, item, row, column, site), of nothing else.

So the same seed gives the same mask on every backend, on any number of ranks, packed in any order, shared or not, and
after a resume; and no mask has to be stored. Philox 4x32-10 (Salmon et al., SC 2011) with key (seed, step) and counter
(item key, row within the item, column block, site) gives 128 bits, used as eight 16-bit lanes: a value is kept if its
lane is at least `threshold` = round(p * 65536), i.e. p = 0.1 becomes 6554 / 65536 = 0.10001.

Which lane of which block a column uses: columns are cut into tiles of `tile` columns (a whole row for element-wise ops,
64 for attention probabilities). Within a tile, column c uses block `c % (tile / 8)` and lane `c // (tile / 8)`, so that
a kernel that holds an eighth of the tile applies one draw to eight slices without moving values between threads.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose
from kernels.native_library import dtype_code, library
from kernels.row_slices import WARPS, RowLayout, load_slices, store_slice, variant_of
from kernels.rows import Rows
from kernels.variants import Variant

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
ATTENTION_TILE = 64


@dataclass(frozen=True)
class Dropout:
    """One dropout place of one step: probability and random coordinates (all in [0, 2**32)).

    `step` may be an int64 tensor of one element on the device: a captured CUDA graph reads it anew at every replay, where a
    number would be frozen into the graph.
    """

    p: float
    seed: int
    step: int | Tensor
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


# Triton


@triton.jit
def draw(seed, step, item, row, block, site):
    """The four uint32 words of one Philox 4x32-10 draw, for every element of the broadcast of item, row and block.

    seed, step, site: scalars in [0, 2**32), of any integer type; item, row, block: integer tensors of values in [0, 2**32).
    """
    k0, k1 = seed.to(tl.uint32), step.to(tl.uint32)
    c0, c1, c2, c3 = item.to(tl.uint32), row.to(tl.uint32), block.to(tl.uint32), site.to(tl.uint32)
    for _ in tl.static_range(10):
        # Wide products: on sm_80 and sm_90 fewer multiplications than the low and high ones of tl.philox.
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, p1.to(tl.uint32)
        c2, c3 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1, p0.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def held_like(index, data):
    """`index` unchanged, to be held by the threads that hold `data`, whose shape it broadcasts to.

    Triton lays out what it computes from nothing by a default, and would move every mask between threads through shared
    memory to meet the data. Adding a zero made of the data's own bits gives the draw the data's layout; the zero is known
    to be one only after layouts are settled, and then costs nothing.
    """
    if data.dtype.primitive_bitwidth == 16:
        zero = data.to(tl.uint16, bitcast=True).to(tl.uint32) >> 16
    else:
        zero = (data.to(tl.uint32, bitcast=True).to(tl.uint64) >> 32).to(tl.uint32)
    return index.to(tl.uint32) + zero


@triton.jit
def kept(words, lane: tl.constexpr, threshold):
    """Which values are kept by 16-bit lane `lane` (0 to 7) of a draw. threshold: uint32 scalar."""
    word = words[lane // 2]
    return (word >> 16 if lane % 2 == 1 else word & 0xFFFF) >= threshold


@triton.jit(do_not_specialize=["seed", "site", "threshold", "rows"])
def _drop_kernel(
    x, y, row_key, row_index, step, seed: tl.uint32, site: tl.uint32, threshold: tl.uint32, scale, rows,
    WIDTH: tl.constexpr, EIGHTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    block = tl.arange(0, BLOCK)[None, :]
    live = row < rows
    start = row.to(tl.int64) * WIDTH
    values = load_slices(x + start, block, live, WIDTH, EIGHTH)
    item, place = tl.load(row_key + row, mask=live, other=0), tl.load(row_index + row, mask=live, other=0)
    words = draw(seed, tl.load(step), item, place, held_like(block, values[0]), site)
    for lane in tl.static_range(8):
        value = tl.where(kept(words, lane, threshold), values[lane].to(tl.float32) * scale, 0.0)
        store_slice(y + start, value, block, live, lane, WIDTH, EIGHTH)


# Launchers


NO_DROPOUT: dict[str, object] = dict.fromkeys(("row_key", "row_index", "step"))
"""Arguments that are None, and so constants of the compiled kernel, where nothing is dropped."""


def triton_arguments(dropout: Dropout, row_key: Tensor, row_index: Tensor) -> dict[str, Any]:
    """What a Triton launch is told about its dropout, by the names that all kernels use. The step stands in device memory."""
    d, keys = dropout, {"row_key": row_key, "row_index": row_index}
    step = d.step if isinstance(d.step, Tensor) else _on_device(d.step, row_key.device)
    return {**keys, "step": step, "seed": d.seed, "site": d.site, "threshold": d.threshold, "scale": d.scale}


def native_arguments(dropout: Dropout, row_key: Tensor, row_index: Tensor) -> tuple[int | None, ...]:
    """What a call of the native library is told: row_key, row_index, seed, step, site, threshold."""
    d = dropout
    return row_key.data_ptr(), row_index.data_ptr(), d.seed, int(d.step), d.site, d.threshold


def triton_row_arguments(dropout: Dropout | None, rows: Rows) -> dict[str, Any]:
    """The same for packed rows, or for no dropout."""
    if dropout is None:
        return {**NO_DROPOUT, "seed": 0, "site": 0, "threshold": 0, "scale": 1.0}
    return triton_arguments(dropout, rows.row_key, rows.row_index)


def native_row_arguments(dropout: Dropout | None, rows: Rows) -> tuple[int | None, ...]:
    """The same for packed rows, or for no dropout."""
    return (None, None, 0, 0, 0, 0) if dropout is None else native_arguments(dropout, rows.row_key, rows.row_index)


def _on_device(step: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a captured graph would repeat the masks of step {step}: give Dropout its step as a tensor")
    return _filled(step, device)


@lru_cache(maxsize=2)
def _filled(step: int, device: torch.device) -> Tensor:
    """int64 [1]. All dropouts of a step share it, so a step pays for one fill, and for no copy from the host."""
    return torch.full((1,), step, dtype=torch.int64, device=device)


def _drop_triton(x: Tensor, dropout: Dropout, row_key: Tensor, row_index: Tensor) -> Tensor:
    y = torch.empty_like(x)
    rows, width = x.shape
    layout = RowLayout.of(width)
    if rows:
        _drop_kernel[(triton.cdiv(rows, layout.rows),)](
            x, y, rows=rows, **triton_arguments(dropout, row_key, row_index), **layout.constexprs, num_warps=WARPS
        )  # fmt: skip
    return y


def _drop_native(x: Tensor, dropout: Dropout, row_key: Tensor, row_index: Tensor) -> Tensor:
    y = torch.empty_like(x)
    place = native_arguments(dropout, row_key, row_index)
    library().stopgo_dropout(dtype_code(x), *x.shape, x.data_ptr(), *place, y.data_ptr())
    return y


_DROP = {"triton": _drop_triton, "native": _drop_native}


class _Drop(torch.autograd.Function):
    """The backward is the same call on the gradient: the mask is drawn again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout, row_key: Tensor, row_index: Tensor, backend: str) -> Tensor:
        ctx.dropout, ctx.backend = dropout, backend
        ctx.save_for_backward(row_key, row_index)
        return _DROP[backend](x, dropout, row_key, row_index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        return _DROP[ctx.backend](dy.contiguous(), ctx.dropout, *ctx.saved_tensors), None, None, None, None


def drop(x: Tensor, dropout: Dropout | None, row_key: Tensor, row_index: Tensor) -> Tensor:
    """Element-wise dropout of x [rows, width]; the identity for None. `row_key`, `row_index`: int64 [rows]."""
    if dropout is None:
        return x
    if x.dim() != 2 or not len(x) == row_key.numel() == row_index.numel():
        raise ValueError(f"x {tuple(x.shape)} does not have a row for each of {row_key.numel()} keys")
    backend = choose("dropout", x)
    if backend == "torch":
        return drop_torch(x, dropout, row_key, row_index)
    dropped: Tensor = _Drop.apply(x.contiguous(), dropout, row_key.contiguous(), row_index.contiguous(), backend)
    return dropped


def keep_mask(dropout: Dropout, row_key: Tensor, row_index: Tensor, width: int, tile: int | None = None) -> Tensor:
    """uint8 [rows, width], 1 = kept. `row_key`, `row_index`: int64 [rows]. Native where `drop` is, else plain torch."""
    tile = tile or row_tile(width)
    if choose("dropout", row_key) != "native":
        return keep_mask_torch(dropout, row_key, row_index, width, tile)
    d, row_key, row_index = dropout, row_key.contiguous(), row_index.contiguous()
    out = torch.empty(row_key.numel(), width, dtype=torch.uint8)
    places = (row_key.data_ptr(), row_index.data_ptr(), *out.shape, tile, out.data_ptr())
    library().stopgo_keep_mask(d.seed, int(d.step), d.site, d.threshold, *places)
    return out


# The plain references


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
    key: tuple[int | Tensor, int | Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]
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


def drop_torch(x: Tensor, dropout: Dropout, row_key: Tensor, row_index: Tensor) -> Tensor:
    """The plain reference of `drop`."""
    keep = keep_mask(dropout, row_key, row_index, x.shape[-1])
    return (x.float() * (keep * dropout.scale)).to(x.dtype)  # in bfloat16 the scale itself would be rounded


def variants() -> list[Variant]:
    """Every kernel that a run can launch here."""
    return [
        variant_of("dropout", f"{width} wide", _drop_kernel, dtype, RowLayout.of(width).constexprs, WARPS)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for width in (768, 1024, 2048)
    ]
