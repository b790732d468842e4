"""`python -m bench.images`: images/s of decoding by DALI and by PIL, alone and with a detector's resizing, in turns.

Made-up photographs (colours, edges, noise) of 640 x 480, JPEG quality 90, about 100 KB each, from the page cache; as many
threads as this process may use. Every decoder gives the same pixels (tests/pipelines/test_extract_pixels.py).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.extract.dali import make_decoder
from pipelines.extract.detectors import Preprocessing
from pipelines.extract.pixels import PlainDecoder, pil_warnings
from tests.pipelines.photos import write_photos

RULES: dict[str, Preprocessing | None] = {
    "decode": None,
    "decode, resize to 1067 x 800, normalise": Preprocessing(
        800, 1333, (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    ),
}


def measure(decoder: PlainDecoder, files: Sequence[Path], batch: int) -> tuple[float, float]:
    """Images/s of one pass, and milliseconds of CPU time per image, which a busy machine disturbs less."""
    start, cpu = time.perf_counter(), time.process_time()
    for first in range(0, len(files), batch):
        decoder.decode(list(files[first : first + batch]))
    return len(files) / (time.perf_counter() - start), (time.process_time() - cpu) / len(files) * 1e3


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table; exit code 2 where a decoder is missing."""
    parser = argparse.ArgumentParser(prog="python -m bench.images", description=__doc__)
    parser.add_argument("--decoders", default="pil,dali", help="which, with commas (default: pil,dali)")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the rounds' numbers here")
    given = parser.parse_args(arguments)
    rows = {}
    with tempfile.TemporaryDirectory() as folder, pil_warnings():
        files = sorted(write_photos(Path(folder) / "images", given.images, 640, 480).iterdir())
        for what, rule in RULES.items():
            try:
                decoders = [make_decoder(name, rule, "cpu", given.batch, print) for name in given.decoders.split(",")]
            except BadInput as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            rates: dict[str, list[tuple[float, float]]] = {decoder.name: [] for decoder in decoders}
            for decoder in decoders:
                measure(decoder, files[: 2 * given.batch], given.batch)  # warm
            for number in range(given.rounds):
                for decoder in decoders if number % 2 else decoders[::-1]:
                    rates[decoder.name].append(measure(decoder, files, given.batch))
            rows[what] = rates
            for name, values in rates.items():
                rate, cpu = (statistics.median(column) for column in zip(*values, strict=True))
                spread = f"{min(values)[0]:.0f} to {max(values)[0]:.0f}"
                print(f"{what:<42}{name:<6}{rate:6.0f} images/s ({spread}), {cpu:5.2f} ms of CPU time each")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
