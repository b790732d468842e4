"""What a run of `engine.train` on this machine says of its steps in its journal."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from bench.timing import cores
from engine.journal import METRICS_FILE, read_rows
from pipelines.errors import BadInput

_ITERATIONS, _WARMING = 15, 3
"""How many there are, and how many of them do not count."""


def measure(config: Path, overrides: Sequence[str], ranks: int) -> dict[str, float]:
    """Seconds of each task's fastest step, waiting for data left out. BadInput where the run ends with an error."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "-m", "engine.train",
            "--config", str(config), *overrides, f"output={output}", f"max_iterations={_ITERATIONS}",
            "logging.every=1", "logging.console=quiet", "validation.on_last=false", "stopgo.enabled=false",
        ]  # fmt: skip
        threads = str(max(1, cores() // ranks))
        done = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip() or "no words").splitlines()[-1]
            raise BadInput("--check-run", f"the run ended with {done.returncode}: {last}", " ".join(command))
        seconds = defaultdict(list)
        for row in read_rows(output / METRICS_FILE):
            if row["iteration"] > _WARMING:
                seconds[row["task"]].append(row["step_ms"] / 1e3)
    return {task: min(found) for task, found in seconds.items()}
