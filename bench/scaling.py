"""`python -m bench.scaling`: how a training step grows, and where the cost model of `bench.plan` says it would.

One axis at a time, around one task's usual step: samples of a batch, rows of a text, regions of an image, threads, ranks;
then what validation costs, and what a task costs that DSG has stopped. Points take turns, round after round, so that whatever
else the machine does falls on all of them; the fastest step of each counts. Dots are measured, lines are the cost model,
fitted to kernels and shallow models in the same run (`bench/plan_cpu.py`), never to these dots.

    python -m bench.scaling --json bench/results/scaling.json --plot bench/figures/scaling.png      # about five minutes
    python -m bench.scaling --axes batch,texts --task nlvr2 --model tiny
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import lengths, plan_batches, plan_run, plan_samples, run_batches, scaling_plot
from bench.batches import Samples, draw
from bench.lengths import DETECTED, Measured, TaskLengths
from bench.ours import Ours
from bench.plan import isa
from bench.plan_cost import step as predicted_step
from bench.plan_cpu import CpuRank, Rates
from bench.plan_model import Model
from bench.provider import Setting
from bench.timing import conditions, cores
from engine import assembly
from engine.config import RunConfig, load
from engine.overrides import model_preset
from engine.tasks import CONFIGS, TaskRow, load_table
from pipelines.errors import BadInput
from pipelines.files import write_atomic

AXES = {
    "batch": (1, 2, 4, 8, 16),
    "texts": (8, 16, 32, 64, 128, 256),
    "regions": (37, 65, 101, 201, 306),
}
"""What a point changes -> its values: samples of a batch, rows of every text, rows of every image (the global one too)."""
OTHERS = ("threads", "ranks", "tasks")
_WARMING, _ROUNDS = 2, 5


@dataclass(frozen=True)
class Point(Setting):
    """A batch whose texts or images are all of one length, where it is given."""

    texts: int | None = None
    regions: int | None = None

    def samples(self, row: TaskRow, turn: int) -> Samples:
        """See `Setting`."""
        return draw(row, self.lengths(row), self.run.model, self.batch, (self.run.seed, turn))

    def lengths(self, row: TaskRow) -> TaskLengths:
        """The task's, with one length in place of those that are given."""
        found = lengths.load()[row.name]
        if self.texts:
            found = replace(found, texts=Measured({self.texts: 1}, "set", False))
        if self.regions:
            found = replace(found, boxes=Measured({self.regions - 1 - DETECTED: 1}, "set", False))
        return found


def points(run: RunConfig, axis: str, batch: int) -> dict[int, Point]:
    """By value of the axis."""
    device = torch.device("cpu")
    made: Callable[[int], Point] = {
        "batch": lambda value: Point(run, value, device),
        "texts": lambda value: Point(run, batch, device, texts=value),
        "regions": lambda value: Point(run, batch, device, regions=value),
    }[axis]
    return {value: made(value) for value in AXES[axis]}


def measured(ours: Ours, row: TaskRow, along: Mapping[int, Point]) -> list[dict[str, float]]:
    """Of each point the fastest step, seconds, and the peak of a process that does nothing else, bytes."""
    seconds: dict[int, list[float]] = {value: [] for value in along}
    for turn in range(_WARMING + _ROUNDS):
        for value, point in along.items():
            ours.setting = point
            ours.prepare(row, turn)
            seconds[value].append(ours.step().seconds)
    rows = []
    for value, point in along.items():
        ours.setting = point
        held = ours.rest()
        ours.prepare(row, 0)
        peak = ours.step().peak_bytes
        rows.append({"at": value, "seconds": min(seconds[value][_WARMING:]), "memory": peak - held})
    return rows


class Predictor:
    """The cost model of this CPU with so many threads."""

    def __init__(self, run: RunConfig, row: TaskRow) -> None:
        self._run, self._row = run, row
        dtype = plan_batches.DTYPES[run.precision]
        steps = plan_samples.Steps(run.model, dtype, isa())
        samples = [*steps.samples(dtype), *plan_samples.kernels(run.model, dtype), *steps.samples(dtype)]
        self._rank = CpuRank("this CPU", Rates.fit(samples, of=min), float("inf"), float("inf"))
        heads = plan_batches.source(run).heads
        self._model = Model(run.model, dict(heads), dtype, isa())
        self._layout = plan_batches.layout_of(run, self._model)

    def __call__(self, point: Point) -> dict[str, float]:
        """Seconds of a step, and bytes of what backward keeps."""
        row = self._row
        batch = plan_batches.shapes(self._run, row, point.lengths(row), point.batch, 0)
        counted = self._model.count(batch, row.head, self._run.share_prefixes)
        seconds = predicted_step(
            self._rank, self._layout, row.name, row.head, point.batch, point.batch, counted
        ).seconds
        return {"predicted": seconds, "predicted_memory": counted.activations + counted.batch_bytes}


