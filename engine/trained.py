"""A trained model and what it takes to ask it: configuration, task rows, vocabulary, answers, and the data that it names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from engine import checkpoint, exported
from engine.assembly import (
    DTYPES,
    build_model,
    data_spec,
    device_of,
    shared_answers,
    sheet_path,
    test_images,
    use_kernels,
)
from engine.config import RunConfig, load, load_tasks
from engine.model.published import load_published, read_state
from engine.model.vilbert import ViLBERT
from engine.tasks import Table, TaskRow, task_tokens
from pipelines.answers import Answers
from pipelines.batch import Batch
from pipelines.datasets import TaskData, load_task
from pipelines.errors import BadInput
from pipelines.held_out import HeldOut
from pipelines.loader import validation_batches
from pipelines.sheet import Sheet, load_sheet
from pipelines.wordpiece import WordPiece

_CHANGEABLE = ("data", "world", "kernels", "device", "threads", "precision", "validation", "unclean_data")
"""What an evaluation may say otherwise than the run did: none of it changes which function the model is."""


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, for the tasks that its run trained."""

    path: Path
    """The checkpoint, or the file of weights."""
    config: RunConfig
    table: Table
    rows: Mapping[str, TaskRow]
    """Of the run's tasks, in its order."""
    sheet: Sheet
    tokenizer: WordPiece
    answers: Mapping[str, Answers]
    """By head."""
    model: ViLBERT
    device: torch.device
    _held: list[HeldOut] = field(default_factory=list, repr=False)
    _data: dict[tuple[str, str], TaskData] = field(default_factory=dict, repr=False)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and features."""
        return DTYPES[self.config.precision]

    def row(self, task: str) -> TaskRow:
        """The task's row. Raises BadInput for one that the run did not train."""
        if task not in self.rows:
            raise BadInput(f"task {task}", f"{self.path} was not trained on it", f"it knows {', '.join(self.rows)}")
        return self.rows[task]

    def token(self, task: str) -> int | None:
        """Row of the task-token table that the run gave this task."""
        return task_tokens(self.config.task_tokens, list(self.rows.values()))[task]

    def data(self, task: str, split: str) -> TaskData:
        """A split of a task, as the run would read it: train and val do without test images, test is whole.

        Raises BadInput where the sheet has no such split, or as `pipelines.datasets.load_task` does.
        """
        if (task, split) not in self._data:
            row = self.row(task)
            self.check_data()
            removed = self._test_images().keys(task, split) if split != "test" else frozenset()
            self._data[task, split] = load_task(
                data_spec(row, self.table.head(row)), self.sheet, split, self.tokenizer,
                answers=self.answers.get(row.head), removed=removed,
            )  # fmt: skip
        return self._data[task, split]

    def check_data(self) -> None:
        """Raises BadInput for an exported model, which came without a data sheet."""
        if not self.sheet.sets:
            raise BadInput(self.path, "an exported model, which has no data sets with it", "name some: data=SHEET.yaml")

    def batches(self, data: TaskData, blind: bool = False, max_examples: int | None = None) -> Iterator[Batch]:
        """The split in its own order, packed as validation packs it, on the host. `blind`: region features zeroed."""
        row = self.row(data.spec.name)
        return validation_batches(
            data, row.batch * self.config.validation.batch_factor, seed=self.config.seed, task_token=self.token(row.name),
            dtype=self.dtype, share=self.config.share_prefixes, blind=blind, max_examples=max_examples,
        )  # fmt: skip

    @torch.inference_mode()
    def logits(self, batch: Batch) -> Tensor:
        """float32 logits of the task's head for a batch, on the host; shapes by the head's kind (`engine.model.heads`)."""
        moved = batch.to(self.device).with_features()
        return self.model(moved, self.rows[batch.task].head, share=self.config.share_prefixes).float().cpu()

    def _test_images(self) -> HeldOut:
        if not self._held:
            rows = tuple(self.rows.values())
            self._held.append(test_images(self.config, self.table, rows, self.sheet, lambda message: None))
        return self._held[0]


def load_trained(
    source: Path,
    config: Path | None = None,
    overrides: Sequence[str] = (),
    say: Callable[[str], None] = lambda message: None,
) -> Trained:
    """The model of a run folder (its newest checkpoint that verifies), of one checkpoint of it, of an exported folder, or of a
    file of weights.

    An exported folder needs no data to be asked, and has none unless `overrides` name `data`.
    `config`: the run configuration, which a file of weights needs and a run brings along; `overrides`: `key=value`, of what
    changes no weights (`data`, `device`, `threads`, `precision`, `kernels`, …). Raises BadInput.
    """
    alone = config is None and exported.is_exported(source)
    if alone:
        exported.verify(source)
    moved = exported.overrides(source) if alone else []
    configuration = load(config or _config_of(source), [*overrides, *_nothing_to_begin_from(), *moved])
    for override in overrides:
        key = override.split("=", 1)[0]
        if key.split(".")[0] not in _CHANGEABLE:
            raise BadInput(key, "an evaluation cannot change it", f"it may change {', '.join(_CHANGEABLE)}")
    table, rows = load_tasks(configuration)
    device = device_of(configuration)
    use_kernels(configuration, device, lambda message: None)
    path, state = _weights(source, say)
    if alone and not any(override.startswith("data=") for override in overrides):
        sheet = exported.no_data(source)
    else:
        sheet = load_sheet(sheet_path(configuration, say), [row.name for row in rows])
    heads = {row.head: table.head(row).kind for row in rows}
    answers = exported.answers(source, heads) if alone else shared_answers(rows, sheet)
    model = build_model(configuration, table, rows, answers, lambda message: None)
    load_published(model, state, path)
    model = model.to(device, DTYPES[configuration.precision]).eval()
    tokenizer = WordPiece.load(sheet.vocabulary)
    return Trained(
        path, configuration, table, {row.name: row for row in rows}, sheet, tokenizer, answers, model, device
    )


def run_folder(source: Path) -> Path | None:
    """The run folder that this is, or that this checkpoint lies in; None for neither."""
    for folder in (source, *source.absolute().parents[:2]):
        if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def _config_of(source: Path) -> Path:
    if not source.exists():
        raise BadInput(source, "no such run, checkpoint or file of weights")
    if exported.is_exported(source):
        return source / exported.RUN
    folder = run_folder(source)
    if folder is None and source.is_dir() and not (source / "manifest.json").is_file():
        raise BadInput(source, "neither a run folder, nor a checkpoint, nor an exported folder", "check the path")
    if folder is None:
        raise BadInput(source, "weights alone, without the configuration of a run", "name it with --config RUN.yaml")
    return folder / "config.yaml"


def _nothing_to_begin_from() -> list[str]:
    """What the run began from need not be there any more."""
    return ["initial_weights=null", "initial_text=null"]


def _weights(source: Path, say: Callable[[str], None]) -> tuple[Path, dict[str, Tensor]]:
    if (source / "checkpoints").is_dir():
        path, refused = checkpoint.newest_valid(source / "checkpoints")
        for line in refused:
            say(f"checkpoint refused: {line}")
        return path, checkpoint.weights(path)
    if exported.is_exported(source):
        return source, read_state(source / exported.WEIGHTS)
    ours = (source / "manifest.json").is_file()
    return source, checkpoint.weights(source) if ours else read_state(source)
