"""The Triton kernels of both masked losses, and what launches them; `masked_rows.py` has the formulas, and puts them together.

- `_reduce_tiles`: one tile of logits, of which four numbers a row are left; `_combine_tiles` puts those together in order.
- `_gradient_tiles`: the tile again, and dz of it. `_kept_gradients`: dz from logits that forward has kept.
- `_scatter_rows`: the gradient of all rows from that of the masked ones.

A kept logit is its distance to the largest of its row and tile, in the dtype of hidden: rounded most where exp makes least of
it, and no more where all logits are large. The largest are kept too, in float32.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.variants import Variant

if TYPE_CHECKING:
    from triton.runtime.jit import JITFunction

    from kernels.masked_rows import MaskedRows


@triton.jit
def _logits(
    hidden, rows, weight, bias, row, column, n_rows, classes, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_ROWS, BLOCK_CLASSES]: one tile of h Wᵀ + b. What lies outside repeats the last row or class."""
    row = tl.minimum(row, n_rows - 1)
    column = tl.minimum(column, classes - 1)
    source = row if rows is None else tl.load(rows + row)
    inner = tl.arange(0, BLOCK_WIDTH)
    hidden += source.to(tl.int64)[:, None] * width + inner[None, :]
    weight += column.to(tl.int64)[:, None] * width + inner[None, :]
    z = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    for start in range(0, width, BLOCK_WIDTH):
        inside = (inner < width - start)[None, :]
        h = tl.load(hidden + start, inside, 0.0)
        w = tl.load(weight + start, inside, 0.0)
        z = tl.dot(h, tl.trans(w), z, input_precision="ieee")
    return z + tl.load(bias + column).to(tl.float32)[None, :]


