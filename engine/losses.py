"""Losses and scores of the five kinds of target (spec section 2), and of pretraining (spec section 2.1).

A loss is a float32 scalar before any loss scale; a score is one number in [0, 1] per example, higher is better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.model.heads import PretrainingHeads
from engine.model.randomness import Randomness
from engine.model.trunk import Need, Streams
from engine.model.vilbert import ViLBERT
from engine.ranges import span
from kernels.masked_lm_loss import masked_lm_loss
from kernels.masked_region_loss import masked_region_loss
from kernels.soft_label_bce import soft_label_bce
from pipelines.batch import (
    Batch,
    ChoiceTarget,
    ClassTarget,
    MaskedTarget,
    OptionTarget,
    RegionTarget,
    SoftLabelTarget,
)

ACCEPTED_IOU = 0.5
"""A region counts as found above this IoU with the true box (spec section 2)."""

LossAndScore = tuple[Tensor, Tensor]


def loss_and_score(logits: Tensor, batch: Batch) -> LossAndScore:
    """(loss, score per example [B]) of a head's logits; the type of the batch's target decides.

    A dummy example at the batch's end has logits, but no part in the loss, and no score.
    """
    return _KINDS[type(batch.target)](logits.float(), batch.target, batch)


def _soft_labels(logits: Tensor, target: SoftLabelTarget, batch: Batch) -> LossAndScore:
    return soft_label_bce(_of_examples(logits, batch), target.offsets, target.labels, target.scores)


def _options(logits: Tensor, target: OptionTarget, batch: Batch) -> LossAndScore:
    """Softmax cross-entropy over an example's options. A tie is wrong: a constant model must not score 100 %."""
    logits = _of_examples(logits, batch).view(target.index.numel(), -1)
    loss = F.cross_entropy(logits, target.index)
    right = logits.detach().gather(1, target.index[:, None])
    others = logits.detach().scatter(1, target.index[:, None], float("-inf")).amax(1)
    return loss, (right[:, 0] > others).float()


def _regions(logits: Tensor, target: RegionTarget, batch: Batch) -> LossAndScore:
    """Binary cross-entropy summed over an example's region rows; right if the arg-max row's IoU is above 0.5."""
    real = _of_entries(target.scores, target.cu_regions, batch)
    loss = F.binary_cross_entropy_with_logits(logits, target.scores, real, reduction="sum") / batch.examples
    best = ragged_argmax(logits.detach(), target.cu_regions.long())[: batch.examples]
    return loss, (target.scores[best] > ACCEPTED_IOU).float()


def _choices(logits: Tensor, target: ChoiceTarget, batch: Batch) -> LossAndScore:
    """The same over an example's options only; right if the arg-max option is the arg-max target."""
    chosen = option_logits(logits, target, batch)
    real = _of_entries(target.scores, target.offsets, batch)
    loss = F.binary_cross_entropy_with_logits(chosen, target.scores, real, reduction="sum") / batch.examples
    right = ragged_argmax(chosen.detach(), target.offsets) == ragged_argmax(target.scores, target.offsets)
    return loss, right[: batch.examples].float()


def option_logits(logits: Tensor, target: ChoiceTarget, batch: Batch) -> Tensor:
    """The logits of the region rows that are options, in the order of `target.rows`, out of those of all region rows."""
    lengths = batch.cu_images.diff().long()[batch.pair_image]
    pair_start = lengths.cumsum(0) - lengths
    return logits[pair_start.repeat_interleave(target.offsets.diff(), output_size=target.rows.numel()) + target.rows]


def _classes(logits: Tensor, target: ClassTarget, batch: Batch) -> LossAndScore:
    """Binary cross-entropy against one-hot, mean over classes and examples; class -1 is all zeros and never right."""
    logits = _of_examples(logits, batch)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    one_hot = (target.index[:, None] == classes).float()  # F.one_hot asks for the largest class on a CPU
    loss = F.binary_cross_entropy_with_logits(logits, one_hot)
    return loss, (logits.detach().argmax(-1) == target.index).float()


