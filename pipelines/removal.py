"""The removal list: which images training leaves out because some data set tests on them, and how it was found.

    held_out     by source, the keys of all test images; linked images under both of their keys
    sources      the source of every data set
    tests        the test splits that they come from: reader arguments, files with size and SHA-256
    links        the same of the file that ties Visual Genome's images to COCO's
    sets         per data set and split: images and examples before, examples removed, and the keys of removed images
    training     examples of all train splits, before and removed

What is left out follows from `held_out` alone, so a changed train file cannot bring a test image back. A test file or
link that is there and differs makes the list stale; one that is not there does not: the list remembers its images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.errors import BadInput
from pipelines.files import open_json, write_atomic
from pipelines.overlap import SplitImages, Survey, is_there
from pipelines.sheet import Sheet


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FilePrint(_Part):
    """What a file was: enough to notice another one in its place."""

    bytes: int
    sha256: str


class TestedSplit(_Part):
    """A test split that the list was made with."""

    images: int
    arguments: dict[str, Any]
    files: dict[str, FilePrint]
    """By path, relative to the sheet's root."""


class RemovedPart(_Part):
    """What one train or val split loses."""

    images: int
    examples: int
    removed_examples: int
    removed_images: tuple[str, ...]


class Total(_Part):
    """Examples of all train splits together."""

    examples: int
    removed_examples: int


class RemovalList(_Part):
    """See the head of the file."""

    format: Literal[1] = 1
    training: Total
    sources: dict[str, str]
    links: dict[str, FilePrint]
    tests: dict[str, TestedSplit]
    sets: dict[str, dict[str, RemovedPart]]
    held_out: dict[str, tuple[str, ...]]
    checksum: str = Field("", description="SHA-256 of all the rest")

    def keys(self) -> dict[str, frozenset[str]]:
        """Source -> keys of all test images."""
        return {source: frozenset(keys) for source, keys in self.held_out.items()}


def list_path(sheet: Sheet) -> Path:
    """Where the sheet's removal list is, or goes."""
    return sheet.removed or sheet.path.with_name(f"{sheet.path.stem}.removed.json")


def removal_list(survey: Survey, sheet: Sheet, readers: Mapping[str, str]) -> RemovalList:
    """What a survey of the whole sheet says is to be left out."""
    sets = {
        name: {split: _removed(images, survey.held_out.get(survey.sources[name], frozenset()))
               for split, images in splits.items()}
        for name, splits in survey.splits.items()
    }  # fmt: skip
    trained = [parts["train"] for parts in sets.values() if "train" in parts]
    unsigned = RemovalList(
        training=Total(
            examples=sum(part.examples for part in trained),
            removed_examples=sum(part.removed_examples for part in trained),
        ),
        sources=dict(survey.sources),
        links=_prints([] if sheet.links is None else [sheet.links], sheet.root),
        tests={name: _test_split(sheet, name, readers[name], len(survey.tests[name])) for name in survey.tests},
        sets=sets,
        held_out={source: _ordered(keys) for source, keys in sorted(survey.held_out.items())},
    )
    return unsigned.model_copy(update={"checksum": _checksum(unsigned)})


def _removed(split: SplitImages, held_out: frozenset[str]) -> RemovedPart:
    return RemovedPart(
        images=len(split.images),
        examples=split.examples,
        removed_examples=split.held_out,
        removed_images=_ordered(split.images & held_out),
    )


def _ordered(keys: Iterable[str]) -> tuple[str, ...]:
    """Numbers ascend, and the same keys make the same bytes."""
    return tuple(sorted(keys, key=lambda key: (len(key), key)))


def _test_split(sheet: Sheet, name: str, reader: str, images: int) -> TestedSplit:
    return TestedSplit(
        images=images,
        arguments=_arguments(sheet, name),
        files=_prints(sheet.files(name, "test", reader), sheet.root),
    )


def _arguments(sheet: Sheet, name: str) -> dict[str, Any]:
    """As the sheet gives them, in JSON's types."""
    arguments: dict[str, Any] = json.loads(json.dumps(sheet.entry(name).test, default=str))
    return arguments


def _prints(files: Iterable[Path], root: Path) -> dict[str, FilePrint]:
    return {os.path.relpath(file, root): file_print(file) for file in files}


def file_print(path: Path) -> FilePrint:
    """Size and SHA-256 of a file; of a folder (one small file per image), those of its files' names and sizes."""
    try:
        if path.is_dir():
            sizes = sorted((entry.name, entry.stat().st_size) for entry in os.scandir(path))
            names = json.dumps(sizes).encode()
            return FilePrint(bytes=sum(size for _, size in sizes), sha256=hashlib.sha256(names).hexdigest())
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FilePrint(bytes=file.tell(), sha256=digest)
    except OSError as error:
        raise BadInput(path, f"cannot be read: {error.strerror}", "check the path and its permissions") from None


def save_list(removed: RemovalList, path: Path) -> None:
    """Write it atomically, the same bytes for the same content. Raises BadInput where it cannot be written."""
    try:
        write_atomic(path, json.dumps(removed.model_dump(mode="json"), indent=1).encode() + b"\n")
    except OSError as error:
        raise BadInput(path, f"cannot be written: {error.strerror}", "name another file with --out") from None


def load_list(path: Path) -> RemovalList:
    """Read a list. Raises BadInput where it is missing, truncated, changed by hand, or of another format."""
    content = open_json(path)
    again = "make it again: python -m pipelines.clean CONFIG"
    try:
        removed = RemovalList.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadInput(f"{path}: {where}" if where else path, f"no removal list: {first['msg']}", again) from None
    if removed.checksum != _checksum(removed):
        raise BadInput(path, "damaged or changed by hand: its checksum does not fit", again)
    return removed


def _checksum(removed: RemovalList) -> str:
    content = removed.model_dump(mode="json", exclude={"checksum"})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def outdated(removed: RemovalList, sheet: Sheet, readers: Mapping[str, str]) -> Iterator[str]:
    """Why the list may no longer hold for the sheet, one reason each; nothing if it does. Reads test files once."""
    for name in sheet.sets:
        if removed.sources.get(name, sheet.source(name)) != sheet.source(name):
            yield f"the source of {name} was {removed.sources[name]}"
        if name in readers and is_there(sheet, name, "test", readers[name]):
            yield from _outdated_test(removed.tests.get(name), sheet, name, readers[name])
    links = [] if sheet.links is None else [sheet.links]
    if {os.path.relpath(file, sheet.root) for file in links} != set(removed.links):
        yield "it was made with other links"
    yield from _changed(removed.links, [file for file in links if file.exists()], sheet.root)


def _outdated_test(known: TestedSplit | None, sheet: Sheet, name: str, reader: str) -> Iterator[str]:
    if known is None:
        yield f"it was made without the test split of {name}"
    elif known.arguments != _arguments(sheet, name):
        yield f"sets.{name}.test of the sheet has changed"
    else:
        yield from _changed(known.files, sheet.files(name, "test", reader), sheet.root)


def _changed(known: Mapping[str, FilePrint], files: Iterable[Path], root: Path) -> Iterator[str]:
    for file in files:
        if known.get(os.path.relpath(file, root)) != file_print(file):
            yield f"{file} has changed"
