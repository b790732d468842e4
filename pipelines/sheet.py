"""The data sheet: one YAML file that says where the vocabulary, features and annotations of each data set are.

    format: 1
    root: ../datasets                       # optional: what paths are relative to; by default the sheet's folder
    vocabulary: vocab.txt
    links: visual_genome/image_data.json    # optional: which images of source visual_genome are images of source coco
    removed: removed.json                   # optional: what `python -m pipelines.clean` writes, and training leaves out
    sets:
      vqa:
        source: coco                        # optional: whose images; sets of one source share image keys
        features: features/coco.lmdb        # the store of detected regions; {train: …, val: …} where splits have their own
        candidates: …                       # Visual7W, GuessWhat: the store of annotated boxes
        answers: vqa/trainval_label2ans.json
        hard_negatives: …                   # retrieval
        train: {questions: […], …}          # keyword arguments of the task's reader
        val: {…}
        test: {…}                           # optional

`root` is itself relative to the sheet. Whatever is not known is refused by its key path. A set without `source` has the
images of the sets that name the same feature store: a store has one set of keys.
"""

from __future__ import annotations

import collections.abc
import difflib
import importlib
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.store.reader import FeatureStore

SPLITS = ("train", "val", "test")

LINKED_SOURCE = "visual_genome"
"""The source whose images `links` ties to COCO's."""

Reader = Callable[..., Iterator[Example]]


class MissingFile(BadInput):
    """A file that the sheet names is not there."""


class SetEntry(BaseModel):
    """One data set of the sheet. Paths are absolute once the sheet is loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str | None = Field(None, pattern=r"^[a-z0-9_]+$")
    features: Path | dict[Literal["train", "val", "test"], Path]
    candidates: Path | None = None
    answers: Path | None = None
    hard_negatives: Path | None = None
    train: dict[str, Any]
    val: dict[str, Any]
    test: dict[str, Any] | None = None

    def splits(self) -> list[str]:
        """The splits that the sheet names for this data set."""
        return [split for split in SPLITS if getattr(self, split) is not None]

    def stores(self) -> dict[str, Path]:
        """The store of detected regions of each split."""
        if isinstance(self.features, Path):
            return dict.fromkeys(self.splits(), self.features)
        return {str(split): path for split, path in self.features.items()}

    @model_validator(mode="after")
    def _every_split_has_a_store(self) -> Self:
        without = [split for split in self.splits() if split not in self.stores()]
        if without:
            raise ValueError(f"features: no store of split {without[0]}")
        return self


class _SheetFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1]
    root: Path = Path()
    vocabulary: Path
    links: Path | None = None
    removed: Path | None = None
    sets: dict[str, SetEntry]


@dataclass(frozen=True)
class Sheet:
    """A validated data sheet. Stores are opened once and shared by the data sets that name them."""

    path: Path
    root: Path
    vocabulary: Path
    sets: Mapping[str, SetEntry]
    links: Path | None = None
    removed: Path | None = None
    _stores: dict[Path, FeatureStore] = field(default_factory=dict, repr=False, compare=False)

    def entry(self, name: str) -> SetEntry:
        """The data set `name`. Raises BadInput if the sheet does not have it."""
        if name not in self.sets:
            raise BadInput(f"{self.path}: sets", f"no data set {name!r}", f"it has {', '.join(sorted(self.sets))}")
        return self.sets[name]

    def source(self, name: str) -> str:
        """Whose images the data set shows: two sets of one source mean the same image by the same key."""
        entry = self.entry(name)
        beside = (other.source for other in self.sets.values() if other.features == entry.features and other.source)
        return entry.source or next(beside, os.path.relpath(next(iter(entry.stores().values())), self.root))

    def detected(self, name: str, split: str) -> FeatureStore:
        """The store of detected regions of one split. Raises BadInput as `store` does, and where there is no such split."""
        self._check_split(name, split)
        return self.store(self.entry(name).stores()[split])

    def _check_split(self, name: str, split: str) -> None:
        if split not in self.entry(name).splits():
            raise BadInput(f"{self.path}: sets.{name}.{split}", "the sheet does not have this split")

    def store(self, path: Path) -> FeatureStore:
        """The feature store at `path`. Raises BadInput as `FeatureStore` does."""
        if path not in self._stores:
            self._stores[path] = FeatureStore(path)
        return self._stores[path]

    def examples(self, name: str, split: str, reader: str) -> Iterator[Example]:
        """Run the task's reader on one split. Raises BadInput for unknown arguments and missing files."""
        self._check_split(name, split)
        arguments, problems = self.reader_arguments(name, split, reader)
        if problems:
            raise problems[0]
        return resolve_reader(reader)(**arguments)

    def reader_arguments(self, name: str, split: str, reader: str) -> tuple[dict[str, Any], list[BadInput]]:
        """What the task's reader is called with for one split, and every problem with that."""
        where = f"{self.path}: sets.{name}.{split}"
        try:
            function = resolve_reader(reader)
        except BadInput as problem:
            return {}, [problem]
        return resolve_arguments(function, getattr(self.entry(name), split), self.root, where)

    def files(self, name: str, split: str, reader: str) -> list[Path]:
        """The files and folders that one split is read from, there or not. Raises BadInput for unusable arguments."""
        arguments, problems = self.reader_arguments(name, split, reader)
        for problem in problems:
            if not isinstance(problem, MissingFile):
                raise problem
        values = (value if isinstance(value, list) else [value] for value in arguments.values())
        return [value for several in values for value in several if isinstance(value, Path)]


