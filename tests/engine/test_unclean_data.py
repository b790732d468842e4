"""A run does not start on images that a data set of its sheet tests on, unless it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from engine.assembly import Parts, assemble
from engine.config import load
from engine.journal import read_rows
from engine.train import main
from pipelines.clean import main as clean
from tests.engine.small_run import configure
from tests.pipelines import small

TESTED = "7"


def edit(path: Path, change: Callable[[Any], object]) -> None:
    content = yaml.safe_load(path.read_text())
    change(content)
    path.write_text(yaml.safe_dump(content))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two tasks; a third data set of the sheet, not trained here, tests on an image of theirs."""
    configure(tmp_path)
    small.EXAMPLES["tested"] = [e for e in small.EXAMPLES["captions"] if e.images == (TESTED,)]
    assert small.EXAMPLES["tested"]
    edit(tmp_path / "sheet.yaml", lambda c: c["sets"]["captions"].update(test={"examples": "tested"}))
    edit(tmp_path / "run.yaml", lambda c: c.update(tasks=["answers", "pairs"], max_iterations=1))
    return tmp_path / "run.yaml"


def shown(parts: Parts) -> set[str]:
    """The images of all training and validation examples."""
    data = [data for task in parts.tasks.values() for data in (task.train.data, task.val)]
    return {split.store.keys()[row] for split in data for row in split.image_rows.ravel().tolist()}


def test_unclean_data_are_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    unclean = sum(TESTED in example.images for example in small.EXAMPLES["answers"])
    sheet = run.with_name("sheet.yaml")
    assert line == (
        f"error: {sheet}: sets.answers.train: {unclean} of 40 examples ({unclean / 40:.1%}) show test images, of captions "
        f"(1 images) (python -m pipelines.clean {sheet} lists them for removal; unclean_data=allow trains on all examples)"
    )
    assert not (run.parent / "run").exists()


def test_an_unclean_validation_set_is_refused_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.EXAMPLES["clean"] = [e for e in small.EXAMPLES["answers"] if TESTED not in e.images]
    edit(run.with_name("sheet.yaml"), lambda c: c["sets"]["answers"].update(train={"examples": "clean"}))
    assert main(["--config", str(run)]) == 2
    assert "sets.answers.val: " in capsys.readouterr().err


def test_told_so_it_trains_on_all(run: Path) -> None:
    said: list[str] = []
    parts = assemble(load(run, ["unclean_data=allow"]), said.append)
    assert [len(task.train.data) for task in parts.tasks.values()] == [40, 40]
    assert TESTED in shown(parts)
    assert "unclean_data=allow: images that other data sets test on stay in training" in said


def test_cleaned_it_trains_on_the_rest_and_says_so(run: Path) -> None:
    assert clean([str(run)]) == 0
    edit(run.with_name("sheet.yaml"), lambda c: c.update(removed="sheet.removed.json"))
    said: list[str] = []
    parts = assemble(load(run, []), said.append)
    assert shown(parts) == set(small.IMAGES) - {TESTED}
    for name, task in parts.tasks.items():
        left = [e.id for e in small.EXAMPLES[name] if TESTED not in e.images]
        assert task.train.data.ids.tolist() == task.val.ids.tolist() == left
    gone = sum(task.val.removed_examples for task in parts.tasks.values())
    of_all = f"{gone} of 80 examples ({gone / 80:.1%})"
    told = f"left out by {run.with_name('sheet.removed.json')}: {of_all} of training, {of_all} of validation"
    assert gone and told in said

    assert main(["--config", str(run)]) == 0
    start = next(row for row in read_rows(run.parent / "run" / "events.jsonl") if row["event"] == "start")
    assert [(row["examples"], row["removed_examples"]) for row in start["tasks"]] == [
        (len(task.train.data), task.train.data.removed_examples) for task in parts.tasks.values()
    ]
    whole = assemble(load(run, ["unclean_data=allow"]))
    assert TESTED in shown(whole), "the list is not obeyed where the run is told to use all"


def test_a_stale_list_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert clean([str(run)]) == 0
    edit(run.with_name("sheet.yaml"), lambda c: c.update(removed="sheet.removed.json"))
    edit(run.with_name("sheet.yaml"), lambda c: c["sets"]["phrases"].update(test={"examples": "phrases"}))
    capsys.readouterr()
    assert main(["--config", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the removal list is stale: it was made without the test split of phrases" in line
    assert main(["--config", str(run), "unclean_data=allow"]) == 0


def test_a_sheet_without_test_splits_needs_no_list(run: Path) -> None:
    edit(run.with_name("sheet.yaml"), lambda c: c["sets"]["captions"].pop("test"))
    said: list[str] = []
    parts = assemble(load(run, []), said.append)
    assert TESTED in shown(parts)
    assert not [line for line in said if "test" in line]


def test_test_splits_that_are_not_there_are_said_once(run: Path) -> None:
    gone = {"features": "gone.lmdb", **{split: {"questions": ["gone.json"]} for split in ("train", "val", "test")}}
    edit(run.with_name("sheet.yaml"), lambda c: c["sets"].update(gqa=gone, vqa=gone))
    edit(run.with_name("sheet.yaml"), lambda c: c["sets"]["captions"].pop("test"))
    said: list[str] = []
    assemble(load(run, []), said.append)
    assert [line for line in said if "not there" in line] == [
        "test splits that are not there, so their images cannot be kept out of training: gqa, vqa"
    ]
