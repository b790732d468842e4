"""What others run in place of each op: plain torch as one would write it, SDPA, and the kernels of other projects.

Peers get what they do best with: padded tensors (padded to the longest item of the batch, not of the data set; no mask where
nothing is padded), torch's own dropout, one dtype throughout. Peers of other projects need a GPU and their package.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.bias_dropout_residual_layernorm import LAYER_NORM_EPS
from kernels.rows import Rows

PACKAGES = {"flash_attn": "flash_attn", "liger": "liger_kernel", "apex": "apex"}
"""Provider -> the package that it needs, beside a GPU."""


def missing(provider: str, device: torch.device) -> str:
    """Why a provider cannot run here; empty if it can."""
    package = PACKAGES.get(provider)
    if package is None:
        return ""
    if device.type != "cuda":
        return "needs a GPU"
    return "" if find_spec(package) else f"{package} is not installed"


# Attention


def padded(x: Tensor, rows: Rows) -> Tensor:
    """[n, max_seqlen, width], zeros where there is no row."""
    places = x.new_zeros(rows.n * rows.max_seqlen, x.shape[-1])
    return places.index_copy_(0, rows.slots, x).view(rows.n, rows.max_seqlen, -1)


def padding_bias(rows: Rows, dtype: torch.dtype) -> Tensor | None:
    """[n, 1, 1, max_seqlen], -10000 at padded keys, as published; None where nothing is padded."""
    if rows.total == rows.n * rows.max_seqlen:
        return None
    return rows.is_padding[:, None, None, :].to(dtype) * -10000.0


def eager_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, p: float) -> Tensor:
    """[n, queries, width] of padded q, k, v: two batched products."""
    q, k, v = (_heads(x, heads) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return _joined(F.dropout(scores.softmax(-1), p) @ v)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, p: float) -> Tensor:
    """The same by torch's fused one, which picks its algorithm itself."""
    q, k, v = (_heads(x, heads) for x in (q, k, v))
    return _joined(F.scaled_dot_product_attention(q, k, v, bias, p))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, q_rows: Rows, k_rows: Rows, heads: int, p: float) -> Tensor:
    """[queries, width] of packed q, k, v: FlashAttention 2, the version that has both dropout and variable lengths."""
    flash_attn_varlen_func = import_module("flash_attn").flash_attn_varlen_func
    of_heads = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    lengths = (q_rows.cu_seqlens, k_rows.cu_seqlens, q_rows.max_seqlen, k_rows.max_seqlen)
    return flash_attn_varlen_func(*of_heads, *lengths, dropout_p=p).flatten(1)


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(context: Tensor) -> Tensor:
    return context.transpose(1, 2).flatten(2)


# Element-wise


def eager_layernorm(x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, p: float) -> Tensor:
    return eager_layernorm_of_biased(x + bias, residual, weight, shift, p)


def eager_layernorm_of_biased(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, p: float) -> Tensor:
    return F.layer_norm(F.dropout(x, p) + residual, weight.shape, weight, shift, LAYER_NORM_EPS)


def liger_layernorm(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, p: float) -> Tensor:
    LigerLayerNormFunction = import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return LigerLayerNormFunction.apply(F.dropout(x, p) + residual, weight, shift, LAYER_NORM_EPS)


def apex_layernorm(x: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, p: float) -> Tensor:
    fused_layer_norm_affine = import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine
    x = F.dropout(x, p) + residual
    return fused_layer_norm_affine(x, weight, shift, weight.shape, LAYER_NORM_EPS)


def eager_gelu(x: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(x if bias is None else x + bias)


def eager_region_embedding(
    x: Tensor, feature_bias: Tensor, location: Tensor, location_bias: Tensor, weight: Tensor, shift: Tensor,
    boxes: Tensor, p: float,
) -> Tensor:  # fmt: skip
    return eager_region_embedding_of_biased(x + feature_bias, location, location_bias, weight, shift, boxes, p)


def eager_region_embedding_of_biased(
    x: Tensor, location: Tensor, location_bias: Tensor, weight: Tensor, shift: Tensor, boxes: Tensor, p: float
) -> Tensor:
    x = x + F.linear(boxes, location, location_bias)
    return F.dropout(F.layer_norm(x, weight.shape, weight, shift, LAYER_NORM_EPS), p)


# Losses


def eager_soft_label_bce(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and scores as published: dense targets, the score by a one-hot of the arg-max."""
    loss = F.binary_cross_entropy_with_logits(logits.float(), target) * target.shape[1]
    chosen = torch.zeros_like(target).scatter_(1, logits.detach().argmax(1, keepdim=True), 1.0)
    return loss, (chosen * target).sum(1)


def eager_region_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    """Masked rows gathered first; `target` is that of the masked rows."""
    log_probabilities = F.linear(hidden[rows], weight, bias).float().log_softmax(-1)
    return F.kl_div(log_probabilities, target, reduction="sum") / len(rows)


def all_regions_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """As published: every region is projected and compared; float32 `masked` [n] picks those that count."""
    log_probabilities = F.linear(hidden, weight, bias).float().log_softmax(-1)
    divergence = F.kl_div(log_probabilities, target, reduction="none")
    return (divergence * masked[:, None]).sum() / masked.sum()


def liger_region_loss(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    LigerKLDivLossFunction = import_module("liger_kernel.ops.kl_div").LigerKLDivLossFunction
    log_probabilities = F.linear(hidden[rows], weight, bias).float().log_softmax(-1)
    return LigerKLDivLossFunction.apply(log_probabilities, target, "batchmean")


def eager_word_loss(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, embeddings, bias).float(), labels)


def liger_word_loss(hidden: Tensor, embeddings: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    function = import_module("liger_kernel.ops.fused_linear_cross_entropy").LigerFusedLinearCrossEntropyFunction
    loss = function.apply(hidden, embeddings, labels, bias)
    return loss[0] if isinstance(loss, tuple) else loss


# Optimizer

LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.999), 1e-6, 0.01


def torch_adamw(gradient: Tensor, master: Tensor, weights: Tensor | None, fused: bool) -> Callable[[], Tensor]:
    """A step of torch's AdamW on float32 masters, with the casts that it needs around it; no weights: they are the masters."""
    optimizer = torch.optim.AdamW(
        [master], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=fused, foreach=False
    )
    return partial(_step, optimizer, gradient, master, weights)


def apex_adamw(gradient: Tensor, master: Tensor, weights: Tensor | None) -> Callable[[], Tensor]:
    FusedAdam = import_module("apex.optimizers").FusedAdam
    optimizer = FusedAdam([master], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    return partial(_step, optimizer, gradient, master, weights)


def _step(optimizer: torch.optim.Optimizer, gradient: Tensor, master: Tensor, weights: Tensor | None) -> Tensor:
    master.grad = gradient.to(master.dtype)
    optimizer.step()
    return master if weights is None else weights.copy_(master)
