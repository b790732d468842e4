"""`python -m pipelines.extract IMAGES DST`: images -> region features in a store, by a detector."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.errors import BadInput
from pipelines.extract.dali import DECODERS
from pipelines.extract.detectors import DETECTORS, load_detector
from pipelines.extract.run import Options, extract
from pipelines.progress import images_on_stderr
from pipelines.store.record import DTYPES

_DESCRIPTION = """\
Extract region features from images into a feature store (LMDB, msgpack records, checksummed).

IMAGES is a folder that is searched through (jpg, png, webp, bmp, tiff, gif), a text file with one path a line, or one
image. Images are keyed as everywhere: COCO_train2014_000000131486.jpg is image 131486. Two files of one key are refused.

DETECTOR
  world           the embedded world's fixed extractor: 128 features, for that world's pictures only
  torchvision     Faster R-CNN ResNet-50 FPN, 1024 features, 10 to 100 regions; needs torchvision and --weights
  module:factory  your own: factory(weights, device) returns a pipelines.extract.detectors.Detector
"""
_EPILOG = """\
While it runs, records lie in DST.partial; DST appears when it is whole. After an interruption, --resume with the same
arguments goes on and makes the store that an undisturbed run would have made.
An image that does not decode ends the run, unless --skip-bad allows for it; each skipped one is named.
Exit codes: 0 done, 2 the input cannot be used (one line says why), 130 interrupted.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.extract",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", metavar="IMAGES", type=Path, help="a folder, a list of files, or one image")
    add("target", metavar="DST", type=Path, help="the store to make, a folder that does not exist yet")
    add("--detector", metavar="DETECTOR", help=f"{', '.join(DETECTORS)}, or module:factory (default: world)")
    add("--weights", type=Path, metavar="FILE", help="the detector's weights; nothing is fetched")
    add("--boxes", type=Path, metavar="FILE",
        help="describe these boxes instead of detecting: JSON {image name: [[x1, y1, x2, y2], ...]} in pixels; "
        "only images that it names")  # fmt: skip
    add("--dtype", choices=DTYPES, default="float16", help="how features are stored (default: float16)")
    add("--batch", type=int, default=8, metavar="N", help="images a time (default: 8)")
    add("--resume", action="store_true", help="go on with an interrupted extraction")
    add(
        "--skip-bad", type=int, default=0, metavar="N", help="go on past up to N images that do not decode (default: 0)"
    )
    add(
        "--decoder",
        choices=DECODERS,
        default="auto",
        help="auto: DALI where it is installed and faster, else PIL (default: auto)",
    )
    add("--device", choices=("cpu", "cuda"), help="where the detector runs (default: cuda where there is one)")
    add("--limit", type=int, metavar="N", help="the first N images only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, extract, and say what was written. Returns the exit code."""
    given = _parser().parse_args(arguments)
    if given.detector is None:
        given.detector = "world"
        _say(
            "--detector world, the default: it knows the embedded world's things, its features of photographs mean nothing"
        )
    try:
        device = _device(given.device)
        detector = load_detector(given.detector, given.weights, device)
        options = Options(
            given.dtype, given.boxes, given.batch, given.resume, given.skip_bad, given.decoder, device, given.limit
        )
        with images_on_stderr() as on_progress:
            name = _name(given.detector, given.weights)
            result = extract(given.images, given.target, detector, name, options, on_progress, _say)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from here", file=sys.stderr)
        return 130
    gigabytes = (given.target / "data.mdb").stat().st_size / 1e9
    print(
        f"wrote {result.images} images, {result.regions} regions to {given.target} "
        f"({given.dtype}, {gigabytes:.3g} GB), skipped {result.skipped}"
    )
    return 0


def _device(given: str | None) -> str:
    if given == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda", "torch finds no GPU here", "leave it out, or --device cpu")
    return given or ("cuda" if torch.cuda.is_available() else "cpu")


def _name(detector: str, weights: Path | None) -> str:
    """What the store says about where its features come from: enough to tell two detectors apart."""
    if weights is None:
        return f"pipelines.extract {detector}"
    if not weights.is_file():  # a detector of the user's may want a folder
        return f"pipelines.extract {detector} {weights.name}"
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"pipelines.extract {detector} {weights.name} sha256={digest[:16]}"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
