"""Predicted beside measured, on this machine: the engine's own step on synthetic batches.

Of all runs of one size the fastest counts, which neighbours disturb least: of those that rates are fitted to, and of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench import lengths, plan_batches, plan_samples
from bench.comparison import WARMING, geometric_mean
from bench.plan_cost import step
from bench.plan_cpu import CpuRank, Rates
from bench.plan_model import Model
from bench.plan_samples import Sample, Steps
from bench.provider import Setting
from bench.worker import Worker
from engine import assembly
from engine.config import RunConfig, load
from engine.overrides import model_preset
from engine.tasks import TaskRow, load_table

Say = Callable[[str], None]

TOLERANCE = 0.15
"""Of the geometric mean of predicted over measured, in each run."""
_ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """A model, so many samples a step, and the tasks to measure it on."""

    model: str
    batch: int
    tasks: tuple[str, ...]


CASES = (
    Case("tiny", 32, ("vqa", "coco_retrieval", "refcoco", "visual7w", "guesswhat_pointing", "nlvr2", "snli_ve")),
    Case("vilbert_6l_6c", 4, ("vqa", "refcoco", "guesswhat_pointing", "nlvr2")),
)


@dataclass(frozen=True)
class Checked:
    """One task's step. Seconds."""

    case: str
    task: str
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio, "iterations_per_s": {
            "predicted": 1 / self.predicted, "measured": 1 / self.measured}}  # fmt: skip


def one_rank(run: Path, overrides: Sequence[str], isa: str, say: Say, cases: Sequence[Case] = CASES) -> list[Checked]:
    """Every case, in turns with the rates of this machine."""
    found = []
    for case in cases:
        config = _config(run, case, overrides)
        device = torch.device("cpu")
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        assembly.use_kernels(config, device, lambda line: None)
        dtype = plan_batches.DTYPES[config.precision]
        rows = [load_table().row(name) for name in case.tasks]
        setting = Setting(config, case.batch, device)
        name = f"{case.model}, batch {case.batch}"
        with Worker("ours", setting) as worker:
            samples, measured = _in_turns(
                worker, rows, plan_samples.Steps(config.model, dtype, isa), config, dtype, name, say
            )
        rank = CpuRank("this CPU", Rates.fit(samples, of=min), float("inf"), float("inf"))
        predicted = _predicted(config, rank, rows, case.batch, isa)
        for row in rows:
            turns = zip(predicted[row.name], measured[row.name], strict=True)
            found.append(max((Checked(name, row.name, *turn) for turn in turns), key=lambda of: of.ratio))
    return found


def _config(run: Path, case: Case, overrides: Sequence[str]) -> RunConfig:
    longest = max(load_table().row(name).max_tokens for name in case.tasks)
    chosen = [f"model={case.model}", "precision=bfloat16", f"tasks=[{','.join(case.tasks)}]"]
    _, preset = model_preset(case.model, "model")
    if preset.get("max_position_embeddings", longest) < longest:
        chosen.append(f"model.max_position_embeddings={longest}")
    return load(run, [*chosen, *overrides])


def _in_turns(
    worker: Worker, rows: Sequence[TaskRow], steps: Steps, config: RunConfig, dtype: torch.dtype, name: str, say: Say
) -> tuple[list[Sample], dict[str, list[float]]]:
    """Rates, a step of every task, rates, … : whatever else the machine does falls on both. Seconds of each task's turns."""
    samples = plan_samples.kernels(config.model, dtype)
    for row in rows:
        for turn in WARMING:
            _step(worker, row, turn)
    seconds: dict[str, list[float]] = {row.name: [] for row in rows}
    for turn in range(_ROUNDS):
        say(f"{name}: round {turn + 1} of {_ROUNDS}")
        samples += steps.samples(dtype)
        for row in rows:
            seconds[row.name].append(_step(worker, row, turn))
    samples += steps.samples(dtype) + plan_samples.kernels(config.model, dtype)
    return samples, seconds


def _step(worker: Worker, row: TaskRow, turn: int) -> float:
    worker.ask("prepare", row, turn)
    seconds: float = worker.ask("step").seconds
    return seconds


def _predicted(
    config: RunConfig, rank: CpuRank, rows: Sequence[TaskRow], batch: int, isa: str
) -> dict[str, list[float]]:
    """Seconds of the same batches."""
    known = lengths.load()
    heads = plan_batches.source(config).heads
    model = Model(config.model, dict(heads), plan_batches.DTYPES[config.precision], isa)
    layout = plan_batches.layout_of(config, model)

    def seconds(row: TaskRow, turn: int) -> float:
        drawn = plan_batches.shapes(config, row, known[row.name], batch, turn)
        counted = model.count(drawn, row.head, config.share_prefixes)
        return step(rank, layout, row.name, row.head, batch, batch, counted).seconds

    return {row.name: [seconds(row, turn) for turn in range(_ROUNDS)] for row in rows}


def off(checked: Sequence[Checked]) -> float:
    """How far predicted over measured is from 1: the geometric mean over the tasks of a run, of the run where it is worst."""
    return max(abs(mean - 1) for mean in means(checked).values())


def means(checked: Sequence[Checked]) -> dict[str, float]:
    """Geometric mean of predicted over measured, by run."""
    cases = dict.fromkeys(of.case for of in checked)
    return {case: geometric_mean([of.ratio for of in checked if of.case == case]) for case in cases}


def table(checked: Sequence[Checked]) -> Table:
    """One line a task."""
    grid = Table(title="predicted beside measured", title_justify="left", header_style="bold")
    for heading in ("run", "task", "predicted, ms", "measured, ms", "predicted, steps/s", "measured", "ratio"):
        grid.add_column(heading, justify="left" if heading in ("run", "task") else "right")
    for of in checked:
        grid.add_row(
            of.case, of.task, f"{1e3 * of.predicted:,.1f}", f"{1e3 * of.measured:,.1f}", f"{1 / of.predicted:,.2f}",
            f"{1 / of.measured:,.2f}", f"{of.ratio:.2f}",
        )  # fmt: skip
    grid.add_section()
    for case, mean in means(checked).items():
        grid.add_row(case, "geometric mean", "", "", "", "", f"{mean:.2f}")
    return grid
