"""Scenes to pixels, and to the bytes of a JPEG file."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipelines.extractor import PATTERN_WHITE, draw_silhouette
from pipelines.world.scenes import Scene, Thing

_FINE = 3  # things are drawn this many times larger and averaged down: smooth edges


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB image."""
    image = Image.fromarray(_background(scene))
    for thing in scene.things:
        left, top = int(thing.x - thing.radius) - 1, int(thing.y - thing.radius) - 1
        side = int(2 * thing.radius) + 4
        centre = ((thing.x - left) * _FINE, (thing.y - top) * _FINE)
        mask = draw_silhouette(thing.shape, thing.radius * _FINE, centre, side * _FINE)
        image.paste(_fill(thing, side).reduce(_FINE), (left, top), mask.reduce(_FINE))
    return image


def jpeg(image: Image.Image) -> bytes:
    """The image as a JPEG file, colours at full resolution."""
    stream = BytesIO()
    image.save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def _background(scene: Scene) -> NDArray[np.uint8]:
    """A plane of colour with a little grain, uint8 [height, width, 3]."""
    corner, right, down = (np.array(colour, np.float32) for colour in scene.background)
    columns = np.linspace(0, 1, scene.width, dtype=np.float32)[None, :, None]
    rows = np.linspace(0, 1, scene.height, dtype=np.float32)[:, None, None]
    plane = (corner + rows * down) + columns * right
    grain = np.frombuffer(np.random.RandomState(scene.noise_seed).bytes(scene.width * scene.height), np.uint8) & 7
    return (plane + grain.reshape(scene.height, scene.width, 1)).astype(np.uint8)


def _fill(thing: Thing, side: int) -> Image.Image:
    """A square patch of the thing's colour and pattern, at the fine scale."""
    patch = Image.new("RGB", (side * _FINE, side * _FINE), thing.rgb)
    draw = ImageDraw.Draw(patch)
    if thing.pattern == "striped":
        for start in range(3, side, 7):
            low, high = start * _FINE, (start + 3) * _FINE - 1
            bounds = (0, low, side * _FINE, high) if thing.across else (low, 0, high, side * _FINE)
            draw.rectangle(bounds, fill=PATTERN_WHITE)
    elif thing.pattern == "dotted":
        for row, y in enumerate(range(3, side, 6)):
            for x in range(3 + 3 * (row % 2), side, 6):
                draw.ellipse([(v - 1.7) * _FINE for v in (x, y)] + [(v + 1.7) * _FINE for v in (x, y)],
                             fill=PATTERN_WHITE)  # fmt: skip
    return patch
