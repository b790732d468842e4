"""butd-tsv: bottom-up attention features as tab-separated text with base64 columns.

6 columns (peteanderson80/bottom-up-attention): image_id, image_w, image_h, num_boxes, boxes, features
10 columns (LXMERT, py-bottom-up-attention):   img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf,
                                               num_boxes, boxes, features
Note the swapped width and height. No header line; boxes are float32 [n, 4] x1, y1, x2, y2 in pixels.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from pipelines.boxes import Float32
from pipelines.convert.source import Regions, Sizes, SourceImage, find_files
from pipelines.errors import BadInput

_FILES = ("*.tsv",)
_TRUNCATED = "truncated or damaged? fetch it again"


def images(source: Path, sizes: Sizes | None) -> Iterator[SourceImage]:
    """Every image of every TSV file."""
    del sizes  # the columns hold them
    files = find_files(source, _FILES)
    total = sum(file.stat().st_size for file in files)
    before = 0
    for file in files:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}:{number}"
                columns = line.rstrip(b"\r\n").split(b"\t")
                if len(columns) not in (6, 10):
                    raise BadInput(where, f"{len(columns)} columns, expected 6 or 10", _TRUNCATED)
                name = columns[0].decode("utf-8", "replace")
                yield SourceImage(name, where, before / total, partial(_regions, columns, where))
                before += len(line)


def _regions(columns: list[bytes], where: str) -> Regions:
    first, second, count, boxes, features = (columns[index] for index in (1, 2, -3, -2, -1))
    width, height = (first, second) if len(columns) == 6 else (second, first)
    try:
        num_boxes = int(count)
        return Regions(_rows(features, num_boxes), _rows(boxes, num_boxes), int(width), int(height))
    except (ValueError, binascii.Error) as error:
        raise BadInput(where, str(error), _TRUNCATED) from error


def _rows(encoded: bytes, rows: int) -> Float32:
    values = np.frombuffer(base64.b64decode(encoded, validate=True), dtype="<f4")
    if rows < 1 or len(values) % rows:
        raise ValueError(f"{len(values)} values do not make {rows} rows")
    return values.reshape(rows, -1)
