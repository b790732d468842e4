"""`python -m bench.pipeline`: from a feature store to batches, against other readers and against memcpy.

Every reader has a process of its own and a store of its own with the same made-up images, and fills batches of random ones
on one core, in turns with the others. A ratio is the median over rounds of two readers' times in the same round. Every value of
every batch is first compared with what was written.

    python -m bench.pipeline --json F        # about two minutes, 3 GB of disk in the folder for temporary files
    python -m bench.pipeline --training      # also how long training steps wait for their batch
    python -m bench.pipeline --simulate 4    # stores of 1, 2 and 4 GB: does an image's cost depend on the store's size?
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import pipeline_scale, pipeline_training
from bench.memory import anonymous_bytes
from bench.peers.readers import AuthorsReader, UniterReader
from bench.pipeline_images import Image, images, key_of
from bench.pipeline_readers import Memcpy, OurReader, write
from bench.timing import conditions
from pipelines.batch import Batch
from pipelines.errors import BadInput

WIDTH = 2048
OURS, MEMCPY = "ours", "memcpy"


class Reader(Protocol):
    """Gives the batch of these images."""

    first_row: int
    """Row of an image's first region: after the global row, where there is one."""

    def batch(self, keys: list[str]) -> Any: ...


@dataclass(frozen=True)
class Kind:
    """A way to read: how its store is written, and how it is opened."""

    store: str
    write: Callable[[Path, Iterable[Image]], None]
    open: Callable[[Path], Reader]


def _bfloat16(path: Path, made: Iterable[Image]) -> None:
    write(path, made, WIDTH, "bfloat16")


def _float16(path: Path, made: Iterable[Image]) -> None:
    write(path, made, WIDTH, "float16")


def _uint8(path: Path, made: Iterable[Image]) -> None:
    write(path, made, WIDTH, "uint8")


KINDS: dict[str, Kind] = {
    OURS: Kind("bfloat16", _bfloat16, OurReader),
    MEMCPY: Kind("bfloat16", _bfloat16, Memcpy),
    "ours_float16": Kind("float16", _float16, OurReader),
    "ours_uint8": Kind("uint8", _uint8, OurReader),
    "pickle": Kind("pickle", AuthorsReader.write, AuthorsReader),
    "uniter": Kind("uniter", UniterReader.write, UniterReader),
}
PEERS = ("pickle", "uniter")


@dataclass
class Measured:
    """One reader's batches."""

    seconds: list[float] = field(default_factory=list)
    cold_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """See `_peak`."""


@dataclass(frozen=True)
class Setting:
    """What is read."""

    folder: Path
    images: int
    regions: int
    batch: int
    rounds: int

    def path(self, kind: Kind) -> Path:
        return self.folder / kind.store

    def made(self) -> Iterable[Image]:
        return images(self.images, self.regions, WIDTH)


def measure(setting: Setting, names: Sequence[str], say: Callable[[str], None]) -> dict[str, Measured]:
    """Write the stores that are missing, test every value, then time: rounds of one batch a reader, in turns."""
    for name in names:
        kind = KINDS[name]
        if not setting.path(kind).exists():
            say(f"writing {setting.images} images for {kind.store}")
            kind.write(setting.path(kind), setting.made())
    for name in names:
        if name != MEMCPY:
            say(f"testing every value that {name} gives")
            check(setting, name)
    found = {name: Measured() for name in names}
    say("reading with an empty page cache")
    for name in names:
        found[name].cold_seconds = _cold(setting, name)
    say("reading with a warm one")
    with ExitStack() as stack:
        # Processes of their own: none finds the heap as another reader has left it. They wait for their turn.
        processes = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in names}
        for name, process in processes.items():
            process.submit(_open, name, setting).result()
        for turn in range(setting.rounds):
            for place in range(len(names)):
                name = names[(turn + place) % len(names)]
                found[name].seconds.append(processes[name].submit(_timed, setting, (turn, place)).result())
    for name in names:
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            found[name].peak_bytes = process.submit(_peak, name, setting).result()
    return found


_reader: Reader
"""Of a process that has one."""


