"""The batches of a plan: for each task what the rank with most to do gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from bench import lengths
from bench.batches import draw, pack
from bench.plan_cost import Layout
from bench.plan_model import Model, values
from engine import assembly
from engine.config import RunConfig, load_tasks
from engine.model.heads import HeadSpec
from engine.model.published import PUBLISHED_HEADS
from engine.tasks import TaskRow
from pipelines.batch import Batch
from pipelines.errors import BadInput
from pipelines.sampler import Sampler

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_DRAWN = 8
"""So many ranks' batches are drawn and the one with most rows is taken, where a step has more ranks."""

Draw = Callable[[TaskRow, int, int], Batch]
"""(task, examples of a rank, ranks) -> the batch of the rank that has most rows."""


@dataclass(frozen=True)
class Source:
    """What a run trains, and where its batches are from."""

    rows: tuple[TaskRow, ...]
    heads: Mapping[str, HeadSpec]
    draw: Draw
    said: str
    """For the report."""


def source(run: RunConfig) -> Source:
    """A run on the embedded world has its own batches. Others have synthetic ones of real lengths: their data may not be here.

    Raises BadInput for a task whose lengths nobody has measured.
    """
    rows = load_tasks(run)[1]
    return _world(run, rows) if run.data == "world" else _synthetic(run, rows)


def _synthetic(run: RunConfig, rows: tuple[TaskRow, ...]) -> Source:
    known = lengths.load()
    for row in rows:
        if row.name not in known or row.loss == "masked":
            raise BadInput(
                f"task {row.name}",
                "its lengths are not known",
                "name others with tasks=…, or measure it: bench.lengths",
            )

    def drawn(row: TaskRow, examples: int, ranks: int) -> Batch:
        turns = range(min(ranks, _DRAWN))
        return max((shapes(run, row, known[row.name], examples, turn) for turn in turns), key=_rows)

    heads = {row.head: PUBLISHED_HEADS[row.head] for row in rows}
    return Source(rows, heads, drawn, f"batches: synthetic, real lengths ({lengths.FILE.name})")


def shapes(run: RunConfig, row: TaskRow, of: lengths.TaskLengths, examples: int, turn: int) -> Batch:
    """As `bench.iterations` draws it for this turn, but for features, which have a shape alone."""
    narrow = run.model.model_copy(update={"v_feature_size": 1})
    batch = pack(draw(row, of, narrow, examples, (run.seed, turn)), DTYPES[run.precision])
    shape = (batch.boxes.shape[0], run.model.v_feature_size)
    return replace(batch, features=torch.empty(shape, dtype=DTYPES[run.precision], device="meta"))


def _world(run: RunConfig, rows: tuple[TaskRow, ...]) -> Source:
    parts = assembly.assemble(run)

    def drawn(row: TaskRow, examples: int, ranks: int) -> Batch:
        train = parts.tasks[row.name].train
        sampler = Sampler(len(train.data), examples, run.seed, row.number)
        return max((replace(train, sampler=sampler)(turn) for turn in range(min(ranks, _DRAWN))), key=_rows)

    return Source(rows, parts.model.head_specs, drawn, "batches: the run's own")


def layout_of(run: RunConfig, model: Model) -> Layout:
    """The run's parameters on one rank."""
    trunk = model.model.trunk
    return Layout(
        ranks=1, stage=0, precision=run.precision, trunk=values(trunk),
        heads={name: values(head) for name, head in model.model.heads.items()},
        trunk_tensors=len(list(trunk.parameters())), graphs=run.cuda_graphs is True, data_threads=run.data_threads,
        largest=max(parameter.numel() for parameter in model.model.parameters()),
    )  # fmt: skip


def _rows(batch: Batch) -> int:
    return batch.pair_text_rows + batch.pair_image_rows
