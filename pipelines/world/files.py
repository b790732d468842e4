"""How annotation files are written: the same bytes for the same content, in a folder nobody reads yet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """One JSON document."""
    write_text(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def write_json_lines(path: Path, records: Iterable[Any]) -> None:
    """One JSON document a line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    """UTF-8; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def coco_name(image: int, split: str = "train2014") -> str:
    """`COCO_train2014_000000131486.jpg`."""
    return f"COCO_{split}_{image:012d}.jpg"
