"""vinvl-pt: one `.pt` file per image with a dictionary of tensors, as VinVL extractors save them.

bbox_features [n, F], bbox_coords [n, 4] x1, y1, x2, y2 in pixels, bbox_probas [n, C] (optional), width, height. The
file's name is the image's. Loaded as tensors only, never as a program.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from pipelines.convert.source import Regions, Sizes, SourceImage, find_files
from pipelines.errors import BadInput

_FILES = ("*.pt", "*.pth")
_NEEDED = ("bbox_features", "bbox_coords", "width", "height")


def images(source: Path, sizes: Sizes | None) -> Iterator[SourceImage]:
    """One image per file."""
    del sizes  # the files hold them
    files = find_files(source, _FILES)
    for number, file in enumerate(files):
        yield SourceImage(file.name, str(file), number / len(files), partial(_regions, file))


def _regions(file: Path) -> Regions:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # torch's words advise to run the file
        raise BadInput(file, "no dictionary of tensors", "is it the right FORMAT? nothing else is read") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        what = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(file, f"no dictionary of tensors: {what}", "truncated or damaged? fetch it again") from error
    if not isinstance(content, dict) or any(name not in content for name in _NEEDED):
        raise BadInput(file, f"expected a dictionary with {', '.join(_NEEDED)}", "is it the right FORMAT?")
    probs = content.get("bbox_probas")
    try:
        return Regions(
            features=content["bbox_features"].float().numpy(),
            boxes=content["bbox_coords"].float().numpy(),
            width=int(content["width"]),
            height=int(content["height"]),
            class_probs=None if probs is None else probs.float().numpy(),
        )
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(file, f"a value is no tensor of numbers ({error})") from error
