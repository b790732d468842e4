"""`python -m bench.data_path`: milliseconds of a batch by the plain way and through DALI, in turns, on the CPU.

64 images of 100 regions and 2,048 values as bfloat16, from stores in the page cache, one core for copying. Every batch is
first compared bit for bit. Without a device beside the CPU there is nothing to hand work to: what shows is what DALI costs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch

from bench.pipeline_images import HEIGHT, WIDTH, images
from bench.pipeline_readers import task_data
from bench.timing import Spread, Timed, interleaved
from kernels import heap
from pipelines.batch import Batch, tensors_of
from pipelines.dali import Stage
from pipelines.errors import BadInput
from pipelines.loader import TrainingSource
from pipelines.masking import Masking
from pipelines.sampler import Sampler
from pipelines.store.reader import FeatureStore
from pipelines.store.writer import StoreWriter

BATCH, REGIONS, VALUES, CLASSES = 64, 100, 2048, 16
CASES = {
    "bfloat16 store": ("bfloat16", None),
    "uint8 store": ("uint8", None),
    "pretraining, bfloat16 store": ("bfloat16", Masking(mask_token=4, vocabulary=1000)),
    "pretraining, uint8 store": ("uint8", Masking(mask_token=4, vocabulary=1000)),
}
"""The store's type, and what is hidden."""


def source(folder: Path, total: int, dtype: str, masking: Masking | None) -> TrainingSource:
    """Batches of random images of a store of `total`, which is written the first time."""
    path = folder / dtype
    if not path.exists():
        probs = np.full((REGIONS, CLASSES), 1 / CLASSES, np.float32)
        with StoreWriter(path, VALUES, dtype, "bench.data_path") as writer:
            for image in images(total, REGIONS, VALUES):
                writer.add(image.key, image.features, image.boxes, WIDTH, HEIGHT, probs)
    data = task_data(FeatureStore(path))
    return TrainingSource(data, Sampler(len(data), BATCH, 0, 1), 1, torch.bfloat16, masking=masking)


def compare(plain: Batch, other: Batch) -> None:
    """Raises BadInput where two batches differ in a bit."""
    pairs = zip(*(tensors_of(batch) for batch in (plain, other)), strict=True)
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
        raise BadInput("data_path", "DALI gives another batch than the plain way")


def main(arguments: list[str] | None = None) -> int:
    """Print a table; exit code 2 where DALI is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.data_path", description=__doc__)
    parser.add_argument("--images", type=int, default=512, help="in each store: 200 or 100 KB each (default: 512)")
    parser.add_argument("--seconds", type=float, default=10, help="for each kind of batch (default: 10)")
    given = parser.parse_args(arguments)
    heap.keep()  # as the engine does
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, (dtype, masking) in CASES.items():
                made = source(Path(folder), given.images, dtype, masking)
                stage = Stage({"task": made.raw}, torch.bfloat16, torch.device("cpu"))
                for step in range(given.images // BATCH):  # every record is tested here, so not below
                    compare(made(step), stage.batch("task", step))
                found[name] = _measure(made, stage, given.seconds)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    for name, times in found.items():
        plain, dali = times["plain"], times["dali"]
        print(
            f"{name:<30}plain {1e3 * plain.median:6.1f} ms ({1e3 * plain.least:.1f}), "
            f"DALI {1e3 * dali.median:6.1f} ms ({1e3 * dali.least:.1f}), {plain.calls} calls"
        )
    return 0


def _measure(made: TrainingSource, stage: Stage, seconds: float) -> dict[str, Spread]:
    """Each way with batches of its own steps, one after the other."""

    def timed(way: Callable[[int], Batch]) -> Timed:
        steps = count()
        return lambda: partial(way, next(steps))

    ways = {"plain": timed(made), "dali": timed(partial(stage.batch, "task"))}
    return interleaved(ways, torch.device("cpu"), seconds)


if __name__ == "__main__":
    sys.exit(main())
