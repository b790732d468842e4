"""RefCOCO, RefCOCO+ and RefCOCOg in the REFER layout: `refs(*).p` and `instances.json`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import BadInput
from pipelines.examples import BoxXYXY, Example, Region
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.pickles import load_pickle
from pipelines.readers.records import record_of, records_of
from pipelines.readers.soft_answers import is_pickle


def read(*, refs: Path, instances: Path, split: str) -> Iterator[Example]:
    """One example per expression of `split`, id `<ref id>/<sentence id>`; `group` is the split as the file spells it.

    `refs`: the published pickle, or the same list of dictionaries as JSON (told by the suffix). `instances`: COCO's
    boxes, x, y, width, height. Split `test` takes every split whose name contains it (testA and testB), as published.
    Raises `BadInput` naming file, record and key; a split without expressions and an unknown `ann_id` are such.
    """
    boxes = _boxes(instances)
    found: set[str] = set()
    empty = True
    for ref in records_of(_load(refs), refs):
        ref_split = ref.text("split")
        found.add(ref_split)
        if ref_split != split and not (split == "test" and "test" in ref_split):
            continue
        box = boxes.get(ref.integer("ann_id"))
        if box is None:
            raise ref.bad(f"ann_id {ref.integer('ann_id')} is not in {instances}", "name the instances of the same set")
        image = image_key(ref.name("image_id"))
        for sentence in ref.records("sentences"):
            empty = False
            name = f"{ref.name('ref_id')}/{sentence.name('sent_id')}"
            yield Example(name, sentence.text("raw", "sent"), (image,), Region((box,)), ref_split)
    if empty:
        raise BadInput(refs, f"no expression of split {split!r}", f"it has {', '.join(sorted(found)) or 'none at all'}")


def _load(refs: Path) -> Any:
    return load_pickle(refs) if is_pickle(refs) else open_json(refs)


def _boxes(instances: Path) -> dict[int, BoxXYXY]:
    annotations = record_of(open_json(instances), instances).records("annotations")
    return {annotation.integer("id"): annotation.xywh("bbox") for annotation in annotations}
