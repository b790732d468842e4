"""Visual7W pointing: `dataset_v7w_pointing.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import BoxXYXY, Choice, Example
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import Record, record_of

Annotated = dict[int, dict[int, BoxXYXY]]
"""Image id -> box id -> box, ids ascending."""


def read(*, questions: Path, split: str) -> Iterator[Example]:
    """One example per question of `split` (train, val, test): which of four annotated boxes is meant.

    `questions`: {boxes: [{box_id, image_id, x, y, width, height}], images: [{image_id, split, qa_pairs: [{qa_id,
    question, answer, multiple_choices}]}]}, answers being box ids. Candidates are all boxes of the image and the four
    options stand in ascending box id, so the answer's place tells nothing.
    Raises `BadInput` naming file, record and key; an unknown box and an empty split are such.
    """
    content = record_of(open_json(questions), questions)
    annotated = _annotated_boxes(content)
    found: set[str] = set()
    for image in content.records("images"):
        found.add(image.text("split"))
        if image.text("split") == split:
            yield from _image(image, annotated.get(image.integer("image_id"), {}))
    if split not in found:
        raise BadInput(questions, f"no image of split {split!r}", f"it has {', '.join(sorted(found)) or 'none at all'}")


def _annotated_boxes(content: Record) -> Annotated:
    annotated: Annotated = {}
    for box in content.records("boxes"):
        corners = box.xywh_keys("x", "y", "width", "height")
        annotated.setdefault(box.integer("image_id"), {})[box.integer("box_id")] = corners
    return {image: dict(sorted(boxes.items())) for image, boxes in annotated.items()}


def _image(image: Record, boxes: dict[int, BoxXYXY]) -> Iterator[Example]:
    rows = {box: row for row, box in enumerate(boxes)}
    candidates = tuple(boxes.values())
    key = image_key(image.name("image_id"))
    for qa in image.records("qa_pairs"):
        answer = qa.integer("answer")
        options = sorted({answer, *qa.integers("multiple_choices")})
        for box in options:
            if box not in rows:
                raise qa.bad(f"box {box} is none of the {len(rows)} boxes of image {image.name('image_id')}")
        target = Choice(candidates, tuple(rows[box] for box in options), options.index(answer))
        yield Example(qa.name("qa_id"), qa.text("question"), (key,), target)
