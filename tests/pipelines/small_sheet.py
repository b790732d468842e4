"""A few annotation files of five published data sets, a dozen images in all, and their data sheet. No features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

IMAGES: dict[str, dict[str, list[str]]] = {
    "coco_retrieval": {"train": ["1", "2", "3", "4"], "val": ["5"], "test": ["6", "7"]},
    "guesswhat_pointing": {"train": ["6", "70"], "val": ["9"], "test": ["2", "10"]},
    "visual_genome_qa": {"train": ["1", "2", "70"], "val": ["71"]},
    "gqa": {"train": ["3", "n161313"], "val": ["4"], "test": ["71", "1"]},
    "nlvr2": {"train": ["train-1-0", "dev-1-0", "test-1-0"], "val": ["dev-2-0"], "test": ["test-1-0"]},
}
"""Which images the files below show (NLVR2: which pairs). Visual Genome's 70 is COCO's 7, and 71 is COCO's 5;
COCO's own 70 is neither."""

LINKS = {"1": None, "2": None, "3": None, "4": None, "70": 7, "71": 5}


def build(folder: Path) -> Path:
    """Write them all; the sheet's path."""
    for name, splits in IMAGES.items():
        for split, images in splits.items():
            write(folder, name, split, images)
    records = [{"image_id": int(image), "coco_id": coco, "flickr_id": None} for image, coco in LINKS.items()]
    (folder / "image_data.json").write_text(json.dumps(records))
    (folder / "vocab.txt").write_text("")
    sheet = folder / "sheet.yaml"
    content = {
        "format": 1, "vocabulary": "vocab.txt", "links": "image_data.json", "removed": "removed.json",
        "sets": {name: _entry(name) for name in IMAGES},
    }  # fmt: skip
    sheet.write_text(yaml.safe_dump(content))
    return sheet


def _entry(name: str) -> dict[str, Any]:
    argument = {"coco_retrieval": "captions", "guesswhat_pointing": "games", "nlvr2": "statements"}
    sources = {"visual_genome_qa": "visual_genome", "gqa": "visual_genome", "nlvr2": "nlvr2"}
    files = {split: {argument.get(name, "questions"): [file_name(name, split)]} for split in IMAGES[name]}
    return {"source": sources.get(name, "coco"), "features": "none.lmdb", **files}


def file_name(name: str, split: str) -> str:
    return f"{name}_{split}.{'json' if name in ('visual_genome_qa', 'gqa') else 'jsonl'}"


def write(folder: Path, name: str, split: str, images: list[str]) -> None:
    """The annotation file of one split: two examples of every image."""
    path = folder / file_name(name, split)
    if name == "visual_genome_qa":
        qas = [{"question": "what?", "answer": "a dog."}, {"question": "who?", "answer": "a cat."}]
        records = [
            {"id": int(image), "qas": [{**qa, "qa_id": f"{image}{n}"} for n, qa in enumerate(qas)]} for image in images
        ]
        path.write_text(json.dumps(records))
    elif name == "gqa":
        asked = {f"{n}": {"imageId": image, "question": "what?", "answer": "dog"} for n, image in enumerate(images * 2)}
        path.write_text(json.dumps(asked))
    else:
        path.write_text("".join(json.dumps(_line(name, n, image)) + "\n" for n, image in enumerate(images * 2)))


def _line(name: str, number: int, image: str) -> dict[str, Any]:
    if name == "nlvr2":
        return {"identifier": f"{image}-{number}", "sentence": "two dogs", "label": "True"}
    if name == "guesswhat_pointing":
        return {"id": number, "image": {"id": int(image)}, "qas": [{"question": "a dog?", "answer": "Yes"}]}
    return {"sentences": ["a dog"], "img_path": f"COCO_val2014_{int(image):012d}.jpg"}
