"""What is profiled: the engine's own stepper on batches, synthetic ones or a run's own.

A visit is one step: a task, its batch by number, and the lane: `plain` steps are timed as they are, `profiled` ones are looked
into, `counted` ones count. All lanes get the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch

from bench.batches import pack
from bench.provider import LR_MULTIPLIER, Setting
from engine import assembly
from engine.assembly import Parts
from engine.config import RunConfig, records_steps
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.ranges import span
from engine.ranks import Ranks
from engine.step import Stepper
from engine.tasks import TaskRow, load_table, loss_scale
from pipelines import buckets
from pipelines.arena import Arena
from pipelines.batch import Batch
from pipelines.loader import Loader
from pipelines.slab import in_one_slab

LANES = ("plain", "profiled", "counted")
_AHEAD = 4


class Visit(NamedTuple):
    """One step."""

    row: TaskRow
    turn: int
    lane: str


class Source(Protocol):
    """Where batches are from."""

    waits: bool
    """Whether a step may have to wait for them, as in training."""

    def turn(self, number: int) -> int:
        """Which batch of each task round number `number` has."""

    def take(self, visit: Visit) -> list[Batch]:
        """The visit's micro-batches, on the host."""

    def follow(self, visits: Sequence[Visit]) -> None:
        """These come next."""


class Subject:
    """Something that trains, step by step."""

    def __init__(
        self, run: RunConfig, rows: Sequence[TaskRow], stepper: Stepper, source: Source, device: torch.device
    ) -> None:
        self.run, self.rows, self.stepper, self.source, self.device = run, list(rows), stepper, source, device
        self._scale = loss_scale(rows)
        self._steps = 0

    def step(self, visit: Visit, following: Sequence[Visit] = ()) -> float:
        """Seconds of one step, from asking for its batch until the device has come to its end."""
        if not self.source.waits:
            batches = self.source.take(visit)
        self._steps += 1
        random = Randomness(self.run.seed, self._steps, training=True)
        self._settle()
        started = time.perf_counter()
        if self.source.waits:
            with span("data"):
                batches = self.source.take(visit)
            self.source.follow(following[:_AHEAD])
        self.stepper.step(
            batches, visit.row.head, loss_scale=self._scale[visit.row.name], lr_multiplier=LR_MULTIPLIER, random=random
        )
        self._settle()
        return time.perf_counter() - started

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Synthetic:
    """One batch of each task, the same in every round, of real lengths (`bench.lengths`)."""

    waits = False

    def __init__(self, setting: Setting) -> None:
        self._setting, self._batches = setting, dict[str, Batch]()
        recorded = records_steps(setting.run, setting.device.type)
        self._grid = buckets.Grid.fitting(setting.run.model.max_position_embeddings) if recorded else None
        self._arena = Arena(pin=True) if setting.device.type == "cuda" else None

    def turn(self, number: int) -> int:
        """See `Source`."""
        return 0

    def take(self, visit: Visit) -> list[Batch]:
        """See `Source`."""
        if visit.row.name not in self._batches:
            self._batches[visit.row.name] = self._made(visit.row)
        return [self._batches[visit.row.name]]

    def follow(self, visits: Sequence[Visit]) -> None:
        """Nothing to do."""

    def _made(self, row: TaskRow) -> Batch:
        """As a loader hands it over: padded to a bucket for graphs, in one piece of page-locked memory for a GPU."""
        batch = pack(self._setting.samples(row, 0), getattr(torch, self._setting.run.precision))
        if self._grid is not None:
            batch = buckets.pad(batch, self._grid)
        return batch if self._arena is None else in_one_slab(batch, self._arena.take)


class _Own:
    """A run's own batches, one after the other, made ahead of time by the thread that a run has for it."""

    waits = True

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def turn(self, number: int) -> int:
        """See `Source`."""
        return number

    def take(self, visit: Visit) -> list[Batch]:
        """See `Source`."""
        return [self._loader.take(*key) for key in _keys(visit)]

    def follow(self, visits: Sequence[Visit]) -> None:
        """See `Source`."""
        for visit in visits:
            if not all(self._loader.request(*key) for key in _keys(visit)):
                break


def _keys(visit: Visit) -> list[tuple[str, int]]:
    """What the loader calls the visit's micro-batches."""
    micro = visit.row.accumulation
    return [(f"{visit.lane} {visit.row.name}", visit.turn * micro + number) for number in range(micro)]


def synthetic(setting: Setting, rows: Sequence[TaskRow], say: Callable[[str], None]) -> Subject:
    """The run's model with all published heads, on synthetic batches."""
    run, device = setting.run, setting.device
    assembly.use_kernels(run, device, say)
    model = ViLBERT(run.model, PUBLISHED_HEADS)
    model.initialise(run.seed)
    sharded = run.backend == "deepspeed" or (run.backend == "auto" and run.deepspeed is not None)
    recorded = records_steps(run, device.type) and (run.cuda_graphs is True or not sharded)
    run = run.model_copy(update={"cuda_graphs": recorded})
    setting = replace(setting, run=run)
    every = load_table().default_tasks()
    stepper = assembly.build_stepper(run, every, model.to(device), device, Ranks(), sharded)
    return Subject(run, rows, stepper, _Synthetic(setting), device)


@contextmanager
def own(parts: Parts) -> Iterator[Subject]:
    """A run's parts on its own batches; the block ends the loader's thread."""
    sources = parts.training()
    with Loader({f"{lane} {name}": source for name, source in sources.items() for lane in LANES}) as loader:
        rows = [task.row for task in parts.tasks.values()]
        yield Subject(parts.config, rows, parts.stepper, _Own(loader), parts.device)
