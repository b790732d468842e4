"""Rows that grow from run to run: nothing is lost, and no file gets rows of other columns."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from bench import records
from bench.timing import spread


def test_rows_follow_each_other_with_their_conditions(tmp_path: Path) -> None:
    path = tmp_path / "new/rows.csv"
    for commit in ("a", "b"):
        records.append(path, [{"name": "x", "median": 1.5, "samples": [1, 2]}], {"commit": commit})
    with path.open() as file:
        assert list(csv.reader(file)) == [["commit", "name", "median"], ["a", "x", "1.5"], ["b", "x", "1.5"]]
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert [line["commit"] for line in lines] == ["a", "b"] and lines[0]["samples"] == [1, 2]


def test_a_csv_of_other_columns_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("op,seconds\nattention,1\n")
    for _ in range(2):
        records.append(path, [{"name": "x"}], {})
    assert path.read_text() == "op,seconds\nattention,1\n"
    assert (tmp_path / "rows-2.csv").read_text() == "name\nx\nx\n"


def test_a_digest_is_of_values_not_of_their_order() -> None:
    assert records.digest({"a": 1, "b": 2}) == records.digest({"b": 2, "a": 1}) != records.digest({"a": 1, "b": 3})


def test_kept_calls_are_evenly_spaced() -> None:
    """Every fourth of a hundred, so that those of two providers are of the same turns."""
    assert spread([float(n) for n in range(100)]).kept == tuple(float(n) for n in range(0, 100, 4))
    assert spread([3.0, 1.0]).kept == (3.0, 1.0)
