"""The embedded world's region extractor: fixed code from pixels to boxes, features and class distributions.

It stands where a trained detector stands for photographs, and keeps to the same interface, so another detector can take
its place: `extract` proposes regions, `extract_boxes` describes given ones. It sees pixels only, never a scene.

Things lie apart on a smooth background. A region is a connected patch of pixels that differ from the background; its
descriptor holds colours, silhouette, texture and size. A fixed random projection with ReLU mixes these, so that no
single column names an attribute and values are non-negative and O(1), as a detector's are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Floats = NDArray[np.float32]

FEATURE_DIM = 128
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (214, 30, 40),
    "orange": (250, 140, 10),
    "yellow": (245, 225, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "purple": (150, 50, 190),
    "brown": (120, 72, 32),
    "black": (30, 30, 34),
}
"""The colours that the extractor knows, RGB."""
PATTERN_WHITE = (252, 252, 250)
"""Stripes and dots are drawn in this."""

_STAR = [(np.sin(k * np.pi / 5), -np.cos(k * np.pi / 5)) for k in range(10)]
OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 48, endpoint=False)],
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -0.95), (1.0, 0.85), (-1.0, 0.85)],
    "star": [(x, y) if k % 2 == 0 else (0.46 * x, 0.46 * y) for k, (x, y) in enumerate(_STAR)],
    "cross": [(-0.36, -1), (0.36, -1), (0.36, -0.36), (1, -0.36), (1, 0.36), (0.36, 0.36),
              (0.36, 1), (-0.36, 1), (-0.36, 0.36), (-1, 0.36), (-1, -0.36), (-0.36, -0.36)],
    "ring": [(np.cos(a), np.sin(a)) for a in np.linspace(0, 2 * np.pi, 48, endpoint=False)],
}  # fmt: skip
"""The shapes that the extractor knows: outline in units of the radius, x to the right, y down."""
RING_HOLE = 0.5
"""Radius of a ring's hole, in units of its radius."""
CLASSES = tuple(f"{colour} {shape}" for colour in PALETTE for shape in OUTLINES)
"""What the columns of `class_probs` mean."""

_FOREGROUND = 38.0  # RGB distance from the background; JPEG ringing and noise stay below it
_LEAST_AREA = 40  # pixels
_GRID = 8


@dataclass(frozen=True)
class Regions:
    """What a detector says about one image, n regions."""

    boxes: Floats
    """float32 [n, 4]: x1, y1, x2, y2 in pixels."""
    features: Floats
    """float32 [n, FEATURE_DIM]."""
    class_probs: Floats
    """float32 [n, len(CLASSES)], rows sum to 1."""


def extract(image: Image.Image | NDArray[np.uint8]) -> Regions:
    """Regions of an RGB image (or uint8 [H, W, 3]), largest first. An empty picture gives one region, the whole."""
    pixels = _pixels(image)
    labels, boxes = _components(_foreground(pixels))
    if not len(boxes):
        boxes = np.array([[0, 0, pixels.shape[1], pixels.shape[0]]], np.float32)
    return _describe(pixels, labels, boxes)


def extract_boxes(image: Image.Image | NDArray[np.uint8], boxes: Floats) -> Regions:
    """Features of given boxes (float [n, 4] xyxy pixels), rows in the order given."""
    pixels = _pixels(image)
    labels, _ = _components(_foreground(pixels))
    return _describe(pixels, labels, np.asarray(boxes, np.float32).reshape(-1, 4))


def _pixels(image: Image.Image | NDArray[np.uint8]) -> Floats:
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"an RGB image is [H, W, 3], not {list(image.shape)}")
    return image.astype(np.float32)


def _foreground(pixels: Floats) -> NDArray[np.bool_]:
    """Pixels that differ from the plane of colour fitted to the image's border."""
    height, width = pixels.shape[:2]
    inverse, border, plane = _border_fit(height, width)
    background = plane @ (inverse @ pixels.reshape(-1, 3)[border])
    difference = pixels.reshape(-1, 3) - background
    mask: NDArray[np.bool_] = np.einsum("pc,pc->p", difference, difference).reshape(height, width) > _FOREGROUND**2
    return mask


