"""One side of a comparison: a process that runs a revision's own code, and answers over a pipe.

It is started by its file name, with the revision's checkout as working directory and first in `sys.path`: `bench`, `engine`
and `kernels` are the revision's, while this file, and with it the clock, is the same on both sides. It imports nothing but the
standard library before it is asked to start.

What it wants of a revision, the whole of the protocol between years:

    engine.config.load(file, overrides), engine.assembly.device_of(run), engine.tasks.load_table().row(name)
    bench.provider.Setting(run, batch, device); bench.ours.Ours(setting) with
        prepare(row, turn) -> .rows, .real    step() -> .loss    count() -> dict
    for ops, where there are such: bench.kernel_case.draw, bench.kernel_cases.cases, kernels.names.OPS

A request is a line of JSON, [what, arguments …]; an answer is [true, result] or [false, traceback].
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CAPTIONS, WORDS = 16, 4096
"""Of the pretraining losses: with the published sizes one call would take as long as all other ops together."""
OP_TASK, OP_BATCH = "vqa", 16
"""Whose shapes the ops have."""
_SCHEDULED = Path("/proc/thread-self/schedstat")


class Side:
    """What can be asked for; the names are those of the protocol."""

    def start(self, told: dict[str, Any]) -> dict[str, Any]:
        """Build model and optimizer. Returns the conditions as the revision tells them, and which ops there are."""
        from bench.ours import Ours
        from bench.provider import Setting
        from bench.timing import conditions
        from engine import assembly, config
        from engine.tasks import load_table

        _must_lie_here(assembly, config)
        run = config.load(Path(told["config"]), told["overrides"])
        self._table, self._device = load_table(), assembly.device_of(run)
        self._threads = getattr(run, "threads", None)
        if self._threads is not None and "torch" in sys.modules:
            _torch().set_num_threads(self._threads)
        self._ours = Ours(Setting(run, told["batch"], self._device))
        self._ops: dict[str, Callable[[], None]] = {}
        missing = {}
        for name in told["ops"]:
            try:
                self._ops[name] = _op(name, self._device)
            except Exception as error:  # noqa: BLE001 - another revision's code: an op less is no reason to give up
                missing[name] = f"{type(error).__name__}: {error}"
        digest = hashlib.sha256(run.model_dump_json().encode()).hexdigest()[:12]
        return {"conditions": {**conditions(self._device), "config": digest}, "ops": [*self._ops], "missing": missing}

    def prepare(self, task: str, turn: int) -> list[int]:
        """Batch number `turn` of a task. Returns its rows, and those of them that are no padding."""
        rows = self._ours.prepare(self._table.row(task), turn)
        return [rows.rows, rows.real]

    def step(self) -> list[float]:
        """A step on that batch: [seconds, loss]."""
        seconds, step = self._timed(self._ours.step)
        return [seconds, step.loss]

    def count(self) -> dict[str, Any]:
        """What a step does, counted by the revision."""
        counts: dict[str, Any] = self._ours.count()
        return counts

    def op(self, name: str, calls: int) -> list[float]:
        """Seconds of so many calls of an op, forward and backward, one by one."""
        return [self._timed(self._ops[name])[0] for _ in range(calls)]

    def _timed(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Wall time and result. With one thread, without the time for which this thread was ready to run and another
        program had its core: a neighbour's time, not the step's."""
        waited = self._waited()
        self._finish()
        started = time.perf_counter()
        result = call()
        self._finish()
        ended = time.perf_counter()
        return max(ended - started - (self._waited() - waited), 1e-9), result

    def _finish(self) -> None:
        if self._device.type == "cuda":
            _torch().cuda.synchronize(self._device)

    def _waited(self) -> float:
        """Seconds on a run queue so far (Documentation/scheduler/sched-stats); 0 where the kernel does not count them."""
        if self._threads != 1:
            return 0.0
        try:
            return int(_SCHEDULED.read_text().split()[1]) / 1e9
        except (OSError, IndexError):
            return 0.0


def _must_lie_here(*modules: Any) -> None:
    """An installed copy of the project must not stand in for the revision's own."""
    for module in modules:
        if not Path(module.__file__).resolve().is_relative_to(Path.cwd().resolve()):
            raise ImportError(f"{module.__name__} was found at {module.__file__}, not in {Path.cwd()}")


def _torch() -> Any:
    import torch

    return torch


def _op(name: str, device: Any) -> Callable[[], None]:
    """All shapes of an op one after the other, each forward and backward."""
    if name == "projection":
        return _projection(device)
    from dataclasses import replace

    from bench.kernel_case import draw
    from bench.kernel_cases import cases

    setting = replace(draw(OP_TASK, OP_BATCH), captions=CAPTIONS, words=WORDS)
    of_shapes = [_both_ways(case.ours.function, case.ours.leaves) for case in cases(name, setting, _dtype(), device)]

    def call() -> None:
        for one in of_shapes:
            one()

    call()
    return call


def _dtype() -> Any:
    return _torch().bfloat16


def _both_ways(function: Callable[..., Any], leaves: tuple[Any, ...]) -> Callable[[], object]:
    torch = _torch()
    if not leaves:  # the optimizer's step
        return function

    def outputs() -> list[Any]:
        results = function(*leaves)
        return [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]

    upstream = [torch.ones_like(x) if x.dim() == 0 else torch.randn_like(x) for x in outputs()]
    return lambda: torch.autograd.grad(outputs(), leaves, upstream)


def _projection(device: Any) -> Callable[[], None]:
    """The products of a text and of an image layer's feed-forward part, and their gradients."""
    from kernels.projection import linear

    torch, shapes = _torch(), ((160, 768, 3072), (1616, 1024, 1024))
    calls = []
    for rows, depth, width in shapes:
        x, w = (
            (0.02 * torch.randn(n, depth)).to(device, _dtype()).requires_grad_() for n in (rows, width)
        )  # fmt: skip
        calls.append(_both_ways(linear, (x, w)))

    def call() -> None:
        for one in calls:
            one()

    call()
    return call


def main() -> None:
    """Answer until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which closes the pipe
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the revision prints is no answer
    sys.path.insert(0, os.getcwd())
    # An editable installation would lend modules that the revision does not have.
    sys.meta_path = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable___stopgo")]
    side = Side()
    for line in sys.stdin:
        what, *arguments = json.loads(line)
        try:
            answer = [True, getattr(side, what)(*arguments)]
        except Exception:  # noqa: BLE001 - whatever it is, the parent reports it
            answer = [False, traceback.format_exc()]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
