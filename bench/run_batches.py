"""Iterations and samples per second of a run's own batches, by the run's own parts; no peers."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from engine.assembly import Parts
from engine.model.randomness import Randomness
from engine.step import train_step

_WARM_UP = 2


def measure(parts: Parts, rounds: int) -> dict[str, Any]:
    """Median step time of each task, and the conditions. Tasks take turns within a round, so that whatever else the
    machine does falls on all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in parts.tasks}
    batches = {name: task.train(0).to(parts.device) for name, task in parts.tasks.items()}
    for turn in range(rounds + _WARM_UP):
        for name, task in parts.tasks.items():
            random = Randomness(parts.config.seed, turn, training=True)
            started = time.perf_counter()
            train_step(
                parts.model, parts.optimizer, batches[name], task.row.head, loss_scale=task.loss_scale,
                lr_multiplier=1e-3, random=random, share=parts.config.share_prefixes,
            )  # fmt: skip
            if parts.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= _WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    rows = {}
    for name, batch in batches.items():
        median = statistics.median(seconds[name])
        rows[name] = {
            "iterations_per_s": 1 / median,
            "samples_per_s": batch.examples / median,
            "rows": batch.pair_text_rows + batch.pair_image_rows,
            "seconds": {"ours": {"median": median, "all": seconds[name]}},
        }
    return {
        "tasks": rows,
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "precision": parts.config.precision,
    }


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One of each task, for the records."""
    return [
        {"task": name, "provider": "ours", "median_s": row["seconds"]["ours"]["median"], "rows": row["rows"],
         "samples_s": row["seconds"]["ours"]["all"]}
        for name, row in result["tasks"].items()
    ]  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """One line a task."""
    lines = [f"{'task':24}{'iterations/s':>14}{'samples/s':>12}{'rows':>8}"]
    for name, row in result["tasks"].items():
        lines.append(f"{name:24}{row['iterations_per_s']:14.1f}{row['samples_per_s']:12.0f}{row['rows']:8}")
    c = result["conditions"]
    lines.append(
        f"{result['parameters']:,} parameters, {result['precision']}; {c['device']} ({c['isa']}), {c['threads']} threads"
    )
    return "\n".join(lines)
