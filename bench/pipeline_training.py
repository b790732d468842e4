"""How long training steps wait for their batch: the embedded world's run, and the full model on features of full size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.table import Table

from pipelines.errors import BadInput
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter
from pipelines.world import ensure

REGIONS, WIDTH = 100, 2048
_ROOT = Path(__file__).resolve().parent.parent
_WARM_UP = 2
_RUNS = {
    "world": ("world", ["max_iterations=30"]),
    "full size": ("twelve_in_one", ["max_iterations=5", "warmup.longest_task_iterations=null"]),
}
"""What is run, and for how long; iterations of the first `_WARM_UP` do not count, they also build and touch things first."""
_BATCH = 16


def measure(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Of each run: the share of step and waiting time that was waiting, over all tasks and in the worst of them."""
    wide = widened(folder, say)
    found = {}
    for name, (config, overrides) in _RUNS.items():
        say(f"training: {name}")
        output = folder / f"run-{config}"
        common = ["logging.every=1", "logging.console=quiet", "validation.on_last=false", f"output={output}"]
        sheet = [f"data={wide}", *_small_batches()] if config != "world" else [f"world.path={folder / '.world'}"]
        command = [
            sys.executable,
            "-m",
            "engine.train",
            "--config",
            f"configs/runs/{config}.yaml",
            *common,
            *overrides,
            *sheet,
        ]
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BadInput(f"training {name}", done.stderr.strip().splitlines()[-1] if done.stderr else "failed")
        found[name] = _waiting(output / "metrics.jsonl")
    return found


def _small_batches() -> list[str]:
    tasks = yaml.safe_load((_ROOT / "configs/tasks.yaml").read_text())["tasks"]
    return [f"task_overrides.{name}.batch={_BATCH}" for name, row in tasks.items() if row.get("default", True)]


def _waiting(metrics: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    tasks: dict[str, list[float]] = {}
    for row in rows:
        if row["iteration"] > _WARM_UP:
            wait, step = tasks.setdefault(row["task"], [0.0, 0.0])
            tasks[row["task"]] = [wait + row["data_wait_ms"], step + row["step_ms"]]
    shares = {task: wait / (wait + step) for task, (wait, step) in tasks.items()}
    wait, step = (sum(pair[i] for pair in tasks.values()) for i in range(2))
    worst = max(shares, key=lambda task: shares[task])
    return {"share": wait / (wait + step), "worst_task": worst, "worst_share": shares[worst], "tasks": shares}


def widened(folder: Path, say: Callable[[str], None]) -> Path:
    """The data sheet of a small world whose detected regions are 100 of 2,048 values: the questions stay, the bytes are those
    of real stores. Annotated boxes stay as many as they are."""
    world = ensure(folder / ".small", seed=0, size="small")
    sheet = yaml.safe_load(world.read_text())
    root = (world.parent / sheet.get("root", ".")).resolve()
    target = folder / "wide"
    target.mkdir(exist_ok=True)
    sheet["sets"] = {name: entry for name, entry in sheet["sets"].items() if isinstance(entry["features"], str)}
    for entry in sheet["sets"].values():
        for key in ("features", "candidates"):
            if key in entry:
                name = Path(entry[key]).name
                if not (target / name).exists():
                    say(f"widening {name}")
                    _widen(root / entry[key], target / name, REGIONS if key == "features" else None)
                entry[key] = str(target / name)
    wide = target / "sheet.yaml"
    wide.write_text(yaml.safe_dump({**sheet, "root": str(root)}))
    return wide


def _widen(source: Path, target: Path, regions: int | None) -> None:
    store = FeatureStore(source)
    mixing = np.random.default_rng(0).standard_normal((store.feature_dim, WIDTH)).astype(np.float32) / 8
    with StoreWriter(target, WIDTH, "bfloat16", "bench.pipeline") as writer:
        for key in store:
            record = store.record(key)
            stored = record.values()
            rows = np.arange(regions or len(stored)) % len(stored)
            features = np.maximum(stored @ mixing, 0)[rows]
            writer.add(key, features, record.boxes[rows], record.width, record.height)


def table(found: dict[str, Any]) -> Table:
    """One row a run."""
    grid = Table(title="time spent waiting for data", title_justify="left", header_style="bold")
    for heading in ("run", "of step time", "worst task", ""):
        grid.add_column(heading)
    for name, row in found.items():
        grid.add_row(name, f"{row['share']:.2%}", row["worst_task"], f"{row['worst_share']:.2%}")
    return grid
