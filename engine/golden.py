"""Golden folders: the published model's padded inputs, packed; its outputs, over real rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipelines.batch import (
    Batch,
    BatchTarget,
    ChoiceTarget,
    ClassTarget,
    MaskedTarget,
    OptionTarget,
    RegionTarget,
    SoftLabelTarget,
)
from pipelines.errors import BadInput

FIRST_CHOICE_ROW = 101
"""In the published layout appended boxes start at this region row (spec section 3.2)."""

_LOSS_TYPES = {
    "VL-classifier": ("vil_prediction", "answers"),
    "VL-classifier-GQA": ("vil_prediction_gqa", "answers"),
    "VL-logit": ("vil_logit", "match"),
    "V-logit": ("vision_logit", "regions"),
    "V-logit-mc": ("vision_logit", "regions"),
    "VL-binary-classifier": ("vil_binary_prediction", "paired_classes"),
    "VL-tri-classifier": ("vil_tri_prediction", "classes"),
}
"""The authors' loss types -> (head, kind)."""


@dataclass(frozen=True)
class GoldenTask:
    """One `task_<name>.safetensors`: inputs, target, logits, loss, gradients."""

    name: str
    number: int
    loss_type: str
    tensors: dict[str, Tensor]

    @property
    def head(self) -> str:
        return _LOSS_TYPES[self.loss_type][0]

    @property
    def head_kind(self) -> str:
        return _LOSS_TYPES[self.loss_type][1]

    def real_logits(self, logits: Tensor, batch: Batch) -> Tensor:
        """Our logits of what the file has logits for (the options, under a choice loss)."""
        if isinstance(batch.target, ChoiceTarget):
            pair = torch.arange(batch.n_pairs).repeat_interleave(batch.target.offsets.diff())
            return logits[batch.cu_images[:-1].long()[pair] + batch.target.rows]
        return logits

    def expected_logits(self) -> Tensor:
        """The file's logits over real rows."""
        logits, mask = self.tensors["logits"], self.tensors["image_mask"].bool()
        if self.loss_type == "V-logit":
            return logits[..., 0][mask]
        if self.loss_type == "V-logit-mc":
            return logits[..., 0][_real_choices(self.tensors)]
        return logits


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a golden file. Raises BadInput where it cannot be read or holds numbers that are not finite."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(path, f"not readable: {error}", "is it truncated?") from None
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise BadInput(f"{path}: {name}", "holds numbers that are not finite", "nothing can be compared with them")
    return tensors


def load_tasks(golden: Path, meta: dict[str, Any]) -> list[GoldenTask]:
    """Every task of the folder, in the order of `meta.json`."""
    tasks = []
    for name, row in meta["tasks"].items():
        path = golden / f"task_{name}.safetensors"
        if not path.is_file():
            raise BadInput(path, "missing, though meta.json names the task")
        if row["loss_type"] not in _LOSS_TYPES:
            raise BadInput(f"{golden / 'meta.json'}: tasks.{name}.loss_type", f"unknown: {row['loss_type']}")
        tasks.append(GoldenTask(name, row["reference_task_id"], row["loss_type"], load_tensors(path)))
    if not tasks:
        raise BadInput(golden / "meta.json", "names no task", "there is nothing to compare")
    return tasks


def task_batch(task: GoldenTask) -> Batch:
    """The packed batch of a task file; every row of the published model is one pair with items of its own."""
    t = task.tensors
    target = _TARGETS[task.loss_type](t)
    examples = t["logits"].shape[0]
    return pack_padded(task.name, t["input_ids"], t["input_mask"], t, task.number, target, examples)


def pack_padded(
    name: str,
    ids: Tensor,
    text_mask: Tensor,
    images: dict[str, Tensor],
    task_token: int | None,
    target: BatchTarget | None,
    examples: int,
    pairs: tuple[Tensor, Tensor] | None = None,
) -> Batch:
    """Drop padded rows. ids, text_mask [n, L]; images: features [m, R, F], locations [m, R, 5], image_mask [m, R]."""
    mask, image_mask = text_mask.bool(), images["image_mask"].bool()
    texts = [row[keep] for row, keep in zip(ids.long(), mask, strict=True)]
    if task_token is not None:
        token = torch.tensor([task_token])
        texts = [torch.cat((text[:1], token, text[1:])) for text in texts]
    lengths = torch.tensor([len(text) for text in texts])
    regions = image_mask.sum(1)
    pair_text, pair_image = pairs or (torch.arange(len(texts)), torch.arange(len(regions)))
    return Batch(
        task=name,
        examples=examples,
        task_token=task_token,
        token_ids=torch.cat(texts),
        cu_texts=_cumulative(lengths),
        features=images["features"][image_mask],
        boxes=images["locations"][image_mask],
        cu_images=_cumulative(regions),
        pair_text=pair_text,
        pair_image=pair_image,
        text_key=torch.arange(len(texts)),
        image_key=torch.arange(len(regions)) + len(texts),
        target=target,
        max_text=int(lengths.max()),
        max_image=int(regions.max()),
    )


