"""The committed lengths: all twelve tasks, within the published paddings, and what the real annotations say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bench.lengths import DETECTED, FILE, VOCABULARY, load, main, texts_of
from engine.tasks import load_table
from pipelines.errors import BadInput
from pipelines.wordpiece import WordPiece
from tests.reference import reference

MEANS = {
    "vqa": 10.5, "gqa": 12.8, "visual_genome_qa": 9.7, "coco_retrieval": 14.8, "flickr30k_retrieval": 16.8, "refcoco": 6.5,
    "nlvr2": 19.8, "snli_ve": 11.4, "guesswhat_pointing": 43.5,
}  # fmt: skip
"""Text rows, measured apart from this code."""


def test_every_task_has_lengths_that_fit() -> None:
    rows, measured = load_table().default_tasks(), load()
    assert list(measured) == [row.name for row in rows]
    for row in rows:
        texts, boxes = measured[row.name].texts, measured[row.name].boxes
        assert min(texts.counts) >= 4, "[CLS], the task token, a word, [SEP]"
        assert max(texts.counts) <= row.max_tokens + 1
        assert 1 + DETECTED + max(boxes.counts) <= row.max_regions
        assert texts.source and boxes.source
        assert texts.real or texts.source.startswith("assumed")


def test_means_are_plausible() -> None:
    measured = load()
    for name, mean in MEANS.items():
        assert measured[name].texts.real
        assert measured[name].texts.mean == pytest.approx(mean, abs=0.1), name


def test_draws_follow_the_histogram() -> None:
    texts = load()["nlvr2"].texts
    drawn = texts.draw(np.random.default_rng(0), 20_000)
    assert drawn.mean() == pytest.approx(texts.mean, rel=0.02)
    assert set(drawn.tolist()) <= set(texts.counts)
    assert set(load()["vqa"].draw_regions(np.random.default_rng(0), 9).tolist()) == {101}


@pytest.mark.parametrize("name", ["gqa", "refcocog", "guesswhat_pointing", "nlvr2"])
def test_lengths_are_those_of_the_annotations(name: str) -> None:
    tokenizer = WordPiece.load(reference(f"data/{VOCABULARY}"))
    assert texts_of(load_table().row(name), reference("data"), tokenizer) == load()[name].texts


@pytest.mark.slow
def test_the_file_is_what_the_command_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lengths.json"
    assert main(["--data", str(reference("data")), "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == json.loads(FILE.read_text())
    assert "guesswhat_pointing" in capsys.readouterr().out


def test_absent_annotations_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    assert "vocab" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text('{"tasks": {"vqa": {}}}')
    with pytest.raises(BadInput, match="broken.json"):
        load(tmp_path / "broken.json")
