"""The task table: one frozen row per data set, one per head, read from `configs/tasks.yaml`. Imports no torch.

A new task is a row and a reader; no code knows task names.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.yaml_files import read_mapping, validated
from pipelines.errors import BadInput

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TASKS_FILE = CONFIGS / "tasks.yaml"

MAX_TASK_NUMBER = 64
"""Task numbers stay below it, so that (iteration, number) makes one coordinate of random draws."""

HeadKind = Literal["answers", "match", "regions", "paired_classes", "classes", "masked"]
LossKind = Literal["soft_labels", "options", "regions", "choices", "classes", "masked"]
MetricKind = Literal[
    "soft_accuracy", "option_accuracy", "region_accuracy", "choice_accuracy", "class_accuracy", "alignment_accuracy"
]
EvaluationKind = Literal["vqa", "gqa", "answers", "retrieval", "regions", "choices", "nlvr2", "classes"]
TaskTokens = Literal["dataset", "head", "none"]

LOSSES: dict[HeadKind, tuple[LossKind, ...]] = {
    "answers": ("soft_labels",),
    "match": ("options",),
    "regions": ("regions", "choices"),
    "paired_classes": ("classes",),
    "classes": ("classes",),
    "masked": ("masked",),
}
"""Which losses can read the output of which head."""

METRICS: dict[LossKind, MetricKind] = {
    "soft_labels": "soft_accuracy",
    "options": "option_accuracy",
    "regions": "region_accuracy",
    "choices": "choice_accuracy",
    "classes": "class_accuracy",
    "masked": "alignment_accuracy",
}
"""Which metric scores the targets of which loss."""

EVALUATIONS: dict[LossKind, tuple[EvaluationKind, ...]] = {
    "soft_labels": ("answers", "vqa", "gqa"),
    "options": ("retrieval",),
    "regions": ("regions",),
    "choices": ("choices",),
    "classes": ("classes", "nlvr2"),
    "masked": (),
}
"""Which rules can evaluate the decisions of which loss; the first is taken where a row names none. The rules themselves are in
`engine/evaluation/rules.py`."""

LOSS_PARTS: dict[LossKind, tuple[str, ...]] = {"masked": ("masked_words", "masked_regions", "alignment")}
"""Losses that are a sum, and its parts."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeadRow(_Row):
    """One output head (spec section 1.6). Tasks that name the same head share its weights."""

    name: str = Field(description="prefix of its parameters in the published layout")
    kind: HeadKind = Field(description="what it computes, and over which rows")
    options: Literal[4] | None = Field(
        None, description="match: (text, image) pairs that compete; the sampler makes four"
    )
    classes: int | None = Field(None, ge=2, description="classes, paired_classes: how many")
    labels: tuple[str, ...] | None = Field(None, description="classes, paired_classes: their names, in order")

    @model_validator(mode="after")
    def _sizes_fit_kind(self) -> Self:
        wanted = {"match": "options", "classes": "classes", "paired_classes": "classes"}.get(self.kind)
        for size in ("options", "classes"):
            if (getattr(self, size) is not None) != (size == wanted):
                raise ValueError(f"a head of kind {self.kind} {'needs' if size == wanted else 'has no'} {size}")
        if self.labels is not None and len(self.labels) != (self.classes or 0):
            raise ValueError(f"{len(self.labels)} labels for {self.classes or 0} classes")
        return self

    def label(self, index: int) -> str:
        """What people call a class: its name, or its number where the table has no names."""
        return str(index) if self.labels is None else self.labels[index]


class TaskRow(_Row):
    """One data set (spec sections 1.6, 2 and 3.2)."""

    name: str = Field(pattern=r"^[a-z0-9_]+$", description="how runs, checkpoints and reports call it")
    title: str = Field(description="how people call it")
    number: int = Field(
        ge=0,
        lt=MAX_TASK_NUMBER,
        description="row of the task-token table, where it has a token; part of every random draw",
    )
    group: str = Field(pattern=r"^\S+$", description="the paper's group: G1 ... G4")
    head: str = Field(description="name of its head")
    reader: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$", description="module:function that yields examples")
    images: int = Field(1, ge=1, description="images per example")
    batch: int = Field(ge=1, description="examples per step, over all ranks")
    accumulation: int = Field(1, ge=1, description="micro-batches that each rank makes of its part of a batch")
    lr: float = Field(gt=0, description="learning rate tuned for this task alone")
    max_tokens: int = Field(ge=3, description="[CLS] and [SEP] included, the task token not")
    max_regions: int = Field(ge=2, description="global row and appended annotated boxes included")
    loss: LossKind = Field(description="what is minimised; must fit the head's kind")
    metric: MetricKind = Field(description="what validation reports, in [0, 1], higher is better; must fit the loss")
    evaluation: EvaluationKind | None = Field(
        None, description="the official rule and the form of its result file; must fit the loss"
    )
    default: bool = Field(True, description="part of `tasks: all`")
    token: bool = Field(True, description="whether its texts carry a task token; pretraining's do not")

    @model_validator(mode="after")
    def _metric_fits_loss(self) -> Self:
        if self.metric != METRICS[self.loss]:
            raise ValueError(f"metric {self.metric} cannot score loss {self.loss}; use {METRICS[self.loss]}")
        return self

    @model_validator(mode="after")
    def _evaluation_fits_loss(self) -> Self:
        fitting = EVALUATIONS[self.loss]
        if self.evaluation is not None and self.evaluation not in fitting:
            raise ValueError(f"evaluation {self.evaluation} cannot judge loss {self.loss}; use {' or '.join(fitting)}")
        return self

    @property
    def rule(self) -> EvaluationKind | None:
        """How the data set is evaluated: `evaluation`, or what its loss implies. None: it is not (pretraining)."""
        return self.evaluation or next(iter(EVALUATIONS[self.loss]), None)


