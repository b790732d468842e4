"""Result files: what test servers take, in their forms; JSON lines for data sets that have no server.

VQA     JSON, a list of {"question_id": int, "answer": str}
GQA     JSON, a list of {"questionId": str, "prediction": str}
NLVR2   CSV without a header, identifier,True or False, as its authors' script reads it
others  one JSON object a line, in the split's order, the example's id first
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.datasets import TaskData
from pipelines.errors import BadInput

Row = dict[str, Any]


@dataclass(frozen=True)
class File:
    """A file without a name."""

    suffix: str
    content: bytes


def vqa(data: TaskData, words: Sequence[str]) -> File:
    """Raises BadInput for a question whose id is no number: the server knows no other."""
    ids: list[str] = data.ids.tolist()
    strange = [id for id in ids if not (id.isascii() and id.isdigit())]
    if strange:
        where = f"task {data.spec.name}, {data.split}: question {strange[0]}"
        raise BadInput(where, "VQA's question ids are whole numbers", "evaluation: answers fits data of another form")
    return _json([{"question_id": int(id), "answer": word} for id, word in zip(ids, words, strict=True)])


def gqa(data: TaskData, words: Sequence[str]) -> File:
    return _json([{"questionId": id, "prediction": word} for id, word in zip(data.ids.tolist(), words, strict=True)])


def nlvr2(data: TaskData, chosen: NDArray[np.int64]) -> File:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows((id, str(bool(label))) for id, label in zip(data.ids.tolist(), chosen.tolist(), strict=True))
    return File("csv", text.getvalue().encode())


def lines(rows: Iterable[Row]) -> File:
    """One JSON object a line."""
    return File("jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def answer_rows(data: TaskData, words: Sequence[str]) -> Iterator[Row]:
    """{id, answer}."""
    for id, word in zip(data.ids.tolist(), words, strict=True):
        yield {"id": id, "answer": word}


def class_rows(data: TaskData, chosen: NDArray[np.int64]) -> Iterator[Row]:
    """{id, class: number}."""
    for id, label in zip(data.ids.tolist(), chosen.tolist(), strict=True):
        yield {"id": id, "class": label}


def retrieval_rows(data: TaskData, listed: NDArray[np.int64], ranks: NDArray[np.int64]) -> Iterator[Row]:
    """{id of the caption, image: the right one, rank of it from 1, images: the best ones, best first}; by their keys."""
    assert data.pool is not None
    stored = data.store.keys()
    keys = [stored[row] for row in data.pool.images]
    columns = (data.ids.tolist(), data.pool.position.tolist(), ranks.tolist(), listed.tolist())
    for id, right, rank, images in zip(*columns, strict=True):
        yield {"id": id, "image": keys[right], "rank": rank + 1, "images": [keys[image] for image in images]}


def region_rows(
    data: TaskData, chosen: NDArray[np.int64], boxes: NDArray[np.float32], iou: NDArray[np.float32] | None
) -> Iterator[Row]:
    """{id, image, region: row of the image (0 is the whole of it, 1 the first detected), box: x1, y1, x2, y2 in pixels}, and
    its IoU with a right box where that is known."""
    keys = data.store.keys()
    columns = (data.ids.tolist(), data.image_rows[:, 0].tolist(), chosen.tolist(), boxes.tolist())
    for place, (id, image, region, box) in enumerate(zip(*columns, strict=True)):
        row = {"id": id, "image": keys[image], "region": region, "box": [round(side, 2) for side in box]}
        yield row if iou is None else {**row, "iou": round(float(iou[place]), 4)}


def choice_rows(data: TaskData, chosen: NDArray[np.int64], candidates: NDArray[np.int32]) -> Iterator[Row]:
    """{id, image, option: place among the example's options, box: place among the image's annotated boxes, in ascending id}."""
    keys = data.store.keys()
    columns = (data.ids.tolist(), data.image_rows[:, 0].tolist(), chosen.tolist(), candidates.tolist())
    for id, image, option, box in zip(*columns, strict=True):
        yield {"id": id, "image": keys[image], "option": option, "box": box}


def _json(rows: list[Row]) -> File:
    return File("json", json.dumps(rows, ensure_ascii=False).encode())
