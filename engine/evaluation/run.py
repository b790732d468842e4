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

    `val` is the split that the run validated on, without images that some data set tests on; `test` is whole. With `output`,
    a folder that is made where it is not there, each task's result file, `<task>_<split>.<suffix>`, is written as soon as the
    task is done, and `scores.json` at the end. Raises BadInput for tasks that were not trained or have no rule, splits that
    the data sheet does not have, damaged records, and logits that are not finite.
    """
    rows = _rows(trained, tasks)
    missing = [row.name for row in rows if split not in trained.sheet.entry(row.name).splits()]
    if missing:
        where = f"{trained.sheet.path}: sets.{missing[0]}.{split}"
        raise BadInput(
            where, "the sheet does not have this split", "name its files there, or leave the task out (--tasks)"
        )
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    scores = {}
    for row in rows:
        data = trained.data(row.name, split)
        outcome = RULES[row.rule](trained, data, show)  # type: ignore[index]
        names = data.group_names if outcome.by_group else ("",) * len(data.group_names)
        scores[row.name] = summary(outcome.marks, outcome.metrics, names, data.group_codes, len(data))
        if output is not None:
            write_atomic(output / f"{row.name}_{split}.{outcome.file.suffix}", outcome.file.content)
    if output is not None:
        write_atomic(output / SCORES, _json(trained, split, scores))
    return scores


def _rows(trained: Trained, tasks: Sequence[str] | None) -> list[TaskRow]:
    if tasks is None:
        return [row for row in trained.rows.values() if row.rule is not None]
    rows = [trained.row(name) for name in dict.fromkeys(tasks)]
    for row in rows:
        if row.rule is None:
            raise BadInput(f"task {row.name}", "pretraining has no test", "evaluate one of the tasks")
    return rows


def _json(trained: Trained, split: str, scores: Mapping[str, TaskScores]) -> bytes:
    found = {name: task.as_json() for name, task in scores.items()}
    whole = {"checkpoint": str(trained.path), "split": split, "precision": trained.config.precision, "tasks": found}
    return json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False).encode()
