"""Conceptual Captions: the published TSV, caption and address."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import Example, Matching
from pipelines.files import lines


def read(*, captions: Path) -> Iterator[Example]:
    """One example per line `caption<TAB>address`, more columns are ignored.

    The file names no images: id and image key are the line's number from 0, as downloaders of the set number them.
    Raises `BadInput` naming file and line for one without a caption or without a tab.
    """
    for number, line in lines(captions):
        caption, tab, _ = line.partition("\t")
        if not tab or not caption.strip():
            raise BadInput(f"{captions}:{number}", "expected caption<TAB>address", "is it the published TSV?")
        yield Example(str(number - 1), caption, (str(number - 1),), Matching())