def retrieval_task(tasks: list[GoldenTask]) -> GoldenTask:
    """The first retrieval task, whose head and task token the shared batch uses."""
    for task in tasks:
        if task.head_kind == "match":
            return task
    raise BadInput("shared_pairs.safetensors", "needs a retrieval task beside it", "add one, or remove the file")


def shared_batch(t: dict[str, Tensor], tasks: list[GoldenTask]) -> Batch:
    """The retrieval batch in its real layout: distinct texts and images, pairs by index."""
    number = retrieval_task(tasks).number
    return pack_padded(
        "shared", t["text_ids"], t["text_mask"], t, number, OptionTarget(t["target"]), t["target"].numel(),
        (t["pair_text"], t["pair_image"]),
    )  # fmt: skip


def pretraining_batch(t: dict[str, Tensor]) -> Batch:
    """The pretraining batch (no task token), and what is masked in it, by packed row."""
    words = t["masked_lm_labels"][t["input_mask"].bool()]
    regions = torch.cat((torch.zeros_like(t["masked_region_labels"][:, :1]), t["masked_region_labels"]), 1)
    image_mask = t["image_mask"].bool()
    selected = (regions == 1) & image_mask
    distribution = torch.cat((torch.zeros_like(t["region_target"][:, :1]), t["region_target"]), 1)
    target = MaskedTarget(
        word_rows=(words >= 0).nonzero()[:, 0],
        word_labels=words[words >= 0],
        region_rows=selected[image_mask].nonzero()[:, 0],
        region_target=distribution[selected],
        unmatched=t["unmatched"],
    )
    return pack_padded("pretraining", t["input_ids"], t["input_mask"], t, None, target, t["input_ids"].shape[0])


def _soft_labels(t: dict[str, Tensor]) -> BatchTarget:
    example, label = t["target"].nonzero(as_tuple=True)
    counts = torch.bincount(example, minlength=t["target"].shape[0])
    return SoftLabelTarget(_cumulative(counts).long(), label, t["target"][example, label])


def _regions(t: dict[str, Tensor]) -> BatchTarget:
    mask = t["image_mask"].bool()
    return RegionTarget(_cumulative(mask.sum(1)), t["target"][..., 0][mask])


def _choices(t: dict[str, Tensor]) -> BatchTarget:
    real = _real_choices(t)
    padded_row = t["choice_index"] + FIRST_CHOICE_ROW
    packed_row = (t["image_mask"].cumsum(1) - 1).gather(1, padded_row.clamp(max=t["image_mask"].shape[1] - 1))
    return ChoiceTarget(_cumulative(real.sum(1)).long(), packed_row[real], t["target"][..., 0][real])


def _real_choices(t: dict[str, Tensor]) -> Tensor:
    """bool [B, choices]: the option exists and its row is no padding."""
    row = t["choice_index"] + FIRST_CHOICE_ROW
    inside = row < t["image_mask"].shape[1]
    return inside & t["image_mask"].bool().gather(1, row.clamp(max=t["image_mask"].shape[1] - 1))


def _classes(t: dict[str, Tensor]) -> BatchTarget:
    index = t["target"].argmax(-1)
    return ClassTarget(index.masked_fill(t["target"].sum(-1) == 0, -1))


_TARGETS = {
    "VL-classifier": _soft_labels,
    "VL-classifier-GQA": _soft_labels,
    "VL-logit": lambda t: OptionTarget(t["target"]),
    "V-logit": _regions,
    "V-logit-mc": _choices,
    "VL-binary-classifier": _classes,
    "VL-tri-classifier": _classes,
}


def _cumulative(lengths: Tensor) -> Tensor:
    out = torch.zeros(lengths.numel() + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=out[1:])
    return out
