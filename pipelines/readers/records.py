"""One annotation record and where it stands: typed access to keys, complaints that name file, record and key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import BadInput
from pipelines.examples import BoxXYXY
from pipelines.files import json_lines, kind_name

_NAMING_KEYS = ("question_id", "ref_id", "qa_id", "region_id", "identifier", "pairID", "dialogue_id", "id", "image_id")


Key = str | int
"""JSON has text keys only, pickled dictionaries number keys too."""


@dataclass(frozen=True, slots=True)
class Record:
    """A JSON object (or dictionary from a pickle) at `place` of `path`."""

    path: Path
    place: str
    values: dict[Any, Any]

    def bad(self, what: str, mend: str = "") -> BadInput:
        """The exception to raise for this record."""
        names = (f" ({key} {self.values[key]})" for key in _NAMING_KEYS if isinstance(self.values.get(key), str | int))
        return BadInput(f"{self.path}: {self.place}{next(names, '')}", what, mend)

    def has(self, key: Key) -> bool:
        return key in self.values

    def first_of(self, *keys: Key) -> Key:
        """The first of `keys` that the record has: published files differ in spelling."""
        for key in keys:
            if key in self.values:
                return key
        raise self.bad(f"no key {' or '.join(map(repr, keys))}", f"it has {', '.join(map(repr, self.values))}")

    def text(self, *keys: Key) -> str:
        """A text, under the first of `keys` that the record has."""
        return str(self._value(keys, str, "a text"))

    def integer(self, *keys: Key) -> int:
        """A whole number, also where it is written as a text of digits."""
        key = self.first_of(*keys)
        value = self.values[key]
        if isinstance(value, str) and value.isascii() and value.isdigit():
            return int(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        raise self._wrong(key, "a whole number")

    def name(self, *keys: Key) -> str:
        """An identifier: a text or a whole number, as text, spelled as in the file."""
        key = self.first_of(*keys)
        value = self.values[key]
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
        raise self._wrong(key, "a text or a whole number")

    def number(self, *keys: Key) -> float:
        """A finite number."""
        key = self.first_of(*keys)
        value = self.values[key]
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise self._wrong(key, "a finite number")

    def items(self, *keys: Key) -> list[Any]:
        """A list."""
        value: list[Any] = self._value(keys, list, "a list")
        return value

    def texts(self, *keys: Key) -> list[str]:
        """A list of texts."""
        values = self.items(*keys)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(self.first_of(*keys), "a list of texts")
        return values

    def integers(self, *keys: Key) -> list[int]:
        """A list of whole numbers."""
        values = self.items(*keys)
        if not all(isinstance(value, int) and not isinstance(value, bool) for value in values):
            raise self._wrong(self.first_of(*keys), "a list of whole numbers")
        return values

    def record(self, *keys: Key) -> Record:
        """The object under the key."""
        key = self.first_of(*keys)
        return Record(self.path, f"{self.place}.{key}", self._value((key,), dict, "an object"))

    def records(self, *keys: Key) -> Iterator[Record]:
        """The objects in the list under the key."""
        key = self.first_of(*keys)
        return records_of(self.items(key), self.path, f"{self.place}.{key}".removeprefix("."))

    def texts_under(self, key: Key, inner: str) -> list[str]:
        """The texts under `inner` of the objects in the list under `key`, quickly: VQA has ten a question."""
        try:
            texts = [item[inner] for item in self.items(key)]
        except (TypeError, KeyError):
            texts = [None]
        if all(type(text) is str for text in texts):
            return texts
        return [record.text(inner) for record in self.records(key)]  # the slow way knows what is wrong

    def xywh(self, key: Key) -> BoxXYXY:
        """The box `[x, y, width, height]` under `key` as x1, y1, x2, y2."""
        x, y, width, height = self.box(key)
        return self._corners(x, y, width, height)

    def xywh_keys(self, x: str, y: str, width: str, height: str) -> BoxXYXY:
        """The box written under four keys, as x1, y1, x2, y2."""
        return self._corners(self.number(x), self.number(y), self.number(width), self.number(height))

    def box(self, key: Key) -> BoxXYXY:
        """The four numbers of the box under `key`, as they stand."""
        values = self.items(key)
        finite = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v)]
        if len(values) != 4 or len(finite) != 4:
            raise self._wrong(key, "a list of four finite numbers")
        return float(values[0]), float(values[1]), float(values[2]), float(values[3])

    def _corners(self, x: float, y: float, width: float, height: float) -> BoxXYXY:
        if width < 0 or height < 0:
            raise self.bad(f"a box of width {width:g} and height {height:g}")
        return x, y, x + width, y + height

    def _value(self, keys: tuple[Key, ...], kind: type, kind_text: str) -> Any:
        key = self.first_of(*keys)
        if not isinstance(self.values[key], kind):
            raise self._wrong(key, kind_text)
        return self.values[key]

    def _wrong(self, key: Key, kind_text: str) -> BadInput:
        value = self.values[key]
        return self.bad(f"key {key!r} must be {kind_text}, not {kind_name(value)} {str(value)[:40]!r}")


def record_of(value: object, path: Path, place: str = "") -> Record:
    """`value` as a record. Raises `BadInput` where it is no object."""
    if not isinstance(value, dict):
        raise BadInput(f"{path}: {place}".removesuffix(": "), f"an object is expected, not {kind_name(value)}")
    return Record(path, place, value)


def records_of(values: object, path: Path, place: str = "") -> Iterator[Record]:
    """Every item of a list as a record. Raises `BadInput` where it is no list, or an item no object."""
    if not isinstance(values, list):
        raise BadInput(f"{path}: {place}".removesuffix(": "), f"a list is expected, not {kind_name(values)}")
    for index, value in enumerate(values):
        yield record_of(value, path, f"{place}[{index}]")


def line_records(paths: Iterable[Path]) -> Iterator[Record]:
    """One record per line of files with one JSON object a line."""
    for path in paths:
        for number, value in json_lines(path):
            yield Record(path, f"line {number}", value)
