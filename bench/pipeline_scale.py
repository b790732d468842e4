"""Does an image cost the same out of a large store? And what do 120,000 images ask of 8 GPUs, and of 64?"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from rich.table import Table

from bench.pipeline_images import images, key_of
from bench.pipeline_readers import OurReader, write
from pipelines.errors import BadInput

REGIONS, WIDTH = 100, 2048
IMAGE_GB = (REGIONS + 2) * WIDTH * 2 / 1e9
"""A record on disk: bfloat16 features, a float32 mean, boxes and headers."""
DEMAND = 6_200
"""Images/s that one H100 wants at 45 % of its arithmetic (bfloat16, all twelve tasks, shared images read once)."""
STORES_GB = {"COCO": 50, "Visual Genome, GQA": 44, "NLVR2": 49, "Flickr30k": 13, "all, annotated boxes too": 220}
_BATCH, _SAMPLE, _ROUNDS = 64, 1024, 24


@dataclass(frozen=True)
class Scale:
    """One store."""

    gigabytes: float
    images: int
    shards: int
    write_images_per_s: float
    open_seconds: float
    images_per_s: float
    """Random images, warm, one core; the store's other pages are where the system has left them."""


def measure(folder: Path, gigabytes: float, say: Callable[[str], None]) -> list[dict[str, float]]:
    """Stores of a quarter, half and all of `gigabytes`, the last one also in four shards. Raises BadInput without the room."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < 1.2 * gigabytes:
        raise BadInput(
            folder, f"{free:.1f} GB free, {1.2 * gigabytes:.1f} needed", "--simulate less, or another --folder"
        )
    found = []
    for share, shards in ((0.25, 1), (0.5, 1), (1.0, 1), (1.0, 4)):
        count = int(gigabytes * share / IMAGE_GB)
        say(f"writing {count:,} images in {shards} shard{'s' * (shards > 1)}")
        path = folder / f"scale-{count}-{shards}"
        try:
            found.append(asdict(_scale(path, count, shards)))
        finally:
            shutil.rmtree(path, ignore_errors=True)
    return found


def _scale(path: Path, count: int, shards: int) -> Scale:
    started = time.perf_counter()
    ends = [count * shard // shards for shard in range(shards + 1)]
    for shard, (first, end) in enumerate(pairwise(ends)):
        place = path / f"{shard:03}" if shards > 1 else path
        write(place, images(end - first, REGIONS, WIDTH, first), WIDTH, "bfloat16")
    written = time.perf_counter() - started
    started = time.perf_counter()
    reader = OurReader(path)
    opened = time.perf_counter() - started
    random = np.random.default_rng(0)
    keys = [key_of(number) for number in random.choice(count, min(_SAMPLE, count), replace=False).tolist()]
    for start in range(0, len(keys), _BATCH):
        reader.batch(keys[start : start + _BATCH])
    seconds = []
    for _ in range(_ROUNDS):
        chosen = random.choice(keys, _BATCH).tolist()
        started = time.perf_counter()
        reader.batch(chosen)
        seconds.append(time.perf_counter() - started)
    return Scale(
        gigabytes=reader.store.nbytes / 1e9, images=count, shards=shards, write_images_per_s=count / written,
        open_seconds=opened, images_per_s=_BATCH / median(seconds),
    )  # fmt: skip


def table(rows: list[dict[str, float]]) -> Table:
    """One row a store."""
    grid = Table(title="the store's size and an image's cost", title_justify="left", header_style="bold")
    for heading in ("GB", "images", "shards", "written, images/s", "opened in", "read, images/s", "of the first"):
        grid.add_column(heading, justify="right")
    for row in rows:
        grid.add_row(
            f"{row['gigabytes']:.2f}", f"{row['images']:,}", f"{row['shards']}", f"{row['write_images_per_s']:,.0f}",
            f"{row['open_seconds'] * 1e3:.0f} ms", f"{row['images_per_s']:,.0f}",
            f"{row['images_per_s'] / rows[0]['images_per_s']:.0%}",
        )  # fmt: skip
    return grid


def projection(images_per_s: float) -> Table:
    """What feeding GPUs takes at the measured rate of one core; nothing here was run on them."""
    grid = Table(
        title=f"{DEMAND:,} images/s a GPU of {IMAGE_GB * 1e6:.0f} KB each, by the rate measured here",
        title_justify="left", header_style="bold",
    )  # fmt: skip
    grid.add_column("")
    gpus = (8, 64)
    for count in gpus:
        grid.add_column(f"{count} GPUs, {count // 8} node{'s' * (count > 8)}", justify="right")
    demand = DEMAND * IMAGE_GB

    def row(what: str, of: Callable[[int], str]) -> None:
        grid.add_row(what, *(of(count) for count in gpus))

    row("features into batches, GB/s", lambda n: f"{n * demand:.0f}")
    row("cores that fill batches, a GPU", lambda _: f"{DEMAND / images_per_s:.2f}")
    row("host to device, GB/s a GPU", lambda _: f"{demand:.2f}")
    row("page cache for COCO alone, GB a node", lambda _: f"{STORES_GB['COCO']}")
    row("page cache for all twelve, GB a node", lambda _: f"{max(STORES_GB.values())}")
    row("disk where nothing is cached, GB/s a node", lambda _: f"{8 * demand:.0f}")
    row("shared file system where nothing is cached, GB/s", lambda n: f"{n * demand:.0f}")
    row("the same as bytes (dtype uint8), GB/s", lambda n: f"{n * demand / 2:.0f}")
    row("filling every node's cache once, GB over the network", lambda n: f"{n // 8 * max(STORES_GB.values())}")
    row("features resident in GPU memory, GB a GPU", lambda _: f"{max(STORES_GB.values()) / 8:.1f}")
    return grid
