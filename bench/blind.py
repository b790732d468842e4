"""`python -m bench.blind`: does each task look at its image? Every run beside its image-blind twin, over several seeds.

The twin is the same configuration with `blind=true`: region features zeroed in training and validation, everything else
equal (seed, iterations, data, boxes). Finished runs are not repeated; an interrupted one is resumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.seeds import results, train
from engine.student import interval


@dataclass(frozen=True)
class Comparison:
    """One task: mean score over seeds, half-widths of the 95 % intervals, and whether seeing is ahead of the spread."""

    task: str
    seeing: float
    seeing_interval: float
    blind: float
    blind_interval: float
    majority: float
    ahead: bool
    """Even the worst seeing seed beats the best blind one."""


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.blind", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/runs/world.yaml"))
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated training seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs/blind"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--json", type=Path, default=Path("bench/results/blind.json"))
    arguments = parser.parse_args(argv)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    wanted = [(seed, blind) for seed in seeds for blind in (False, True)]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        codes = list(pool.map(lambda job: _train(arguments.config, arguments.runs, *job), wanted))
    if any(codes):
        print(f"{sum(map(bool, codes))} runs did not finish; see {arguments.runs}/*.log", file=sys.stderr)
        return 1
    comparisons = compare(arguments.runs, seeds)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"config": str(arguments.config), "seeds": seeds, "tasks": [asdict(c) for c in comparisons]}
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(table(comparisons, len(seeds)))
    return 0


def _train(config: Path, runs: Path, seed: int, blind: bool) -> int:
    return train(config, folder_of(runs, seed, blind), [f"seed={seed}", f"blind={str(blind).lower()}"])


def compare(runs: Path, seeds: list[int]) -> list[Comparison]:
    """One row per task, in the order of the first run."""
    found = {(seed, blind): results(folder_of(runs, seed, blind)) for seed in seeds for blind in (False, True)}
    rows = []
    for task in found[seeds[0], False]:
        seeing, blind = ([found[seed, side][task]["score"] for seed in seeds] for side in (False, True))
        majority = found[seeds[0], False][task]["majority"]
        rows.append(
            Comparison(
                task,
                statistics.mean(seeing),
                interval(seeing),
                statistics.mean(blind),
                interval(blind),
                majority,
                min(seeing) > max(blind),
            )
        )
    return rows


def table(comparisons: list[Comparison], seeds: int) -> str:
    """Markdown, scores in percent with 95 % intervals."""
    lines = [
        f"| task | score ({seeds} seeds) | image-blind twin | majority or chance | ahead |",
        "|---|---:|---:|---:|---|",
    ]
    for c in comparisons:
        lines.append(
            f"| {c.task} | {100 * c.seeing:.1f} ± {100 * c.seeing_interval:.1f} | {100 * c.blind:.1f} ± "
            f"{100 * c.blind_interval:.1f} | {100 * c.majority:.1f} | {'yes' if c.ahead else 'no'} |"
        )
    return "\n".join(lines)


def folder_of(runs: Path, seed: int, blind: bool) -> Path:
    """Where a run of `bench.blind` lies."""
    return runs / f"seed-{seed}{'-blind' if blind else ''}"


if __name__ == "__main__":
    sys.exit(main())
