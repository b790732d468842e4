"""One rank of a small run, as launchers start it: `python -m tests.engine.rank ARGUMENTS OF engine.train`.

The reader of the small data sets serves from memory, so a rank builds them again, in a folder of its own. STOPGO_FAULT is a
JSON list of faults; one is {"at": POINT, "call": n, "ranks": […], "do": WHAT}: before the n-th call at this point (counted
from 1, in each rank; null: every call) these ranks (none: all) do something. Exit codes and times go to STOPGO_TOLD.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

RANK = int(os.environ.get("RANK", 0))
TOLD = Path(os.environ["STOPGO_TOLD"])


def tell(name: str, value: object) -> None:
    """Leave something for the test: the file `name-<rank>`."""
    (TOLD / f"{name}-{RANK}").write_text(json.dumps(value))


def send(number: signal.Signals, pid: int) -> None:
    """Signal a process, or with a negative number a process group, and leave the time."""
    if not (TOLD / f"signal-{RANK}").exists():
        tell("signal", [number.name, time.time()])
    (os.kill if pid > 0 else os.killpg)(abs(pid), number)


def launcher() -> int:
    """Process id, and group, of what the test started."""
    return int((TOLD / "launcher").read_text())


def everyone(number: signal.Signals) -> None:
    """Signal launcher and ranks, as a scheduler does that knows all processes of a job."""
    first = psutil.Process(launcher())
    for process in [first, *first.children(recursive=True)]:
        send(number, process.pid)


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def damaged() -> None:
    from pipelines.errors import BadInput

    raise BadInput("detected.lmdb: record 7", "its checksum is wrong", "convert it again")


DEEDS: dict[str, Callable[[], None]] = {
    "terminate the group": lambda: send(signal.SIGTERM, -launcher()),
    "terminate everyone": lambda: everyone(signal.SIGTERM),
    "terminate the launcher": lambda: send(signal.SIGTERM, os.getppid()),
    "terminate": lambda: send(signal.SIGTERM, os.getpid()),
    "kill": lambda: send(signal.SIGKILL, os.getpid()),
    "stop": lambda: send(signal.SIGSTOP, os.getpid()),
    "dawdle": lambda: time.sleep(0.25),
    "no space": no_space,
    "damaged record": damaged,
}


def points() -> dict[str, tuple[Any, str]]:
    """Where a fault may happen: the owner and name of the function that stands there."""
    from engine import loop, saving, validation
    from engine.sharded import Sharded
    from pipelines.loader import TrainingSource

    return {
        "step": (Sharded, "step"),
        "validation": (validation, "outcome"),
        "read": (TrainingSource, "__call__"),
        "write": (saving, "write_pieces"),
        "between files": (saving, "fingerprint"),
        "commit": (saving.Saver, "_commit"),
        "iteration": (loop.Loop, "_begin_iteration"),
    }


def plant(at: str, do: str, call: int | None = None, ranks: tuple[int, ...] = (), before: int | None = None) -> None:
    """Let a deed happen at a point; `before`: only in calls before this one."""
    if ranks and RANK not in ranks:
        return
    owner, name = points()[at]
    function, calls = getattr(owner, name), [0]

    def with_fault(*arguments: Any, **keywords: Any) -> Any:
        calls[0] += 1
        if call in (None, calls[0]) and (before is None or calls[0] < before):
            DEEDS[do]()
        return function(*arguments, **keywords)

    setattr(owner, name, with_fault)


def plant_nan(kind: str, call: int, ranks: tuple[int, ...], last: int | None = None) -> None:
    """In these steps the loss, or the gradient alone, of these ranks is NaN. All ranks leave what the steps did."""
    from engine.losses import outcome as whole_outcome
    from engine.sharded import Sharded
    from engine.slices import named_parameters

    whole_step, now, unchanged = Sharded.step, [0], [True]

    def bad() -> bool:
        return call <= now[0] <= (last or call) and RANK in ranks

    def outcome(model: Any, *arguments: Any) -> Any:
        found = whole_outcome(model, *arguments)
        if bad():
            poison = torch.tensor(float("nan"))
            if kind == "gradient":
                return replace(found, loss=_Poisoned.apply(found.loss))
            return replace(found, loss=found.loss * poison, parts=tuple(part * poison for part in found.parts))
        return found

    def step(self: Any, *arguments: Any, **keywords: Any) -> Any:
        now[0] += 1
        watched = call <= now[0] <= (last or call)
        before = [kept.values.clone() for kept in self.weights() + self.state() if "/steps" not in kept.key]
        before += [named.parameter.detach().clone() for named in named_parameters(self._model)]
        result = whole_step(self, *arguments, **keywords)
        if watched:
            after = [kept.values for kept in self.weights() + self.state() if "/steps" not in kept.key]
            after += [named.parameter.detach() for named in named_parameters(self._model)]
            unchanged[0] &= all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
            tell("nan", {"same": unchanged[0], "skipped": float(result.skipped)})
        return result

    for owner, name, ours in ((Sharded, "step", step), (sys.modules["engine.sharded"], "outcome", outcome)):
        setattr(owner, name, ours)


class _Poisoned(torch.autograd.Function):
    """The value itself, whose gradient is NaN."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan")


def main() -> NoReturn:
    from engine import figures, train
    from engine.ranks import finish
    from tests.pipelines.small import build

    for name in ("dsg_timeline", "curves", "scores"):
        setattr(figures, name, lambda folder: folder)  # drawing takes longer than these runs
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
    for fault in json.loads(os.environ.get("STOPGO_FAULT", "[]")):
        kind = fault.pop("nan", None)
        if kind:
            plant_nan(kind, **fault)
        else:
            plant(**fault)
    leave = os._exit

    def exit_at_once(code: int) -> None:
        tell("exit", code)
        leave(code)

    os._exit = exit_at_once  # type: ignore[assignment]
    tell("pid", os.getpid())
    finish(train.main(sys.argv[1:]))


if __name__ == "__main__":
    main()
