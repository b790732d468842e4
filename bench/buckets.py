"""`python -m bench.buckets`: how many shapes the twelve tasks have on the grid of `pipelines.buckets`, and what padding costs.

Lengths are drawn from `bench/lengths.json`; no model and no tensors. Tasks take turns as in training, and `engine.graphs`'
rule is followed: the first batch of a bucket runs as usual, the next are replayed, and the graph not used for longest goes
when there are too many.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.lengths import DETECTED, TaskLengths
from bench.lengths import load as load_lengths
from engine.graphs import LIMIT
from engine.tasks import TaskRow, load_table
from pipelines.buckets import LEAST_IMAGE, LEAST_TEXT, Bucket, Grid, Stream, dummies, padded_entries

_RETRIEVAL_TEXTS, _RETRIEVAL_IMAGES = (2, 1, 1), (3, 1)
"""How many of an example's four pairs use each of its captions and images (spec section 3.2)."""


@dataclass
class Found:
    """Of one task."""

    examples: int
    seen: dict[Bucket, int] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    replayed: int = 0

    def as_json(self) -> dict[str, Any]:
        steps = len(self.shares)
        return {
            "examples": self.examples,
            "buckets": len(self.seen),
            "buckets_of_nine_steps_in_ten": _needed(sorted(self.seen.values(), reverse=True), 0.9 * steps),
            "padded_row_share": {"mean": float(np.mean(self.shares)), "max": max(self.shares)},
            "replayed": self.replayed / steps,
        }


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.buckets", description=__doc__.split("\n\n")[0])
    parser.add_argument("--batch", type=int, help="examples per batch of every task (default: the published sizes)")
    parser.add_argument("--iterations", type=int, default=1000, help="rounds over all tasks (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=LIMIT, help="graphs kept (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result here")
    arguments = parser.parse_args(argv)
    found = simulate(arguments.iterations, arguments.batch, arguments.limit)
    print(f"{'task':22}{'batch':>6}{'buckets':>9}{'for 90 %':>10}{'padding':>9}{'at most':>9}{'replayed':>10}")
    for name, row in found.items():
        padding = row["padded_row_share"]
        print(
            f"{name:22}{row['examples']:6}{row['buckets']:9}{row['buckets_of_nine_steps_in_ten']:10}"
            f"{padding['mean']:9.1%}{padding['max']:9.1%}{row['replayed']:10.1%}"
        )
    total, needed = (sum(row[key] for row in found.values()) for key in ("buckets", "buckets_of_nine_steps_in_ten"))
    replayed = float(np.mean([row["replayed"] for row in found.values()]))
    print(f"{'all':28}{total:9}{needed:10}{'':18}{replayed:10.1%}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"tasks": found, "iterations": arguments.iterations, "limit": arguments.limit, "replayed": replayed}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def simulate(iterations: int, examples: int | None = None, limit: int = LIMIT) -> dict[str, dict[str, Any]]:
    """What `Found` says of each task, after so many rounds."""
    lengths, rows = load_lengths(), load_table().default_tasks()
    found = {row.name: Found(examples or row.batch) for row in rows}
    graphs: OrderedDict[tuple[str, Bucket], None] = OrderedDict()
    seen: set[tuple[str, Bucket]] = set()
    for iteration in range(iterations):
        for row in rows:
            of_task = found[row.name]
            bucket, share = drawn(row, lengths[row.name], of_task.examples, iteration)
            of_task.seen[bucket] = of_task.seen.get(bucket, 0) + 1
            of_task.shares.append(share)
            key = (row.name, bucket)
            if key not in seen:
                seen.add(key)
                continue
            if key not in graphs and len(graphs) >= limit:
                seen.discard(graphs.popitem(last=False)[0])
            graphs[key] = None
            graphs.move_to_end(key)
            of_task.replayed += 1
    return {name: of_task.as_json() for name, of_task in found.items()}


def drawn(row: TaskRow, lengths: TaskLengths, examples: int, seed: int) -> tuple[Bucket, float]:
    """The bucket of a batch with these lengths, and its share of padded rows (over pairs)."""
    random = np.random.default_rng((seed, row.number))
    texts: tuple[int, ...] = (row.images,)
    images: tuple[int, ...] = (1,) * row.images
    if row.loss == "options":
        texts, images = _RETRIEVAL_TEXTS, _RETRIEVAL_IMAGES
    pairs, k = examples * sum(texts), sum(texts)
    text_rows = lengths.texts.draw(random, examples * len(texts)).reshape(examples, -1)
    image_rows = lengths.draw_regions(random, examples * len(images)).reshape(examples, -1)
    text, image = _stream(text_rows, texts), _stream(image_rows, images)
    text_step, image_step = Grid().steps(text.rows + image.rows)
    padded_text = dummies(text, pairs, k, _regular(texts), text_step, LEAST_TEXT).pad(text)
    padded_image = dummies(image, pairs, k, _regular(images), image_step, LEAST_IMAGE).pad(image)
    rows, real = padded_text.pair_rows + padded_image.pair_rows, text.pair_rows + image.pair_rows
    entries = _entries(row, lengths, image_rows, random)
    return Bucket(examples, pairs + k, padded_text, padded_image, entries), (rows - real) / rows


def _regular(uses: tuple[int, ...]) -> int | None:
    """How many pairs use each item, where all are used alike."""
    return uses[0] if len(set(uses)) == 1 else None


def _stream(lengths: np.ndarray, uses: tuple[int, ...]) -> Stream:
    """From the rows [examples, items of an example], each item used by so many pairs."""
    return Stream(lengths.size, int(lengths.sum()), int((lengths * uses).sum()), int(lengths.max()))


def _entries(row: TaskRow, lengths: TaskLengths, image_rows: np.ndarray, random: np.random.Generator) -> int:
    """Soft labels (one to five an example, as `bench.batches` has them) or choices, padded."""
    if row.loss == "soft_labels":
        return padded_entries(int(random.integers(1, 6, len(image_rows)).sum()))
    if row.loss == "choices":
        boxes = int((image_rows - 1 - DETECTED).sum())
        return padded_entries(1 + (boxes if lengths.options is None else lengths.options * len(image_rows)))
    return 0


def _needed(counts: list[int], steps: float) -> int:
    """How many of the most frequent buckets make up so many steps."""
    return int(np.searchsorted(np.cumsum(counts), steps)) + 1


if __name__ == "__main__":
    sys.exit(main())
