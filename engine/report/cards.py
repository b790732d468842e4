"""Examples as cards: what was asked, what the model says, what is true, and whether the two agree.

A card has one form for all tasks: pictures with boxes, a text, bars of scores. How it is filled is told by the task's loss.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from engine.asking import Answer, ask
from engine.images import Pictures, stored
from engine.losses import ACCEPTED_IOU
from engine.report.pictures import Album, Shown
from engine.tasks import LossKind, TaskRow
from engine.trained import Trained
from pipelines.boxes import iou_inclusive
from pipelines.examples import BoxXYXY, Choice, Example, Label, Region, SoftAnswers

RIGHT_SCORE = 0.5
"""A soft score from which on an answer is shown as right; in the measured score it counts as what it is."""
_TURN = re.compile(r"start (.*?) answer (.*?) stop\s*")
"""A question and its answer, as dialogues are published."""
TOP = 5
"""Bars of an answer, and retrieved images."""
OTHERS = 12
"""Regions that are drawn beside those that matter: the next best, or, where there is no picture, the detector's first."""


@dataclass(frozen=True)
class Box:
    """A rectangle on a picture, in the picture's pixels."""

    xyxy: BoxXYXY
    role: str
    """true, right (predicted, and it is), wrong (predicted, and it is not), other."""
    weight: float = 1.0
    """Of a box that is shaded: how much, 0 to 1."""


@dataclass(frozen=True)
class View:
    """A picture of a card."""

    shown: Shown
    boxes: tuple[Box, ...] = ()
    caption: str = ""
    role: str = ""
    """of a retrieved image: true, wrong."""


@dataclass(frozen=True)
class Bar:
    """One thing that the model may say, and how much it says so."""

    label: str
    share: float
    role: str
    """true or other; the first one is what the model says."""


@dataclass(frozen=True)
class Card:
    """One example."""

    example: Example
    text: str
    """As people read it."""
    right: bool
    views: tuple[View, ...]
    bars: tuple[Bar, ...] = ()
    truth: str = ""
    """The true answer in words."""
    said: str = ""
    """The model's, in words."""


