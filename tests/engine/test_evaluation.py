"""Evaluation of a small trained run: scores are the run's own where the rule is, and what the files say by plain arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.evaluate import main
from engine.evaluation import Group, TaskScores, evaluate
from engine.evaluation.rules import _looked_at, consistency
from engine.evaluation.scores import summary
from engine.evaluation.table import show
from engine.journal import EVENTS_FILE, read_rows
from engine.tasks import EVALUATIONS, load_table
from engine.trained import Trained, load_trained
from pipelines.errors import BadInput
from pipelines.regions import Regions
from tests.pipelines.small import EXAMPLES

SAME_RULE = ("answers", "phrases", "pointing", "pairs")


@pytest.fixture(scope="module")
def folder(undisturbed: Callable[[str], Path]) -> Path:
    return undisturbed("float32")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Trained:
    return load_trained(folder)


@pytest.fixture(scope="module")
def found(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, TaskScores], Path]:
    output = tmp_path_factory.mktemp("evaluation") / "deep" / "er"
    return evaluate(trained, split="val", output=output), output


def examples(name: str) -> list[Any]:
    """What the run was made of."""
    return list(EXAMPLES[name])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_the_runs_own_where_the_rule_is(folder: Path, found: tuple[dict[str, TaskScores], Path]) -> None:
    results = {row["task"]: row["score"] for row in read_rows(folder / EVENTS_FILE) if row["event"] == "result"}
    scores, _ = found
    assert list(scores) == list(results)
    for task in SAME_RULE:
        assert scores[task].score == pytest.approx(results[task], abs=1e-7)
        assert next(iter(scores[task].metrics.values())) == scores[task].score


def test_groups_add_up(found: tuple[dict[str, TaskScores], Path]) -> None:
    for task, scores in found[0].items():
        groups = scores.groups
        if task == "pairs":
            assert list(groups) == ["even", "odd"]  # its rule is `classes` here, NLVR2's own has none
        assert sum(group.n for group in groups.values()) == scores.n == 40
        assert sum(group.n * group.score for group in groups.values()) / scores.n == pytest.approx(scores.score)


def test_scores_json(found: tuple[dict[str, TaskScores], Path]) -> None:
    scores, output = found
    written = json.loads((output / "scores.json").read_text())
    assert written["precision"] == "float32" and written["checkpoint"].endswith("iteration-0000012")
    assert written["tasks"] == {name: task.as_json() for name, task in scores.items()}
    assert sorted(path.name for path in output.iterdir()) == sorted(
        ["scores.json", *(f"{name}_val.jsonl" for name in scores)]
    )


def test_boxes_of_the_file_give_the_score(found: tuple[dict[str, TaskScores], Path]) -> None:
    rows = lines(found[1] / "phrases_val.jsonl")
    assert [row["id"] for row in rows] == [example.id for example in examples("phrases")]
    right = 0
    for row, example in zip(rows, examples("phrases"), strict=True):
        assert row["image"] == example.images[0]
        best = max(inclusive_iou(row["box"], box) for box in example.target.boxes)
        assert row["iou"] == pytest.approx(best, abs=2e-3)  # the file rounds boxes to hundredths of a pixel
        right += row["iou"] > 0.5
    assert right / len(rows) == pytest.approx(found[0]["phrases"].score)


def inclusive_iou(a: list[float], b: tuple[float, ...]) -> float:
    """Both end pixels count: a side is x2 - x1 + 1."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (a, b)]
    return width * height / (sum(areas) - width * height)


def test_every_region_against_the_inclusive_convention(trained: Trained) -> None:
    """Whatever region is chosen: its box, its overlap, and the best overlap that could be had."""
    data = trained.data("phrases", "val")
    regions = Regions.of(data, data.image_rows[:, 0].astype(np.int64))
    counts = np.diff(regions.cu_images)
    seen = []
    for turn in range(int(counts.max())):
        chosen = np.minimum(turn, counts - 1)
        ((boxes, overlaps, reachable),) = _looked_at(data, chosen)
        expected = [
            max(inclusive_iou(box, true) for true in example.target.boxes)
            for box, example in zip(boxes.tolist(), examples("phrases"), strict=True)
        ]
        np.testing.assert_allclose(overlaps, expected, atol=1e-6)
        seen.append(overlaps)
    np.testing.assert_allclose(np.max(seen, axis=0), reachable)
    assert len({row.tobytes() for row in seen}) > 3


def test_options_of_the_file_give_the_score(found: tuple[dict[str, TaskScores], Path]) -> None:
    rows = lines(found[1] / "pointing_val.jsonl")
    pairs = [(row, example.target) for row, example in zip(rows, examples("pointing"), strict=True)]
    assert all(row["box"] == target.choices[row["option"]] for row, target in pairs)
    right = sum(row["option"] == target.answer for row, target in pairs)
    assert right / len(rows) == pytest.approx(found[0]["pointing"].score)


