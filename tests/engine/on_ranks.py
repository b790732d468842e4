"""A function of a test, called on every rank of several real processes: `on_ranks(2, function, …)`.

The processes are started by torchrun, or by DeepSpeed's launcher, in a session of their own, so that all of them can be ended.
As a module, this file is what each of them runs.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from engine.ranks import finish, join, leave
from tests.pipelines.small import build
from tests.reference import ROOT

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (make setup)")

TIMEOUT_S = 240
"""Far more than the tests need: shared machines stall."""


def on_ranks(n: int, function: Callable[..., Any], *arguments: Any, launcher: str = "torchrun") -> list[Any]:
    """What `function(ranks, *arguments)` returns on each of `n` ranks. Plain data both ways."""
    with tempfile.TemporaryDirectory() as folder:
        told = [function.__module__, function.__qualname__, json.dumps(arguments, default=str), folder]
        done = launch(n, "tests.engine.on_ranks", *told, launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(n)]


def launch(n: int, module: str, *arguments: str, launcher: str = "torchrun") -> subprocess.CompletedProcess[str]:
    """Run `python -m module` on `n` ranks and wait. Whatever happens, no process is left."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(n), "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0", "-m", module]  # fmt: skip
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_accelerators", str(n), "--master_port", str(free_port()),
                 "--module", module]  # fmt: skip
    command = [sys.executable, *(torchrun if launcher == "torchrun" else deepspeed), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore",
                   "PYTHONFAULTHANDLER": "1"}  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=TIMEOUT_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)  # launchers end their ranks, which have sessions of their own
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, error)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def main() -> None:
    """On one rank: call the function, and leave what it returns in a file."""
    module, name, arguments, folder = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    with tempfile.TemporaryDirectory() as again:
        build(Path(again))  # the reader of the small data sets reads from memory
    ranks = join(TIMEOUT_S, "cpu")
    try:
        found = getattr(importlib.import_module(module), name)(ranks, *json.loads(arguments))
        (Path(folder) / f"{ranks.rank}.json").write_text(json.dumps(found))
    finally:
        leave()


if __name__ == "__main__":
    main()
    finish(0)
