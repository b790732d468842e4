"""The Triton kernels' tests in the interpreter: a process of its own, for it must be told before Triton is imported.

It takes minutes of one core. Where many tests run it is started with the first of them, runs beside them, and is asked last.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.reference import ROOT

TEST = "test_the_kernels_in_the_interpreter"
MANY = 200
"""Tests that take longer together than the interpreter."""


@cache
def started() -> tuple[subprocess.Popen[bytes], Path]:
    """The process, and the file of what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "STOPGO_KERNELS"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted"]
    told = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file, name = tempfile.mkstemp(".log", "interpreted")
    process = subprocess.Popen(command, cwd=ROOT, env=environment | told, stdout=file, stderr=subprocess.STDOUT)
    os.close(file)
    return process, Path(name)


def finished() -> tuple[int, str]:
    """Exit code, and the end of what it printed. Waits for it."""
    process, log = started()
    return process.wait(), log.read_text(errors="replace")[-20_000:]


def stop() -> None:
    """End it where nobody waited for it."""
    if started.cache_info().currsize:
        process, log = started()
        process.kill()
        process.wait()
        log.unlink()