@triton.jit
def _target(target, row, column, n_rows, classes):
    """float32 tile of the target: 0 outside, and a label as its one-hot row."""
    if target.dtype.element_ty.is_int():
        label = tl.load(target + row, row < n_rows, -1).to(tl.int32)
        return (label[:, None] == column[None, :]).to(tl.float32)
    else:
        inside = (row < n_rows)[:, None] & (column < classes)[None, :]
        return tl.load(target + row.to(tl.int64)[:, None] * classes + column[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _sums_of_target(target, row, n_rows, classes, BLOCK_CLASSES: tl.constexpr, STEP: tl.constexpr):
    """Of each row of a tile of a distribution: Σ t, Σ t log t. A part of the tile at a time: whole, it would need more
    registers than the logits leave."""
    mass = tl.zeros_like(row).to(tl.float32)
    entropy = mass
    for start in range(0, BLOCK_CLASSES, STEP):
        t = _target(target, row, tl.program_id(1) * BLOCK_CLASSES + start + tl.arange(0, STEP), n_rows, classes)
        mass += tl.sum(t, 1)
        entropy += tl.sum(t * tl.log(tl.where(t > 0, t, 1.0)), 1)
    return mass, entropy


@triton.jit(do_not_specialize=["n_rows", "classes"])
def _reduce_tiles(
    hidden, rows, weight, bias, target, partials, logits, gathered, n_rows, classes, width, stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """partials float32 [4, class tiles, n_rows]: of each row in each tile top, Σ exp(z − top), Σ t (z − top − log t), Σ t.
    Where they are wanted: logits [n_rows, stride], z − top; and gathered [n_rows, width], hidden's `rows`."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    z = _logits(hidden, rows, weight, bias, row, column, n_rows, classes, width, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_WIDTH)
    # Classes outside repeat the last one, so they do not change the largest.
    top = tl.max(z, 1)
    z -= top[:, None]
    if logits is not None:
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        # Up to the aligned end of the row, beyond the classes, so that the stores are wide.
        tl.store(logits + at, z.to(logits.dtype.element_ty), (row < n_rows)[:, None] & (column < stride)[None, :])
    total = tl.sum(tl.where((column < classes)[None, :], tl.exp(z), 0.0), 1)
    if target.dtype.element_ty.is_int():
        label = tl.load(target + row, row < n_rows, -1).to(tl.int32)
        hit = tl.sum(tl.where(label[:, None] == column[None, :], z, 0.0), 1)
        mass = (label // BLOCK_CLASSES == tl.program_id(1)).to(tl.float32)
    else:
        hit = tl.sum(_target(target, row, column, n_rows, classes) * z, 1)
        mass, entropy = _sums_of_target(target, row, n_rows, classes, BLOCK_CLASSES, BLOCK_WIDTH)
        hit -= entropy

    plane = tl.num_programs(1).to(tl.int64) * n_rows
    partials += tl.program_id(1).to(tl.int64) * n_rows + row
    inside = row < n_rows
    tl.store(partials, top, inside)
    tl.store(partials + plane, total, inside)
    tl.store(partials + 2 * plane, hit, inside)
    tl.store(partials + 3 * plane, mass, inside)
    if gathered is not None:
        _gather(hidden, rows, gathered, row, n_rows, width, BLOCK_WIDTH)


@triton.jit
def _gather(hidden, rows, gathered, row, n_rows, width, BLOCK_WIDTH: tl.constexpr):
    """The class tiles of the same rows share the work: each copies some of the columns, which the product has just read."""
    inside = row < n_rows
    source = tl.load(rows + row, inside, 0)
    for start in range(tl.program_id(1) * BLOCK_WIDTH, width, tl.num_programs(1) * BLOCK_WIDTH):
        inner = start + tl.arange(0, BLOCK_WIDTH)
        mask = inside[:, None] & (inner < width)[None, :]
        value = tl.load(hidden + source[:, None] * width + inner[None, :], mask)
        tl.store(gathered + row.to(tl.int64)[:, None] * width + inner[None, :], value, mask)


@triton.jit(do_not_specialize=["n_rows", "tiles"])
def _combine_tiles(
    partials, loss, largest, log_total, mass, n_rows, tiles, BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr
):  # fmt: skip
    """loss, largest = max z, log_total = log Σ exp(z − largest), mass: float32 [n_rows], from the partials of all tiles."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tile = tl.arange(0, BLOCK_TILES)
    plane = tiles.to(tl.int64) * n_rows
    partials += tile.to(tl.int64)[:, None] * n_rows + tl.minimum(row, n_rows - 1)[None, :]
    inside = (tile < tiles)[:, None]
    tops = tl.load(partials, inside, -float("inf"))
    top = tl.max(tops, 0)
    below = tl.where(inside, tops - top[None, :], 0.0)
    total = tl.sum(tl.load(partials + plane, inside, 0.0) * tl.exp(below), 0)
    masses = tl.load(partials + 3 * plane, inside, 0.0)
    hit = tl.sum(tl.load(partials + 2 * plane, inside, 0.0) + masses * below, 0)
    whole = tl.sum(masses, 0)
    tl.store(loss + row, whole * tl.log(total) - hit, row < n_rows)
    # Two numbers, not their sum: where logits are large, it would be rounded by more than the softmax can bear.
    tl.store(largest + row, top, row < n_rows)
    tl.store(log_total + row, tl.log(total), row < n_rows)
    tl.store(mass + row, whole, row < n_rows)


@triton.jit(do_not_specialize=["scale", "n_rows", "classes"])
def _gradient_tiles(
    hidden, rows, weight, bias, target, largest, log_total, mass, dloss, scale, dlogits, dbias, n_rows, classes, width, stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """dlogits [n_rows, stride], times dloss * scale, 0 from `classes` on; dbias float32 [row tiles, classes]: column sums."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    z = _logits(hidden, rows, weight, bias, row, column, n_rows, classes, width, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_WIDTH)
    t = _target(target, row, column, n_rows, classes)
    inside = (row < n_rows)[:, None] & (column < classes)[None, :]
    z -= tl.load(largest + row, row < n_rows, float("inf"))[:, None]
    z -= tl.load(log_total + row, row < n_rows, 0.0)[:, None]
    row_mass = tl.load(mass + row, row < n_rows, 0.0)
    dz = (row_mass[:, None] * tl.exp(z) - t) * (tl.load(dloss) * scale)
    dz = tl.where(inside, dz, 0.0)
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    # Zeros up to the aligned end of the row keep the stores wide.
    tl.store(dlogits + at, dz.to(dlogits.dtype.element_ty), (row < n_rows)[:, None] & (column < stride)[None, :])
    tl.store(dbias + tl.program_id(0) * classes + column, tl.sum(dz, 0), column < classes)


@triton.jit(do_not_specialize=["scale", "n_rows", "classes"])
def _kept_gradients(
    logits, tops, target, largest, log_total, mass, dloss, scale, dbias, n_rows, classes, stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """logits [n_rows, stride] as `_reduce_tiles` has kept them, with tops [class tiles, n_rows] of tiles of TILE classes,
    become dlogits as `_gradient_tiles` makes them. dbias float32 [classes]: column sums; a program has all rows."""
    column = tl.program_id(0) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    tops += (tl.program_id(0) * BLOCK_CLASSES // TILE).to(tl.int64) * n_rows
    factor = tl.load(dloss) * scale
    sums = tl.zeros((BLOCK_ROWS, BLOCK_CLASSES), tl.float32)
    for start in range(0, n_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < n_rows
        at = row.to(tl.int64)[:, None] * stride + column[None, :]
        stored = inside[:, None] & (column < stride)[None, :]
        z = tl.load(logits + at, stored, 0.0).to(tl.float32)
        t = _target(target, row, column, n_rows, classes)
        below = tl.load(tops + row, inside, 0.0) - tl.load(largest + row, inside, 0.0)
        below -= tl.load(log_total + row, inside, 0.0)
        row_mass = tl.load(mass + row, inside, 0.0)
        dz = (row_mass[:, None] * tl.exp(z + below[:, None]) - t) * factor
        dz = tl.where(inside[:, None] & (column < classes)[None, :], dz, 0.0)
        tl.store(logits + at, dz.to(logits.dtype.element_ty), stored)
        sums += dz
    tl.store(dbias + column, tl.sum(sums, 0), column < classes)


@triton.jit(do_not_specialize=["n_source", "n_rows"])
def _scatter_rows(
    source, rows, result, n_source, n_rows, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_SOURCE: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """result [n_rows, width]: row rows[i] is row i of source [n_source, width], the others are 0. Each is written once."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    found = tl.full((BLOCK_ROWS, BLOCK_SOURCE), -1, tl.int32)
    for start in range(0, n_source, BLOCK_SOURCE):
        i = start + tl.arange(0, BLOCK_SOURCE)
        of = tl.load(rows + i, i < n_source, -1)
        found = tl.where(row[:, None] == of[None, :], i[None, :], found)
    i = tl.max(found, 1)
    for start in range(0, width, BLOCK_WIDTH):
        inner = start + tl.arange(0, BLOCK_WIDTH)
        inside = (inner < width)[None, :]
        value = tl.load(source + i.to(tl.int64)[:, None] * width + inner[None, :], inside & (i >= 0)[:, None], 0.0)
        tl.store(result + row.to(tl.int64)[:, None] * width + inner[None, :], value, inside & (row < n_rows)[:, None])


class _Tiles(NamedTuple):
    """Shape of a program of the two kernels that hold a product."""

    rows: int
    classes: int
    width: int
    warps: int
    stages: int

    @property
    def constexprs(self) -> dict[str, object]:
        return {"BLOCK_ROWS": self.rows, "BLOCK_CLASSES": self.classes, "BLOCK_WIDTH": self.width}


_HALF = _Tiles(rows=128, classes=128, width=64, warps=8, stages=3)
TILES = {torch.float32: _Tiles(64, 64, 32, warps=4, stages=3), torch.bfloat16: _HALF, torch.float16: _HALF}
_KEPT_BLOCKS = {"BLOCK_ROWS": 64, "BLOCK_CLASSES": 32}
_SCATTER_BLOCKS = {"BLOCK_ROWS": 16, "BLOCK_SOURCE": 128, "BLOCK_WIDTH": 256}


def _combined(tiles: int) -> dict[str, int]:
    """Shape of a program that puts `tiles` tiles together: all of them, and as many rows as registers hold."""
    block = triton.next_power_of_2(tiles)
    return {"BLOCK_ROWS": min(max(2048 // block, 1), 16), "BLOCK_TILES": block}


def stride_of(classes: int) -> int:
    """Of rows of logits and their gradients: what the products read is aligned."""
    return triton.cdiv(classes, 64) * 64


class Kept(NamedTuple):
    """What forward has kept for backward: logits [m, stride], z − top of their tile; tops float32 [class tiles, m]; hidden [m,
    width], of the masked rows alone."""

    logits: Tensor
    tops: Tensor
    hidden: Tensor


class RowResults(NamedTuple):
    """Of each masked row, float32 [m]."""

    loss: Tensor
    largest: Tensor
    log_total: Tensor
    mass: Tensor

    def part(self, chunk: slice) -> RowResults:
        """The same for some of the rows; views only."""
        return RowResults(*(values[chunk] for values in self))


def row_results(x: MaskedRows, keep: bool) -> tuple[RowResults, Kept | None]:
    """The forward; what backward reads instead of the weight and hidden, if that is to be kept."""
    m, (classes, width), blocks = x.n_masked, x.weight.shape, TILES[x.hidden.dtype]
    results = RowResults(*(x.hidden.new_empty(m, dtype=torch.float32) for _ in RowResults._fields))
    if m == 0:
        return results, None
    tiles, stride = triton.cdiv(classes, blocks.classes), stride_of(classes)
    partials = x.hidden.new_empty((4, tiles, m), dtype=torch.float32)
    logits = x.hidden.new_empty((m, stride)) if keep else None
    gathered = x.hidden.new_empty((m, width)) if keep and x.rows is not None else None
    _reduce_tiles[(triton.cdiv(m, blocks.rows), tiles)](
        x.hidden, x.rows, x.weight, x.bias, x.target, partials, logits, gathered, m, classes, width, stride,
        **blocks.constexprs, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    combined = _combined(tiles)
    _combine_tiles[(triton.cdiv(m, combined["BLOCK_ROWS"]),)](
        partials, *results, m, tiles, **combined, num_warps=4, num_stages=1
    )
    if logits is None:
        return results, None
    return results, Kept(logits, partials[0], x.hidden if gathered is None else gathered)


def kept_gradients(
    target: Tensor, of_rows: RowResults, kept: Kept, dloss: Tensor, scale: float, dbias: Tensor
) -> Tensor:
    """dlogits [m, classes], times dloss * scale, rows a stride apart: the kept logits are overwritten. Their column sums go to
    dbias float32 [classes]."""
    m, stride = kept.logits.shape
    _kept_gradients[(triton.cdiv(stride, _KEPT_BLOCKS["BLOCK_CLASSES"]),)](
        kept.logits, kept.tops, target, *of_rows[1:], dloss, scale, dbias, m, len(dbias), stride,
        **_KEPT_BLOCKS, TILE=TILES[kept.logits.dtype].classes, num_warps=4, num_stages=2,
    )  # fmt: skip
    return kept.logits[:, : len(dbias)]


def logit_gradients(
    x: MaskedRows, of_rows: RowResults, dloss: Tensor, scale: float, dlogits: Tensor, dbias: Tensor
) -> None:
    """Writes dlogits [m, classes], times dloss * scale, rows a stride apart, and adds their column sums to dbias float32
    [classes]."""
    m, (classes, width), blocks = x.n_masked, x.weight.shape, TILES[x.hidden.dtype]
    stride = dlogits.stride(0)
    grid = (triton.cdiv(m, blocks.rows), triton.cdiv(classes, blocks.classes))
    sums = dbias.new_empty((grid[0], classes))
    _gradient_tiles[grid](
        x.hidden, x.rows, x.weight, x.bias, x.target, *of_rows[1:], dloss, scale, dlogits, sums, m, classes, width, stride,
        **blocks.constexprs, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    dbias += sums.sum(0)


def scattered(source: Tensor, rows: Tensor, n: int) -> Tensor:
    """[n, width]: row rows[i] is row i of source, the others are 0."""
    width = source.shape[1]
    result = source.new_empty((n, width))
    if n > 0:
        _scatter_rows[(triton.cdiv(n, _SCATTER_BLOCKS["BLOCK_ROWS"]),)](
            source, rows, result, len(rows), n, width, **_SCATTER_BLOCKS, num_warps=4, num_stages=1
        )
    return result


_TRITON_NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def variants_of(op: str, classes: int, targets: Mapping[torch.dtype, Sequence[str]]) -> list[Variant]:
    """Every kernel that `op` can launch. `targets`: Triton's names of the target's type, by dtype of hidden."""
    found = []
    for dtype, types in targets.items():
        found += [_combining(op, classes, dtype), _scattering(op, dtype)]
        for target in types:
            found.append(_from_kept(op, dtype, target))
            for gathers in (False, True):
                found += _products(op, dtype, target, gathers)
    return found


def _products(op: str, dtype: torch.dtype, target: str, gathers: bool) -> Iterator[Variant]:
    blocks, own = TILES[dtype], _TRITON_NAMES[dtype]
    inputs = {"hidden": own, "rows": "*i64" if gathers else "constexpr", "weight": own, "bias": own, "target": target}
    sizes = {"n_rows": "i32", "classes": "i32", "width": "i32:16", "stride": "i32:16"}
    nothing_kept = {"partials": "*fp32", "logits": "constexpr", "gathered": "constexpr"}
    kept = {"partials": "*fp32", "logits": own, "gathered": own if gathers else "constexpr"}
    of_rows = dict.fromkeys((*RowResults._fields[1:], "dloss"), "*fp32")
    made = {**of_rows, "scale": "fp32", "dlogits": own, "dbias": "*fp32"}
    for name, kernel, arguments in (
        ("forward", _reduce_tiles, nothing_kept),
        ("forward, keeps logits", _reduce_tiles, kept),
        ("backward", _gradient_tiles, made),
    ):
        types = {**inputs, **arguments, **sizes}
        yield Variant(
            op=op,
            name=f"{name}, {target.strip('*')} target{', gathers' if gathers else ''}",
            kernel=kernel,
            signature={**types, **dict.fromkeys(blocks.constexprs, "constexpr")},
            constexprs={**blocks.constexprs, **{name: None for name, type_ in types.items() if type_ == "constexpr"}},
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            dtype=str(dtype).removeprefix("torch."),
            dot=dtype is not torch.float32,
            copies=True,
        )


def _from_kept(op: str, dtype: torch.dtype, target: str) -> Variant:
    own = _TRITON_NAMES[dtype]
    types = {
        "logits": own,
        "tops": "*fp32",
        "target": target,
        **dict.fromkeys((*RowResults._fields[1:], "dloss"), "*fp32"),
        "scale": "fp32",
        "dbias": "*fp32",
        **dict.fromkeys(("n_rows", "classes"), "i32"),
        "stride": "i32:16",
    }
    blocks = {**_KEPT_BLOCKS, "TILE": TILES[dtype].classes}
    return _without_product(
        op, f"backward, {target.strip('*')} target, from kept logits", _kept_gradients, types, blocks, 2, dtype
    )


def _combining(op: str, classes: int, dtype: torch.dtype) -> Variant:
    types = {**dict.fromkeys(("partials", *RowResults._fields), "*fp32"), **dict.fromkeys(("n_rows", "tiles"), "i32")}
    blocks = _combined(triton.cdiv(classes, TILES[dtype].classes))
    return _without_product(op, "forward, tiles put together", _combine_tiles, types, blocks, 1, dtype)


def _scattering(op: str, dtype: torch.dtype) -> Variant:
    own = _TRITON_NAMES[dtype]
    types = {"source": own, "rows": "*i64", "result": own, "n_source": "i32", "n_rows": "i32", "width": "i32:16"}
    return _without_product(op, "backward, gradients of all rows", _scatter_rows, types, _SCATTER_BLOCKS, 1, dtype)


def _without_product(
    op: str, name: str, kernel: JITFunction[Any], types: dict[str, str], blocks: Mapping[str, int], stages: int,
    dtype: torch.dtype,
) -> Variant:  # fmt: skip
    return Variant(
        op=op,
        name=name,
        kernel=kernel,
        signature={**types, **dict.fromkeys(blocks, "constexpr")},
        constexprs={**blocks},
        num_warps=4,
        num_stages=stages,
        dtype=str(dtype).removeprefix("torch."),
        dot=False,
        copies=False,
    )
