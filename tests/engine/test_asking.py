"""A question gets the logits that the split's own batch gets, whatever the task asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from engine.asking import ask
from engine.images import Pictures, from_files, stored
from engine.predict import main
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from pipelines.examples import Choice
from pipelines.extract.detectors import Preprocessing, load_detector
from pipelines.extractor import Regions
from tests.pipelines.small import ANSWERS, EXAMPLES, FEATURES

COUNT = 6


@pytest.fixture(scope="module")
def trained(undisturbed: Callable[[str], Path]) -> Trained:
    return load_trained(undisturbed("float32"))


def of_batch(trained: Trained, task: str) -> list[Tensor]:
    """Logits of the first examples of the validation split, as its batch has them."""
    batch = next(trained.batches(trained.data(task, "val"), max_examples=COUNT))
    logits = trained.logits(batch)
    lengths = batch.cu_images.diff()[batch.pair_image].tolist() if logits.dim() == 1 else [1] * len(logits)
    return list(logits.split(lengths))


@pytest.mark.parametrize("task", ["answers", "phrases", "pointing", "pairs"])
def test_the_logits_are_those_of_the_splits_own_batch(trained: Trained, task: str) -> None:
    for example, wanted in zip(EXAMPLES[task], of_batch(trained, task), strict=False):
        answers = ask(trained, task, [example.text], stored(trained, task, example.images))
        found = torch.tensor([answer.logit for answer in sorted(answers, key=lambda answer: answer.index)])
        candidates = len(example.target.candidates) if isinstance(example.target, Choice) else 0
        torch.testing.assert_close(found, wanted.view(-1)[-candidates:], rtol=1e-5, atol=1e-5)
        assert [answer.logit for answer in answers] == sorted((a.logit for a in answers), reverse=True)


def test_retrieval_scores_each_image_and_each_text(trained: Trained) -> None:
    data = trained.data("captions", "val")
    batch = next(trained.batches(data, max_examples=COUNT))
    logits, keys = trained.logits(batch).view(COUNT, 4), data.store.keys()
    texts = [example.text for example in EXAMPLES["captions"]]
    for place, example in enumerate(EXAMPLES["captions"][:COUNT]):
        by_image = ask(trained, "captions", [example.text], stored(trained, "captions", keys))
        own = next(answer for answer in by_image if answer.label == example.images[0])
        assert own.logit == pytest.approx(float(logits[place, 0]), abs=1e-5)
        assert sum(answer.probability for answer in by_image) == pytest.approx(1)
        by_text = ask(trained, "captions", texts, stored(trained, "captions", example.images))
        assert {answer.index: answer.logit for answer in by_text}[place] == pytest.approx(own.logit, abs=1e-5)


def test_more_pairs_than_go_through_at_a_time(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    text, keys = EXAMPLES["captions"][0].text, trained.data("captions", "val").store.keys()
    whole = ask(trained, "captions", [text], stored(trained, "captions", keys))
    monkeypatch.setattr("engine.asking.PAIRS", 5)
    parts = ask(trained, "captions", [text], stored(trained, "captions", keys))
    assert [answer.label for answer in parts] == [answer.label for answer in whole]


def test_labels_boxes_and_choices(trained: Trained) -> None:
    example = EXAMPLES["answers"][0]
    assert {
        a.label for a in ask(trained, "answers", [example.text], stored(trained, "answers", example.images))
    } == set(ANSWERS)
    phrase = EXAMPLES["phrases"][0]
    pictures = stored(trained, "phrases", phrase.images)
    for answer in ask(trained, "phrases", [phrase.text], pictures):
        wanted = (
            (0, 0, 120, 90) if not answer.index else pictures.store.record(phrase.images[0]).boxes[answer.index - 1]
        )
        assert answer.box == pytest.approx(tuple(wanted))
    pointing = EXAMPLES["pointing"][0]
    assert isinstance(pointing.target, Choice)
    chosen = ask(
        trained,
        "pointing",
        [pointing.text],
        stored(trained, "pointing", pointing.images),
        choices=pointing.target.choices,
    )
    assert {answer.index for answer in chosen} == set(pointing.target.choices)
    for answer in chosen:
        assert answer.box == pytest.approx(pointing.target.candidates[answer.index], abs=1e-3)


class Fixed:
    """A detector that finds two regions in everything."""

    feature_dim, classes = FEATURES, 0
    preprocessing: Preprocessing | None = None

    def detect(self, images: list[Tensor], sizes: object) -> list[Regions]:
        box = np.array([[1, 2, 30, 40], [5, 5, 60, 50]], np.float32)
        features = [np.full((2, FEATURES), float(image.float().mean()) / 255, np.float32) for image in images]
        return [Regions(box, of_image, np.zeros((2, 0), np.float32)) for of_image in features]

    def describe(self, images: list[Tensor], sizes: object, boxes: list[np.ndarray]) -> list[Regions]:
        return [Regions(b, np.ones((len(b), FEATURES), np.float32), np.zeros((len(b), 0), np.float32)) for b in boxes]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (80, 60), "teal").save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def test_a_picture_file_goes_through_the_detector(trained: Trained, picture: Path, tmp_path: Path) -> None:
    pictures = from_files(trained, "phrases", [picture], Fixed(), tmp_path)
    answers = ask(trained, "phrases", ["red ring"], pictures)
    assert {answer.box for answer in answers} == {(0, 0, 80, 60), (1, 2, 30, 40), (5, 5, 60, 50)}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps({picture.name: [[3, 4, 5, 6], [7, 8, 9, 10], [1, 1, 2, 2]]}))
    (tmp_path / "more").mkdir()
    pictures = from_files(trained, "pointing", [picture], Fixed(), tmp_path / "more", boxes)
    assert [a.box for a in ask(trained, "pointing", ["red"], pictures, choices=[1])] == [(7, 8, 9, 10)]


def test_the_same_picture_twice(trained: Trained, picture: Path, tmp_path: Path) -> None:
    pictures = from_files(trained, "pairs", [picture, picture], Fixed(), tmp_path)
    assert len(ask(trained, "pairs", ["red ring"], pictures)) == 2


@pytest.mark.parametrize(
    ("task", "texts", "images", "named"),
    [
        ("answers", ["a", "b"], ["1"], "one text and 1 image"),
        ("answers", [" "], ["1"], "--text: empty"),
        ("pairs", ["a"], ["1"], "one text and 2 images"),
        ("captions", ["a", "b"], ["1", "2"], "one text and several images"),
        ("vqa", ["a"], ["1"], "not trained on it"),
        ("answers", ["a"], ["nowhere.jpg"], "neither a picture file nor an image"),
    ],
)
def test_what_cannot_be_asked(trained: Trained, task: str, texts: list[str], images: list[str], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        ask(trained, task, texts, stored(trained, task, images))


def test_a_detector_of_another_width_and_missing_boxes(trained: Trained, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="128 values, the model reads 8"):
        from_files(trained, "phrases", [picture], load_detector("world"), tmp_path)
    with pytest.raises(BadInput, match="--boxes"):
        from_files(trained, "pointing", [picture], Fixed(), tmp_path)
    with pytest.raises(BadInput, match="--choices 9"):
        ask(trained, "pointing", ["red"], stored(trained, "pointing", ["1"]), choices=[9])
    with pytest.raises(BadInput, match="there are none"):
        ask(trained, "pointing", ["red"], Pictures(stored(trained, "phrases", ["1"]).store, ("1",)))


def test_the_command(undisturbed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    command = [str(undisturbed("float32")), "--task", "answers", "--image", "1", "--text", "what [b]is[/b] red"]
    assert main([*command, "--json", "--top", "2"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["answers"]) == 2 and said["answers"][0]["probability"] >= said["answers"][1]["probability"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "what [b]is[/b] red" in shown and said["answers"][0]["label"] in shown
    assert main([*command, "--image", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: answers: texts: 1, images: 2")
