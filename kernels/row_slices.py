"""What the row-wise Triton kernels share: how a program holds rows, and how column sums come about without atomics.

A row is held as eight slices of columns, [ROWS, BLOCK] each, slice i being columns i * EIGHTH to (i + 1) * EIGHTH of the
row: those that use 16-bit lane i of a dropout draw (`kernels/dropout.py`), so one draw serves eight values and none has to
move between threads. BLOCK is EIGHTH rounded up to a power of two. Two warps share a row of 1024 columns: with one, the
column sums of backward do not fit into its registers.

Column sums (gradients of biases and norms) are made in two steps: each program sums the rows of its chunk, in float32,
and `fold_kernel` adds up the chunks in order. The chunks follow from the number of rows alone, so bits do not depend on
the device.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.variants import Variant

WARPS = 8
MOST_ROWS = 16
"""Held at a time by one program; every chunk of rows is a multiple of it."""
_PROGRAMS = 128
"""About as many as large GPUs have multiprocessors: so many chunks keep all of them busy in a backward."""
FOLDED_COLUMNS, FOLDED_CHUNKS = 32, 32
"""Of one step of `fold_kernel`."""


@triton.jit
def inside(block, lane: tl.constexpr, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """Which columns of a slice exist. block: 0 to BLOCK, as [1, BLOCK]."""
    there = block < EIGHTH
    if WIDTH < 8 * EIGHTH:
        there &= lane * EIGHTH + block < WIDTH
    return there


@triton.jit
def appended(slices, value):
    """One slice more."""
    return slices + (value,)  # noqa: RUF005


@triton.jit
def load_slices(x, block, live, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """The eight slices in x's dtype, zeros outside. x: pointers to where the rows start; live: which rows exist."""
    slices = ()
    for lane in tl.static_range(8):
        there = live & inside(block, lane, WIDTH, EIGHTH)
        slices = appended(slices, tl.load(x + lane * EIGHTH + block, mask=there, other=0.0))
    return slices


@triton.jit
def widened(a):
    """float32 slices."""
    slices = ()
    for lane in tl.static_range(8):
        slices = appended(slices, a[lane].to(tl.float32))
    return slices


