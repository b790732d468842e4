"""`python -m pipelines.convert FORMAT SRC DST`: published region features -> one feature store."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import numpy as np

from pipelines.convert import butd_tsv, npz, store, uniter_lmdb, vilbert_lmdb, vinvl_pt
from pipelines.convert.guess import guess
from pipelines.convert.source import Sizes, SourceImage, read_sizes
from pipelines.errors import BadInput
from pipelines.identity import image_key
from pipelines.progress import OnProgress, images_on_stderr
from pipelines.store.record import DTYPES
from pipelines.store.writer import StoreWriter

FORMATS: dict[str, Callable[[Path, Sizes | None], Iterator[SourceImage]]] = {
    "butd-tsv": butd_tsv.images,
    "vinvl-pt": vinvl_pt.images,
    "npz": npz.images,
    "vilbert-lmdb": vilbert_lmdb.images,
    "uniter-lmdb": uniter_lmdb.images,
    "store": store.images,
}
_NEED_SIZES = ("npz", "uniter-lmdb")

_DESCRIPTION = """\
Convert published region features into a feature store (LMDB, msgpack records, checksummed).

FORMAT
  butd-tsv      bottom-up attention, tab-separated with base64 columns: 6 columns (Anderson et al.) or 10 (LXMERT)
  vinvl-pt      one .pt per image: bbox_features, bbox_coords, bbox_probas, width, height
  npz           one .npz per image: features|x, boxes|bbox (or norm_bb), image_width|image_w|..., class_probs
  vilbert-lmdb  the LMDBs of the 12-in-1 authors: pickled dictionaries, read through an allow-list
  uniter-lmdb   UNITER's LMDBs: msgpack or npz values; needs --sizes
  store         a store made by this command, to be kept in another --dtype

--dtype uint8 keeps a byte a value and a scale a region, for features of at least 0: half of float16's size, an error of up to
half a step of 1/255 of the region's largest value.
"""
_EPILOG = """\
Images are keyed by one rule for all formats: COCO_train2014_000000131486.jpg, 131486 and
coco_train2014_000000131486.npz are all image 131486; n161313 and dev-850-0-img0 stay as they are.
While it runs, records lie in DST.partial; DST appears when it is whole. After an interruption, --resume goes on.
Exit codes: 0 done, 2 the input cannot be used (one line says why), 130 interrupted.
"""


def convert(
    source_format: str,
    source: Path,
    target: Path,
    dtype: str = "float16",
    sizes: Path | None = None,
    resume: bool = False,
    limit: int | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[int, int]:
    """Convert `source` (a file, or a folder searched through) into a store at `target`; returns images and regions.

    `sizes`: JSON file {name: [width, height]} for formats without image sizes. `limit`: only the first images.
    `on_progress(share, images)` is called per image. Raises `BadInput`; `target` then does not exist.
    """
    if sizes is not None and source_format not in _NEED_SIZES:
        raise BadInput("--sizes", f"{source_format} holds the image sizes itself", "leave it out")
    if limit is not None and limit < 1:
        raise BadInput("--limit", f"{limit} images are none", "give 1 or more")
    if target.exists():
        raise BadInput(target, "exists already", "remove it or choose another name")
    given_sizes = read_sizes(sizes) if sizes else None
    try:
        found = islice(FORMATS[source_format](source, given_sizes), limit)
        first = next(found, None)
        if first is None:
            raise BadInput(source, "no image in it", "is it the right FORMAT?")
        shape = np.shape(first.load().features)
    except BadInput as error:
        other = guess(source)
        if other is None or other == source_format:
            raise
        mend = f"this looks like FORMAT {other}, not {source_format}"
        raise BadInput(error.where, error.what, mend) from error
    if len(shape) != 2:
        raise BadInput(first.where, f"features of shape {list(shape)}, expected [n, feature_dim]")
    with StoreWriter(target, shape[1], dtype, f"{source_format} {source.name}", resume) as writer:
        done = writer.keys()
        seen: set[str] = set()
        for image in chain([first], found):
            key = image_key(image.name)
            if key in seen:
                raise BadInput(image.where, f"a second image {key}", "each image once; convert the sources apart")
            seen.add(key)
            if key not in done:
                regions = image.load()
                writer.add(
                    image.name,
                    regions.features,
                    regions.boxes,
                    regions.width,
                    regions.height,
                    regions.class_probs,
                    where=image.where,
                    mean=regions.mean,
                )
            if on_progress:
                on_progress(image.progress, len(seen))
        foreign = done - seen
        if foreign:
            what = f"{len(foreign)} of its images are not in {source}"
            raise BadInput(writer.partial, what, "resume with the same source and --limit")
    return writer.images, writer.regions


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", metavar="FORMAT", choices=FORMATS, help="see above")
    parser.add_argument("source", metavar="SRC", type=Path, help="a file, or a folder that is searched through")
    parser.add_argument("target", metavar="DST", type=Path, help="the store to make, a folder that does not exist yet")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="how features are stored (default: float16)")
    parser.add_argument(
        "--sizes", type=Path, metavar="FILE", help="JSON {name: [width, height]}, for formats without image sizes"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted conversion")
    parser.add_argument("--limit", type=int, metavar="N", help="convert the first N images only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, convert, and say what was written. Returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        with images_on_stderr() as on_progress:
            images, regions = convert(
                options.format,
                options.source,
                options.target,
                options.dtype,
                options.sizes,
                options.resume,
                options.limit,
                on_progress,
            )
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: --resume goes on from here", file=sys.stderr)
        return 130
    gigabytes = (options.target / "data.mdb").stat().st_size / 1e9
    print(f"wrote {images} images, {regions} regions to {options.target} ({options.dtype}, {gigabytes:.3g} GB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
