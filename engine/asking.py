"""One question to a trained model: a task, a text, and images from a feature store or from picture files.

The answer is read by the task's loss, which says what its logits mean; no task is known by name. A question goes the way of
a validation batch (`pipelines.packing`), so it gets the numbers that validation gets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.assembly import data_spec
from engine.images import Pictures
from engine.tasks import LossKind, TaskRow
from engine.trained import Trained
from pipelines.batch import Batch
from pipelines.datasets import TaskData
from pipelines.draft import Draft, filled
from pipelines.errors import BadInput
from pipelines.examples import BoxXYXY
from pipelines.packing import pack_texts, skeleton
from pipelines.regions import Regions

PAIRS = 64
"""(text, image) pairs that go through the model at a time."""


@dataclass(frozen=True)
class Answer:
    """One thing that the model may say."""

    label: str
    """The answer, the class, the key of the image, the caption, or which region."""
    logit: float
    probability: float
    """Of retrieval: softmax over what competes. Of all others: the sigmoid that their loss trains; they need not sum to 1."""
    index: int
    """Number of the answer or class; place among the given images or texts; row of the region within its image (0: the whole
    image), or of the annotated box."""
    box: BoxXYXY | None = None
    """Of a region, in pixels of the image."""


def ask(
    trained: Trained,
    task: str,
    texts: Sequence[str],
    pictures: Pictures,
    *,
    choices: Sequence[int] | None = None,
) -> list[Answer]:
    """All answers of the task's head, best first (of equals, the first).

    One text and the task's number of images; retrieval takes one text and any number of images, or one image and any number of
    texts. `choices`: which annotated boxes compete (rows, from 0; none: all of them). Raises BadInput.
    """
    row = trained.row(task)
    _check(trained, row, texts, pictures)
    data = _columns(trained, row, texts, pictures)
    logits, regions = [], []
    for batch, boxes in _batches(trained, data):
        logits.append(trained.logits(batch))
        regions.append(boxes)
    whole = torch.cat(logits)
    if not whole.isfinite().all():
        raise BadInput(
            trained.path, f"its logits of {task} are not finite", "the weights are damaged: take another checkpoint"
        )
    asked = _Asked(trained, row, tuple(texts), pictures, whole, regions[0], choices)
    answers = _READ[row.loss](asked)
    return sorted(answers, key=lambda answer: -answer.logit)


def _check(trained: Trained, row: TaskRow, texts: Sequence[str], pictures: Pictures) -> None:
    n_texts, n_images = len(texts), len(pictures.keys)
    if row.loss not in _READ:
        raise BadInput(row.name, "pretraining has nothing to answer", "ask another task")
    if row.loss == "options":
        if not n_texts or not n_images or (n_texts > 1 and n_images > 1):
            what = f"texts: {n_texts}, images: {n_images}"
            raise BadInput(row.name, what, "give one text and several images, or several texts and one image")
    elif n_texts != 1 or n_images != row.images:
        what = f"texts: {n_texts}, images: {n_images}"
        raise BadInput(row.name, what, f"it reads one text and {row.images} image{'s' * (row.images > 1)}")
    if not all(text.strip() for text in texts):
        raise BadInput("--text", "empty", "a question, a caption, an expression: what the task is asked about")
    width = trained.config.model.v_feature_size
    if pictures.store.feature_dim != width:
        raise BadInput(pictures.store.path, f"features of {pictures.store.feature_dim} values, the model reads {width}")


def _columns(trained: Trained, row: TaskRow, texts: Sequence[str], pictures: Pictures) -> TaskData:
    """The question as a data set without answers: one row per text."""
    spec = data_spec(row, trained.table.head(row))
    token_ids, token_offsets = trained.tokenizer.encode_batch(list(texts), spec.max_tokens)
    rows = pictures.store.index(pictures.keys)
    candidate_rows = np.full(len(pictures.store), -1, np.int32)
    if pictures.candidates is not None:
        candidate_rows[rows] = pictures.candidates.index(pictures.keys)
    return TaskData(
        spec=spec, split="asked", store=pictures.store, candidates=pictures.candidates,
        ids=np.array([str(place) for place in range(len(texts))], np.dtypes.StringDType()),
        group_names=("",), group_codes=np.zeros(len(texts), np.int32), token_ids=token_ids, token_offsets=token_offsets,
        image_rows=rows.astype(np.int32).reshape(1, -1), candidate_rows=candidate_rows,
        image_keys=np.zeros(len(pictures.store), np.int64),  # for dropout, which is off
        target=None, pool=None,
    )  # fmt: skip


def batch_of(trained: Trained, task: str, texts: Sequence[str], pictures: Pictures) -> Batch:
    """The question as one batch on the host: every text with every image. Raises BadInput as `ask` does."""
    row = trained.row(task)
    _check(trained, row, texts, pictures)
    data = _columns(trained, row, texts, pictures)
    return _batch(trained, data, np.arange(len(texts)), data.image_rows[0].astype(np.int64))[0]


def _batches(trained: Trained, data: TaskData) -> list[tuple[Batch, NDArray[np.float32]]]:
    """Batches of at most `PAIRS` pairs, and the pixel boxes of their region rows."""
    texts, images = np.arange(len(data)), data.image_rows[0].astype(np.int64)
    found = []
    for first_text in range(0, len(texts), PAIRS):
        for first_image in range(0, len(images), PAIRS):
            part = texts[first_text : first_text + PAIRS], images[first_image : first_image + PAIRS]
            found.append(_batch(trained, data, *part))
    return found


def _batch(
    trained: Trained, data: TaskData, texts: NDArray[np.int64], images: NDArray[np.int64]
) -> tuple[Batch, NDArray[np.float32]]:
    token = trained.token(data.spec.name)
    token_ids, cu_texts = pack_texts(data, texts, token)
    regions = Regions.of(data, images)
    pair_text = np.repeat(np.arange(len(texts)), len(images))
    pair_image = np.tile(np.arange(len(images)), len(texts))
    batch = skeleton(
        data, texts, texts, token_ids, cu_texts, regions, pair_text, pair_image, None, token, trained.dtype
    )
    return filled(Draft(batch, regions)), regions.pixels()


@dataclass(frozen=True)
class _Asked:
    """A question and what the head made of it."""

    trained: Trained
    row: TaskRow
    texts: tuple[str, ...]
    pictures: Pictures
    logits: Tensor
    boxes: NDArray[np.float32]
    """float32 [region rows, 4] of the first batch's images, in pixels."""
    choices: Sequence[int] | None

    def answers(self, labels: Sequence[str], logits: Tensor, probabilities: Tensor) -> list[Answer]:
        """One for each label."""
        values = zip(labels, logits.tolist(), probabilities.tolist(), strict=True)
        return [Answer(label, logit, share, place) for place, (label, logit, share) in enumerate(values)]

    def box(self, row: int) -> BoxXYXY:
        """Of a region row."""
        x1, y1, x2, y2 = self.boxes[row].tolist()
        return x1, y1, x2, y2


