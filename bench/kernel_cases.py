"""The cases of every op, on the full model's sizes with the tasks' lengths.

`torch` is plain torch as one would write the whole op; where a product stands before the op, `torch_gemm_bias` leaves the bias
to it, as `nn.Linear` does, and so does less than our op: the strictest peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import kernel_peers as peers
from bench.attention_cases import attention_cases, coattention_cases
from bench.kernel_case import STREAMS, Call, Case, Maker, Setting, Work, bytes_of, describe, dropout, work_of
from bench.loss_cases import masked_region_cases, masked_word_cases, soft_label_cases
from kernels.adamw import adamw
from kernels.bias_dropout_residual_layernorm import bias_dropout_residual_layernorm
from kernels.bias_gelu import bias_gelu
from kernels.dropout import drop
from kernels.region_embedding import region_embedding

Others = dict[str, Callable[[], Call]]


def cases(op: str, setting: Setting, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The cases of an op. KeyError for an unknown one."""
    return _BUILDERS[op](setting, Maker(dtype, device))


def depends_on_task(op: str) -> bool:
    """Whether the batch's lengths make a difference to an op."""
    return op not in ("soft_label_bce", "masked_region_loss", "masked_lm_loss", "adamw")


def _gelu_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    for stream, rows in make.streams(setting):
        inner = STREAMS[stream][2]
        leaves = make.leaf(rows.total, inner), make.leaf(inner)
        others: Others = {
            "torch": partial(Call, peers.eager_gelu, leaves),
            "torch_gemm_bias": partial(Call, partial(peers.eager_gelu, bias=None), leaves[:1]),
        }
        work, shape = work_of(leaves, leaves[0], leaves), describe(stream, rows, inner)
        yield Case("bias_gelu", setting.task, shape, make.dtype, work, Call(bias_gelu, leaves), others)


def _layernorm_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    for stream, rows in make.streams(setting):
        width, p = STREAMS[stream][0], setting.p
        x, residual = make.leaf(rows.total, width), make.leaf(rows.total, width)
        bias, weight, shift = make.vectors(width, 3)
        leaves, without_bias = (x, bias, residual, weight, shift), (x, residual, weight, shift)
        others: Others = {
            "torch": partial(Call, partial(peers.eager_layernorm, p=p), leaves),
            "torch_gemm_bias": partial(Call, partial(peers.eager_layernorm_of_biased, p=p), without_bias),
            "liger": partial(Call, partial(peers.liger_layernorm, p=p), without_bias),
            "apex": partial(Call, partial(peers.apex_layernorm, p=p), without_bias),
        }
        ours = Call(partial(bias_dropout_residual_layernorm, rows=rows, dropout=dropout(p, rows)), leaves)
        work, shape = work_of(leaves, x, leaves), describe(stream, rows, width, p)
        yield Case("bias_dropout_residual_layernorm", setting.task, shape, make.dtype, work, ours, others)


def _region_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    rows, width, p = make.rows(setting.regions), STREAMS["image"][0], setting.p
    boxes = make.uniform(rows.total, 5)
    x, location_weight = make.leaf(rows.total, width), make.leaf(width, 5)
    feature_bias, location_bias, weight, shift = make.vectors(width, 4)
    leaves = (x, feature_bias, location_weight, location_bias, weight, shift)

    def ours(x: Tensor, bias: Tensor, location: Tensor, location_bias: Tensor, weight: Tensor, shift: Tensor) -> Tensor:
        return region_embedding(x, bias, boxes, location, location_bias, weight, shift, rows, dropout(p, rows))

    own = boxes.to(make.dtype)
    others: Others = {
        "torch": partial(Call, partial(peers.eager_region_embedding, boxes=own, p=p), leaves),
        "torch_gemm_bias": partial(
            Call, partial(peers.eager_region_embedding_of_biased, boxes=own, p=p), (x, *leaves[2:])
        ),
    }
    work = work_of((*leaves, boxes), x, leaves, flops=10 * rows.total * width)
    shape = describe("image", rows, width, p)
    yield Case("region_embedding", setting.task, shape, make.dtype, work, Call(ours, leaves), others)


def _dropout_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    for stream, rows in make.streams(setting):
        width, p = STREAMS[stream][0], setting.p
        leaves = (make.leaf(rows.total, width),)
        ours = Call(partial(drop, dropout=dropout(p, rows), row_key=rows.row_key, row_index=rows.row_index), leaves)
        once = Work(2 * bytes_of(*leaves))  # backward reads a gradient and writes one, nothing else
        work = {"forward": once, "backward": once, "both": once + once}
        others: Others = {"torch": partial(Call, partial(F.dropout, p=p), leaves)}
        yield Case("dropout", setting.task, describe(stream, rows, width, p), make.dtype, work, ours, others)


def _adamw_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    n = setting.parameters
    gradient, master = make.normal(n), make.normal(n, dtype=torch.float32)
    exp_avg, exp_avg_sq, skipped = torch.zeros_like(master), torch.zeros_like(master), master.new_zeros(())
    weights = None if make.dtype is torch.float32 else master.to(make.dtype)

    def ours() -> Tensor:
        adamw(
            gradient, master, exp_avg, exp_avg_sq, weights, lr=peers.LR, betas=peers.BETAS, eps=peers.EPS,
            weight_decay=peers.WEIGHT_DECAY, skipped=skipped,
        )  # fmt: skip
        return master

    def other(step_of: Callable[[Tensor, Tensor, Tensor | None], Callable[[], Tensor]]) -> Call:
        return Call(step_of(gradient, master.clone(), None if weights is None else weights.clone()), ())

    others: Others = {
        "torch": partial(other, partial(peers.torch_adamw, fused=False)),
        "torch_fused": partial(other, partial(peers.torch_adamw, fused=True)),
        "apex": partial(other, peers.apex_adamw),
    }
    moved = bytes_of(gradient, *([] if weights is None else [weights])) + 2 * bytes_of(master, exp_avg, exp_avg_sq)
    work, shape = {"step": Work(moved)}, f"{n:,} values, float32 masters"
    yield Case("adamw", "any", shape, make.dtype, work, Call(ours, ()), others)


_BUILDERS: dict[str, Callable[[Setting, Maker], Iterator[Case]]] = {
    "attention": attention_cases,
    "coattention": coattention_cases,
    "bias_gelu": _gelu_cases,
    "bias_dropout_residual_layernorm": _layernorm_cases,
    "region_embedding": _region_cases,
    "soft_label_bce": soft_label_cases,
    "masked_region_loss": masked_region_cases,
    "masked_lm_loss": masked_word_cases,
    "dropout": _dropout_cases,
    "adamw": _adamw_cases,
}