def by_threads(run: RunConfig, row: TaskRow, batch: int, ours: Ours) -> list[dict[str, float]]:
    """The same step on one thread, two, and so on; each number of them with a cost model of its own."""
    point, rows = Point(run, batch, torch.device("cpu")), []
    for threads in range(1, cores() + 1):
        torch.set_num_threads(threads)
        found = measured(ours, row, {threads: point})[0]
        rows.append(found | Predictor(run, row)(point))
    return rows


def by_ranks(say: Callable[[str], None]) -> list[dict[str, float]]:
    """The embedded world's run on one rank, two, and so on, a thread each: seconds of an iteration over all tasks."""
    rows = []
    for n in range(1, cores() + 1):
        say(f"a run of engine.train on {n} rank{'s' * (n > 1)}")
        found = plan_run.measure(CONFIGS / "runs/world.yaml", ["threads=1"], n)
        rows.append({"at": n, "seconds": sum(found.values())})
    return rows


def by_task() -> list[dict[str, Any]]:
    """Of each task of the embedded world: seconds of a step, of a whole validation, and of an iteration's step when stopped."""
    run = load(CONFIGS / "runs/world.yaml", ["device=cpu"])
    parts = assembly.assemble(run)
    steps = run_batches.measure(parts, _ROUNDS)["tasks"]
    rows = []
    for name, task in parts.tasks.items():
        started = time.perf_counter()
        parts.validate(task)
        seconds = 1 / steps[name]["iterations_per_s"]
        rows.append({
            "task": name, "seconds": seconds, "stopped": seconds / run.stopgo.gap, "examples": len(task.val),
            "validation": time.perf_counter() - started, "between_validations": task.epoch_iterations,
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        axes = arguments.axes.split(",")
        if unknown := set(axes) - {*AXES, *OTHERS}:
            raise BadInput(f"--axes {unknown.pop()}", "no such axis", f"there are {', '.join((*AXES, *OTHERS))}")
        result = _measure(arguments, axes)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(result)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    if arguments.plot:
        scaling_plot.draw(result, arguments.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--axes", default=",".join((*AXES, *OTHERS)), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--model", default="vilbert_6l_6c", help="preset of configs/models, or a file (%(default)s)")
    parser.add_argument("--task", default="vqa", help="whose step it is (%(default)s)")
    parser.add_argument("--batch", type=int, default=4, help="samples, where they are not the axis (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the numbers here")
    parser.add_argument("--plot", type=Path, metavar="F.png", help="draw them here")
    return parser


def _measure(arguments: argparse.Namespace, axes: Sequence[str]) -> dict[str, Any]:
    run, row = _run(arguments.model), load_table().row(arguments.task)
    found: dict[str, Any] = {}
    threads = torch.get_num_threads()
    if {*axes} - {"ranks", "tasks"}:
        ours = Ours(Setting(run, arguments.batch, torch.device("cpu")))
        _say("fitting the cost model")
        predict = Predictor(run, row)
        for axis in [axis for axis in axes if axis in AXES]:
            _say(f"measuring {axis}")
            along = points(run, axis, arguments.batch)
            found[axis] = [of | predict(along[int(of["at"])]) for of in measured(ours, row, along)]
        if "threads" in axes:
            _say("measuring threads")
            found["threads"] = by_threads(run, row, arguments.batch, ours)
            torch.set_num_threads(threads)
        del ours
    if "ranks" in axes:
        found["ranks"] = by_ranks(_say)
    if "tasks" in axes:
        _say("measuring validation, and steps of the embedded world's tasks")
        found["tasks"] = by_task()
    about = {"model": arguments.model, "task": row.name, "batch": arguments.batch, "precision": run.precision}
    return {"axes": found, "conditions": {**conditions(torch.device("cpu")), **about}}


def _run(model: str) -> RunConfig:
    longest = max(AXES["texts"]) + 1
    overrides = [f"model={model}", "precision=bfloat16", "device=cpu"]
    _, preset = model_preset(model, "--model")
    if preset.get("max_position_embeddings", longest) < longest:
        overrides.append(f"model.max_position_embeddings={longest}")
    return load(CONFIGS / "runs/twelve_in_one.yaml", overrides)


def _print(result: Mapping[str, Any]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110)
    for axis, rows in result["axes"].items():
        table = Table(title=axis, title_justify="left", header_style="bold")
        for name in rows[0]:
            table.add_column(name, justify="left" if name == "task" else "right")
        for row in rows:
            table.add_row(*(value if isinstance(value, str) else f"{value:,.4g}" for value in row.values()))
        console.print(table)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
