"""Pictures for a page: found by key, made small, embedded once each, however often they are shown."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from pipelines.errors import BadInput
from pipelines.extract.files import SUFFIXES, find_images
from pipelines.extract.pixels import decode, open_image, pil_warnings
from pipelines.identity import image_key
from pipelines.store.reader import FeatureStore

LONGEST, QUALITY = 480, 80
"""Pixels of the longest side, and JPEG quality, of an embedded picture."""
SHAPE = 0.03
"""How far the ratio of its sides may be from that of the image that the features came from."""


@dataclass(frozen=True)
class Shown:
    """An image that a page may show."""

    key: str
    width: int
    height: int
    """In pixels of the boxes."""
    file: Path | None
    """None: not found, and regions are drawn on grey."""


class Album:
    """The pictures of one page. `folder` has image files, or a folder of them for each feature store, by the store's name."""

    def __init__(self, folder: Path | None) -> None:
        """Raises BadInput where `folder` is named and not there."""
        if folder is not None and not folder.is_dir():
            raise BadInput(f"--images {folder}", "no such folder", "a folder of pictures, or leave it out")
        self._folder = folder
        self._files: dict[Path, dict[str, Path]] = {}
        self._numbers: dict[Path, int | None] = {}
        self.embedded: list[str] = []
        """data: addresses, by number."""

    def show(self, store: FeatureStore, key: str) -> Shown:
        """The image of a store's record. Raises BadInput for a key without one."""
        width, height = store.sizes[store.index([key])[0]].tolist()
        return Shown(key, width, height, self._find(store).get(key))

    def number(self, shown: Shown) -> int | None:
        """Which of `embedded` it is, from now on; None where there is no file, or one of another shape: another image of the
        same number. Raises BadInput for a file that does not decode."""
        if shown.file is None:
            return None
        if shown.file not in self._numbers:
            self._numbers[shown.file] = self._embed(shown.file, shown.width / shown.height)
        return self._numbers[shown.file]

    def _find(self, store: FeatureStore) -> dict[str, Path]:
        """Files below the folder named as the store; without one, those that lie in the album's folder itself: what lies in the
        folder of another store may be another image of the same key."""
        if self._folder is None:
            return {}
        own = self._folder / store.path.stem
        folder = own if own.is_dir() else self._folder
        if folder not in self._files:
            self._files[folder] = find_images(folder) if folder == own else _directly_in(folder)
        return self._files[folder]

    def _embed(self, file: Path, aspect: float) -> int | None:
        with pil_warnings():
            image = Image.fromarray(decode(open_image(file)))
        if abs(image.width / image.height / aspect - 1) > SHAPE:
            return None
        image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
        content = BytesIO()
        image.save(content, "JPEG", quality=QUALITY, optimize=True)
        self.embedded.append("data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode())
        return len(self.embedded) - 1


def _directly_in(folder: Path) -> dict[str, Path]:
    files = (path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES and path.is_file())
    return {image_key(path.name): path for path in files}
