"""`RunConfig`: everything a run can be told, documented and checked where it is declared. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import to_jsonable_python

from engine import deepspeed_config
from engine.model.config import ModelConfig
from engine.overrides import Sources, gather
from engine.rotation import phases
from engine.tasks import TASKS_FILE, Table, TaskRow, TaskTokens, load_table
from engine.yaml_files import KeyPath, validated
from kernels import names
from pipelines.errors import BadInput

FORMAT: Literal[1] = 1
"""Version of the configuration format."""


MAY_CHANGE = (
    "output",
    "logging",
    "checkpoint",
    "data_path",
    "backend",
    "deepspeed",
    "ranks",
    "threads",
    "data_threads",
)
"""Keys that may differ when a run is continued: they change no number of it beyond the order of sums."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class World(_Section):
    """The embedded world, built on first use. Read where `data` is `world`."""

    path: str = Field(".world", description="folder that it is built into")
    seed: int = Field(0, ge=0, description="seed of scenes and annotations")
    size: Literal["default", "small"] = Field("default", description="how many scenes and annotations")


class TaskOverride(_Section):
    """Values of a task's row that this run changes."""

    batch: int | None = Field(None, ge=1, description="examples per step, over all ranks")
    accumulation: int | None = Field(
        None, ge=1, description="micro-batches that each rank makes of its part of a batch"
    )
    lr: float | None = Field(None, gt=0, description="the task's learning rate (moves its loss scale)")
    max_tokens: int | None = Field(None, ge=3, description="[CLS] and [SEP] included, the task token not")
    max_regions: int | None = Field(None, ge=2, description="global row and appended boxes included")


class Warmup(_Section):
    """Linear warm-up over the smaller of fraction x N and fraction x max_iterations (paper section 3.3)."""

    fraction: float = Field(0.1, ge=0, lt=1, description="the paper's eta")
    longest_task_iterations: int | None = Field(
        None, ge=1, description="N: iterations of the longest single-task run; none: 20 epochs of the largest task"
    )


class Decay(_Section):
    """The learning rate after warm-up."""

    kind: Literal["linear", "steps", "constant"] = Field("linear", description="linear ends at 0 after max_iterations")
    boundaries: tuple[int, ...] = Field((), description="steps: first iteration of each lower rate")
    factor: float = Field(0.2, gt=0, le=1, description="steps: each boundary multiplies the rate by this")

    @model_validator(mode="after")
    def _boundaries_fit(self) -> Self:
        if (self.kind == "steps") != bool(self.boundaries):
            raise ValueError("boundaries are needed by kind steps, and read by no other kind")
        if any(b <= a for a, b in zip((0, *self.boundaries), self.boundaries, strict=False)):
            raise ValueError(f"boundaries {list(self.boundaries)} must ascend from 1")
        return self


