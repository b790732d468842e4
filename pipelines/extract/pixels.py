"""Image files to a detector's input, the plain way: PIL decodes, torch resizes and normalises.

H, W: an image as decoded and upright. h, w: the same after resizing. Pixels are RGB: gray, palettes and CMYK are
converted, transparency is dropped, EXIF orientation applied, the first frame taken, colour profiles ignored. More than
8 bits a channel are refused where PIL has no 8-bit form of them (gray).
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from pipelines.errors import BadInput
from pipelines.extract.detectors import Preprocessing

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")  # never EPS, which starts a program
_MOST_BYTES = 1 << 29
_PIL_ERRORS = (
    OSError, SyntaxError, ValueError, EOFError, struct.error, LookupError, TypeError, AttributeError, ArithmeticError,
    MemoryError, RuntimeError, zlib.error, AssertionError,
)  # fmt: skip
"""What PIL raises on damaged files: its formats' readers are many, and each fails in its own way."""
_ORIENTATION_TAG = 0x112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""EXIF orientation -> what turns the picture upright (EXIF 2.32, section 4.6.4)."""
_MEND = "damaged or no image: fetch it again, or remove it"


class BadImage(BadInput):
    """An image that does not decode: the one kind of error that `--skip-bad` allows for."""


class Decoded(NamedTuple):
    """One image, ready for its detector."""

    image: torch.Tensor
    """uint8 [H, W, 3], or float32 [3, h, w] on the detector's device, as `Detector.preprocessing` says."""
    width: int
    """W."""
    height: int
    """H."""


class Opened(NamedTuple):
    """A file whose header has been read and found acceptable; no pixel is decoded yet."""

    file: Path
    content: bytes
    image: Image.Image


def open_image(file: Path) -> Opened:
    """Read a file and its header, call within `pil_warnings`. Raises `BadImage`, or `BadInput` where it cannot be read."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise BadImage(file, f"more than {_MOST_BYTES >> 20} MB", _MEND)
        content = file.read_bytes()
    except OSError as error:
        raise BadInput(file, f"cannot be read: {error.strerror}", "check the path and its permissions") from error
    if not content:
        raise BadImage(file, "an empty file", _MEND)
    try:
        image = Image.open(BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise BadImage(file, f"none of {', '.join(_FORMATS)}", _MEND) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        what = f"declares more than {(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
        raise BadImage(file, what, "remove it, or make it smaller") from None
    except _PIL_ERRORS as error:
        raise BadImage(file, f"its header cannot be read ({_said(error)})", _MEND) from error
    if image.mode.startswith(("I", "F")):
        raise BadImage(file, f"more than 8 bits a pixel and channel (PIL's mode {image.mode})", "convert it to 8 bits")
    return Opened(file, content, image)


@contextmanager
def pil_warnings() -> Iterator[None]:
    """PIL refuses twice its pixel limit and warns above it: here that is an error too. Its other warnings, of damaged
    metadata, are dropped. Holds for all threads, as Python's warnings do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or its record is damaged, for the pixels are not."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _PIL_ERRORS:
        return 1
    return value if value in _UPRIGHT else 1


def decode(opened: Opened) -> NDArray[np.uint8]:
    """Upright pixels, uint8 [H, W, 3]. Raises `BadImage` for a truncated or damaged file."""
    try:
        # the pixels before the orientation: a PNG's EXIF record may lie behind them
        opened.image.load()
        turn = _UPRIGHT.get(orientation(opened.image))
        image = opened.image if turn is None else opened.image.transpose(turn)
        return np.array(image.convert("RGB"))
    except _PIL_ERRORS as error:
        raise BadImage(opened.file, f"does not decode ({_said(error)})", _MEND) from error


def prepare(pixels: NDArray[np.uint8], rule: Preprocessing | None, device: str) -> Decoded:
    """Decoded pixels, uint8 [H, W, 3], resized and normalised as the detector wants them."""
    height, width = pixels.shape[:2]
    if rule is None:
        return Decoded(torch.from_numpy(pixels), width, height)
    image = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None].float()
    new_width, new_height = rule.size(width, height)
    if (new_width, new_height) != (width, height):
        image = torch.nn.functional.interpolate(image, (new_height, new_width), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(levels, device=device)[:, None, None] for levels in (rule.mean, rule.std))
    return Decoded((image[0] - mean) / std, width, height)


class PlainDecoder:
    """Decodes batches of files by PIL in threads."""

    name = "PIL"

    def __init__(self, rule: Preprocessing | None, device: str = "cpu") -> None:
        self.rule, self.device = rule, device
        self.threads = len(os.sched_getaffinity(0))
        self.pool = ThreadPoolExecutor(self.threads, "decode")

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(cancel_futures=True)

    def decode(self, files: list[Path]) -> list[Decoded | BadImage]:
        """One entry per file. Raises `BadInput` for a file that cannot be read at all."""
        return list(self.pool.map(lambda file: self.finish(_open(file)), files))

    def open(self, files: list[Path]) -> list[Opened | BadImage]:
        """Headers of all files."""
        return list(self.pool.map(_open, files))

    def finish(self, opened: Opened | BadImage) -> Decoded | BadImage:
        """Decode, resize and normalise one."""
        if isinstance(opened, BadImage):
            return opened
        try:
            return prepare(decode(opened), self.rule, self.device)
        except BadImage as error:
            return error


def _open(file: Path) -> Opened | BadImage:
    try:
        return open_image(file)
    except BadImage as error:
        return error


def _said(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
