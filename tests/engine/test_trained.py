"""A trained model asked again says what its run's validation said, whatever became of what the run began from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.convert import convert
from engine.journal import EVENTS_FILE, read_rows
from engine.losses import loss_and_score
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput


@pytest.fixture(scope="module")
def folder(undisturbed: Callable[[str], Path]) -> Path:
    return undisturbed("float32")


def score(trained: Trained, task: str, blind: bool = False) -> float:
    scores = [
        loss_and_score(trained.logits(batch), batch)[1] for batch in trained.batches(trained.data(task, "val"), blind)
    ]
    return float(torch.cat(scores).double().mean())


def test_scores_are_those_of_the_run(folder: Path) -> None:
    results = [row for row in read_rows(folder / EVENTS_FILE) if row["event"] == "result"]
    trained = load_trained(folder)
    assert list(trained.rows) == [row["task"] for row in results]
    for row in results:
        assert score(trained, row["task"]) == pytest.approx(row["score"], abs=1e-9)
        assert score(trained, row["task"], blind=True) == pytest.approx(row["blind"], abs=1e-9)


@pytest.mark.parametrize("form", ["checkpoint", "file"])
def test_a_checkpoint_and_a_file_of_weights_are_the_same_model(folder: Path, tmp_path: Path, form: str) -> None:
    whole = load_trained(folder)
    if form == "checkpoint":
        other = load_trained(max((folder / "checkpoints").iterdir()))
    else:
        convert(folder, tmp_path / "weights.safetensors")
        other = load_trained(tmp_path / "weights.safetensors", folder / "config.yaml")
    batch = next(whole.batches(whole.data("phrases", "val")))
    assert torch.equal(whole.logits(batch), other.logits(batch))


def test_a_damaged_newest_checkpoint_is_told_and_passed_over(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "run")
    newest, before, *_ = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    (newest / "weights.safetensors").write_bytes(b"damaged")
    told: list[str] = []
    assert load_trained(tmp_path / "run", say=told.append).path == before
    assert len(told) == 1 and newest.name in told[0]


@pytest.mark.parametrize(
    ("source", "config", "overrides", "named"),
    [
        ("nowhere", None, (), "no such run"),
        ("weights.safetensors", None, (), "--config"),
        (None, None, ("seed=3",), "seed"),
        (None, None, ("task_tokens=none",), "task_tokens"),
    ],
)
def test_what_cannot_be_asked(
    folder: Path, tmp_path: Path, source: str | None, config: Path | None, overrides: tuple[str, ...], named: str
) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=named):
        load_trained(folder if source is None else tmp_path / source, config, overrides)


def test_a_task_that_was_not_trained_is_named(folder: Path) -> None:
    with pytest.raises(BadInput, match="was not trained on it.*answers"):
        load_trained(folder).data("vqa", "val")
