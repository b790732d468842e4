"""`python -m bench.graphs`: what recording steps as CUDA graphs brings, task by task. Needs a GPU.

The same synthetic batches of real lengths (bench/lengths.json), three ways:

  packed   as a run does it without graphs: no padded row
  padded   the same rows padded to a shape bucket, launched one kernel after the other
  graphs   the padded batch replayed (engine.graphs)

Of each: the time of a step on the GPU, the time that the host is busy with it, and what torch's profiler counts in it: kernel
launches, graph launches, copies, waits of the host. And whether a replay computes what the padded step computes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.batches import pack
from bench.provider import LR_MULTIPLIER, Setting
from bench.timing import conditions
from engine import assembly
from engine.config import load
from engine.graphs import Graphs
from engine.model.published import PUBLISHED_HEADS
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.step import forward_backward, train_step
from engine.tasks import CONFIGS, TaskRow, load_table, loss_scale
from pipelines.arena import Arena
from pipelines.batch import Batch
from pipelines.buckets import pad
from pipelines.errors import BadInput
from pipelines.slab import in_one_slab

RUN = CONFIGS / "runs/twelve_in_one.yaml"

WAYS = ("packed", "padded", "graphs")

_CALLS = {
    "launches": ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "graph_launches": ("cudaGraphLaunch",),
    "copies": ("cudaMemcpyAsync", "cudaMemcpy", "cudaMemcpy2DAsync"),
    "fills": ("cudaMemsetAsync", "cudaMemset"),
    "syncs": ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy"),
}
"""What the profiler calls them."""


@dataclass(frozen=True)
class Way:
    """One way to run a task's steps."""

    step_s: float
    """Median, on the device."""
    host_s: float
    """Median time that the host needs to ask for a step."""
    calls: dict[str, int]
    """Of one step."""


class Stepper:
    """The engine's model, optimizer and graphs, on synthetic batches."""

    def __init__(self, setting: Setting, graphs: Callable[[ViLBERT], Graphs] | None = None) -> None:
        run, rows = setting.run, load_table().default_tasks()
        self.setting, self._loss_scale = setting, loss_scale(rows)
        assembly.use_kernels(run, setting.device, lambda line: None)
        model = ViLBERT(run.model, PUBLISHED_HEADS)
        model.initialise(run.seed)
        self.model = model.to(setting.device)
        self._arena = Arena(pin=setting.device.type == "cuda")
        self.optimizer = assembly.build_optimizer(run, rows, self.model)
        self.graphs = graphs(self.model) if graphs else Graphs(self.model, setting.device)
        self._steps = 0

    def measure(self, row: TaskRow, batches: int, rounds: int) -> dict[str, Any]:
        """All ways on the same batches, in turns, each batch `rounds` times after two to warm up and record."""
        padded = [self._padded(row, number) for number in range(batches)]
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for turn in range(rounds + 2):
            for number, batch in enumerate(padded):
                given = {"packed": self._packed(row, number), "padded": batch, "graphs": batch}
                for way in WAYS:
                    spent = timed(self.setting.device, partial(self._step, way, row, given[way]))
                    if turn >= 2:
                        times[way].append(spent)
        given = {"packed": self._packed(row, 0), "padded": padded[0], "graphs": padded[0]}
        ways = {
            way: Way(
                median(device for device, _ in spent),
                median(host for _, host in spent),
                calls_of(partial(self._step, way, row, given[way])),
            )
            for way, spent in times.items()
        }
        return {
            "ways": {name: asdict(way) for name, way in ways.items()},
            "ratio": {way: ways[way].step_s / ways["graphs"].step_s for way in ("packed", "padded")},
            "replay_differs": self._difference(row, padded[0]),
        }

    def _packed(self, row: TaskRow, number: int) -> Batch:
        return pack(self.setting.samples(row, number), getattr(torch, self.setting.run.precision))

    def _padded(self, row: TaskRow, number: int) -> Batch:
        return in_one_slab(pad(self._packed(row, number)), self._arena.take)

    def _step(self, way: str, row: TaskRow, batch: Batch) -> None:
        self._steps += 1
        train_step(
            self.model, self.optimizer, batch if way == "graphs" else batch.to(self.setting.device), row.head,
            loss_scale=self._loss_scale[row.name], lr_multiplier=LR_MULTIPLIER,
            random=Randomness(self.setting.run.seed, self._steps, training=True),
            graphs=self.graphs if way == "graphs" else None,
        )  # fmt: skip

    def _difference(self, row: TaskRow, batch: Batch) -> dict[str, float]:
        """Between a replay and the padded step with the same masks: of the loss, and the largest of any gradient relative to
        the largest gradient of its parameter. Kernels are deterministic, so both should be 0."""
        key = (row.head, self._loss_scale[row.name], True)  # that of train_step, so that its graph is replayed
        work = partial(forward_backward, self.model, *key)
        random = Randomness(self.setting.run.seed, 1, training=True)
        found = []
        for run in (partial(self.graphs.run, key), lambda b, r, w: w(b.to(self.setting.device), r)):
            loss, _ = run(batch, random, work)
            found.append((float(loss), {p: p.grad.clone() for p in self.model.parameters() if p.grad is not None}))
            for block in self.model.blocks():
                block.drop_gradients()
        (loss, gradients), (expected_loss, expected) = found
        relative = [
            float((gradients[p] - value).abs().max() / value.abs().max().clamp(min=1e-30))
            for p, value in expected.items()
        ]
        return {"loss": abs(loss - expected_loss), "gradients": max(relative)}