class Optimizer(_Section):
    """AdamW by the published rule: decay after the step, on matrices only (spec section 4.4)."""

    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-6, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="times rate times weight, taken off after the step")
    bias_correction: bool = Field(
        False, description="of the two moments; the published pretraining has it, the tasks not"
    )
    base_lr: float | None = Field(None, gt=0, description="the trunk's rate; none: the smallest of the tasks' rates")
    head_lr: float | None = Field(1e-4, gt=0, description="rate of the `vil_*` heads; none: the trunk's")
    clip: float = Field(0.0, ge=0, description="largest norm of a step's gradient; 0: as it comes, as published")
    update: Literal["live", "zero_filled"] = Field(
        "live",
        description="live: trunk and the head that ran (Algorithm 1); zero_filled: all heads, zeros as gradients",
    )

    @model_validator(mode="after")
    def _betas_fit(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must lie in [0, 1)")
        return self


class StopGo(_Section):
    """Dynamic stop-and-go (paper section 3.3, Algorithm 1). Thresholds are relative to the best score."""

    enabled: bool = Field(True, description="off: every task runs in every iteration")
    controller: Literal["reference", "paper"] = Field("reference", description="as the authors coded it, or as written")
    gap: int = Field(4, ge=1, description="Delta: a stopped task runs when the iteration is a multiple of this")
    stop_threshold: float = Field(0.001, ge=0, lt=1, description="a gain below this is none")
    go_threshold: float = Field(0.005, ge=0, lt=1, description="a fall below the best by more than this wakes the task")
    patience: int = Field(2, ge=1, description="evaluations without a gain that stop a task")
    cooldown: int = Field(1, ge=0, description="reference only: evaluations after a change of state that do not count")


class Curriculum(_Section):
    """Groups that train first, before the round-robin over all tasks (paper section 3.3 and Table 6)."""

    kind: Literal["none", "curriculum", "anti_curriculum"] = Field(
        "none", description="easy first or hard first: section 3.3 calls G3 fastest (4.3 trains G4), and G1 slowest"
    )
    groups: tuple[tuple[str, ...], ...] = Field(
        (), description="groups of each phase before the last; none: G3 (curriculum) or G1 (anti_curriculum)"
    )
    iterations: int | Literal["until_stopped"] = Field(
        "until_stopped", description="length of each such phase, or until all of its tasks have stopped"
    )

    @model_validator(mode="after")
    def _groups_fit(self) -> Self:
        if self.kind == "none" and self.groups:
            raise ValueError("groups are read by curriculum and anti_curriculum only")
        if isinstance(self.iterations, int) and self.iterations < 1:
            raise ValueError("iterations must be at least 1")
        return self


class Masking(_Section):
    """What pretraining hides (paper section 3.1). Read by tasks whose loss is `masked`."""

    words: float = Field(0.15, ge=0, le=1, description="share of word pieces; of these 80 % [MASK], 10 % a random word")
    regions: float = Field(0.15, ge=0, le=1, description="share of regions; of these 90 % lose their features")
    unmatched: float = Field(0.5, ge=0, le=1, description="share of images that get another image's caption")
    overlap: Literal["paper", "authors"] = Field(
        "paper", description="regions that overlap a chosen one lose their features too, or as the authors coded it"
    )
    iou: float = Field(0.4, ge=0, le=1, description="overlap above which a region gives a chosen one away")


class Validation(_Section):
    """Scoring once per task epoch."""

    max_examples: int | None = Field(None, ge=1, description="the first so many of each data set; none: all")
    batch_factor: int = Field(2, ge=1, description="validation batch over training batch")
    on_last: bool = Field(True, description="also after the last iteration")


class Guard(_Section):
    """Steps with a loss or gradient that is not finite change nothing and are counted."""

    max_skipped: int = Field(8, ge=1, description="so many in a row end the run")


class Logging(_Section):
    """What is written and shown, and how often."""

    every: int = Field(10, ge=1, description="iterations between rows of metrics.jsonl")
    console: Literal["auto", "plain", "table", "quiet"] = Field("auto", description="auto: a live table on a terminal")
    nvtx: bool = Field(
        False,
        description="name iterations, tasks, phases and blocks for NVIDIA's profilers (NVTX); never run on a GPU yet",
    )


class Checkpoint(_Section):
    """When to save beside the end of the run and a stop signal."""

    every: int | None = Field(None, ge=1, description="iterations between two checkpoints")
    minutes: float | None = Field(None, gt=0, description="minutes between two checkpoints")
    keep: int = Field(2, ge=1, description="newest checkpoints that stay")
    wait: bool = Field(
        False,
        description="stand still until a checkpoint is in place: a kill then loses one interval at most, and not what was "
        "done while it was written besides",
    )
    best: bool = Field(False, description="also save at each task's best score, and keep the best one of each task")


class Ranks(_Section):
    """Several processes: one per GPU, started by `deepspeed` or `torchrun`."""

    timeout_s: float = Field(
        300.0, gt=0, description="seconds without a step after which a rank gives the others up for lost"
    )


class RunConfig(_Section):
    """One training run. Paths are relative to the working directory, `extends` to the file that says it."""

    format: Literal[1] = Field(FORMAT, description="version of this format")
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$", description="names the run folder")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of weights, sampling, negatives and dropout")
    output: str = Field("", description="run folder; empty: runs/<name>; auto: runs/<name>-<next free number>")
    model: ModelConfig = Field(description="a preset's name (configs/models), a YAML file, or the keys themselves")
    data: str = Field("world", description="path of a data sheet, or `world`: the embedded one")
    world: World = World()
    unclean_data: Literal["refuse", "allow"] = Field(
        "refuse",
        description="refuse: leave out what the data sheet's removal list names, and do not start if an image of a test "
        "split remains in train or val (python -m pipelines.clean makes the list); allow: train on all (Table 2, row 1)",
    )
    tasks: Literal["all"] | tuple[str, ...] = Field("all", description="names of tasks in round-robin order, or `all`")
    task_rows: tuple[str, ...] = Field((), description="files that add rows to configs/tasks.yaml")
    task_overrides: dict[str, TaskOverride] = Field({}, description="changes to the rows of single tasks")
    task_tokens: TaskTokens = Field("dataset", description="one task token per data set, per head, or none (Table 6)")
    initial_weights: str | None = Field(None, description="checkpoint to start from: ours or the published layout")
    fresh_weights: tuple[str, ...] = Field(
        (),
        description="prefixes that initial_weights lack, or have in another shape, and that start anew: a head's name",
    )
    initial_text: str | None = Field(None, description="BERT folder to start the text stream from")
    share_prefixes: bool = Field(True, description="encode each text and image of a batch once before pairing")
    blind: bool = Field(False, description="region features zeroed: the image-blind baseline")
    max_iterations: int = Field(ge=1, description="round-robin iterations, counted from 1")
    warmup: Warmup = Warmup()
    decay: Decay = Decay()
    optimizer: Optimizer = Optimizer()
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="16 bits keep float32 master weights; float16 wants DeepSpeed's loss scaling, and a GPU"
    )
    backend: Literal["auto", "plain", "deepspeed"] = Field(
        "auto", description="plain: one process; auto: deepspeed where there are several, or where `deepspeed` is set"
    )
    deepspeed: dict[str, Any] | None = Field(
        None,
        description="DeepSpeed's own configuration: a preset (zero0, zero1, zero2, zero3, zero2_offload), a .json file "
        "(as --deepspeed_config), or its keys; none: zero1",
    )
    ranks: Ranks = Ranks()
    stopgo: StopGo = StopGo()
    curriculum: Curriculum = Curriculum()
    masking: Masking = Masking()
    validation: Validation = Validation()
    guard: Guard = Guard()
    logging: Logging = Logging()
    checkpoint: Checkpoint = Checkpoint()
    kernels: dict[str, str] = Field(
        {},
        description="backend (triton, native, torch) of single ops, or one name for all; "
        "adamw also deepspeed or apex, bias_dropout_residual_layernorm apex; "
        "what is not named: triton on CUDA, native on the CPU, torch where those cannot be had (stopgo doctor shows them)",
    )
    cuda_graphs: Literal["auto"] | bool = Field(
        "auto",
        description="pad batches to shape buckets (at most 5 % of rows), record forward and backward of each once, and "
        "replay them, so that a GPU need not wait for its host's launches; auto: on a GPU, wherever steps can be recorded "
        "(not under ZeRO stages 1 to 3, not in pretraining)",
    )
    resident_features: bool = Field(
        False,
        description="copy all features of the run to the device once; batches then carry row numbers. For a GPU with the room "
        "(0.41 MB an image of 100 regions); never run on one yet",
    )
    data_threads: int = Field(
        1, ge=1, description="threads that copy features into a batch, beside the loader's own work"
    )
    data_path: Literal["plain", "dali"] = Field(
        "plain",
        description="dali: training batches through a DALI pipeline, the same to the bit (make setup-dali); meant for GPUs, "
        "never run on one yet, slower on a CPU",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    threads: int | None = Field(None, ge=1, description="CPU threads of one process; none: torch's choice")

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task(cls, tasks: object) -> object:
        """`tasks: vqa` means the list of that one task."""
        return (tasks,) if isinstance(tasks, str) and tasks != "all" else tasks

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _read_deepspeed(cls, settings: object) -> object:
        """A preset's name, or a file."""
        if not isinstance(settings, str):
            return settings
        try:
            return deepspeed_config.read(settings)
        except BadInput as error:
            raise ValueError(str(error)) from None

    @field_validator("kernels", mode="before")
    @classmethod
    def _all_ops(cls, kernels: object) -> object:
        """`kernels: torch` means all ops."""
        return names.parse(kernels) if isinstance(kernels, str) else kernels

    @field_validator("kernels")
    @classmethod
    def _known_ops(cls, kernels: dict[str, str]) -> dict[str, str]:
        return names.check(kernels)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.tasks != "all" and (not self.tasks or len(set(self.tasks)) < len(self.tasks)):
            raise ValueError(f"tasks {list(self.tasks)} must name at least one task, and none twice")
        waits = self.curriculum.kind != "none" and self.curriculum.iterations == "until_stopped"
        if waits and not self.stopgo.enabled:
            raise ValueError("curriculum.iterations must be a number where stopgo is off: nothing would stop")
        if self.initial_text is not None and self.initial_weights is not None:
            raise ValueError("initial_text would be overwritten by initial_weights: give one of them")
        if self.backend == "plain" and self.deepspeed is not None:
            raise ValueError("deepspeed is read by backend deepspeed only, not by plain")
        if self.precision == "float16" and self.backend == "plain":
            raise ValueError(
                "precision float16 needs loss scaling, which backend plain has not: deepspeed, or bfloat16"
            )
        if self.decay.boundaries and self.decay.boundaries[-1] > self.max_iterations:
            raise ValueError(f"decay.boundaries: {self.decay.boundaries[-1]} lies past max_iterations")
        return self

    @property
    def folder(self) -> str:
        """The run folder as configured: `output`, or `runs/<name>` (`auto` is resolved by the engine)."""
        return self.output or f"runs/{self.name}"


def load(path: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """The run that a YAML file and `key.path=value` overrides describe, tasks checked against the task table.

    Raises BadInput, one line per wrong key, naming the file (or override) and the key path.
    """
    sources = gather(Path(path), overrides or [], RunConfig)
    config = validated(RunConfig, sources.data, sources.origin)
    _check_names(config, load_table(TASKS_FILE, _extra_files(config)), sources)
    _check_fit(config, load_tasks(config)[1], sources)
    return config


def load_tasks(config: RunConfig) -> tuple[Table, tuple[TaskRow, ...]]:
    """The task table, and the rows of this run in round-robin order with the run's overrides applied."""
    table = load_table(TASKS_FILE, _extra_files(config))
    rows = table.default_tasks() if config.tasks == "all" else tuple(table.row(name) for name in config.tasks)
    return table, tuple(_overridden(row, config.task_overrides.get(row.name)) for row in rows)


def _extra_files(config: RunConfig) -> tuple[Path, ...]:
    return tuple(Path(name) for name in config.task_rows)


def _overridden(row: TaskRow, override: TaskOverride | None) -> TaskRow:
    return row.model_copy(update=override.model_dump(exclude_none=True)) if override else row


def _check_names(config: RunConfig, table: Table, sources: Sources) -> None:
    """Tasks and groups that the run names exist. Overrides may name tasks that it does not train (`extends`)."""
    named: list[tuple[str, KeyPath]] = [(name, ("task_overrides", name)) for name in config.task_overrides]
    if config.tasks != "all":
        named += [(name, ("tasks",)) for name in config.tasks]
    for name, key in named:
        if name not in table.tasks:
            raise BadInput(f"{sources.origin(key)}: {key[0]}", f"no task {name}", f"there are {', '.join(table.tasks)}")
    groups = {row.group for row in table.tasks.values()}
    for group in (group for phase in config.curriculum.groups for group in phase):
        if group not in groups:
            where = f"{sources.origin(('curriculum', 'groups'))}: curriculum.groups"
            raise BadInput(where, f"no group {group}", f"there are {', '.join(sorted(groups))}")


def _check_fit(config: RunConfig, rows: tuple[TaskRow, ...], sources: Sources) -> None:
    """The model has room for the tasks, what is set is read by one of them, and the curriculum has tasks to begin with."""
    model, where = config.model, sources.origin(("model",))
    for row in rows:
        if config.task_tokens != "none" and row.token and row.number >= model.task_rows:
            what = f"task {row.name} has number {row.number}, but the task-token table has {model.task_rows} rows"
            raise BadInput(f"{where}: model.task_rows", what, "raise it, or set task_tokens: none")
        if row.max_tokens > model.max_position_embeddings:
            what = f"{model.max_position_embeddings} positions are fewer than max_tokens {row.max_tokens} of {row.name}"
            mend = f"raise it, or lower task_overrides.{row.name}.max_tokens"
            raise BadInput(f"{where}: model.max_position_embeddings", what, mend)
    set_to = config.masking.model_dump(exclude_defaults=True)
    if set_to and all(row.loss != "masked" for row in rows):
        key = next(iter(set_to))
        raise BadInput(
            f"{sources.origin(('masking', key))}: masking.{key}",
            "no task of this run hides words or regions: nobody would read it",
            "leave it out, or pretrain: configs/runs/pretrain.yaml",
        )
    curriculum = config.curriculum
    if curriculum.kind != "none" and len(phases(rows, curriculum.kind, curriculum.groups)) == 1:
        groups = ", ".join(sorted({row.group for row in rows}))
        raise BadInput(
            f"{sources.origin(('curriculum',))}: curriculum",
            "no task of this run is in its groups",
            f"they are in {groups}",
        )


def describe(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key path, its default or `required`, description) of every key, section by section."""
    rows = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            rows += describe(inner, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else f"default {json.dumps(to_jsonable_python(field.default))}"
        rows.append((f"{prefix}{name}", default, field.description or ""))
    return rows


def resolved(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included; `load` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def records_steps(config: RunConfig, device: str) -> bool:
    """Whether `cuda_graphs` asks for recorded steps on this kind of device."""
    return device == "cuda" if config.cuda_graphs == "auto" else config.cuda_graphs


def config_hash(config: RunConfig) -> str:
    """16 hex digits over all that can change a number of the run: the configuration and its task rows.

    Left out: where it writes, what it shows, when it saves, which way batches take, for they are the same, and over how many
    processes it is spread, and how.
    """
    told = config.model_dump(mode="json", exclude=set(MAY_CHANGE))
    rows = [row.model_dump(mode="json", exclude={"evaluation"}) for row in load_tasks(config)[1]]
    return hashlib.sha256(json.dumps([told, rows], sort_keys=True).encode()).hexdigest()[:16]
