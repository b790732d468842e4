"""`python -m engine.verify --golden DIR`: does this engine compute what the authors' model computes?

DIR holds weights in the published layout and, per task, inputs, logits, loss and gradients of the published model. The
inputs are padded there; here only their real rows are packed and run, so what is compared is real rows alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from engine import trajectory
from engine.golden import (
    GoldenTask,
    load_tasks,
    load_tensors,
    pretraining_batch,
    retrieval_task,
    shared_batch,
    task_batch,
)
from engine.losses import loss_and_score, pretraining_losses
from engine.model.config import ModelConfig
from engine.model.heads import HeadSpec
from engine.model.published import load_published, read_state
from engine.model.randomness import Randomness
from engine.model.vilbert import ViLBERT
from engine.ranks import finish
from engine.stopgo import Controller, Decision, PaperController, ReferenceController, restore
from kernels.backends import interpreting
from pipelines.errors import BadInput

ABSOLUTE, RELATIVE = 2e-5, 1e-4
"""float32: a value may differ by either."""
TRAJECTORY = 1e-4
SHARING = 2e-6
BFLOAT16_SHARE = 0.05
"""bfloat16: largest error of the logits over their largest value."""
CPU = torch.device("cpu")
SLOW = 5.0
"""Seconds that a row may take without a word."""


@dataclass
class Row:
    """One line of the report: largest absolute differences, and whether all values are within the tolerance."""

    name: str
    differences: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "past the tolerance" if self.failures else "ok"

    def compare(self, column: str, what: str, ours: Tensor, theirs: Tensor, absolute: float, relative: float) -> None:
        """Record |ours − theirs|; a value fails when it is past both tolerances (relative to its own size)."""
        ours, theirs = ours.detach().cpu().double().reshape(-1), theirs.double().reshape(-1)
        if ours.shape != theirs.shape:
            self.failures.append(f"{what}: {ours.numel()} values, expected {theirs.numel()}")
            return
        difference = (ours - theirs).abs()
        largest = float(difference.max()) if difference.numel() else 0.0
        self.differences[column] = max(self.differences.get(column, 0.0), largest)
        past = (difference > absolute) & (difference > relative * theirs.abs())
        if bool(past.any()) or not bool(torch.isfinite(ours).all()):
            self.failures.append(f"{what}: off by {largest:.3g}")


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code (0 within tolerance, 1 past it, 2 unreadable input)."""
    parser = argparse.ArgumentParser(prog="python -m engine.verify", description=__doc__.split("\n\n")[0])
    parser.add_argument("--golden", type=Path, required=True, help="folder with meta.json, weights and *.safetensors")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto (default): cuda where there is one"
    )
    parser.add_argument("--failures", type=int, default=8, help="differences to list past the tolerance")
    arguments = parser.parse_args(argv)
    if interpreting():
        print(
            "Triton's interpreter: a quarter of an hour or more; DeepSpeed's trajectories are left out", file=sys.stderr
        )
    try:
        device = _chosen(arguments.device)
        rows = list(_told_when_slow(verify(arguments.golden, getattr(torch, arguments.dtype), device)))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    _print(rows, f"{arguments.dtype}, {device}")
    failures = [f"{row.name}: {failure}" for row in rows for failure in row.failures]
    for failure in failures[: arguments.failures]:
        print(failure)
    print(f"{len(failures)} values past the tolerance" if failures else "all within the tolerance")
    return 1 if failures else 0


