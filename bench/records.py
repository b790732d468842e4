"""Rows of measurements that grow from run to run: JSON lines, and the same as CSV, with where they come from in every row."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

FOLDER = Path("build/bench")


def append(path: Path, rows: Sequence[Mapping[str, Any]], conditions: Mapping[str, Any]) -> None:
    """Rows behind those that `path` (a CSV) has, conditions in each; and as JSON lines in the file of that name with .jsonl.

    A CSV of other columns is left alone: the rows go to name-2.csv, or the next number that fits. Lists are in the JSON only.
    """
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [{**conditions, **row} for row in rows]
    with path.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in whole))
    flat = [{name: value for name, value in row.items() if not isinstance(value, list | tuple | dict)} for row in whole]
    columns = list(flat[0])
    with _fitting(path, columns).open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(flat)


def digest(value: object) -> str:
    """Of whatever was configured: the same for the same values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _fitting(path: Path, columns: list[str]) -> Path:
    """The first of path, path-2, … that has these columns, or nothing yet."""
    for number in count(1):
        candidate = path if number == 1 else path.with_stem(f"{path.stem}-{number}")
        if not candidate.exists() or candidate.stat().st_size == 0:
            return candidate
        with candidate.open(newline="", encoding="utf-8") as file:
            if next(csv.reader(file), None) == columns:
                return candidate
    raise AssertionError("numbers do not end")
