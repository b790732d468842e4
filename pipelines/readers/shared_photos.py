"""Photos that several data sets annotate, one record each: captions, questions and region phrases side by side.

The form in which the fixtures of emma-heriot-watt's policy repository come out of their database. `dataset` gives
the photo's id and pixel size in each data set; boxes are in Visual Genome's pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.answers import normalise_answer
from pipelines.examples import BoxXYXY, Example, Matching, Region, SoftAnswers
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import Record, line_records, records_of

_FOLDERS = {"coco": "COCO", "visual_genome": "Visual Genome"}


def read_captions(*, photos: Sequence[Path]) -> Iterator[Example]:
    """One example per caption, id `<image>/<number>`. Raises `BadInput` naming file, record and key."""
    for record in _records(photos):
        if record.has("captions"):
            captions = record.texts("captions")
        else:
            captions = [record.text("caption")] if record.values.get("caption") else []
        image = _image(record)
        for number, caption in enumerate(captions):
            yield Example(f"{image}/{number}", caption, (image,), Matching())


def read_questions(*, photos: Sequence[Path]) -> Iterator[Example]:
    """One example per question; the whole-sentence answer, normalised, scores 1. Raises `BadInput` likewise."""
    for record in _records(photos):
        if record.has("qa_pairs"):
            pairs = list(record.records("qa_pairs"))
        else:
            pairs = [record.record("qa")] if record.values.get("qa") else []
        for qa in pairs:
            target = SoftAnswers((normalise_answer(qa.text("answer")),), (1.0,))
            yield Example(qa.name("id"), qa.text("question"), (_image(record),), target)


def read_regions(*, photos: Sequence[Path]) -> Iterator[Example]:
    """One example per region phrase, id `<image>/<number>`; boxes are scaled to the pixels of the photo that the
    features were taken from. Raises `BadInput` likewise.
    """
    for record in _records(photos):
        image = _image(record)
        for number, region in enumerate(record.records("regions") if record.values.get("regions") else ()):
            box = _scaled(region.xywh("bbox"), record)
            yield Example(f"{image}/{number}", region.text("caption"), (image,), Region((box,)))


def _records(photos: Sequence[Path]) -> Iterator[Record]:
    for path in photos:
        if path.name.removesuffix(".gz").endswith(".jsonl"):
            yield from line_records([path])
        else:
            yield from records_of(open_json(path), path)


def _source(record: Record) -> Record:
    """The data set whose photo counts: the one that the features were taken from, else Visual Genome before COCO."""
    datasets = record.record("dataset")
    if record.has("features_file"):
        folder = Path(record.text("features_file")).parent.name
        if folder not in _FOLDERS:
            raise record.bad(f"features in folder {folder!r}", f"expected one of {', '.join(_FOLDERS)}")
        return datasets.record(_FOLDERS[folder])
    return datasets.record("Visual Genome", "COCO")


def _image(record: Record) -> str:
    return image_key(_source(record).name("id"))


def _scaled(box: BoxXYXY, record: Record) -> BoxXYXY:
    drawn_on = record.record("dataset").record("Visual Genome")
    source = _source(record)
    horizontal = source.number("width") / drawn_on.number("width")
    vertical = source.number("height") / drawn_on.number("height")
    return box[0] * horizontal, box[1] * vertical, box[2] * horizontal, box[3] * vertical
