"""`python -m bench.balance`: how evenly the rows of a batch lie over ranks, by `pipelines.division` and in the sampler's order.

Lengths are drawn from `bench/lengths.json` at the published batch sizes; no model and no tensors. A step waits for the rank
with most rows, so the largest over the mean, less one, is about the share of the step that the others wait.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.lengths import TaskLengths
from bench.lengths import load as load_lengths
from engine.tasks import TaskRow, load_table
from pipelines.division import divide

_OTHER_TEXTS, _OTHER_IMAGES = 2, 1
"""What the wrong options of a retrieval example bring beside the match (spec section 3.2)."""

Rows = NDArray[np.int64]


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.balance", description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--batches", type=int, default=1000, help="of each task (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here, under `balance`")
    arguments = parser.parse_args(argv)
    found = simulate(arguments.ranks, arguments.batches)
    print(
        f"{'max / mean rows over ' + str(arguments.ranks) + ' ranks':28}{'batch':>6}{'mean':>9}{'worst':>9}{'in order':>10}"
    )
    for name, row in found.items():
        print(f"{name:28}{row['batch']:6}{row['mean']:9.4f}{row['worst']:9.4f}{row['in_order']:10.4f}")
    if arguments.json:
        whole = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        whole["balance"] = {"ranks": arguments.ranks, "batches": arguments.batches, "tasks": found}
        arguments.json.write_text(json.dumps(whole, indent=1, sort_keys=True) + "\n")
    return 0


def simulate(ranks: int, batches: int) -> dict[str, dict[str, float]]:
    """By task: the largest rank's rows over the mean, over batches the mean and the worst; `in_order`: mean without dealing."""
    table, found = load_table(), {}
    for number, (name, lengths) in enumerate(load_lengths().items()):
        row, random = table.row(name), np.random.default_rng(number)
        dealt, in_order = [], []
        for _ in range(batches):
            costs, rows = draw(lengths, row, random)
            dealt.append(spread(rows, divide(costs, ranks)))
            in_order.append(spread(rows, np.array_split(np.arange(row.batch), ranks)))
        found[name] = {
            "batch": row.batch, "mean": float(np.mean(dealt)), "worst": max(dealt), "in_order": float(np.mean(in_order)),
        }  # fmt: skip
    return found


def draw(lengths: TaskLengths, row: TaskRow, random: np.random.Generator) -> tuple[Rows, Rows]:
    """Of each example of a batch, int64 [batch]: the rows that are dealt by, and those that it has in the end."""
    texts = lengths.texts.draw(random, row.batch) * row.images
    regions = lengths.draw_regions(random, row.batch * row.images).reshape(row.batch, row.images).sum(1)
    costs = texts + regions
    if row.loss != "options":
        return costs, costs
    others = lengths.texts.draw(random, row.batch * _OTHER_TEXTS).reshape(row.batch, _OTHER_TEXTS).sum(1)
    images = lengths.draw_regions(random, row.batch * _OTHER_IMAGES).reshape(row.batch, _OTHER_IMAGES).sum(1)
    return costs, costs + others + images


def spread(rows: Rows, parts: list[Rows]) -> float:
    """Rows of the part with most of them, over the mean."""
    sums = np.array([rows[part].sum() for part in parts])
    return float(sums.max() / sums.mean())


if __name__ == "__main__":
    sys.exit(main())
