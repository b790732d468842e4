"""Official annotation files in, result files out, judged here once more as the data sets' own scripts judge them."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import save_file

from engine.assembly import build_model, shared_answers
from engine.config import load, load_tasks
from engine.evaluation import TaskScores, evaluate, rules
from engine.model.published import export_published
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from pipelines.sheet import load_sheet
from tests.engine.small_run import MODEL
from tests.pipelines.small import ANSWERS, WORDS, random_boxes, write_store
from tests.pipelines.test_official_accuracy import accuracy

IMAGES = [str(number) for number in range(1, 9)]
PAIRS = [f"{split}-{number}-{pair}" for split in ("dev", "test1") for number in range(3) for pair in range(2)]
SETTINGS = {
    "group": "G1", "batch": 4, "lr": 1.0e-3, "max_tokens": 9, "max_regions": 8, "default": False, "loss": "soft_labels",
    "metric": "soft_accuracy",
}  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "heads": {
        "answer_head": {"kind": "answers"},
        "other_head": {"kind": "answers"},
        "pair_head": {"kind": "paired_classes", "classes": 2},
    },
    "tasks": {
        "open": {**SETTINGS, "title": "open", "number": 0, "head": "answer_head", "reader": "pipelines.readers.vqa:read",
                 "evaluation": "vqa"},
        "composed": {**SETTINGS, "title": "composed", "number": 3, "head": "other_head",
                     "reader": "pipelines.readers.gqa:read", "evaluation": "gqa"},
        "statements": {**SETTINGS, "title": "statements", "number": 14, "head": "pair_head", "images": 2,
                       "reader": "pipelines.readers.nlvr2:read", "loss": "classes", "metric": "class_accuracy",
                       "evaluation": "nlvr2"},
    },
}  # fmt: skip


def text(random: np.random.Generator) -> str:
    return " ".join(random.choice(WORDS, random.integers(2, 7)))


def write(folder: Path) -> None:
    random = np.random.default_rng(5)
    photos = [f"{pair}-img{side}" for pair in PAIRS for side in (0, 1)]
    for name, images in (("photos", IMAGES), ("pairs", photos)):
        boxes = {image: random_boxes(random, int(random.integers(3, 10))) for image in images}
        write_store(folder / f"{name}.lmdb", boxes)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    typed = [*ANSWERS, "Yes", "the red", "two", "no.", "unheard of"]
    questions: list[Any] = []
    annotations: list[Any] = []
    composed: dict[str, Any] = {}
    statements: list[dict[str, Any]] = []
    for number in range(60):
        image = int(random.choice(IMAGES))
        questions.append({"question_id": number, "image_id": image, "question": text(random)})
        ten = [{"answer": str(answer)} for answer in random.choice(typed, 10)]
        annotations.append(
            {"question_id": number, "answer_type": str(random.choice(["yes/no", "other"])), "answers": ten}
        )
        answer = str(random.choice([*ANSWERS, "unheard of"]))
        composed[f"q{number:03d}"] = {"imageId": str(image), "question": text(random), "answer": answer}
        composed[f"q{number:03d}"]["types"] = {"structural": str(random.choice(["verify", "query"]))}
    for pair in PAIRS:
        for sentence in range(2):
            statements.append({"identifier": f"{pair}-{sentence}", "sentence": text(random)})
            statements[-1]["label"] = str(random.choice(["True", "False"]))
    hidden = [{key: value for key, value in row.items() if key != "label"} for row in statements]
    for name, content in {
        "questions.json": {"questions": questions},
        "annotations.json": {"annotations": annotations},
        "composed.json": composed,
    }.items():
        (folder / name).write_text(json.dumps(content))
    for name, rows in (("statements.json", statements), ("hidden.json", hidden)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def build(folder: Path) -> Trained:
    """A model that knows nothing, with the answers' heads of different opinions."""
    write(folder)
    answered = {"questions": ["questions.json"], "annotations": ["annotations.json"]}
    splits: dict[str, tuple[Any, Any]] = {
        "open": (answered, {"questions": ["questions.json"]}),
        "composed": ({"questions": ["composed.json"]},) * 2,
        "statements": ({"statements": ["statements.json"]}, {"statements": ["hidden.json"]}),
    }
    sets = {}
    for name, (val, test) in splits.items():
        store = "pairs.lmdb" if name == "statements" else "photos.lmdb"
        sets[name] = {"features": store, "answers": "answers.json", "train": val, "val": val, "test": test}
    (folder / "sheet.yaml").write_text(yaml.safe_dump({"format": 1, "vocabulary": "vocab.txt", "sets": sets}))
    (folder / "rows.yaml").write_text(yaml.safe_dump(ROWS))
    run = {
        "name": "official", "model": MODEL, "data": str(folder / "sheet.yaml"), "task_rows": [str(folder / "rows.yaml")],
        "tasks": [*ROWS["tasks"]], "max_iterations": 1, "unclean_data": "allow", "optimizer": {"head_lr": None},
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    config = load(folder / "run.yaml", [])
    table, rows = load_tasks(config)
    answers = shared_answers(rows, load_sheet(folder / "sheet.yaml"))
    model = build_model(config, table, rows, answers, lambda message: None)
    state = export_published(model)
    save_file({key: value.clone() for key, value in state.items()}, folder / "weights.safetensors")
    return load_trained(folder / "weights.safetensors", folder / "run.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("official")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return build(folder)


@pytest.fixture(scope="module")
def scores(trained: Trained, folder: Path) -> dict[str, TaskScores]:
    return evaluate(trained, split="val", output=folder / "val")


def test_vqa(folder: Path, scores: dict[str, TaskScores]) -> None:
    results = json.loads((folder / "val" / "open_val.json").read_text())
    rows = {row["question_id"]: row for row in json.loads((folder / "annotations.json").read_text())["annotations"]}
    assert all(result.keys() == {"question_id", "answer"} for result in results)
    assert {result["question_id"] for result in results} == rows.keys()
    assert len({result["answer"] for result in results}) > 1
    by_type = defaultdict(list)
    for result in results:
        row = rows[result["question_id"]]
        by_type[row["answer_type"]].append(accuracy(result["answer"], [a["answer"] for a in row["answers"]]))
    found = scores["open"]
    marks = [mark for of_type in by_type.values() for mark in of_type]
    assert found.score == found.metrics["vqa_accuracy"] == pytest.approx(np.mean(marks))
    assert 0 < found.score < 1
    compare_groups(found, by_type)


def test_gqa(folder: Path, scores: dict[str, TaskScores]) -> None:
    results = {
        row["questionId"]: row["prediction"] for row in json.loads((folder / "val/composed_val.json").read_text())
    }
    questions = json.loads((folder / "composed.json").read_text())
    assert results.keys() == questions.keys()
    right = defaultdict(list)
    for question, row in questions.items():
        right[row["types"]["structural"]].append(results[question] == row["answer"])
    found = scores["composed"]
    assert found.score == found.metrics["accuracy"] == pytest.approx(np.mean([x for of in right.values() for x in of]))
    compare_groups(found, right)


def compare_groups(found: TaskScores, marks: dict[str, list]) -> None:
    assert len(marks) > 1 and found.groups.keys() == marks.keys()
    for name, group in found.groups.items():
        assert group.n == len(marks[name]) and group.score == pytest.approx(np.mean(marks[name]))


def test_nlvr2(folder: Path, scores: dict[str, TaskScores]) -> None:
    """As its authors' script: a sentence is what is left of an identifier without its third field."""
    with (folder / "val" / "statements_val.csv").open(newline="") as file:
        predictions = dict(csv.reader(file))
    rows = [json.loads(line) for line in (folder / "statements.json").read_text().splitlines()]
    assert predictions.keys() == {row["identifier"] for row in rows} and set(predictions.values()) <= {"True", "False"}
    sentences: dict[Any, bool] = defaultdict(lambda: True)
    right = 0
    for row in rows:
        fields = row["identifier"].split("-")
        is_right = predictions[row["identifier"]].lower() == row["label"].lower()
        right += is_right
        sentences[fields[0], fields[1], fields[3]] &= is_right
    found = scores["statements"]
    consistency = sum(sentences.values()) / len(sentences)
    assert len(sentences) == 12
    assert found.metrics == {"accuracy": pytest.approx(right / len(rows)), "consistency": pytest.approx(consistency)}
    assert found.score == found.metrics["accuracy"] and not found.groups


def test_a_split_without_answers_has_a_result_file_and_no_score(trained: Trained, folder: Path, scores) -> None:
    found = evaluate(trained, ["open", "statements"], "test", folder / "test")
    assert found == {"open": TaskScores(None, {}, {}, 60), "statements": TaskScores(None, {}, {}, 24)}
    for name in ("open_{}.json", "statements_{}.csv"):
        answered, hidden = (folder / split / name.format(split) for split in ("val", "test"))
        assert answered.read_bytes() == hidden.read_bytes()
    assert json.loads((folder / "test" / "scores.json").read_text())["tasks"]["open"]["score"] is None


def test_a_question_without_its_answers_is_named(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "_people", lambda trained, data: {"0": ("yes",)})
    with pytest.raises(BadInput, match="task open, val: question 1: the annotations lack its answers"):
        evaluate(trained, ["open"], "val")


def test_question_ids_that_the_server_does_not_know(trained: Trained, folder: Path, tmp_path: Path) -> None:
    content = (folder / "questions.json").read_text()
    (folder / "questions.json").write_text(content.replace('"question_id": 7,', '"question_id": "seven",'))
    try:
        other = load_trained(folder / "weights.safetensors", folder / "run.yaml")
        with pytest.raises(BadInput, match="question seven: VQA's question ids are whole numbers"):
            evaluate(other, ["open"], "test", tmp_path)
    finally:
        (folder / "questions.json").write_text(content)
