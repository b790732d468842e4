"""2,000 iterations on two ranks: memory, open files and threads stay as they are, and nobody is left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.engine.launch import TORCHRUN, started
from tests.recorded import record

ITERATIONS, WARM = 2000, 500
SETTINGS = (
    "world.size=small", "tasks=[vqa,refcoco]", "task_overrides.vqa.batch=4", "task_overrides.refcoco.batch=4",
    "validation.max_examples=8", f"max_iterations={ITERATIONS}", "checkpoint.every=100", "logging.every=20",
    "logging.console=quiet", "device=cpu",
)  # fmt: skip


@pytest.mark.slow
def test_two_thousand_iterations(tmp_path: Path) -> None:
    arguments = ["--config", "configs/runs/world.yaml", *SETTINGS, f"world.path={tmp_path / 'world'}"]
    found: dict[int, list[tuple[int, float, int, int]]] = {0: [], 1: []}
    began = time.monotonic()
    with started(TORCHRUN, [*arguments, f"output={tmp_path / 'run'}"], tmp_path / "run") as run:
        run.wait_for(lambda run: run.iteration() >= WARM, 1200)
        ranks = {rank: psutil.Process(pid) for rank, pid in run.tells("pid").items()}
        while run.process.poll() is None and (at := run.iteration()) < ITERATIONS - 20:
            for rank, process in ranks.items():
                row = (at, process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
                found[rank].append(row)
            assert time.monotonic() - began < 2400, run.output()
            time.sleep(1)
        run.wait(300)
        run.wait_until_gone(10)
    assert run.codes() == {0: 0, 1: 0}, run.output()
    numbers: dict[str, dict[str, Any]] = {}
    for rank, rows in found.items():
        iterations, rss, files, threads = (np.array(column) for column in zip(*rows, strict=True))
        slope = 100 * np.polyfit(iterations, rss, 1)[0]
        numbers[f"rank {rank}"] = {
            "rss_MB_per_100_iterations": round(float(slope), 3), "rss_MB": [round(float(rss[0])), round(float(rss[-1]))],
            "open_files": sorted({int(count) for count in files}), "threads": sorted({int(count) for count in threads}),
            "samples": len(rows),
        }  # fmt: skip
    record(
        "soak", f"{ITERATIONS} iterations of tiny, two ranks", {**numbers, "seconds": round(time.monotonic() - began)}
    )
    for rank, rows in found.items():
        assert numbers[f"rank {rank}"]["rss_MB_per_100_iterations"] < 1, numbers
        # A save has files open for a moment; at its end there are as many as before.
        quarter = len(rows) // 4
        for column in (2, 3):
            first, last = (min(row[column] for row in part) for part in (rows[:quarter], rows[-quarter:]))
            assert first == last, numbers