class Table(_Row):
    """All heads and tasks, by name, tasks in file order, as `load_table` checked them against each other."""

    heads: dict[str, HeadRow]
    tasks: dict[str, TaskRow]

    def row(self, name: str) -> TaskRow:
        """The task's row. Raises BadInput for a name that the table does not have."""
        if name not in self.tasks:
            raise BadInput(f"task {name}", "no such task", f"there are {', '.join(self.tasks)}")
        return self.tasks[name]

    def head(self, task: TaskRow) -> HeadRow:
        """The head of a task of this table."""
        return self.heads[task.head]

    def default_tasks(self) -> tuple[TaskRow, ...]:
        """The rows of `tasks: all`, in file order."""
        return tuple(task for task in self.tasks.values() if task.default)


def load_table(path: Path = TASKS_FILE, extra: Sequence[Path] = ()) -> Table:
    """The table in `path`, and the rows that the files in `extra` add. Raises BadInput naming file and key.

    Kept until a file changes: a series of experiments loads hundreds of configurations, and this is most of their time.
    """
    files = (path, *extra)
    return _load_table(files, tuple(file.stat().st_mtime_ns if file.exists() else 0 for file in files))


@lru_cache(maxsize=16)
def _load_table(files: tuple[Path, ...], changed: tuple[int, ...]) -> Table:
    path = files[0]
    merged: dict[str, dict[str, Any]] = {"heads": {}, "tasks": {}}
    origins: dict[tuple[str, str], Path] = {}
    for file in files:
        for kind, rows in read_mapping(file).items():
            if kind not in merged:
                raise BadInput(f"{file}: {kind}", "unknown key; valid are heads, tasks")
            for name, row in _rows(file, kind, rows):
                if name in merged[kind]:
                    raise BadInput(f"{file}: {kind}.{name}", f"{origins[kind, name]} has this name already")
                merged[kind][name] = {"name": name, **row}
                origins[kind, name] = file
    table = validated(
        Table, merged, lambda key: origins.get((str(key[0]), str(key[1])), path) if len(key) > 1 else path
    )
    owners: dict[int, str] = {}
    for task in table.tasks.values():
        if misfit := _misfit(task, table.heads, owners.setdefault(task.number, task.name)):
            key, what = misfit
            raise BadInput(f"{origins['tasks', task.name]}: tasks.{task.name}.{key}", what)
    return table


def _rows(file: Path, kind: str, rows: Any) -> Iterable[tuple[str, dict[str, Any]]]:
    if not isinstance(rows, dict):
        raise BadInput(f"{file}: {kind}", "not a mapping of names to rows")
    for name, row in rows.items():
        if not isinstance(row, dict) or "name" in row:
            raise BadInput(f"{file}: {kind}.{name}", "not a row of named values (its name is its key)")
        yield str(name), row


def _misfit(task: TaskRow, heads: dict[str, HeadRow], owner: str) -> tuple[str, str] | None:
    """Key and reason where a row does not fit its head or takes another task's number."""
    if task.head not in heads:
        return "head", f"there is no head {task.head}; there are {', '.join(heads)}"
    kind = heads[task.head].kind
    if task.loss not in LOSSES[kind]:
        return "loss", f"a head of kind {kind} feeds {' or '.join(LOSSES[kind])}, not {task.loss}"
    if task.images != (2 if kind == "paired_classes" else 1):
        return "images", f"{task.images} do not fit a head of kind {kind}"
    if owner != task.name:
        return "number", f"{task.number} is the number of {owner} already"
    return None


def task_tokens(mode: TaskTokens, tasks: Sequence[TaskRow]) -> dict[str, int | None]:
    """Row of the task-token table for each task (paper section 3.2 and Table 6).

    `dataset`: its own number. `head`: the smallest number among `tasks` that share its head. `none`: no task token.
    """

    def token(task: TaskRow) -> int:
        return task.number if mode == "dataset" else min(other.number for other in tasks if other.head == task.head)

    return {task.name: token(task) if task.token and mode != "none" else None for task in tasks}


def base_lr(tasks: Sequence[TaskRow]) -> float:
    """The trunk's learning rate: the smallest of the tasks' (paper section 3.3, loss scaling)."""
    return min(task.lr for task in tasks)


def loss_scale(tasks: Sequence[TaskRow]) -> dict[str, float]:
    """Factor on each task's loss: its learning rate over the smallest (paper section 3.3, loss scaling)."""
    base = base_lr(tasks)
    return {task.name: task.lr / base for task in tasks}