def timed(device: torch.device, step: Callable[[], None]) -> tuple[float, float]:
    """(seconds on the device, seconds of the host) of one step that starts with nothing queued."""
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        spent = time.perf_counter() - started
        return spent, spent
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    before.record()
    started = time.perf_counter()
    step()
    host = time.perf_counter() - started
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1000, host


def calls_of(step: Callable[[], None]) -> dict[str, int]:
    """What a step asks of the driver, without what the profiler itself does."""
    return counted(_profiled(step) - _profiled(lambda: None))


def counted(calls: Mapping[str, int]) -> dict[str, int]:
    """Calls of the runtime, by name, added up by what they are for."""
    return {kind: sum(calls.get(name, 0) for name in names) for kind, names in _CALLS.items()}


def _profiled(step: Callable[[], None]) -> Counter[str]:
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as found:
        step()
    return Counter({event.key: event.count for event in found.key_averages()})


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.graphs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="vilbert_6l_6c", help="preset of configs/models, or a file (%(default)s)")
    parser.add_argument("--tasks", default="all", help="comma-separated names; all: the twelve")
    parser.add_argument("--batch", type=int, default=16, help="samples a step (%(default)s: one of eight GPUs)")
    parser.add_argument("--batches", type=int, default=2, help="different batches of each task (%(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="timed steps of each batch and way (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write all that was measured here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run, as for engine.train")
    arguments = parser.parse_args(argv)
    try:
        run = load(RUN, [f"model={arguments.model}", "device=cuda", *arguments.overrides])
        setting = Setting(run, arguments.batch, assembly.device_of(run))
        names = None if arguments.tasks == "all" else arguments.tasks.split(",")
        rows = load_table().default_tasks() if names is None else [load_table().row(name) for name in names]
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure(Stepper(setting), rows, arguments.batches, arguments.rounds)
    print(table(result))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = conditions(setting.device) | {"model": arguments.model, "batch": arguments.batch}
        arguments.json.write_text(json.dumps(result | {"conditions": about}, indent=1) + "\n")
    return 0


def measure(stepper: Stepper, rows: Sequence[TaskRow], batches: int, rounds: int) -> dict[str, Any]:
    """All tasks; `geometric_mean`: how many times longer a step takes without graphs."""
    tasks = {row.name: stepper.measure(row, batches, rounds) for row in rows}
    means = {
        way: math.exp(sum(math.log(task["ratio"][way]) for task in tasks.values()) / len(tasks))
        for way in ("packed", "padded")
    }
    return {"geometric_mean": means, "counters": stepper.graphs.counters.as_json(), "tasks": tasks}


def table(result: Mapping[str, Any]) -> str:
    """For people."""
    lines = [f"{'task':22}{'way':8}{'step ms':>9}{'host ms':>9}" + "".join(f"{kind:>16}" for kind in _CALLS)]
    for name, task in result["tasks"].items():
        for way, found in task["ways"].items():
            times = f"{found['step_s'] * 1e3:9.2f}{found['host_s'] * 1e3:9.2f}"
            lines.append(f"{name:22}{way:8}{times}" + "".join(f"{found['calls'][kind]:16}" for kind in _CALLS))
        differs = task["replay_differs"]
        if any(differs.values()):
            lines.append(f"  a replay differs from the padded step: {differs}")
    means = ", ".join(f"{ratio:.2f} x {way}" for way, ratio in result["geometric_mean"].items())
    return "\n".join([*lines, f"graphs are {means} (geometric mean); {result['counters']}"])


if __name__ == "__main__":
    sys.exit(main())
