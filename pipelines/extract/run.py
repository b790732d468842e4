"""All images of a source through a detector into a store, in fixed batches, so that a resume makes the same store."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.extract.dali import Say, make_decoder
from pipelines.extract.detectors import BoxDetector, Detector
from pipelines.extract.files import find_images, read_boxes
from pipelines.extract.pixels import BadImage, Decoded, pil_warnings
from pipelines.extractor import Regions
from pipelines.progress import OnProgress
from pipelines.store.writer import StoreWriter

Batch = Sequence[tuple[str, Path]]
"""Image keys and their files."""


@dataclass(frozen=True)
class Options:
    """How to extract; the command's options of the same names say more."""

    dtype: str = "float16"
    boxes: Path | None = None
    batch: int = 8
    resume: bool = False
    skip_bad: int = 0
    decoder: str = "auto"
    device: str = "cpu"
    limit: int | None = None


@dataclass(frozen=True)
class Result:
    """What a finished extraction says."""

    images: int
    regions: int
    skipped: int


def extract(
    source: Path,
    target: Path,
    detector: Detector,
    name: str,
    options: Options,
    on_progress: OnProgress | None = None,
    say: Say = lambda line: None,
) -> Result:
    """Describe every image of `source` (a folder, a list, one image) into a store at `target`.

    `name` says which detector this is, weights included; the store keeps it, and a resume compares it. Batches are the
    same whatever was done before, since a padded batch's features may depend on its other images in their last digits.
    `say` gets a line for what is skipped or falls back. Raises `BadInput`; `target` then does not exist.
    """
    _check(target, detector, name, options)
    boxes = read_boxes(options.boxes) if options.boxes else None
    files = _wanted(find_images(source), boxes, source, options)
    decoder = make_decoder(options.decoder, detector.preprocessing, options.device, options.batch, say)
    if detector.preprocessing is not None:
        name += f" decoder={decoder.name}"  # its resizing shows in the features' last digits
    if options.boxes:
        name += f" boxes={options.boxes.name}"
    skipped = 0
    with StoreWriter(target, detector.feature_dim, options.dtype, name, options.resume) as writer:
        _check_resume(writer, files, source)
        done = frozenset(writer.keys())
        pairs = list(files.items())
        batches = [pairs[start : start + options.batch] for start in range(0, len(pairs), options.batch)]
        behind = sum(len(batch) for batch in batches if _is_done(batch, done))
        if on_progress:
            on_progress(behind / len(files), behind)
        with closing(decoder), pil_warnings():
            for batch, decoded in _ahead(decoder.decode, [batch for batch in batches if not _is_done(batch, done)]):
                skipped = _count_bad(decoded, skipped, options.skip_bad, say)
                good = [
                    (*pair, image) for pair, image in zip(batch, decoded, strict=True) if isinstance(image, Decoded)
                ]
                if any(key not in done for key, _, _ in good):
                    regions = _regions(detector, good, boxes, name)
                    for (key, file, image), found in zip(good, regions, strict=True):
                        if key not in done:
                            _add(writer, file, image, found, detector)
                behind += len(batch)
                if on_progress:
                    on_progress(behind / len(files), behind)
    return Result(writer.images, writer.regions, skipped)


def _check(target: Path, detector: Detector, name: str, options: Options) -> None:
    if target.exists():
        raise BadInput(target, "exists already", "remove it or choose another name")
    for option, value, least in (
        ("--batch", options.batch, 1),
        ("--skip-bad", options.skip_bad, 0),
        ("--limit", options.limit, 1),
    ):
        if value is not None and value < least:
            raise BadInput(option, f"{value} is too small", f"give {least} or more")
    if options.boxes and not isinstance(detector, BoxDetector):
        raise BadInput("--boxes", f"{name} has no method `describe`", "leave it out, or take another detector")


def _wanted(
    files: Mapping[str, Path], boxes: Mapping[str, Float32] | None, source: Path, options: Options
) -> dict[str, Path]:
    """The files that `--boxes` and `--limit` leave. Raises `BadInput` where boxes are of an image that is not there."""
    if boxes is not None:
        absent = [key for key in boxes if key not in files]
        if absent:
            what = f"{len(absent)} of its images are not in {source}, as image {absent[0]}"
            raise BadInput(str(options.boxes), what, "name images that are there")
        files = {key: file for key, file in files.items() if key in boxes}
    return dict(islice(files.items(), options.limit))


def _check_resume(writer: StoreWriter, files: Mapping[str, Path], source: Path) -> None:
    foreign = writer.keys() - files.keys()
    if foreign:
        what = f"{len(foreign)} of its images are not in {source}"
        raise BadInput(writer.partial, what, "resume with the same images and --limit")


def _is_done(batch: Batch, done: frozenset[str]) -> bool:
    return all(key in done for key, _ in batch)


def _ahead(
    decode: Callable[[list[Path]], list[Decoded | BadImage]], batches: Sequence[Batch]
) -> Iterator[tuple[Batch, list[Decoded | BadImage]]]:
    """Each batch with its images, the next one being decoded while the detector looks at this one."""
    waiting: deque[tuple[Batch, Future[list[Decoded | BadImage]]]] = deque()
    with ThreadPoolExecutor(1, "ahead") as pool:
        for batch in batches:
            waiting.append((batch, pool.submit(decode, [file for _, file in batch])))
            if len(waiting) > 1:
                first, images = waiting.popleft()
                yield first, images.result()
        for batch, images in waiting:
            yield batch, images.result()


def _count_bad(decoded: Sequence[Decoded | BadImage], skipped: int, allowed: int, say: Say) -> int:
    """How many images have been skipped with these. Raises the error of the first one beyond what is allowed."""
    for image in decoded:
        if isinstance(image, BadImage):
            skipped += 1
            if skipped > allowed:
                hint = f"{image.mend}; --skip-bad {allowed} allows for {allowed or 'none'}, then --resume"
                raise BadInput(image.where, image.what, hint) from image
            say(f"skipped: {image}")
    return skipped


def _regions(
    detector: Detector,
    images: Sequence[tuple[str, Path, Decoded]],
    boxes: Mapping[str, Float32] | None,
    name: str,
) -> list[Regions]:
    pixels = [image.image for _, _, image in images]
    sizes = [(image.width, image.height) for _, _, image in images]
    if boxes is None:
        regions = detector.detect(pixels, sizes)
    else:
        assert isinstance(detector, BoxDetector)
        regions = detector.describe(pixels, sizes, [boxes[key] for key, _, _ in images])
    if len(regions) != len(images):
        raise BadInput(name, f"gave regions of {len(regions)} images for a batch of {len(images)}", "one entry each")
    return regions


def _add(writer: StoreWriter, file: Path, image: Decoded, regions: Regions, detector: Detector) -> None:
    probs = regions.class_probs if detector.classes else None
    if probs is not None and probs.shape[1:] != (detector.classes,):
        what = f"class_probs of shape {list(probs.shape)}, expected [n, {detector.classes}]"
        raise BadInput(str(file), what, "the detector's `classes` says how many")
    size = (image.width, image.height)
    writer.add(file.name, regions.features, regions.boxes, *size, probs, where=str(file))
