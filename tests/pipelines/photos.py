"""Photograph-like pictures as files, for tests and measurements of decoding."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Smooth colours, hard edges and noise: what a JPEG coder has to deal with."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    for _ in range(12):
        x, y = int(rng.integers(width)), int(rng.integers(height))
        draw.ellipse([x, y, x + width // 8, y + height // 8], fill=tuple(rng.integers(0, 256, 3).tolist()))
    noisy = np.asarray(picture) + rng.normal(0, 6, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def encoded(picture: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    """The bytes of a file of this format."""
    stream = BytesIO()
    picture.save(stream, form, **options)
    return stream.getvalue()


def write_photos(folder: Path, count: int, width: int = 160, height: int = 120) -> Path:
    """`folder` with 0.jpg, 1.jpg, …, all different."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number}.jpg").write_bytes(encoded(photo(number, width, height)))
    return folder
