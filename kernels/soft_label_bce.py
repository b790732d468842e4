"""Multi-label loss of the answer heads: binary cross-entropy with logits against sparse soft labels.

    loss = (1 / B) Σ_b Σ_c softplus(z_bc) − t_bc z_bc,      score_b = t_b,argmax(z_b)

which is the published "element mean × number of classes" (spec section 2). A label that an example names twice has the sum
of its scores.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backends import choose
from kernels.native_library import dtype_code, library, pointer
from kernels.variants import Variant


@triton.jit(do_not_specialize=["classes"])
def _forward_kernel(logits, offsets, labels, scores, loss, score, classes, BLOCK: tl.constexpr):
    """One example: loss and score, float32 [examples]."""
    example = tl.program_id(0)
    first, last = tl.load(offsets + example), tl.load(offsets + example + 1)
    logits += example.to(tl.int64) * classes
    total, best, place = 0.0, -float("inf"), 0
    for start in range(0, classes, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < classes
        z = tl.load(logits + column, inside, -float("inf")).to(tl.float32)
        largest = tl.max(z, 0)
        leftmost = tl.min(tl.where(z == largest, column, classes), 0)
        place = tl.where(largest > best, leftmost, place)
        best = tl.maximum(largest, best)
        z = tl.where(inside, z, 0.0)
        cost = tl.maximum(z, 0.0) + _log1p(tl.exp(-tl.abs(z))) - z * _target(labels, scores, first, last, column, BLOCK)
        total += tl.sum(tl.where(inside, cost, 0.0), 0)

    found = 0.0
    for entry in range(first, last):
        found += tl.where(tl.load(labels + entry) == place, tl.load(scores + entry), 0.0)
    tl.store(loss + example, total)
    tl.store(score + example, found)


@triton.jit(do_not_specialize=["classes"])
def _backward_kernel(logits, offsets, labels, scores, dloss, dlogits, classes, BLOCK: tl.constexpr):
    """One block of one example's dlogits = dloss (σ(z) − t) / examples."""
    example = tl.program_id(0)
    first, last = tl.load(offsets + example), tl.load(offsets + example + 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < classes
    at = example.to(tl.int64) * classes + column
    z = tl.load(logits + at, inside, 0.0).to(tl.float32)
    decay = tl.exp(-tl.abs(z))
    sigmoid = tl.where(z < 0, decay, 1.0) / (1.0 + decay)
    dz = (sigmoid - _target(labels, scores, first, last, column, BLOCK)) * (tl.load(dloss) / tl.num_programs(0))
    tl.store(dlogits + at, dz.to(dlogits.dtype.element_ty), inside)


@triton.jit
def _target(labels, scores, first, last, column, BLOCK: tl.constexpr):
    """float32 [BLOCK]: the scores of these classes among entries first to last."""
    t = tl.zeros((BLOCK,), tl.float32)
    for entry in range(first, last):
        t += tl.where(column == tl.load(labels + entry), tl.load(scores + entry), 0.0)
    return t


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], to the last bits: what 1 + x rounds away is put back."""
    y = 1.0 + x
    lost = y == 1.0
    return tl.where(lost, x, tl.log(y) * (x / tl.where(lost, 1.0, y - 1.0)))


_LARGEST_BLOCK = 4096


def _block(classes: int) -> int:
    return min(triton.next_power_of_2(classes), _LARGEST_BLOCK)


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)


class _Triton(torch.autograd.Function):
    """Backward reads the logits again: less traffic than a gradient that is kept and then scaled."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, offsets: Tensor, labels: Tensor, scores: Tensor, _: bool
    ) -> tuple[Tensor, Tensor]:
        examples, classes = logits.shape
        block = _block(classes)
        loss, score = (logits.new_empty(examples, dtype=torch.float32) for _ in range(2))
        _forward_kernel[(examples,)](
            logits, offsets, labels, scores, loss, score, classes, BLOCK=block, num_warps=_warps(block), num_stages=1
        )
        ctx.save_for_backward(logits, offsets, labels, scores)
        ctx.mark_non_differentiable(score)
        return loss.sum() / examples, score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, offsets, labels, scores = ctx.saved_tensors
        examples, classes = logits.shape
        block = _block(classes)
        dlogits = torch.empty_like(logits)
        _backward_kernel[(examples, triton.cdiv(classes, block))](
            logits, offsets, labels, scores, dloss, dlogits, classes,
            BLOCK=block, num_warps=_warps(block), num_stages=1,
        )  # fmt: skip
        return dlogits, None, None, None, None