def _answers(asked: _Asked) -> list[Answer]:
    vocabulary, logits = asked.trained.answers[asked.row.head], asked.logits[0]
    return asked.answers([vocabulary.answer(i) for i in range(len(vocabulary))], logits, logits.sigmoid())


def _matches(asked: _Asked) -> list[Answer]:
    logits = asked.logits.view(-1)
    labels = asked.texts if len(asked.texts) > 1 else asked.pictures.keys
    return asked.answers(labels, logits, logits.softmax(0))


def _regions(asked: _Asked) -> list[Answer]:
    logits = asked.logits
    labels = ["the whole image", *(f"region {row}" for row in range(1, len(logits)))]
    found = asked.answers(labels, logits, logits.sigmoid())
    return [Answer(a.label, a.logit, a.probability, a.index, asked.box(a.index)) for a in found]


def _choices(asked: _Asked) -> list[Answer]:
    candidates = asked.pictures.candidates
    if candidates is None:
        what = f"{asked.row.name} chooses among annotated boxes, and there are none of this image"
        raise BadInput("--image", what, "an image of the sheet's `candidates`, or a picture file with --boxes")
    count = int(candidates.counts[candidates.index(asked.pictures.keys)[0]])
    first = len(asked.logits) - count  # annotated boxes come last
    chosen = range(count) if asked.choices is None else asked.choices
    for choice in chosen:
        if not 0 <= choice < count:
            raise BadInput(f"--choices {choice}", f"the image has {count} annotated boxes, 0 to {count - 1}")
    logits = asked.logits
    return [
        Answer(f"box {c}", float(logits[first + c]), float(logits[first + c].sigmoid()), c, asked.box(first + c))
        for c in chosen
    ]


def _classes(asked: _Asked) -> list[Answer]:
    head, logits = asked.trained.table.head(asked.row), asked.logits[0]
    return asked.answers([head.label(i) for i in range(len(logits))], logits, logits.sigmoid())


_READ: dict[LossKind, Callable[[_Asked], list[Answer]]] = {
    "soft_labels": _answers,
    "options": _matches,
    "regions": _regions,
    "choices": _choices,
    "classes": _classes,
}
"""What the logits mean, by the loss that trained them."""
