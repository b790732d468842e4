"""`python -m pipelines.mine` on what cannot be mined, and the pool of the authors, good and bad."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.store.writer import StoreWriter
from tests.pipelines.small_pictures import FEATURES, IMAGES, build, change, command, load, two_sets


@pytest.fixture
def sheet(tmp_path: Path) -> Path:
    return build(tmp_path)


def forget_features(sheet: Path) -> None:
    lines = (sheet.parent / "train.jsonl").read_text()
    (sheet.parent / "train.jsonl").write_text(lines + json.dumps({"img_path": "777.jpg", "sentences": ["redcat"]}))


def one_image(sheet: Path) -> None:
    lines = (sheet.parent / "train.jsonl").read_text().splitlines(keepends=True)
    (sheet.parent / "train.jsonl").write_text(lines[0])


def only_questions(sheet: Path) -> None:
    content = yaml.safe_load(sheet.read_text())
    del content["sets"]["pictures"]
    sheet.write_text(yaml.safe_dump(content))


def target_there(sheet: Path) -> None:
    (sheet.parent / "pictures_hard_features.npz").write_bytes(b"mine")


def wild_features(sheet: Path) -> None:
    with StoreWriter(sheet.parent / "wild.lmdb", FEATURES, "float32") as writer:
        for number in range(IMAGES):
            features = np.full((1, FEATURES), 1e20 if number == 40 else 1)
            writer.add(number, features, np.array([[0, 0, 9, 9]]), 20, 10)
    change(sheet, features="wild.lmdb")


def nothing(sheet: Path) -> None:
    """The sheet is good."""


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (nothing, ["--set", "cats"], r"no task 'cats' in the task table"),
        (nothing, ["--set", "questions"], r"--set: questions draws no negatives \(name retrieval sets"),
        (only_questions, [], r"sheet\.yaml: no retrieval set in it"),
        (only_questions, ["--set", "pictures"], r"sheet\.yaml: sets: no data set 'pictures'"),
        (nothing, ["--neighbours", "0"], "--neighbours: 0 are none"),
        (nothing, ["--memory", "0"], "--memory: 0 GB cannot be used"),
        (nothing, ["--memory", "nan"], "--memory: nan GB cannot be used"),
        (two_sets, ["--out", "x.npz"], "--out: one file for more, pictures"),
        (two_sets, ["--import", "x.pkl"], "--import: one file for more, pictures"),
        (target_there, [], r"pictures_hard_features\.npz: exists already"),
        (forget_features, [], r"no features of image '777'"),
        (one_image, [], r"sets\.pictures\.train: captions of one image only"),
        (wild_features, [], r"wild\.lmdb: image 40: features beyond 1e\+15"),
    ],
)
def test_what_cannot_be_mined_is_named(
    spoil: Callable[[Path], None],
    arguments: list[str],
    message: str,
    sheet: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(sheet)
    before = sorted(sheet.parent.rglob("*"))
    assert command(sheet, *arguments) == 2
    shown = capsys.readouterr()
    assert re.search(f"^error: .*{message}", shown.err)
    assert shown.err.count("\n") == 1
    assert not shown.out
    assert sorted(sheet.parent.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(sheet, "--device", "cuda") == 2
    assert "no GPU that torch can use" in capsys.readouterr().err


def authors_pool(images: list[Any], pool: Any) -> bytes:
    return pickle.dumps({"train_image_list": images, "train_hard_pool": pool}, protocol=3)


def test_the_pool_of_the_authors_is_taken(sheet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [*range(IMAGES), 9999]  # one of them is not in this split
    pool = (np.arange(len(images))[:, None] + np.arange(4)) % len(images)  # itself first
    (sheet.parent / "hard_negative.pkl").write_bytes(authors_pool(images, pool))
    out = sheet.parent / "theirs.npz"
    assert command(sheet, "--import", str(sheet.parent / "hard_negative.pkl"), "--out", str(out)) == 0
    assert "151 images x 4 neighbours from" in capsys.readouterr().out
    change(sheet, hard_negatives="theirs.npz")
    data: Any = load(sheet)
    keys = [data.store.keys()[row] for row in data.pool.images]
    for image, key in enumerate(keys):
        mined = data.pool.hard.neighbours[data.pool.hard.offsets[image] : data.pool.hard.offsets[image + 1]]
        wanted = [(int(key) + step) % 151 for step in (1, 2, 3)]
        assert [int(keys[other]) for other in mined] == [other for other in wanted if other < IMAGES]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "not a whole pickle"),
        (pickle.dumps([1, 2], protocol=2), "not the authors' pool"),
        (pickle.dumps({"train_image_list": [1]}, protocol=2), "not the authors' pool: KeyError"),
        (authors_pool([1, 2], [[1], [0]]), "train_hard_pool is no array"),
        (authors_pool([1, 2], np.zeros((2, 2))), "train_hard_pool is no array"),
        (authors_pool([1, 2], np.zeros((3, 2), int)), "do not fit"),
        (authors_pool([*range(IMAGES)], np.full((IMAGES, 2), IMAGES)), "do not fit"),
        (authors_pool([1, 2], np.array([[1], [0]])), "no hard neighbour for 148 images of the split"),
        (pickle.dumps(Path("x")), "the pickle asks for pathlib"),
    ],
)
def test_a_foreign_pool_is_refused(
    content: bytes, message: str, sheet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (sheet.parent / "hard_negative.pkl").write_bytes(content)
    assert command(sheet, "--import", str(sheet.parent / "hard_negative.pkl")) == 2
    assert re.search(f"^error: .*{message}", capsys.readouterr().err)
    assert not list(sheet.parent.glob("*.npz*"))
