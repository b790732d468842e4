"""What the losses of masked rows share: rows projected to many classes, each compared with a target, in bounded memory.

    loss = (1 / m) Σ_r Σ_c t_rc (log t_rc − log softmax(h_r W ᵀ + b)_c)

The target is a distribution [m, C] (masked regions), or a label [m], which is the distribution that has all its mass on one
class (masked words: the divergence is then the cross-entropy). With top_r = max_c z_rc and mass_r = Σ_c t_rc,

    loss_r = Σ_c t (log t − (z − top)) + mass · log Σ_c exp(z − top),        dz = mass · softmax(z) − t

so logits are never stored, and what has their size is made for a chunk of rows at a time:

- Triton: a program computes one tile of logits and leaves four numbers a row of it; a second kernel puts those together in
  order, and adds Σ t log t, which needs no logits. Backward computes the tiles again, writes dz for a chunk of rows, and
  leaves the rest to two plain products.
- Native: logits of a chunk of rows are overwritten by their dz, which goes into the gradients at once, in forward: no product
  is done twice. Backward scales them. A second backward through the same graph makes them again.

Both give the same bits every time: sums over rows and classes have a fixed order, and there are no atomics.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose
from kernels.native_library import dtype_code, library, pointer
from kernels.projection import weight_gradient
from kernels.variants import Variant


class MaskedRows(NamedTuple):
    """hidden [m, width], or [n, width] with `rows`; weight [classes, width]; bias [classes]; target [m, classes] or
    int64 [m]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    rows: Tensor | None

    @property
    def n_masked(self) -> int:
        """m."""
        return self.target.shape[0]

    def part(self, chunk: slice) -> MaskedRows:
        """The same for some of the masked rows; views only."""
        if self.rows is None:
            return self._replace(hidden=self.hidden[chunk], target=self.target[chunk])
        return self._replace(rows=self.rows[chunk], target=self.target[chunk])

    def gathered(self) -> Tensor:
        """hidden of the masked rows alone."""
        return self.hidden if self.rows is None else self.hidden.index_select(0, self.rows)


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, count)) for first in range(0, count, size))


# Triton


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


