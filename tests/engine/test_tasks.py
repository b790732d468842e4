"""The task table: the published rows, a thirteenth task by one row, and rows that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.tasks import TASKS_FILE, base_lr, load_table, loss_scale, task_tokens
from pipelines.errors import BadInput

THIRTEENTH = """
tasks:
  counting:
    {title: Counting, number: 5, group: G1, head: vil_prediction, reader: "my.readers:read",
     batch: 8, lr: 6e-5, max_tokens: 16, max_regions: 37, loss: soft_labels, metric: soft_accuracy}
"""
PUBLISHED_NUMBERS = {
    "vqa": 1, "visual_genome_qa": 2, "visual7w": 4, "coco_retrieval": 7, "flickr30k_retrieval": 8, "refcoco": 9,
    "refcoco_plus": 10, "refcocog": 11, "nlvr2": 12, "snli_ve": 13, "gqa": 15, "guesswhat_pointing": 17,
}  # fmt: skip


def extra(tmp_path: Path, text: str) -> list[Path]:
    (tmp_path / "extra.yaml").write_text(text)
    return [tmp_path / "extra.yaml"]


def test_the_twelve() -> None:
    rows = load_table().default_tasks()
    assert {row.name: row.number for row in rows} == PUBLISHED_NUMBERS
    assert [row.group for row in rows] == ["G1"] * 3 + ["G2"] * 2 + ["G3"] * 5 + ["G4"] * 2
    assert len({row.head for row in rows}) == 6


def test_loss_scale_is_over_the_smallest_rate() -> None:
    rows = load_table().default_tasks()
    assert base_lr(rows) == 2e-5
    scales = loss_scale(rows)
    assert {name for name, scale in scales.items() if scale == 2.0} == {"vqa", "visual_genome_qa", "gqa"}
    assert set(scales.values()) == {1.0, 2.0}
    assert loss_scale(rows[:3]) == dict.fromkeys(("vqa", "visual_genome_qa", "gqa"), 1.0)


def test_task_tokens() -> None:
    rows = load_table().default_tasks()
    assert task_tokens("dataset", rows) == PUBLISHED_NUMBERS
    assert set(task_tokens("none", rows).values()) == {None}
    by_head = task_tokens("head", rows)
    assert len(set(by_head.values())) == 6
    assert by_head["refcocog"] == by_head["guesswhat_pointing"] == 4
    without_visual7w = task_tokens("head", [row for row in rows if row.name != "visual7w"])
    assert without_visual7w["refcocog"] == 9  # the smallest among the tasks of the run


def test_a_thirteenth_task_is_one_row(tmp_path: Path) -> None:
    table = load_table(extra=extra(tmp_path, THIRTEENTH))
    assert len(table.default_tasks()) == 13
    row = table.row("counting")
    assert (row.name, row.lr, row.images, table.head(row).kind) == ("counting", 6e-5, 1, "answers")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("head: vil_prediction", "head: vil_predict", r"tasks.counting.head: there is no head vil_predict; there are"),
        ("reader: \"my.readers:read\"", "reader: my.readers.read", r"tasks.counting.reader: .*pattern"),
        ("group: G1", "images: 0, group: G1", r"tasks.counting.images: .*greater than or equal to 1"),
        ("group: G1", "images: 2, group: G1", r"tasks.counting.images: 2 do not fit a head of kind answers"),
        ("loss: soft_labels, metric: soft_accuracy", "loss: classes, metric: class_accuracy", r"loss: .* not classes"),
        ("metric: soft_accuracy", "metric: class_accuracy", r"tasks.counting: metric class_accuracy cannot score"),
        ("number: 5", "number: 1", r"tasks.counting.number: 1 is the number of vqa already"),
        ("batch: 8", "bacth: 8", r"tasks.counting.bacth: unknown key; did you mean batch\?"),
        ("batch: 8,", "", r"tasks.counting.batch: this key is required"),
        ("counting:", "vqa:", r"tasks.vqa: .*tasks.yaml has this name already"),
        ("tasks:", "task:", r"task: unknown key"),
        ("counting:", "name: x\n  counting:", r"tasks.name: not a row"),
        ("batch: 8", "batch: 8, batch: 9", r"no valid YAML in line 5.*'batch' is given twice"),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_name_file_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in THIRTEENTH
    with pytest.raises(BadInput, match=r"extra\.yaml.*" + message):
        load_table(TASKS_FILE, extra(tmp_path, THIRTEENTH.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("{kind: match}", "needs options"),
        ("{kind: classes}", "needs classes"),
        ("{kind: answers, classes: 3}", "has no classes"),
        ("{kind: choices}", "heads.new.kind"),
    ],
)
def test_heads_that_do_not_fit(tmp_path: Path, head: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        load_table(TASKS_FILE, extra(tmp_path, f"heads:\n  new: {head}\n"))


def test_a_missing_table_and_a_missing_task(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        load_table(tmp_path / "none.yaml")
    with pytest.raises(BadInput, match="no such task"):
        load_table().row("vqa2")
