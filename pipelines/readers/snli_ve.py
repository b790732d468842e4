"""SNLI-VE: JSON lines, and e-SNLI-VE's CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import Example, Label
from pipelines.files import open_text
from pipelines.identity import image_key
from pipelines.readers.records import Record, line_records

_CLASSES = {"contradiction": 0, "neutral": 1, "entailment": 2, "-": -1}
_IMAGE_KEYS = ("Flikr30kID", "Flickr30K_ID", "Flickr30kID")


def read(*, pairs: Sequence[Path]) -> Iterator[Example]:
    """One example per (image, hypothesis) pair: contradiction 0, neutral 1, entailment 2, no agreement ("-") -1.

    `pairs`: `snli_ve_*.jsonl` with {pairID, Flikr30kID (sic, spellings differ, with or without .jpg), sentence2,
    gold_label}, or a CSV (told by the suffix) whose column `hypothesis` is the text.
    Raises `BadInput` naming file, line and key.
    """
    for path in pairs:
        for record in _csv(path) if ".csv" in path.suffixes else line_records([path]):
            label = record.text("gold_label")
            if label not in _CLASSES:
                raise record.bad(f"gold_label {label!r}", f"expected one of {', '.join(_CLASSES)}")
            image = image_key(record.name(*_IMAGE_KEYS))
            text = record.text("sentence2", "hypothesis")
            yield Example(record.name("pairID"), text, (image,), Label(_CLASSES[label]))


def _csv(path: Path) -> Iterator[Record]:
    with open_text(path) as text:
        rows = csv.DictReader(text, strict=True)
        try:
            for row in rows:
                values = {key: value for key, value in row.items() if key is not None and value is not None}
                yield Record(path, f"line {rows.line_num}", values)
        except csv.Error as error:
            raise BadInput(f"{path}:{rows.line_num}", f"malformed CSV: {error}", "fetch it again") from None