@lru_cache(maxsize=16)
def _border_fit(height: int, width: int) -> tuple[Floats, NDArray[np.int64], Floats]:
    rows, columns = np.mgrid[0:height, 0:width]
    plane = np.stack([np.ones(height * width), rows.ravel() / height, columns.ravel() / width], 1).astype(np.float32)
    edge = (rows < 2) | (rows >= height - 2) | (columns < 2) | (columns >= width - 2)
    border = np.flatnonzero(edge)
    return np.linalg.pinv(plane[border]).astype(np.float32), border, plane


def _components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], Floats]:
    """4-connected patches: label per pixel (0 = background) and tight boxes [n, 4], largest patch first."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    if not len(rows):
        return np.zeros(mask.shape, np.int32), np.zeros((0, 4), np.float32)
    patch = _join_runs(rows, starts, ends)
    lengths = ends - starts
    names, patch = np.unique(patch, return_inverse=True)
    areas = np.bincount(patch, lengths)
    order = np.lexsort((np.arange(len(names)), -areas))
    order = order[areas[order] >= _LEAST_AREA]
    boxes = np.empty((len(order), 4), np.float32)
    label_of = np.zeros(len(names), np.int32)
    for label, name in enumerate(order):
        runs = patch == name
        boxes[label] = starts[runs].min(), rows[runs].min(), ends[runs].max(), rows[runs].max() + 1
        label_of[name] = label + 1
    labels = np.zeros(mask.shape, np.int32)
    labels[mask] = np.repeat(label_of[patch], lengths)
    return labels, boxes


def _join_runs(rows: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Union-find over horizontal runs (row-major): runs of neighbouring rows that touch belong together."""
    parent = list(range(len(rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = parent[parent[run]]
            run = parent[run]
        return run

    row, start, end = rows.tolist(), starts.tolist(), ends.tolist()
    above = 0
    for run in range(len(row)):
        while row[above] < row[run] - 1 or (row[above] == row[run] - 1 and end[above] <= start[run]):
            above += 1
        other = above
        while row[other] == row[run] - 1 and start[other] < end[run]:
            parent[root(run)] = root(other)
            other += 1
    return np.array([root(run) for run in range(len(row))])


def _describe(pixels: Floats, labels: NDArray[np.int32], boxes: Floats) -> Regions:
    descriptors = np.stack([_descriptor(pixels, labels, box) for box in boxes])
    centre, projection, bias = _projection()
    features = np.maximum((descriptors - centre) @ projection + bias, 0).astype(np.float32)
    return Regions(boxes.astype(np.float32), features, _class_probs(descriptors))


def _descriptor(pixels: Floats, labels: NDArray[np.int32], box: Floats) -> Floats:
    """Colours (9), mean RGB (3), silhouette (64), texture (6), size (5) of the patch that fills most of the box."""
    height, width = labels.shape
    x1, y1 = max(int(np.floor(box[0])), 0), max(int(np.floor(box[1])), 0)
    x2, y2 = min(max(int(np.ceil(box[2])), x1 + 1), width), min(max(int(np.ceil(box[3])), y1 + 1), height)
    crop = labels[y1:y2, x1:x2]
    counts = np.bincount(crop.ravel())
    counts[0] = 0
    mask = (crop == counts.argmax()) & (crop > 0)
    area = max(int(mask.sum()), 1)
    inside = pixels[y1:y2, x1:x2][mask]
    nearest = _nearest_colour(inside)
    histogram = np.bincount(nearest, minlength=len(PALETTE) + 1) / area
    white = np.zeros(mask.shape, np.float32)
    white[mask] = nearest == len(PALETTE)
    both_down, both_across = mask[1:] & mask[:-1], mask[:, 1:] & mask[:, :-1]
    down = np.abs(white[1:] - white[:-1])[both_down].sum() / area
    across = np.abs(white[:, 1:] - white[:, :-1])[both_across].sum() / area
    coloured = max(float(histogram[:-1].sum()), 1e-3)
    grid = np.asarray(Image.fromarray(mask).convert("L").resize((_GRID, _GRID), Image.Resampling.BOX), np.float32) / 255
    return np.concatenate([
        histogram[:-1] / coloured, histogram[-1:],
        (inside.mean(0) if len(inside) else np.zeros(3)) / 255,
        grid.ravel(),
        [histogram[-1], down, across, min(down, across), max(down, across), abs(down - across)],
        [area / max(mask.size, 1), (x2 - x1) / 48, (y2 - y1) / 48, np.sqrt(area) / 40, (x2 - x1) / (y2 - y1) / 2],
    ]).astype(np.float32)  # fmt: skip


def _nearest_colour(colours: Floats) -> NDArray[np.int64]:
    known = np.array([*PALETTE.values(), PATTERN_WHITE], np.float32)
    # |a - b|² without |a|², which does not change the arg-min
    nearest: NDArray[np.int64] = ((known**2).sum(1) - 2 * colours @ known.T).argmin(1)
    return nearest


@lru_cache(maxsize=1)
def _projection() -> tuple[Floats, Floats, Floats]:
    """Fixed centre of the descriptors, random matrix, bias. The groups move the features about equally.

    Without a centre, what all things have in common would be most of a feature, and attention slow to tell them apart.
    """
    centre = np.concatenate([
        np.full(8, 1 / 8), [0.2], np.full(3, 0.5), _prototypes().mean(0), [0.2, 0.1, 0.1, 0.05, 0.12, 0.07],
        [0.65, 0.63, 0.63, 0.6, 0.5],
    ])  # fmt: skip
    groups = [(9, 2.0), (3, 0.7), (_GRID * _GRID, 0.55), (6, 4.0), (5, 3.0)]
    scale = np.concatenate([np.full(size, weight) for size, weight in groups])
    # RandomState is frozen by numpy's own promise: the same numbers in every version
    random = np.random.RandomState(20200612)
    matrix = random.normal(size=(len(scale), FEATURE_DIM)) * scale[:, None] / np.sqrt(3)
    bias = random.uniform(-0.3, 0.3, FEATURE_DIM)
    return centre.astype(np.float32), matrix.astype(np.float32), bias.astype(np.float32)


def _class_probs(descriptors: Floats) -> Floats:
    """Colour by histogram, shape by distance to drawn prototypes; the product of the two distributions."""
    colour = _softmax(descriptors[:, : len(PALETTE)] * 6)
    grids = descriptors[:, 12 : 12 + _GRID * _GRID]
    distance = ((grids[:, None] - _prototypes()[None]) ** 2).sum(2)
    shape = _softmax(-0.6 * distance)
    product: Floats = (colour[:, :, None] * shape[:, None, :]).reshape(len(descriptors), -1)
    return product.astype(np.float32)


def _softmax(scores: Floats) -> Floats:
    powers = np.exp(scores - scores.max(1, keepdims=True))
    normal: Floats = powers / powers.sum(1, keepdims=True)
    return normal


def draw_silhouette(shape: str, radius: float, centre: tuple[float, float], side: int) -> Image.Image:
    """The shape as a mask ("L", 0 or 255) of side x side pixels, centre and radius in pixels."""
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    draw.polygon([(centre[0] + radius * x, centre[1] + radius * y) for x, y in OUTLINES[shape]], fill=255)
    if shape == "ring":
        hole = radius * RING_HOLE
        draw.ellipse((centre[0] - hole, centre[1] - hole, centre[0] + hole, centre[1] + hole), fill=0)
    return mask


@lru_cache(maxsize=1)
def _prototypes() -> Floats:
    """[shapes, 64]: the silhouettes as the extractor sees a perfect one."""
    grids = []
    for shape in OUTLINES:
        mask = draw_silhouette(shape, 100, (110, 110), 220)
        grids.append(np.asarray(mask.crop(mask.getbbox()).resize((_GRID, _GRID), Image.Resampling.BOX)).ravel() / 255)
    return np.array(grids, np.float32)
