"""Annotated boxes (Visual7W, GuessWhat): the boxes of the annotation and of their feature store must be the same."""

from __future__ import annotations

import numpy as np

from pipelines.boxes import Float32, paired_iou, xywh_to_xyxy
from pipelines.errors import BadInput
from pipelines.examples import Choice, Example
from pipelines.store.reader import FeatureStore


def tie(example: Example, store: FeatureStore, max_regions: int, where: str) -> tuple[str, int]:
    """The image of an example with a `Choice` target, and its row in the store of annotated boxes.

    Raises BadInput if the image is not there, if its boxes are others, and if they would not all enter a batch: an
    answer must not be cut off (spec section 7.1).
    """
    target, image = example.target, example.images[0]
    assert isinstance(target, Choice)
    where = f"{where}: example {example.id}"
    if image not in store:
        raise BadInput(
            where, f"no annotated boxes of image {image!r} in {store.path}", "convert or extract this image's boxes"
        )
    boxes = np.array(target.candidates, np.float32).reshape(-1, 4)
    if len(boxes) > max_regions - 1:
        raise BadInput(
            where,
            f"{len(boxes)} annotated boxes do not fit max_regions {max_regions}",
            "raise max_regions: an answer must not be cut off",
        )
    _compare(boxes, store, image, where)
    return image, int(store.index([image])[0])


def _compare(boxes: Float32, store: FeatureStore, image: str, where: str) -> None:
    """The published documentation says x, y, width, height where the code means corners (spec section 5.1): a store
    made by the documentation is named as what it is."""
    stored = store.record(image).boxes
    if _agree(stored, boxes):
        return
    if len(stored) == len(boxes) and _agree(xywh_to_xyxy(stored), boxes):
        raise BadInput(
            f"{store.path}: image {image}",
            "its boxes are x, y, width, height, not corners",
            "turn the annotated boxes into x1, y1, x2, y2 and extract their features again",
        )
    raise BadInput(
        where,
        f"its {len(boxes)} annotated boxes are not the {len(stored)} of image {image!r} in {store.path}",
        "extract the features of these annotations' boxes, in ascending box id",
    )


def _agree(stored: Float32, boxes: Float32) -> bool:
    """Every box within a pixel, or at IoU > 0.9."""
    if stored.shape != boxes.shape:
        return False
    near = np.abs(stored - boxes).max(axis=1) <= 1
    return bool(np.all(near | (paired_iou(stored, boxes) > 0.9)))
