"""`Together`: many parameters stepped by the published AdamW (`kernels.adamw`) in one launch on a GPU, and their gradients' sum
of squares in two. A launch costs the host as much as stepping two million values costs the device, and the trunk has 56
parameters.

Where they lie stands in a table on the device: addresses, sizes, and for every chunk of values whose they are. It is made when
a step's gradients lie where none did before, and kept: gradients come back to where they were (`engine.model.flat`,
`engine.graphs`).
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.adamw import adamw, square_sum
from kernels.backends import choose
from kernels.row_slices import variant_of
from kernels.variants import Variant

_BLOCK = 512
"""Four values a thread, as in `kernels.adamw`."""
_WARPS = 4
_CHUNK = 8 * _BLOCK
"""Values of one program."""
_COLUMNS = 6
"""Of the table, int64: gradient, master, exp_avg, exp_avg_sq and weights by address; how many values."""
_TABLES = 256
"""Kept at most: more than graphs are (`engine.graphs.LIMIT`)."""
_ALIGNED = 16
"""Bytes. What is not aligned is stepped one by one."""
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _at(row, column: tl.constexpr, TYPE: tl.constexpr):
    """The pointer that stands in this column."""
    return tl.multiple_of(tl.load(row + column).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _step(
    gradient, master, exp_avg, exp_avg_sq, weights, at, live, lr, beta1, rest1, beta2, rest2, eps, decay,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """One block, as in `kernels.adamw`; `live`: which of its values exist, None: all."""
    g = tl.load(gradient + at, mask=live).to(tl.float32)
    m = beta1 * tl.load(exp_avg + at, mask=live) + rest1 * g
    v = beta2 * tl.load(exp_avg_sq + at, mask=live) + rest2 * g * g
    p = tl.load(master + at, mask=live)
    p -= lr * (m / (tl.sqrt_rn(v) + eps))
    p -= decay * p
    tl.store(exp_avg + at, m, mask=live)
    tl.store(exp_avg_sq + at, v, mask=live)
    tl.store(master + at, p, mask=live)
    if ROUNDED:
        tl.store(weights + at, p.to(weights.dtype.element_ty), mask=live)


@triton.jit
def _adamw_kernel(
    table, owners, decays, skipped, lr, beta1, rest1, beta2, rest2, eps, decay,
    COLUMNS: tl.constexpr, TYPE: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """owners int32 [chunks, 2]: whose a chunk is, and which of its chunks. decays int32 [tensors]: 1 where `decay` is due."""
    if tl.load(skipped) == 0:
        chunk = owners + 2 * tl.program_id(0)
        owner = tl.load(chunk)
        first = tl.load(chunk + 1).to(tl.int64) * CHUNK
        row = table + owner * COLUMNS
        gradient = _at(row, 0, TYPE)
        master = _at(row, 1, tl.float32)
        exp_avg = _at(row, 2, tl.float32)
        exp_avg_sq = _at(row, 3, tl.float32)
        weights = _at(row, 4, TYPE)
        n = tl.load(row + 5)
        own_decay = tl.where(tl.load(decays + owner) != 0, decay, 0.0)
        for start in tl.static_range(0, CHUNK, BLOCK):
            at = first + start + tl.arange(0, BLOCK)
            if first + CHUNK <= n:
                _step(
                    gradient, master, exp_avg, exp_avg_sq, weights, at, None, lr, beta1, rest1, beta2, rest2, eps, own_decay,
                    ROUNDED,
                )  # fmt: skip
            else:
                _step(
                    gradient, master, exp_avg, exp_avg_sq, weights, at, at < n, lr, beta1, rest1, beta2, rest2, eps, own_decay,
                    ROUNDED,
                )  # fmt: skip


@triton.jit
def _squares_kernel(
    table, owners, partial, COLUMNS: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """partial float32 [chunks]: the sum of squares of each chunk's gradients."""
    chunk = owners + 2 * tl.program_id(0)
    row = table + tl.load(chunk) * COLUMNS
    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    gradient = _at(row, 0, TYPE)
    n = tl.load(row + 5)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.static_range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        if first + CHUNK <= n:
            value = tl.load(gradient + at).to(tl.float32)
        else:
            value = tl.load(gradient + at, mask=at < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


class _Table(NamedTuple):
    """Of one set of gradients, on the device."""

    addresses: Tensor
    owners: Tensor
    decays: Tensor


class Together:
    """Parameters of one dtype that are stepped together; their states stay where they are."""

    def __init__(
        self,
        masters: Sequence[Tensor],
        exp_avg: Sequence[Tensor],
        exp_avg_sq: Sequence[Tensor],
        weights: Sequence[Tensor | None],
        decays: Sequence[bool],
    ) -> None:
        """Float32 [n_i] each; `weights` in the gradients' dtype, None where the masters are the weights; decays: which do."""
        self._states = list(zip(masters, exp_avg, exp_avg_sq, weights, strict=True))
        self._decays = list(decays)
        self._tables: OrderedDict[tuple[int, ...], _Table] = OrderedDict()
        self._rounded = any(weight is not None for weight in weights)
        self._fits = all((weight is not None) == self._rounded for weight in weights)
        self._chunks: tuple[Tensor, Tensor] | None = None

    def step(
        self,
        gradients: Sequence[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        skipped: Tensor,
    ) -> None:
        """As `kernels.adamw.adamw` on each: gradient i [n_i] of parameter i."""
        table = self._table(gradients)
        if table is None:
            for gradient, state, decays in zip(gradients, self._states, self._decays, strict=True):
                adamw(
                    gradient, *state, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay * decays, skipped=skipped
                )
            return
        beta1, beta2 = betas
        numbers = (lr, beta1, 1 - beta1, beta2, 1 - beta2, eps, lr * weight_decay)
        _adamw_kernel[(len(table.owners),)](
            *table, skipped, *map(float, numbers), COLUMNS=_COLUMNS, TYPE=_TYPES[gradients[0].dtype], ROUNDED=self._rounded,
            BLOCK=_BLOCK, CHUNK=_CHUNK, num_warps=_WARPS,
        )  # fmt: skip

    def square_sums(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """float32 [1 or more] each, on their device: what adds up to the gradients' sum of squares, in an order that follows
        from their sizes."""
        table = self._table(gradients)
        if table is None:
            return [square_sum(gradient).reshape(1) for gradient in gradients]
        partial = torch.empty(len(table.owners), dtype=torch.float32, device=gradients[0].device)
        _squares_kernel[(len(table.owners),)](
            table.addresses, table.owners, partial, COLUMNS=_COLUMNS, TYPE=_TYPES[gradients[0].dtype], BLOCK=_BLOCK,
            CHUNK=_CHUNK, num_warps=_WARPS,
        )  # fmt: skip
        return [partial]

    def _table(self, gradients: Sequence[Tensor]) -> _Table | None:
        """None where one launch cannot do it all."""
        first = gradients[0]
        if not self._fits or choose("adamw", first) != "triton":
            return None
        tensors = [
            x
            for gradient, state in zip(gradients, self._states, strict=True)
            for x in (gradient, *state)
            if x is not None
        ]
        where = tuple(x.data_ptr() for x in tensors)  # states too: somebody may have given their memory back meanwhile
        table = self._tables.get(where)
        if table is None:
            if any(x.data_ptr() % _ALIGNED or not x.is_contiguous() for x in tensors):
                return None
            if len(self._tables) >= _TABLES:
                self._tables.popitem(last=False)
            table = self._tables[where] = self._new_table(gradients)
        self._tables.move_to_end(where)
        return table

    def _new_table(self, gradients: Sequence[Tensor]) -> _Table:
        """ValueError for what does not fit: the kernels read and write through bare addresses."""
        rows = []
        for i, (gradient, (*state, weights)) in enumerate(zip(gradients, self._states, strict=True)):
            n = gradient.numel()
            wanted = [(n, torch.float32)] * 3 + [(n, gradients[0].dtype)] * 2
            found = [(x.numel(), x.dtype) for x in (*state, gradient, gradient if weights is None else weights)]
            if found != wanted:
                raise ValueError(
                    f"adamw: parameter {i} is {found}, wanted {wanted} (master, moments, gradient, weights)"
                )
            rounded = weights.data_ptr() if weights is not None else 0
            rows.append([gradient.data_ptr(), *(x.data_ptr() for x in state), rounded, n])
        device = gradients[0].device
        if self._chunks is None:
            self._chunks = self._divided([row[-1] for row in rows], device)
        # Page-locked, so that a step whose gradients lie elsewhere does not wait for the device.
        addresses = torch.tensor(rows, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
        return _Table(addresses.to(device, non_blocking=True), *self._chunks)

    def _divided(self, sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """(owners, decays) of `_adamw_kernel`: they follow from the sizes alone."""
        chunks = torch.tensor([-(-n // _CHUNK) for n in sizes], device="cpu")
        owners = torch.arange(len(sizes), device="cpu").repeat_interleave(chunks)
        places = torch.cat([torch.arange(int(n), device="cpu") for n in chunks])
        decays = torch.tensor(self._decays, dtype=torch.int32, device="cpu")
        return torch.stack((owners, places), 1).to(device, torch.int32), decays.to(device)


def variants() -> list[Variant]:
    """Every kernel that a run can launch here."""
    found = []
    for dtype, kind in _TYPES.items():
        sizes: dict[str, object] = {"COLUMNS": _COLUMNS, "TYPE": kind, "BLOCK": _BLOCK, "CHUNK": _CHUNK}
        stepped = variant_of(
            "adamw",
            "step, all parameters",
            _adamw_kernel,
            dtype,
            sizes | {"ROUNDED": dtype is not torch.float32},
            _WARPS,
        )
        squared = variant_of("adamw", "squares, all parameters", _squares_kernel, dtype, sizes, _WARPS)
        tables = {"table": "*i64", "owners": "*i32"}
        found += [
            replace(stepped, signature=stepped.signature | tables | {"decays": "*i32", "skipped": "*fp32"}),
            replace(squared, signature=squared.signature | tables | {"partial": "*fp32"}),
        ]
    return found
