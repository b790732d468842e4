"""Whole training runs over several seeds: in processes of their own, resumed, never repeated; and their scores."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.journal import read_rows


def train(config: Path, folder: Path, overrides: Sequence[str]) -> int:
    """Run a configuration to its end with one thread, into `folder`, its output into `folder`.log; the exit code.

    A finished run is left alone, an interrupted one resumed.
    """
    if finished(folder):
        return 0
    resume = any((folder / "checkpoints").glob("iteration-*"))
    command = [sys.executable, "-m", "engine.train"]
    if resume:
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # killed before its first checkpoint: nothing to continue from
        command += ["--config", str(config), f"output={folder}", "logging.console=plain", "threads=1", *overrides]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.log").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False).returncode


def finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    events = folder / "events.jsonl"
    return events.exists() and any(row["event"] == "end" and row["reason"] == "done" for row in read_rows(events))


def results(folder: Path) -> dict[str, dict[str, float]]:
    """Final scores of a run by task: score, best, majority, blind."""
    return {row["task"]: row for row in read_rows(folder / "events.jsonl") if row["event"] == "result"}
