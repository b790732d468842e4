"""`python -m bench.iterations`: iterations and samples per second of each task's whole training step.

Batches are the run's own; a step is forward, loss, backward and update. Tasks take turns within every round, so that
whatever else the machine does falls on all of them; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

from engine.assembly import Parts, assemble
from engine.config import load
from engine.model.randomness import Randomness
from engine.step import train_step
from pipelines.errors import BadInput


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.iterations", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/runs/world.yaml"))
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds over all tasks, after two for warming up")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for engine.train, e.g. tasks=[vqa,gqa]")
    arguments = parser.parse_args(argv)
    try:
        parts = assemble(load(arguments.config, arguments.overrides))
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    result = measure(parts, arguments.rounds)
    print(f"{'task':24}{'iterations/s':>14}{'samples/s':>12}{'rows':>8}")
    for name, row in result["tasks"].items():
        print(f"{name:24}{row['iterations_per_s']:14.1f}{row['samples_per_s']:12.0f}{row['rows']:8}")
    print(f"{result['threads']} threads, {result['parameters']:,} parameters, {result['precision']}, {result['cpu']}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(parts: Parts, rounds: int) -> dict:
    """Median step time of each task, and the conditions."""
    seconds: dict[str, list[float]] = {name: [] for name in parts.tasks}
    batches = {name: task.train(0).to(parts.device) for name, task in parts.tasks.items()}
    for turn in range(rounds + 2):
        for name, task in parts.tasks.items():
            random = Randomness(parts.config.seed, turn, training=True)
            started = time.perf_counter()
            train_step(
                parts.model, parts.optimizer, batches[name], task.row.head, loss_scale=task.loss_scale,
                lr_multiplier=1e-3, random=random, share=parts.config.share_prefixes,
            )  # fmt: skip
            if parts.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - started)
    rows = {}
    for name, batch in batches.items():
        median = statistics.median(seconds[name])
        rows[name] = {
            "iterations_per_s": 1 / median,
            "samples_per_s": batch.examples / median,
            "rows": batch.pair_text_rows + batch.pair_image_rows,
        }
    return {
        "tasks": rows,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in parts.model.parameters()),
        "precision": parts.config.precision,
        "device": str(parts.device),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
