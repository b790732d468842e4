"""Which examples a page shows: of each task some that the model gets right and some that it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.asking import batch_of
from engine.images import Pictures, stored
from engine.report.attention import last_bridge
from engine.report.cards import Box, Card, Gallery, View, can_show, card, spread
from engine.report.pictures import Album
from engine.tasks import TaskRow
from engine.trained import Trained
from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.progress import Show

POOL = 50
"""Images that a caption is searched in, at most."""
WORDS = 6
"""Words of a text that are shown with where they look, at most."""
EVEN = 3
"""A region is shaded in full from so many times an even share of a word's attention on: even attention stays pale."""
SHADED = 12
"""Regions that are shaded, the strongest ones: a detector's hundred lie over each other."""


@dataclass(frozen=True)
class Settings:
    """How much a page shows."""

    split: str = "val"
    asked: int = 40
    """Examples of each task that are asked, evenly from the whole split."""
    right: int = 2
    wrong: int = 2
    """Cards of each task."""


@dataclass(frozen=True)
class TaskCards:
    """The cards of one task."""

    row: TaskRow
    cards: tuple[Card, ...]
    asked: int
    right: int
    """Of those asked."""
    pool: int
    """Images that each caption was searched in; 0 for other tasks."""
    note: str = ""
    """Why there is none."""


@dataclass(frozen=True)
class Look:
    """Where the words of one text look."""

    title: str
    text: str
    views: tuple[View, ...]
    """One for each word, regions shaded by how much it looks there."""


def task_cards(trained: Trained, album: Album, settings: Settings, show: Show) -> list[TaskCards]:
    """For every task of the model. What cannot be shown says why."""
    found = []
    for place, row in enumerate(trained.rows.values()):
        show("pictures", place, len(trained.rows))
        if can_show(row):
            found.append(_of_task(trained, album, row, settings))
    show("pictures", len(trained.rows), len(trained.rows))
    return found


def _of_task(trained: Trained, album: Album, row: TaskRow, settings: Settings) -> TaskCards:
    try:
        examples = answered(trained, row, settings.split)
        pool = _pool(examples) if row.loss == "options" else ()
        gallery = Gallery(trained, album, {row.name: pool})
        cards = [card(gallery, row, example) for example in spread(examples, settings.asked)]
    except BadInput as error:
        return TaskCards(row, (), 0, 0, 0, str(error))
    chosen = _chosen(cards, settings)
    return TaskCards(row, tuple(chosen), len(cards), sum(card.right for card in cards), len(pool))


def answered(trained: Trained, row: TaskRow, split: str) -> list[Example]:
    """The examples of a split that a run would read, with their answers. Raises BadInput where the split publishes none."""
    kept = set(trained.data(row.name, split).ids.tolist())
    examples = [
        example
        for example in trained.sheet.examples(row.name, split, row.reader)
        if example.id in kept and example.target is not None
    ]
    if not examples:
        where = f"{trained.sheet.path}: sets.{row.name}.{split}"
        raise BadInput(where, "its annotations hold no answers", "another split: --split val")
    return examples


def _pool(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(example.images[0] for example in examples))[:POOL]


def _chosen(cards: Sequence[Card], settings: Settings) -> list[Card]:
    """Right ones, then wrong ones, each with another picture as far as there are any. What one kind lacks, the other has."""
    wanted = {True: settings.right, False: settings.wrong}
    for right in (True, False):
        there = sum(card.right is right for card in cards)
        wanted[not right] += max(0, wanted[right] - there)
    found: list[Card] = []
    for right in (True, False):
        of_kind = [card for card in cards if card.right is right]
        seen: set[str] = set()
        fresh: list[Card] = []
        again: list[Card] = []
        for one in of_kind:
            (again if one.views[0].shown.key in seen else fresh).append(one)
            seen.add(one.views[0].shown.key)
        found += [*fresh, *again][: wanted[right]]
    return found


def looks(trained: Trained, album: Album, shown: Sequence[TaskCards]) -> list[Look]:
    """Where the words of one right example look, one task of each head that reads one image and one text."""
    found: list[Look] = []
    heads: set[str] = set()
    for task in shown:
        right = [card for card in task.cards if card.right]
        if right and not task.pool and task.row.images == 1 and task.row.head not in heads:
            heads.add(task.row.head)
            found.append(look(trained, album, task.row, right[0].example))
    return found


def look(trained: Trained, album: Album, row: TaskRow, example: Example) -> Look:
    """Text to regions in the last bridge, the mean over its heads. The share of the whole-image row is in the caption."""
    pictures = stored(trained, row.name, example.images)
    batch = batch_of(trained, row.name, [example.text], pictures)
    weights = last_bridge(trained, batch).weights.mean(0)
    shown = album.show(pictures.store, example.images[0])
    boxes = _boxes(pictures, example.images[0], weights.shape[1] - 1)
    first = 1 if trained.token(row.name) is None else 2  # [CLS], the task token
    views = []
    for place, piece in _words(trained, batch.token_ids.tolist(), first):
        shares = weights[place, 1:].tolist()
        full = max(*shares, EVEN / weights.shape[1])
        strongest = sorted(zip(shares, boxes, strict=True), reverse=True)[:SHADED]
        shaded = tuple(Box(box, "look", share / full) for share, box in strongest)
        views.append(View(shown, shaded, caption=f"{piece}: {100 * max(shares):.0f} %"))
    return Look(row.title, example.text, tuple(views))


def _boxes(pictures: Pictures, key: str, count: int) -> list[tuple[float, float, float, float]]:
    """Of the image's region rows but the global one: what was detected, then what was annotated."""
    annotated = [] if pictures.candidates is None else pictures.candidates.record(key).boxes.tolist()
    detected = pictures.store.record(key).boxes.tolist()[: count - len(annotated)]
    return [(x1, y1, x2, y2) for x1, y1, x2, y2 in (*detected, *annotated)]


def _words(trained: Trained, token_ids: Sequence[int], first: int) -> list[tuple[int, str]]:
    """(row, word piece) of those that have letters, the longest ones where there are too many, in their order."""
    pieces = [(row, trained.tokenizer.decode([token_ids[row]])) for row in range(first, len(token_ids) - 1)]
    lettered = [(row, piece) for row, piece in pieces if any(letter.isalnum() for letter in piece)]
    kept = sorted(lettered, key=lambda item: -len(item[1]))[:WORDS]
    return sorted(kept)


def images_folder(trained: Trained, given: Path | None) -> Path | None:
    """Where picture files are: what is given, or `images` beside the data sheet, as the embedded world has it."""
    if given is not None:
        return given
    beside = trained.sheet.root / "images"
    return beside if beside.is_dir() else None