@dataclass(frozen=True)
class Gallery:
    """What cards are made from."""

    trained: Trained
    album: Album
    pool: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Of each retrieval task, the keys of the images that are searched."""


def card(gallery: Gallery, row: TaskRow, example: Example) -> Card:
    """The card of an example that has an answer. Raises BadInput as `engine.asking.ask` does."""
    made = _CARDS[row.loss](gallery, row, example)
    return replace(made, text=_TURN.sub(r"\1 \2. ", made.text).strip())


def can_show(row: TaskRow) -> bool:
    """Whether there are cards for this kind of task."""
    return row.loss in _CARDS


def _answered(gallery: Gallery, row: TaskRow, example: Example) -> Card:
    target = example.target
    assert isinstance(target, SoftAnswers)
    vocabulary = gallery.trained.answers[row.head]
    names = (name if isinstance(name, str) else vocabulary.answer(name) for name in target.answers)
    scores = dict(zip(names, target.scores, strict=True))
    pictures, answers = _asked(gallery, row, example)
    accepted = {name for name, score in scores.items() if score >= RIGHT_SCORE}
    bars = tuple(Bar(a.label, a.probability, "true" if a.label in accepted else "other") for a in answers[:TOP])
    best = _best_first(scores)
    truth = ", ".join(name if score == 1 else f"{name} ({score:.1f})" for name, score in best[:TOP])
    truth += ", …" if len(best) > TOP else ""
    views = (_view(gallery, pictures, example.images[0]),)
    return Card(example, example.text, answers[0].label in accepted, views, bars, truth or "none in the vocabulary",
                answers[0].label)  # fmt: skip


def _best_first(scores: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(scores.items(), key=lambda item: -item[1])


def _retrieved(gallery: Gallery, row: TaskRow, example: Example) -> Card:
    own = example.images[0]
    pictures = stored(gallery.trained, row.name, tuple(dict.fromkeys((*gallery.pool[row.name], own))))
    answers = ask(gallery.trained, row.name, [example.text], pictures)
    place = next(place for place, answer in enumerate(answers, 1) if answer.label == own)
    tied = sum(answer.logit == answers[0].logit for answer in answers) > 1
    views = [_ranked(gallery, pictures, rank, answer, own) for rank, answer in enumerate(answers[:TOP], 1)]
    if place > TOP:
        views.append(_ranked(gallery, pictures, place, answers[place - 1], own))
    said = f"the true image comes {_ordinal(place)} of {len(answers)}"
    return Card(example, example.text, place == 1 and not tied, tuple(views), said=said)


def _ranked(gallery: Gallery, pictures: Pictures, rank: int, answer: Answer, own: str) -> View:
    role = "true" if answer.label == own else "wrong" if rank == 1 else ""
    return _view(gallery, pictures, answer.label, f"{rank}. {_percent(answer.probability)}", role)


def _grounded(gallery: Gallery, row: TaskRow, example: Example) -> Card:
    target = example.target
    assert isinstance(target, Region)
    pictures, answers = _asked(gallery, row, example)
    best = answers[0]
    assert best.box is not None
    overlap = float(iou_inclusive([best.box], target.boxes).max())
    right = overlap > ACCEPTED_IOU
    boxes = [Box(answer.box, "other") for answer in answers[1 : 1 + OTHERS] if answer.box and answer.index]
    boxes += [Box(box, "true") for box in target.boxes] + [Box(best.box, "right" if right else "wrong")]
    view = View(gallery.album.show(pictures.store, example.images[0]), tuple(boxes))
    said = f"IoU {overlap:.2f}, score {_percent(best.probability)}"
    return Card(example, example.text, right, (view,), said=said)


def _chosen(gallery: Gallery, row: TaskRow, example: Example) -> Card:
    target = example.target
    assert isinstance(target, Choice)
    pictures = stored(gallery.trained, row.name, example.images)
    answers = ask(gallery.trained, row.name, [example.text], pictures, choices=target.choices)
    best, true = answers[0], target.choices[target.answer]
    assert best.box is not None
    # Boxes that are alike: the first that is most like the answer counts, as in the score (spec section 2).
    overlaps = iou_inclusive([target.candidates[choice] for choice in target.choices], [target.candidates[true]])
    right = best.index == target.choices[int(overlaps[:, 0].argmax())]
    boxes = [Box(target.candidates[choice], "other") for choice in target.choices if choice not in (true, best.index)]
    boxes += [Box(target.candidates[true], "true"), Box(best.box, "right" if right else "wrong")]
    view = View(gallery.album.show(pictures.store, example.images[0]), tuple(boxes))
    said = f"of {len(target.choices)} boxes, score {_percent(best.probability)}"
    return Card(example, example.text, right, (view,), said=said)


def _classed(gallery: Gallery, row: TaskRow, example: Example) -> Card:
    target = example.target
    assert isinstance(target, Label)
    head = gallery.trained.table.head(row)
    pictures, answers = _asked(gallery, row, example)
    bars = [Bar(a.label, a.probability, "true" if a.index == target.index else "other") for a in answers]
    sides = ("left", "right") if len(example.images) == 2 else ("",) * len(example.images)
    views = [_view(gallery, pictures, key, side) for key, side in zip(example.images, sides, strict=True)]
    truth = head.label(target.index) if target.index >= 0 else "none"
    right = answers[0].index == target.index
    return Card(example, example.text, right, tuple(views), tuple(bars), truth, answers[0].label)


_CARDS: dict[LossKind, Callable[[Gallery, TaskRow, Example], Card]] = {
    "soft_labels": _answered,
    "options": _retrieved,
    "regions": _grounded,
    "choices": _chosen,
    "classes": _classed,
}
"""How a card is filled, by the loss."""


def _view(gallery: Gallery, pictures: Pictures, key: str, caption: str = "", role: str = "") -> View:
    """The picture alone, or its regions where there is no picture."""
    shown = gallery.album.show(pictures.store, key)
    boxes: tuple[Box, ...] = ()
    if shown.file is None:
        found = pictures.store.record(key).boxes[:OTHERS].tolist()
        boxes = tuple(Box((x1, y1, x2, y2), "other") for x1, y1, x2, y2 in found)
    return View(shown, boxes, caption, role)


def _asked(gallery: Gallery, row: TaskRow, example: Example) -> tuple[Pictures, list[Answer]]:
    pictures = stored(gallery.trained, row.name, example.images)
    return pictures, ask(gallery.trained, row.name, [example.text], pictures)


def spread(examples: Sequence[Example], count: int) -> list[Example]:
    """At most `count` examples, evenly from the whole split."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).round().astype(int)
    return [examples[place] for place in np.unique(places)]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _ordinal(place: int) -> str:
    ending = "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"
