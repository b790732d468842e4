"""Flickr30k Entities: sentences with marked phrases (text files) and their boxes (XML), one file each per image."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import BoxXYXY, Example, Region
from pipelines.files import lines, open_text
from pipelines.identity import image_key
from pipelines.readers.splits import image_list

_PHRASE = re.compile(r"\[/EN#(?P<chain>[0-9]+)/(?P<kind>\S+) (?P<text>[^\[\]]*)\]")
_MARK = "[/EN#"

Boxes = dict[str, tuple[BoxXYXY, ...]]
"""Entity (coreference chain) -> its boxes."""


def read(*, sentences: Path, annotations: Path, images: Path | None = None) -> Iterator[Example]:
    """One example per phrase that has a box, id `<image>/<sentence>/<phrase>`, all boxes of its entity being right;
    `group` is the phrase's kind (people, clothing, …; the first of several).

    `sentences`, `annotations`: the folders `Sentences/` (`<image>.txt`, `[/EN#<entity>/<kind> phrase]`) and
    `Annotations/` (`<image>.xml`). `images`: a list of image ids, one a line; by default all of `sentences`.
    Phrases that are not visible or have no box are left out, as published. Raises `BadInput` naming file and line.
    """
    names = image_list(images) if images is not None else sorted(path.stem for path in sentences.glob("*.txt"))
    if not names:
        raise BadInput(sentences, "no sentence files (<image>.txt)", "name the folder Sentences of Flickr30k Entities")
    for name in names:
        boxes = _boxes(annotations / f"{name}.xml")
        for phrase, entity, example_id, kind in _phrases(sentences / f"{name}.txt"):
            if entity in boxes:
                yield Example(example_id, phrase, (image_key(name),), Region(boxes[entity]), kind)


def _phrases(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Phrase, entity, example id, kind."""
    for number, line in lines(path):
        found = list(_PHRASE.finditer(line))
        if len(found) != line.count(_MARK):
            raise BadInput(f"{path}:{number}", "a phrase mark that does not read [/EN#<entity>/<kind> phrase]")
        for index, match in enumerate(found):
            example_id = f"{image_key(path.stem)}/{number - 1}/{index}"
            yield match["text"], match["chain"], example_id, match["kind"].split("/")[0]


def _boxes(path: Path) -> Boxes:
    """Entity -> boxes. The file counts pixels from 1 (the set's own tools subtract 1 as well)."""
    boxes: dict[str, tuple[BoxXYXY, ...]] = {}
    for item in _parse(path).iter("object"):
        corners = item.find("bndbox")
        if corners is None:
            continue
        x1, y1, x2, y2 = (_pixel(path, corners, name) for name in ("xmin", "ymin", "xmax", "ymax"))
        for name in item.findall("name"):
            entity = (name.text or "").strip()
            boxes[entity] = (*boxes.get(entity, ()), (x1, y1, x2, y2))
    return boxes


def _parse(path: Path) -> ElementTree.Element:
    with open_text(path) as text:
        content = text.read()
    if "<!" in content:
        raise BadInput(path, "XML with declarations", "not read: the published files have none")
    try:
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        raise BadInput(path, f"malformed or truncated XML: {error}", "fetch it again") from None


def _pixel(path: Path, corners: ElementTree.Element, name: str) -> float:
    written = corners.findtext(name, "")
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", written.strip()):
        raise BadInput(path, f"{name} {written!r} of a bndbox is no number of pixels")
    return float(written) - 1