class _Native(torch.autograd.Function):
    """One pass over the logits for loss, score and gradient, which backward scales."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, offsets: Tensor, labels: Tensor, scores: Tensor, recording: bool
    ) -> tuple[Tensor, Tensor]:
        _check(logits, offsets, labels)
        examples = len(logits)
        loss, score = torch.empty(examples), torch.empty(examples)
        dlogits = torch.empty_like(logits) if recording and ctx.needs_input_grad[0] else None
        tensors = (logits, offsets, labels, scores, loss, score, dlogits)
        library().stopgo_soft_label_bce(dtype_code(logits), *logits.shape, *map(pointer, tensors))
        ctx.save_for_backward(dlogits)
        ctx.mark_non_differentiable(score)
        return (loss.sum(dtype=torch.float64) / examples).float(), score

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (dlogits,) = ctx.saved_tensors
        return dlogits * dloss, None, None, None, None


def _check(logits: Tensor, offsets: Tensor, labels: Tensor) -> None:
    """The library reads through bare pointers. On the CPU looking costs nothing; on a GPU it would be a wait."""
    if int(offsets[-1]) != labels.numel():
        raise ValueError(f"{labels.numel()} labels, but offsets up to {int(offsets[-1])}")
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        raise IndexError(f"a label lies outside of the {logits.shape[1]} classes")


_FUNCTIONS = {"triton": _Triton, "native": _Native}


def soft_label_bce(logits: Tensor, offsets: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, score of the arg-max class [B]), both float32; of equal largest logits the first counts.

    logits [B, C]; example b owns entries offsets[b]:offsets[b + 1] of labels (int64 [n]) and scores (float32 [n]). On the
    CPU a label outside of the classes is an IndexError.
    """
    backend = choose("soft_label_bce", logits)
    if backend == "torch":
        return soft_label_bce_torch(logits, offsets, labels, scores)
    if backend == "native" and logits.dtype is torch.float16:
        logits = logits.float()  # a gradient of float16 would vanish before the loss's scale reaches it
    inputs = (x.contiguous() for x in (logits, offsets, labels, scores))
    loss, score = _FUNCTIONS[backend].apply(*inputs, torch.is_grad_enabled())
    return loss, score


def soft_label_bce_torch(logits: Tensor, offsets: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The plain reference."""
    logits = logits.float()
    examples = logits.shape[0]
    example = torch.arange(examples, device=logits.device).repeat_interleave(offsets.diff(), output_size=labels.numel())
    loss = (F.softplus(logits).sum() - (scores * logits[example, labels]).sum()) / examples
    chosen = logits.detach().argmax(-1)[example] == labels
    score = scores.new_zeros(examples).index_add_(0, example, scores * chosen)
    return loss, score


def variants() -> list[Variant]:
    """Every Triton kernel of this op, for the answer heads' 3,129 and 1,533 classes."""
    found = []
    inputs = {"offsets": "*i64", "labels": "*i64", "scores": "*fp32"}
    for classes in (3129, 1533):
        for own, dtype in (("*fp32", "float32"), ("*bf16", "bfloat16"), ("*fp16", "float16")):
            for name, kernel, others in (
                ("forward", _forward_kernel, {"loss": "*fp32", "score": "*fp32"}),
                ("backward", _backward_kernel, {"dloss": "*fp32", "dlogits": own}),
            ):
                variant = Variant(
                    op="soft_label_bce",
                    name=f"{name}, {classes} classes",
                    kernel=kernel,
                    signature={"logits": own, **inputs, **others, "classes": "i32", "BLOCK": "constexpr"},
                    constexprs={"BLOCK": _block(classes)},
                    num_warps=_warps(_block(classes)),
                    num_stages=1,
                    dtype=dtype,
                    dot=False,
                    copies=False,
                )
                found.append(variant)
    return found