@triton.jit(do_not_specialize=["n_rows", "classes"])
def _reduce_tiles(
    hidden, rows, weight, bias, target, partials, n_rows, classes, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """partials float32 [4, class tiles, n_rows]: of each row in each tile top, Σ exp(z − top), Σ t (z − top), Σ t."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    z = _logits(hidden, rows, weight, bias, row, column, n_rows, classes, width, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_WIDTH)
    # Classes outside repeat the last one, so they do not change the largest.
    top = tl.max(z, 1)
    z -= top[:, None]
    total = tl.sum(tl.where((column < classes)[None, :], tl.exp(z), 0.0), 1)
    if target.dtype.element_ty.is_int():
        label = tl.load(target + row, row < n_rows, -1).to(tl.int32)
        hit = tl.sum(tl.where(label[:, None] == column[None, :], z, 0.0), 1)
        mass = (label // BLOCK_CLASSES == tl.program_id(1)).to(tl.float32)
    else:
        t = _target(target, row, column, n_rows, classes)
        hit = tl.sum(t * z, 1)
        mass = tl.sum(t, 1)

    plane = tl.num_programs(1).to(tl.int64) * n_rows
    partials += tl.program_id(1).to(tl.int64) * n_rows + row
    inside = row < n_rows
    tl.store(partials, top, inside)
    tl.store(partials + plane, total, inside)
    tl.store(partials + 2 * plane, hit, inside)
    tl.store(partials + 3 * plane, mass, inside)


@triton.jit(do_not_specialize=["n_rows", "classes", "tiles"])
def _combine_tiles(
    partials, target, loss, lse, mass, n_rows, classes, tiles,
    BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr, BLOCK_CLASSES: tl.constexpr,
):  # fmt: skip
    """loss, lse, mass: float32 [n_rows], from the partials of all tiles and Σ t log t."""
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
    cost = whole * tl.log(total) - hit
    if not target.dtype.element_ty.is_int():
        for start in range(0, classes, BLOCK_CLASSES):
            t = _target(target, row, start + tl.arange(0, BLOCK_CLASSES), n_rows, classes)
            cost += tl.sum(t * tl.log(tl.where(t > 0, t, 1.0)), 1)
    tl.store(loss + row, cost, row < n_rows)
    tl.store(lse + row, top + tl.log(total), row < n_rows)
    tl.store(mass + row, whole, row < n_rows)


@triton.jit(do_not_specialize=["scale", "n_rows", "classes"])
def _gradient_tiles(
    hidden, rows, weight, bias, target, lse, mass, dloss, scale, dlogits, stride, dbias, n_rows, classes, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_CLASSES: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """dlogits [n_rows, stride], times dloss * scale, 0 from `classes` on; dbias float32 [row tiles, classes]: column sums."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    z = _logits(hidden, rows, weight, bias, row, column, n_rows, classes, width, BLOCK_ROWS, BLOCK_CLASSES, BLOCK_WIDTH)
    t = _target(target, row, column, n_rows, classes)
    inside = (row < n_rows)[:, None] & (column < classes)[None, :]
    row_lse = tl.load(lse + row, row < n_rows, 0.0)
    row_mass = tl.load(mass + row, row < n_rows, 0.0)
    dz = (row_mass[:, None] * tl.exp(z - row_lse[:, None]) - t) * (tl.load(dloss) * scale)
    dz = tl.where(inside, dz, 0.0)
    at = row.to(tl.int64)[:, None] * stride + column[None, :]
    # Zeros up to the aligned end of the row keep the stores wide.
    tl.store(dlogits + at, dz.to(dlogits.dtype.element_ty), (row < n_rows)[:, None] & (column < stride)[None, :])
    tl.store(dbias + tl.program_id(0) * classes + column, tl.sum(dz, 0), column < classes)


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
_TILES = {torch.float32: _Tiles(64, 64, 32, warps=4, stages=3), torch.bfloat16: _HALF, torch.float16: _HALF}
_DLOGITS_BYTES = 2**26
"""Most memory that dlogits take in the Triton backward: some 20,000 rows of regions, 1,000 of words."""


def _combined(tiles: int) -> dict[str, int]:
    """Shape of a program that puts `tiles` tiles together: all of them, and as many rows as registers hold."""
    block = triton.next_power_of_2(tiles)
    rows = min(max(2048 // block, 1), 16)
    return {"BLOCK_ROWS": rows, "BLOCK_TILES": block, "BLOCK_CLASSES": 2048 // rows}


class _Triton(torch.autograd.Function):
    """Logits are computed in forward, and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None, _: bool
    ) -> Tensor:
        loss, lse, mass = _triton_forward(MaskedRows(hidden, weight, bias, target, rows))
        ctx.save_for_backward(hidden, weight, bias, target, rows, lse, mass)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lse, mass = ctx.saved_tensors
        x = MaskedRows(*inputs)
        gradients = _triton_backward(x, lse, mass, dloss)
        return (*gradients.finished(x, ctx.needs_input_grad), None, None, None)


def _triton_forward(x: MaskedRows) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse [m], mass [m]), float32."""
    m, (classes, width) = x.n_masked, x.weight.shape
    loss, lse, mass = (x.hidden.new_empty(m, dtype=torch.float32) for _ in range(3))
    if m > 0:
        blocks = _TILES[x.hidden.dtype]
        tiles = triton.cdiv(classes, blocks.classes)
        partials = x.hidden.new_empty((4, tiles, m), dtype=torch.float32)
        _reduce_tiles[(triton.cdiv(m, blocks.rows), tiles)](
            x.hidden, x.rows, x.weight, x.bias, x.target, partials, m, classes, width,
            **blocks.constexprs, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        combined = _combined(tiles)
        _combine_tiles[(triton.cdiv(m, combined["BLOCK_ROWS"]),)](
            partials, x.target, loss, lse, mass, m, classes, tiles, **combined, num_warps=4, num_stages=1
        )
    return loss.sum() / max(m, 1), lse, mass


def _triton_backward(x: MaskedRows, lse: Tensor, mass: Tensor, dloss: Tensor) -> _Gradients:
    m, (classes, width) = x.n_masked, x.weight.shape
    blocks = _TILES[x.hidden.dtype]
    stride = triton.cdiv(classes, 64) * 64  # so that the products read aligned rows
    size = max(_DLOGITS_BYTES // (stride * x.hidden.element_size() * blocks.rows), 1) * blocks.rows
    memory = x.hidden.new_empty((min(size, m), stride))
    gradients = _Gradients(x, size)
    for chunk in _chunks(m, size):
        part = x.part(chunk)
        dlogits = memory[: part.n_masked, :classes]
        grid = (triton.cdiv(part.n_masked, blocks.rows), triton.cdiv(classes, blocks.classes))
        dbias = x.hidden.new_empty((grid[0], classes), dtype=torch.float32)
        _gradient_tiles[grid](
            part.hidden, part.rows, x.weight, x.bias, part.target, lse[chunk], mass[chunk], dloss, 1 / m,
            dlogits, stride, dbias, part.n_masked, classes, width,
            **blocks.constexprs, num_warps=blocks.warps, num_stages=blocks.stages,
        )  # fmt: skip
        gradients.bias += dbias.sum(0)
        gradients.add_products(chunk, part.gathered(), dlogits, x.weight)
    return gradients


# Native

_ROW_BYTES = 1024
"""Bytes that one column of a chunk of logits takes: 256 rows of float32, 512 of bfloat16. Fewer save memory, but the weight's
gradient is read and written once a chunk."""


class _Native(torch.autograd.Function):
    """Gradients are made in forward, where logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None, recording: bool
    ) -> Tensor:
        x = MaskedRows(hidden, weight, bias, target, rows)
        ctx.save_for_backward(*x)
        ctx.gradients = _Gradients(x, _native_rows(x)) if recording and any(ctx.needs_input_grad) else None
        return _native_pass(x, ctx.gradients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x = MaskedRows(*ctx.saved_tensors)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # an earlier backward through this graph has used them up
            gradients = _Gradients(x, _native_rows(x))
            _native_pass(x, gradients)
        return (*gradients.finished(x, ctx.needs_input_grad, dloss / max(x.n_masked, 1)), None, None, None)


def _native_rows(x: MaskedRows) -> int:
    return _ROW_BYTES // x.hidden.element_size()


def _native_pass(x: MaskedRows, gradients: _Gradients | None) -> Tensor:
    """The loss; adds the gradients of m * loss where they are wanted."""
    losses = torch.empty(x.n_masked)
    size = _native_rows(x)
    memory = x.hidden.new_empty((min(size, x.n_masked), len(x.weight)))
    for chunk in _chunks(x.n_masked, size):
        part = x.part(chunk)
        hidden = part.gathered()
        logits = torch.mm(hidden, x.weight.t(), out=memory[: part.n_masked])
        _compare(logits, part, losses[chunk], gradients)
        if gradients is not None:
            gradients.add_products(chunk, hidden, logits, x.weight)
    return (losses.sum(dtype=torch.float64) / max(x.n_masked, 1)).float()


def _compare(logits: Tensor, x: MaskedRows, losses: Tensor, gradients: _Gradients | None) -> None:
    """losses [rows] of logits without bias. With gradients, logits become dlogits, whose column sums go to the bias."""
    arguments = [dtype_code(logits), *logits.shape, pointer(logits), pointer(x.bias)]
    outputs = [gradients is not None, pointer(losses), pointer(gradients.bias if gradients else None)]
    if x.target.dtype is torch.int64:
        library().stopgo_cross_entropy_rows(*arguments, pointer(x.target), 1.0, *outputs)
    else:
        library().stopgo_divergence_rows(*arguments, dtype_code(x.target), pointer(x.target), 1.0, *outputs)


# Both


class _Gradients:
    """The gradients of hidden, weight and bias, while chunks of at most `size` rows are added to them."""

    def __init__(self, x: MaskedRows, size: int) -> None:
        self._hidden = x.hidden.new_empty((x.n_masked, x.hidden.shape[1]))
        # A sum over several chunks is kept in float32.
        summed = torch.float32 if x.n_masked > size else x.weight.dtype
        self._weight = (torch.empty_like if x.n_masked else torch.zeros_like)(x.weight, dtype=summed)
        self.bias = torch.zeros_like(x.bias, dtype=torch.float32)

    def add_products(self, chunk: slice, hidden: Tensor, dlogits: Tensor, weight: Tensor) -> None:
        """dlogits W and dlogitsᵀ h of a chunk of rows; the first chunk comes first."""
        torch.mm(dlogits, weight, out=self._hidden[chunk])
        first = chunk.start == 0
        if first and self._weight.dtype is hidden.dtype:
            weight_gradient(dlogits, hidden, self._weight)
        elif self._weight.dtype is hidden.dtype:
            self._weight.addmm_(dlogits.t(), hidden)
        else:
            for classes in _chunks(len(weight), _ADDED_CLASSES if weight.device.type == "cpu" else len(weight)):
                product = torch.empty_like(weight[classes])
                weight_gradient(dlogits[:, classes], hidden, product)
                (self._weight[classes].copy_ if first else self._weight[classes].add_)(product)

    def finished(
        self, x: MaskedRows, needed: Sequence[bool], factor: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Those of (hidden, weight, bias) that are needed, times a scalar, in their dtypes. Uses them up."""
        hidden = _scaled(self._hidden, factor, x.hidden.dtype) if needed[0] else None
        if hidden is not None and x.rows is not None:
            hidden = torch.zeros_like(x.hidden).index_copy_(0, x.rows, hidden)
        weight = _scaled(self._weight, factor, x.weight.dtype) if needed[1] else None
        bias = _scaled(self.bias, factor, x.bias.dtype) if needed[2] else None
        return hidden, weight, bias


_ADDED_CLASSES = 256
"""On a CPU, products that are added to a float32 sum come in parts of so many classes: they take little memory, and stay in the
cache. On a GPU more launches would cost more than they save."""


def _scaled(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * factor in another dtype; in place where it can be."""
    return (x if factor is None else x.mul_(factor)).to(dtype)


_FUNCTIONS = {"triton": _Triton, "native": _Native}


def masked_rows_loss(
    op: str,
    reference: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    rows: Tensor | None,
) -> Tensor:
    """The loss under the backend that `op` uses; `reference` is its plain torch one, of gathered rows. ValueError or
    IndexError for inputs that do not fit each other."""
    _check(hidden, weight, bias, target, rows)
    backend = choose(op, hidden)
    if backend == "torch":
        return reference(hidden if rows is None else hidden.index_select(0, rows), weight, bias, target)
    inputs = [x if x is None else x.contiguous() for x in (hidden, weight, bias, target, rows)]
    loss: Tensor = _FUNCTIONS[backend].apply(*inputs, torch.is_grad_enabled())
    return loss


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor | None) -> None:
    """The kernels read through bare pointers: what does not fit must not reach them."""
    classes, width = weight.shape
    m = len(hidden) if rows is None else len(rows)
    labels = target.dtype is torch.int64
    if hidden.shape[1:] != (width,) or bias.shape != (classes,) or target.shape != ((m,) if labels else (m, classes)):
        shapes = [tuple(x.shape) for x in (hidden, weight, bias, target)]
        raise ValueError(f"hidden, weight, bias and target do not fit each other: {shapes}, {m} masked rows")
    if not hidden.dtype == weight.dtype == bias.dtype:
        raise ValueError(f"one dtype for hidden, weight and bias, not {hidden.dtype}, {weight.dtype}, {bias.dtype}")
    if not labels and target.dtype not in _TILES:
        raise ValueError(f"a target of {target.dtype} is neither a distribution nor labels (int64)")
    if rows is not None and rows.dtype is not torch.int64:
        raise ValueError(f"rows are int64, not {rows.dtype}")
    if labels and m and target.device.type == "cpu" and not 0 <= int(target.min()) <= int(target.max()) < classes:
        raise IndexError(f"a label lies outside of the {classes} classes")


_TRITON_NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def variants_of(op: str, classes: int, targets: Mapping[torch.dtype, Sequence[str]]) -> list[Variant]:
    """Every kernel that `op` can launch. `targets`: Triton's names of the target's type, by dtype of hidden."""
    found = []
    for dtype, types in targets.items():
        for target in types:
            found.append(_combining(op, classes, dtype, target))
            found += [*_products(op, dtype, target, gathered=False), *_products(op, dtype, target, gathered=True)]
    return found


def _products(op: str, dtype: torch.dtype, target: str, gathered: bool) -> Iterator[Variant]:
    blocks, own = _TILES[dtype], _TRITON_NAMES[dtype]
    inputs = {"hidden": own, "rows": "*i64" if gathered else "constexpr", "weight": own, "bias": own, "target": target}
    sizes = {"n_rows": "i32", "classes": "i32", "width": "i32:16", **dict.fromkeys(blocks.constexprs, "constexpr")}
    saved = {"lse": "*fp32", "mass": "*fp32", "dloss": "*fp32", "scale": "fp32"}
    for name, kernel, arguments in (
        ("forward", _reduce_tiles, {"partials": "*fp32"}),
        ("backward", _gradient_tiles, {**saved, "dlogits": own, "stride": "i32:16", "dbias": "*fp32"}),
    ):
        yield Variant(
            op=op,
            name=f"{name}, {target.strip('*')} target{', gathers' if gathered else ''}",
            kernel=kernel,
            signature={**inputs, **arguments, **sizes},
            constexprs={**blocks.constexprs, **({} if gathered else {"rows": None})},
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            dtype=str(dtype).removeprefix("torch."),
            dot=dtype is not torch.float32,
            copies=True,
        )


def _combining(op: str, classes: int, dtype: torch.dtype, target: str) -> Variant:
    combined = _combined(triton.cdiv(classes, _TILES[dtype].classes))
    return Variant(
        op=op,
        name=f"forward, {target.strip('*')} target, tiles put together",
        kernel=_combine_tiles,
        signature={
            "partials": "*fp32",
            "target": target,
            **dict.fromkeys(("loss", "lse", "mass"), "*fp32"),
            **dict.fromkeys(("n_rows", "classes", "tiles"), "i32"),
            **dict.fromkeys(combined, "constexpr"),
        },
        constexprs={**combined},
        num_warps=4,
        num_stages=1,
        dtype=str(dtype).removeprefix("torch."),
        dot=False,
        copies=False,
    )
