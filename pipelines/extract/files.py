"""Which image files there are: a folder or a list, every image once, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.files import kind_name, lines, open_json
from pipelines.identity import image_key

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
"""What counts as an image in a folder, in any case. What a file really holds is told by its content."""


def find_images(source: Path) -> dict[str, Path]:
    """Image key -> file, in a fixed order: a folder is searched through and sorted, a list keeps its order.

    A list is a text file with one path a line, relative to the list's folder; empty lines are skipped. An image file
    is itself. Raises `BadInput` where there is none, where a listed file is missing, and where two files have one key.
    """
    if source.is_dir():
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        if not found:
            raise BadInput(source, f"no image in this folder or below it ({', '.join(SUFFIXES)})")
        return _by_key((str(path), path) for path in found)
    if not source.is_file():
        raise BadInput(source, "no such file or folder")
    if source.suffix.lower() in SUFFIXES:
        return _by_key([(str(source), source)])
    return _by_key(_listed(source))


def _listed(path: Path) -> list[tuple[str, Path]]:
    found = []
    for number, line in lines(path):
        if line.strip():
            file = path.parent / line.strip()
            if not file.is_file():
                raise BadInput(f"{path}:{number}", f"no file {file}", "paths are relative to the list's folder")
            found.append((f"{path}:{number}", file))
    if not found:
        raise BadInput(path, "an empty list", "one image file a line")
    return found


def _by_key(found: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for where, path in found:
        try:
            key = image_key(path.name)
        except BadInput as error:
            raise BadInput(where, error.what, error.mend) from error
        if key in files:
            what = f"{files[key]} and {path} are both image {key}"
            raise BadInput(where, what, "each image once; extract the folders into stores of their own")
        files[key] = path
    return files


def read_boxes(path: Path) -> dict[str, Float32]:
    """Image key -> boxes, float32 [n, 4], of a JSON object {image name: [[x1, y1, x2, y2], ...]} in pixels."""
    content = open_json(path)
    if not isinstance(content, dict):
        raise BadInput(path, f"a JSON object {{image name: boxes}} is expected, not {kind_name(content)}")
    boxes: dict[str, Float32] = {}
    for name, rows in content.items():
        where = f"{path}: {name}"
        key = image_key(name)
        if key in boxes:
            raise BadInput(where, f"a second entry of image {key}")
        try:
            boxes[key] = np.array(rows, dtype=np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise BadInput(where, f"no boxes ({error})", "[[x1, y1, x2, y2], ...]") from error
        if boxes[key].ndim != 2 or boxes[key].shape[1] != 4 or not len(boxes[key]):
            raise BadInput(where, f"boxes of shape {list(boxes[key].shape)}", "[[x1, y1, x2, y2], ...], one or more")
        if not np.isfinite(boxes[key]).all():
            raise BadInput(where, "a box is infinite or undefined")
    if not boxes:
        raise BadInput(path, "no image in it")
    return boxes
