"""Running a module of these tests on two ranks, under torchrun, in a session that ends with the test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.reference import ROOT


def run(module: str, *arguments: object, timeout_s: float = 240) -> str:
    """What it printed. AssertionError, with that, where it fails or takes too long; no process is left."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "localhost:0", "-m", module, *map(str, arguments),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    try:
        told = process.communicate(timeout=timeout_s)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, told
    return told
