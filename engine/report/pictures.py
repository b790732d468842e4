"""Pictures for a page: found by key, made small, embedded once each, however often they are shown."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from pipelines.errors import BadInput
from pipelines.extract.files import find_images
from pipelines.extract.pixels import decode, open_image, pil_warnings
from pipelines.store.reader import FeatureStore

LONGEST, QUALITY = 480, 80
"""Pixels of the longest side, and JPEG quality, of an embedded picture."""


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
        self._numbers: dict[Path, int] = {}
        self.embedded: list[str] = []
        """data: addresses, by number."""

    def show(self, store: FeatureStore, key: str) -> Shown:
        """The image of a store's record. Raises BadInput for a key without one."""
        width, height = store.sizes[store.index([key])[0]].tolist()
        return Shown(key, width, height, self._find(store).get(key))

    def number(self, shown: Shown) -> int | None:
        """Which of `embedded` it is, from now on; None where there is no file. Raises BadInput for one that does not decode."""
        return None if shown.file is None else self._embed(shown.file)

    def _find(self, store: FeatureStore) -> dict[str, Path]:
        if self._folder is None:
            return {}
        own = self._folder / store.path.stem
        folder = own if own.is_dir() else self._folder
        if folder not in self._files:
            self._files[folder] = find_images(folder)
        return self._files[folder]

    def _embed(self, file: Path) -> int:
        if file not in self._numbers:
            with pil_warnings():
                image = Image.fromarray(decode(open_image(file)))
            image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            content = BytesIO()
            image.save(content, "JPEG", quality=QUALITY, optimize=True)
            self._numbers[file] = len(self.embedded)
            self.embedded.append("data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode())
        return self._numbers[file]
