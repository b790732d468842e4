"""The losses: answers of VQA and GQA, and pretraining's masked regions and words, beside the form that the authors run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from bench import kernel_peers as peers
from bench.kernel_case import STREAMS, Call, Case, Maker, Setting, work_of
from kernels.masked_lm_loss import masked_lm_loss
from kernels.masked_region_loss import masked_region_loss
from kernels.soft_label_bce import soft_label_bce

REGION_CLASSES, CAPTION_REGIONS, CAPTION_WORDS, MASKED = 1601, 37, 17, 0.15
"""Pretraining: classes of regions, rows of an image and of a caption, and the share of them that is masked."""

_EXAMPLES, _LABELS = 16, 5
_ANSWERS = {"vqa": 3129, "gqa": 1533}


def soft_label_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    n = _EXAMPLES * _LABELS
    for task, classes in _ANSWERS.items():
        logits = make.leaf(_EXAMPLES, classes)
        offsets = torch.arange(0, n + 1, _LABELS, device=make.device)
        labels = torch.cat([make.choice(classes, _LABELS) for _ in range(_EXAMPLES)])
        scores = make.uniform(n)
        dense = torch.zeros(_EXAMPLES, classes, device=make.device)
        dense.scatter_(1, labels.view(_EXAMPLES, _LABELS), scores.view(_EXAMPLES, _LABELS))
        ours = Call(partial(soft_label_bce, offsets=offsets, labels=labels, scores=scores), (logits,))
        others: dict[str, Callable[[], Call]] = {
            "torch": partial(Call, partial(peers.eager_soft_label_bce, target=dense), (logits,))
        }
        work = work_of((logits, offsets, labels, scores), scores[:1], (logits,))
        shape = f"{_EXAMPLES} examples × {classes} answers, {_LABELS} labels each"
        yield Case("soft_label_bce", task, shape, make.dtype, work, ours, others)


def masked_region_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    n, width = setting.captions * CAPTION_REGIONS, STREAMS["image"][0]
    rows = make.choice(n, round(MASKED * n))
    m = len(rows)
    leaves = hidden, weight, bias = make.leaf(n, width), make.weight(REGION_CLASSES, width), make.weight(REGION_CLASSES)
    target = (3 * make.normal(n, REGION_CLASSES, dtype=torch.float32)).softmax(-1)
    of_rows = target[rows]
    of_all = torch.zeros(n, device=make.device).index_fill_(0, rows, 1.0)
    others: dict[str, Callable[[], Call]] = {
        "torch": partial(Call, partial(peers.eager_region_loss, target=of_rows, rows=rows), leaves),
        "torch_all_rows": partial(Call, partial(peers.all_regions_loss, target=target, masked=of_all), leaves),
        "liger": partial(Call, partial(peers.liger_region_loss, target=of_rows, rows=rows), leaves),
    }
    # The gradient of the rows that are not masked is written too: zeros.
    work = work_of((hidden[:m], weight, bias, of_rows, rows), bias[:1], leaves, flops=2 * m * weight.numel())
    ours = Call(partial(masked_region_loss, target=of_rows, rows=rows), leaves)
    shape = f"{m} masked of {n} regions × {width}, {REGION_CLASSES} classes"
    yield Case("masked_region_loss", "pretraining", shape, make.dtype, work, ours, others)


def masked_word_cases(setting: Setting, make: Maker) -> Iterator[Case]:
    width, m = STREAMS["text"][0], round(MASKED * setting.captions * CAPTION_WORDS)
    leaves = make.leaf(m, width), make.weight(setting.words, width), make.weight(setting.words)
    labels = make.integers(setting.words, m)
    others: dict[str, Callable[[], Call]] = {
        "torch": partial(Call, partial(peers.eager_word_loss, labels=labels), leaves),
        "liger": partial(Call, partial(peers.liger_word_loss, labels=labels), leaves),
    }
    work = work_of((*leaves, labels), labels[:1], leaves, flops=2 * m * setting.words * width)
    ours = Call(partial(masked_lm_loss, labels=labels), leaves)
    yield Case(
        "masked_lm_loss", "pretraining", f"{m} words × {width} of {setting.words}", make.dtype, work, ours, others
    )
