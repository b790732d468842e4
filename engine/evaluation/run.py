"""Task after task: its rule, its scores, its files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from engine.evaluation.rules import RULES
from engine.evaluation.scores import TaskScores, summary
from engine.tasks import TaskRow
from engine.trained import Trained
from pipelines.errors import BadInput
from pipelines.files import write_atomic
from pipelines.progress import Show

Split = Literal["test", "val"]
SCORES = "scores.json"


def evaluate(
    trained: Trained,
    tasks: Sequence[str] | None = None,
    split: Split = "test",
    output: Path | None = None,
    show: Show = lambda what, done, total: None,
) -> dict[str, TaskScores]:
    """Scores by task, in the order of `tasks` (none: all that the run trained and that have a rule).

    `val` is the split that the run validated on, without images that some data set tests on; `test` is whole. A data set
    that has no test split in the sheet is evaluated on val, as the paper does with Visual Genome QA; `TaskScores.split` says
    so. With `output`, a folder that is made where it is not there, each task's result file, `<task>_<split>.<suffix>`, is
    written as soon as the task is done, and `scores.json` at the end. Raises BadInput for tasks that were not trained or have
    no rule, damaged records, and logits that are not finite.
    """
    rows = _rows(trained, tasks)
    trained.check_data()  # before anything is written
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    scores = {}
    for row in rows:
        data = trained.data(row.name, split if split in trained.sheet.entry(row.name).splits() else "val")
        assert row.rule is not None  # `_rows` saw to it
        outcome = RULES[row.rule](trained, data, show)
        names = data.group_names if outcome.by_group else ("",) * len(data.group_names)
        scores[row.name] = summary(outcome.marks, outcome.metrics, names, data.group_codes, data.split)
        if output is not None:
            write_atomic(output / f"{row.name}_{data.split}.{outcome.file.suffix}", outcome.file.content)
    if output is not None:
        write_atomic(output / SCORES, _json(trained, scores))
    return scores


def _rows(trained: Trained, tasks: Sequence[str] | None) -> list[TaskRow]:
    if tasks is None:
        return [row for row in trained.rows.values() if row.rule is not None]
    rows = [trained.row(name) for name in dict.fromkeys(tasks)]
    for row in rows:
        if row.rule is None:
            raise BadInput(f"task {row.name}", "pretraining has no test", "evaluate one of the tasks")
    return rows


def _json(trained: Trained, scores: Mapping[str, TaskScores]) -> bytes:
    found = {name: task.as_json() for name, task in scores.items()}
    whole = {"checkpoint": str(trained.path), "precision": trained.config.precision, "tasks": found}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False).encode()
