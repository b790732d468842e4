"""Box geometry, on whole arrays. Boxes are x1, y1, x2, y2 in pixels unless a name says otherwise."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float32 = NDArray[np.float32]


def xywh_to_xyxy(boxes: ArrayLike) -> Float32:
    """[n, 4] x, y, width, height -> float32 [n, 4] x1, y1, x2, y2 (no pixel is added: spec section 2)."""
    xywh = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)


def iou_inclusive(a: ArrayLike, b: ArrayLike) -> Float32:
    """Intersection over union of every box of `a` [n, 4] with every box of `b` [m, 4] -> float32 [n, m].

    The published inclusive-pixel convention (spec section 2): widths and heights count both end pixels (+1), and the
    intersection is clipped at 0. Computed in float64. A box whose area is 0 or less overlaps nothing.
    """
    first = np.asarray(a, dtype=np.float64).reshape(-1, 1, 4)
    second = np.asarray(b, dtype=np.float64).reshape(1, -1, 4)
    size = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2]) + 1
    shared = np.clip(size, 0, None).prod(axis=-1)
    union = _area_inclusive(first) + _area_inclusive(second) - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=(shared > 0) & (union > 0))
    return np.asarray(iou, dtype=np.float32)


def paired_iou(a: Float32, b: Float32) -> Float32:
    """IoU of box i of `a` [n, 4] with box i of `b` [n, 4], float32 [n], by the convention of `iou_inclusive`."""
    first, second = a.astype(np.float64), b.astype(np.float64)
    size = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2]) + 1
    shared = np.clip(size, 0, None).prod(axis=1)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2] + 1, 0, None).prod(axis=1) for boxes in (first, second)]
    union = areas[0] + areas[1] - shared
    iou = np.divide(shared, union, out=np.zeros_like(shared), where=(shared > 0) & (union > 0))
    return iou.astype(np.float32)


def _area_inclusive(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    sides = np.clip(boxes[..., 2:] - boxes[..., :2] + 1, 0, None)
    return np.asarray(sides[..., 0] * sides[..., 1])


def locations(boxes: ArrayLike, width: ArrayLike, height: ArrayLike) -> Float32:
    """The five numbers that the model reads of a region (spec section 1.2) -> float32 [n, 5].

    x1/w, y1/h, x2/w, y2/h and the area fraction (x2 - x1)(y2 - y1) / (w h), without +1. `width` and `height` of the
    image are scalars, or [n] where the rows belong to several images. The box of the whole image, 0, 0, w, h, gives
    the global row 0, 0, 1, 1, 1.
    """
    xyxy = np.asarray(boxes, dtype=np.float32).reshape(-1, 4)
    found = np.empty((len(xyxy), 5), np.float32)
    left, top, right, bottom, area = found.T
    np.divide(xyxy[:, ::2], np.asarray(width, np.float32).reshape(-1, 1), out=found[:, 0:4:2])
    np.divide(xyxy[:, 1::2], np.asarray(height, np.float32).reshape(-1, 1), out=found[:, 1:4:2])
    np.multiply(right - left, bottom - top, out=area)
    return found
