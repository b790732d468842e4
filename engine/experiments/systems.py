"""The systems that the paper compares, and the runs that each is made of: rows of `configs/experiments`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.tasks import CONFIGS, TaskRow
from engine.yaml_files import read_mapping, validated
from pipelines.errors import BadInput

FOLDER = CONFIGS / "experiments"
PRETRAINING = "pretraining"
NOTHING: Literal["nothing"] = "nothing"
LIKE_ALL_TASKS: Literal["like all-tasks"] = "like all-tasks"
ALL_TASKS = "all-tasks"
"""The system whose runs set the length of runs of one task."""

_TOGETHER = {"task": 1, "pair": 2, "triple": 3}
"""How many tasks a run of each kind has."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Vary(_Row):
    """One run for each value of a key."""

    key: str
    values: tuple[int, ...]


class SystemRow(_Row):
    """One system; `configs/experiments/systems.yaml` says what its keys mean."""

    title: str
    each: Literal["run", "task", "group", "pair", "triple"] = "run"
    tasks: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    vary: Vary | None = None
    clean: bool = True
    starts_at: str | None = None
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _varies_whole_runs(self) -> Self:
        if self.vary is not None and self.each != "run":
            raise ValueError("vary goes with one run of all tasks")
        return self


class ExperimentRow(_Row):
    """What one name of `stopgo experiment NAME` runs."""

    title: str
    rows: dict[str, tuple[str, ...]] = Field(description="row of the paper -> systems that fill it")
    alone: tuple[str, ...] = Field((), description="of runs of one task, only those of these tasks; none: all")
    listed: bool = Field(True, description="whether `--list` shows it: one that repeats rows of others is left out")

    @property
    def systems(self) -> tuple[str, ...]:
        """Each once, in order."""
        return tuple(dict.fromkeys(name for names in self.rows.values() for name in names))


class ComparisonRow(_Row):
    """A difference between two systems that the paper reports."""

    of: str
    against: str
    title: str
    paper: tuple[str, str, str] = Field(description="table of the paper, its row of `of`, its row of `against`")


class ModelRow(_Row):
    """What the runs of one model override; `configs/experiments/models.yaml` says what its keys mean."""

    base: Path
    pretraining: Path | None = None
    starts_at: Literal["nothing", "pretraining"] = NOTHING
    small: bool = False
    alone: Literal["like all-tasks"] | dict[str, int] = LIKE_ALL_TASKS
    what: str = ""


class Catalogue(_Row):
    """All of it, checked against each other."""

    systems: dict[str, SystemRow]
    experiments: dict[str, ExperimentRow]
    comparisons: tuple[ComparisonRow, ...]
    models: dict[str, ModelRow]

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        named = [name for row in self.experiments.values() for name in row.systems]
        named += [name for row in self.comparisons for name in (row.of, row.against)]
        named += [row.starts_at for row in self.systems.values() if row.starts_at]
        if unknown := sorted(set(named) - self.systems.keys()):
            raise ValueError(f"no system {', '.join(unknown)}")
        return self

    def chosen(self, name: str) -> ExperimentRow:
        """An experiment, or one system as an experiment. Raises BadInput for a name that is neither experiment nor system."""
        if name in self.experiments:
            return self.experiments[name]
        if name in self.systems:
            return ExperimentRow(title=self.systems[name].title, rows={name: (name,)})
        known = ", ".join((*self.experiments, *self.systems))
        raise BadInput(f"experiment {name}", "no such experiment", f"there are {known}")

    def model(self, name: str) -> ModelRow:
        """Raises BadInput for a model without a row."""
        if name not in self.models:
            raise BadInput(f"model {name}", "no such row", f"there are {', '.join(self.models)}")
        return self.models[name]


def load_catalogue(folder: Path = FOLDER) -> Catalogue:
    """The catalogue that the files of a folder make together; paths of models are relative to it. Raises BadInput."""
    merged: dict[str, Any] = {}
    origins: dict[str, Path] = {}
    for path in sorted(folder.glob("*.yaml")):
        for key, value in read_mapping(path).items():
            merged[key], origins[key] = value, path
    found = validated(Catalogue, merged, lambda key: origins.get(str(key[0]), folder) if key else folder)
    models = {name: _placed(row, folder) for name, row in found.models.items()}
    return found.model_copy(update={"models": models})


def _placed(row: ModelRow, folder: Path) -> ModelRow:
    pretraining = row.pretraining and (folder / row.pretraining).resolve()
    return row.model_copy(update={"base": (folder / row.base).resolve(), "pretraining": pretraining})


@dataclass(frozen=True)
class Entry:
    """One run of a system, but for seed and length."""

    system: str
    part: str
    """Which of the system's runs: a task, a group, tasks joined by dots, a value; empty for the only one."""
    tasks: tuple[str, ...]
    clean: bool
    overrides: tuple[str, ...]
    starts_at: str
    """`nothing`, `pretraining`, or the name of another entry."""
    alone: bool
    """Whether its length is that of a run of one task."""

    @property
    def name(self) -> str:
        """Of the run, without its seed."""
        return f"{self.system}-{self.part}" if self.part else self.system


def entries(catalogue: Catalogue, system: str, rows: Sequence[TaskRow], begin: str) -> list[Entry]:
    """The runs of a system.

    `rows`: the tasks of the base configuration in their order; tasks that a system names itself need not be among them.
    `begin`: where a run without a start of its own begins. Raises BadInput where the tasks do not make a run of it.
    """
    row = catalogue.systems[system]
    if system == PRETRAINING:  # its tasks are its own configuration's
        return [Entry(system, "", (), row.clean, row.overrides, NOTHING, alone=False)]
    groups = {task.name: task.group for task in rows}
    names = [name for name in row.tasks or groups if groups.get(name) not in row.without]
    made = []
    for part, tasks in _parts(row, names, groups):
        start = _start(catalogue, row, tasks, rows) or begin
        varied = (f"{row.vary.key}={part}",) if row.vary else ()
        made.append(Entry(system, part, tasks, row.clean, (*row.overrides, *varied), start, row.each == "task"))
    if not made:
        raise BadInput(f"system {system}", "the tasks of the base configuration make no run of it")
    return made


def _parts(row: SystemRow, names: Sequence[str], groups: Mapping[str, str]) -> Iterable[tuple[str, tuple[str, ...]]]:
    if row.vary is not None:
        return [(str(value), tuple(names)) for value in row.vary.values]
    if row.each == "run":
        return [("", tuple(names))] if names else []
    if row.each == "group":
        found = dict.fromkeys(groups[name] for name in names)
        return [(group, tuple(name for name in names if groups[name] == group)) for group in found]
    return [(".".join(tasks), tasks) for tasks in combinations(names, _TOGETHER[row.each])]


def _start(catalogue: Catalogue, row: SystemRow, tasks: tuple[str, ...], rows: Sequence[TaskRow]) -> str | None:
    """The entry of the system that it starts at, which trained the same tasks."""
    if row.starts_at is None:
        return None
    for entry in entries(catalogue, row.starts_at, rows, NOTHING):
        if set(tasks) <= set(entry.tasks):
            return entry.name
    raise BadInput(f"system {row.title}", f"no run of {row.starts_at} trains {', '.join(tasks)}")
