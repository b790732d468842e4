"""Which test images occur in which data set's train and val splits (paper section 2.2, Table 1).

An image is known by (source, key). Keys are unique within a source only: 131486 is one image of COCO and another one of
Visual Genome. About half of Visual Genome's images are COCO's too; those that `links` ties together count as COCO's.
Only image names are kept in memory, never annotations or features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.files import open_json
from pipelines.identity import image_key
from pipelines.readers.records import records_of
from pipelines.sheet import LINKED_SOURCE, Sheet

COCO = "coco"
TRAINED_ON = ("train", "val")
"""Splits that must not show a test image: stop-and-go reads the validation scores."""

Identity = tuple[str, str]
"""Source and image key: the same for the same image, whatever the data set."""
Matrix = dict[str, dict[str, float | None]]
"""Row (test images of) -> column (train and val images of) -> per cent of the row's; None where one has no images."""
OnSplit = Callable[[str, str], None]
"""Told data set and split before that split is read."""


def _silent(name: str, split: str) -> None:
    """Nobody is told."""


class Identities:
    """Image keys to identities, and back."""

    def __init__(self, links: Mapping[str, str]) -> None:
        """`links`: key of a Visual Genome image -> key of the same image in COCO."""
        self._links = links

    @classmethod
    def of(cls, sheet: Sheet, names: Iterable[str]) -> Identities:
        """For these data sets, by the sheet's `links` if one of them has the linked source.

        Raises BadInput if that file is wanted, and not there or not readable.
        """
        if sheet.links is None or LINKED_SOURCE not in map(sheet.source, names):
            return cls({})
        if not sheet.links.exists():
            mend = "fetch Visual Genome's image_data.json; without the key its images count as nobody else's"
            raise BadInput(f"{sheet.path}: links", f"no such file: {sheet.links}", mend)
        return cls(read_links(sheet.links))

    def identity(self, source: str, key: str) -> Identity:
        """Who an image is."""
        linked = self._links.get(key) if source == LINKED_SOURCE else None
        return (source, key) if linked is None else (COCO, linked)

    def keys(self, identities: frozenset[Identity]) -> dict[str, frozenset[str]]:
        """By source, every key that means one of these images: a linked one has keys of both sources."""
        found: dict[str, set[str]] = {}
        for source, key in identities:
            found.setdefault(source, set()).add(key)
        linked = (key for key, coco in self._links.items() if (COCO, coco) in identities)
        found.setdefault(LINKED_SOURCE, set()).update(linked)
        return {source: frozenset(keys) for source, keys in found.items() if keys}


def read_links(path: Path) -> dict[str, str]:
    """Visual Genome's `image_data.json`, a list of {image_id (or id), coco_id: number or null}: VG key -> COCO key.

    Raises BadInput naming the file and the record.
    """
    links = {}
    for record in records_of(open_json(path), path):
        if record.values.get("coco_id") is not None:
            links[image_key(record.name("image_id", "id"))] = image_key(record.name("coco_id"))
    return links


@dataclass(frozen=True)
class SplitImages:
    """What one split shows."""

    images: frozenset[str]
    """Image keys of the data set's source."""
    examples: int
    held_out: int
    """Examples with an image that some data set tests on."""


@dataclass(frozen=True)
class Survey:
    """The images of every split whose files are there."""

    identities: Identities
    sources: Mapping[str, str]
    """Data set -> source."""
    tests: Mapping[str, frozenset[Identity]]
    splits: Mapping[str, Mapping[str, SplitImages]]
    """Data set -> train, val -> images."""
    held_out: Mapping[str, frozenset[str]]
    """Source -> keys of all test images."""
    absent: tuple[str, ...]
    """<data set>.<split> of the sheet whose files are not there."""

    def matrix(self, left_out: Mapping[str, frozenset[str]] | None = None) -> Matrix:
        """Table 1, the diagonal too. `left_out` (source -> keys) are images that train and val do without."""
        columns = {name: self._column(name, left_out or {}) for name in self.sources}
        return {row: {column: columns[column][row] for column in columns} for row in self.sources}

    def _column(self, name: str, left_out: Mapping[str, frozenset[str]]) -> dict[str, float | None]:
        splits, source = self.splits.get(name, {}), self.sources[name]
        if not splits:
            return dict.fromkeys(self.sources)
        images = frozenset().union(*(split.images for split in splits.values())) - left_out.get(source, frozenset())
        shown = {self.identities.identity(source, key) for key in images}
        return {row: _percent(self.tests.get(row), shown) for row in self.sources}


def _percent(test: frozenset[Identity] | None, shown: set[Identity]) -> float | None:
    return 100 * len(test & shown) / len(test) if test else None


def survey(sheet: Sheet, readers: Mapping[str, str], names: Iterable[str], on_split: OnSplit = _silent) -> Survey:
    """Read the images of these data sets, tests first. `readers`: data set -> "module:function".

    Splits whose files are not there are left out. Raises BadInput as the readers do, and for absent links.
    """
    sources = {name: sheet.source(name) for name in names}
    identities = Identities.of(sheet, sources)
    named = [(name, split) for name in sources for split in sheet.entry(name).splits()]
    there = {(name, split) for name, split in named if is_there(sheet, name, split, readers[name])}
    tests = read_tests(sheet, readers, [name for name, split in named if split == "test"], identities, on_split)
    held_out = identities.keys(frozenset().union(*tests.values()))
    splits: dict[str, dict[str, SplitImages]] = {}
    for name, split in named:
        if split in TRAINED_ON and (name, split) in there:
            on_split(name, split)
            avoided = held_out.get(sources[name], frozenset())
            splits.setdefault(name, {})[split] = _images(sheet, name, split, readers[name], avoided)
    absent = tuple(f"{name}.{split}" for name, split in named if (name, split) not in there)
    return Survey(identities, sources, tests, splits, held_out, absent)


def read_tests(
    sheet: Sheet, readers: Mapping[str, str], names: Iterable[str], identities: Identities, on_split: OnSplit = _silent
) -> dict[str, frozenset[Identity]]:
    """The test images of these data sets, without the sets that have no test split or whose test files are not there."""
    tests = {}
    for name in names:
        if is_there(sheet, name, "test", readers[name]):
            on_split(name, "test")
            keys = _images(sheet, name, "test", readers[name], frozenset()).images
            tests[name] = frozenset(identities.identity(sheet.source(name), key) for key in keys)
    return tests


def is_there(sheet: Sheet, name: str, split: str, reader: str) -> bool:
    """Whether the sheet has this split, and all files that it is read from exist."""
    if getattr(sheet.entry(name), split) is None:
        return False
    return all(file.exists() for file in sheet.files(name, split, reader))


def _images(sheet: Sheet, name: str, split: str, reader: str, avoided: frozenset[str]) -> SplitImages:
    images: set[str] = set()
    examples = held_out = 0
    for example in sheet.examples(name, split, reader):
        images.update(example.images)
        examples += 1
        held_out += not avoided.isdisjoint(example.images)
    if not examples:
        raise BadInput(f"{sheet.path}: sets.{name}.{split}", "the annotations hold no example")
    return SplitImages(frozenset(images), examples, held_out)
