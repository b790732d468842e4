"""A small retrieval set of files that mining reads, and the ways to mine it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipelines.datasets import DataSpec, TaskData, load_task
from pipelines.mine.__main__ import main
from pipelines.mine.job import Means, mine
from pipelines.sheet import load_sheet
from pipelines.store.writer import StoreWriter
from pipelines.wordpiece import SPECIAL, WordPiece

IMAGES, FEATURES, REGIONS = 150, 8, 3
WORDS = [
    f"{colour}{thing}" for colour in ("red", "blue", "old", "new") for thing in ("cat", "bus", "hat", "dog", "cup")
]
SPEC = DataSpec("pictures", "pipelines.readers.captions:read", 7, 30, 101, 1, "options", 4)

ROWS: dict[str, Any] = {
    "heads": {"match": {"options": 4}, "answer": {}},
    "tasks": {
        "pictures": {"head": "match", "reader": SPEC.reader, "number": 7, "max_tokens": 30, "max_regions": 101,
                     "loss": "options"},
        "questions": {"head": "answer", "reader": "pipelines.readers.vqa:read", "number": 1, "max_tokens": 23,
                      "max_regions": 101, "loss": "soft_labels"},
    },
}  # fmt: skip


def build(folder: Path) -> Path:
    """The sheet of a retrieval set, its images in no order, and of a set of questions that mining has no use for."""
    random = np.random.default_rng(0)
    with StoreWriter(folder / "features.lmdb", FEATURES, "float32") as writer:
        for number in range(IMAGES + 5):
            features = random.gamma(1, size=(REGIONS, FEATURES)) if number != 9 else np.zeros((REGIONS, FEATURES))
            writer.add(number, features, np.tile([0, 0, 9, 9], (REGIONS, 1)), 20, 10)
    records = [
        {"id": number, "img_path": f"{number}.jpg", "sentences": [" ".join(random.choice(WORDS, 6)) for _ in range(3)]}
        for number in random.permutation(IMAGES).tolist()
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    (folder / "rows.yaml").write_text(yaml.safe_dump(ROWS))
    split = {"captions": ["train.jsonl"]}
    sets = {
        "pictures": {"features": "features.lmdb", "train": split, "val": split},
        "questions": {"features": "features.lmdb", "train": {}, "val": {}},
    }
    path = folder / "sheet.yaml"
    path.write_text(yaml.safe_dump({"format": 1, "vocabulary": "vocab.txt", "sets": sets}))
    return path


def command(sheet: Path, *more: str) -> int:
    return main([str(sheet), "--tasks-table", str(sheet.parent / "rows.yaml"), *more])


def change(sheet: Path, **keys: Any) -> None:
    content = yaml.safe_load(sheet.read_text())
    content["sets"]["pictures"] |= keys
    sheet.write_text(yaml.safe_dump(content))


def load(sheet: Path) -> TaskData:
    loaded = load_sheet(sheet, ["pictures"])
    return load_task(SPEC, loaded, "train", WordPiece.load(loaded.vocabulary))


def run(sheet: Path, target: Path, by: str = "features", stop: int | None = None, **options: Any) -> bytes:
    """Mine in this process; `stop`: be interrupted once so many rows are done."""

    def show(what: str, done: int, total: int) -> None:
        if what == "images mined" and stop is not None and done >= stop:
            raise KeyboardInterrupt

    means = Means(options.pop("memory", 1), torch.device("cpu"), target.parent, show)
    mine(load(sheet), by, options.pop("neighbours", 7), target, means, **options)
    assert not target.with_name(target.name + ".partial").exists()
    return target.read_bytes()


def two_sets(sheet: Path) -> None:
    content = yaml.safe_load(sheet.read_text())
    content["sets"]["more"] = content["sets"]["pictures"]
    sheet.write_text(yaml.safe_dump(content))
    rows = {**ROWS["tasks"], "more": ROWS["tasks"]["pictures"]}
    (sheet.parent / "rows.yaml").write_text(yaml.safe_dump({**ROWS, "tasks": rows}))
