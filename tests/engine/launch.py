"""Small runs over several ranks in processes of their own, by the launchers that people use, with faults on demand.

    with started("torchrun", data, tmp_path / "run", faults=[{"at": "step", "call": 17, "do": "terminate the group"}]) as run:
        run.wait(60)
    assert run.codes() == {0: 75, 1: 75}

A run is a session of its own, so that a signal to its process group reaches no one else; torchrun gives each rank one more.
Every process of a run has its mark in the environment, by which what is left of it is found and killed.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from engine.journal import read_rows
from pipelines.errors import BadInput
from tests.reference import ROOT

TORCHRUN, DEEPSPEED = "torchrun", "deepspeed"
LAUNCHERS = (TORCHRUN, DEEPSPEED)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def command(launcher: str, ranks: int, module: str) -> list[str]:
    """What starts `ranks` ranks of a module on this machine."""
    port = f"--master_port={free_port()}"
    if launcher == TORCHRUN:
        return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", port, "-m", module]
    return [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_accelerators={ranks}", port, "--module", module]


@dataclass
class Run:
    """A launcher and its ranks."""

    process: subprocess.Popen[bytes]
    folder: Path
    told: Path
    """Where the ranks of `tests.engine.rank` leave their exit codes and times."""
    began: float = field(default_factory=time.time)

    def wait(self, limit_s: float) -> int:
        """The launcher's exit code; AssertionError with its output where it does not end in time."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {limit_s} s:\n{self.output()}") from None

    def wait_for(self, there: Callable[[Run], bool], limit_s: float = 120) -> None:
        """Until something is so, while the run lives."""
        until = time.monotonic() + limit_s
        while not there(self):
            assert self.process.poll() is None and time.monotonic() < until, self.output()
            time.sleep(0.1)

    def iteration(self) -> int:
        """The last one that metrics.jsonl tells of; 0: none."""
        file = self.folder / "metrics.jsonl"
        with suppress(BadInput):
            return max((row["iteration"] for row in read_rows(file)), default=0)
        return 0

    def output(self) -> str:
        """What launcher and ranks have said, on both streams."""
        return (self.told / "output").read_text(errors="replace")

    def codes(self) -> dict[int, int]:
        """Exit codes of the ranks that ended by themselves."""
        return {int(path.name.removeprefix("exit-")): json.loads(path.read_text()) for path in self.told.glob("exit-*")}

    def tells(self, name: str) -> dict[int, Any]:
        """What the ranks left under this name."""
        return {
            int(path.name.removeprefix(f"{name}-")): json.loads(path.read_text())
            for path in self.told.glob(f"{name}-*")
        }

    def first_signal(self) -> float:
        """When, in seconds since the epoch."""
        return min(at for _, at in self.tells("signal").values())

    def alive(self) -> list[psutil.Process]:
        """Processes of the run, orphans too: whoever has its mark in the environment (torchrun's ranks have own sessions)."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                marked = process.environ().get("STOPGO_TOLD") == str(self.told)
                if marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def kill(self) -> None:
        """SIGKILL for all of them, in one go."""
        for process in self.alive():
            with suppress(psutil.Error):
                process.kill()

    def wait_until_gone(self, limit_s: float) -> float:
        """Seconds until no process of the run was left; AssertionError where one stays."""
        began = time.monotonic()
        while left := self.alive():
            assert time.monotonic() - began < limit_s, f"{[(p.pid, p.cmdline()) for p in left]}\n{self.output()}"
            self.process.poll()
            time.sleep(0.1)
        return time.monotonic() - began


@contextmanager
def started(
    launcher: str,
    arguments: Sequence[str],
    folder: Path,
    faults: Sequence[dict[str, Any]] = (),
    ranks: int = 2,
    module: str = "tests.engine.rank",
    environment: dict[str, str] | None = None,
) -> Iterator[Run]:
    """A run of `ranks` ranks in `folder`, with these arguments of `engine.train`. What is left of it at the end is killed."""
    told = folder.with_name(f"{folder.name}-told-{time.monotonic_ns()}")
    told.mkdir()
    given = {
        **os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "STOPGO_TOLD": str(told),
        "STOPGO_FAULT": json.dumps(list(faults)), "CUDA_VISIBLE_DEVICES": "", **(environment or {}),
    }  # fmt: skip
    with (told / "output").open("wb") as output:
        process = subprocess.Popen(
            [*command(launcher, ranks, module), *arguments],
            cwd=ROOT, env=given, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    (told / "launcher").write_text(str(process.pid))
    run = Run(process, folder, told)
    try:
        yield run
    finally:
        run.kill()
        process.wait()