_KINDS: dict[type, Callable[..., LossAndScore]] = {
    SoftLabelTarget: _soft_labels,
    OptionTarget: _options,
    RegionTarget: _regions,
    ChoiceTarget: _choices,
    ClassTarget: _classes,
}


def _of_examples(logits: Tensor, batch: Batch) -> Tensor:
    """The logits without those of the dummy example, which has as many rows as any other."""
    return logits[: len(logits) - len(logits) // (batch.examples + 1)] if batch.padding else logits


def _of_entries(entries: Tensor, offsets: Tensor, batch: Batch) -> Tensor | None:
    """Weights of a ragged target's entries: 1 for those of examples, 0 for the dummy's; None where there is no dummy."""
    if not batch.padding:
        return None
    return (torch.arange(entries.numel(), device=entries.device) < offsets[batch.examples]).to(entries.dtype)


def ragged_argmax(values: Tensor, offsets: Tensor) -> Tensor:
    """int64 [n]: place of the first largest of values[offsets[i]:offsets[i + 1]], as an index into `values`."""
    lengths = offsets.diff()
    item = torch.arange(lengths.numel(), device=values.device).repeat_interleave(lengths, output_size=values.numel())
    largest = torch.full_like(lengths, float("-inf"), dtype=values.dtype)
    largest = largest.scatter_reduce(0, item, values, "amax")
    places = torch.arange(values.numel(), device=values.device)
    places = places.masked_fill(values < largest[item], values.numel())
    first = torch.full_like(lengths, values.numel()).scatter_reduce(0, item, places, "amin")
    return first.clamp(max=values.numel() - 1)


def pretraining_losses(
    model: ViLBERT, batch: Batch, random: Randomness
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """((masked words, masked regions, alignment), score [P]), paper section 3.1.

    Every pair takes part in alignment, and scores 1 where it is told right; what is hidden of a pair without its own caption
    is not asked for (the target names none of it). A loss over nothing is 0.
    """
    target, heads = batch.target, model.pretraining
    assert isinstance(target, MaskedTarget) and heads is not None
    with span("forward"):
        streams = model.trunk(batch, Need.ALL, random)
    with span("loss"):
        return _masked_losses(model, heads, target, streams, random)


def _masked_losses(
    model: ViLBERT, heads: PretrainingHeads, target: MaskedTarget, streams: Streams, random: Randomness
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    w = heads.fields()
    words = model.trunk.text_embedding.fields()["words"]
    assert streams.text is not None
    text = heads.transform(streams.text[target.word_rows], "words")
    image = heads.transform(streams.image[target.region_rows], "regions")
    word_loss = masked_lm_loss(text, words, w["decoder_bias"], target.word_labels)
    region_loss = masked_region_loss(image, w["classes"], w["classes_bias"], target.region_target)
    pooled = model.trunk.pooled(streams, random, pretraining=True)
    matches = F.linear(pooled, w["align"], w["align_bias"]).float()
    alignment = F.cross_entropy(matches, target.unmatched)
    score = (matches.detach().argmax(-1) == target.unmatched).float()
    return (word_loss, region_loss, alignment), score


@dataclass(frozen=True)
class Outcome:
    """What a model makes of a batch."""

    loss: Tensor
    """float32 scalar, with a gradient where there is one."""
    score: Tensor
    """float32 [B]."""
    parts: tuple[Tensor, ...] = ()
    """Where the loss is a sum, its parts (`engine.tasks.LOSS_PARTS` has their names)."""


def outcome(model: ViLBERT, batch: Batch, head: str, random: Randomness, share: bool = True) -> Outcome:
    """Forward and loss of one batch, by what it asks for."""
    batch = batch.with_features()
    if isinstance(batch.target, MaskedTarget):
        parts, score = pretraining_losses(model, batch, random)
        return Outcome(torch.stack(parts).sum(), score, parts)
    with span("forward"):
        logits = model(batch, head, random, share)
    with span("loss"):
        loss, score = loss_and_score(logits, batch)
    return Outcome(loss, score)
