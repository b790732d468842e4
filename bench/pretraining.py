"""`python -m bench.pretraining`: what does pretraining give the twelve tasks?

Over several seeds, the default run begun from a pretrained trunk beside the same run from scratch: equal seed, data, batches
and number of multi-task iterations; pretraining comes on top. The runs from scratch are those of `bench.blind`, made here where
they are not there yet. Finished runs are not repeated; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.blind import folder_of
from bench.seeds import results, train
from engine.student import interval

RUNS = Path("configs/runs")


@dataclass(frozen=True)
class Gain:
    """One task: final scores in [0, 1], means over seeds."""

    task: str
    scratch: float
    pretrained: float
    gain: float
    """Mean of the differences, seed by seed."""
    gain_interval: float
    """Half-width of its 95 % interval."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pretraining", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated training seeds (default: 0,1,2)")
    parser.add_argument("--runs", type=Path, default=Path("runs/pretraining"), help="folder of the pretrained runs")
    parser.add_argument("--scratch", type=Path, default=Path("runs/blind"), help="folder of the runs from scratch")
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one thread each (default: 2)")
    parser.add_argument("--json", type=Path, default=Path("bench/results/pretraining.json"))
    arguments = parser.parse_args(argv)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = list(pool.map(lambda seed: _one_seed(arguments.runs, arguments.scratch, seed), seeds))
    if any(codes):
        print(f"{sum(map(bool, codes))} seeds did not finish; see {arguments.runs}/*.log", file=sys.stderr)
        return 1
    gains = compare(arguments.runs, arguments.scratch, seeds)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"seeds": seeds, "tasks": [asdict(gain) for gain in gains]}, indent=1) + "\n")
    print(table(gains, len(seeds)))
    return 0


def _one_seed(runs: Path, scratch: Path, seed: int) -> int:
    """Pretraining, then both runs; the first exit code that is not 0."""
    pretrained = runs / f"pretraining-{seed}"
    begun = f"initial_weights={pretrained}"
    return (
        train(RUNS / "world_pretrain.yaml", pretrained, [f"seed={seed}"])
        or train(RUNS / "world_from_pretraining.yaml", runs / f"tasks-{seed}", [f"seed={seed}", begun])
        or train(RUNS / "world.yaml", folder_of(scratch, seed, blind=False), [f"seed={seed}", "blind=false"])
    )


def compare(runs: Path, scratch: Path, seeds: list[int]) -> list[Gain]:
    """One row per task, and their mean."""
    begun = [results(runs / f"tasks-{seed}") for seed in seeds]
    without = [results(folder_of(scratch, seed, blind=False)) for seed in seeds]
    rows = [
        _gain(task, [run[task]["score"] for run in without], [run[task]["score"] for run in begun])
        for task in without[0]
    ]
    means = [[statistics.mean(row["score"] for row in run.values()) for run in side] for side in (without, begun)]
    return [*rows, _gain("mean", *means)]


def _gain(task: str, scratch: list[float], pretrained: list[float]) -> Gain:
    differences = [b - a for a, b in zip(scratch, pretrained, strict=True)]
    return Gain(
        task, statistics.mean(scratch), statistics.mean(pretrained), statistics.mean(differences), interval(differences)
    )


def table(gains: list[Gain], seeds: int) -> str:
    """Markdown, scores in percent; the gain with its 95 % interval."""
    lines = [f"| task | from scratch ({seeds} seeds) | pretrained | gain |", "|---|---:|---:|---:|"]
    lines += [
        f"| {g.task} | {100 * g.scratch:.1f} | {100 * g.pretrained:.1f} | {100 * g.gain:+.1f} ± {100 * g.gain_interval:.1f} |"
        for g in gains
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
