from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.errors import BadInput
from pipelines.examples import Example
from pipelines.sheet import inspect_sheet, load_sheet, resolve_arguments, resolve_reader
from tests.pipelines import small


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return small.build(tmp_path, examples=4)


def edit(sheet: Path, change: Callable[[Any], object]) -> None:
    content = yaml.safe_load(sheet.read_text())
    change(content)
    sheet.write_text(yaml.safe_dump(content))


def test_a_sheet_is_read_with_paths_relative_to_it(
    sheet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    loaded = load_sheet(sheet)
    assert loaded.vocabulary.is_file()
    assert loaded.entry("pointing").candidates == sheet.parent / "annotated.lmdb"
    assert loaded.entry("answers").splits() == ["train", "val"]


def test_a_root_moves_all_paths(sheet: Path) -> None:
    moved = sheet.parent / "sheets" / "moved.yaml"
    moved.parent.mkdir()
    moved.write_text(sheet.read_text())
    edit(moved, lambda c: c.update(root=".."))
    loaded = load_sheet(moved)
    assert loaded.vocabulary == sheet.parent / "vocab.txt"
    assert loaded.root == sheet.parent


def test_stores_are_opened_once(sheet: Path) -> None:
    loaded = load_sheet(sheet)
    assert loaded.store(loaded.entry("answers").stores()["val"]) is loaded.store(
        loaded.entry("pairs").stores()["train"]
    )


CHANGES = {
    "unknown key": (
        lambda c: c["sets"]["answers"].update(feature="x"),
        r"sets\.answers\.feature: unknown key \(did you mean features\?\)",
    ),
    "unknown top key": (lambda c: c.update(version=2), r"version: unknown key"),
    "missing key": (lambda c: c["sets"]["answers"].pop("val"), r"sets\.answers\.val: field required"),
    "other format": (lambda c: c.update(format=2), r"format: input should be 1"),
    "wrong type": (lambda c: c["sets"]["answers"].update(train=3), r"sets\.answers\.train: input should be a"),
    "missing store": (
        lambda c: c["sets"]["answers"].update(features="gone.lmdb"),
        r"sets\.answers\.features: no such file: .*gone\.lmdb \(make the store with python -m pipelines\.convert",
    ),
    "a folder as vocabulary": (
        lambda c: c.update(vocabulary="."),
        r"sheet\.yaml: vocabulary: a folder, not a file: .* \(name the file in it, such as vocab\.txt\)",
    ),
    "missing vocabulary": (lambda c: c.update(vocabulary="gone.txt"), r"vocabulary: no such file: .*gone\.txt"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_bad_sheets_are_refused_by_key_path(sheet: Path, name: str) -> None:
    change, message = CHANGES[name]
    edit(sheet, change)
    with pytest.raises(BadInput, match=message):
        load_sheet(sheet)


def test_all_problems_are_found(sheet: Path) -> None:
    edit(sheet, lambda c: [change(c) for change, _ in (CHANGES["missing store"], CHANGES["missing vocabulary"])])
    _, problems = inspect_sheet(sheet)
    assert len(problems) == 2


def test_only_the_sets_in_use_must_be_there(sheet: Path) -> None:
    edit(sheet, CHANGES["missing store"][0])
    load_sheet(sheet, ["captions"])
    with pytest.raises(BadInput, match="no data set 'caption'"):
        load_sheet(sheet, ["caption"])


@pytest.mark.parametrize("content", ["sets: [", "- 1", "", "\x00"])
def test_what_is_no_sheet_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "sheet.yaml"
    path.write_text(content)
    with pytest.raises(BadInput, match=re.escape(str(path))):
        load_sheet(path)
    with pytest.raises(BadInput, match="no such data sheet"):
        load_sheet(tmp_path / "none.yaml")


def reader(*, files: Sequence[Path], index: Path | None = None, split: str = "train") -> Iterator[Example]:
    yield from ()


def test_reader_arguments_are_resolved_by_their_types(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("")
    given = {"files": ["a.json", "b.json"], "index": "b.json", "split": "val"}
    arguments, problems = resolve_arguments(reader, given, tmp_path, "here")
    assert not problems
    assert arguments == {
        "files": [tmp_path / "a.json", tmp_path / "b.json"],
        "index": tmp_path / "b.json",
        "split": "val",
    }
    assert resolve_arguments(reader, {"files": "a.json"}, tmp_path, "here")[0] == {"files": [tmp_path / "a.json"]}


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        (
            {"files": ["a.json"], "indes": "x"},
            [r"here\.indes: the reader has no such argument \(did you mean index\?\)"],
        ),
        ({}, [r"here: the reader needs 'files'"]),
        ({"files": ["a.json", "gone.json"]}, [r"here\.files\[1\]: no such file: .*gone\.json"]),
        (
            {"files": [3], "index": "../gone"},
            [r"here\.files\[0\]: a path is wanted here, not 3", r"here\.index: no such file"],
        ),
    ],
)
def test_wrong_reader_arguments_are_named(tmp_path: Path, given: dict[str, Any], messages: list[str]) -> None:
    (tmp_path / "a.json").write_text("")
    problems = resolve_arguments(reader, given, tmp_path, "here")[1]
    assert len(problems) == len(messages)
    for problem, message in zip(problems, messages, strict=True):
        assert re.match(message, str(problem))
        assert ".." not in str(problem)


@pytest.mark.parametrize("reference", ["pipelines.readers.none:read", "pipelines.sheet:none", "nothing"])
def test_a_reader_that_is_not_there(reference: str) -> None:
    with pytest.raises(BadInput, match="module:function"):
        resolve_reader(reference)
