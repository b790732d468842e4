"""`python -m bench.mining`: time and peak memory of `python -m pipelines.mine` at the size of Flickr30k.

29,000 images of 20 regions of 2048 values (made up, around 500 scenes), 145,000 captions of a Zipf vocabulary, or real
ones: --captions names a folder with Multi30k's train.{1..5}.en.gz and train_images.txt, --vocabulary BERT's. The command
runs as users run it, in a process of its own, checksums, reading and writing included; memory is the peak resident set,
mapped files among it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from bench.timing import conditions
from pipelines.mine.job import METHODS
from pipelines.readers.splits import image_list
from pipelines.store.writer import StoreWriter
from pipelines.wordpiece import SPECIAL

CAPTIONS, REGIONS, FEATURES, SCENES, WORDS = 5, 20, 2048, 500, 8000
NAME = "captions"
_NOISES = 997

ROW = {
    "title": "Captions", "number": 8, "group": "G2", "head": "match", "reader": "pipelines.readers.captions:read_parallel",
    "batch": 128, "lr": 2.0e-5, "max_tokens": 30, "max_regions": 101, "loss": "options", "metric": "option_accuracy",
}  # fmt: skip


def write_store(path: Path, images: Sequence[str], regions: int) -> None:
    """Features that are not negative, as those of a detector, alike within a scene."""
    random = np.random.default_rng(0)
    scenes = random.gamma(0.3, 1.5, (SCENES, FEATURES)).astype(np.float32)
    noises = random.normal(0, 0.5, (_NOISES, FEATURES)).astype(np.float32)
    boxes = np.tile(np.array([0, 0, 100, 100], np.float32), (regions, 1))
    with StoreWriter(path, FEATURES, "float16", "made up") as writer:
        for image in images:
            drawn = noises[random.integers(0, _NOISES, regions)] + noises[random.integers(0, _NOISES)]
            writer.add(image, np.maximum(scenes[random.integers(0, SCENES)] + drawn, 0), boxes, 640, 480)


def write_captions(folder: Path, images: int) -> None:
    """Files in Multi30k's form, and their vocabulary."""
    random = np.random.default_rng(1)
    words = [f"w{number}" for number in range(WORDS)]
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *words]) + "\n")
    (folder / "train_images.txt").write_text("".join(f"{number}\n" for number in range(images)))
    share = 1 / (np.arange(WORDS) + 2.7)
    for column in range(1, CAPTIONS + 1):
        lengths = np.maximum(4, random.normal(12.5, 4, images).astype(int))
        drawn: NDArray[np.int64] = random.choice(WORDS, lengths.sum(), p=share / share.sum())
        parts = np.split(drawn, np.cumsum(lengths)[:-1])
        (folder / f"train.{column}.en.gz").write_text("".join(" ".join(f"w{w}" for w in part) + "\n" for part in parts))


def write_sheet(folder: Path, captions: Path, vocabulary: Path) -> None:
    """A data sheet and a task table of one set."""
    files = [str(captions / f"train.{column}.en.gz") for column in range(1, CAPTIONS + 1)]
    split = {"captions": files, "images": str(captions / "train_images.txt")}
    entry = {"features": "features.lmdb", "train": split, "val": split}
    sheet = {"format": 1, "vocabulary": str(vocabulary), "sets": {NAME: entry}}
    (folder / "sheet.yaml").write_text(yaml.safe_dump(sheet))
    rows = {"heads": {"match": {"kind": "match", "options": 4}}, "tasks": {NAME: ROW}}
    (folder / "rows.yaml").write_text(yaml.safe_dump(rows))


def measure(folder: Path, by: str, memory: float) -> dict[str, object]:
    """Run the command once: seconds, and the peak resident set in GB."""
    command = [sys.executable, "-m", "pipelines.mine", str(folder / "sheet.yaml"), "--by", by, "--memory", str(memory)]
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--tasks-table", str(folder / "rows.yaml")])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    seconds = time.perf_counter() - start
    return {"by": by, "memory_gb": memory, "seconds": round(seconds, 1), "peak_rss_gb": round(usage.ru_maxrss / 1e6, 3)}


def main(argv: Sequence[str] | None = None) -> int:
    """Build what is to be mined, mine it, print one line of JSON for each way."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.mining", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=29_000, help="default: 29000; made-up captions only")
    parser.add_argument("--regions", type=int, default=REGIONS, help=f"of each image; default: {REGIONS}")
    parser.add_argument("--by", nargs="+", choices=METHODS, default=list(METHODS), help="default: both")
    parser.add_argument("--memory", type=float, default=1.0, metavar="GB", help="what the command is given; default: 1")
    parser.add_argument("--captions", type=Path, metavar="DIR", help="real captions, in Multi30k's form")
    parser.add_argument("--vocabulary", type=Path, metavar="FILE", help="for real captions")
    options = parser.parse_args(argv)
    if (options.captions is None) != (options.vocabulary is None):
        parser.error("--captions and --vocabulary belong together")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        captions, vocabulary = options.captions, options.vocabulary
        if captions is None:
            write_captions(folder, options.images)
            captions, vocabulary = folder, folder / "vocab.txt"
        write_store(folder / "features.lmdb", image_list(captions / "train_images.txt"), options.regions)
        write_sheet(folder, captions.resolve(), vocabulary.resolve())
        for by in options.by:
            print(
                json.dumps({**measure(folder, by, options.memory), "conditions": conditions(torch.device("cpu"))}),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
