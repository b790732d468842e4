"""What a detector is, and which one the command uses: the embedded world's, torchvision's, or the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from pipelines import extractor
from pipelines.boxes import Float32
from pipelines.errors import BadInput
from pipelines.extractor import Regions

Levels = tuple[float, float, float]
"""A value for red, green and blue, in levels of 0 to 255."""
Sizes = Sequence[tuple[int, int]]
"""Width and height in pixels of each image as it was decoded, before resizing. Boxes are in these pixels."""


@dataclass(frozen=True)
class Preprocessing:
    """How a detector wants its images: resized bilinearly, then normalised as (level - mean) / std, channel by channel."""

    shortest: int = 0
    """The shortest side is scaled to this many pixels; 0: nothing is resized."""
    longest: int = 0
    """The scale shrinks where the longest side would exceed this many pixels; 0: no limit."""
    mean: Levels = (0.0, 0.0, 0.0)
    std: Levels = (1.0, 1.0, 1.0)

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after resizing."""
        if not self.shortest:
            return width, height
        scale = self.shortest / min(width, height)
        if self.longest:
            scale = min(scale, self.longest / max(width, height))
        return max(int(width * scale + 0.5), 1), max(int(height * scale + 0.5), 1)


@runtime_checkable
class Detector(Protocol):
    """What `pipelines.extract` asks of a detector. `pipelines/README.md` has an example."""

    feature_dim: int
    """Columns of `Regions.features`."""
    classes: int
    """Columns of `Regions.class_probs`; 0: none, and `class_probs` is [n, 0]."""
    preprocessing: Preprocessing | None
    """None: images come as uint8 [H, W, 3], RGB, as decoded, on the CPU. Else as float32 [3, h, w], RGB, resized and
    normalised, on the detector's device."""

    def detect(self, images: list[torch.Tensor], sizes: Sizes) -> list[Regions]:
        """Regions of each image of a batch, at least one each, boxes in pixels of `sizes`."""


@runtime_checkable
class BoxDetector(Detector, Protocol):
    """A detector that also describes boxes that others drew (`--boxes`)."""

    def describe(self, images: list[torch.Tensor], sizes: Sizes, boxes: list[Float32]) -> list[Regions]:
        """Features of given boxes, float32 [n, 4] x1, y1, x2, y2 in pixels of `sizes`; rows in the order given."""


class WorldDetector:
    """The embedded world's fixed extractor. It knows that world's things, and nothing else."""

    feature_dim = extractor.FEATURE_DIM
    classes = len(extractor.CLASSES)
    preprocessing: Preprocessing | None = None

    def detect(self, images: list[torch.Tensor], sizes: Sizes) -> list[Regions]:
        """See `Detector`."""
        return [extractor.extract(image.numpy()) for image in images]

    def describe(self, images: list[torch.Tensor], sizes: Sizes, boxes: list[Float32]) -> list[Regions]:
        """See `BoxDetector`."""
        return [extractor.extract_boxes(image.numpy(), given) for image, given in zip(images, boxes, strict=True)]


def _world(weights: Path | None, device: str) -> Detector:
    if weights is not None:
        raise BadInput("--weights", "the world's extractor has none", "leave it out")
    return WorldDetector()


def _torchvision(weights: Path | None, device: str) -> Detector:
    # imported here: torchvision is not among the requirements
    try:
        from pipelines.extract.torchvision_detector import TorchvisionDetector
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        what = f"torchvision cannot be imported: {error}"
        raise BadInput("--detector torchvision", what, "install the release that belongs to this torch") from error
    return TorchvisionDetector.load(weights, device)


DETECTORS: dict[str, Callable[[Path | None, str], Detector]] = {"world": _world, "torchvision": _torchvision}
"""Built-in detectors: name -> factory of weights file and device."""


def load_detector(name: str, weights: Path | None = None, device: str = "cpu") -> Detector:
    """The detector of this name, or what `module:factory` makes of `factory(weights, device)`.

    Raises `BadInput` for a name that leads nowhere, for weights that are missing or do not fit, and for an object that
    is no `Detector`.
    """
    where = f"--detector {name}"
    factory = DETECTORS.get(name)
    if factory is None:
        module, colon, attribute = name.partition(":")
        if not colon:
            raise BadInput(where, "no such detector", f"one of {', '.join(DETECTORS)}, or module:factory")
        try:
            factory = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise BadInput(where, str(error), "module:factory, the module importable from here") from error
    try:
        detector = factory(weights, device)
    except BadInput:
        raise
    except Exception as error:
        what = f"the factory failed: {type(error).__name__}: {error}"
        raise BadInput(
            where, what, "it is called as factory(weights, device), with the values of the options"
        ) from error
    if not isinstance(detector, Detector):
        what = f"made a {type(detector).__name__}, which lacks feature_dim, classes, preprocessing or detect"
        raise BadInput(where, what, "pipelines/extract/README.md has an example")
    return detector