def load_sheet(path: Path | str, sets: Iterable[str] | None = None) -> Sheet:
    """Read a data sheet and check that the files of `sets` (default: of all) exist. Raises the first problem found."""
    sheet, problems = inspect_sheet(Path(path), sets)
    if sheet is None or problems:
        raise problems[0]
    return sheet


def inspect_sheet(path: Path, sets: Iterable[str] | None = None) -> tuple[Sheet | None, list[BadInput]]:
    """The sheet, or None where it cannot be understood at all, and every problem found."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        parsed = _SheetFile.model_validate(raw)
    except FileNotFoundError:
        return None, [BadInput(path, "no such data sheet", "check the path")]
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return None, [BadInput(path, "not a readable YAML file: " + " ".join(str(error).split()))]
    except ValidationError as error:
        return None, [_problem(path, item) for item in error.errors()]
    root = _below(path.resolve().parent, parsed.root)
    entries = {name: _resolved(entry, root) for name, entry in parsed.sets.items()}
    links, removed = (None if file is None else _below(root, file) for file in (parsed.links, parsed.removed))
    sheet = Sheet(path, root, _below(root, parsed.vocabulary), entries, links, removed)
    wanted = list(entries) if sets is None else list(sets)
    return sheet, [*_useless_links(sheet), *_missing_files(sheet, wanted)]


def _resolved(entry: SetEntry, root: Path) -> SetEntry:
    paths: dict[str, Any] = {key: _below(root, value) for key in _FILES if (value := getattr(entry, key)) is not None}
    if isinstance(entry.features, Path):
        paths["features"] = _below(root, entry.features)
    else:
        paths["features"] = {split: _below(root, path) for split, path in entry.features.items()}
    return entry.model_copy(update=paths)


def _below(root: Path, path: Path | str) -> Path:
    """`path` seen from `root`, without the `..` that make messages hard to read."""
    return Path(os.path.normpath(root / path))


_FILES = ("candidates", "answers", "hard_negatives")
_PREPARE = "correct the path, or prepare the file"
_MAKE_STORE = "make the store with python -m pipelines.convert or pipelines.extract, or correct the path"


def _useless_links(sheet: Sheet) -> Iterator[BadInput]:
    named = all(entry.source for entry in sheet.sets.values())
    if sheet.links is not None and not named and LINKED_SOURCE not in map(sheet.source, sheet.sets):
        mend = f"give Visual Genome's sets the source {LINKED_SOURCE}, or leave links out"
        yield BadInput(f"{sheet.path}: links", f"no data set has the source {LINKED_SOURCE}", mend)


def _missing_files(sheet: Sheet, sets: list[str]) -> Iterator[BadInput]:
    if sheet.vocabulary.is_dir():
        mend = "name the file in it, such as vocab.txt"
        yield BadInput(f"{sheet.path}: vocabulary", f"a folder, not a file: {sheet.vocabulary}", mend)
    elif not sheet.vocabulary.exists():
        yield _missing(f"{sheet.path}: vocabulary", sheet.vocabulary, _PREPARE)
    for name in sets:
        if name not in sheet.sets:
            yield BadInput(f"{sheet.path}: sets", f"no data set {name!r}", f"it has {', '.join(sorted(sheet.sets))}")
            continue
        entry = sheet.sets[name]
        files = {"features": entry.features} if isinstance(entry.features, Path) else {
            f"features.{split}": path for split, path in entry.stores().items()
        }  # fmt: skip
        for key, file in {**files, **{key: getattr(entry, key) for key in _FILES}}.items():
            if file is not None and not file.exists():
                is_store = key.startswith(("features", "candidates"))
                yield _missing(f"{sheet.path}: sets.{name}.{key}", file, _MAKE_STORE if is_store else _PREPARE)


def _missing(where: str, file: Path, mend: str) -> MissingFile:
    return MissingFile(where, f"no such file: {file}", mend)


def _problem(path: Path, item: Any) -> BadInput:
    keys = [str(key) for key in item["loc"]]
    if keys[2:3] and keys[0] == "sets" and "features" in keys:  # what else pydantic says here is about its own union
        where = f"{path}: {'.'.join(keys[: keys.index('features') + 1])}"
        return BadInput(
            where, f"a path is wanted here, not {item['input']!r}", "or one for each split: {train: …, val: …}"
        )
    if item["type"] in ("model_type", "model_attributes_type"):
        what = "an empty file" if item["input"] is None else "not a mapping of keys to values"
        return BadInput(f"{path}: {'.'.join(keys)}" if keys else path, what)
    where = f"{path}: {'.'.join(keys)}" if keys else str(path)
    if item["type"] == "extra_forbidden":
        known = _SheetFile.model_fields if len(keys) == 1 else SetEntry.model_fields
        return BadInput(where, "unknown key", _suggestion(keys[-1], known))
    return BadInput(where, item["msg"][0].lower() + item["msg"][1:])


def _suggestion(key: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"


def resolve_reader(reference: str) -> Reader:
    """The reader function named "module:function". Raises BadInput if there is none."""
    module, _, name = reference.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise BadInput(f"reader {reference!r}", str(error), "name it as module:function") from error
    return typing.cast(Reader, function)


def resolve_arguments(
    function: Reader, arguments: Mapping[str, Any], root: Path, where: str
) -> tuple[dict[str, Any], list[BadInput]]:
    """The sheet's arguments for a reader, its paths (by the signature's types) made absolute and seen to exist.

    Beside them every problem: unknown and missing arguments, missing files, each by its key path below `where`.
    """
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    problems = [
        BadInput(where, f"the reader needs {key!r}", f"arguments: {', '.join(parameters)}")
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in arguments
    ]
    resolved = {}
    for key, value in arguments.items():
        if key not in parameters:
            mend = _suggestion(str(key), parameters)
            problems.append(BadInput(f"{where}.{key}", "the reader has no such argument", mend))
        else:
            resolved[key] = _argument(value, hints.get(key), root, f"{where}.{key}", problems)
    return resolved, problems


def _argument(value: Any, hint: Any, root: Path, where: str, problems: list[BadInput]) -> Any:
    one, many = _takes_paths(hint)
    if value is None or not (one or many):
        return value
    if many and isinstance(value, list):
        return [_existing(item, root, f"{where}[{place}]", problems) for place, item in enumerate(value)]
    path = _existing(value, root, where, problems)
    return path if one else [path]


def _takes_paths(hint: Any) -> tuple[bool, bool]:
    """Whether a parameter of this type takes one path, and whether it takes several."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [_takes_paths(part) for part in typing.get_args(hint)]
        return any(one for one, _ in parts), any(many for _, many in parts)
    if origin in (list, tuple, collections.abc.Sequence, collections.abc.Iterable):
        return False, Path in typing.get_args(hint)
    return hint is Path, False


def _existing(value: Any, root: Path, where: str, problems: list[BadInput]) -> Any:
    if not isinstance(value, str):
        problems.append(BadInput(where, f"a path is wanted here, not {value!r}"))
        return value
    path = _below(root, value)
    if not path.exists():
        problems.append(_missing(where, path, _PREPARE))
    return path
