"""Multi-label loss of the answer heads: binary cross-entropy with logits against sparse soft labels.

    loss = (1 / B) Σ_b Σ_c softplus(z_bc) − t_bc z_bc,      score_b = t_b,argmax(z_b)

which is the published "element mean × number of classes" (spec section 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_label_bce(logits: Tensor, offsets: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, score of the arg-max class [B]), both float32.

    logits [B, C]; example b owns entries offsets[b]:offsets[b + 1] of labels (int64 [n]) and scores (float32 [n]).
    """
    return soft_label_bce_torch(logits, offsets, labels, scores)


def soft_label_bce_torch(logits: Tensor, offsets: Tensor, labels: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The plain reference."""
    logits = logits.float()
    examples = logits.shape[0]
    example = torch.arange(examples, device=logits.device).repeat_interleave(offsets.diff(), output_size=labels.numel())
    loss = (F.softplus(logits).sum() - (scores * logits[example, labels]).sum()) / examples
    chosen = logits.detach().argmax(-1)[example] == labels
    score = scores.new_zeros(examples).index_add_(0, example, scores * chosen)
    return loss, score
