"""A series: which runs an experiment takes, seed by seed, and the configuration of each. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.config import RunConfig, load, load_tasks
from engine.experiments.scores import steps_of
from engine.experiments.systems import ALL_TASKS, LIKE_ALL_TASKS, NOTHING, PRETRAINING, Catalogue, Entry, entries
from engine.tasks import CONFIGS, Table, TaskRow
from pipelines.errors import BadInput
from pipelines.files import open_json, write_atomic

FORMAT = 1
PLAN = "plan.json"
_SHARE = re.compile(r"\{iterations/(\d+)\}")


@dataclass(frozen=True)
class Job:
    """One run: an entry with a seed."""

    entry: Entry
    seed: int
    after: tuple[str, ...]
    """Names of the jobs that must have ended well before."""

    @property
    def name(self) -> str:
        """Of the run and of its folder."""
        return f"{self.entry.name}-seed{self.seed}"


@dataclass(frozen=True)
class Series:
    """Everything that the runs of one output folder have in common."""

    catalogue: Catalogue
    model: str
    """Its row of `models.yaml`."""
    base: Path
    """The run configuration that all runs override."""
    iterations: int
    """Of runs of several tasks."""
    seeds: tuple[int, ...]
    output: Path
    overrides: tuple[str, ...] = ()
    """`key=value` for every run, such as the data sheet."""
    weights: str | None = None
    """A pretrained model to begin from, instead of the run `pretraining`."""
    threads: int | None = None
    """CPU threads of one run; none: torch's choice."""

    @cached_property
    def base_config(self) -> RunConfig:
        """The base configuration with the series' overrides."""
        return load(self.base, list(self.overrides))

    @cached_property
    def table(self) -> Table:
        """The task table that the base configuration names."""
        return load_tasks(self.base_config)[0]

    @cached_property
    def rows(self) -> tuple[TaskRow, ...]:
        """Tasks of the base configuration."""
        return load_tasks(self.base_config)[1]

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Every run of every system that these tasks can make, by name without seed."""
        row = self.catalogue.model(self.model)
        begin = PRETRAINING if self.weights else row.starts_at
        found: dict[str, Entry] = {}
        for system in self.catalogue.systems:
            try:
                made = entries(self.catalogue, system, self.rows, begin)
            except BadInput:
                continue  # told by `of`, if the system is asked for
            found |= {entry.name: entry for entry in made}
        return found

    def of(self, system: str) -> list[Entry]:
        """The runs of a system. Raises BadInput where the base configuration's tasks make none."""
        found = [entry for entry in self.entries.values() if entry.system == system]
        return found or entries(self.catalogue, system, self.rows, NOTHING)

    def folder(self, job: str) -> Path:
        """The run folder of a job, by its name."""
        return self.output / "runs" / job

    def jobs(self, systems: Iterable[str], alone: Sequence[str] = ()) -> list[Job]:
        """The runs of these systems and those that they need, whole seeds one after the other, each after what it needs.

        `alone`: of runs of one task, only those of these tasks; empty: all.
        """
        wanted = [entry for system in systems for entry in self.of(system)]
        wanted = [entry for entry in wanted if not (alone and entry.alone) or entry.tasks[0] in alone]
        made: dict[str, Job] = {}
        for seed in self.seeds:
            for entry in wanted:
                self._add(entry, seed, made)
        return list(made.values())

    def _add(self, entry: Entry, seed: int, made: dict[str, Job]) -> str:
        if entry.system == PRETRAINING:
            seed = self.seeds[0]  # one for the whole series
        needs = [self._add(other, seed, made) for other in self._needs(entry)]
        job = Job(entry, seed, tuple(needs))
        made.setdefault(job.name, job)
        return job.name

    def _needs(self, entry: Entry) -> list[Entry]:
        needs = []
        if entry.starts_at != NOTHING and not (entry.starts_at == PRETRAINING and self.weights):
            needs.append(entry.starts_at)
        if entry.alone and self.catalogue.model(self.model).alone == LIKE_ALL_TASKS and ALL_TASKS not in needs:
            needs.append(ALL_TASKS)
        return [self.entries[name] for name in needs]

    def iterations_of(self, job: Job, assumed: bool = False) -> int:
        """Length of a run. One task alone gets as many steps as the all-tasks run of its seed gave it, or its own number.

        `assumed`: before that run is there, the length of runs of several tasks. Raises BadInput for a task without a number.
        """
        if not job.entry.alone:
            return self.iterations
        rule, task = self.catalogue.model(self.model).alone, job.entry.tasks[0]
        if isinstance(rule, dict):
            if task not in rule:
                raise BadInput(
                    f"models.{self.model}.alone", f"no length for a run of {task} alone", "add a number for it"
                )
            return rule[task]
        if assumed:
            return self.iterations
        return steps_of(self.folder(f"{ALL_TASKS}-seed{job.seed}")).get(task, self.iterations)

    def configuration(self, job: Job, assumed: bool = False) -> tuple[Path, list[str]]:
        """The file and the overrides that `engine.train` is given. `assumed`: see `iterations_of`."""
        entry = job.entry
        shared = [f"name={job.name}", f"seed={job.seed}", f"output={self.folder(job.name)}", "logging.console=plain"]
        shared += [f"threads={self.threads}"] if self.threads else []
        shared += ["checkpoint.keep=1", *self.overrides]
        if entry.system == PRETRAINING:
            path = self.catalogue.model(self.model).pretraining
            if path is None:
                raise BadInput(f"models.{self.model}", "no configuration of its pretraining", "give --weights")
            return path, [*shared, *entry.overrides]
        iterations = self.iterations_of(job, assumed)
        given = [f"max_iterations={iterations}", f"tasks=[{', '.join(entry.tasks)}]"]
        if entry.alone and self.catalogue.model(self.model).alone == LIKE_ALL_TASKS:
            # else a small data set's 20 epochs would bound its warm-up: the same share of the run as all tasks together have
            given += [f"warmup.longest_task_iterations={iterations}"]
        given += [f"unclean_data={'refuse' if entry.clean else 'allow'}"]
        given += [_SHARE.sub(lambda share: str(max(1, iterations // int(share[1]))), key) for key in entry.overrides]
        return self.base, [*shared, *given, *self._start(job)]

    def _start(self, job: Job) -> list[str]:
        start = job.entry.starts_at
        if start == NOTHING:
            return []
        if start != PRETRAINING:
            return [f"initial_weights={self.folder(f'{start}-seed{job.seed}')}"]
        fresh = [name for name, head in self.table.heads.items() if head.kind != "masked"]
        fresh.append("bert.embeddings.task_embeddings")
        weights = self.weights or self.folder(f"{PRETRAINING}-seed{self.seeds[0]}")
        return [f"initial_weights={weights}", f"fresh_weights=[{', '.join(fresh)}]"]

    def check(self, jobs: Sequence[Job]) -> None:
        """Load every configuration, so that what is wrong is said before the first run. Raises BadInput."""
        for job in jobs:
            path, overrides = self.configuration(job, assumed=True)
            load(path, overrides)

    def as_json(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        return {
            "format": FORMAT, "model": self.model, "base": _from_checkout(self.base), "iterations": self.iterations,
            "seeds": list(self.seeds), "overrides": list(self.overrides), "weights": self.weights,
        }  # fmt: skip

    def save(self) -> None:
        """Write `plan.json`, which a later start of the same series goes on with."""
        self.output.mkdir(parents=True, exist_ok=True)
        write_atomic(self.output / PLAN, (json.dumps(self.as_json(), indent=1) + "\n").encode())


def _from_checkout(path: Path) -> str:
    """As seen from the checkout, if it lies there: the same on every machine."""
    root = CONFIGS.parent
    return str(path.resolve().relative_to(root)) if path.resolve().is_relative_to(root) else str(path.resolve())


def read_plan(output: Path) -> dict[str, Any] | None:
    """The plan of a series that was begun in this folder; None where there is none. Raises BadInput for a damaged one."""
    path = output / PLAN
    if not path.exists():
        return None
    plan, kinds = open_json(path), {"model": str, "base": str, "iterations": int, "seeds": list, "overrides": list}
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        raise BadInput(path, f"not the plan of a series in format {FORMAT}", "take another --output")
    for key, kind in kinds.items():
        if not isinstance(plan.get(key), kind):
            raise BadInput(f"{path}: {key}", "missing, or of the wrong kind", "take another --output")
    if not all(type(seed) is int for seed in plan["seeds"]) or not plan["seeds"]:
        raise BadInput(f"{path}: seeds", "not a list of whole numbers", "take another --output")
    if not isinstance(plan.setdefault("weights", None), str | None):
        raise BadInput(f"{path}: weights", "not the name of a file", "take another --output")
    return plan