def test_classes_and_answers_of_the_files_give_the_scores(found: tuple[dict[str, TaskScores], Path]) -> None:
    scores, output = found
    classes = zip(lines(output / "pairs_val.jsonl"), examples("pairs"), strict=True)
    assert np.mean([row["class"] == example.target.index for row, example in classes]) == pytest.approx(
        scores["pairs"].score
    )
    marks = []
    for row, example in zip(lines(output / "answers_val.jsonl"), examples("answers"), strict=True):
        soft = dict(zip(example.target.answers, example.target.scores, strict=True))
        marks.append(soft.get(row["answer"], 0.0))
    assert np.mean(marks) == pytest.approx(scores["answers"].score, abs=1e-7)


@pytest.mark.parametrize(
    ("marks", "sentences", "expected"),
    [
        ([1, 1, 1, 1], [0, 0, 1, 1], 1.0),
        ([1, 0, 1, 1], [0, 0, 1, 1], 0.5),
        ([0, 1, 1, 0], [0, 1, 1, 0], 0.5),
        ([0, 1, 0, 1], [0, 0, 1, 1], 0.0),
        ([1, 0, 1], [0, 1, 2], 2 / 3),
    ],
)
def test_consistency_asks_for_all_pairs_of_a_sentence(marks, sentences, expected) -> None:
    assert consistency(np.array(marks, np.float64), np.array(sentences, np.int32)) == pytest.approx(expected)


def test_summary_leaves_out_empty_groups_and_nameless_ones() -> None:
    marks, codes = np.array([1.0, 0.5, 0.0]), np.array([1, 1, 2], np.int32)
    got = summary(marks, {"accuracy": 0.5}, ("never", "b", ""), codes, "val")
    assert got == TaskScores(0.5, {"accuracy": 0.5}, {"b": Group(0.75, 2)}, 3, "val")
    assert summary(None, {}, ("b",), codes, "test") == TaskScores(None, {}, {}, 3)


@pytest.mark.parametrize("task", ["answers", "phrases", "pointing", "pairs", "captions"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_task(folder: Path, task: str, value: float) -> None:
    trained = load_trained(folder)
    for parameter in trained.model.heads[trained.row(task).head].parameters():
        torch.nn.init.constant_(parameter, value)
    with pytest.raises(BadInput, match=rf"task {task}, val: .*not finite"):
        evaluate(trained, [task], "val")


@pytest.mark.parametrize("task", ["answers", "phrases", "pairs"])
def test_without_published_answers_the_file_is_the_same_and_there_is_no_score(
    folder: Path, found: tuple[dict[str, TaskScores], Path], tmp_path: Path, task: str
) -> None:
    hidden = load_trained(folder)
    hidden._data[task, "val"] = replace(hidden.data(task, "val"), target=None)
    assert evaluate(hidden, [task], "val", tmp_path) == {task: TaskScores(None, {}, {}, 40, "val")}
    name = f"{task}_val.jsonl"
    answered = [{k: v for k, v in row.items() if k != "iou"} for row in lines(found[1] / name)]
    assert lines(tmp_path / name) == answered


def test_options_that_nobody_names_cannot_be_chosen_from(folder: Path) -> None:
    hidden = load_trained(folder)
    hidden._data["pointing", "val"] = replace(hidden.data("pointing", "val"), target=None)
    with pytest.raises(BadInput, match="task pointing, val: .*no boxes to choose from"):
        evaluate(hidden, ["pointing"], "val")


def test_what_cannot_be_evaluated(trained: Trained) -> None:
    with pytest.raises(BadInput, match="vqa.*was not trained on it"):
        evaluate(trained, ["vqa"], "val")


def test_a_data_set_without_a_test_split_is_evaluated_on_val(
    trained: Trained, found: tuple[dict[str, TaskScores], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    scores = evaluate(trained, ["answers"])
    assert scores == {"answers": found[0]["answers"]} and scores["answers"].split == "val"
    show(scores, trained.rows, "test")
    assert "answers (val)" in capsys.readouterr().out


def test_every_task_of_the_table_has_a_rule() -> None:
    from engine.evaluation.rules import RULES

    table = load_table()
    assert {row.rule for row in table.default_tasks()} == set(RULES)
    assert {kind for kinds in EVALUATIONS.values() for kind in kinds} == set(RULES)
    assert [row.name for row in table.tasks.values() if row.rule is None] == ["conceptual_captions"]


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    arguments = [str(folder), "--split", "val", "threads=1", "--tasks", "phrases,answers", "--output", str(output)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "phrases" in shown and "average" in shown and "reachable" in shown
    assert list(json.loads((output / "scores.json").read_text())["tasks"]) == ["phrases", "answers"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "val", "--tasks", "phrases,nothing"], "nothing"),
        (["--split", "val", "seed=1"], "an evaluation cannot change it"),
        (["--split", "val", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main([str(folder), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: ") and said in error[-1]
