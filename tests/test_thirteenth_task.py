"""How to add a task: one row and one reader. No other file changes.

1. **The reader.** A function that takes the paths of your annotation files as keywords and yields one
   `pipelines.examples.Example` per sample: an id, the text, the keys of its images in the feature store, and a target.
   The five kinds of target are in `pipelines/examples.py`. Parameters annotated as `Path` are resolved against the
   data sheet, and the file must exist. What a user can mend is a `BadInput(where, what, mend)`. Here it is `read`, for
   a data set that asks whether a sentence describes a picture:

       {"id": 7, "picture": 12, "sentence": "a red ring", "true": true}

2. **The row.** In a YAML file of your own, named by the run under `task_rows` (or in `configs/tasks.yaml`, if the task
   is for everyone). It names the reader, the head and the loss. An existing head shares its weights with the tasks that
   use it; a new one is a row too. The number is the task's own row in the table of task tokens: take a free one. Here
   the file is `ROW`.

3. **The data.** The sheet of the run says where the features and the annotations are, under the task's name. Features
   of pictures come from `python -m pipelines.convert`. `python -m pipelines.check RUN.yaml` then shows what was found.

4. **The run** names the task under `tasks`: alone, or beside the other twelve. Everything else (batches, loss, score,
   stop-and-go, checkpoints, table, figures) follows from the row. To start from weights that have never seen the new
   head, name the head under `fresh_weights`.

The test below does just that, and trains it beside a second task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from engine.journal import read_rows
from engine.train import main
from pipelines.check import main as check
from pipelines.errors import BadInput
from pipelines.examples import Example, Label
from tests.engine.small_run import configure
from tests.pipelines.small import IMAGES

ROW = """
heads:
  caption_truth: {kind: classes, classes: 2}

tasks:
  caption_truth:
    {title: Caption truth, number: 19, group: G4, head: caption_truth, reader: "tests.test_thirteenth_task:read",
     batch: 4, lr: 1.0e-3, max_tokens: 9, max_regions: 8, loss: classes, metric: class_accuracy, default: false}
"""


def read(*, sentences: Path) -> Iterator[Example]:
    """One JSON object a line; class 1 is a true sentence."""
    for number, line in enumerate(sentences.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            target = Label(int(record["true"]))
            yield Example(str(record["id"]), record["sentence"], (str(record["picture"]),), target)
        except (ValueError, KeyError) as error:
            raise BadInput(f"{sentences}: line {number}", f"not a record: {error}", "see the reader") from error


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A small run of the new task beside one that is there already; returns its configuration file."""
    configure(tmp_path)
    for split, count in (("train", 20), ("val", 6)):
        records = [
            {"id": i, "picture": int(IMAGES[i % len(IMAGES)]), "sentence": "a red ring", "true": i % 3 == 0}
            for i in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "row.yaml").write_text(ROW)

    sheet = yaml.safe_load((tmp_path / "sheet.yaml").read_text())
    sheet["sets"]["caption_truth"] = {
        "features": "detected.lmdb",
        "train": {"sentences": "train.jsonl"},
        "val": {"sentences": "val.jsonl"},
    }
    (tmp_path / "sheet.yaml").write_text(yaml.safe_dump(sheet))

    keys = yaml.safe_load((tmp_path / "run.yaml").read_text())
    keys["task_rows"].append(str(tmp_path / "row.yaml"))
    keys |= {"tasks": ["pairs", "caption_truth"], "max_iterations": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys))
    return tmp_path / "run.yaml"


def test_a_row_and_a_reader_are_a_task(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check([str(run)]) == 0
    assert "caption_truth" in capsys.readouterr().out

    assert main(["--config", str(run), "logging.console=plain"]) == 0
    assert "Caption truth" in capsys.readouterr().out
    folder = run.parent / "run"
    results = {row["task"]: row for row in read_rows(folder / "events.jsonl") if row["event"] == "result"}
    assert results["caption_truth"]["majority"] == pytest.approx(4 / 6)
    assert 0 <= results["caption_truth"]["score"] <= 1
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["task"] == "caption_truth"]
    assert rows[-1]["steps"] == 2 and rows[-1]["skipped"] == 0 and 0 < rows[-1]["loss"] < 10


def test_its_bad_records_are_refused_like_all_others(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = run.parent / "train.jsonl"
    annotations.write_text(annotations.read_text().replace('"picture": 2,', '"pictures": 2,', 1))
    assert main(["--config", str(run)]) == 2
    assert capsys.readouterr().err == f"error: {annotations}: line 2: not a record: 'picture' (see the reader)\n"
    assert not (run.parent / "run").exists()