@triton.jit
def store_slice(y, value, block, live, lane: tl.constexpr, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """Slice `lane` of rows that start at y, rounded to y's dtype."""
    there = live & inside(block, lane, WIDTH, EIGHTH)
    tl.store(y + lane * EIGHTH + block, value.to(y.dtype.element_ty), mask=there)


@triton.jit
def zero_slices(ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Eight slices of float32 zeros: where column sums start."""
    zeros = tl.zeros((ROWS, BLOCK), tl.float32)
    return zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros


@triton.jit
def plus(a, b):
    """a + b, slice by slice."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    b0, b1, b2, b3, b4, b5, b6, b7 = b
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def times(a, x):
    """Every slice of a times x, which has a value for each row."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    return a0 * x, a1 * x, a2 * x, a3 * x, a4 * x, a5 * x, a6 * x, a7 * x


@triton.jit
def products(a, b):
    """a * b, slice by slice."""
    a0, a1, a2, a3, a4, a5, a6, a7 = a
    b0, b1, b2, b3, b4, b5, b6, b7 = b
    return a0 * b0, a1 * b1, a2 * b2, a3 * b3, a4 * b4, a5 * b5, a6 * b6, a7 * b7


@triton.jit
def store_column_sums(partial, slices, BLOCK: tl.constexpr, WIDTH: tl.constexpr, EIGHTH: tl.constexpr):
    """Sums over the rows of eight slices [ROWS, BLOCK], into float32 [WIDTH] at `partial`."""
    # Joined into one tensor, so that warps meet once and not eight times; its last axis counts slices with their bits reversed.
    s = slices
    pairs = tl.join(tl.join(s[0], s[1]), tl.join(s[2], s[3])), tl.join(tl.join(s[4], s[5]), tl.join(s[6], s[7]))
    sums = tl.reshape(tl.sum(tl.join(pairs[0], pairs[1]), 0), (BLOCK, 8))
    block = tl.arange(0, BLOCK)[:, None]
    place = tl.arange(0, 8)[None, :]
    lane = (place & 1) * 4 + (place & 2) + place // 4
    column = lane * EIGHTH + block
    tl.store(partial + column, sums, mask=(block < EIGHTH) & (column < WIDTH))


@triton.jit(do_not_specialize=["chunks"])
def fold_kernel(
    partial, first, second, third, matrix, chunks,
    WIDTH: tl.constexpr, VECTORS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Sums partial float32 [chunks, VECTORS, WIDTH] over chunks, in order: vectors 0 to 2 into first, second and third [WIDTH],
    vector 3 + i into column i of matrix [WIDTH, VECTORS - 3]. What there is no vector for is None.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    vector = tl.program_id(1)
    exists = column < WIDTH
    chunk = tl.arange(0, CHUNKS)
    at = partial + (chunk.to(tl.int64)[:, None] * VECTORS + vector) * WIDTH + column[None, :]
    total = tl.zeros((CHUNKS, COLUMNS), tl.float32)
    for start in range(0, chunks, CHUNKS):
        total += tl.load(at, mask=(start + chunk < chunks)[:, None] & exists[None, :], other=0.0)
        at += CHUNKS * VECTORS * WIDTH
    folded = tl.sum(total, 0)
    if vector == 0:
        tl.store(first + column, folded.to(first.dtype.element_ty), mask=exists)
    if second is not None and vector == 1:
        tl.store(second + column, folded.to(second.dtype.element_ty), mask=exists)
    if third is not None and vector == 2:
        tl.store(third + column, folded.to(third.dtype.element_ty), mask=exists)
    if matrix is not None and vector >= 3:
        tl.store(matrix + column * (VECTORS - 3) + vector - 3, folded.to(matrix.dtype.element_ty), mask=exists)


class RowLayout(NamedTuple):
    """How rows of one width are held: the constants of a kernel."""

    width: int
    eighth: int
    block: int
    rows: int
    """Held at a time by one program."""

    @classmethod
    def of(cls, width: int, warps_per_row: int = 2) -> RowLayout:
        """For rows of `width` columns. Rows of 1024 are held by `warps_per_row` warps, others by more or fewer."""
        eighth = (width + 7) // 8
        block = triton.next_power_of_2(eighth)
        rows = min(max(WARPS * 128 // (warps_per_row * block), 1), MOST_ROWS)
        return cls(width, eighth, block, rows)

    @property
    def constexprs(self) -> dict[str, object]:
        """Of the kernel."""
        return {"WIDTH": self.width, "EIGHTH": self.eighth, "BLOCK": self.block, "ROWS": self.rows}


def summed_rows(rows: int) -> int:
    """How many rows make a chunk, of so many: few while that leaves multiprocessors without one, more where it does not, for
    every chunk leaves float32 sums behind."""
    return MOST_ROWS * max(1, -(-rows // (MOST_ROWS * _PROGRAMS)))


def check_rows(op: str, rows: int, matrices: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """ValueError where matrices are not [rows, width], vectors not [width], all contiguous and in one dtype: the kernels
    read through bare pointers, so what does not fit must not reach them."""
    first = next(iter(matrices.values()))
    dtype, device, width = first.dtype, first.device, first.shape[-1]
    for shape, tensors in (((rows, width), matrices), ((width,), vectors)):
        for name, x in tensors.items():
            if x.shape != shape or x.dtype is not dtype or x.device != device or not x.is_contiguous():
                what = f"{tuple(x.shape)} {x.dtype} on {x.device}, strides {x.stride()}"
                raise ValueError(f"{op}: {name} is {what}; wanted {shape} {dtype} on {device}, contiguous")


def fold(partial: Tensor, vectors: list[Tensor], matrix: Tensor | None = None) -> None:
    """Sums partial float32 [chunks, vectors, width] over chunks into up to three vectors [width] and a matrix [width, rest]."""
    chunks, count, width = partial.shape
    if chunks == 0:
        for destination in (*vectors, *([] if matrix is None else [matrix])):
            destination.zero_()
        return
    first, second, third = (*vectors, None, None)[:3]
    fold_kernel[(triton.cdiv(width, FOLDED_COLUMNS), count)](
        partial, first, second, third, matrix, chunks,
        WIDTH=width, VECTORS=count, COLUMNS=FOLDED_COLUMNS, CHUNKS=FOLDED_CHUNKS, num_warps=4,
    )  # fmt: skip


_ARGUMENTS = {
    **dict.fromkeys(("row_key", "row_index", "step"), "*i64"),
    **dict.fromkeys(("seed", "site", "threshold"), "u32"),
    **dict.fromkeys(("mean", "rstd", "partial", "boxes", "out"), "*fp32"),
    **dict.fromkeys(("master", "exp_avg", "exp_avg_sq", "skipped"), "*fp32"),
    **dict.fromkeys(("scale", "eps", "lr", "beta1", "rest1", "beta2", "rest2", "decay"), "fp32"),
    **dict.fromkeys(("rows", "chunk", "chunks", "n"), "i32"),
}
_POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def variant_of(
    op: str, name: str, kernel: Any, dtype: torch.dtype, constexprs: dict[str, object], warps: int
) -> Variant:
    """A compilation of one of the element-wise kernels, whose arguments are named alike; tensors of the op's dtype otherwise.
    An argument that a launch gives as None is a constant None here."""
    types = _ARGUMENTS | dict.fromkeys(constexprs, "constexpr")
    return Variant(
        op=op,
        name=name,
        kernel=kernel,
        signature={argument: types.get(argument, _POINTERS[dtype]) for argument in kernel.arg_names},
        constexprs=constexprs,
        num_warps=warps,
        num_stages=1,
        dtype=str(dtype).removeprefix("torch."),
        dot=False,
        copies=False,
    )


def fold_variant(op: str, dtype: torch.dtype, width: int, vectors: int) -> Variant:
    """The kernel of `fold` for so many vectors."""
    names = ("first", "second", "third", "matrix")
    unused = dict.fromkeys(names[min(vectors, 4) :])
    sizes = {"WIDTH": width, "VECTORS": vectors, "COLUMNS": FOLDED_COLUMNS, "CHUNKS": FOLDED_CHUNKS}
    return variant_of(op, f"column sums, {width} wide", fold_kernel, dtype, {**unused, **sizes}, 4)