def _told_when_slow(rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows; of one that took long, a line on stderr (kernels may be forced that run in an interpreter)."""
    started = time.perf_counter()
    for row in rows:
        seconds, started = time.perf_counter() - started, time.perf_counter()
        if seconds > SLOW:
            print(f"{row.name}: {row.verdict}, {seconds:.0f} s", file=sys.stderr)
        yield row


def verify(golden: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> Iterator[Row]:
    """Compare everything that the folder holds; yields a row per file. bfloat16 compares logits and losses only."""
    meta = _meta(golden)
    config = ModelConfig.from_published(meta["config"], golden / "meta.json")
    tasks = load_tasks(golden, meta)
    state = read_state(
        golden / "weights.safetensors" if (golden / "weights.safetensors").exists() else golden / "weights.bin"
    )
    model = build(config, tasks, state, golden).to(device, dtype)
    for task in tasks:
        yield _task_row(model, task, dtype)
    if (golden / "pretrain.safetensors").exists():
        yield _pretraining_row(model, golden / "pretrain.safetensors", dtype)
    if dtype is torch.float32:
        if (golden / "shared_pairs.safetensors").exists():
            yield _sharing_row(model, golden / "shared_pairs.safetensors", tasks)
        if (golden / "trajectory.safetensors").exists():
            yield from _trajectory_rows(lambda: build(config, tasks, state, golden).to(device), golden, meta, tasks)
        for name, kind in (("controller.json", ReferenceController), ("controller_paper.json", PaperController)):
            if (golden / name).exists():
                yield _controller_row(golden / name, kind)


def build(config: ModelConfig, tasks: Iterable[GoldenTask], state: dict[str, Tensor], where: Path) -> ViLBERT:
    """The model of a golden folder: heads by the tasks in it, sizes by the weights."""
    specs = {}
    for task in tasks:
        last = f"{task.head}.logit_fc.3.weight" if f"{task.head}.logit_fc.3.weight" in state else f"{task.head}.weight"
        if last not in state:
            raise BadInput(where, f"the weights hold no {last}, which task {task.name} needs")
        specs[task.head] = HeadSpec(task.head_kind, state[last].shape[0])
    model = ViLBERT(config, specs, pretraining=True)
    load_published(model, state, where)
    return model


def _task_row(model: ViLBERT, task: GoldenTask, dtype: torch.dtype) -> Row:
    row = Row(task.name)
    packed, expected = task_batch(task), task.tensors
    batch = packed.to(_device(model))
    model.zero_grad(set_to_none=True)
    logits = model(batch, task.head)
    loss, _ = loss_and_score(logits, batch)
    _compare_logits(row, task.real_logits(logits.cpu(), packed), task.expected_logits(), dtype)
    if dtype is torch.float32:
        row.compare("loss", "loss", loss, expected["loss"], ABSOLUTE, RELATIVE)
        loss.backward()
        _compare_gradients(row, model, expected)
    else:
        row.differences["loss"] = abs(float(loss.detach()) - float(expected["loss"][0]))
    return row


def _compare_logits(row: Row, ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    if dtype is torch.float32:
        row.compare("logits", "logits", ours, theirs, ABSOLUTE, RELATIVE)
    else:
        row.compare("logits", "logits", ours, theirs, BFLOAT16_SHARE * float(theirs.abs().max()), 0.0)


def _compare_gradients(row: Row, model: ViLBERT, expected: dict[str, Tensor]) -> None:
    ours = dict(model.published("grad"))
    for key, theirs in expected.items():
        kind, _, name = key.partition("/")
        if kind in ("grad", "gradnorm") and name not in ours:
            row.failures.append(f"{key}: no tensor of that name is trained here")
        elif kind == "grad":
            row.compare("grad", key, ours[name], theirs, ABSOLUTE, RELATIVE)
        elif kind == "gradnorm":
            row.compare("gradnorm", key, ours[name].double().norm(), theirs, ABSOLUTE, RELATIVE)
    reached = {key.partition("/")[2] for key in expected if key.startswith("gradnorm/")}
    for name, gradient in ours.items():
        if reached and name not in reached and bool(gradient.any()):
            row.failures.append(f"{name}: has a gradient that the published model has not")


def _pretraining_row(model: ViLBERT, path: Path, dtype: torch.dtype) -> Row:
    row = Row("pretraining")
    expected = load_tensors(path)
    batch = pretraining_batch(expected).to(_device(model))
    model.zero_grad(set_to_none=True)
    losses, _ = pretraining_losses(model, batch, Randomness())
    for name, ours in zip(("masked_lm", "masked_region", "alignment"), losses, strict=True):
        theirs = expected[f"loss_{name}"]
        relative = RELATIVE if dtype is torch.float32 else BFLOAT16_SHARE
        row.compare("loss", f"loss_{name}", ours, theirs, ABSOLUTE, relative)
    if dtype is torch.float32:
        sum(losses).backward()  # type: ignore[union-attr]
        _compare_gradients(row, model, expected)
    return row


def _sharing_row(model: ViLBERT, path: Path, tasks: list[GoldenTask]) -> Row:
    """A retrieval batch with prefixes shared and not: the same numbers."""
    row = Row("shared pairs")
    expected = load_tensors(path)
    batch = shared_batch(expected, tasks).to(_device(model))
    head = retrieval_task(tasks).head
    results = {}
    for share in (True, False):
        model.zero_grad(set_to_none=True)
        logits = model(batch, head, share=share)
        loss, _ = loss_and_score(logits, batch)
        row.compare("logits", f"logits, share={share}", logits, expected["logits"], ABSOLUTE, RELATIVE)
        row.compare("loss", f"loss, share={share}", loss, expected["loss"], ABSOLUTE, RELATIVE)
        loss.backward()
        _compare_gradients(row, model, expected)
        results[share] = logits.detach().cpu()
    row.compare("sharing", "shared against unshared logits", results[True], results[False], SHARING, 0.0)
    return row


def _trajectory_rows(
    fresh: Callable[[], ViLBERT], golden: Path, meta: dict[str, Any], tasks: list[GoldenTask]
) -> Iterator[Row]:
    """The update rule through the loop's own step, plainly and under DeepSpeed in one process."""
    expected = load_tensors(golden / "trajectory.safetensors")
    batches = {task.name: task_batch(task) for task in tasks}
    for stage in trajectory.stages():
        row = Row("trajectory" if stage is None else f"trajectory, ZeRO-{stage}")
        model = fresh()
        stepper = trajectory.stepper(model, meta["trajectory"], stage)
        losses, norms = trajectory.run(model, stepper, meta["trajectory"], batches, tasks)
        row.compare("loss", "losses", losses, expected["losses"], 0.0, TRAJECTORY)
        for key, theirs in expected.items():
            if key.startswith("norm/") and key in norms:
                row.compare("norm", key, norms[key], theirs, ABSOLUTE, RELATIVE)
        yield row


def _controller_row(path: Path, kind: type[ReferenceController | PaperController]) -> Row:
    """Every state of every trace, through a JSON round trip at every point."""
    row = Row(path.stem)
    traces = json.loads(path.read_text())["traces"]
    wrong = 0
    for trace in traces:
        controller: Controller = kind()
        for score, go in zip(trace["scores"], trace["go"], strict=True):
            controller = restore(json.loads(json.dumps(controller.state_dict())))
            wrong += (controller.update(score) is Decision.GO) != bool(go)
    row.differences["states"] = float(wrong)
    if wrong:
        row.failures.append(f"{wrong} states differ in {len(traces)} traces")
    return row


def _chosen(name: str) -> torch.device:
    there_is_one = torch.cuda.is_available()
    if name == "cuda" and not there_is_one:
        raise BadInput("--device", "cuda asked for, but torch sees no GPU", "--device cpu")
    return torch.device("cuda" if there_is_one and name != "cpu" else "cpu")


def _device(model: ViLBERT) -> torch.device:
    return next(model.parameters()).device


def _meta(golden: Path) -> dict[str, Any]:
    path = golden / "meta.json"
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(path, f"not readable: {error}", "give a folder of golden numbers") from None
    for key in ("config", "tasks"):
        if not isinstance(meta, dict) or not isinstance(meta.get(key), dict):
            raise BadInput(f"{path}: {key}", "missing", "give a folder of golden numbers")
    return meta


def _print(rows: list[Row], how: str) -> None:
    columns = list(dict.fromkeys(column for row in rows for column in row.differences))
    table = Table("", *columns, "", title=f"largest absolute difference, {how}")
    for row in rows:
        cells = [f"{row.differences[c]:.2g}" if c in row.differences else "" for c in columns]
        table.add_row(row.name, *cells, row.verdict)
    Console(width=100).print(table)


if __name__ == "__main__":
    finish(main())
