"""NLVR2: JSON lines, one statement about two photos each; and its predecessor NLVR, one drawing each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.examples import Example, Label
from pipelines.identity import image_key
from pipelines.readers.records import Record, line_records

_CLASSES = {"false": 0, "true": 1}


def read(*, statements: Sequence[Path]) -> Iterator[Example]:
    """One example per statement with its left and right image; no label (hidden test) gives target None.

    An identifier is `<split>-<set>-<pair>-<sentence>`: its images are `<all but the last field>-img0` and `-img1`, and
    `group` joins the pairs that one sentence was written for (the published consistency).
    Raises `BadInput` naming file, line and key.
    """
    for record in line_records(statements):
        identifier = record.text("identifier")
        fields = identifier.rsplit("-", 3)
        if len(fields) != 4:
            raise record.bad(f"identifier {identifier!r}", "expected <split>-<set>-<pair>-<sentence>")
        split, images_set, _, sentence = fields
        pair = identifier.rpartition("-")[0]
        images = image_key(f"{pair}-img0"), image_key(f"{pair}-img1")
        yield Example(identifier, record.text("sentence"), images, _label(record), f"{split}-{images_set}-{sentence}")


def read_nlvr1(*, statements: Sequence[Path]) -> Iterator[Example]:
    """NLVR 1: one example per statement, its one image named by the identifier. Raises `BadInput` as `read`."""
    for record in line_records(statements):
        identifier = record.text("identifier")
        yield Example(identifier, record.text("sentence"), (image_key(identifier),), _label(record))


def _label(record: Record) -> Label | None:
    """False 0, True 1 (spec section 2); NLVR 1 writes them in lower case."""
    if not record.has("label"):
        return None
    written = record.text("label")
    if written.lower() not in _CLASSES:
        raise record.bad(f"label {written!r}", "expected True or False")
    return Label(_CLASSES[written.lower()])
