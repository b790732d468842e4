"""GuessWhat?!: one JSON game a line, as pointing: the whole dialogue, then which of the image's objects is meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import BoxXYXY, Choice, Example
from pipelines.identity import image_key
from pipelines.pickles import load_pickle
from pipelines.readers.records import Record, line_records, record_of

Boxes = dict[int, BoxXYXY]
"""Object id -> box."""


@dataclass(frozen=True, slots=True)
class _Game:
    id: str
    text: str
    image: str
    status: str
    objects: tuple[int, ...]
    answer: int | None


def read(
    *,
    games: Sequence[Path],
    image_objects: Path | None = None,
    object_boxes: Path | None = None,
    successful_only: bool = False,
) -> Iterator[Example]:
    """One example per game; `group` is its outcome. Lost and broken-off games stay in, as published, unless told.

    `games`: `guesswhat.*.jsonl` with {id, image: {id}, object_id, objects: [{id, bbox}], qas: [{question, answer}]};
    the older spelling `dialogue_id`, `picture`, `picture_id` is read too. Candidates are all objects of the image over
    all its games, in ascending object id. A game without object list (dialogue statistics) has target None.
    `image_objects` and `object_boxes`: the authors' `image_bbox_list.pkl` {image: {bboxes: object ids}} and
    `bboxes_dict.pkl` {object: box}, used as x1, y1, x2, y2 as the authors do; then these are the candidates.
    Raises `BadInput` naming file, record and key.
    """
    if (image_objects is None) != (object_boxes is None):
        raise BadInput("image_objects", "needs object_boxes beside it, and the other way round", "name both or none")
    boxes: dict[str, Boxes] = {}
    played = [_game(record, boxes) for record in line_records(games)]
    if image_objects and object_boxes:
        boxes = _cached_boxes(image_objects, object_boxes)
    boxes = {image: dict(sorted(of_image.items())) for image, of_image in boxes.items()}
    for game in played:
        if game.status == "success" or not successful_only:
            yield Example(game.id, game.text, (game.image,), _target(game, boxes.get(game.image, {})), game.status)


def _game(record: Record, boxes: dict[str, Boxes]) -> _Game:
    """The game, its objects' boxes added to `boxes`."""
    image = _image(record)
    text = "".join(f"start {qa.text('question')} answer {qa.text('answer')} stop " for qa in record.records("qas"))
    objects: list[int] = []
    answer = None
    if record.has("objects") or record.has("object_id"):
        answer = record.integer("object_id")
        for item in record.records("objects"):
            objects.append(item.integer("id"))
            boxes.setdefault(image, {})[objects[-1]] = item.xywh("bbox")
        if answer not in objects:
            raise record.bad(f"object_id {answer} is none of its {len(objects)} objects")
    status = record.text("status") if record.has("status") else ""
    return _Game(record.name("id", "dialogue_id", "dialogue"), text, image, status, tuple(sorted(set(objects))), answer)


def _image(record: Record) -> str:
    if record.has("image") or record.has("picture"):
        return image_key(record.record("image", "picture").name("id"))
    return image_key(record.name("image_id", "picture_id"))


def _target(game: _Game, boxes: Boxes) -> Choice | None:
    if game.answer is None:
        return None
    rows = {item: row for row, item in enumerate(boxes)}
    if not rows.keys() >= set(game.objects):
        unknown = sorted(set(game.objects) - rows.keys())
        raise BadInput(f"game {game.id}", f"object {unknown[0]} is no candidate of image {game.image}")
    return Choice(tuple(boxes.values()), tuple(rows[item] for item in game.objects), game.objects.index(game.answer))


def _cached_boxes(image_objects: Path, object_boxes: Path) -> dict[str, Boxes]:
    every = record_of(load_pickle(object_boxes), object_boxes)
    listed = record_of(load_pickle(image_objects), image_objects)
    boxes: dict[str, Boxes] = {}
    for image in listed.values:
        objects = listed.record(image).integers("bboxes")
        boxes[image_key(image)] = {item: every.box(item) for item in objects}
    return boxes