def _open(name: str, setting: Setting) -> None:
    """Open a reader in this process, touch every page of its store, and test every checksum."""
    global _reader
    torch.set_num_threads(1)
    _reader = KINDS[name].open(setting.path(KINDS[name]))
    for start in range(0, setting.images, setting.batch):
        _reader.batch([key_of(number) for number in range(start, min(start + setting.batch, setting.images))])


def _timed(setting: Setting, seed: tuple[int, int]) -> float:
    """Seconds of a batch of random images."""
    chosen = np.random.default_rng(seed).choice(setting.images, setting.batch)
    keys = [key_of(number) for number in chosen.tolist()]
    started = time.perf_counter()
    _reader.batch(keys)
    return time.perf_counter() - started


def _peak(name: str, setting: Setting) -> int:
    """Anonymous memory that batches add at most to a process that has made none yet, looked at a thousand times a second."""
    reader = KINDS[name].open(setting.path(KINDS[name]))
    before, highest, done = anonymous_bytes(), 0, Event()

    def look() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, anonymous_bytes())

    looking = Thread(target=look)
    looking.start()
    for turn in range(12):
        reader.batch([key_of((turn * setting.batch + n) % setting.images) for n in range(setting.batch)])
    done.set()
    looking.join()
    return highest - before


def check(setting: Setting, name: str) -> None:
    """Every feature of every image, as a batch holds it, against what was written. Raises BadInput at the first difference."""
    reader = KINDS[name].open(setting.path(KINDS[name]))
    made: list[Image] = []
    for image in [*setting.made(), None]:
        if image is not None:
            made.append(image)
        if made and (image is None or len(made) == setting.batch):
            _check_batch(reader.batch([image.key for image in made]), made, reader.first_row, name != "ours_uint8")
            made = []


def _check_batch(batch: Any, made: list[Image], first_row: int, exact: bool) -> None:
    for place, image in enumerate(made):
        if isinstance(batch, Batch):
            start = int(batch.cu_images[place])
            rows = batch.features[start + 1 : start + 1 + len(image.features)].float().numpy()
        else:
            rows = batch[0][place, first_row : first_row + len(image.features)].numpy()
        step = 0.0 if exact else 1.5 * 8 / 255  # half a step of the byte, and bfloat16's own rounding
        if rows.shape != image.features.shape or np.abs(rows - image.features).max() > step:
            raise BadInput(f"image {image.key}", "a batch holds other features than were written")


def _cold(setting: Setting, name: str, batches: int = 8) -> list[float]:
    """Each batch by a new reader of a store whose pages the system has let go. The opening is not timed."""
    kind = KINDS[name]
    seconds = []
    for turn in range(batches):
        keys = [key_of(n % setting.images) for n in range(turn * setting.batch, (turn + 1) * setting.batch)]
        _drop_pages(setting.path(kind))
        reader = kind.open(setting.path(kind))
        started = time.perf_counter()
        reader.batch(keys)
        seconds.append(time.perf_counter() - started)
        del reader
        gc.collect()
    return seconds


