"""The published AdamW (spec section 4.4) in one pass over a flat parameter, and the sum of squares that guards it.

    m = β1 m + (1 − β1) g,   v = β2 v + (1 − β2) g²,   θ ← θ − lr m / (√v + eps),   θ ← θ − lr λ θ

It divides by no bias correction and decays after the step. Gradient g [n] has the weights' dtype; θ (the master), m and v
are float32 [n]; the weights, where they are not the master itself, are θ rounded to nearest even.
"""

# mypy: allow-untyped-defs, no-check-untyped-defs
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from kernels import adamw_others
from kernels.backends import by_rule, choose
from kernels.native_library import dtype_code, library, pointer
from kernels.row_slices import variant_of
from kernels.variants import Variant

_BLOCK = 512
"""Four values a thread, so that float32 and 16-bit values lie in the same threads."""
_WARPS = 4
_PART = 2**14
"""Values of one partial sum of squares: how many there are, and so their order, follows from n alone."""

# Triton


@triton.jit
def _adamw_kernel(
    gradient, master, exp_avg, exp_avg_sq, weights, skipped, n, lr, beta1, rest1, beta2, rest2, eps, decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """rest1 and rest2: 1 − β, which loses digits in float32. decay: lr λ."""
    if tl.load(skipped) == 0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        live = at < n
        g = tl.load(gradient + at, mask=live, other=0.0).to(tl.float32)
        m = beta1 * tl.load(exp_avg + at, mask=live, other=0.0) + rest1 * g
        v = beta2 * tl.load(exp_avg_sq + at, mask=live, other=0.0) + rest2 * g * g
        p = tl.load(master + at, mask=live, other=0.0)
        p -= lr * (m / (tl.sqrt_rn(v) + eps))
        p -= decay * p
        tl.store(exp_avg + at, m, mask=live)
        tl.store(exp_avg_sq + at, v, mask=live)
        tl.store(master + at, p, mask=live)
        if weights is not None:
            tl.store(weights + at, p.to(weights.dtype.element_ty), mask=live)


@triton.jit
def _square_sum_kernel(gradient, partial, n, PART: tl.constexpr, BLOCK: tl.constexpr):
    """partial float32: the sum of squares of each PART values."""
    first = tl.program_id(0).to(tl.int64) * PART
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        value = tl.load(gradient + at, mask=at < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partial + tl.program_id(0), tl.sum(total, 0))


@triton.jit(do_not_specialize=["chunks"])
def _sum_kernel(partial, out, chunks, BLOCK: tl.constexpr):
    """out float32 [1]: the sum of partial float32 [chunks]."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunks, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < chunks, other=0.0)
    tl.store(out, tl.sum(total, 0))


# Launchers


class _State(NamedTuple):
    """What one call reads and writes: flat, contiguous, of one length."""

    gradient: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weights: Tensor | None
    skipped: Tensor


class _Rule(NamedTuple):
    """The numbers of the formula."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def _adamw_triton(state: _State, rule: _Rule) -> None:
    n, r = state.gradient.numel(), rule
    numbers = (r.lr, r.beta1, 1 - r.beta1, r.beta2, 1 - r.beta2, r.eps, r.lr * r.weight_decay)
    _adamw_kernel[(triton.cdiv(n, _BLOCK),)](*state, n, *map(float, numbers), BLOCK=_BLOCK, num_warps=_WARPS)


def _adamw_native(state: _State, rule: _Rule) -> None:
    *tensors, skipped = map(pointer, state)
    library().stopgo_adamw(dtype_code(state.gradient), state.gradient.numel(), *tensors, *rule, skipped)


def _adamw_plain(state: _State, rule: _Rule) -> None:
    adamw_torch(
        *state[:5], lr=rule.lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=rule.weight_decay,
        skipped=state.skipped,
    )  # fmt: skip


def _adamw_of(name: str, state: _State, rule: _Rule) -> None:
    lr, decay = decay_first(rule.lr, rule.weight_decay)
    adamw_others.step(
        name, *state, lr=lr, betas=(rule.beta1, rule.beta2), eps=rule.eps, weight_decay=decay
    )  # fmt: skip


_ADAMW: dict[str, Callable[[_State, _Rule], None]] = {
    "triton": _adamw_triton,
    "native": _adamw_native,
    "torch": _adamw_plain,
    **{name: partial(_adamw_of, name) for name in adamw_others.OTHERS},
}


def adamw(
    gradient: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    skipped: Tensor,
) -> None:
    """One step in place: master, exp_avg and exp_avg_sq float32 [n], weights (None: the master itself) in gradient's dtype.

    `skipped`: float32, one element on the same device, which is not read on the host: where it is not 0 nothing changes.
    ValueError for tensors that do not fit each other.
    """
    state = _State(gradient, master, exp_avg, exp_avg_sq, weights, skipped)
    _check(state)
    if gradient.numel():
        _ADAMW[choose("adamw", gradient)](state, _Rule(lr, *betas, eps, weight_decay))


def _check(state: _State) -> None:
    """The kernels read and write through bare pointers: what does not fit must not reach them."""
    gradient, master, *moments, weights, skipped = state
    tensors = [gradient, master, *moments, *([] if weights is None else [weights])]
    if any(x.numel() != gradient.numel() or not x.is_contiguous() for x in tensors):
        raise ValueError(f"adamw: not contiguous and of one size: {[(*x.shape, *x.stride()) for x in tensors]}")
    exact = torch.float64 if gradient.dtype is torch.float64 else torch.float32
    if any(x.dtype is not exact for x in (master, *moments)) or (
        weights is not None and weights.dtype is not gradient.dtype
    ):
        raise ValueError(f"adamw: dtypes do not fit: {[x.dtype for x in tensors]}")
    if skipped.numel() != 1 or skipped.dtype is not torch.float32:
        raise ValueError(f"adamw: skipped is one float32, not {skipped.dtype} {tuple(skipped.shape)}")


def square_sum(gradient: Tensor) -> Tensor:
    """float32 [] on gradient's device: the sum of its squares, in an order that does not depend on device or threads."""
    backend = choose("adamw", gradient)
    if backend in adamw_others.OTHERS:  # which have none, or one that waits for the device
        backend = by_rule("adamw", gradient)
    return _SQUARE_SUM[backend](gradient.contiguous())


def _square_sum_triton(gradient: Tensor) -> Tensor:
    n = gradient.numel()
    chunks = triton.cdiv(n, _PART)
    partial, out = (gradient.new_empty(size, dtype=torch.float32) for size in (chunks, ()))
    if chunks:
        _square_sum_kernel[(chunks,)](gradient, partial, n, PART=_PART, BLOCK=_BLOCK, num_warps=_WARPS)
    _sum_kernel[(1,)](partial, out, chunks, BLOCK=_BLOCK, num_warps=_WARPS)
    return out


def _square_sum_native(gradient: Tensor) -> Tensor:
    return torch.tensor(library().stopgo_square_sum(dtype_code(gradient), gradient.numel(), pointer(gradient)))


# The plain references


def adamw_torch(
    gradient: Tensor,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    skipped: Tensor,
) -> None:
    """The plain reference: torch's fused AdamW under the numbers of `decay_first`, its step counter pinned where both bias
    corrections are exactly 1.
    """
    decayed, decay = decay_first(lr, weight_decay)
    torch_adamw(
        [master], [gradient.to(master.dtype)], [exp_avg], [exp_avg_sq], [], [_late(master.device)],
        fused=True, found_inf=(skipped.reshape(()) != 0).float(), amsgrad=False, beta1=betas[0], beta2=betas[1], lr=decayed,
        weight_decay=decay, eps=eps, maximize=False,
    )  # fmt: skip
    if weights is not None:
        weights.copy_(torch.where(skipped == 0, master.to(weights.dtype), weights))


def decay_first(lr: float, weight_decay: float) -> tuple[float, float]:
    """(lr', λ') under which a rule that decays before its step, or beside it, gives the published one, which decays after:
    lr' = lr (1 − lr λ) and lr' λ' = lr λ."""
    decayed = lr * (1 - lr * weight_decay)
    return decayed, lr * weight_decay / decayed if decayed else 0.0


@cache
def _late(device: torch.device) -> Tensor:
    """A step at which 1 − β ** step is exactly 1; adding 1 to a float32 of this size changes nothing."""
    return torch.full((), 1e9, device=device)


def square_sum_torch(gradient: Tensor) -> Tensor:
    """The plain reference."""
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).square()


_SQUARE_SUM = {"triton": _square_sum_triton, "native": _square_sum_native, "torch": square_sum_torch}


def variants() -> list[Variant]:
    """Every kernel that a run can launch here or in `adamw_many`; sizes that are multiples of 16 are read in whole vectors."""
    from kernels import adamw_many  # which imports this file

    found = [
        *adamw_many.variants(),
        variant_of("adamw", "sum of squares", _sum_kernel, torch.float32, {"BLOCK": _BLOCK}, _WARPS),
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stepped: dict[str, object] = {"BLOCK": _BLOCK} | ({"weights": None} if dtype is torch.float32 else {})
        squared: dict[str, object] = {"PART": _PART, "BLOCK": _BLOCK}
        for size, n in (("any n", "i32"), ("n % 16 = 0", "i32:16")):
            for name, kernel, constexprs in (
                ("step", _adamw_kernel, stepped),
                ("squares", _square_sum_kernel, squared),
            ):
                variant = variant_of("adamw", f"{name}, {size}", kernel, dtype, constexprs, _WARPS)
                found.append(replace(variant, signature=variant.signature | {"n": n}))
    return found
