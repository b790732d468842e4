"""Captions of COCO and Flickr30k, for retrieval: the authors' JSON lines and COCO's official file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.errors import BadInput
from pipelines.examples import Example, Matching
from pipelines.files import open_json, open_text
from pipelines.identity import image_key
from pipelines.readers.records import line_records, record_of
from pipelines.readers.splits import image_list


def read(*, captions: Sequence[Path], images: Path | None = None) -> Iterator[Example]:
    """One example per caption, id `<image>/<number>`.

    `captions`: JSON lines of {sentences: [...], id, img_path} (told by the suffix: `.jsonl`, `.jsonline`), where the
    file name identifies the image and `id` may be a mere row number, or `captions_*.json` with its `annotations`.
    `images`: a list of names, one a line (Karpathy's lists); only their captions are kept, and each must have some.
    Raises `BadInput` naming file, record and key.
    """
    every = (example for path in captions for example in _file(path))
    if images is None:
        yield from every
        return
    missing = dict.fromkeys(image_list(images))
    wanted = frozenset(missing)
    for example in every:
        if example.images[0] in wanted:
            missing.pop(example.images[0], None)
            yield example
    if missing:
        raise BadInput(images, f"{len(missing)} images have no caption, the first is {next(iter(missing))}")


def _file(path: Path) -> Iterator[Example]:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return _json_lines(path) if suffix in (".jsonl", ".jsonline") else _coco(path)


def _json_lines(path: Path) -> Iterator[Example]:
    for record in line_records([path]):
        image = image_key(record.name("img_path", "id"))
        for number, sentence in enumerate(record.texts("sentences", "captions")):
            yield Example(f"{image}/{number}", sentence, (image,), Matching())


def _coco(path: Path) -> Iterator[Example]:
    for record in record_of(open_json(path), path).records("annotations"):
        image = image_key(record.name("image_id"))
        yield Example(f"{image}/{record.name('id')}", record.text("caption"), (image,), Matching())


def read_parallel(*, captions: Sequence[Path], images: Path) -> Iterator[Example]:
    """Multi30k's form: line i of every file of `captions` describes the image on line i of `images`.

    One example per caption, id `<image>/<file>`. Raises `BadInput` where the files differ in length.
    """
    keys = image_list(images)
    for column, path in enumerate(captions):
        with open_text(path) as text:
            sentences = [line.rstrip("\n") for line in text]
        if len(sentences) != len(keys):
            raise BadInput(path, f"{len(sentences)} captions for the {len(keys)} images of {images}")
        for image, sentence in zip(keys, sentences, strict=True):
            yield Example(f"{image}/{column}", sentence, (image,), Matching())