def _drop_pages(store: Path) -> None:
    """Ask the system to forget a store that nobody maps."""
    for file in store.rglob("*.mdb"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def summary(setting: Setting, found: dict[str, Measured]) -> dict[str, Any]:
    """The numbers of the JSON file."""
    gigabytes = setting.regions * WIDTH * 2 / 1e9  # of bfloat16 features, an image
    rows = {
        name: {
            "images_per_s": setting.batch / median(m.seconds),
            "gb_per_s": gigabytes * setting.batch / median(m.seconds),
            "cold_images_per_s": setting.batch / median(m.cold_seconds),
            "peak_bytes": m.peak_bytes,
        }
        for name, m in found.items()
    }
    ratio = {name: _ratio(found[name].seconds, found[OURS].seconds) for name in found if name in PEERS}
    return {
        "images_per_s": rows[OURS]["images_per_s"],
        "ratio": ratio,
        "cold_ratio": {name: _ratio(found[name].cold_seconds, found[OURS].cold_seconds) for name in ratio},
        "memcpy_share": _ratio(found[MEMCPY].seconds, found[OURS].seconds),
        "readers": rows,
        "setting": {
            "images": setting.images, "regions": setting.regions, "batch": setting.batch, "rounds": setting.rounds,
            "cores": 1, "store_gb": setting.images * gigabytes,
        },
    }  # fmt: skip


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(a / b for a, b in zip(theirs, ours, strict=True))


def table(result: dict[str, Any]) -> Table:
    """One row a reader."""
    s = result["setting"]
    grid = Table(
        title=f"batches of {s['batch']} images of {s['regions']} x {WIDTH}, one core, {s['store_gb']:.2g} GB store",
        title_justify="left", header_style="bold",
    )  # fmt: skip
    grid.add_column("reader", no_wrap=True)
    for heading in ("images/s", "GB/s", "of memcpy", "images/s, cold", "peak memory of a batch"):
        grid.add_column(heading, justify="right")
    memcpy = result["readers"][MEMCPY]["images_per_s"]
    for name, row in result["readers"].items():
        grid.add_row(
            name, f"{row['images_per_s']:,.0f}", f"{row['gb_per_s']:.2f}", f"{row['images_per_s'] / memcpy:.0%}",
            f"{row['cold_images_per_s']:,.0f}", f"{row['peak_bytes'] / 2**20:,.0f} MiB",
        )  # fmt: skip
    return grid


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 measured, 2 something cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", default=",".join(PEERS), metavar="NAMES", help="default: pickle,uniter")
    parser.add_argument("--images", type=int, default=1000, help="of each store (default: 1000, 0.4 GB in bfloat16)")
    parser.add_argument("--regions", type=int, default=100, help="of each image (default: 100)")
    parser.add_argument("--batch", type=int, default=64, help="images of a batch (default: 64)")
    parser.add_argument("--rounds", type=int, default=36, help="batches a reader (default: 36)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--folder", type=Path, help="where the stores are made and kept (default: temporary)")
    parser.add_argument(
        "--simulate", type=float, metavar="GB", help="also stores up to this size, and what 120,000 images need"
    )
    parser.add_argument(
        "--training", action="store_true", help="also the waiting time of training steps (three minutes)"
    )
    arguments = parser.parse_args(argv)
    say = Console(stderr=True).print
    try:
        names = [OURS, MEMCPY, "ours_float16", "ours_uint8", *_peers(arguments.against)]
        with tempfile.TemporaryDirectory(prefix="stopgo-pipeline-") as temporary:
            folder = arguments.folder or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            result = _run(arguments, folder, names, say)
    except BadInput as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _run(arguments: argparse.Namespace, folder: Path, names: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    console = Console(width=None if sys.stdout.isatty() else 120)
    result: dict[str, Any] = {}
    if arguments.training:  # first: with all threads, before this process keeps to one core
        result["waiting"] = pipeline_training.measure(folder, say)
        console.print(pipeline_training.table(result["waiting"]))
    with _one_core():
        setting = Setting(folder, arguments.images, arguments.regions, arguments.batch, arguments.rounds)
        result = summary(setting, measure(setting, names, say)) | result
        console.print(table(result))
        for name, ratio in result["ratio"].items():
            console.print(f"{ratio:.1f} x {name} warm, {result['cold_ratio'][name]:.1f} x cold")
        if arguments.simulate:
            result["scale"] = pipeline_scale.measure(folder, arguments.simulate, say)
            console.print(pipeline_scale.table(result["scale"]))
            console.print(pipeline_scale.projection(result["images_per_s"]))
    return result | {"conditions": conditions(torch.device("cpu"))}


def _peers(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in PEERS:
            raise BadInput("--against", f"no reader {name!r}", f"there are {', '.join(PEERS)}")
    return names


class _one_core:
    """This thread, and those that it starts, on one core, and torch with one thread."""

    def __enter__(self) -> None:
        self._cores, self._threads = os.sched_getaffinity(0), torch.get_num_threads()
        os.sched_setaffinity(0, {max(self._cores)})
        torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        os.sched_setaffinity(0, self._cores)
        torch.set_num_threads(self._threads)


if __name__ == "__main__":
    sys.exit(main())
