"""Visual Genome region descriptions: phrases with one box each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.examples import Example, Region
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import records_of


def read(*, regions: Sequence[Path]) -> Iterator[Example]:
    """One example per phrase of `region_descriptions.json`, a list of {id, regions: [{region_id, phrase, x, y, width,
    height}]} per image. Raises `BadInput` naming file, record and key.
    """
    for path in regions:
        for image in records_of(open_json(path), path):
            key = image_key(image.name("id", "image_id"))
            for region in image.records("regions"):
                box = region.xywh_keys("x", "y", "width", "height")
                yield Example(region.name("region_id"), region.text("phrase"), (key,), Region((box,)))
